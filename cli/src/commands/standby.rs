//! `doze standby`: keep an instance's memory on disk and let its machine go.
use doze_api::StandbyInstanceRequest;

use super::common;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    let request = &StandbyInstanceRequest::default();
    common::for_each(&args.names, async |name| {
        let instance = server
            .client
            .standby_instance(name, request)
            .await
            .map_err(|e| server.explain(&e))?;
        output::line(&instance.name)
    })
    .await
}
