//! Creates one entry of a layer below a folder already found, and gives it its metadata.
//!
//! Order matters: content first, then owner (changing it clears setuid and `security.capability`),
//! then mode, then extended attributes, then times.
use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};

use super::{
    Layer,
    tar_stream::{Entry, Kind, Skip, TarStream, Time},
    walk::{self, Place},
};
use crate::ImageError;

/// Linux keeps attributes of these namespaces only (xattr(7)). Others come from archives made
/// elsewhere and mean nothing here.
const XATTR_NAMESPACES: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system."];

/// The name is free in `place`, except that a folder may be there for a folder.
pub(super) fn create<R: Skip>(
    layer: &Layer<'_>,
    entry: &Entry,
    place: &Place,
    name: &[u8],
    link: Option<(Place, Vec<u8>)>,
    tar: &mut TarStream<R>,
) -> Result<(), ImageError> {
    let folder = place.fd.as_fd();
    let failed = |e| layer.io_error(entry, "create", e);
    match &entry.kind {
        Kind::File => return file(layer, entry, folder, name, tar),
        Kind::Directory => {
            match rustix::fs::mkdirat(folder, name, Mode::from_raw_mode(0o700)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(failed(e)),
            }
            let fd = walk::open_folder_to_read(folder, name).map_err(failed)?;
            return set_folder_metadata(fd.as_fd(), layer, entry);
        }
        Kind::HardLink(target) => return hard_link(layer, entry, place, name, link, target),
        Kind::Symlink(target) => {
            if target.is_empty() || target.contains(&0) {
                return Err(layer.refuse(&entry.path, "a symlink to nothing".into()));
            }
            rustix::fs::symlinkat(target.as_slice(), folder, name).map_err(failed)?;
        }
        Kind::CharDevice { major, minor } => {
            node(folder, name, FileType::CharacterDevice, *major, *minor).map_err(failed)?;
        }
        Kind::BlockDevice { major, minor } => {
            node(folder, name, FileType::BlockDevice, *major, *minor).map_err(failed)?;
        }
        Kind::Fifo => node(folder, name, FileType::Fifo, 0, 0).map_err(failed)?,
        Kind::Other(flag) => {
            let reason = format!("entries of type {:?} are not supported", char::from(*flag));
            return Err(layer.refuse(&entry.path, reason));
        }
    }
    set_special_metadata(layer, entry, folder, name)
}

fn node(
    folder: BorrowedFd<'_>,
    name: &[u8],
    kind: FileType,
    major: u32,
    minor: u32,
) -> Result<(), Errno> {
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(folder, name, kind, Mode::from_raw_mode(0o600), device)
}

fn file<R: Skip>(
    layer: &Layer<'_>,
    entry: &Entry,
    folder: BorrowedFd<'_>,
    name: &[u8],
    tar: &mut TarStream<R>,
) -> Result<(), ImageError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o600))
        .map_err(|e| layer.io_error(entry, "create", e))?;
    let mut file = File::from(fd);
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let n = tar
            .read_content(&mut buffer)
            .map_err(|e| layer.tar_error(&entry.path, e.into()))?;
        let Some(content) = buffer.get(..n).filter(|content| !content.is_empty()) else {
            break;
        };
        file.write_all(content).map_err(|source| ImageError::Io {
            context: format!(
                "unpack {:?} of layer {}",
                walk::lossy(&entry.path),
                layer.label
            ),
            source,
        })?;
    }
    let (uid, gid) = owner(layer, entry)?;
    let set = || -> Result<(), Errno> {
        rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode))?;
        set_xattrs(&entry.xattrs, |name, value| {
            rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty())
        })?;
        rustix::fs::futimens(&file, &times(entry.mtime))
    };
    set().map_err(|e| layer.io_error(entry, "set its metadata", e))
}

/// The target's metadata is the link's: they are one file.
fn hard_link(
    layer: &Layer<'_>,
    entry: &Entry,
    place: &Place,
    name: &[u8],
    link: Option<(Place, Vec<u8>)>,
    target: &[u8],
) -> Result<(), ImageError> {
    let refuse = |reason: &str| {
        let reason = format!("its hard link target {:?} {reason}", walk::lossy(target));
        Err(layer.refuse(&entry.path, reason))
    };
    let Some((target_place, target_name)) = link else {
        return refuse("was not looked for");
    };
    // No AT_SYMLINK_FOLLOW: a link to a symlink links the symlink itself.
    let linked = rustix::fs::linkat(
        &target_place.fd,
        target_name.as_slice(),
        &place.fd,
        name,
        AtFlags::empty(),
    );
    match linked {
        Ok(()) => Ok(()),
        Err(Errno::NOENT) => refuse("does not exist"),
        Err(Errno::PERM) => refuse("is a folder"),
        Err(e) => Err(layer.io_error(entry, "create", e)),
    }
}

