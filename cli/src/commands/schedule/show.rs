//! `doze schedule show`: when the next snapshot is due, and how the last one went.
use super::{describe, explain};
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: its name, id or the beginning of its id
    name: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let schedule = server
        .client
        .get_snapshot_schedule(&args.name)
        .await
        .map_err(|e| explain(&server, &args.name, &e))?;
    match args.json {
        true => output::json(&schedule)?,
        false => output::line(&describe(&schedule))?,
    }
    Ok(0)
}
