//! `doze token`: a bearer token for somebody who cannot read the server's secret.
use std::{path::PathBuf, time::Duration};

use crate::{failure::Failure, output, server};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server's configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How long it is good for, for example 30m, 12h or 720h
    #[arg(long, default_value = "24h", value_parser = ttl)]
    ttl: Duration,
}

fn ttl(text: &str) -> Result<Duration, String> {
    let parsed = doze_lifecycle::duration::parse(text).map_err(|e| e.to_string())?;
    parsed
        .to_std()
        .filter(|ttl| ttl.as_secs() > 0)
        .ok_or_else(|| "must be at least one second".to_owned())
}

pub fn run(args: Args) -> Result<u8, Failure> {
    let path = args.config.or_else(server::locate);
    let config = server::load(path.as_deref())?;
    output::line(&server::token(&config, args.ttl)?)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes() {
        assert_eq!(ttl("1h30m"), Ok(Duration::from_secs(5400)));
        for bad in ["0", "10", "-1h", "500ms", "tomorrow", ""] {
            assert!(ttl(bad).is_err(), "{bad}");
        }
    }
}
