//! `doze snapshot fork`: a new instance that begins where a snapshot was taken.
use doze_api::{ForkSnapshotRequest, Hypervisor, TargetState};

use super::find;
use crate::{commands::common, connection, failure::Failure, progress};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the new instance is to be: Running, Standby or Stopped; without it, Running with memory and Stopped
    /// without
    #[arg(long, value_name = "STATE")]
    target_state: Option<TargetState>,
    /// Another machine monitor than the source's; only from a Stopped snapshot
    #[arg(long)]
    hypervisor: Option<Hypervisor>,
    /// Return as soon as the machine runs, before its program does
    #[arg(long)]
    no_wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Snapshot: its name, id or the beginning of its id
    snapshot: String,
    /// Name of the new instance
    new: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let snapshot = find(&server, &args.snapshot, None).await?;
    let request = ForkSnapshotRequest {
        name: args.new,
        target_state: args.target_state,
        target_hypervisor: args.hypervisor,
    };
    let fork = progress::during(&format!("forking {}", args.snapshot), async {
        let fork = server
            .client
            .fork_snapshot(&snapshot.id, &request)
            .await
            .map_err(|e| server.explain(&e))?;
        common::brought_up(&server, fork, args.no_wait).await
    })
    .await?;
    common::made(&fork, args.json)
}
