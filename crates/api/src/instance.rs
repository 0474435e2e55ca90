//! Instances on the wire.
use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::policy::{
    AutoStandbyPolicy, CredentialPolicy, EgressPolicy, GpuConfig, HealthCheck, RestartPolicy,
    SnapshotCompressionConfig, SnapshotPolicy, VolumeMount,
};

/// State of an instance.
///
/// - Created: its machine is being prepared or built, its CPUs never ran
/// - Initializing: the guest runs, its program has not started or its agent is not ready
/// - Running: the guest's program has started and its agent is ready
/// - Paused: the guest's CPUs are stopped
/// - Shutdown: the guest powered off, its machine monitor is still there
/// - Stopped: no machine, no snapshot
/// - Standby: no machine, a snapshot to come back to
/// - Unknown: the state could not be determined, see `state_error`
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
pub enum InstanceState {
    Created,
    Initializing,
    Running,
    Paused,
    Shutdown,
    Stopped,
    Standby,
    Unknown,
}

impl InstanceState {
    pub const ALL: [InstanceState; 8] = [
        InstanceState::Created,
        InstanceState::Initializing,
        InstanceState::Running,
        InstanceState::Paused,
        InstanceState::Shutdown,
        InstanceState::Stopped,
        InstanceState::Standby,
        InstanceState::Unknown,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            InstanceState::Created => "Created",
            InstanceState::Initializing => "Initializing",
            InstanceState::Running => "Running",
            InstanceState::Paused => "Paused",
            InstanceState::Shutdown => "Shutdown",
            InstanceState::Stopped => "Stopped",
            InstanceState::Standby => "Standby",
            InstanceState::Unknown => "Unknown",
        }
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is not one of the allowed words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a {what}; allowed: {allowed}")]
pub struct ParseWordError {
    pub what: &'static str,
    pub value: String,
    pub allowed: String,
}

impl FromStr for InstanceState {
    type Err = ParseWordError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        pick(Self::ALL, Self::as_str, "state", text)
    }
}

pub(crate) fn pick<T: Copy, const N: usize>(
    all: [T; N],
    name: fn(T) -> &'static str,
    what: &'static str,
    text: &str,
) -> Result<T, ParseWordError> {
    all.into_iter()
        .find(|item| name(*item) == text)
        .ok_or_else(|| ParseWordError {
            what,
            value: text.to_owned(),
            allowed: all.map(name).join(", "),
        })
}

/// Machine monitors of the contract. Which of them a server has, its capabilities say.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    CloudHypervisor,
    Firecracker,
    Qemu,
    QemuMicrovm,
    Vz,
}

impl Hypervisor {
    pub const ALL: [Hypervisor; 5] = [
        Hypervisor::CloudHypervisor,
        Hypervisor::Firecracker,
        Hypervisor::Qemu,
        Hypervisor::QemuMicrovm,
        Hypervisor::Vz,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Hypervisor::CloudHypervisor => "cloud-hypervisor",
            Hypervisor::Firecracker => "firecracker",
            Hypervisor::Qemu => "qemu",
            Hypervisor::QemuMicrovm => "qemu-microvm",
            Hypervisor::Vz => "vz",
        }
    }
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Hypervisor {
    type Err = ParseWordError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        pick(Self::ALL, Self::as_str, "hypervisor", text)
    }
}

/// Which log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogSource {
    /// Output of the guest's program.
    #[default]
    App,
    /// Output of the machine monitor and the guest's serial console.
    Vmm,
    /// What the server did with the instance.
    Hypeman,
}

impl LogSource {
    pub const ALL: [LogSource; 3] = [LogSource::App, LogSource::Vmm, LogSource::Hypeman];

    pub const fn as_str(self) -> &'static str {
        match self {
            LogSource::App => "app",
            LogSource::Vmm => "vmm",
            LogSource::Hypeman => "hypeman",
        }
    }
}

impl fmt::Display for LogSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LogSource {
    type Err = ParseWordError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        pick(Self::ALL, Self::as_str, "log source", text)
    }
}

/// Body of `POST /instances`. Only `name` and `image` are required.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateInstanceRequest {
    /// Lower-case letters, digits and dashes; no dash at either end; at most 63 characters.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63
    )]
    pub name: String,
    /// OCI image reference; normalised as Docker does.
    #[schema(example = "docker.io/library/alpine:latest")]
    pub image: String,
    /// `os/arch[/variant]`; the host's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Hypervisor>,
    /// At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1)]
    pub vcpus: Option<i64>,
    /// Memory, for example `1GB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Memory to plug in later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<String>,
    /// Writable disk, for example `10GB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
    /// For example `100MB/s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_io_bps: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Replaces the image's entrypoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<CreateNetwork>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_guest_agent: Option<bool>,
    /// Accepted and without effect: kernel headers are never installed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip_kernel_headers: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandbyPolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<BTreeMap<String, CredentialPolicy>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<String>>,
    /// RFC 3339; not together with `ttl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// Go duration; `0s` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<VolumeMount>>,
}

