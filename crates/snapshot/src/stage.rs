//! A file that gets its name only when it is complete and on the disk.
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use doze_host::{background, files};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{
    cancel::Cancel,
    error::Error,
    options::{Phase, Progress},
    pool::Team,
};

/// Given to the disk at once: an idle disk is through with it in well under 50 ms.
const SYNC_STEP: u64 = 4 << 20;

/// Removed when dropped, unless [`Stage::commit`] was reached.
#[derive(Debug)]
pub struct Stage {
    pub file: File,
    pub path: PathBuf,
    target: PathBuf,
    folder: PathBuf,
    renamed: bool,
}

impl Stage {
    /// Beside `target`, which must not exist. Mode 0600.
    pub fn create(target: &Path) -> Result<Self, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let create = Error::io("create", target);
        let Some(name) = target.file_name() else {
            return Err(create(io::ErrorKind::InvalidInput.into()));
        };
        match fs::symlink_metadata(target) {
            Ok(_) => {
                return Err(Error::Exists {
                    path: target.to_owned(),
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(create(error)),
        }
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        // As `host::files` names its stage files, so that one clean-up knows both.
        let mut stage = OsString::from(".");
        stage.push(name);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        stage.push(format!(".{}.{number}.stage", std::process::id()));
        let path = folder.join(stage);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        Ok(Self {
            file,
            path,
            target: target.to_owned(),
            folder,
            renamed: false,
        })
    }

    /// Lets the disk begin with what was written, so that [`Self::sync`] finds little to wait for.
    pub fn start_writeback(&self, offset: u64, length: u64) -> Result<(), Error> {
        background::start_writeback(&self.file, offset, length)
            .map_err(Error::io("write out", &self.path))
    }

    /// All content durable. In steps, because one fsync of a whole memory cannot be cancelled.
    pub fn sync(&self, team: Team<'_>, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
        let cancel = team.cancel;
        let _low = cancel.lower_current_thread(team.background);
        let total = self
            .file
            .metadata()
            .map_err(Error::io("inspect", &self.path))?
            .len();
        let mut done = 0;
        while done < total {
            cancel.check()?;
            let step = SYNC_STEP.min(total - done);
            background::finish_writeback(&self.file, done, step)
                .map_err(Error::io("write out", &self.path))?;
            done += step;
            progress(Progress {
                phase: Phase::Sync,
                done,
                total,
            });
        }
        cancel.check()?;
        self.file.sync_all().map_err(Error::io("fsync", &self.path))
    }

    /// Gives the file its name. The last moment for a cancel is right before; after it the call succeeds.
    pub fn commit(mut self, cancel: &Cancel) -> Result<(), Error> {
        cancel.check()?;
        renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE).map_err(
            |error| match error {
                rustix::io::Errno::EXIST => Error::Exists {
                    path: self.target.clone(),
                },
                error => Error::io("rename the stage file to", &self.target)(error.into()),
            },
        )?;
        self.path.clone_from(&self.target);
        // Complete but perhaps not durable is not what was promised: then it goes again.
        files::fsync_dir(&self.folder).map_err(Error::io("fsync the folder of", &self.target))?;
        self.renamed = true;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.renamed {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove an unfinished file");
        }
    }
}
