//! What the guest's init is told at boot: JSON on the config disk.
//!
//! Disk layout: `DOZECFG1` (8 bytes), length of the JSON (u32 LE), its CRC-32 (u32 LE), the JSON,
//! zeros up to a multiple of 4096 bytes. At most [`MAX_JSON`] bytes of JSON.
use serde::{Deserialize, Serialize};

pub const MAX_JSON: usize = 1 << 20;
/// `virtio-serial` port names, visible in the guest under /sys/class/virtio-ports/*/name.
pub const CONTROL_PORT: &str = "doze.agent.0";
/// Receives the program's stdout and stderr.
pub const APP_LOG_PORT: &str = "doze.app.0";
/// Disk serials, visible in the guest under /sys/block/*/serial.
pub const ROOTFS_SERIAL: &str = "doze-rootfs";
pub const OVERLAY_SERIAL: &str = "doze-overlay";
pub const CONFIG_SERIAL: &str = "doze-config";
/// A line init writes to the serial console when the program ended, as fallback when the channel is
/// not connected: this prefix, then JSON of [`crate::message::ProgramExit`].
pub const EXIT_MARKER: &str = "doze-init: program-exit ";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// 1.
    pub version: u32,
    pub instance_id: String,
    pub hostname: String,
    /// Entrypoint and command joined; not empty.
    pub argv: Vec<String>,
    /// `KEY=VALUE`, image's first, the request's override by key.
    pub env: Vec<String>,
    /// Absolute; `/` when the image says nothing. Created when absent, as container runtimes do.
    pub working_dir: String,
    /// `user[:group]`; empty means root.
    pub user: String,
    /// Signal name that asks the program to end, for example `SIGTERM`.
    pub stop_signal: String,
    pub network: Option<GuestNetwork>,
    /// Lifecycle reports and shutdown stay; exec and file access are refused.
    pub skip_guest_agent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    pub mac: String,
    /// `10.77.0.5`
    pub address: std::net::Ipv4Addr,
    pub prefix: u8,
    pub gateway: std::net::Ipv4Addr,
    /// Name servers for /etc/resolv.conf.
    pub dns: Vec<std::net::Ipv4Addr>,
}

/// Why a config disk was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config disk: {0}")]
    Malformed(String),
}

pub fn encode(config: &GuestConfig) -> Result<Vec<u8>, ConfigError> {
    let _ = config;
    unimplemented!()
}
pub fn decode(disk: &[u8]) -> Result<GuestConfig, ConfigError> {
    let _ = disk;
    unimplemented!()
}