/// Network part of a create request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// On when absent, provided the server has a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// For example `1Gbps` or `125MB/s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_download: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_upload: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<EgressPolicy>,
}

/// Body of `POST /instances/{id}/start`; what is absent keeps its previous value.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartInstanceRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// Boots an instance that is in standby from its disk; its memory is lost. An addition of doze.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discard_memory: bool,
}

/// Body of `POST /instances/{id}/standby`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StandbyInstanceRequest {
    /// How the memory is compressed; wins over the instance's and the server's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<crate::policy::SnapshotCompressionConfig>,
    /// Go duration to wait before compressing; wins over the instance's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression_delay: Option<String>,
}

/// Answer of `GET /instances/{id}/phases`: the ledger that people bill from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstancePhases {
    pub id: String,
    pub name: String,
    /// The phase whose time runs now.
    pub current_phase: String,
    #[schema(format = DateTime)]
    pub current_phase_since: String,
    /// Milliseconds spent in each phase, the current one up to this answer included.
    pub phase_durations_ms: BTreeMap<String, u64>,
    /// The part of them that nobody saw, because the server was away when the machine ended.
    pub phase_durations_estimated_ms: BTreeMap<String, u64>,
    /// The newest changes of phase, oldest first; 100 at most.
    pub transitions: Vec<PhaseTransition>,
    /// Changes of phase in all; those that are not listed are older.
    pub transitions_total: u64,
}

/// One change of phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTransition {
    /// RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub at: String,
    pub from: String,
    pub to: String,
    /// `user`, `auto-standby`, `wake`, `schedule`, `guest`, `crash` or `recovery`.
    pub cause: String,
}

/// Answer of `GET /instances/{id}/wait`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WaitForStateResponse {
    /// State when the wait ended.
    pub state: InstanceState,
    /// The time was over before the state was reached.
    pub timed_out: bool,
    /// Why the state is `Unknown`.
    #[serde(default)]
    pub state_error: Option<String>,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// CUID2, 24 characters.
    pub id: String,
    pub name: String,
    /// Normalised image reference.
    pub image: String,
    pub state: InstanceState,
    /// Why the state is `Unknown`.
    #[serde(default)]
    pub state_error: Option<String>,
    /// Addition of doze: why the last operation on the instance failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub created_at: String,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub started_at: Option<String>,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub stopped_at: Option<String>,
    #[serde(default)]
    #[schema(format = DateTime, required = true)]
    pub expires_at: Option<String>,
    /// The phase whose time runs now: `state` in lower case (the last one known when `Unknown`).
    #[serde(default)]
    pub current_phase: Option<String>,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub current_phase_since: Option<String>,
    /// Milliseconds spent in each phase, the current one up to this answer included.
    #[serde(default)]
    pub phase_durations_ms: BTreeMap<String, u64>,
    /// Addition of doze: the part of `phase_durations_ms` that nobody saw, because the server was away when the
    /// machine ended. Absent when there is none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phase_durations_estimated_ms: BTreeMap<String, u64>,
    #[serde(default)]
    pub has_snapshot: bool,
    /// Exit code of the program; null when it has not ended.
    #[serde(default)]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Hypervisor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Memory, for example `1GB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Writable disk, for example `10GB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<InstanceNetwork>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Absent when it was never given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandbyPolicy>,
    /// Absent when it was never given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// Addition of doze: what becomes of the memory of an instance that sleeps. Absent when it is kept as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby_compression: Option<StandbyCompression>,
}

/// How far the compression of a sleeping instance's memory is. An addition of doze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StandbyCompression {
    pub state: StandbyCompressionState,
    pub compression: SnapshotCompressionConfig,
    /// RFC 3339, UTC: it does not begin before this.
    #[schema(format = DateTime)]
    pub due_at: String,
    /// Why it failed; the memory is kept as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Bytes of the compressed memory, once it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed_size_bytes: Option<u64>,
    /// Bytes of the memory.
    pub uncompressed_size_bytes: u64,
}

/// - pending: it waits for its time or its turn
/// - compressing: it is at work
/// - compressed: it is done
/// - error: it failed
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum StandbyCompressionState {
    Pending,
    Compressing,
    Compressed,
    Error,
}

impl StandbyCompressionState {
    pub const fn as_str(self) -> &'static str {
        match self {
            StandbyCompressionState::Pending => "pending",
            StandbyCompressionState::Compressing => "compressing",
            StandbyCompressionState::Compressed => "compressed",
            StandbyCompressionState::Error => "error",
        }
    }
}

/// Network of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceNetwork {
    #[serde(default)]
    pub enabled: bool,
    /// `default` when enabled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default)]
    pub ip: Option<String>,
    #[serde(default)]
    pub mac: Option<String>,
}
