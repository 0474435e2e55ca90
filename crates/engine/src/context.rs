//! What every driver shares: configuration, store, images, monitors, network, reservations.
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use doze_host::{
    files,
    net::{NetError, Network, NetworkConfig},
};
use doze_image::{Image, ImageError, ImageStore};
use doze_snapshot::wait_for_space;
use doze_vmm::{
    Hypervisor, Monitor,
    boot::{self, BootError, BootFiles},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{
    EngineConfig, EngineError, Monitors, Snapshot, compression::Compressions, kill::KillSwitch,
    metrics::Metrics, snapshots::catalog::Catalog, store::Store,
};

/// For space that a halted job has used.
const SPACE_PATIENCE: Duration = Duration::from_secs(1);

pub struct Context {
    pub config: EngineConfig,
    pub store: Store,
    pub images: ImageStore,
    pub monitors: Monitors,
    pub kill: KillSwitch,
    pub metrics: Metrics,
    /// When the last server was known to be there; microseconds since the Unix epoch.
    pub last_beat: Option<i64>,
    network: tokio::sync::Mutex<Option<Network>>,
    /// Outcome of the last attempt to set the network up, for readers that must not wait.
    network_error: Mutex<Option<String>>,
    memory: Mutex<HashMap<String, u64>>,
    /// Bytes of disk promised to operations that have not written them yet.
    disk: Arc<Mutex<u64>>,
    /// The same to what works in the background: nobody else is refused for it.
    background_disk: Arc<Mutex<u64>>,
    restores: Arc<Semaphore>,
    boot: tokio::sync::Mutex<()>,
    total_memory: u64,
    /// Whether files of `data_dir` can share blocks, once the file system could be asked.
    reflinks: OnceLock<bool>,
    pub snapshots: Catalog,
    pub compression: Compressions,
    /// When the disk was measured last, and what was found.
    pub measured: tokio::sync::Mutex<Option<(std::time::Instant, crate::DiskUsage)>>,
}

/// What was found in the data folder and on the host.
pub struct Opened {
    pub store: Store,
    pub images: ImageStore,
    pub total_memory: u64,
    pub last_beat: Option<i64>,
    pub snapshots: Vec<Snapshot>,
}

impl Context {
    pub fn new(config: EngineConfig, monitors: Monitors, opened: Opened) -> Context {
        let Opened {
            store,
            images,
            total_memory,
            last_beat,
            snapshots,
        } = opened;
        let restores = Arc::new(Semaphore::new(config.limits.max_concurrent_restores.max(1)));
        let kill = config.kill.clone();
        let compression = Compressions::new(config.snapshot);
        Context {
            config,
            store: store.watched(kill.clone()),
            images,
            monitors,
            kill,
            metrics: Metrics::new(crate::now()),
            last_beat,
            network: tokio::sync::Mutex::new(None),
            network_error: Mutex::new(None),
            memory: Mutex::new(HashMap::new()),
            disk: Arc::default(),
            background_disk: Arc::default(),
            restores,
            boot: tokio::sync::Mutex::new(()),
            total_memory,
            reflinks: OnceLock::new(),
            snapshots: Catalog::new(snapshots),
            compression,
            measured: tokio::sync::Mutex::default(),
        }
    }

    /// Whether files of `data_dir` can share blocks. Asked by trying it; on a full disk that cannot be tried, and
    /// until it can they are taken to need blocks of their own: a full disk must not keep the server from starting.
    pub async fn reflinks(&self) -> Result<bool, EngineError> {
        if let Some(known) = self.reflinks.get() {
            return Ok(*known);
        }
        let what = "asking the file system for reflinks";
        let dir = self.config.data_dir.clone();
        match blocking(what, move || files::supports_reflink(&dir)).await? {
            Ok(answer) => Ok(*self.reflinks.get_or_init(|| answer)),
            Err(e) if files::is_full(&e) => {
                tracing::warn!(error = %e, "cannot tell whether files can share blocks");
                Ok(false)
            }
            Err(e) => Err(io_error(what)(e)),
        }
    }

    /// Folder of one instance; everything it has lies below.
    pub fn instance_dir(&self, id: &str) -> PathBuf {
        self.config.data_dir.join("instances").join(id)
    }

    /// Folder of the stored snapshots, one folder each.
    pub fn snapshots_dir(&self) -> PathBuf {
        self.config.data_dir.join("snapshots")
    }

    pub fn snapshot_dir(&self, id: &str) -> PathBuf {
        self.snapshots_dir().join(id)
    }

    /// Where copies are made that have no place yet.
    pub fn captures_dir(&self) -> PathBuf {
        self.config.data_dir.join("captures")
    }

    pub fn monitor(&self, kind: Hypervisor) -> Result<&Arc<dyn Monitor>, EngineError> {
        self.monitors
            .get(&kind)
            .ok_or_else(|| EngineError::NotImplemented {
                field: format!("hypervisor {}", wire_name(kind)),
            })
    }

    /// The network, set up on first use and tried again after a failure. `None`: switched off.
    pub async fn network(&self) -> Result<Option<Network>, EngineError> {
        let Some(config) = &self.config.network else {
            return Ok(None);
        };
        let mut slot = self.network.lock().await;
        if slot.is_none() {
            let outcome = self.claimed_network(config).await;
            *lock(&self.network_error) = outcome.as_ref().err().map(ToString::to_string);
            *slot = Some(outcome.map_err(net_error)?);
        }
        Ok(slot.clone())
    }

    async fn claimed_network(&self, config: &NetworkConfig) -> Result<Network, NetError> {
        let network = Network::ensure(config.clone()).await?;
        network
            .claim(&self.config.data_dir.display().to_string())
            .await?;
        Ok(network)
    }

    pub fn network_status(&self) -> Option<Result<NetworkConfig, String>> {
        let config = self.config.network.clone()?;
        Some(match lock(&self.network_error).clone() {
            Some(error) => Err(error),
            None => Ok(config),
        })
    }

    /// Where kernels and initramfses lie, named after their content.
    pub fn boot_dir(&self) -> PathBuf {
        self.config.data_dir.join("boot")
    }

    /// Nobody else adds boot files or relies on new ones meanwhile.
    pub async fn boot_turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.boot.lock().await
    }

    /// Kernel and initramfs, prepared once and found again afterwards.
    pub async fn boot_files(&self) -> Result<BootFiles, EngineError> {
        // Unpacking a kernel takes a second of CPU: those who come meanwhile wait for the first.
        let _one_at_a_time = self.boot.lock().await;
        let source = self.config.kernel.clone();
        let cache = self.boot_dir();
        blocking("preparing kernel and initramfs", move || {
            boot::prepare(&source, &cache)
        })
        .await?
        .map_err(boot_error)
    }

    pub async fn image(&self, name: &str) -> Result<Image, EngineError> {
        let (images, name) = (self.images.clone(), name.to_owned());
        blocking("looking up an image", move || images.get(&name))
            .await?
            .map_err(image_error)
    }

    /// The image an instance was made from, whatever its reference points to now.
    pub async fn image_by_digest(&self, digest: &str) -> Result<Image, EngineError> {
        let (images, digest) = (self.images.clone(), digest.to_owned());
        blocking("looking up an image", move || images.by_digest(&digest))
            .await?
            .map_err(image_error)
    }

    /// Books RAM for a machine that is about to exist; booking again for the same instance is fine.
    pub fn reserve_memory(&self, id: &str, bytes: u64) -> Result<(), EngineError> {
        let limit = self
            .config
            .limits
            .max_total_memory
            .unwrap_or(self.total_memory);
        let mut booked = lock(&self.memory);
        let others: u64 = booked
            .iter()
            .filter(|(k, _)| *k != id)
            .map(|(_, v)| v)
            .sum();
        let available = limit.saturating_sub(others);
        if bytes > available {
            return Err(EngineError::Capacity {
                resource: "memory",
                wanted: mib(bytes),
                available: mib(available),
                limit: format!(
                    "limits.max_total_memory, {} for all running instances",
                    mib(limit)
                ),
            });
        }
        booked.insert(id.to_owned(), bytes);
        Ok(())
    }

    /// Promises `bytes` on the file system of `path` until the guard is dropped, or until they were
    /// written, when they are promised twice for a moment: on the safe side.
    pub fn reserve_disk(&self, path: &Path, bytes: u64) -> Result<DiskRoom, EngineError> {
        promise(path, bytes, &self.disk, 0)
    }

    /// The same for what works in the background: it leaves to operations what they were promised, and they
    /// take no notice of it.
    pub fn reserve_background_disk(
        &self,
        path: &Path,
        bytes: u64,
    ) -> Result<DiskRoom, EngineError> {
        let others = *lock(&self.disk);
        promise(path, bytes, &self.background_disk, others)
    }

    /// Waits for its turn among the restores, in the order of asking.
    pub async fn restore_turn(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        let turn = self.restores.clone().acquire_owned().await;
        turn.map_err(|_| EngineError::ShuttingDown)
    }

    /// Bytes booked, and the limit.
    pub fn memory_usage(&self) -> (u64, u64) {
        let booked = lock(&self.memory).values().sum();
        let limit = self.config.limits.max_total_memory;
        (booked, limit.unwrap_or(self.total_memory))
    }

    pub fn release_memory(&self, id: &str) {
        lock(&self.memory).remove(id);
    }
}

