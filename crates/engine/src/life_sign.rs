//! Proof of life: until when a machine is known to have run that nobody saw end.
//!
//! A server that is there notices the end of a VMM at once. One that was away (killed, restarted, the host
//! lost power) finds it gone and has to say until when the guest ran, because people bill from it. What
//! proves that a guest ran at a moment:
//!
//! - the server's own heartbeat: while it beats, the end of a VMM would have been noticed;
//! - the time of a file that only the guest's running changes: its memory (the kernel stamps a shared mapping when
//!   a page becomes dirty, at least once per writeback), its overlay disk, its console and its output.
//!
//! The latest of them counts. Time after it is booked as if the guest had been off, and told apart as
//! estimated. After a power cut the files' times may be older than the truth: in favour of who pays.
use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use doze_lifecycle::Stamp;
use doze_snapshot::manifest;
use tokio_util::task::AbortOnDropHandle;

use crate::{
    EngineError,
    context::blocking,
    instance::{APP_LOG, Instance, MEMORY, OVERLAY, SNAPSHOT, VMM_LOG},
    now,
};

const HEARTBEAT: &str = "heartbeat";
/// Between two beats; what an estimate may lack of the truth at most when nothing else was written.
const EVERY: Duration = Duration::from_secs(1);

/// The server's sign of life. Ends when dropped.
pub struct Heart {
    path: PathBuf,
    _beating: AbortOnDropHandle<()>,
}

impl Heart {
    /// Must be called within a tokio runtime, after [`last_beat`] was read.
    pub fn start(data_dir: &Path) -> Arc<Heart> {
        let path = data_dir.join(HEARTBEAT);
        let file = path.clone();
        let beating = tokio::spawn(async move {
            let mut every = tokio::time::interval(EVERY);
            every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                every.tick().await;
                let file = file.clone();
                let beaten = blocking("the heartbeat", move || beat(&file)).await;
                match beaten {
                    Ok(Ok(())) => {}
                    // An estimate becomes coarser, nothing else.
                    Ok(Err(error)) => tracing::warn!(%error, "writing the heartbeat"),
                    Err(error) => tracing::warn!(%error, "writing the heartbeat"),
                }
            }
        });
        Arc::new(Heart {
            path,
            _beating: AbortOnDropHandle::new(beating),
        })
    }

    /// One beat now: the server is about to end.
    pub fn beat(&self) -> io::Result<()> {
        beat(&self.path)
    }
}

fn beat(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    file.set_modified(SystemTime::now())
}

/// When the last server was known to be there; microseconds since the Unix epoch.
pub fn last_beat(data_dir: &Path) -> Option<i64> {
    modified(&data_dir.join(HEARTBEAT))
}

/// The last moment at which the instance's guest is known to have run, on its ledger's timeline.
pub async fn last_seen(instance: &Instance) -> Result<Stamp, EngineError> {
    let (dir, last_beat) = (instance.dir(), instance.ctx.last_beat);
    let wall_us = blocking("looking for signs of life", move || {
        let files = [MEMORY, OVERLAY, VMM_LOG, APP_LOG];
        let signs = files.iter().filter_map(|name| modified(&dir.join(name)));
        signs.chain(last_beat).max()
    })
    .await?;
    let ledger = instance.record.ledger();
    Ok(match wall_us {
        Some(wall_us) => ledger.moment(wall_us, &now()),
        None => ledger.since().clone(),
    })
}

/// When the guest of a restore that said nothing began to run: just after its snapshot was consumed, which
/// changed the folder's inode (rename(2): st_ctime).
pub async fn consumed_at(instance: &Instance) -> Result<Stamp, EngineError> {
    let consumed = manifest::consumed_of(&instance.dir().join(SNAPSHOT));
    let wall_us = blocking("looking for the consumed snapshot", move || {
        let meta = fs::metadata(consumed).ok()?;
        let us = meta.ctime().checked_mul(1_000_000)?;
        us.checked_add(meta.ctime_nsec() / 1000)
    })
    .await?;
    let ledger = instance.record.ledger();
    Ok(match wall_us {
        Some(wall_us) => ledger.moment(wall_us, &now()),
        None => now(),
    })
}

/// A file that is not there proves nothing.
fn modified(path: &Path) -> Option<i64> {
    let time = fs::metadata(path).and_then(|meta| meta.modified()).ok()?;
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_micros()).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn a_heart_beats_from_its_start_and_leaves_its_last_beat() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(last_beat(dir.path()), None);
        let before = doze_host::clock::wall_us();
        let heart = Heart::start(dir.path());
        heart.beat().unwrap();
        let beaten = last_beat(dir.path()).unwrap();
        // File times are kept in coarser steps than the clock.
        assert!(beaten >= before - 100_000, "{beaten} {before}");
        drop(heart);
        assert_eq!(last_beat(dir.path()), Some(beaten));
    }
}
