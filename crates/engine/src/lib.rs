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
use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use doze_agent::{client::ExecSession, message::ExecRequest};
use doze_host::net::NetworkConfig;
use doze_image::{Image, ImportEvent};
use doze_lifecycle::{Stamp, State};
use doze_vmm::{Hypervisor, Probe, boot::KernelSource, qemu::QemuConfig};

mod error;
mod view;
pub use error::EngineError;
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
}

/// Replaces the kept overrides from this start on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartOverrides {
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
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

/// Handle to the engine; clones share it.
#[derive(Clone)]
pub struct Engine {
    _inner: Arc<()>,
}

impl Engine {
    /// Opens the store, prepares network and boot files lazily, reconciles every record with what is
    /// really there, and reattaches running machines. Returns when all records are consistent.
    pub async fn open(config: EngineConfig) -> Result<Self, EngineError> {
        let _ = config;
        unimplemented!()
    }

    /// Makes and boots an instance; answers when the guest's CPUs run (state `Initializing`).
    pub async fn create(&self, request: CreateRequest) -> Result<InstanceView, EngineError> {
        let _ = request;
        unimplemented!()
    }
    /// Views in order of creation.
    pub fn list(&self) -> Vec<Arc<InstanceView>> {
        unimplemented!()
    }
    /// By id, exact name or unique id prefix, in this order.
    pub fn get(&self, key: &str) -> Result<Arc<InstanceView>, EngineError> {
        let _ = key;
        unimplemented!()
    }
    /// Answers when the guest's CPUs run.
    pub async fn start(
        &self,
        key: &str,
        overrides: StartOverrides,
    ) -> Result<Arc<InstanceView>, EngineError> {
        let _ = (key, overrides);
        unimplemented!()
    }
    /// Asks the program to end, then the machine; answers when the VMM is gone.
    pub async fn stop(&self, key: &str) -> Result<Arc<InstanceView>, EngineError> {
        let _ = key;
        unimplemented!()
    }
    /// Answers when nothing of the instance is left.
    pub async fn delete(&self, key: &str, graceful: bool) -> Result<(), EngineError> {
        let _ = (key, graceful);
        unimplemented!()
    }
    /// Answers when the state is reached, when it can no longer be reached without a new command
    /// (terminal: Stopped or Standby with nothing in flight), or after `timeout`.
    pub async fn wait(
        &self,
        key: &str,
        target: State,
        timeout: Duration,
    ) -> Result<WaitOutcome, EngineError> {
        let _ = (key, target, timeout);
        unimplemented!()
    }
    /// Waits up to `wait_for_agent` for a booting guest's agent.
    pub async fn exec(
        &self,
        key: &str,
        request: ExecRequest,
        wait_for_agent: Duration,
    ) -> Result<ExecSession, EngineError> {
        let _ = (key, request, wait_for_agent);
        unimplemented!()
    }
    /// Lines without their newline, oldest first: the last `tail` ones (`None`: all), then, with `follow`, new ones as they
    /// appear, until the instance is deleted or the receiver is dropped. Invalid UTF-8 is replaced.
    pub async fn logs(
        &self,
        key: &str,
        source: LogSource,
        tail: Option<usize>,
        follow: bool,
    ) -> Result<tokio::sync::mpsc::Receiver<String>, EngineError> {
        let _ = (key, source, tail, follow);
        unimplemented!()
    }

    pub async fn image_import(
        &self,
        name: String,
        path: PathBuf,
        platform: Option<String>,
        tags: BTreeMap<String, String>,
        progress: tokio::sync::mpsc::UnboundedSender<ImportEvent>,
    ) -> Result<Image, EngineError> {
        let _ = (name, path, platform, tags, progress);
        unimplemented!()
    }
    pub async fn image_list(&self) -> Result<Vec<Image>, EngineError> {
        unimplemented!()
    }
    pub async fn image_get(&self, name: &str) -> Result<Image, EngineError> {
        let _ = name;
        unimplemented!()
    }
    /// Refused while an instance uses it.
    pub async fn image_delete(&self, name: &str) -> Result<(), EngineError> {
        let _ = name;
        unimplemented!()
    }

    /// Every monitor this build has, sorted by name, with what the host lacks for it.
    pub async fn monitors(&self) -> Vec<(Hypervisor, Probe)> {
        unimplemented!()
    }
    /// `None` when the server has no network; otherwise the error when it could not be set up.
    pub fn network(&self) -> Option<Result<NetworkConfig, String>> {
        unimplemented!()
    }
    pub fn default_hypervisor(&self) -> Hypervisor {
        unimplemented!()
    }
    /// Refuses new commands, lets running operations finish (up to `grace`), leaves VMs running.
    pub async fn shutdown(&self, grace: Duration) {
        let _ = grace;
    }
}
