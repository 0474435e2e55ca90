//! PID 1 of a guest.
//!
//! ```text
//!   mounts ─> modules ─> disks ─> config ─> root ─> files, network ─> program ─┐
//!      └── any failure: boot error to the host, power off                      │
//!   power off <─ read-only <─ everybody else ended <─ reported <─ program ended ┘ <── Shutdown request
//! ```
//!
//! Init never returns and never lets the kernel panic: whatever goes wrong ends in a power-off,
//! because that is what the host waits for.
use std::io;

use doze_agent::config::{ConfigError, GuestConfig};
use tokio::task::LocalSet;

use crate::users::UserError;

mod console;
mod devices;
mod files;
pub mod identity;
mod life;
mod mounts;
mod network;
mod power;
mod program;
pub mod uevent;

/// Why a guest could not come up as configured.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("{context}: {source}")]
    Io { context: String, source: io::Error },
    #[error("no disk with serial {serial} appeared within {seconds} s")]
    NoDisk { serial: &'static str, seconds: u64 },
    #[error("network: no device has the address {mac}")]
    NoNetworkDevice { mac: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error("stop signal: {0:?} is not a signal; use a name like SIGTERM or a number from 1 to 64")]
    StopSignal(String),
}

impl BootError {
    fn io(context: impl std::fmt::Display, source: io::Error) -> Self {
        Self::Io {
            context: context.to_string(),
            source,
        }
    }
}

/// Everything, from the kernel's hand-over to the power-off.
pub fn run() -> ! {
    std::panic::set_hook(Box::new(|info| {
        console::say(format_args!("internal error: {info}"));
        rustix::fs::sync();
        power::off()
    }));
    let early = mounts::early();
    console::open();
    console::read_debug_flag();
    console::debug("init begins");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => LocalSet::new().block_on(&runtime, async {
            let mut root = None;
            let booted = match early {
                Ok(()) => boot(&mut root).await,
                Err(error) => Err(error),
            };
            life::live(booted, root.as_ref()).await;
        }),
        Err(error) => console::say(format_args!("cannot start: {error}")),
    }
    power::off()
}

/// `root` is set as soon as there is one, so that it is left clean also when a later step fails.
async fn boot(root: &mut Option<mounts::Root>) -> Result<GuestConfig, BootError> {
    devices::load_modules()?;
    console::debug("modules loaded");
    let disks = devices::Disks::find().await?;
    let config = devices::read_config(&disks.config)?;
    console::debug("disks found");
    *root = Some(mounts::enter(&disks)?);
    console::debug("root entered");
    mounts::late()?;
    console::debug("mounts made");
    files::write(&config)?;
    network::configure(config.network.as_ref())?;
    console::debug("network configured");
    Ok(config)
}
