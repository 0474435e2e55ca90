//! `doze serve`: the server itself.
use std::path::PathBuf;

use crate::{failure::Failure, server};

/// Start the server
///
/// Runs in the foreground until SIGTERM or SIGINT; instances go on running without it, and the next
/// server takes them up again. Every key of the configuration can also be given as a variable:
/// `listen` as DOZE_LISTEN, `kernel.image` as DOZE_KERNEL__IMAGE.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file (TOML); doze.example.toml explains every key
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub async fn run(args: Args) -> Result<u8, Failure> {
    let path = args.config.or_else(server::locate);
    let config = server::load(path.as_deref())?;
    doze_daemon::serve(config)
        .await
        .map_err(|error| Failure::new(format!("{error:#}")))?;
    Ok(0)
}
