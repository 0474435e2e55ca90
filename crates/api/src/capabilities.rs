//! What a server says about itself.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /health`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub status: HealthStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    Ok,
}

/// What works on this server and host, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capabilities {
    pub server: ServerInfo,
    pub host: HostInfo,
    /// Every machine monitor this build has, sorted by name.
    pub runtimes: Vec<Runtime>,
    pub default_runtime: DefaultRuntime,
    /// API surfaces that work whichever runtime an instance has.
    pub features: Vec<String>,
    pub network: NetworkSupport,
    pub images: ImageSupport,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerInfo {
    /// Version of the contract, as in the OpenAPI document.
    pub api_version: String,
    /// Version of the build.
    pub version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    #[schema(example = "linux")]
    pub os: String,
    #[schema(example = "amd64")]
    pub arch: String,
}

/// One machine monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Runtime {
    pub name: String,
    /// It can launch machines on this host now.
    pub available: bool,
    /// What works with it.
    pub features: Vec<String>,
    /// Addition of doze: what is missing and how to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable_reason: Option<String>,
    /// Addition of doze: version of the monitor's program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Addition of doze: `kvm` or `tcg`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acceleration: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DefaultRuntime {
    pub name: String,
    pub available: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkSupport {
    pub model: NetworkModel,
    /// Whether guests may talk to each other directly.
    pub guest_to_guest: bool,
    /// The host as guests see it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// CIDR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// Addition of doze: why instances cannot have a network, when they cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unavailable_reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetworkModel {
    Bridge,
    Nat,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageSupport {
    /// What a request that names no platform gets.
    pub default_platform: String,
    pub platforms: Vec<String>,
}
