//! A file that gets its name only when it is complete and on the disk.
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use doze_host::{background, files};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{
    cancel::Cancel,
    closing::close_elsewhere,
    error::Error,
    options::{Phase, Progress},
    pool::Team,
};

/// Given to the disk at once: an idle disk is through with it in well under 50 ms.
const SYNC_STEP: u64 = 4 << 20;

/// How far a stage file is filled, for [`Stage::write_behind`].
#[derive(Debug)]
pub struct Filled {
    ranges: mpsc::Sender<Range<u64>>,
    end: u64,
    told: u64,
}

impl Filled {
    /// Everything before `end` is complete; never less than before.
    pub fn up_to(&mut self, end: u64) {
        self.end = end;
        if self.end - self.told >= SYNC_STEP {
            // Nobody listens after an error; whoever joins the thread hears of it.
            let _heard_at_the_end = self.ranges.send(self.told..self.end);
            self.told = self.end;
        }
    }
}

/// Removed when dropped, unless [`Stage::commit`] was reached.
#[derive(Debug)]
pub struct Stage {
    pub file: File,
    pub path: PathBuf,
    target: PathBuf,
    folder: PathBuf,
    renamed: bool,
    cancel: Cancel,
    /// Whoever closes an unfinished file for us waits for its end. Dropped after `file`, as it stands after it.
    closer: Option<mpsc::Sender<()>>,
}

impl Stage {
    /// Beside `target`, which must not exist. Mode 0600.
    pub fn create(target: &Path, cancel: &Cancel) -> Result<Self, Error> {
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
            cancel: cancel.clone(),
            closer: None,
        })
    }

    /// Runs `work`, while a thread of its own lets the disk write what [`Filled`] is told is complete, so that
    /// [`Self::sync`] finds little to wait for. `work` itself never waits for the disk.
    pub fn write_behind<T>(
        &self,
        team: Team<'_>,
        work: impl FnOnce(&mut Filled) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (ranges, complete) = mpsc::channel();
        let enough = AtomicBool::new(false);
        let over = || enough.load(Ordering::Relaxed) || team.cancel.is_cancelled();
        thread::scope(|scope| {
            let writer = thread::Builder::new()
                .name("snapshot-codec".to_owned())
                .spawn_scoped(scope, || {
                    let _low = team.cancel.lower_current_thread(team.background);
                    self.write_out(complete, over)
                })
                .map_err(|source| Error::Threads {
                    step: "start a thread that writes out",
                    source,
                })?;
            let mut filled = Filled {
                ranges,
                end: 0,
                told: 0,
            };
            let outcome = work(&mut filled);
            // What is left is for the sync, which can say how far it is.
            enough.store(true, Ordering::Relaxed);
            drop(filled);
            let written = writer.join().map_err(|_| Error::Worker)?;
            outcome.and_then(|result| written.map(|()| result))
        })
    }

    /// With two ranges in flight the disk is never idle, and a cancel never has more to wait for.
    fn write_out(
        &self,
        complete: mpsc::Receiver<Range<u64>>,
        over: impl Fn() -> bool,
    ) -> Result<(), Error> {
        let failed = || Error::io("write out", &self.path);
        let mut last: Option<Range<u64>> = None;
        for range in complete {
            if over() {
                break;
            }
            let length = range.end - range.start;
            background::start_writeback(&self.file, range.start, length).map_err(failed())?;
            if let Some(last) = last.replace(range) {
                let length = last.end - last.start;
                background::finish_writeback(&self.file, last.start, length).map_err(failed())?;
            }
        }
        Ok(())
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
    pub fn commit(mut self) -> Result<(), Error> {
        self.cancel.check()?;
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
        // After an error nobody is in a hurry, and what comes next may need the space.
        if !self.cancel.is_cancelled() {
            return;
        }
        match close_elsewhere(&self.file) {
            Ok(closer) => self.closer = Some(closer),
            Err(error) => {
                tracing::debug!(%error, "an unfinished file is closed by whoever made it")
            }
        }
    }
}
