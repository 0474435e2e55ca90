//! Waiting for a folder's files to change, by inotify.
#![allow(unsafe_code, reason = "registering a descriptor with the reactor")]
use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path};

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
    /// Those of `inotify_init1(2)` and `inotify_add_watch(2)`.
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
        let mut ready = self.events.readable().await?;
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
        loop {
            match reader.next() {
                Ok(event) if event.events().contains(inotify::ReadFlags::IGNORED) => {
                    return Ok(false);
                }
                Ok(_) => {}
                Err(Errno::AGAIN) => {
                    ready.clear_ready();
                    return Ok(true);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
