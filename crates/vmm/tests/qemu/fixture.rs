//! A real machine for a test, with everything it leaves cleaned up also when the test fails.
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use doze_host::{
    process::{ProcessHandle, find_marked},
    watch::FolderWatch,
};
use doze_vmm::{
    Accel, Disk, Hypervisor, Machine, MachineDescription, MachineStatus, MemoryBacking,
    MemoryImage, Monitor,
    boot::{BootFiles, KernelSource, prepare},
    qemu::{self, QemuConfig, monitor},
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, net::UnixStream};

const INSIDE: &str = "DOZE_VMM_TEST_INSIDE_NAMESPACE";

/// Nothing here takes that long; a machine under load may take much longer than usual.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The operator's kernel: `DOZE_TEST_KERNEL` and `DOZE_TEST_MODULES`, else what `make setup` fetched.
pub fn kernel_source(init: &'static [u8]) -> KernelSource {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/kernel");
    let given = |variable: &str, default: &str| {
        let path = std::env::var_os(variable).map_or_else(|| fetched.join(default), PathBuf::from);
        assert!(
            path.exists(),
            "{} does not exist: run `make setup`, or set {variable}",
            path.display()
        );
        path
    };
    KernelSource {
        image: given("DOZE_TEST_KERNEL", "boot/vmlinuz"),
        modules: Some(given("DOZE_TEST_MODULES", "modules")),
        init,
    }
}

/// `init.c`, compiled once.
pub fn test_init() -> &'static [u8] {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    INIT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("init");
        let status = Command::new("cc")
            .args(["-O1", "-static", "-Wno-unused-result", "-o"])
            .arg(&out)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qemu/init.c"))
            .status()
            .expect("a C compiler is needed: run `make setup`");
        assert!(status.success(), "cannot compile the test guest's init");
        fs::read(&out).unwrap()
    })
}

/// Made once and kept between runs of the tests.
pub fn boot_files() -> BootFiles {
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boot");
    prepare(&kernel_source(test_init()), &cache).unwrap()
}

pub fn tcg() -> QemuConfig {
    QemuConfig {
        accel: Some(Accel::Tcg),
        ..QemuConfig::default()
    }
}

/// One instance's files and description.
pub struct Bench {
    pub monitor: Arc<dyn Monitor>,
    pub machine: MachineDescription,
    pub folder: TempDir,
}

