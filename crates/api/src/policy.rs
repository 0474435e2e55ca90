//! Policies and attachments of the contract that an instance may carry.
//!
//! They are known here in full so that a request is read strictly; which of them have an effect is
//! the server's business (it refuses those it has not built yet).
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Sleep when no client is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AutoStandbyPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_destination_ports: Option<Vec<u16>>,
    /// CIDRs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ignore_source_cidrs: Option<Vec<String>>,
    /// Addition of doze, a Go duration: a connection that has been silent for longer does not count. Without,
    /// the kernel keeps that of a client that vanished for days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_flow_idle: Option<String>,
}

/// How the workload's health is probed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheck {
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<HealthCheckType>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HealthCheckHttp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<HealthCheckTcp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<HealthCheckExec>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_period: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_threshold: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheckType {
    None,
    Http,
    Tcp,
    Exec,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheckHttp {
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_status: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheme: Option<HealthCheckScheme>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheckScheme {
    Http,
    Https,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheckTcp {
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthCheckExec {
    pub command: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
}

/// Whether an instance is started again when its program ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestartPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<RestartMode>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backoff: Option<String>,
    /// 0: unlimited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u32>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable_after: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartMode {
    Never,
    Always,
    OnFailure,
}

/// How snapshots of an instance are made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
    /// Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby_compression_delay: Option<String>,
}

/// Whether and how memory is compressed. When it is not enabled, nothing else of it counts, whatever it says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "AnyCompressionConfig")]
pub struct SnapshotCompressionConfig {
    pub enabled: bool,
    /// zstd when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<CompressionAlgorithm>,
    /// zstd: 1 to 19, 1 when absent; lz4: 0 to 9, 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<i32>,
}

/// As it arrives.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnyCompressionConfig {
    enabled: bool,
    #[serde(default)]
    algorithm: serde_json::Value,
    #[serde(default)]
    level: serde_json::Value,
}

impl TryFrom<AnyCompressionConfig> for SnapshotCompressionConfig {
    type Error = String;

    fn try_from(any: AnyCompressionConfig) -> Result<Self, String> {
        if !any.enabled {
            return Ok(Self::default());
        }
        let (algorithm, level) = (any.algorithm, any.level);
        Ok(Self {
            enabled: true,
            algorithm: serde_json::from_value(algorithm.clone())
                .map_err(|_| format!("algorithm: {algorithm} is not one; allowed: zstd, lz4"))?,
            level: serde_json::from_value(level.clone())
                .map_err(|_| format!("level: {level} is not a whole number; allowed: 1 to 19 with zstd, 0 to 9 with lz4"))?,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressionAlgorithm {
    Zstd,
    Lz4,
}

/// A volume in an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeMount {
    pub volume_id: String,
    pub mount_path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
}

/// A secret that only the host knows and puts into the guest's outgoing requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialPolicy {
    pub source: CredentialSource,
    pub inject: Vec<CredentialInject>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialSource {
    /// Name of the real value in the request's `env`.
    pub env: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialInject {
    #[serde(rename = "as")]
    pub target: CredentialInjectAs,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CredentialInjectAs {
    pub header: String,
    /// Contains `${value}`.
    pub format: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GpuConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
}

/// Mediation of outbound traffic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EgressPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcement: Option<EgressEnforcement>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EgressEnforcement {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<EgressMode>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EgressMode {
    All,
    HttpHttpsOnly,
}
