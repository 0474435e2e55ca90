//! `doze schedule rm`: take no more snapshots.
use super::explain;
use crate::{commands::common, connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    common::for_each(&args.names, async |name| {
        server
            .client
            .delete_snapshot_schedule(name)
            .await
            .map_err(|e| explain(server, name, &e))?;
        output::line(name)
    })
    .await
}