impl Bench {
    /// Two disks: `doze-rootfs` read-only, `doze-overlay` writable; no network.
    pub async fn new(kind: Hypervisor, config: QemuConfig) -> Self {
        let monitor = monitor(kind, config);
        // Short, for the socket's sake.
        let folder = tempfile::Builder::new()
            .prefix("doze,vmm-")
            .tempdir_in("/tmp")
            .unwrap();
        let at = |name: &str| folder.path().join(name);
        let boot = boot_files();
        let disk = |serial: &str, read_only| {
            let path = at(serial);
            fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
            Disk {
                serial: serial.to_owned(),
                path,
                read_only,
            }
        };
        let machine = MachineDescription {
            hypervisor: kind,
            machine_type: monitor.machine_type().await.unwrap(),
            accel: Accel::Tcg,
            id: folder
                .path()
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .replace(',', "-")
                .to_lowercase(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            memory: MemoryImage {
                path: at("memory"),
                backing: MemoryBacking::Shared,
            },
            kernel: boot.kernel,
            initramfs: boot.initramfs,
            cmdline: qemu::base_cmdline(kind, Accel::Tcg),
            disks: vec![disk("doze-rootfs", true), disk("doze-overlay", false)],
            nic: None,
            run_dir: folder.path().to_owned(),
            vmm_log: at("vmm.log"),
            app_log: at("app.log"),
            generation: None,
        };
        Self {
            monitor,
            machine,
            folder,
        }
    }

    pub async fn spawn(&self) -> Box<dyn Machine> {
        self.monitor.spawn(&self.machine).await.unwrap()
    }

    /// Booted as far as `test: ready`.
    pub async fn boot(&self) -> Box<dyn Machine> {
        let machine = self.spawn().await;
        machine.resume().await.unwrap();
        self.wait_log("test: ready").await;
        machine
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.machine.vmm_log).unwrap_or_default()).into_owned()
    }

    /// Waits until the VMM log holds these words.
    pub async fn wait_log(&self, words: &str) {
        self.wait(words, |bench| bench.log().contains(words)).await;
    }

    /// Waits until something in the instance's folder makes `done` true.
    pub async fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let watch = FolderWatch::new(self.folder.path()).unwrap();
        let happened = tokio::time::timeout(PATIENCE, async {
            while !done(self) {
                watch.changed().await.unwrap();
            }
        });
        assert!(
            happened.await.is_ok(),
            "{what:?} did not happen; the log:\n{}",
            self.log()
        );
    }

    /// Sends one letter to the guest.
    pub async fn command(&self, letter: u8) -> UnixStream {
        let mut stream = UnixStream::connect(self.folder.path().join("agent.sock"))
            .await
            .unwrap();
        stream.write_all(&[letter]).await.unwrap();
        stream
    }

    /// Sends one letter to the guest and waits until it answers that all is well.
    pub async fn ask(&self, letter: u8) -> UnixStream {
        let mut stream = self.command(letter).await;
        assert_eq!(
            read_byte(&mut stream).await,
            b'E',
            "the guest's answer to {:?}",
            char::from(letter)
        );
        stream
    }

    /// A connection to the control channel, nothing sent.
    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("agent.sock"))
            .await
            .unwrap()
    }

    /// An empty folder for a saved machine.
    pub fn new_folder(&self, name: &str) -> PathBuf {
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    }

    /// What guest memory holds, holes and zeros being the same.
    pub fn memory_hash(&self) -> String {
        let mut file = fs::File::open(&self.machine.memory.path).unwrap();
        let mut hash = Sha256::new();
        std::io::copy(&mut file, &mut hash).unwrap();
        hex::encode(hash.finalize())
    }

    /// Bytes of disk that guest memory takes.
    pub fn memory_allocated(&self) -> u64 {
        fs::metadata(&self.machine.memory.path).unwrap().blocks() * 512
    }

    /// Waits for a process that takes up what was saved in `folder`; the channel is connected.
    pub async fn load(&self, folder: &Path) -> (Box<dyn Machine>, UnixStream) {
        let machine = self.monitor.spawn_to_load(&self.machine).await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Prelaunch);
        let channel = self.connect().await;
        machine.load(folder).await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Paused);
        (machine, channel)
    }

    /// The guest counted on and on, whichever process ran it, and goes on now.
    pub async fn assert_counts_on(&self) {
        let before = self.ticks();
        self.wait("more ticks", |bench| bench.ticks() > before + 1)
            .await;
        let log = self.log();
        let counted: Vec<usize> = log
            .lines()
            .filter_map(|line| line.trim().strip_prefix("test: tick "))
            .filter_map(|number| number.parse().ok())
            .collect();
        // The last line may be half written: its number is not the whole one.
        let whole = &counted[..counted.len() - 1];
        assert_eq!(whole, (0..whole.len()).collect::<Vec<_>>(), "{log}");
    }

    pub fn ticks(&self) -> usize {
        self.log().matches("test: tick").count()
    }

    /// Nothing of the machine is there: no process, no socket, no memory file.
    pub fn assert_nothing_left(&self) {
        assert_eq!(find_marked(&qemu::mark(&self.machine.id)).unwrap(), []);
        for name in ["qmp.sock", "agent.sock", "memory"] {
            assert!(!self.folder.path().join(name).exists(), "{name} is left");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for id in find_marked(&qemu::mark(&self.machine.id)).unwrap() {
            if let Some(process) = ProcessHandle::open(&id).unwrap() {
                process.kill().unwrap();
            }
        }
    }
}

/// Runs this test again under `unshare` with these options, in namespaces that end with it; `true` when we are
/// inside.
pub fn inside_namespace(options: &str, test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .arg(options)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(
        status.success(),
        "{test} failed inside its namespace (needs root)"
    );
    false
}

/// Waits until the watch shows this status.
pub async fn wait_status(machine: &dyn Machine, wanted: MachineStatus) {
    let mut watch = machine.watch();
    let seen = tokio::time::timeout(PATIENCE, watch.wait_for(|now| *now == wanted)).await;
    assert!(
        matches!(seen, Ok(Ok(_))),
        "{wanted:?} never came, it is {:?}",
        *machine.watch().borrow()
    );
}

pub async fn read_byte(stream: &mut UnixStream) -> u8 {
    let mut byte = [0];
    tokio::time::timeout(PATIENCE, stream.read_exact(&mut byte))
        .await
        .unwrap()
        .unwrap();
    byte[0]
}

/// Prints a duration that is worth knowing; asserts nothing.
pub fn report(what: &str, since: Instant) {
    println!("{what}: {:.2} s", since.elapsed().as_secs_f64());
}
