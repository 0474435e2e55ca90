//! The contract between the engine and a machine monitor (VMM).
//!
//! ```text
//!   Monitor::spawn ──> Machine (CPUs never ran) ──resume──> running <──pause/resume──> paused
//!        │                    │                                │
//!        │                    └── kill ──────────────┬─────────┴── guest powers off ──> Shutdown
//!   Monitor::attach (after a restart of the server)  └──> process gone <── kill ───────────┘
//! ```
//!
//! Who calls what: only the driver task of one instance calls these methods, one at a time, except
//! [`Machine::watch`] whose receiver may be polled at any moment.
//!
//! Cancelling (dropping a future half way): `spawn` leaves at most a VMM process that carries the
//! instance's marker in its environment (see `doze_host::process::find_marked`); the caller must
//! reap it. `resume`, `pause` and `status` may or may not have taken effect: ask `status`.
//! Every call has its own deadline and returns [`VmmError::Timeout`] instead of hanging.
//!
//! Who owns the memory image (`MachineDescription::memory`):
//! - no VMM process: the engine;
//! - VMM alive, CPUs never ran: the VMM maps it; nobody else may write;
//! - running or paused: the VMM. The file changes under everybody's feet while running;
//! - process gone: the engine again. After a run without a snapshot its content is worthless.
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use doze_host::process::ProcessId;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// A kind of machine monitor, named as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    /// QEMU with the q35 board.
    Qemu,
    /// QEMU with the microvm board and virtio-mmio devices.
    QemuMicrovm,
    CloudHypervisor,
    Firecracker,
}

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    Kvm,
    Tcg,
}

/// Everything that makes the machine what it is. Stored with the instance for its run, because a
/// restore needs the identical description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDescription {
    pub hypervisor: Hypervisor,
    /// Versioned machine type, for example `pc-q35-7.2`; chosen by [`Monitor::machine_type`].
    pub machine_type: String,
    pub accel: Accel,
    /// Instance id; becomes the VMM's guest name.
    pub id: String,
    /// 1 or more.
    pub vcpus: u32,
    /// Bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    pub memory: MemoryImage,
    /// Uncompressed kernel (ELF with PVH note).
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Complete kernel command line.
    pub cmdline: String,
    pub disks: Vec<Disk>,
    pub nic: Option<Nic>,
    /// Folder for this run's sockets. Short: a unix socket path holds at most 107 bytes.
    pub run_dir: PathBuf,
    /// Append-only log of the VMM's stdout, stderr and the guest's serial console.
    pub vmm_log: PathBuf,
    /// Append-only file that receives the guest program's output (second virtio-serial port).
    pub app_log: PathBuf,
}

/// Where guest RAM lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryImage {
    pub path: PathBuf,
    pub backing: MemoryBacking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBacking {
    /// Shared mapping of a sparse file; free-page reporting punches holes into it.
    Shared,
}

/// A raw disk image on virtio-blk. The guest finds it by `serial`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// At most 20 bytes, `[a-z0-9-]`: `doze-rootfs`, `doze-overlay`, `doze-config`.
    pub serial: String,
    pub path: PathBuf,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name of an existing persistent TAP device.
    pub tap: String,
    /// `52:54:00:..` in lower case.
    pub mac: String,
}

/// What a monitor on this host can do; the truth behind `GET /capabilities`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Version string of the binary, for example `7.2.22`.
    pub version: Option<String>,
    /// `None` when it can launch machines; otherwise what is missing and how to mend it.
    pub missing: Option<String>,
    pub accel: Accel,
}

/// Where the machine is, by its VMM's own account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineStatus {
    /// Built, CPUs never ran.
    Prelaunch,
    Running,
    Paused,
    /// The guest powered off; the VMM process is still there.
    Shutdown,
    /// The VMM reports an internal error or a guest panic; the guest will not run again.
    Failed,
    /// The process is gone.
    Gone,
}

/// A factory and finder of machines of one kind.
#[async_trait]
pub trait Monitor: Send + Sync {
    fn hypervisor(&self) -> Hypervisor;

    /// Looks at the host (binary, version, acceleration). Cheap enough for every capabilities call.
    async fn probe(&self) -> Probe;

    /// The versioned machine type new instances get.
    async fn machine_type(&self) -> Result<String, VmmError>;

    /// Starts the VMM process and builds the machine; its CPUs do not run. On error nothing of it
    /// is left: no process, no socket. The memory file must not exist or be empty; it is created
    /// sparse with mode 0600.
    async fn spawn(&self, machine: &MachineDescription) -> Result<Box<dyn Machine>, VmmError>;

    /// Takes up a VMM process that an earlier server started. `Ok(None)` when that very process
    /// (pid, start time and boot id) is gone.
    async fn attach(
        &self,
        machine: &MachineDescription,
        process: &ProcessId,
    ) -> Result<Option<Box<dyn Machine>>, VmmError>;
}

/// One live VMM process. Dropping it leaves the process running.
#[async_trait]
pub trait Machine: Send + Sync {
    fn process(&self) -> &ProcessId;

    /// Unix socket of the guest's control channel (a byte stream).
    fn agent_socket(&self) -> &Path;

    /// Status changes as they are noticed; ends with `Gone`, which is final. Never lags behind a
    /// call that returned.
    fn watch(&self) -> watch::Receiver<MachineStatus>;

    /// Asks the VMM itself.
    async fn status(&self) -> Result<MachineStatus, VmmError>;

    /// Lets the CPUs run (from Prelaunch or Paused). Returns when the VMM acknowledged.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Stops the CPUs. Returns when the VMM acknowledged.
    async fn pause(&self) -> Result<(), VmmError>;

    /// SIGKILL, then waits until the process is gone (deadline 10 s). Idempotent.
    async fn kill(&self) -> Result<(), VmmError>;
}

#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Binary, firmware or privilege missing on this host.
    #[error("{what}; {mend}")]
    Missing { what: String, mend: String },
    /// The description cannot be built on this monitor.
    #[error("machine description: {0}")]
    Unsupported(String),
    /// The VMM refused a command.
    #[error("{command}: the VMM answered: {message}")]
    Refused {
        command: &'static str,
        message: String,
    },
    #[error("{command}: no answer from the VMM within {seconds} s")]
    Timeout { command: &'static str, seconds: u64 },
    /// The process ended by itself; `log` holds the last lines it wrote.
    #[error("the VMM exited during {during}: {log}")]
    Exited { during: &'static str, log: String },
    #[error("{context}")]
    Io {
        context: String,
        #[source]
        source: std::io::Error,
    },
}
