//! `doze fork`: a new instance that goes on where another one is.
use doze_api::{ForkInstanceRequest, TargetState};

use super::common;
use crate::{connection, failure::Failure, progress};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fork a running instance, which is paused for the moment of the copy
    #[arg(long)]
    from_running: bool,
    /// What the new instance is to be: Running, Standby or Stopped; without it, what the source is
    #[arg(long, value_name = "STATE")]
    target_state: Option<TargetState>,
    /// Return as soon as the machine runs, before its program does
    #[arg(long)]
    no_wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance to fork: its name, id or the beginning of its id
    name: String,
    /// Name of the new instance
    new: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let request = ForkInstanceRequest {
        name: args.new,
        from_running: args.from_running.then_some(true),
        target_state: args.target_state,
    };
    let fork = progress::during(&format!("forking {}", args.name), async {
        let fork = server
            .client
            .fork_instance(&args.name, &request)
            .await
            .map_err(|e| server.explain(&e))?;
        common::brought_up(&server, fork, args.no_wait).await
    })
    .await?;
    common::made(&fork, args.json)
}