/// Everything but the time, which comes last of all ([`set_folder_time`]).
pub(super) fn set_folder_metadata(
    folder: BorrowedFd<'_>,
    layer: &Layer<'_>,
    entry: &Entry,
) -> Result<(), ImageError> {
    let (uid, gid) = owner(layer, entry)?;
    let set = || -> Result<(), Errno> {
        rustix::fs::fchown(folder, Some(uid), Some(gid))?;
        rustix::fs::fchmod(folder, Mode::from_raw_mode(entry.mode))?;
        // The entry replaces the metadata of a folder from a layer below.
        for old in xattr_names(folder)? {
            if !entry.xattrs.contains_key(&old) && is_linux_xattr(&old) {
                match rustix::fs::fremovexattr(folder, old.as_slice()) {
                    // Labels of the host's security module cannot be removed, nor are they ours.
                    Ok(())
                    | Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
                    Err(e) => return Err(e),
                }
            }
        }
        set_xattrs(&entry.xattrs, |name, value| {
            rustix::fs::fsetxattr(folder, name, value, XattrFlags::empty())
        })
    };
    set().map_err(|e| layer.io_error(entry, "set its metadata", e))
}

pub(super) fn set_folder_time(place: &Place, time: Time) -> Result<(), Errno> {
    rustix::fs::utimensat(&place.fd, c".", &times(time), AtFlags::SYMLINK_NOFOLLOW)
}

/// Symlinks, devices and fifos: nothing that could be opened without side effects.
fn set_special_metadata(
    layer: &Layer<'_>,
    entry: &Entry,
    folder: BorrowedFd<'_>,
    name: &[u8],
) -> Result<(), ImageError> {
    let (uid, gid) = owner(layer, entry)?;
    let set = || -> Result<(), Errno> {
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(folder, name, Some(uid), Some(gid), nofollow)?;
        if !matches!(entry.kind, Kind::Symlink(_)) {
            // chmod follows links, but this name was created as something else just above.
            rustix::fs::chmodat(
                folder,
                name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )?;
        }
        if !entry.xattrs.is_empty() {
            // The *xattr calls know paths only; this one leads to exactly the inode of the handle.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd: OwnedFd = rustix::fs::openat(folder, name, flags, Mode::empty())?;
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            set_xattrs(&entry.xattrs, |name, value| {
                rustix::fs::setxattr(path.as_str(), name, value, XattrFlags::empty())
            })?;
        }
        rustix::fs::utimensat(folder, name, &times(entry.mtime), nofollow)
    };
    set().map_err(|e| layer.io_error(entry, "set its metadata", e))
}

fn owner(layer: &Layer<'_>, entry: &Entry) -> Result<(Uid, Gid), ImageError> {
    // The largest value means "leave it" to chown(2) and "nobody" to stat(2): not an owner.
    let id = |what: &str, id: u64| match u32::try_from(id) {
        Ok(id) if id != u32::MAX => Ok(id),
        _ => {
            let reason = format!("{what} {id} is not allowed; allowed: 0 to {}", u32::MAX - 1);
            Err(layer.refuse(&entry.path, reason))
        }
    };
    Ok((
        Uid::from_raw(id("uid", entry.uid)?),
        Gid::from_raw(id("gid", entry.gid)?),
    ))
}

fn times(mtime: Time) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime.seconds,
        tv_nsec: mtime.nanoseconds.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

fn is_linux_xattr(name: &[u8]) -> bool {
    XATTR_NAMESPACES.iter().any(|space| name.starts_with(space))
}

fn set_xattrs(
    xattrs: &BTreeMap<Vec<u8>, Vec<u8>>,
    set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    for (name, value) in xattrs.iter().filter(|(name, _)| is_linux_xattr(name)) {
        set(name, value)?;
    }
    Ok(())
}

/// The names of a folder's attributes; none when the file system has no attributes.
fn xattr_names(folder: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    // The kernel's limit for the whole list (XATTR_LIST_MAX).
    let mut list = vec![0; 65536];
    match rustix::fs::flistxattr(folder, list.as_mut_slice()) {
        Ok(length) => {
            let names = list.get(..length).unwrap_or_default().split(|b| *b == 0);
            Ok(names
                .filter(|n| !n.is_empty())
                .map(<[u8]>::to_vec)
                .collect())
        }
        Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}
