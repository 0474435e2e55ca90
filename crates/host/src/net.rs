//! The network of one server: a bridge, a persistent TAP per instance, and an nftables table of our own.
//! Works the same inside a network namespace. Nothing outside our table and links is touched.
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// An IPv4 network in CIDR form, for example `10.77.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    pub network: Ipv4Addr,
    pub prefix: u8,
}

#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// At most 15 characters.
    pub bridge: String,
    pub subnet: Subnet,
    /// The bridge's own address, the guests' gateway (first host of the subnet by default).
    pub gateway: Ipv4Addr,
    /// Name of our nftables table (family inet and bridge).
    pub table: String,
    /// Let guests open connections to the host itself. Off by default.
    pub guest_to_host: bool,
}

/// What belongs to one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapConfig {
    /// At most 15 characters.
    pub tap: String,
    /// Stored as the link's alias; the full instance id.
    pub alias: String,
    pub mac: String,
    pub ip: Ipv4Addr,
    /// User id that may open the TAP besides root.
    pub owner: Option<u32>,
}

/// Handle to the kernel's link and nftables configuration.
#[derive(Clone)]
pub struct Network {
    config: NetworkConfig,
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A privilege, a kernel feature or a program is missing.
    #[error("{what}; {mend}")]
    Missing { what: String, mend: String },
    #[error("{context}: {message}")]
    Failed { context: String, message: String },
}

impl Network {
    /// Makes bridge, address, forwarding and the base ruleset as configured, idempotently.
    pub async fn ensure(config: NetworkConfig) -> Result<Self, NetError> {
        let _ = config;
        unimplemented!()
    }
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }
    /// Creates the TAP on the bridge (port isolated, anti-spoofing for its MAC and IP), idempotently.
    pub async fn ensure_tap(&self, tap: &TapConfig) -> Result<(), NetError> {
        let _ = tap;
        unimplemented!()
    }
    /// Removes the TAP and its rules; absent is fine.
    pub async fn delete_tap(&self, tap: &str) -> Result<(), NetError> {
        let _ = tap;
        unimplemented!()
    }
    /// TAPs on our bridge with their alias, for reconciling at start-up.
    pub async fn list_taps(&self) -> Result<Vec<(String, String)>, NetError> {
        unimplemented!()
    }
}
