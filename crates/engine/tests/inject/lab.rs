//! One data folder, one world, and one server after the other over both.
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use doze_engine::{
    Algorithm, AutoStandbyConfig, Codec, Compression, CreateRequest, Engine, EngineConfig,
    InstanceView, Limits, MemoryCompression, Monitors, Progress, SnapshotConfig, SnapshotFilter,
    StandbyConfig,
};
use doze_image::ImageStore;
use doze_lifecycle::State;
use doze_vmm::{Hypervisor, MemoryBacking, Monitor, boot::KernelSource, qemu::QemuConfig};

use crate::{
    content::{self, Content},
    monitor::FakeMonitor,
    scenario::{FORK, NAME},
    world::World,
};

const IMAGE: &str = "docker.io/library/fake:latest";
/// Nothing here takes as long; what does has stopped for good.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What every data folder begins with: an image and boot files.
struct Template {
    dir: tempfile::TempDir,
    guests: tokio::runtime::Runtime,
}

fn template() -> &'static Template {
    static TEMPLATE: OnceLock<Template> = OnceLock::new();
    TEMPLATE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let archive = dir.path().join("image.tar");
        write_image(&archive);
        let store = ImageStore::open(&dir.path().join("data/images")).unwrap();
        let tags = BTreeMap::new();
        store
            .import(IMAGE, &archive, None, tags, &mut |_| {})
            .unwrap();
        std::fs::write(dir.path().join("vmlinux"), kernel()).unwrap();
        let cache = dir.path().join("data/boot");
        doze_vmm::boot::prepare(&kernel_source(dir.path()), &cache).unwrap();
        let guests = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        Template { dir, guests }
    })
}

fn kernel_source(dir: &Path) -> KernelSource {
    KernelSource {
        image: dir.join("vmlinux"),
        modules: None,
        init: b"\x7fELF an init",
    }
}

