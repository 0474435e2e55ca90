//! Raw memory for a machine that is about to map it.
use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use doze_snapshot::{DecompressOptions, Error, decompress_file, inspect_file, verify_file};

use super::{counters::Preparation, files};
use crate::{
    EngineError,
    context::{blocking, io_error},
    instance::{Instance, MEMORY, chain},
    kill::KillPoint,
    ops::{
        Cancel, check,
        standby::{ROOM, disk_error},
    },
};

/// Sees to it that the raw memory is there, complete and durable. An artefact that it was made of stays, and counts
/// again when the raw file goes.
pub async fn unpack(instance: &Instance, cancel: &Cancel) -> Result<Preparation, EngineError> {
    let begun = Instant::now();
    let dir = instance.dir();
    let packed = blocking("looking for memory", move || files::packed(&dir))
        .await?
        .map_err(io_error("looking for memory"))?;
    let how = match packed {
        None => Preparation::Raw,
        Some(artefact) => {
            decompress(instance, artefact, cancel).await?;
            instance.reach(KillPoint::RestoreDecompressed);
            Preparation::Decompress
        }
    };
    let counters = &instance.ctx.compression.counters;
    counters.prepared(how, instance.spec.hypervisor, begun.elapsed());
    Ok(how)
}

async fn decompress(
    instance: &Instance,
    artefact: PathBuf,
    cancel: &Cancel,
) -> Result<(), EngineError> {
    let inspected = artefact.clone();
    let found = blocking("reading compressed memory", move || {
        inspect_file(&inspected)
    })
    .await?
    .map_err(codec_error)?;
    let chunks = found.frames.saturating_sub(found.zero_chunks.into());
    let most = chunks.saturating_mul(found.chunk_size).min(found.raw_size);
    let _room = instance.ctx.reserve_disk(&instance.dir(), most + ROOM)?;
    let raw = instance.dir().join(MEMORY);
    let stop = doze_snapshot::Cancel::new();
    let stopped = stop.clone();
    let work = blocking("decompressing memory", move || {
        let options = DecompressOptions::default();
        decompress_file(&artefact, &raw, options, &stopped, &mut |_| {}).map(drop)
    });
    // What it wrote goes with it.
    to_the_end(work, &stop, cancel).await
}

/// Reads memory that lies compressed in `dir` to its end: damage has to be found before anything is given up for it.
pub async fn verify(dir: &Path, cancel: &Cancel) -> Result<(), EngineError> {
    let dir = dir.to_owned();
    let packed = blocking("looking for memory", move || files::packed(&dir))
        .await?
        .map_err(io_error("looking for memory"))?;
    let Some(artefact) = packed else {
        return Ok(());
    };
    let stop = doze_snapshot::Cancel::new();
    let stopped = stop.clone();
    let work = blocking("verifying compressed memory", move || {
        let options = DecompressOptions::default();
        verify_file(&artefact, options, &stopped, &mut |_| {}).map(drop)
    });
    to_the_end(work, &stop, cancel).await
}

/// Stops the work through `stop` when the operation is cancelled, and waits for it all the same.
async fn to_the_end(
    work: impl Future<Output = Result<Result<(), Error>, EngineError>>,
    stop: &doze_snapshot::Cancel,
    cancel: &Cancel,
) -> Result<(), EngineError> {
    tokio::pin!(work);
    let done = tokio::select! {
        done = &mut work => done,
        () = cancel.cancelled() => {
            stop.cancel();
            work.await
        }
    };
    match done? {
        Ok(()) => Ok(()),
        Err(Error::Cancelled) => check(cancel),
        Err(error) => Err(codec_error(error)),
    }
}

/// What is damaged is refused and kept; what the host lacks says so.
pub fn codec_error(error: Error) -> EngineError {
    match error {
        Error::Format { .. } | Error::Chunk { .. } | Error::NotAFile { .. } => {
            EngineError::Snapshot {
                reason: chain(&error),
            }
        }
        Error::Io { step, path, source } => {
            disk_error(&format!("cannot {step} {}", path.display()), &source)
        }
        other => EngineError::Internal {
            context: "compressed memory".into(),
            reason: chain(&other),
        },
    }
}
