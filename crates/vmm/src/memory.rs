//! Guest memory as a file that we own, behind one interface whatever the backing.
//!
//! | | `shared` |
//! |---|---|
//! | before a boot | new sparse file |
//! | while the guest runs | the mapping itself; the kernel writes dirty pages back when it likes |
//! | [`MemoryImage::flush`], guest running | fsync: shortens what has to be written while it is paused |
//! | `Machine::save`, guest paused | nothing: the file already holds everything, in the page cache |
//! | [`MemoryImage::sync`], guest paused | fsync |
//! | before a load | size checked, mapped again |
//!
//! Room is left for `private` (the VMM maps an immutable base copy-on-write and `save` writes the dirty
//! pages into it in place) and for Firecracker, which maps its file privately, too: for both,
//! `save` is where memory reaches the file, and `flush` has nothing to do.
use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use crate::{MemoryBacking, MemoryImage};

impl MemoryImage {
    /// A new sparse file of `size` bytes, mode 0600. Not fsynced: without a snapshot its content is worth
    /// nothing.
    ///
    /// # Errors
    /// `AlreadyExists` when there is one with content: it may be a saved machine's.
    pub fn create(&self, size: u64) -> io::Result<()> {
        match self.backing {
            MemoryBacking::Shared => {}
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path)
            .map_err(|e| at(&e, "create the memory file", &self.path))?;
        let existing = file.metadata()?.len();
        if existing != 0 {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!(
                    "memory file {} has {existing} bytes, it must be empty or absent; it may be a saved machine's",
                    self.path.display()
                ),
            ));
        }
        let Err(cause) = file.set_len(size) else {
            return Ok(());
        };
        let mut error = format!(
            "cannot give the memory file {} {size} bytes: {cause}",
            self.path.display()
        );
        if let Err(e) = fs::remove_file(&self.path) {
            error.push_str(&format!("; and cleaning up failed: {e}"));
        }
        Err(io::Error::new(cause.kind(), error))
    }

    /// Brings what the running guest has written so far to the disk. Blocking, for as long as the disk
    /// needs; the guest goes on meanwhile.
    pub fn flush(&self) -> io::Result<()> {
        match self.backing {
            MemoryBacking::Shared => self.sync(),
        }
    }

    /// Makes the file's content durable. Blocking.
    pub fn sync(&self) -> io::Result<()> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .and_then(|file| file.sync_data())
            .map_err(|e| at(&e, "fsync the memory file", &self.path))
    }

    /// # Errors
    /// `NotFound`, or `InvalidData` with both sizes when the file is not `size` bytes long.
    pub fn check_size(&self, size: u64) -> io::Result<()> {
        let found = fs::metadata(&self.path)
            .map_err(|e| at(&e, "inspect the memory file", &self.path))?
            .len();
        if found == size {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "memory file {} has {found} bytes, the snapshot has {size}",
                self.path.display()
            ),
        ))
    }
}

fn at(e: &io::Error, step: &str, path: &Path) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {step} {}: {e}", path.display()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn image(dir: &tempfile::TempDir) -> MemoryImage {
        MemoryImage {
            path: dir.path().join("memory"),
            backing: MemoryBacking::Shared,
        }
    }

    #[test]
    fn a_new_file_is_sparse_private_and_never_replaces_a_saved_one() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir);
        image.create(64 << 20).unwrap();
        let meta = fs::metadata(&image.path).unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (64 << 20, 0o600));
        assert!(meta.blocks() * 512 < 1 << 20);
        let again = image.create(64 << 20).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        image.flush().unwrap();
        image.sync().unwrap();
    }

    #[test]
    fn a_file_of_another_size_is_named_with_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(&dir);
        assert_eq!(
            image.check_size(9).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        fs::write(&image.path, b"12345").unwrap();
        let e = image.check_size(9).unwrap_err().to_string();
        assert!(e.contains("5 bytes") && e.contains('9'), "{e}");
        image.check_size(5).unwrap();
    }
}
