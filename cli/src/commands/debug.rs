//! `doze debug`: what crash tests and benches need besides the API. Hidden from the overview.
use std::path::PathBuf;

use crate::{failure::Failure, output, server};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Names of the points at which DOZE_KILL_AT can end the server, one per line
    KillPoints,
    /// Add stopped instances to the store of a server that does not run
    SeedStopped {
        /// How many
        count: usize,
        /// The server's configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
}

pub async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::KillPoints => {
            for name in doze_daemon::debug::kill_points() {
                output::line(name)?;
            }
        }
        Command::SeedStopped { count, config } => {
            let path = config.or_else(server::locate);
            let config = server::load(path.as_deref())?;
            doze_daemon::debug::seed_stopped(&config, count)
                .await
                .map_err(|error| Failure::new(format!("{error:#}")))?;
        }
    }
    Ok(0)
}
