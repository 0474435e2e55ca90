//! Waiting for files to change, appear or go, by inotify.
#![allow(unsafe_code, reason = "registering a descriptor with the reactor")]
use std::{
    ffi::{CStr, OsString},
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::{fs::inotify, io::Errno};
use tokio::io::unix::AsyncFd;

/// A watch on the direct content of one folder. What changes after [`FolderWatch::new`] is not missed.
#[derive(Debug)]
pub struct FolderWatch {
    events: AsyncFd<OwnedFd>,
}

impl FolderWatch {
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Those of `inotify_init1(2)` (EMFILE: fs.inotify.max_user_instances) and `inotify_add_watch(2)`.
    pub fn new(folder: &Path) -> io::Result<FolderWatch> {
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let kinds = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::DELETE_SELF;
        inotify::add_watch(&fd, folder, kinds)?;
        // SAFETY: the descriptor is owned by the AsyncFd and neither replaced nor closed while in it.
        let events = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        Ok(FolderWatch { events })
    }

    /// Resolves when something was written, created or removed; `false` when the folder itself is gone
    /// (the kernel says so only once nobody holds a file of it open). Cancel-safe.
    ///
    /// # Errors
    /// Those of `read(2)` on the inotify descriptor.
    pub async fn changed(&self) -> io::Result<bool> {
        self.changed_where(|_| true).await
    }

    /// The same for changes of the files that `ours` says yes to.
    async fn changed_where(&self, ours: impl Fn(&CStr) -> bool) -> io::Result<bool> {
        loop {
            let mut ready = self.events.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
            let mut found = false;
            loop {
                match reader.next() {
                    Ok(event) if event.events().contains(inotify::ReadFlags::IGNORED) => {
                        return Ok(false);
                    }
                    // An overflow names no file; it may have been ours.
                    Ok(event) => found |= event.file_name().is_none_or(&ours),
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if found {
                return Ok(true);
            }
        }
    }
}

/// A watch on one file, which need not be there yet, through its folder. What changes after
/// [`FileWatch::new`] is not missed; changes of its neighbours wake nobody.
#[derive(Debug)]
pub struct FileWatch {
    folder: FolderWatch,
    name: OsString,
}

impl FileWatch {
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Those of [`FolderWatch::new`]; `InvalidInput` for a path without a name.
    pub fn new(file: &Path) -> io::Result<FileWatch> {
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let folder = FolderWatch::new(folder)?;
        let name = name.to_owned();
        Ok(FileWatch { folder, name })
    }

    /// Resolves when the file was written, created or removed; `false` when its folder is gone. Cancel-safe.
    ///
    /// # Errors
    /// Those of [`FolderWatch::changed`].
    pub async fn changed(&self) -> io::Result<bool> {
        let name = self.name.as_bytes();
        self.folder
            .changed_where(|changed| changed.to_bytes() == name)
            .await
    }
}
