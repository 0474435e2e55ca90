//! Finds places inside a root folder whose content nobody trusts.
//!
//! A path is walked one component at a time from the root's file descriptor. No step lets the
//! kernel follow a symlink: a link is read and its target is walked by the same rules, starting
//! again at the root when it is absolute, and `..` stops at the root. So a path means what it would
//! mean after `chroot`, which is how container runtimes read it, and cannot lead outside.
//!
//! ```text
//!   /bin -> usr/bin          bin/x  =>  root . openat("usr") . openat("bin") . "x"
//!   /etc -> ../../../etc     etc/x  =>  root . openat("etc") is a link to itself: refused
//! ```
//!
//! The tree must not be changed by anybody else meanwhile; the stage folder is ours alone.
use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat},
    io::Errno,
};

/// Components a real path inside the tree may have. Keeps recursion, open descriptors and the path
/// that `mkfs.erofs` builds within bounds; links could otherwise nest folders without end.
pub(super) const MAX_DEPTH: usize = 256;
/// Bytes of a real path inside the tree, below `PATH_MAX` with room for the stage folder's name.
pub(super) const MAX_PATH: usize = 4000;
/// As the kernel's own `MAXSYMLINKS` (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// A folder inside the root.
#[derive(Debug)]
pub(super) struct Place {
    /// Opened with `O_PATH`.
    pub fd: OwnedFd,
    /// The names that lead to it from the root, no links among them.
    pub names: Vec<Vec<u8>>,
}

impl Place {
    pub(super) fn root(root: BorrowedFd<'_>) -> Result<Self, WalkError> {
        Ok(Self {
            fd: open_folder(root, b".")?,
            names: Vec::new(),
        })
    }

    /// Real path of this folder, empty for the root.
    pub(super) fn path(&self) -> Vec<u8> {
        self.names.join(&b'/')
    }

    /// Real path of `name` in this folder.
    pub(super) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.path();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    fn enter(&mut self, name: Vec<u8>, fd: OwnedFd) -> Result<(), WalkError> {
        self.names.push(name);
        self.fd = fd;
        let bytes: usize = self.names.iter().map(|name| name.len() + 1).sum();
        if self.names.len() > MAX_DEPTH || bytes > MAX_PATH {
            return Err(WalkError::TooDeep);
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), WalkError> {
        // At the root `..` is the root itself, as for a process inside.
        if self.names.pop().is_some() {
            self.fd = open_folder(self.fd.as_fd(), b"..")?;
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WalkError {
    #[error("{0:?} on the way does not exist")]
    Absent(String),
    #[error("{0:?} on the way is not a folder")]
    NotAFolder(String),
    #[error("more than {MAX_LINKS} symbolic links on the way")]
    Links,
    #[error("more than {MAX_DEPTH} folders deep or {MAX_PATH} bytes long inside the image")]
    TooDeep,
    #[error(transparent)]
    System(#[from] Errno),
}

/// What to do about folders that are not there.
pub(super) enum Absent<'a> {
    Refuse,
    /// Create them, and tell the real path of each.
    Create(&'a mut dyn FnMut(Vec<u8>)),
}

/// The folder that `components` lead to from the root. No component may be empty, `.` or `..`.
pub(super) fn walk(
    root: BorrowedFd<'_>,
    components: &[&[u8]],
    mut absent: Absent<'_>,
) -> Result<Place, WalkError> {
    let mut place = Place::root(root)?;
    let mut pending: VecDeque<Vec<u8>> = components.iter().map(|c| c.to_vec()).collect();
    let mut links = 0;
    while let Some(name) = pending.pop_front() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                place.leave()?;
                continue;
            }
            _ => {}
        }
        match stat(place.fd.as_fd(), &name)?.map(|stat| file_type(&stat)) {
            Some(FileType::Directory) => {
                let fd = open_folder(place.fd.as_fd(), &name)?;
                place.enter(name, fd)?;
            }
            Some(FileType::Symlink) => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(WalkError::Links);
                }
                let target = rustix::fs::readlinkat(&place.fd, name.as_slice(), Vec::new())?;
                let target = target.as_bytes();
                if target.starts_with(b"/") {
                    place = Place::root(root)?;
                }
                for part in target.split(|b| *b == b'/').rev() {
                    pending.push_front(part.to_vec());
                }
            }
            Some(_) => return Err(WalkError::NotAFolder(lossy(&name))),
            None => match &mut absent {
                Absent::Refuse => return Err(WalkError::Absent(lossy(&name))),
                Absent::Create(created) => {
                    let mode = Mode::from_raw_mode(0o755);
                    rustix::fs::mkdirat(&place.fd, name.as_slice(), mode)?;
                    // Not what the umask left of it.
                    rustix::fs::chmodat(&place.fd, name.as_slice(), mode, AtFlags::empty())?;
                    let fd = open_folder(place.fd.as_fd(), &name)?;
                    created(place.path_of(&name));
                    place.enter(name, fd)?;
                }
            },
        }
    }
    Ok(place)
}

/// What has this name in `folder`, links not followed.
pub(super) fn stat(folder: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(super) fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// A handle for walking and `*at` calls, not for reading.
fn open_folder(folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::empty())
}

/// A handle that can be listed and changed.
pub(super) fn open_folder_to_read(folder: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::empty())
}

/// Names in a folder, without `.` and `..`.
pub(super) fn names(folder: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Removes `name` from `folder`, with everything below it that `keep` does not know by its real
/// path; a folder stays when something in it does. Absent is fine. True when nothing stayed.
///
/// `path` is the real path of `name`. The tree is at most [`MAX_DEPTH`] deep, which bounds the recursion.
pub(super) fn remove(
    folder: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
    keep: &dyn Fn(&[u8]) -> bool,
) -> Result<bool, Errno> {
    let Some(stat) = stat(folder, name)? else {
        return Ok(true);
    };
    if file_type(&stat) != FileType::Directory {
        if keep(path) {
            return Ok(false);
        }
        rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
        return Ok(true);
    }
    let inner = open_folder_to_read(folder, name)?;
    if !remove_content(inner.as_fd(), path, keep)? || keep(path) {
        return Ok(false);
    }
    rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

/// [`remove`] for everything in a folder whose real path is `path` (empty for the root).
pub(super) fn remove_content(
    folder: BorrowedFd<'_>,
    path: &[u8],
    keep: &dyn Fn(&[u8]) -> bool,
) -> Result<bool, Errno> {
    let mut emptied = true;
    for child in names(folder)? {
        let mut child_path = path.to_vec();
        if !child_path.is_empty() {
            child_path.push(b'/');
        }
        child_path.extend_from_slice(&child);
        emptied &= remove(folder, &child, &child_path, keep)?;
    }
    Ok(emptied)
}
