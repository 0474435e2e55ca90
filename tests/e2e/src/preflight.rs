//! What the machine must have. Missing things fail the run, each with how to mend it: an
//! end-to-end case that quietly does not run proves nothing.
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, ensure};

/// Paths of everything a run needs, found once.
#[derive(Debug, Clone)]
pub struct Tools {
    /// Root of the source tree.
    pub workspace: PathBuf,
    /// The `doze` executable under test.
    pub doze: PathBuf,
    /// bzImage.
    pub kernel: PathBuf,
    /// `lib/modules/VERSION` of that kernel.
    pub modules: PathBuf,
    /// OCI layout with busybox and redis.
    pub demo_image: PathBuf,
    /// Static busybox, for images made here.
    pub busybox: PathBuf,
    pub qemu: PathBuf,
    /// Interpreter of the virtual environment with the Python SDK.
    pub python: PathBuf,
    /// Folder whose `node_modules` holds the TypeScript SDK.
    pub node_dir: PathBuf,
}

impl Tools {
    /// Looks everything up; the error lists all that is missing at once.
    pub fn find() -> Result<Self> {
        let workspace = workspace();
        let from_env =
            |key: &str, default: PathBuf| env::var_os(key).map_or(default, PathBuf::from);
        let cache = workspace.join(".cache");
        let modules_root = from_env("DOZE_KERNEL_MODULES", cache.join("kernel/modules"));
        let tools = Self {
            doze: from_env("DOZE_BIN", workspace.join("target/release/doze")),
            kernel: from_env("DOZE_KERNEL", cache.join("kernel/boot/vmlinuz")),
            modules: modules_root,
            demo_image: from_env("DOZE_DEMO_IMAGE", cache.join("demo-image")),
            busybox: which("busybox").unwrap_or_else(|| PathBuf::from("/bin/busybox")),
            qemu: which("qemu-system-x86_64")
                .unwrap_or_else(|| PathBuf::from("/usr/bin/qemu-system-x86_64")),
            python: from_env("DOZE_SDK_PYTHON", cache.join("sdk/py/bin/python")),
            node_dir: from_env("DOZE_SDK_NODE_DIR", cache.join("sdk/ts")),
            workspace,
        };
        let problems = tools.problems();
        ensure!(
            problems.is_empty(),
            "this machine lacks what the end-to-end cases need:\n  - {}",
            problems.join("\n  - ")
        );
        Ok(tools)
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut need = |ok: bool, what: String, mend: &str| {
            if !ok {
                problems.push(format!("{what}: {mend}"));
            }
        };
        need(
            rustix::process::geteuid().is_root(),
            "not root".into(),
            "run as root (sudo make test)",
        );
        need(
            tun_works(),
            "/dev/net/tun cannot be opened".into(),
            "modprobe tun, or give the container the device",
        );
        need(
            conntrack_works(),
            "connection tracking does not work here".into(),
            "modprobe nf_conntrack_netlink; apt-get install conntrack",
        );
        for (program, package) in [
            ("nft", "nftables"),
            ("conntrack", "conntrack"),
            ("mkfs.erofs", "erofs-utils"),
            ("mke2fs", "e2fsprogs"),
            ("mkfs.xfs", "xfsprogs"),
            ("xfs_io", "xfsprogs"),
            ("ip", "iproute2"),
            ("node", "nodejs"),
            ("qemu-system-x86_64", "qemu-system-x86"),
        ] {
            need(
                which(program).is_some(),
                format!("{program} is not in PATH"),
                &format!("apt-get install {package}"),
            );
        }
        need(
            is_static_elf(&self.busybox),
            format!("{} is not a static busybox", self.busybox.display()),
            "apt-get install busybox-static",
        );
        let files: [(&Path, &str); 6] = [
            (&self.doze, "make build"),
            (&self.kernel, "make setup"),
            (&self.modules, "make setup"),
            (&self.demo_image.join("index.json"), "make demo-image"),
            (&self.python, "make setup (tests/sdk/setup)"),
            (
                &self
                    .node_dir
                    .join("node_modules/@onkernel/hypeman/package.json"),
                "make setup (tests/sdk/setup)",
            ),
        ];
        for (path, mend) in files {
            need(
                path.exists(),
                format!("{} does not exist", path.display()),
                mend,
            );
        }
        problems
    }
}

fn workspace() -> PathBuf {
    // The manifest's folder is tests/e2e.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest
        .ancestors()
        .nth(2)
        .unwrap_or(manifest)
        .to_path_buf()
}

/// First executable file of this name in PATH and the system folders a user's PATH may lack.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

fn tun_works() -> bool {
    fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .is_ok()
}

/// Asks the kernel itself; we are inside our own namespace here, so the table is our own.
fn conntrack_works() -> bool {
    Command::new("conntrack")
        .arg("-C")
        .output()
        .is_ok_and(|o| o.status.success())
}

/// An ELF file without program interpreter: it runs in an image that holds nothing else.
fn is_static_elf(path: &Path) -> bool {
    const PT_INTERP: u32 = 3;
    let Ok(bytes) = fs::read(path) else {
        return false;
    };
    let u16_at = |at: usize| {
        bytes
            .get(at..at + 2)
            .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))
    };
    let u64_at = |at: usize| {
        bytes
            .get(at..at + 8)
            .and_then(|b| b.try_into().ok())
            .and_then(|b| usize::try_from(u64::from_le_bytes(b)).ok())
    };
    if bytes.get(..5) != Some(b"\x7fELF\x02") {
        return false;
    }
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let (Some(offset), Some(size), Some(count)) = (u64_at(32), u16_at(54), u16_at(56)) else {
        return false;
    };
    !(0..count).any(|i| {
        bytes
            .get(offset + i * size..)
            .and_then(|b| b.get(..4))
            .is_some_and(|b| b == PT_INTERP.to_le_bytes())
    })
}
