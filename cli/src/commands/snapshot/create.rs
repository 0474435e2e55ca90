//! `doze snapshot create`: keep a moment of an instance.
use doze_api::{
    CreateSnapshotRequest, InstanceState, SnapshotKind, policy::SnapshotCompressionConfig,
};

use crate::{
    commands::{common, compression},
    connection,
    failure::Failure,
    output, progress,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to call it; unique among the snapshots of the instance
    #[arg(long = "name", value_name = "SNAPSHOT")]
    called: Option<String>,
    /// Standby (memory and disk) or Stopped (disk); without it, what fits the instance's state
    #[arg(long)]
    kind: Option<SnapshotKind>,
    /// Tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Compress the memory: zstd or lz4, with a level if need be (zstd:3); none: keep it as it is. Without it, the
    /// instance's policy decides, or the server's
    #[arg(long, value_name = compression::FORM, value_parser = compression::wanted)]
    compress: Option<SnapshotCompressionConfig>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: its name, id or the beginning of its id
    name: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let explain = |e| server.explain(&e);
    let instance = server
        .client
        .get_instance(&args.name)
        .await
        .map_err(explain)?;
    let request = CreateSnapshotRequest {
        kind: args.kind.unwrap_or_else(|| fitting(instance.state)),
        name: args.called,
        tags: (!args.tags.is_empty()).then(|| common::map(args.tags)),
        compression: args.compress,
    };
    let taking = server.client.create_snapshot(&instance.id, &request);
    let snapshot = progress::during(&format!("taking a snapshot of {}", instance.name), taking)
        .await
        .map_err(explain)?;
    match args.json {
        true => output::json(&snapshot)?,
        false => output::line(&snapshot.id)?,
    }
    Ok(0)
}

/// What can be kept of an instance in this state; the server has the last word.
fn fitting(state: InstanceState) -> SnapshotKind {
    match state {
        InstanceState::Stopped => SnapshotKind::Stopped,
        InstanceState::Created
        | InstanceState::Initializing
        | InstanceState::Running
        | InstanceState::Paused
        | InstanceState::Shutdown
        | InstanceState::Standby
        | InstanceState::Unknown => SnapshotKind::Standby,
    }
}