/// An ELF64 file with nothing but the note of a PVH entry, which is all that is asked of a kernel.
fn kernel() -> Vec<u8> {
    let mut note = Vec::new();
    for number in [4_u32, 8, 18] {
        note.extend(number.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend([0; 8]);
    let mut file = vec![0_u8; 120];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18] = 62;
    file[32] = 64;
    file[54] = 56;
    file[56] = 1;
    file[64] = 4;
    file[72] = 120;
    file[96..104].copy_from_slice(&(note.len() as u64).to_le_bytes());
    file.extend(note);
    file
}

/// A docker archive with one layer of one file.
fn write_image(to: &Path) {
    use sha2::{Digest, Sha256};
    let mut layer = tar::Builder::new(Vec::new());
    append(&mut layer, "program", b"a program");
    let layer = layer.into_inner().unwrap();
    let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&layer)));
    let config = serde_json::json!({
        "os": "linux", "architecture": "amd64", "config": {"Entrypoint": ["/program"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    let manifest = serde_json::json!([
        {"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}
    ]);
    let mut archive = tar::Builder::new(std::fs::File::create(to).unwrap());
    append(
        &mut archive,
        "manifest.json",
        manifest.to_string().as_bytes(),
    );
    append(&mut archive, "config.json", config.to_string().as_bytes());
    append(&mut archive, "layer.tar", &layer);
    archive.into_inner().unwrap();
}

fn append<W: std::io::Write>(archive: &mut tar::Builder<W>, name: &str, content: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    archive.append_data(&mut header, name, content).unwrap();
}

fn copy(from: &Path, to: &Path) {
    doze_host::files::create_private_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// One life of the server: all its tasks end with its runtime.
struct Server {
    engine: Engine,
    runtime: tokio::runtime::Runtime,
}

pub struct Lab {
    pub world: World,
    /// Whatever sleeps is compressed.
    packs: bool,
    dir: tempfile::TempDir,
    server: Option<Server>,
}

impl Lab {
    pub fn new(packs: bool) -> Lab {
        Lab::in_world(World::new(template().guests.handle().clone()), packs)
    }

    /// Another server, with a data folder of its own, among the same machines.
    pub fn beside(&self) -> Lab {
        Lab::in_world(self.world.clone(), self.packs)
    }

    fn in_world(world: World, packs: bool) -> Lab {
        let template = template();
        let dir = tempfile::Builder::new()
            .prefix("dz")
            .tempdir_in(memory_disk())
            .unwrap();
        copy(&template.dir.path().join("data"), &dir.path().join("d"));
        let mut lab = Lab {
            world,
            packs,
            dir,
            server: None,
        };
        lab.open();
        lab
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("d")
    }

    pub fn instance_dir(&self, id: &str) -> PathBuf {
        self.data_dir().join("instances").join(id)
    }

    pub fn snapshot_dir(&self, id: &str) -> PathBuf {
        self.data_dir().join("snapshots").join(id)
    }

    /// What is on an instance's disk.
    pub fn disk(&self, id: &str) -> Content {
        content::of_overlay(&self.instance_dir(id).join("overlay.raw")).unwrap()
    }

    /// What is on a snapshot's disk.
    pub fn kept(&self, key: &str) -> Content {
        let id = &self.engine().get_snapshot(key).unwrap().id;
        content::of_overlay(&self.snapshot_dir(id).join("overlay.raw")).unwrap()
    }

    pub fn engine(&self) -> Engine {
        self.server.as_ref().expect("a server").engine.clone()
    }

    pub fn run<T>(&self, work: impl Future<Output = T>) -> T {
        let server = self.server.as_ref().expect("a server");
        server
            .runtime
            .block_on(async { tokio::time::timeout(PATIENCE, work).await })
            .expect("it hangs")
    }

    /// The server comes up. Its recovery is done, or was crashed, when this returns.
    pub fn open(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let monitor: Arc<dyn Monitor> = Arc::new(FakeMonitor(self.world.clone()));
        let monitors = Monitors::from([(Hypervisor::QemuMicrovm, monitor)]);
        let config = self.config();
        let engine = runtime
            .block_on(async {
                tokio::time::timeout(PATIENCE, Engine::open_with(config, monitors)).await
            })
            .expect("opening hangs")
            .expect("the server comes up whatever it finds");
        self.server = Some(Server { engine, runtime });
    }

    /// The server is no more, with all that it remembered.
    pub fn crash(&mut self) {
        self.world.state().steps.crashed = true;
        if let Some(Server { engine, runtime }) = self.server.take() {
            drop(engine);
            runtime.shutdown_timeout(PATIENCE);
        }
        let mut state = self.world.state();
        state.steps.crashed = false;
        state.steps.armed = false;
    }

    fn config(&self) -> EngineConfig {
        EngineConfig {
            data_dir: self.data_dir(),
            default_hypervisor: Hypervisor::QemuMicrovm,
            qemu: QemuConfig::default(),
            kernel: kernel_source(template().dir.path()),
            kernel_extra_cmdline: String::new(),
            network: None,
            dns: Vec::new(),
            limits: Limits {
                max_instances: 8,
                max_vcpus_per_instance: 4,
                max_memory_per_instance: 1 << 30,
                max_total_memory: Some(8 << 30),
                max_overlay: 1 << 30,
                default_overlay: 8 << 20,
                default_memory: 64 << 20,
                default_vcpus: 1,
                stop_grace: Duration::from_millis(200),
                boot_timeout: PATIENCE,
                max_log_bytes: 1 << 20,
                max_concurrent_restores: 2,
            },
            standby: StandbyConfig::default(),
            auto_standby: AutoStandbyConfig {
                max_concurrent: 2,
                reconcile: PATIENCE,
            },
            snapshot: SnapshotConfig {
                max_concurrent_compressions: 2,
                compression_default: self
                    .packs
                    .then(|| Compression::On(Codec::new(Algorithm::Lz4, None).unwrap())),
            },
            memory: MemoryBacking::Shared,
            kill: self.world.kill_switch(),
        }
    }

    pub fn request(name: &str) -> CreateRequest {
        CreateRequest {
            name: name.to_owned(),
            image: IMAGE.to_owned(),
            ..CreateRequest::default()
        }
    }

    /// The instance of this name, if there is one.
    pub fn view(&self, name: &str) -> Option<Arc<InstanceView>> {
        self.engine().get(name).ok()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.crash();
        self.world.power_loss();
    }
}

/// Thousands of runs need no disk: what is durable is not what is tested here, but what is there when.
fn memory_disk() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    match shm.is_dir() {
        true => shm,
        false => std::env::temp_dir(),
    }
}

/// Waits until nothing is in flight and the record agrees with the guest: what happened by itself is
/// booked some time later. After `patience` it is what it is.
pub async fn settled(
    engine: &Engine,
    world: &World,
    name: &str,
    patience: Duration,
) -> Option<Arc<InstanceView>> {
    let begun = Instant::now();
    loop {
        let Ok(view) = engine.get(name) else {
            return None;
        };
        let record = &view.record;
        let live = world.counter(&view.id).is_some();
        let agrees = match record.state() {
            State::Running => live,
            State::Stopped | State::Standby => !live,
            State::Initializing => {
                let habits = world.state().habits;
                live && (habits.mute || habits.stubborn)
            }
            State::Created | State::Paused | State::Shutdown => false,
        };
        let rests = agrees && record.operation().is_none();
        if rests || world.crashed() || begun.elapsed() > patience {
            return Some(view);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits until both instances of a scenario are settled.
pub async fn settle(engine: &Engine, world: &World, patience: Duration) {
    for name in [NAME, FORK] {
        settled(engine, world, name, patience).await;
    }
    packed(engine, world).await;
}

/// Waits until whatever sleeps and is to be compressed is.
pub async fn packed(engine: &Engine, world: &World) {
    let planned = |compression: Option<&MemoryCompression>| {
        compression.is_some_and(|c| c.progress == Progress::Planned)
    };
    let begun = Instant::now();
    while !world.crashed() && begun.elapsed() < PATIENCE / 2 {
        let sleeping = engine.list().into_iter().any(|view| {
            let rests = view.state() == State::Standby && view.record.operation().is_none();
            rests && planned(view.compression.as_ref())
        });
        let stored = engine.list_snapshots(&SnapshotFilter::default());
        if !sleeping && !stored.iter().any(|s| planned(s.compression.as_ref())) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
