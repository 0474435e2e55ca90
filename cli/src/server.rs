//! The server on this host: where its configuration is, and what can be known from it.
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use doze_daemon::{Config, ConfigErrors};

use crate::failure::Failure;

/// Where [`locate`] looks, for messages.
pub const PLACES: &str = "looked at DOZE_CONFIG, /etc/doze/doze.toml and ./doze.toml";
/// Long enough for any command to begin; a log that is followed longer is not cut off by its end.
const SESSION: Duration = Duration::from_secs(600);
/// Who the tokens of this command line are for.
pub const SUBJECT: &str = "doze-cli";

/// The configuration file of this host's server.
pub fn locate() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("DOZE_CONFIG").filter(|path| !path.is_empty()) {
        // Named, so it counts even when it is missing: then its absence is what has to be told.
        return Some(named.into());
    }
    ["/etc/doze/doze.toml", "doze.toml"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.is_file())
}

pub fn load(path: Option<&Path>) -> Result<Config, Failure> {
    Config::load(path).map_err(|errors| Failure::new(errors.to_string()))
}

/// Where the server listens.
pub fn listen_address(path: &Path) -> Result<SocketAddr, ConfigErrors> {
    Config::load(Some(path)).map(|config| config.listen)
}

/// A token for this command only.
pub fn session_token(path: &Path) -> Result<String, Failure> {
    token(&load(Some(path))?, SESSION)
}

pub fn token(config: &Config, ttl: Duration) -> Result<String, Failure> {
    doze_daemon::token(config, SUBJECT, ttl).map_err(|error| {
        use std::error::Error as _;
        let cause = error
            .source()
            .map(|source| format!(": {source}"))
            .unwrap_or_default();
        Failure::new(format!("{error}{cause}"))
    })
}
