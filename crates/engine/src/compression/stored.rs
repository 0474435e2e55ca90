//! The memory of stored snapshots: each job has a task that decides what becomes of it, and whoever reads a
//! snapshot's folder keeps jobs out of it.
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use doze_snapshot::Inspection;
use tokio::sync::OwnedRwLockReadGuard;
use tokio_util::sync::CancellationToken;

use super::{
    counters::{JobResult, Labels, Source},
    files,
    job::{Control, Ended, Job, Order, Outcome},
    plan::{MemoryCompression, Progress},
};
use crate::{
    EngineError, Snapshot,
    context::{Context, blocking, io_error, lock},
    copies,
    instance::store_error,
    kill::KillPoint,
    snapshots::catalog::Entry,
};

#[derive(Default)]
pub struct StoredJobs {
    slots: Mutex<HashMap<String, Slot>>,
    /// Nothing begins any more.
    closed: AtomicBool,
}

/// Of one snapshot.
#[derive(Default)]
struct Slot {
    /// Those who are in its folder or want to be.
    readers: usize,
    job: Option<Working>,
}

#[derive(Clone)]
struct Working {
    control: Control,
    /// Who halted it.
    halted_by: Arc<OnceLock<&'static str>>,
    /// When its outcome is decided and nothing of it is left.
    over: CancellationToken,
}

/// Somebody reads a snapshot's folder: no job works in it, and nobody removes it.
pub struct Access {
    _gate: OwnedRwLockReadGuard<()>,
    _no_job: NoJob,
}

/// While this is there no job works at the snapshot. Then its plan, if it still has one, is begun again.
pub struct NoJob {
    ctx: Arc<Context>,
    id: String,
}

impl Drop for NoJob {
    fn drop(&mut self) {
        let jobs = &self.ctx.compression.stored;
        if let Some(slot) = lock(&jobs.slots).get_mut(&self.id) {
            slot.readers = slot.readers.saturating_sub(1);
        }
        plan(&self.ctx, &self.id);
    }
}

impl StoredJobs {
    /// Halts all of them, for good: the server ends.
    pub async fn end(&self) {
        let working: Vec<_> = {
            let slots = lock(&self.slots);
            // Under the lock under which jobs begin.
            self.closed.store(true, Ordering::Release);
            slots.values().filter_map(|slot| slot.job.clone()).collect()
        };
        for working in &working {
            working.control.halt();
        }
        for working in working {
            working.over.cancelled().await;
        }
    }
}

/// Lets `by` read what is stored, once nobody compresses it any more.
pub async fn access(ctx: &Arc<Context>, entry: &Entry, by: &'static str) -> Access {
    let no_job = halt(ctx, &entry.snapshot.id, by).await;
    Access {
        _gate: entry.gate.clone().read_owned().await,
        _no_job: no_job,
    }
}

/// Halts the job of a snapshot and keeps others from beginning.
pub async fn halt(ctx: &Arc<Context>, id: &str, by: &'static str) -> NoJob {
    let working = {
        let mut slots = lock(&ctx.compression.stored.slots);
        let slot = slots.entry(id.to_owned()).or_default();
        slot.readers += 1;
        slot.job.clone()
    };
    let no_job = NoJob {
        ctx: ctx.clone(),
        id: id.to_owned(),
    };
    if let Some(working) = working {
        // The first of several.
        let _ = working.halted_by.set(by);
        working.control.halt();
        working.over.cancelled().await;
    }
    no_job
}

/// Begins what is planned of a snapshot, unless somebody is in its folder: then whoever leaves last does.
pub fn plan(ctx: &Arc<Context>, id: &str) {
    let jobs = &ctx.compression.stored;
    let mut slots = lock(&jobs.slots);
    let found = ctx.snapshots.find(id).ok();
    let planned = found.and_then(|entry| {
        let compression = entry.snapshot.compression.clone()?;
        let here = entry.snapshot.id == id && compression.is_planned();
        here.then(|| (entry.snapshot.clone(), compression))
    });
    let slot = slots.entry(id.to_owned()).or_default();
    if slot.readers > 0 || slot.job.is_some() {
        return;
    }
    let planned = planned.filter(|_| !jobs.closed.load(Ordering::Acquire));
    let (Some((snapshot, plan)), Ok(runtime)) = (planned, tokio::runtime::Handle::try_current())
    else {
        slots.remove(id);
        return;
    };
    let _inside = runtime.enter();
    let job = Job::start(ctx, order(ctx, &snapshot, &plan));
    let working = Working {
        control: job.control().clone(),
        halted_by: Arc::default(),
        over: CancellationToken::new(),
    };
    slot.job = Some(working.clone());
    runtime.spawn(finish(ctx.clone(), id.to_owned(), job, working));
}

