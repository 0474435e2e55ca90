//! `doze start`: boot a stopped instance again; its disk is as it was.
use doze_api::StartInstanceRequest;

use super::common;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Return as soon as the machine runs, before its program does
    #[arg(long)]
    no_wait: bool,
    /// Boot a sleeping instance from its disk; its memory is lost
    #[arg(long)]
    discard_memory: bool,
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    let no_wait = args.no_wait;
    let request = StartInstanceRequest {
        discard_memory: args.discard_memory,
        ..StartInstanceRequest::default()
    };
    let request = &request;
    common::for_each(&args.names, async |name| {
        let instance = server
            .client
            .start_instance(name, request)
            .await
            .map_err(|e| server.explain(&e))?;
        if !no_wait {
            common::started(&common::settled(server, &instance.id).await?)?;
        }
        output::line(&instance.name)
    })
    .await
}
