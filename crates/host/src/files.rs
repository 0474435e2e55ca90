//! Files that are either whole or absent after a power cut. All blocking.
//!
//! A rename makes new content visible in one step, but neither the content nor the rename is on
//! the disk until it is synced, each in its own way:
//!
//! ```text
//!  .name.<pid>.<n>.stage   write -> fsync(file) -> rename over name -> fsync(folder)
//!                            |            |               |                  |
//!  power cut after it:      old          old           old or new           new
//! ```
//!
//! Errors name the step and the path and keep the kind of the system's error (`StorageFull`,
//! `PermissionDenied`, ...).
use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::io::Errno;

const STAGE_SUFFIX: &str = ".stage";

/// Stage file in the same folder, write, fsync, rename over `path`, fsync the folder.
///
/// The file gets exactly `mode` (the umask does not apply). Concurrent writers of one path do not
/// mix: the last rename wins. After an error the old content is still there, unless only the last
/// step, the folder's fsync, failed: then the new one is visible but may not survive a power cut.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let (folder, name) = split(path)?;
    let (stage, mut file) = Stage::create(folder, name)?;
    file.write_all(content)
        .map_err(|e| at(e, "write", &stage.path))?;
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(|e| at(e, "set the mode of", &stage.path))?;
    file.sync_all().map_err(|e| at(e, "fsync", &stage.path))?;
    stage.rename(path)?;
    fsync_dir(folder)
}

/// Whether `name` is a stage file of [`write_atomic`]: left over after a crash, safe to remove when
/// no writer is at work in its folder.
pub fn is_stage_name(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b".") && name.ends_with(STAGE_SUFFIX.as_bytes())
}

/// Creates the folder (and parents) with mode 0700 and fsyncs its parent. Existing: mode is checked to not be wider.
///
/// # Errors
/// `PermissionDenied` when the folder exists and is open to group or others, or belongs to somebody
/// who is neither us nor root; `NotADirectory` when something else has the name.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    let parent = parent_of(path);
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => check_private(path)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound && parent != path => {
            create_parents(parent)?;
            match DirBuilder::new().mode(0o700).create(path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => check_private(path)?,
                other => other.map_err(|e| at(e, "create the folder", path))?,
            }
        }
        Err(e) => return Err(at(e, "create the folder", path)),
    }
    // Also when it existed: whoever made it may have been cut off before this step.
    fsync_dir(parent)
}

/// Missing ancestors, outermost first, each made durable in its own parent. Existing ones may be
/// anybody's and as open as they like.
fn create_parents(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = path
        .ancestors()
        .take_while(|p| !p.as_os_str().is_empty() && !p.exists())
        .collect();
    for folder in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(folder) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(at(e, "create the folder", folder));
            }
            _ => fsync_dir(parent_of(folder))?,
        }
    }
    Ok(())
}

fn check_private(path: &Path) -> io::Result<()> {
    let meta = fs::metadata(path).map_err(|e| at(e, "inspect", path))?;
    let shown = path.display();
    if !meta.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::NotADirectory,
            format!("{shown} exists and is not a folder; move it away or configure another path"),
        ));
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "the folder {shown} has mode {mode:04o}, allowed is at most 0700; run: chmod 700 {shown}"
            ),
        ));
    }
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us && meta.uid() != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "the folder {shown} belongs to user id {}, allowed is {us} or 0; run: chown {us} {shown}",
                meta.uid()
            ),
        ));
    }
    Ok(())
}

/// Makes the folder's entries (names made, renamed, removed) durable.
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| at(e, "fsync the folder", path))
}

/// New sparse file of `size` bytes, mode 0600; an error when it exists.
///
/// # Errors
/// `AlreadyExists`; `InvalidInput` or `FileTooLarge` for a size the file system cannot hold. The
/// file is removed again when a later step fails.
pub fn create_sparse(path: &Path, size: u64) -> io::Result<()> {
    let (folder, _) = split(path)?;
    let (guard, file) = create_guarded(path)?;
    file.set_len(size).map_err(|e| {
        let kind = e.kind();
        io::Error::new(
            kind,
            format!("cannot give {} a size of {size} bytes: {e}", path.display()),
        )
    })?;
    file.sync_all().map_err(|e| at(e, "fsync", path))?;
    fsync_dir(folder)?;
    guard.keep();
    Ok(())
}

/// Removes a file or folder tree without following links out of it; absent is fine. Fsyncs the parent.
///
/// # Errors
/// `InvalidInput` for a path without a last name (`/`, `..`): such a path is never one of our trees.
/// A tree may be partly gone after an error; call it again.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let (folder, _) = split(path)?;
    let removed = match fs::symlink_metadata(path) {
        // std walks with openat and O_NOFOLLOW: a folder swapped for a link is not entered.
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(e, "remove", path)),
        // Absent also gets the fsync: an earlier removal may have been cut off before it.
        _ => {}
    }
    match fsync_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Whether `FICLONE` works inside `dir`, found by trying it.
