//! `doze schedule set`: when snapshots are taken, and which are kept.
use doze_api::{SetSnapshotScheduleRequest, SnapshotScheduleRetention};

use super::describe;
use crate::{commands::common, connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time from one snapshot to the next, at least 1m, for example 30m or 24h
    #[arg(long, value_name = "DURATION")]
    every: String,
    #[command(flatten)]
    retention: Retention,
    /// Beginning of the snapshots' names
    #[arg(long)]
    prefix: Option<String>,
    /// Tag of the snapshots; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: its name, id or the beginning of its id
    name: String,
}

/// Without either, snapshots would fill the disk.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
struct Retention {
    /// Keep this many of them at most
    #[arg(long, value_name = "COUNT")]
    keep: Option<u32>,
    /// Delete those that are older, for example 168h
    #[arg(long, value_name = "DURATION")]
    max_age: Option<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let request = SetSnapshotScheduleRequest {
        interval: args.every,
        retention: SnapshotScheduleRetention {
            max_count: args.retention.keep.map(i64::from),
            max_age: args.retention.max_age,
        },
        metadata: (!args.tags.is_empty()).then(|| common::map(args.tags)),
        name_prefix: args.prefix,
    };
    let schedule = server
        .client
        .set_snapshot_schedule(&args.name, &request)
        .await
        .map_err(|e| server.explain(&e))?;
    match args.json {
        true => output::json(&schedule)?,
        false => output::line(&describe(&schedule))?,
    }
    Ok(0)
}
