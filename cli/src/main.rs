//! The `doze` command: a thin client of the server's API, and the way to start that server.
//!
//! ```text
//!   argv ──clap──> commands/VERB ──> connection (where is the server, may we talk to it)
//!                       │                 └──> doze_api::Client ──HTTP──> doze serve
//!                       └──> output (stdout: results only)    stderr: `doze: ...`, progress
//! ```
//!
//! Exit status: 0 success; 1 failure; 2 wrong usage; `run` and `exec` pass the program's own status
//! through and end with 125 when there is none because doze itself failed.
use std::process::ExitCode;

use clap::Parser;

mod attach;
mod commands;
mod connection;
mod failure;
mod names;
mod output;
mod progress;
mod server;
mod terminal;
mod upload;

use failure::Failure;

/// Run container images as microVMs.
///
/// Every NAME may be an instance's name, its id, or the beginning of its id.
///
/// The server is found through DOZE_URL, else through its own configuration file on this host
/// (DOZE_CONFIG, /etc/doze/doze.toml or ./doze.toml), else at http://localhost:4973. The token comes
/// from DOZE_TOKEN, else it is made from the server's secret when that can be read.
#[derive(Debug, Parser)]
#[command(name = "doze", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    connection: connection::Options,
    #[command(subcommand)]
    command: commands::Command,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(e) => return report(&Failure::new(format!("cannot start: {e}"))),
    };
    let outcome = runtime.block_on(commands::run(cli.command, &cli.connection));
    // A read of standard input cannot be cancelled; waiting for it would hang until the next key.
    runtime.shutdown_background();
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(failure) => report(&failure),
    }
}

fn report(failure: &Failure) -> ExitCode {
    match failure {
        Failure::Message { status, .. } => {
            output::remark(&failure.to_string());
            ExitCode::from(*status)
        }
        Failure::ReaderGone => ExitCode::SUCCESS,
    }
}

/// The whole command line, for its tests.
#[cfg(test)]
fn command_line() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

#[cfg(test)]
mod tests;
