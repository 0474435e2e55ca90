//! Stage folders: where an import works before anything of it is visible.
//!
//! A stage folder belongs to whoever holds its `flock`, which the kernel drops when that process
//! dies, however it dies. So a stage folder nobody holds is what a crash left, and one that is held
//! is somebody's import at work, maybe another process's. Creating a folder and locking it is two
//! steps; both happen under the store's own lock so that a cleaner never sees the moment between.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::ImageError;

const LOCK: &str = "lock";
const STAGE: &str = "stage";

/// The whole store, held for short steps: staging, publishing, removing names. Dropping it lets go.
#[derive(Debug)]
pub(super) struct StoreLock(#[expect(dead_code, reason = "holds the lock while open")] File);

impl StoreLock {
    pub(super) fn take(root: &Path) -> Result<Self, ImageError> {
        let path = root.join(LOCK);
        let failed = || ImageError::io(format!("lock {}", path.display()));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed())?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(failed()(e.into())),
            }
        }
    }
}

/// One stage folder, locked.
#[derive(Debug)]
pub(super) struct Stage {
    path: PathBuf,
    /// Declared after `path`, so dropped last: unlocked only when the folder is gone.
    _lock: File,
}

impl Stage {
    pub(super) fn create(root: &Path) -> Result<Self, ImageError> {
        let _store = StoreLock::take(root)?;
        Self::create_locked(root)
    }

    /// For callers that hold the store's lock.
    pub(super) fn create_locked(root: &Path) -> Result<Self, ImageError> {
        let parent = root.join(STAGE);
        let failed = || ImageError::io(format!("create a folder in {}", parent.display()));
        let path = tempfile::Builder::new()
            .prefix("import-")
            .tempdir_in(&parent)
            .map_err(failed())?
            .keep();
        let lock = File::open(&path).map_err(failed())?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .map_err(failed())?;
        Ok(Self { path, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A new folder inside, mode 0700.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf, ImageError> {
        let path = self.path.join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(ImageError::io(format!("create {}", path.display())))?;
        Ok(path)
    }

    pub(super) fn remove(self) -> Result<(), ImageError> {
        remove_tree(&self.path)
    }
}

/// Creates the folder of stage folders and removes what crashed imports left in it.
pub(super) fn clean(root: &Path) -> Result<(), ImageError> {
    let parent = root.join(STAGE);
    let dead = {
        let _store = StoreLock::take(root)?;
        dead_stages(&parent).map_err(ImageError::io(format!("look into {}", parent.display())))?
    };
    // Removing may take long; our locks on them keep other cleaners off meanwhile.
    for (path, _lock) in dead {
        tracing::info!(path = %path.display(), "removing what an interrupted import left");
        remove_tree(&path)?;
    }
    Ok(())
}

fn dead_stages(parent: &Path) -> io::Result<Vec<(PathBuf, File)>> {
    let mut dead = Vec::new();
    for entry in fs::read_dir(parent)? {
        let path = entry?.path();
        let file = match File::open(&path) {
            Ok(file) => file,
            // Its import ended just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => dead.push((path, file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(dead)
}

pub(super) fn remove_tree(path: &Path) -> Result<(), ImageError> {
    doze_host::files::remove_tree(path)
        .map_err(ImageError::io(format!("remove {}", path.display())))
}
