//! Stored snapshots: copies of a moment that outlive the instance they were taken of.
//!
//! ```text
//!   source's driver ──capture──> captures/X/ ──rename──> snapshots/ID/ ──row in the store──> it exists
//!                                                            │ clone
//!                                     new instance (fork) <──┴──> its source, in place (rollback)
//! ```
//! A folder of a snapshot holds what is copied of an instance (see [`crate::copies`]): `overlay.raw`, and with
//! memory `memory` and `snapshot/`. The row is the commit point: a folder without a row is removed at
//! start-up, a deleted row makes its folder one. Whoever clones from a folder holds its gate open for readers; a
//! delete waits for them.
pub mod catalog;
mod fork;
pub mod schedule;
mod store;
mod transfer;
mod usage;

use std::collections::BTreeMap;

use doze_vmm::Hypervisor;
use serde::{Deserialize, Serialize};

use crate::{Compression, InstanceSpec, MemoryCompression};

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SnapshotKind {
    /// Memory, device state and disk of a guest that ran or slept.
    Standby,
    /// The disk of a stopped instance.
    Stopped,
}

/// Where a fork or a rollback is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetState {
    Stopped,
    Standby,
    Running,
}

/// One stored snapshot. Never changes, except for how its memory is kept, and its size with that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// CUID2, 24 characters.
    pub id: String,
    /// Unique among the snapshots of its source.
    pub name: Option<String>,
    pub kind: SnapshotKind,
    pub source_id: String,
    pub source_name: String,
    /// Microseconds since the Unix epoch.
    pub created_at_us: i64,
    pub tags: BTreeMap<String, String>,
    /// A schedule took it, and its retention may remove it.
    pub scheduled: bool,
    /// Bytes of its files, holes included.
    pub size_bytes: u64,
    /// Bytes of its memory image, holes included; 0 without memory.
    pub memory_bytes: u64,
    /// What its source was then.
    pub spec: InstanceSpec,
    /// The source's record of the moment; tells how far its boot had come.
    pub(crate) record: doze_lifecycle::Record,
    /// The memory was a fork's that had not yet been told who it is.
    pub(crate) inherited: bool,
    /// How its memory is kept; `None`: as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<MemoryCompression>,
}

impl Snapshot {
    pub fn hypervisor(&self) -> Hypervisor {
        self.spec.hypervisor
    }
}

/// A checked request for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    pub kind: SnapshotKind,
    pub name: Option<String>,
    pub tags: BTreeMap<String, String>,
    /// Wins over the instance's and the server's.
    pub compression: Option<Compression>,
}

/// Which snapshots to list; what is absent does not matter.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotFilter {
    pub kind: Option<SnapshotKind>,
    pub name: Option<String>,
    pub source_id: Option<String>,
    /// All of them.
    pub tags: BTreeMap<String, String>,
}

/// A checked request to fork an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkRequest {
    pub name: String,
    /// A running source may be paused for a moment.
    pub from_running: bool,
    /// `None`: what the source is (Running, Standby or Stopped).
    pub target: Option<TargetState>,
}

/// A checked request to make an instance from a stored snapshot, or to bring one back to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Revival {
    /// `None`: Running with memory, Stopped without.
    pub target: Option<TargetState>,
    /// Only without memory.
    pub hypervisor: Option<Hypervisor>,
}

/// When snapshots of an instance are taken by themselves, and which of them are kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleRequest {
    /// At least one minute.
    pub interval_us: u64,
    /// Keep at most this many scheduled snapshots.
    pub max_count: Option<u32>,
    /// Keep none older than this.
    pub max_age_us: Option<u64>,
    /// Tags of the snapshots.
    pub metadata: BTreeMap<String, String>,
    /// At most 47 characters.
    pub name_prefix: Option<String>,
}

/// A schedule as it stands. Times are microseconds since the Unix epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Schedule {
    pub instance_id: String,
    pub request: ScheduleRequest,
    pub created_at_us: i64,
    pub updated_at_us: i64,
    pub next_run_at_us: i64,
    pub last_run_at_us: Option<i64>,
    pub last_snapshot_id: Option<String>,
    /// Why the last run failed, until one succeeds.
    pub last_error: Option<String>,
}

/// What the host's disk holds, in bytes. Extents that several files share count once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskUsage {
    /// Of the file system of `data_dir`.
    pub capacity: u64,
    pub free: u64,
    /// All that is ours, once.
    pub allocated: u64,
    /// The same by kind: what kinds share is counted with the first of them.
    pub images: u64,
    pub overlays: u64,
    pub memory: u64,
    pub snapshots: u64,
    /// By instance: id, name, bytes (shared ones counted with each).
    pub instances: Vec<(String, String, u64)>,
}
