//! `doze snapshot restore`: an instance becomes what it was.
use doze_api::{Hypervisor, RestoreSnapshotRequest, TargetState};

use super::find;
use crate::{commands::common, connection, failure::Failure, progress};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the instance is to be then: Running, Standby or Stopped; without it, Running with memory and Stopped
    /// without
    #[arg(long, value_name = "STATE")]
    target_state: Option<TargetState>,
    /// Machine monitor from now on; only with a Stopped snapshot
    #[arg(long)]
    hypervisor: Option<Hypervisor>,
    /// Return as soon as the machine runs, before its program does
    #[arg(long)]
    no_wait: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: its name, id or the beginning of its id
    name: String,
    /// Snapshot of it: its name, id or the beginning of its id
    snapshot: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let explain = |e| server.explain(&e);
    let instance = server
        .client
        .get_instance(&args.name)
        .await
        .map_err(explain)?;
    let snapshot = find(&server, &args.snapshot, Some(&instance.id)).await?;
    let request = RestoreSnapshotRequest {
        target_state: args.target_state,
        target_hypervisor: args.hypervisor,
    };
    let restored = progress::during(&format!("restoring {}", instance.name), async {
        let restored = server
            .client
            .restore_snapshot(&instance.id, &snapshot.id, &request)
            .await
            .map_err(explain)?;
        common::brought_up(&server, restored, args.no_wait).await
    })
    .await?;
    common::made(&restored, args.json)
}
