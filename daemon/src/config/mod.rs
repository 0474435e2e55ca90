//! Configuration: a TOML file, overridden by `DOZE_…` variables, checked as a whole.
//!
//! ```text
//!   doze.toml ──┐
//!               ├──> Reader (flat keys, each with its place) ──typed reads──> Config
//!   DOZE_… ─────┘                     └── every mistake, all at once ──> ConfigErrors
//! ```
//!
//! A variable's name is `DOZE_` and the key in upper case; a section and its key are joined by two
//! underscores: `listen` is `DOZE_LISTEN`, `hypervisor.default` is `DOZE_HYPERVISOR__DEFAULT`. An
//! empty variable counts as not set. An unknown key of the file is a mistake; an unknown variable is
//! a warning, because other software adds variables too. Only [`Config::load`] reads the
//! environment of the process.
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use doze_engine::{ExecPolicy, KillSwitch, SnapshotConfig};
use doze_host::net::Subnet;
use doze_vmm::{Accel, Hypervisor, MemoryBacking};

mod engine;
mod reader;
mod sections;
#[cfg(test)]
mod tests;
mod value;

use reader::Reader;

const KILL_AT: &str = "DOZE_KILL_AT";

/// Everything an operator can choose. See doze.example.toml for the meaning of each key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub data_dir: PathBuf,
    pub listen: SocketAddr,
    /// How long running requests and operations may take to end at shutdown.
    pub shutdown_grace: Duration,
    pub auth: Auth,
    pub hypervisor: HypervisorConfig,
    pub kernel: Kernel,
    pub network: Network,
    pub images: Images,
    pub limits: Limits,
    pub standby: Standby,
    pub auto_standby: AutoStandby,
    pub snapshot: SnapshotConfig,
    pub memory: Memory,
    pub log: Log,
    /// `DOZE_KILL_AT`, for crash tests: where this process is to die. Not a key of the file.
    pub(crate) kill_at: Option<String>,
    /// One warning for each `DOZE_…` variable that sets no key.
    pub(crate) unknown_variables: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// Signs and verifies tokens; generated into `<data_dir>/jwt_secret` when absent.
    pub jwt_secret: Option<Secret>,
}

/// A text that must not reach a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Bytes of a key for HS256 at least (RFC 7518 section 3.2). A shorter one can be guessed from
    /// one token, and the holder of the secret can make tokens.
    pub const MIN_BYTES: usize = 32;

    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HypervisorConfig {
    /// What an instance gets whose request names none.
    pub default: Hypervisor,
    /// `None`: KVM when truly usable, else TCG.
    pub accel: Option<Accel>,
    /// `None`: looked up in PATH.
    pub qemu_path: Option<PathBuf>,
    /// User the machine monitors drop to.
    pub run_as: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub image: PathBuf,
    /// `None`: everything is built into the kernel.
    pub modules: Option<PathBuf>,
    pub extra_cmdline: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    pub enabled: bool,
    pub bridge: String,
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
    /// Name servers of the guests; `None`: the host's own that guests can reach.
    pub dns: Option<Vec<Ipv4Addr>>,
    pub guest_to_host: bool,
    /// Name of the nftables table.
    pub table: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Images {
    /// Bytes of an uploaded archive at most.
    pub max_import_bytes: u64,
}

/// See [`doze_engine::Limits`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub max_instances: usize,
    pub max_vcpus_per_instance: u32,
    pub max_memory_per_instance: u64,
    pub max_total_memory: Option<u64>,
    pub max_overlay: u64,
    pub default_vcpus: u32,
    pub default_memory: u64,
    pub default_overlay: u64,
    pub stop_grace: Duration,
    pub boot_timeout: Duration,
    pub max_log_bytes: u64,
    pub max_concurrent_restores: usize,
}

/// How instances fall asleep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standby {
    pub exec_sessions: ExecPolicy,
}

/// How instances that nobody uses fall asleep by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutoStandby {
    /// Such standbys at the same time at most.
    pub max_concurrent: usize,
    /// How often the table of connections is read although nothing happened.
    pub reconcile_interval: Duration,
}

/// Where guest memory lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    pub backing: MemoryBacking,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    /// A `tracing` filter: `info`, `doze_engine=debug,info`, ...
    pub level: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The key, or the file when it cannot be read at all.
    pub key: String,
    pub reason: String,
}

/// All mistakes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(
            f,
            "{count} mistake{} in the configuration:",
            if count == 1 { "" } else { "s" }
        )?;
        for error in &self.0 {
            write!(f, "\n  {}: {}", error.key, error.reason)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

impl Config {
    /// Reads the file, if one is named, and the process' environment.
    pub fn load(path: Option<&Path>) -> Result<Config, ConfigErrors> {
        let file = match path {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    ConfigErrors(vec![ConfigError {
                        key: path.display().to_string(),
                        reason: format!("cannot read the file: {error}"),
                    }])
                })?;
                Some((path, text))
            }
            None => None,
        };
        let variables = std::env::vars_os().filter_map(|(name, text)| {
            Some((
                name.into_string().ok()?,
                text.to_string_lossy().into_owned(),
            ))
        });
        Config::parse(
            file.as_ref().map(|(path, text)| (*path, text.as_str())),
            variables,
        )
    }

    /// The same from given places.
    pub fn parse(
        file: Option<(&Path, &str)>,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, ConfigErrors> {
        let mut reader = Reader::default();
        if let Some((path, text)) = file {
            reader.add_file(path, text);
        }
        let variables: Vec<_> = variables.into_iter().collect();
        let kill_at = variables
            .iter()
            .find(|(name, text)| name == KILL_AT && !text.is_empty())
            .map(|(_, text)| text.clone());
        if let Err(name) = KillSwitch::from_env(kill_at.clone()) {
            reader.error(KILL_AT, format!("{name:?} is not a point to die at"));
        }
        reader.add_environment(variables);
        let mut config = sections::read(&mut reader);
        config.kill_at = kill_at;
        config.unknown_variables = reader.finish()?;
        Ok(config)
    }

    /// What an operator should know though it is allowed.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.unknown_variables.clone();
        if !self.listen.ip().is_loopback() {
            warnings.push(format!(
                "listen = {}: the API is plain HTTP and reachable from other machines; whoever reads the traffic reads the tokens. Listen on 127.0.0.1 and put a TLS proxy in front",
                self.listen
            ));
        }
        if let IpAddr::V4(listen) = self.listen.ip()
            && self.network.enabled
            && listen == self.network.gateway
        {
            warnings.push("listen: the guests' gateway; guests may call the API".to_owned());
        }
        warnings
    }

    /// Where the generated secret is.
    pub fn secret_path(&self) -> PathBuf {
        self.data_dir.join("jwt_secret")
    }

    /// Where uploads are staged; emptied at start-up.
    pub(crate) fn uploads_dir(&self) -> PathBuf {
        self.data_dir.join("uploads")
    }
}
