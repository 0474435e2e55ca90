//! The initramfs: a `newc` cpio archive, deterministic and not compressed (decompressing it would be the guest's
//! work, 0.4 s and more under TCG).
//!
//! ```text
//!   /init                    our static init
//!   /dev/console             kernel's stdin, stdout, stderr of init (5, 1)
//!   /modules/00-virtio.ko    in load order
//!   /dev /proc /sys /run /tmp /newroot     empty mount points
//! ```
//! Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
use std::io::{self, Write};

use cpio::newc::{Builder, ModeFileType, trailer};

use super::modules::Module;

const MOUNT_POINTS: [&str; 5] = ["proc", "sys", "run", "tmp", "newroot"];

/// The archive's bytes.
pub(super) fn assemble(init: &[u8], modules: &[Module]) -> io::Result<Vec<u8>> {
    let mut archive = Archive {
        bytes: Vec::new(),
        next_inode: 1,
    };
    archive.folder("dev")?;
    archive.console()?;
    for folder in MOUNT_POINTS {
        archive.folder(folder)?;
    }
    archive.folder("modules")?;
    for (i, module) in modules.iter().enumerate() {
        // Two digits, so that the order of names is the order of loading.
        let name = format!("modules/{i:02}-{}.ko", module.name);
        archive.file(&name, 0o644, &module.content)?;
    }
    archive.file("init", 0o755, init)?;
    trailer(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    next_inode: u32,
}

impl Archive {
    fn folder(&mut self, name: &str) -> io::Result<()> {
        let entry = self.entry(name, ModeFileType::Directory, 0o755).nlink(2);
        self.write(entry, &[])
    }

    fn console(&mut self) -> io::Result<()> {
        let entry = self
            .entry("dev/console", ModeFileType::Char, 0o600)
            .rdev_major(5)
            .rdev_minor(1);
        self.write(entry, &[])
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let entry = self.entry(name, ModeFileType::Regular, mode);
        self.write(entry, content)
    }

    fn entry(&mut self, name: &str, kind: ModeFileType, mode: u32) -> Builder {
        let inode = self.next_inode;
        self.next_inode += 1;
        Builder::new(name)
            .ino(inode)
            .mode(mode)
            .set_mode_file_type(kind)
    }

    fn write(&mut self, entry: Builder, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other("a file of 4 GiB does not fit into an initramfs"))?;
        let mut writer = entry.write(&mut self.bytes, size);
        writer.write_all(content)?;
        writer.finish().map(drop)
    }
}