pub fn supports_reflink(dir: &Path) -> io::Result<bool> {
    let (source, mut source_file) = Stage::create(dir, OsStr::new("reflink-source"))?;
    let (_target, target_file) = Stage::create(dir, OsStr::new("reflink-target"))?;
    // A whole block: an empty file would be cloned without asking the file system.
    source_file
        .write_all(&[0x5a; 4096])
        .map_err(|e| at(e, "write", &source.path))?;
    match rustix::fs::ioctl_ficlone(&target_file, &source_file) {
        Ok(()) => Ok(true),
        Err(e) if cannot_reflink(e) => Ok(false),
        Err(e) => Err(at(e.into(), "clone a file inside", dir)),
    }
}

/// Whether `FICLONE`'s error says that these two files cannot share blocks, as opposed to a failure.
pub(crate) fn cannot_reflink(e: Errno) -> bool {
    // ioctl_ficlone(2); which of them depends on the file system.
    matches!(
        e,
        Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::NOSYS | Errno::XDEV
    )
}

/// Whether the error says that the disk, or our share of it, is used up.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Bytes available to us on the file system that holds `path`.
pub fn free_space(path: &Path) -> io::Result<u64> {
    let stat =
        rustix::fs::statvfs(path).map_err(|e| at(e.into(), "measure the file system of", path))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes of the file system that holds `path`.
pub fn total_space(path: &Path) -> io::Result<u64> {
    let stat =
        rustix::fs::statvfs(path).map_err(|e| at(e.into(), "measure the file system of", path))?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
}

/// Bytes really allocated by the tree below `path`.
///
/// A file with several names in the tree counts once; links are not followed (but `path` itself
/// may be one); what vanishes meanwhile counts nothing. Extents shared by reflinks count in each file:
/// [`crate::usage`] counts them once.
pub fn allocated_bytes(path: &Path) -> io::Result<u64> {
    let mut total = 0_u64;
    let mut seen = HashSet::new();
    each_entry(path, |_, meta| {
        if meta.is_dir() || meta.nlink() == 1 || seen.insert((meta.dev(), meta.ino())) {
            // st_blocks counts units of 512 bytes, whatever the block size (inode(7)).
            total = total.saturating_add(meta.blocks().saturating_mul(512));
        }
        Ok(())
    })?;
    Ok(total)
}

/// Visits `path`, which may be a link, and everything below it, where links are not followed. What vanishes
/// meanwhile is left out.
pub(crate) fn each_entry(
    path: &Path,
    mut visit: impl FnMut(&Path, &fs::Metadata) -> io::Result<()>,
) -> io::Result<()> {
    let root = fs::metadata(path).map_err(|e| at(e, "inspect", path))?;
    visit(path, &root)?;
    let mut folders = if root.is_dir() {
        vec![path.to_owned()]
    } else {
        Vec::new()
    };
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound && folder != path => continue,
            Err(e) => return Err(at(e, "list", &folder)),
        };
        for entry in entries {
            let entry = entry.map_err(|e| at(e, "list", &folder))?;
            let meta = match entry.metadata() {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(at(e, "inspect", &entry.path())),
            };
            visit(&entry.path(), &meta)?;
            if meta.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    Ok(())
}

/// A file that disappears unless it reaches its place.
#[derive(Debug)]
pub(crate) struct Stage {
    path: PathBuf,
}

impl Stage {
    /// A new file beside the one called `name`. The pid keeps servers apart, the counter our own
    /// calls, and O_EXCL whatever an earlier life left behind.
    fn create(folder: &Path, name: &OsStr) -> io::Result<(Self, File)> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let mut stage = OsString::from(".");
            // The whole must stay within NAME_MAX, 255 bytes.
            stage.push(OsStr::from_bytes(
                name.as_bytes().get(..200).unwrap_or(name.as_bytes()),
            ));
            stage.push(format!(".{}.{n}{STAGE_SUFFIX}", std::process::id()));
            let path = folder.join(stage);
            match create_new(&path) {
                Ok(file) => return Ok((Self { path }, file)),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(at(e, "create", &path)),
            }
        }
    }

    fn rename(self, to: &Path) -> io::Result<()> {
        fs::rename(&self.path, to).map_err(|e| {
            let kind = e.kind();
            let (from, to) = (self.path.display(), to.display());
            io::Error::new(kind, format!("cannot rename {from} to {to}: {e}"))
        })?;
        self.keep();
        Ok(())
    }

    pub(crate) fn keep(mut self) {
        self.path = PathBuf::new();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        if let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), error = %e, "cannot remove a stage file");
        }
    }
}

/// A new file called `path`, mode 0600, that is removed again unless the guard is kept.
pub(crate) fn create_guarded(path: &Path) -> io::Result<(Stage, File)> {
    let file = create_new(path).map_err(|e| at(e, "create", path))?;
    let path = path.to_owned();
    Ok((Stage { path }, file))
}

fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// The folder and the last name of a path; a path without one is refused.
fn split(path: &Path) -> io::Result<(&Path, &OsStr)> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("the path {:?} does not end in a file name", path.display()),
        )
    })?;
    Ok((parent_of(path), name))
}

/// The folder a name lives in: `.` for a bare name, `/` for the root.
pub(crate) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        None => path,
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
    }
}

pub(crate) fn at(e: io::Error, step: &str, path: &Path) -> io::Error {
    io::Error::new(e.kind(), format!("cannot {step} {}: {e}", path.display()))
}

#[cfg(test)]
mod tests;
