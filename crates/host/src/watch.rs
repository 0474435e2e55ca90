//! Waiting for a file to change, appear or go, by inotify.
#![allow(unsafe_code, reason = "registering a descriptor with the reactor")]
use std::{
    ffi::OsString,
    io,
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::{fs::inotify, io::Errno};
use tokio::io::unix::AsyncFd;

/// A watch on one file, which need not be there yet, through its folder. What changes after
/// [`FileWatch::new`] is not missed.
#[derive(Debug)]
pub struct FileWatch {
    events: AsyncFd<OwnedFd>,
    name: OsString,
}

impl FileWatch {
    /// Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// Those of `inotify_init1(2)` (EMFILE: fs.inotify.max_user_instances) and `inotify_add_watch(2)`;
    /// `InvalidInput` for a path without a name.
    pub fn new(file: &Path) -> io::Result<FileWatch> {
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let kinds = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::DELETE_SELF;
        inotify::add_watch(&fd, folder, kinds)?;
        // SAFETY: the descriptor is owned by the AsyncFd and neither replaced nor closed while in it.
        let events = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        let name = name.to_owned();
        Ok(FileWatch { events, name })
    }

    /// Resolves when the file was written, created or removed; `false` when its folder is gone (the kernel
    /// says so only once nobody holds a file of it open). Its neighbours' changes are passed over.
    /// Cancel-safe.
    ///
    /// # Errors
    /// Those of `read(2)` on the inotify descriptor.
    pub async fn changed(&self) -> io::Result<bool> {
        loop {
            let mut ready = self.events.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
            let mut ours = false;
            loop {
                match reader.next() {
                    Ok(event) if event.events().contains(inotify::ReadFlags::IGNORED) => {
                        return Ok(false);
                    }
                    // An overflow names no file; it may have been ours.
                    Ok(event) => {
                        ours |= event
                            .file_name()
                            .is_none_or(|name| name.to_bytes() == self.name.as_bytes());
                    }
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if ours {
                return Ok(true);
            }
        }
    }
}
