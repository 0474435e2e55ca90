//! The one owner of instances.
//!
//! ```text
//!   daemon ──Engine──> registry ──command──> driver task (one per instance) ──> Machine, AgentClient
//!             ^                                   │ 1. store (durable)
//!             └──────── watch: InstanceView <─────┘ 2. publish
//! ```
//!
//! Each instance has one driver task that owns its record, its machine and its channel. Everyone
//! else sends it commands and reads the latest view, so reads never wait. A caller that hangs up
//! stops nothing.
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use doze_host::net::NetworkConfig;
use doze_lifecycle::{Stamp, State};
use doze_vmm::{Hypervisor, boot::KernelSource, qemu::QemuConfig};

mod auto_standby;
mod compression;
mod context;
mod copies;
mod driver;
mod engine;
mod error;
mod images;
mod instance;
mod kill;
mod life_sign;
mod logs;
mod metrics;
mod observe;
mod ops;
mod plan;
mod proof;
mod recovery;
mod registry;
mod seed;
mod snapshots;
mod store;
mod view;

pub use auto_standby::{
    AutoStandbyConfig, AutoStandbyMetrics, AwakeBecause, Reason, Status, StatusWord, TRACKING_MODE,
};
pub use compression::{
    counters::{CompressionMetrics, Histogram, JobResult, Jobs, Labels, Preparation, Source},
    plan::{MemoryCompression, Progress, Running},
    policy::{Compression, SnapshotConfig, SnapshotPolicy, StandbyOptions},
};
pub use doze_snapshot::{Algorithm, Codec};
pub use engine::{Engine, Monitors};
pub use error::EngineError;
pub use kill::{CommitStep, KillPoint, KillSwitch};
pub use metrics::MetricsView;
pub use seed::seed_stopped;
pub use snapshots::{
    DiskUsage, ForkRequest, Revival, Schedule, ScheduleRequest, Snapshot, SnapshotFilter,
    SnapshotKind, SnapshotRequest, TargetState,
};
pub use store::AddressPool;
pub use view::{InstanceSpec, InstanceView, NetworkClaim};

/// Everything the engine needs to know of the configuration.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Private folder of this server (0700). Two servers never share one.
    pub data_dir: PathBuf,
    pub default_hypervisor: Hypervisor,
    pub qemu: QemuConfig,
    pub kernel: KernelSource,
    /// Appended to the kernel command line.
    pub kernel_extra_cmdline: String,
    /// `None`: instances have no network.
    pub network: Option<NetworkConfig>,
    /// Name servers written into guests.
    pub dns: Vec<std::net::Ipv4Addr>,
    pub limits: Limits,
    pub standby: StandbyConfig,
    pub auto_standby: AutoStandbyConfig,
    pub snapshot: SnapshotConfig,
    /// Where the memory of machines that are booted from now on lives.
    pub memory: doze_vmm::MemoryBacking,
    /// Where, if anywhere, this process is to die; for crash tests.
    pub kill: KillSwitch,
}

/// How instances fall asleep.
#[derive(Debug, Clone, Default)]
pub struct StandbyConfig {
    pub exec_sessions: ExecPolicy,
}

/// What happens to exec sessions that are open when an instance is told to sleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ExecPolicy {
    /// They end with a message once the snapshot is committed.
    #[default]
    End,
    /// The standby is refused.
    Refuse,
}

#[derive(Debug, Clone)]
pub struct Limits {
    /// Instances that exist at most.
    pub max_instances: usize,
    /// vCPUs of one instance at most.
    pub max_vcpus_per_instance: u32,
    /// Bytes of RAM of one instance at most.
    pub max_memory_per_instance: u64,
    /// Bytes of RAM of all instances with a VMM at most; `None`: the host's memory.
    pub max_total_memory: Option<u64>,
    /// Bytes of an overlay disk at most.
    pub max_overlay: u64,
    /// Overlay size when the request names none.
    pub default_overlay: u64,
    /// RAM when the request names none.
    pub default_memory: u64,
    pub default_vcpus: u32,
    /// Time a program gets to end on `stop` before it is killed.
    pub stop_grace: Duration,
    /// A boot that takes longer is given up.
    pub boot_timeout: Duration,
    /// A log file is cut to its newest half when it grows beyond this many bytes.
    pub max_log_bytes: u64,
    /// Restores that run at the same time at most; the others wait their turn.
    pub max_concurrent_restores: usize,
}

/// A checked create request. Sizes in bytes; `None` means the server's default.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    pub name: String,
    /// As given; normalised by the engine.
    pub image: String,
    pub platform: Option<String>,
    pub hypervisor: Option<Hypervisor>,
    pub vcpus: Option<u32>,
    pub memory_bytes: Option<u64>,
    pub overlay_bytes: Option<u64>,
    pub env: BTreeMap<String, String>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub tags: BTreeMap<String, String>,
    /// `None`: on when the server has a network.
    pub network_enabled: Option<bool>,
    pub skip_guest_agent: bool,
    pub auto_standby: Option<doze_host::conntrack::policy::Policy>,
    pub snapshot_policy: Option<SnapshotPolicy>,
}

/// Replaces the kept overrides from this start on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartOverrides {
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
}

impl StartOverrides {
    pub fn is_empty(&self) -> bool {
        *self == StartOverrides::default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// The guest program's output.
    App,
    /// The VMM's own output and the guest's serial console.
    Vmm,
    /// What this server did with the instance.
    Operations,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitOutcome {
    pub state: State,
    pub timed_out: bool,
    pub unknown: Option<String>,
}

/// This moment on both clocks, for answers that count the live phase up to now.
pub fn now() -> Stamp {
    Stamp {
        boot_id: doze_host::clock::boot_id().unwrap_or_default(),
        boottime_us: u64::try_from(doze_host::clock::boottime().as_micros()).unwrap_or(u64::MAX),
        wall_us: doze_host::clock::wall_us(),
    }
}