fn promise(
    path: &Path,
    bytes: u64,
    account: &Arc<Mutex<u64>>,
    others: u64,
) -> Result<DiskRoom, EngineError> {
    match promise_once(path, bytes, account, others) {
        // What a halted job has written may be on its way out, or out since it was measured. Blocks for as long as
        // that takes, which is tens of milliseconds, and only where the answer would be a refusal.
        Err(EngineError::Capacity { .. }) => {
            wait_for_space(SPACE_PATIENCE);
            promise_once(path, bytes, account, others)
        }
        other => other,
    }
}

fn promise_once(
    path: &Path,
    bytes: u64,
    account: &Arc<Mutex<u64>>,
    others: u64,
) -> Result<DiskRoom, EngineError> {
    let free = files::free_space(path).map_err(io_error("measuring free disk space"))?;
    let mut promised = lock(account);
    let available = free.saturating_sub(*promised).saturating_sub(others);
    if bytes > available {
        return Err(EngineError::Capacity {
            resource: "disk",
            wanted: mib(bytes),
            available: mib(available),
            limit: format!("the file system of {}", path.display()),
        });
    }
    *promised += bytes;
    Ok(DiskRoom {
        promised: account.clone(),
        bytes,
    })
}

/// A promise of disk space; ends when dropped.
#[derive(Debug)]
pub struct DiskRoom {
    promised: Arc<Mutex<u64>>,
    bytes: u64,
}

