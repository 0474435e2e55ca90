//! File systems, from the initramfs to the root the program sees.
//!
//! ```text
//!   initramfs /            /lower    EROFS image, read-only, shared by all instances
//!                          /disk     ext4 of this instance: upper/, work/
//!                          /newroot  overlay(lower, upper) ──move──> /   + /dev /proc /sys ...
//! ```
use std::{
    ffi::{CStr, CString},
    fs, io,
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, mount, mount_change, mount_move, mount_remount},
};

use super::{BootError, devices::Disks};

const SECURE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// What a shutdown needs of the file systems hidden below the root.
#[derive(Debug)]
pub(super) struct Root {
    disk: OwnedFd,
}

fn attach(
    source: &Path,
    target: &str,
    kind: &CStr,
    flags: MountFlags,
    data: &str,
) -> Result<(), BootError> {
    let context = || {
        format!(
            "mounting {} of type {} at {target}",
            source.display(),
            kind.to_string_lossy()
        )
    };
    fs::create_dir_all(target).map_err(|e| BootError::io(context(), e))?;
    let data = CString::new(data).map_err(|e| BootError::io(context(), e.into()))?;
    match mount(source, target, kind, flags, data.as_c_str()) {
        // Mounted already: the kernel does it for /dev when so configured.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(e) => Err(BootError::io(context(), e.into())),
    }
}

/// What init itself needs to look around.
pub(super) fn early() -> Result<(), BootError> {
    let flags = MountFlags::NOSUID;
    attach(
        Path::new("dev"),
        "/dev",
        c"devtmpfs",
        flags | MountFlags::NOEXEC,
        "mode=0755",
    )?;
    attach(Path::new("proc"), "/proc", c"proc", SECURE, "")?;
    attach(Path::new("sysfs"), "/sys", c"sysfs", SECURE, "")
}

/// Puts the program's root together and moves into it.
pub(super) fn enter(disks: &Disks) -> Result<Root, BootError> {
    attach(
        &disks.rootfs,
        "/lower",
        c"erofs",
        MountFlags::RDONLY | MountFlags::NOATIME,
        "",
    )?;
    attach(&disks.overlay, "/disk", c"ext4", MountFlags::NOATIME, "")?;
    let disk = rustix::fs::open(
        "/disk",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| BootError::io("/disk", e.into()))?;
    for dir in ["/disk/upper", "/disk/work"] {
        fs::create_dir_all(dir).map_err(|e| BootError::io(dir, e))?;
    }
    let layers = "lowerdir=/lower,upperdir=/disk/upper,workdir=/disk/work,xino=auto";
    attach(
        Path::new("overlay"),
        "/newroot",
        c"overlay",
        MountFlags::NOATIME,
        layers,
    )?;
    switch()?;
    Ok(Root { disk })
}

/// Makes /newroot the root, as switch_root(8) does, without emptying the initramfs: this program
/// still is in it.
fn switch() -> Result<(), BootError> {
    for kept in ["/dev", "/proc", "/sys"] {
        let target = format!("/newroot{kept}");
        let context = || format!("moving {kept} into the root");
        make_dir(&target, 0o755).map_err(|e| BootError::io(context(), e))?;
        mount_move(kept, &target).map_err(|e| BootError::io(context(), e.into()))?;
    }
    let moved = rustix::process::chdir("/newroot")
        .and_then(|()| mount_move(".", "/"))
        .and_then(|()| rustix::process::chroot("."))
        .and_then(|()| rustix::process::chdir("/"))
        // What programs that make mount namespaces of their own expect.
        .and_then(|()| {
            mount_change(
                "/",
                MountPropagationFlags::SHARED | MountPropagationFlags::REC,
            )
        });
    moved.map_err(|e| BootError::io("entering the root", e.into()))
}

/// A directory that may be there already, also as a symbolic link to one.
fn make_dir(path: &str, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    if Path::new(path).is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new().mode(mode).create(path)?;
    // The umask may have taken bits.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// What programs expect of a running system, inside the root.
pub(super) fn late() -> Result<(), BootError> {
    let nosuid = MountFlags::NOSUID | MountFlags::NOEXEC;
    attach(
        Path::new("devpts"),
        "/dev/pts",
        c"devpts",
        nosuid,
        "gid=5,mode=620,ptmxmode=666",
    )?;
    attach(
        Path::new("shm"),
        "/dev/shm",
        c"tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )?;
    attach(
        Path::new("cgroup2"),
        "/sys/fs/cgroup",
        c"cgroup2",
        SECURE,
        "nsdelegate",
    )?;
    // Not every kernel has it, and few programs want it.
    if let Err(error) = attach(Path::new("mqueue"), "/dev/mqueue", c"mqueue", SECURE, "") {
        super::console::debug(error);
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/core", "/proc/kcore"),
    ] {
        match rustix::fs::symlink(target, link) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(BootError::io(link, e.into())),
        }
    }
    make_dir("/tmp", 0o1777).map_err(|e| BootError::io("/tmp", e))?;
    // Images put directories there that their programs rely on: only an empty one is covered.
    make_dir("/run", 0o755).map_err(|e| BootError::io("/run", e))?;
    if fs::read_dir("/run").is_ok_and(|mut entries| entries.next().is_none()) {
        attach(
            Path::new("run"),
            "/run",
            c"tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            "mode=0755",
        )?;
    }
    Ok(())
}

impl Root {
    /// Writes everything back and leaves the instance's disk clean. No other process may be left.
    pub(super) fn close(&self) {
        rustix::fs::sync();
        let flags = MountFlags::empty();
        let result = mount_remount("/", flags | MountFlags::RDONLY, c"")
            .and_then(|()| rustix::process::fchdir(&self.disk))
            .and_then(|()| mount_remount(".", flags | MountFlags::RDONLY, c""));
        if let Err(error) = result {
            // Synced it is; the journal makes the rest good at the next boot.
            super::console::debug(format_args!("remounting read-only: {error}"));
        }
    }
}
