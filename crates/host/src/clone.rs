//! Copies of files. Where the file system can share blocks between files a copy costs nothing but
//! metadata; where it cannot, only what is allocated is copied, and holes stay holes. All blocking.
//!
//! ```text
//!   FICLONE ── works ──────────────────────────────────────────> Reflink
//!      └── cannot ──> per data segment (SEEK_DATA, SEEK_HOLE):
//!                     copy_file_range ── cannot ──> read, write ──> Copied
//! ```
//!
//! The copy is of the file as it is while it is read: whoever wants one moment keeps writers away. It is
//! whole or absent for everybody who does not look meanwhile, but not on the disk until it is synced
//! ([`crate::files::fsync_dir`] for its name).
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use rustix::{
    fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek},
    io::Errno,
};

use crate::files::{at, cannot_reflink, create_guarded};

/// Copied between two looks at the cancel check.
const CHUNK: u64 = 4 << 20;
/// Read and written at once where the kernel does not copy.
const BUFFER: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The two files share their blocks until one of them changes.
    Reflink,
    Copied,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cloned {
    pub how: How,
    /// Bytes of data that were written; 0 for a reflink. Holes are not counted.
    pub copied_bytes: u64,
}

/// The cancel check of those who never cancel.
pub fn never() -> bool {
    false
}

/// Makes `to`, which must not exist (mode 0600), a copy of the file `from`: same size and content, holes
/// where `from` has some. Not synced: [`sync`] does that.
///
/// `cancelled` is asked before and every few MiB of a copy.
///
/// # Errors
/// `Interrupted` when `cancelled` said so; `AlreadyExists`; `InvalidInput` when `from` is not a regular
/// file; `UnexpectedEof` when it shrinks meanwhile. The half-made copy is removed.
pub fn clone_file(from: &Path, to: &Path, cancelled: &dyn Fn() -> bool) -> io::Result<Cloned> {
    make(from, to, cancelled, true)
}

/// [`clone_file`] that does not share blocks even where the file system could share them with one call. (The
/// file system may still do so behind `copy_file_range`.)
///
/// # Errors
/// As [`clone_file`].
pub fn copy_sparse(from: &Path, to: &Path, cancelled: &dyn Fn() -> bool) -> io::Result<Cloned> {
    make(from, to, cancelled, false)
}

/// Bytes that a copy without reflink writes: what of the file is data and not a hole.
pub fn bytes_to_copy(path: &Path) -> io::Result<u64> {
    let (file, size) = open(path)?;
    let mut total = 0;
    let mut at_byte = 0;
    while let Some((data, hole)) =
        next_data(&file, at_byte, size).map_err(|e| at(e, "find the data of", path))?
    {
        total += hole - data;
        at_byte = hole;
    }
    Ok(total)
}

/// Makes the copy and its name durable.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(|e| at(e, "fsync", path))?;
    crate::files::fsync_dir(crate::files::parent_of(path))
}

fn make(from: &Path, to: &Path, cancelled: &dyn Fn() -> bool, reflink: bool) -> io::Result<Cloned> {
    let (source, size) = open(from)?;
    let (guard, target) = create_guarded(to)?;
    check(cancelled, from)?;
    let shared = match reflink.then(|| ioctl_ficlone(&target, &source)) {
        Some(Ok(())) => true,
        Some(Err(e)) if !cannot_reflink(e) => return Err(at(e.into(), "clone", from)),
        Some(Err(_)) | None => false,
    };
    let cloned = if shared {
        Cloned {
            how: How::Reflink,
            copied_bytes: 0,
        }
    } else {
        let mut copy = Copy::new(from, to, &source, &target);
        Cloned {
            how: How::Copied,
            copied_bytes: copy.all(size, cancelled)?,
        }
    };
    guard.keep();
    Ok(cloned)
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let meta = std::fs::metadata(path).map_err(|e| at(e, "inspect", path))?;
    if !meta.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is not a regular file", path.display()),
        ));
    }
    let file = File::open(path).map_err(|e| at(e, "open", path))?;
    let size = file.metadata().map_err(|e| at(e, "inspect", path))?.len();
    Ok((file, size))
}

fn check(cancelled: &dyn Fn() -> bool, from: &Path) -> io::Result<()> {
    if !cancelled() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Interrupted,
        format!("the copy of {} was cancelled", from.display()),
    ))
}

/// The first range of data at or after `from_byte` and before `size`: its begin and end.
///
/// Uses the descriptor's position, but only in calls that set it.
fn next_data(file: &File, from_byte: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if from_byte >= size {
        return Ok(None);
    }
    let data = match seek(file, SeekFrom::Data(from_byte)) {
        Ok(data) if data >= size => return Ok(None),
        Ok(data) => data,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that knows no holes: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((from_byte, size))),
        Err(e) => return Err(e.into()),
    };
    match seek(file, SeekFrom::Hole(data)) {
        Ok(hole) if hole > data => Ok(Some((data, hole.min(size)))),
        // Punched away between the two calls: what is read there is zeros all the same.
        Ok(_) | Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some((data, size))),
        Err(e) => Err(e.into()),
    }
}

/// One copy under way.
struct Copy<'a> {
    from: &'a Path,
    to: &'a Path,
    source: &'a File,
    target: &'a File,
    /// Filled on the first range that the kernel does not copy; from then on all are read and written.
    buffer: Vec<u8>,
}

impl<'a> Copy<'a> {
    fn new(from: &'a Path, to: &'a Path, source: &'a File, target: &'a File) -> Self {
        Self {
            from,
            to,
            source,
            target,
            buffer: Vec::new(),
        }
    }

    fn all(&mut self, size: u64, cancelled: &dyn Fn() -> bool) -> io::Result<u64> {
        // First the size, so that a hole at the end is there, and a disk that is too small for the file known.
        self.target
            .set_len(size)
            .map_err(|e| at(e, "give its size to", self.to))?;
        let mut total = 0;
        let mut at_byte = 0;
        while let Some((data, hole)) = next_data(self.source, at_byte, size)
            .map_err(|e| at(e, "find the data of", self.from))?
        {
            at_byte = data;
            while at_byte < hole {
                check(cancelled, self.from)?;
                let end = hole.min(at_byte + CHUNK);
                self.range(at_byte, end)?;
                total += end - at_byte;
                at_byte = end;
            }
        }
        Ok(total)
    }

    fn range(&mut self, mut at_byte: u64, end: u64) -> io::Result<()> {
        while at_byte < end && self.buffer.is_empty() {
            let (mut read, mut written) = (at_byte, at_byte);
            // At most a chunk, hence no larger than a usize.
            let wanted = (end - at_byte) as usize;
            match copy_file_range(
                self.source,
                Some(&mut read),
                self.target,
                Some(&mut written),
                wanted,
            ) {
                // Some file systems say so although there is more (copy_file_range(2), BUGS); reading tells.
                Ok(0) => self.buffer = vec![0; BUFFER],
                Ok(copied) => at_byte += copied as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    self.buffer = vec![0; BUFFER];
                }
                Err(e) => return Err(at(e.into(), "copy", self.from)),
            }
        }
        while at_byte < end {
            let wanted = (end - at_byte).min(BUFFER as u64) as usize;
            let part = &mut self.buffer[..wanted];
            self.source
                .read_exact_at(part, at_byte)
                .map_err(|e| at(e, "read", self.from))?;
            self.target
                .write_all_at(part, at_byte)
                .map_err(|e| at(e, "write", self.to))?;
            at_byte += wanted as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
