//! One compression, from its plan to its end. It only ever adds an artefact; what becomes of that its owner decides.
use std::{path::PathBuf, sync::Arc, time::Duration};

use doze_snapshot::{Codec, CompressOptions, Error, Inspection, compress_file};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{
    counters::{Labels, Ticket},
    files,
    plan::Running,
};
use crate::{
    EngineError,
    context::{Context, blocking, io_error},
    instance::{MEMORY, chain},
    now,
    ops::standby::{ROOM, disk_error},
};

/// The wall clock may be set while a job waits for it.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What to compress, and from when on.
pub struct Order {
    /// The folder with the raw memory.
    pub dir: PathBuf,
    pub codec: Codec,
    /// Microseconds since the Unix epoch.
    pub due_us: i64,
    pub labels: Labels,
    /// Whose it is, for the log.
    pub owner: String,
}

pub struct Ended {
    pub outcome: Outcome,
    /// Counts until its owner says how it ended; `None`: the job itself failed, and it is counted.
    pub ticket: Option<Ticket>,
}

#[derive(Debug)]
pub enum Outcome {
    /// Nothing was begun.
    Skipped,
    /// It was halted; nothing is left of it.
    Canceled,
    /// The artefact has its name, beside the raw file.
    Made(Inspection),
    /// The artefact is all there is: a server died before it could say so.
    Found(Inspection),
    /// The raw file is as it was.
    Failed(String),
}

/// The way to stop a job and to wait for its end; clones are of the same job.
#[derive(Clone)]
pub struct Control {
    halt: CancellationToken,
    cancel: doze_snapshot::Cancel,
    done: CancellationToken,
    running: Running,
}

impl Control {
    pub fn halt(&self) {
        self.halt.cancel();
        self.cancel.cancel();
    }

    pub fn is_halted(&self) -> bool {
        self.halt.is_cancelled()
    }

    pub fn running(&self) -> &Running {
        &self.running
    }
}

/// A job that waits or works.
pub struct Job {
    control: Control,
    task: JoinHandle<Ended>,
}

impl Job {
    pub fn start(ctx: &Arc<Context>, order: Order) -> Job {
        let control = Control {
            halt: CancellationToken::new(),
            cancel: doze_snapshot::Cancel::new(),
            done: CancellationToken::new(),
            running: Running::default(),
        };
        let span = tracing::info_span!(
            parent: None, "compression", owner = %order.owner, codec = %order.codec,
            source = order.labels.source.as_str()
        );
        // The operation that planned it is over long before it is.
        span.follows_from(tracing::Span::current());
        let ticket = ctx.compression.counters.planned(order.labels);
        let done = control.done.clone().drop_guard();
        let work = work(ctx.clone(), order, control.clone(), ticket);
        let task = async move {
            let _done = done;
            work.await
        };
        Job {
            control,
            task: tokio::spawn(task.instrument(span)),
        }
    }

    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Whether [`Self::end`] would answer at once.
    pub fn is_done(&self) -> bool {
        self.control.done.is_cancelled()
    }

    /// Resolves when it is.
    pub async fn done(&self) {
        self.control.done.cancelled().await;
    }

    /// Waits until nothing of it is at work any more.
    pub async fn end(self) -> Ended {
        match self.task.await {
            Ok(ended) => ended,
            Err(error) => Ended {
                outcome: Outcome::Failed(format!("the job ended unexpectedly: {error}")),
                ticket: None,
            },
        }
    }
}

async fn work(ctx: Arc<Context>, order: Order, control: Control, mut ticket: Ticket) -> Ended {
    let outcome = match compress(&ctx, &order, &control, &mut ticket).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Failed(error.to_string()),
    };
    match &outcome {
        Outcome::Made(artefact) | Outcome::Found(artefact) => tracing::info!(
            raw = artefact.raw_size,
            compressed = artefact.compressed_size,
            "memory compressed"
        ),
        Outcome::Failed(reason) => tracing::warn!(reason, "memory not compressed"),
        Outcome::Skipped | Outcome::Canceled => tracing::debug!(?outcome, "compression halted"),
    }
    Ended {
        outcome,
        ticket: Some(ticket),
    }
}

async fn compress(
    ctx: &Arc<Context>,
    order: &Order,
    control: &Control,
    ticket: &mut Ticket,
) -> Result<Outcome, EngineError> {
    let dir = order.dir.clone();
    let found = blocking("looking at a memory", move || leftovers(&dir)).await??;
    if let Some(artefact) = found {
        return Ok(Outcome::Found(artefact));
    }
    tokio::select! {
        biased;
        () = control.halt.cancelled() => return Ok(Outcome::Skipped),
        () = due(order.due_us) => {}
    }
    let turns = ctx.compression.turns.clone();
    let _turn = tokio::select! {
        biased;
        () = control.halt.cancelled() => return Ok(Outcome::Skipped),
        turn = turns.acquire_owned() => turn.map_err(|_| EngineError::ShuttingDown)?,
    };
    let (raw, target) = (
        order.dir.join(MEMORY),
        order
            .dir
            .join(files::artefact_name(order.codec.algorithm())),
    );
    let measured = raw.clone();
    let most = blocking("measuring a memory", move || {
        doze_host::files::allocated_bytes(&measured)
    })
    .await?
    .map_err(io_error("measuring a memory"))?;
    // A disk that it fills would kill guests that run.
    let _room = ctx.reserve_background_disk(&order.dir, most + ROOM)?;
    if control.is_halted() {
        return Ok(Outcome::Skipped);
    }
    ticket.begun();
    control.running.begin();
    let options = CompressOptions {
        background: true,
        ..CompressOptions::new(order.codec)
    };
    let (cancel, made) = (control.cancel.clone(), target.clone());
    let done = blocking("compressing memory", move || {
        compress_file(&raw, &made, options, &cancel, &mut |_| {})
    })
    .await?;
    match done {
        Ok(report) => Ok(Outcome::Made(report.artefact)),
        Err(Error::Cancelled) => Ok(Outcome::Canceled),
        Err(Error::Io { step, path, source }) => {
            Err(disk_error(&format!("{step} {}", path.display()), &source))
        }
        Err(error) => Ok(Outcome::Failed(chain(&error))),
    }
}

/// Clears what a server that died left beside the raw memory, or finds that only the last word was missing.
fn leftovers(dir: &std::path::Path) -> Result<Option<Inspection>, EngineError> {
    let packed = files::packed(dir).map_err(io_error("looking for memory"))?;
    match packed {
        Some(artefact) => {
            let found = doze_snapshot::inspect_file(&artefact);
            Ok(Some(found.map_err(super::unpack::codec_error)?))
        }
        None => {
            files::drop_artefacts(dir).map_err(io_error("removing half-made artefacts"))?;
            Ok(None)
        }
    }
}

async fn due(due_us: i64) {
    loop {
        let left = due_us.saturating_sub(now().wall_us);
        let Some(left) = u64::try_from(left).ok().filter(|left| *left > 0) else {
            return;
        };
        tokio::time::sleep(Duration::from_micros(left).min(LOOK_AGAIN)).await;
    }
}
