//! `doze restore`: let a sleeping instance go on where it was.
use doze_api::InstanceState;

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
    common::for_each(&args.names, async |name| {
        let instance = server
            .client
            .restore_instance(name)
            .await
            .map_err(|e| server.explain(&e))?;
        if instance.state == InstanceState::Initializing
            && let Some(why) = &instance.failure
        {
            output::remark(&format!("{}: {why}", instance.name));
        }
        output::line(&instance.name)
    })
    .await
}
