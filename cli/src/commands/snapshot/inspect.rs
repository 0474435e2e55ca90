//! `doze snapshot inspect`: everything the server says about a snapshot.
use super::find;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the server's own answer as JSON, an array for several snapshots (the default)
    #[arg(long)]
    json: bool,
    /// Snapshots: names, ids or beginnings of ids
    #[arg(required = true, value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let mut found = Vec::new();
    for key in &args.snapshots {
        found.push(find(&server, key, None).await?);
    }
    match found.as_slice() {
        [one] => output::json(one)?,
        several => output::json(&several)?,
    }
    Ok(0)
}
