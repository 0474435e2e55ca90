//! What files really occupy on their disks. Blocks that several files share (reflinks) count once,
//! however many of the files are added.
//!
//! A file's own blocks are what `stat` counts less its shared extents; those go into one set of intervals per
//! file system, told apart by their place on the disk:
//!
//! ```text
//!   file A   |own|  shared 0..8  |          own A + own B + |0..8 ∪ 4..12|
//!   file B          | shared 4..12 |own|
//! ```
//!
//! The kernel says which extents are shared and where they lie (FIEMAP,
//! Documentation/filesystems/fiemap.rst). Where it does not know that call nothing is shared, and `stat` is the whole
//! truth. Compressed extents (btrfs) count in each file: their length on the disk is not told.
use std::{
    collections::{BTreeMap, HashSet},
    fs::{File, Metadata, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::{
    io::Errno,
    ioctl::{Opcode, Updater, ioctl, opcode},
};

use crate::files::{at, each_entry};

/// Adds files up. All blocking.
#[derive(Debug, Default)]
pub struct DiskUsage {
    seen: HashSet<(u64, u64)>,
    shared: BTreeMap<u64, Intervals>,
    bytes: u64,
}

impl DiskUsage {
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that everything added so far occupies.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds a file, or a folder with everything below it; links below it are not followed. Returns what it
    /// added to [`bytes`](Self::bytes): 0 for what was added before.
    ///
    /// What vanishes meanwhile counts nothing. Files that change meanwhile are counted as they were at some
    /// moment.
    ///
    /// # Errors
    /// When `path` is absent, or something cannot be read. What was added until then stays.
    pub fn add(&mut self, path: &Path) -> io::Result<u64> {
        let before = self.bytes;
        each_entry(path, |entry, meta| self.add_one(entry, meta))?;
        Ok(self.bytes - before)
    }

    fn add_one(&mut self, path: &Path, meta: &Metadata) -> io::Result<()> {
        if !self.seen.insert((meta.dev(), meta.ino())) {
            return Ok(());
        }
        // st_blocks counts units of 512 bytes, whatever the block size (inode(7)).
        let allocated = meta.blocks().saturating_mul(512);
        let mut shared = 0_u64;
        let mut counted = 0_u64;
        if meta.is_file() && allocated > 0 {
            let intervals = self.shared.entry(meta.dev()).or_default();
            match shared_extents(path, |from, length| {
                shared = shared.saturating_add(length);
                counted = counted.saturating_add(intervals.add(from, length));
            }) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other.map_err(|e| at(e, "list the extents of", path))?,
            }
        }
        let own = allocated.saturating_sub(shared);
        self.bytes = self.bytes.saturating_add(own).saturating_add(counted);
        Ok(())
    }
}

/// Disjoint ranges of bytes: begin to end.
#[derive(Debug, Default)]
struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    /// Returns how many of the bytes were not yet in.
    fn add(&mut self, from: u64, length: u64) -> u64 {
        let (mut begin, mut end) = (from, from.saturating_add(length));
        if begin == end {
            return 0;
        }
        let mut known = 0;
        // Those that begin at or before our end and reach our begin become one with it. They are disjoint, so
        // going down from our end the first that does not reach it is the last to be looked at.
        while let Some((&other, &other_end)) = self.0.range(..=end).next_back() {
            if other_end < begin {
                break;
            }
            let overlap = other_end
                .min(from.saturating_add(length))
                .saturating_sub(other.max(from));
            known += overlap;
            self.0.remove(&other);
            begin = begin.min(other);
            end = end.max(other_end);
        }
        self.0.insert(begin, end);
        length - known
    }
}

/// Extents asked for at once; a page and a half of them.
const EXTENTS: usize = 128;
const EXTENT_LAST: u32 = 0x1;
/// Not a plain run of bytes at a known place: unknown, delayed, encoded, encrypted, inline, packed.
const EXTENT_NOT_PLAIN: u32 = 0x2 | 0x4 | 0x8 | 0x80 | 0x200 | 0x400;
const EXTENT_SHARED: u32 = 0x2000;

/// `struct fiemap` without its extents (linux/fiemap.h).
#[repr(C)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    header: Header,
    extents: [Extent; EXTENTS],
}

/// `_IOWR('f', 11, struct fiemap)` (linux/fs.h).
const FS_IOC_FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);

/// Calls `found` with the physical begin and the length of each extent that is shared.
fn shared_extents(path: &Path, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
    // Whatever took the file's place since it was looked at is not waited for.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut start = 0;
    loop {
        let request = match extents(&file, start) {
            Ok(request) => request,
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let mapped = request.header.mapped_extents as usize;
        let Some(mapped) = request.extents.get(..mapped).filter(|m| !m.is_empty()) else {
            return Ok(());
        };
        for extent in mapped {
            if extent.flags & EXTENT_SHARED != 0 && extent.flags & EXTENT_NOT_PLAIN == 0 {
                found(extent.physical, extent.length);
            }
        }
        let last = mapped[mapped.len() - 1];
        let next = last.logical.saturating_add(last.length);
        if last.flags & EXTENT_LAST != 0 || next <= start {
            return Ok(());
        }
        start = next;
    }
}

#[allow(unsafe_code, reason = "FIEMAP ioctl")]
fn extents(file: &File, start: u64) -> Result<Box<Request>, Errno> {
    let none = Extent {
        logical: 0,
        physical: 0,
        length: 0,
        reserved64: [0; 2],
        flags: 0,
        reserved: [0; 3],
    };
    let mut request = Box::new(Request {
        header: Header {
            start,
            length: u64::MAX - start,
            flags: 0,
            mapped_extents: 0,
            extent_count: EXTENTS as u32,
            reserved: 0,
        },
        extents: [none; EXTENTS],
    });
    // SAFETY: the opcode names a `struct fiemap`, which `header` is by layout and size; the kernel reads it
    // and writes it and at most `extent_count` extents behind it, which `extents` has room for. Any bytes
    // are a valid value of both.
    unsafe { ioctl(file, Updater::<FS_IOC_FIEMAP, Request>::new(&mut request)) }?;
    Ok(request)
}

#[cfg(test)]
mod tests;