fn order(ctx: &Context, snapshot: &Snapshot, plan: &MemoryCompression) -> Order {
    Order {
        dir: ctx.snapshot_dir(&snapshot.id),
        codec: plan.codec,
        due_us: plan.due_us,
        labels: Labels {
            algorithm: plan.codec.algorithm(),
            level: plan.codec.level(),
            hypervisor: snapshot.hypervisor(),
            source: Source::Snapshot,
        },
        owner: format!("snapshot {}", snapshot.id),
    }
}

async fn finish(ctx: Arc<Context>, id: String, job: Job, working: Working) {
    let Working {
        control,
        halted_by,
        over,
    } = working;
    // Also when this fails: those who wait for the files must not wait for ever.
    let _over = over.drop_guard();
    let Ended { outcome, ticket } = job.end().await;
    let begun = ticket.as_ref().is_some_and(|ticket| ticket.has_begun());
    let dir = ctx.snapshot_dir(&id);
    let mut result = match begun {
        true => JobResult::Canceled,
        false => JobResult::Skipped,
    };
    let mut sizes = None;
    match outcome {
        Outcome::Skipped | Outcome::Canceled => {}
        // It was faster, but somebody waits for the files: the raw one costs nothing to read.
        Outcome::Made(_) if control.is_halted() => {
            let dropped = blocking("", move || files::drop_artefacts(&dir)).await;
            if let Err(error) = dropped.and_then(|d| d.map_err(io_error("removing it"))) {
                tracing::warn!(snapshot = %id, %error, "an artefact that nobody wants is left");
            }
        }
        Outcome::Made(artefact) => match replace(&ctx, &id, dir, &artefact).await {
            Ok(()) => sizes = Some((artefact.raw_size, artefact.compressed_size)),
            Err(error) => {
                result = JobResult::Failed;
                record(&ctx, &id, failed(error.to_string()), None).await;
            }
        },
        Outcome::Found(artefact) => {
            record(&ctx, &id, compressed(&artefact), size(dir).await).await;
            sizes = Some((artefact.raw_size, artefact.compressed_size));
        }
        Outcome::Failed(reason) => {
            result = JobResult::Failed;
            record(&ctx, &id, failed(reason), None).await;
        }
    }
    {
        let mut slots = lock(&ctx.compression.stored.slots);
        if let Some(slot) = slots.get_mut(&id) {
            slot.job = None;
            if slot.readers == 0 {
                slots.remove(&id);
            }
        }
    }
    match (ticket, sizes) {
        (Some(ticket), Some((raw, compressed))) => ticket.succeeded(raw, compressed),
        (Some(ticket), None) => ticket.ended(result, halted_by.get().copied()),
        (None, _) => {}
    }
    // Whoever halted it may have gone before it was over.
    plan(&ctx, &id);
}

/// The artefact takes the raw file's place.
async fn replace(
    ctx: &Arc<Context>,
    id: &str,
    dir: PathBuf,
    artefact: &Inspection,
) -> Result<(), EngineError> {
    ctx.kill.reach(KillPoint::CompressionMade);
    let folder = dir.clone();
    blocking("removing raw memory", move || files::drop_raw(&folder))
        .await?
        .map_err(io_error("removing raw memory"))?;
    ctx.kill.reach(KillPoint::CompressionRawRemoved);
    record(ctx, id, compressed(artefact), size(dir).await).await;
    ctx.kill.reach(KillPoint::CompressionRecorded);
    Ok(())
}

fn compressed(artefact: &Inspection) -> Progress {
    Progress::Compressed {
        raw: artefact.raw_size,
        compressed: artefact.compressed_size,
    }
}

fn failed(reason: String) -> Progress {
    Progress::Failed { reason }
}

async fn size(dir: PathBuf) -> Option<u64> {
    let measured = blocking("measuring a snapshot", move || copies::size(&dir)).await;
    measured.ok()?.ok()
}

/// The files say what is true; a row that could not be told finds out at the next start.
async fn record(ctx: &Arc<Context>, id: &str, progress: Progress, size: Option<u64>) {
    let Ok(entry) = ctx.snapshots.find(id) else {
        return;
    };
    let mut snapshot = (*entry.snapshot).clone();
    if let Some(compression) = &mut snapshot.compression {
        compression.progress = progress;
    }
    if let Some(size) = size {
        snapshot.size_bytes = size;
    }
    let written = ctx.store.update_snapshot(snapshot.clone()).await;
    if let Err(error) = written.map_err(store_error) {
        tracing::warn!(snapshot = id, %error, "recording how a snapshot's memory is kept");
    }
    ctx.snapshots.replace(Arc::new(snapshot));
}