impl Drop for DiskRoom {
    fn drop(&mut self) {
        let mut promised = lock(&self.promised);
        *promised = promised.saturating_sub(self.bytes);
    }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// The values behind our own mutexes stay usable after a panic elsewhere: each is one whole assignment.
pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The wire's name of a monitor.
pub fn wire_name(kind: Hypervisor) -> &'static str {
    match kind {
        Hypervisor::Qemu => "qemu",
        Hypervisor::QemuMicrovm => "qemu-microvm",
        Hypervisor::CloudHypervisor => "cloud-hypervisor",
        Hypervisor::Firecracker => "firecracker",
    }
}

/// Runs a blocking piece of work off the async threads.
pub async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| EngineError::Internal {
            context: what.to_owned(),
            reason: e.to_string(),
        })
}

pub fn io_error(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> EngineError {
    let context = context.into();
    move |e| EngineError::Internal {
        context,
        reason: e.to_string(),
    }
}

pub fn net_error(error: NetError) -> EngineError {
    match error {
        NetError::Missing { what, mend } => EngineError::DependencyMissing { what, mend },
        NetError::Failed { context, message } => EngineError::Internal {
            context,
            reason: message,
        },
    }
}

pub fn boot_error(error: BootError) -> EngineError {
    match error {
        BootError::Kernel { .. } => EngineError::DependencyMissing {
            what: error.to_string(),
            mend: "set [kernel] image to a readable kernel".into(),
        },
        BootError::Modules { .. } => EngineError::DependencyMissing {
            what: error.to_string(),
            mend: "set [kernel] modules to that kernel's module tree".into(),
        },
        BootError::Foreign { .. } => EngineError::BrokenStream {
            reason: error.to_string(),
        },
        BootError::Io { context, source } => EngineError::Internal {
            context,
            reason: source.to_string(),
        },
    }
}

pub fn image_error(error: ImageError) -> EngineError {
    match error {
        ImageError::NotFound(name) => EngineError::ImageNotFound { name },
        ImageError::Missing { what, mend } => EngineError::DependencyMissing { what, mend },
        other => EngineError::Image(other),
    }
}
