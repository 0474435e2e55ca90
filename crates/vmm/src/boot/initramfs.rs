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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::io::Read;

    use cpio::newc::Reader;

    use super::*;
    use crate::boot::cache::stamp;

    fn module(name: &str) -> Module {
        let file = tempfile::NamedTempFile::new().unwrap();
        Module {
            name: name.to_owned(),
            source: stamp(file.path()).unwrap(),
            content: format!("content of {name}").into_bytes(),
        }
    }

    #[test]
    fn holds_init_console_and_modules_in_order() {
        let modules = [module("zebra"), module("ant")];
        let archive = assemble(b"\x7fELF", &modules).unwrap();
        assert_eq!(archive, assemble(b"\x7fELF", &modules).unwrap());
        let mut rest = &archive[..];
        let mut seen = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            let entry = reader.entry().clone();
            if entry.is_trailer() {
                break;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let device = (entry.rdev_major(), entry.rdev_minor());
            let content = String::from_utf8(content).unwrap();
            seen.push((entry.name().to_owned(), entry.mode(), device, content));
            rest = reader.finish().unwrap();
        }
        let find = |name: &str| seen.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!((find("init").1, &*find("init").3), (0o100_755, "\x7fELF"));
        assert_eq!(
            (find("dev/console").1, find("dev/console").2),
            (0o020_600, (5, 1))
        );
        assert_eq!(find("newroot").1, 0o040_755);
        assert_eq!(find("modules/00-zebra.ko").3, "content of zebra");
        assert_eq!(find("modules/01-ant.ko").1, 0o100_644);
        // A folder before what is in it: the kernel makes no parents.
        let at = |name: &str| seen.iter().position(|entry| entry.0 == name).unwrap();
        assert!(at("dev") < at("dev/console") && at("modules") < at("modules/00-zebra.ko"));
    }
}
