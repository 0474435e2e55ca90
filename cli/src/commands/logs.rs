//! `doze logs`: lines that were, and with `-f` lines to come.
use doze_api::{LogSource, client::LogsQuery};

use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with new lines as they appear
    #[arg(short, long)]
    follow: bool,
    /// How many lines from the end, or `all`
    #[arg(short = 'n', long, default_value = "all", value_parser = tail)]
    tail: u64,
    /// Which log: app (the program), vmm (the machine and its console), hypeman (what the server did)
    #[arg(long, default_value_t = LogSource::App)]
    source: LogSource,
    /// Instance: name, id or beginning of an id
    name: String,
}

/// More lines than any log has.
pub const ALL: u64 = i32::MAX as u64;

fn tail(text: &str) -> Result<u64, String> {
    if text == "all" {
        return Ok(ALL);
    }
    text.parse()
        .map_err(|_| "expected a number of lines, or all".to_owned())
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let query = LogsQuery {
        tail: Some(args.tail),
        follow: args.follow,
        source: args.source,
    };
    let mut lines = server
        .client
        .logs(&args.name, &query)
        .await
        .map_err(|e| server.explain(&e))?;
    while let Some(line) = lines.next().await {
        output::line(&line.map_err(|e| server.explain(&e))?)?;
    }
    Ok(0)
}
