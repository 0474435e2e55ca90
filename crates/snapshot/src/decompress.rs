//! An artefact back to a raw file, holes as holes.
use std::{
    fs::File,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::{
    artefact::{self, Artefact},
    cancel::Cancel,
    error::{Error, Fault},
    options::{DecompressOptions, Phase, Progress, Report, Timings},
    pool::{self, Team},
    sparse,
    stage::{Filled, Stage},
};

/// Decompresses the artefact `source` into `target`, which must not exist.
///
/// On success the raw file is complete, read back, checked and durable under its name; pages of zeros are
/// holes. Otherwise there is nothing, and `source` was only read. Blocks; returns only when none of its
/// threads reads or writes any more; the space of an unfinished file is given back soon after a cancel
/// ([`wait_for_space`](crate::wait_for_space)). `progress` is called on this thread.
///
/// # Errors
/// [`Error::Chunk`] and [`Error::Format`] for a damaged artefact; [`Error::Cancelled`] soon after
/// [`Cancel::cancel`], unless the file got its name just before; [`Error::Exists`], [`Error::NotAFile`],
/// [`Error::Io`] (for example `StorageFull`).
pub fn decompress_file(
    source: &Path,
    target: &Path,
    options: DecompressOptions,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Error> {
    cancel.check()?;
    let artefact = Artefact::open(source)?;
    let stage = Stage::create(target, cancel)?;
    let team = Team {
        threads: options.threads,
        background: options.background,
        cancel,
    };
    let started = Instant::now();
    stage.write_behind(team, |filled| {
        unpack(&artefact, &stage, filled, team, progress)
    })?;
    let convert = started.elapsed();
    stage.sync(team, progress)?;
    let sync = started.elapsed() - convert;
    read_back(&artefact, &stage, target, team, progress)?;
    let report = Report {
        artefact: artefact.inspection(),
        timings: Timings {
            convert,
            sync,
            verify: started.elapsed() - convert - sync,
        },
    };
    stage.commit()?;
    Ok(report)
}

/// Workers decode, the calling thread writes, in order. The kernel lets nobody else write to a file that somebody
/// writes to, so workers that wrote would wait for each other instead of decoding.
fn unpack(
    artefact: &Artefact<File>,
    stage: &Stage,
    filled: &mut Filled,
    team: Team<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let table = artefact.table();
    let chunk = table.chunk_size.bytes();
    let total = table.raw_size;
    stage
        .file
        .set_len(total)
        .map_err(Error::io("set the size of", &stage.path))?;
    // Chunks that were written, for the workers to use again.
    let spare = Mutex::new(Vec::<Vec<u8>>::new());
    let spare = || spare.lock().unwrap_or_else(PoisonError::into_inner);
    pool::run(
        table.entries.len() as u64,
        team,
        || artefact.reader(),
        |reader, index| reader.take(index, || spare().pop().unwrap_or_default()),
        |index, raw| {
            if let Some(raw) = raw {
                sparse::write(&stage.file, index * chunk, &raw)
                    .map_err(Error::io("write", &stage.path))?;
                spare().push(raw);
            }
            let done = total.min((index + 1) * chunk);
            filled.up_to(done);
            progress(Progress {
                phase: Phase::Convert,
                done,
                total,
            });
            Ok(())
        },
    )
}

/// Compares what is in the stage file with the seek table's checksums.
fn read_back(
    artefact: &Artefact<File>,
    stage: &Stage,
    target: &Path,
    team: Team<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    let table = artefact.table();
    let chunk = table.chunk_size.bytes();
    let total = table.raw_size;
    let zeros = crate::format::checksum(table.codec.algorithm(), &vec![0; table.chunk_size.len()]);
    pool::run(
        table.entries.len() as u64,
        team,
        || Ok(vec![0; table.chunk_size.len()]),
        |raw, index| {
            let raw = &mut raw[..table.chunk_length(index)];
            // The index is one of the table's own.
            let entry = &table.entries[index as usize];
            let data = sparse::read(&stage.file, index * chunk, raw)
                .map_err(Error::io("read back", &stage.path))?;
            let same = if !data && raw.len() == table.chunk_size.len() {
                entry.checksum == zeros
            } else {
                if !data {
                    raw.fill(0);
                }
                artefact::matches(table, entry, raw)
            };
            if same {
                return Ok(());
            }
            Err(Error::Chunk {
                path: target.to_owned(),
                chunk: index,
                offset: index * chunk,
                fault: Fault::ReadBack,
            })
        },
        |index, ()| {
            progress(Progress {
                phase: Phase::Verify,
                done: total.min((index + 1) * chunk),
                total,
            });
            Ok(())
        },
    )
}
