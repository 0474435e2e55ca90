//! Snapshots, forks and schedules on the wire.
use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    Hypervisor,
    instance::{ParseWordError, pick},
    policy::SnapshotCompressionConfig,
};

/// What a snapshot holds.
///
/// - Standby: memory, device state and disk of a guest that ran or slept
/// - Stopped: the disk of a stopped instance
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
pub enum SnapshotKind {
    Standby,
    Stopped,
}

impl SnapshotKind {
    pub const ALL: [SnapshotKind; 2] = [SnapshotKind::Standby, SnapshotKind::Stopped];

    pub const fn as_str(self) -> &'static str {
        match self {
            SnapshotKind::Standby => "Standby",
            SnapshotKind::Stopped => "Stopped",
        }
    }
}

impl fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SnapshotKind {
    type Err = ParseWordError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        pick(Self::ALL, Self::as_str, "snapshot kind", text)
    }
}

/// Where a fork or a restored snapshot is to end.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
pub enum TargetState {
    Stopped,
    Standby,
    Running,
}

impl TargetState {
    pub const ALL: [TargetState; 3] = [
        TargetState::Stopped,
        TargetState::Standby,
        TargetState::Running,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            TargetState::Stopped => "Stopped",
            TargetState::Standby => "Standby",
            TargetState::Running => "Running",
        }
    }
}

impl fmt::Display for TargetState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for TargetState {
    type Err = ParseWordError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        pick(Self::ALL, Self::as_str, "target state", text)
    }
}

/// Body of `POST /instances/{id}/snapshots`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshotRequest {
    pub kind: SnapshotKind,
    /// Unique among the snapshots of its source. Lower-case letters, digits and dashes; no dash at either end; at
    /// most 63 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63
    )]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    /// How the memory is compressed; only with the kind `Standby`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
}

/// Body of `POST /instances/{id}/snapshots/{snapshot_id}/restore`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshotRequest {
    /// `Running` after a `Standby` snapshot and `Stopped` after a `Stopped` one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<TargetState>,
    /// Another machine monitor than the source's; only with a `Stopped` snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_hypervisor: Option<Hypervisor>,
}

/// Body of `POST /snapshots/{snapshot_id}/fork`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkSnapshotRequest {
    /// Name of the new instance.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63
    )]
    pub name: String,
    /// `Running` from a `Standby` snapshot and `Stopped` from a `Stopped` one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<TargetState>,
    /// Another machine monitor than the source's; only from a `Stopped` snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_hypervisor: Option<Hypervisor>,
}

/// Body of `POST /instances/{id}/fork`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkInstanceRequest {
    /// Name of the new instance.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63
    )]
    pub name: String,
    /// A running source may be paused for the moment of the copy; without it, forking one is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_running: Option<bool>,
    /// The state of the source when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<TargetState>,
}

/// How far the compression of a snapshot's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressionState {
    None,
    Compressing,
    Compressed,
    Error,
}

impl CompressionState {
    pub const fn as_str(self) -> &'static str {
        match self {
            CompressionState::None => "none",
            CompressionState::Compressing => "compressing",
            CompressionState::Compressed => "compressed",
            CompressionState::Error => "error",
        }
    }
}

/// A stored snapshot. It outlives its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// CUID2, 24 characters.
    pub id: String,
    #[serde(default)]
    pub name: Option<String>,
    pub kind: SnapshotKind,
    pub source_instance_id: String,
    /// What the source was called then.
    pub source_instance_name: String,
    pub source_hypervisor: Hypervisor,
    /// RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// Bytes of all its files, holes included.
    pub size_bytes: u64,
    /// Addition of doze: bytes of disk its files hold; what they share with others counts here, too. Deleting the
    /// snapshot frees at most this much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    /// Addition of doze: a schedule took it, and the schedule's retention may delete it.
    #[serde(default)]
    pub scheduled: bool,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression_state: Option<CompressionState>,
    /// Why the compression failed.
    #[serde(default)]
    pub compression_error: Option<String>,
    #[serde(default)]
    pub compressed_size_bytes: Option<u64>,
    /// Bytes of its memory image; null without memory.
    #[serde(default)]
    pub uncompressed_size_bytes: Option<u64>,
}

/// Which scheduled snapshots are kept. At least one of the two must be above zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotScheduleRetention {
    /// The newest so many are kept; 0 does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0)]
    pub max_count: Option<i64>,
    /// Go duration; older ones are deleted; `0s` does not look at the age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<String>,
}

/// Body of `PUT /instances/{id}/snapshot-schedule`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSnapshotScheduleRequest {
    /// Go duration, at least `1m`.
    #[schema(example = "24h")]
    pub interval: String,
    pub retention: SnapshotScheduleRetention,
    /// Tags of the snapshots it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Beginning of the names of the snapshots it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length = 47)]
    pub name_prefix: Option<String>,
}

/// When snapshots of an instance are taken by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotSchedule {
    pub instance_id: String,
    /// Go duration.
    pub interval: String,
    pub retention: SnapshotScheduleRetention,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub name_prefix: Option<String>,
    /// RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub created_at: String,
    #[schema(format = DateTime)]
    pub updated_at: String,
    #[schema(format = DateTime)]
    pub next_run_at: String,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub last_run_at: Option<String>,
    /// The snapshot of the last run that succeeded.
    #[serde(default)]
    pub last_snapshot_id: Option<String>,
    /// Why the last run failed, until one succeeds.
    #[serde(default)]
    pub last_error: Option<String>,
}
