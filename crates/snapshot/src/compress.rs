//! A raw file to an artefact.
use std::{
    fs::{File, Metadata},
    io::{self, Write as _},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::{
    artefact::Artefact,
    cancel::Cancel,
    codec::{Encoder, Stopped},
    error::Error,
    format::{self, TableWriter},
    options::{CompressOptions, Phase, Progress, Report, Timings},
    pool::{self, Team},
    sparse,
    stage::{Filled, Stage},
};

/// Compresses the regular file `source` into `target`, which must not exist.
///
/// On success the artefact is complete, read back, checked and durable under its name, and `source` was
/// the same at the end as at the beginning. Otherwise there is nothing, and `source` was only read.
/// Blocks; returns only when none of its threads reads or writes any more; the space of an unfinished file is
/// given back soon after a cancel ([`wait_for_space`](crate::wait_for_space)). `progress` is called on this thread.
///
/// # Errors
/// [`Error::Cancelled`] soon after [`Cancel::cancel`], unless the artefact got its name just before: then
/// the call succeeds. [`Error::Exists`], [`Error::NotAFile`], [`Error::TooLarge`],
/// [`Error::SourceChanged`], and [`Error::Io`] (for example `StorageFull`).
pub fn compress_file(
    source: &Path,
    target: &Path,
    options: CompressOptions,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Error> {
    cancel.check()?;
    let source = Source::open(source, options)?;
    let stage = Stage::create(target, cancel)?;
    let team = Team {
        threads: options.threads,
        background: options.background,
        cancel,
    };
    let started = Instant::now();
    stage.write_behind(team, |filled| {
        source.pack(&stage, filled, options, team, progress)
    })?;
    source.check_unchanged()?;
    let convert = started.elapsed();
    stage.sync(team, progress)?;
    let sync = started.elapsed() - convert;
    let artefact = Artefact::new(&stage.file, target)?;
    artefact.verify(team, progress)?;
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

struct Source<'a> {
    path: &'a Path,
    file: File,
    meta: Metadata,
}

/// A chunk on its way to the writer.
enum Packed {
    /// A whole chunk of zeros: the frame made beforehand.
    Zeros,
    Frame {
        bytes: Vec<u8>,
        checksum: u32,
        zero: bool,
    },
}

impl<'a> Source<'a> {
    fn open(path: &'a Path, options: CompressOptions) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let meta = file.metadata().map_err(Error::io("inspect", path))?;
        if !meta.is_file() {
            return Err(Error::NotAFile {
                path: path.to_owned(),
            });
        }
        if format::chunk_count(meta.len(), options.chunk_size) > format::MAX_FRAMES {
            return Err(Error::TooLarge {
                path: path.to_owned(),
                size: meta.len(),
                chunk_size: options.chunk_size.bytes(),
                max: format::MAX_FRAMES * options.chunk_size.bytes(),
            });
        }
        Ok(Self { path, file, meta })
    }

    /// All frames and the end, into the stage file.
    fn pack(
        &self,
        stage: &Stage,
        filled: &mut Filled,
        options: CompressOptions,
        team: Team<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let total = self.meta.len();
        let chunk_size = options.chunk_size;
        let encoder = || {
            Encoder::new(options.codec, chunk_size)
                .map_err(|reason| Error::Encoder { chunk: 0, reason })
        };
        let mut zeros = Vec::new();
        let zeros_checksum = encoder()?
            .encode(&vec![0; chunk_size.len()], &mut zeros, team.cancel)
            .map_err(|stopped| stopped_at(0, stopped))?;
        zeros.shrink_to_fit();
        // Frames that were written, for the workers to use again.
        let spare = Mutex::new(Vec::<Vec<u8>>::new());
        let spare = || spare.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = TableWriter::new(options.codec, chunk_size, total);
        let mut written = 0;
        pool::run(
            format::chunk_count(total, chunk_size),
            team,
            || Ok((encoder()?, vec![0; chunk_size.len()])),
            |(encoder, raw), index| {
                let raw = &mut raw[..format::chunk_length(total, chunk_size, index)];
                let whole = raw.len() == chunk_size.len();
                let data = self.read(index * chunk_size.bytes(), raw)?;
                let zero = !raw.is_empty() && (!data || sparse::is_zero(raw));
                if zero && whole {
                    return Ok(Packed::Zeros);
                }
                if zero {
                    raw.fill(0);
                }
                let mut bytes = spare().pop().unwrap_or_default();
                let checksum = encoder
                    .encode(raw, &mut bytes, team.cancel)
                    .map_err(|stopped| stopped_at(index, stopped))?;
                Ok(Packed::Frame {
                    bytes,
                    checksum,
                    zero,
                })
            },
            |index, packed| {
                let (frame, checksum, zero) = match &packed {
                    Packed::Zeros => (&zeros, zeros_checksum, true),
                    Packed::Frame {
                        bytes,
                        checksum,
                        zero,
                    } => (bytes, *checksum, *zero),
                };
                (&stage.file)
                    .write_all(frame)
                    .map_err(Error::io("write", &stage.path))?;
                // A frame is a little over 4 MiB at most.
                table.push(frame.len() as u32, checksum, zero);
                written += frame.len() as u64;
                filled.up_to(written);
                if let Packed::Frame { bytes, .. } = packed {
                    spare().push(bytes);
                }
                progress(Progress {
                    phase: Phase::Convert,
                    done: total.min((index + 1) * chunk_size.bytes()),
                    total,
                });
                Ok(())
            },
        )?;
        (&stage.file)
            .write_all(&table.finish())
            .map_err(Error::io("write", &stage.path))
    }

    fn read(&self, offset: u64, raw: &mut [u8]) -> Result<bool, Error> {
        sparse::read(&self.file, offset, raw).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::io("read", self.path)(error),
        })
    }

    fn changed(&self) -> Error {
        Error::SourceChanged {
            path: self.path.to_owned(),
        }
    }

    /// A file that somebody wrote to meanwhile may have been read half before and half after.
    fn check_unchanged(&self) -> Result<(), Error> {
        let now = self
            .file
            .metadata()
            .map_err(Error::io("inspect", self.path))?;
        let modified = |meta: &Metadata| meta.modified().map_err(Error::io("inspect", self.path));
        if now.len() == self.meta.len() && modified(&now)? == modified(&self.meta)? {
            Ok(())
        } else {
            Err(self.changed())
        }
    }
}

fn stopped_at(chunk: u64, stopped: Stopped) -> Error {
    match stopped {
        Stopped::Cancelled => Error::Cancelled,
        Stopped::Failed(reason) => Error::Encoder { chunk, reason },
    }
}
