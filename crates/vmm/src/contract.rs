//! The contract between the engine and a machine monitor (VMM).
//!
//! ```text
//!   Monitor::spawn ──> Machine (CPUs never ran) ──resume──> running <──pause/resume──> paused
//!        │                    │                                │                        │ save
//!        │                    └── kill ──────────────┬─────────┴── guest powers off ──> Shutdown
//!   Monitor::attach (after a restart of the server)  └──> process gone <── kill ────────┴──┘
//!
//!   Monitor::spawn_to_load ──> Machine (waits) ──load──> paused, never resumed here ──resume──> running
//! ```
//!
//! A saved machine is its memory file and the files that [`Machine::save`] wrote. Both together are
//! good for one `resume`: from then on the guest changes memory and disks, and the saved device
//! state fits neither. Until then (`load` included) they may be tried as often as one likes, each time
//! with a new process, because a machine that has not been resumed changes nothing that another load
//! does not set again (QEMU's q35 under KVM writes two bytes of the guest's clock structure). So the
//! memory file is known by its size, not by a checksum.
//!
//! Who calls what: only the driver task of one instance calls these methods, one at a time, except
//! [`Machine::watch`] whose receiver may be polled at any moment.
//!
//! Cancelling (dropping a future half way): `spawn` leaves at most a VMM process that carries the
//! instance's mark (see [`Monitor::find`]); the caller must reap it. `resume`, `pause` and `status`
//! may or may not have taken effect: ask `status`. `save` leaves the machine paused and at most
//! useless files in its folder. A machine whose `load` was dropped is to be killed.
//! Every call has its own deadline and returns [`VmmError::Timeout`] instead of hanging.
//!
//! Who owns the memory image (`MachineDescription::memory`, see [`crate::memory`]):
//! - no VMM process: the engine;
//! - VMM alive, CPUs never ran: the VMM maps it; nobody else may write;
//! - running: the VMM. The file changes under everybody's feet;
//! - paused: the VMM, which does not write. After `save` the file holds the guest's whole memory, in the
//!   page cache at least; making it durable is the engine's;
//! - paused, its save given up: the VMM still; what it wrote may be what its next save builds on;
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
    /// The machine's generation (a UUID in lower case, see [`new_generation`]) for the guest's kernel, which mixes it
    /// into its random numbers when it changes: another one for every boot, and for every load, so that
    /// no two machines that came from one saved machine go on with the same random numbers. It may differ from the
    /// saved machine's. `None`: the machine has no such device, and none can be added to a saved one. No effect on
    /// boards that do not offer it to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
}

impl MachineDescription {
    /// Another generation for a machine that is about to be loaded; one without the device stays without.
    ///
    /// # Errors
    /// When the kernel's random number generator cannot be read.
    pub fn renew_generation(&mut self) -> std::io::Result<()> {
        if self.generation.is_some() {
            self.generation = Some(new_generation()?);
        }
        Ok(())
    }
}

/// A generation that no machine has had.
///
/// # Errors
/// When the kernel's random number generator cannot be read.
pub fn new_generation() -> std::io::Result<String> {
    // Version 4, by random(4).
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(uuid.trim_end().to_owned())
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

    /// Starts the VMM process of a saved machine and has it wait for [`Machine::load`]. The memory file is
    /// mapped, not read; its size must be `memory_bytes`. On error nothing of it is left, except
    /// that memory file, untouched.
    async fn spawn_to_load(
        &self,
        machine: &MachineDescription,
    ) -> Result<Box<dyn Machine>, VmmError>;

    /// Whether this host's binary loads what `saved_version` of it saved from `machine`.
    ///
    /// # Errors
    /// [`VmmError::Incompatible`] with both versions, [`VmmError::Missing`] without a usable binary.
    async fn check_loads(
        &self,
        machine: &MachineDescription,
        saved_version: &str,
    ) -> Result<(), VmmError>;

    /// Every VMM process of this instance, found by the mark it was started with, whether or not
    /// any record names it.
    async fn find(&self, id: &str) -> Result<Vec<ProcessId>, VmmError>;

    /// SIGKILL to a process that [`Monitor::find`] named, then waits until it is gone (deadline 10 s). One
    /// that is gone already is fine.
    async fn kill(&self, process: &ProcessId) -> Result<(), VmmError>;

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

    /// Version of this very process, which may be older than the binary that is installed now; a saved machine
    /// belongs to it. The same form as [`Probe::version`].
    fn version(&self) -> &str;

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

    /// Writes the paused machine's device state into `folder`, which exists and is empty, and brings the
    /// memory file up to date. The machine stays paused and can be resumed afterwards, whatever
    /// this returned. Nothing is fsynced: the caller does that for all files together.
    ///
    /// # Errors
    /// [`VmmError::NoSpace`] with the bytes that were needed, when the disk is full.
    async fn save(&self, folder: &Path) -> Result<Vec<SavedFile>, VmmError>;

    /// Loads what [`Machine::save`] wrote into `folder` (after [`Monitor::spawn_to_load`]). Returns with
    /// the machine paused, its CPUs not yet run. The control channel must be connected before: a VMM
    /// that cannot hand on what its guest had written may stall.
    async fn load(&self, folder: &Path) -> Result<(), VmmError>;

    /// SIGKILL, then waits until the process is gone (deadline 10 s). Idempotent.
    async fn kill(&self) -> Result<(), VmmError>;
}

/// A file of a saved machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    /// Relative to the folder; one component.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of the content as it was meant to be written, lower-case hexadecimal.
    pub sha256: String,
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
    /// This host's binary cannot load what another version saved.
    #[error(
        "the snapshot was saved by {hypervisor} {saved} (machine type {machine_type}); this host has {here}, which cannot load it ({rule})"
    )]
    Incompatible {
        hypervisor: &'static str,
        machine_type: String,
        saved: String,
        here: String,
        rule: &'static str,
    },
    /// The disk is full.
    #[error("{what} needs {needed} bytes of disk, {available} are free")]
    NoSpace {
        what: String,
        needed: u64,
        available: u64,
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
