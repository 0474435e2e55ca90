//! `doze snapshot rm`: delete snapshots.
use super::find;
use crate::{commands::common, connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Snapshots: names, ids or beginnings of ids
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    common::for_each(&args.snapshots, async |key| {
        // By id: the name may mean another one in the meantime.
        let snapshot = find(server, key, None).await?;
        server
            .client
            .delete_snapshot(&snapshot.id)
            .await
            .map_err(|e| server.explain(&e))?;
        output::line(snapshot.name.as_deref().unwrap_or(&snapshot.id))
    })
    .await
}
