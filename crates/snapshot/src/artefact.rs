//! Reading artefacts: any chunk by itself, all of them to verify, or only what they say about themselves.
use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::Serialize;

use crate::{
    cancel::Cancel,
    codec::Decoder,
    error::{Error, Fault},
    format::{self, Entry, FOOTER, SeekTable, Tail},
    options::{Algorithm, DecompressOptions, Phase, Progress},
    pool::{self, Team},
    sparse,
};

/// Frames longer than this are not remembered as frames of zeros: even LZ4 needs only 1/255.
const MAX_ZERO_FRAME: usize = 32 << 10;

/// Bytes at positions: a file, or memory in tests.
pub trait ReadAt: Sync {
    /// # Errors
    /// Of the file.
    fn size(&self) -> io::Result<u64>;
    /// # Errors
    /// Of the file; `UnexpectedEof` when it is shorter.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn size(&self) -> io::Result<u64> {
        self.metadata().map(|meta| meta.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..)?.get(..buffer.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }
}

impl<R: ReadAt + ?Sized> ReadAt for &R {
    fn size(&self) -> io::Result<u64> {
        (**self).size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_exact_at(buffer, offset)
    }
}

/// What an artefact says about itself. Sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    pub algorithm: Algorithm,
    pub level: u8,
    /// Raw bytes per frame; the last may have fewer.
    pub chunk_size: u64,
    /// Data frames, one per chunk.
    pub frames: u64,
    /// Of them, chunks that are nothing but zeros.
    pub zero_chunks: u32,
    pub raw_size: u64,
    /// Of the whole artefact.
    pub compressed_size: u64,
    /// `raw_size / compressed_size`: 4.0 means a quarter is left.
    pub ratio: f64,
}

/// An artefact whose end was read and checked.
#[derive(Debug)]
pub struct Artefact<R> {
    source: R,
    path: PathBuf,
    size: u64,
    table: SeekTable,
    /// A frame that was found to hold a whole chunk of zeros. The same bytes hold the same again.
    zero_frame: OnceLock<Vec<u8>>,
}

impl Artefact<File> {
    /// # Errors
    /// [`Error::Io`], [`Error::NotAFile`], and [`Error::Format`] as in [`Artefact::new`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let meta = file.metadata().map_err(Error::io("inspect", path))?;
        if !meta.is_file() {
            return Err(Error::NotAFile {
                path: path.to_owned(),
            });
        }
        Self::new(file, path)
    }
}

impl<R: ReadAt> Artefact<R> {
    /// Reads and checks the end of `source`; `path` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Format`] when the end is damaged, cut off or none of ours; [`Error::Io`].
    pub fn new(source: R, path: &Path) -> Result<Self, Error> {
        let read = |buffer: &mut [u8], offset| {
            source
                .read_exact_at(buffer, offset)
                .map_err(Error::io("read", path))
        };
        let at = |offset| {
            move |fault| Error::Format {
                path: path.to_owned(),
                offset,
                fault,
            }
        };
        let size = source.size().map_err(Error::io("inspect", path))?;
        let footer_at = size
            .checked_sub(FOOTER as u64)
            .ok_or_else(|| at(0)(Fault::NoSeekTable))?;
        let mut footer = [0; FOOTER];
        read(&mut footer, footer_at)?;
        let tail = Tail::parse(&footer, size).map_err(at(footer_at))?;
        // Tail::parse has seen to it that this is neither more than the cap nor than the file.
        let tail_at = size - tail.length as u64;
        let mut bytes = vec![0; tail.length];
        read(&mut bytes, tail_at)?;
        let table = SeekTable::parse(tail, &bytes, size).map_err(at(tail_at))?;
        Ok(Self {
            source,
            path: path.to_owned(),
            size,
            table,
            zero_frame: OnceLock::new(),
        })
    }

    pub fn table(&self) -> &SeekTable {
        &self.table
    }

    pub fn inspection(&self) -> Inspection {
        #[allow(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = self.table.raw_size as f64 / self.size as f64;
        Inspection {
            algorithm: self.table.codec.algorithm(),
            level: self.table.codec.level(),
            chunk_size: self.table.chunk_size.bytes(),
            frames: self.table.entries.len() as u64,
            zero_chunks: self.table.zero_chunks,
            raw_size: self.table.raw_size,
            compressed_size: self.size,
            ratio,
        }
    }

    /// Somebody who reads chunks; one per thread.
    ///
    /// # Errors
    /// [`Error::Encoder`] never; [`Error::Threads`] when there is no memory for a decoder.
    pub fn reader(&self) -> Result<ChunkReader<'_, R>, Error> {
        let decoder =
            Decoder::new(self.table.codec.algorithm()).map_err(|reason| Error::Threads {
                step: "prepare a decoder",
                source: io::Error::other(reason),
            })?;
        Ok(ChunkReader {
            artefact: self,
            decoder,
            frame: Vec::new(),
            raw: vec![0; self.table.chunk_size.len()],
        })
    }

    /// Decodes every chunk and checks it, on all of the team's cores.
    pub(crate) fn verify(
        &self,
        team: Team<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let mut zeros = 0_u32;
        let total = self.table.raw_size;
        pool::run(
            self.table.entries.len() as u64,
            team,
            || self.reader(),
            |reader, index| Ok(reader.read(index)?.is_none()),
            |index, zero| {
                zeros += u32::from(zero);
                progress(Progress {
                    phase: Phase::Verify,
                    done: total.min((index + 1) * self.table.chunk_size.bytes()),
                    total,
                });
                Ok(())
            },
        )?;
        if zeros != self.table.zero_chunks {
            return Err(Error::Format {
                path: self.path.clone(),
                offset: self.size,
                fault: Fault::Info("its number of zero chunks is not the number found"),
            });
        }
        Ok(())
    }

    fn fault(&self, index: u64, entry: &Entry, fault: Fault) -> Error {
        Error::Chunk {
            path: self.path.clone(),
            chunk: index,
            offset: entry.offset,
            fault,
        }
    }
}

/// Reads chunks of an [`Artefact`] in any order.
pub struct ChunkReader<'a, R> {
    artefact: &'a Artefact<R>,
    decoder: Decoder,
    frame: Vec<u8>,
    raw: Vec<u8>,
}

impl<R: ReadAt> ChunkReader<'_, R> {
    /// The raw content of chunk `index`, checked; `None` when it is all zeros.
    ///
    /// # Errors
    /// [`Error::Chunk`] when it is damaged or `index` is beyond the last; [`Error::Io`].
    pub fn read(&mut self, index: u64) -> Result<Option<&[u8]>, Error> {
        let artefact = self.artefact;
        let entry = usize::try_from(index)
            .ok()
            .and_then(|index| artefact.table.entries.get(index))
            .ok_or_else(|| Error::Chunk {
                path: artefact.path.clone(),
                chunk: index,
                offset: artefact.size,
                fault: Fault::Table("there is no such chunk"),
            })?;
        // At most `format::max_frame`: SeekTable::parse refuses more.
        self.frame.resize(entry.compressed as usize, 0);
        artefact
            .source
            .read_exact_at(&mut self.frame, entry.offset)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => artefact.fault(index, entry, Fault::Truncated),
                _ => Error::io("read", &artefact.path)(error),
            })?;
        let length = artefact.table.chunk_length(index);
        let whole = length == artefact.table.chunk_size.len();
        if whole && artefact.zero_frame.get() == Some(&self.frame) && self.ends_with(entry.checksum)
        {
            return Ok(None);
        }
        let raw = &mut self.raw[..length];
        self.decoder
            .decode(&self.frame, raw, entry.checksum)
            .map_err(|fault| artefact.fault(index, entry, fault))?;
        if !sparse::is_zero(raw) {
            return Ok(Some(raw));
        }
        if whole && self.frame.len() <= MAX_ZERO_FRAME && artefact.zero_frame.get().is_none() {
            // Somebody else's is as good.
            let _already_there = artefact.zero_frame.set(self.frame.clone());
        }
        Ok(None)
    }

    /// As [`Self::read`], but the content is given away and a buffer from `spare` takes its place.
    pub(crate) fn take(
        &mut self,
        index: u64,
        spare: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<Vec<u8>>, Error> {
        let Some(length) = self.read(index)?.map(<[u8]>::len) else {
            return Ok(None);
        };
        let mut empty = spare();
        empty.resize(self.artefact.table.chunk_size.len(), 0);
        let mut raw = std::mem::replace(&mut self.raw, empty);
        raw.truncate(length);
        Ok(Some(raw))
    }

    fn ends_with(&self, checksum: u32) -> bool {
        self.frame.ends_with(&checksum.to_le_bytes())
    }
}

/// What the artefact says about itself; its end is checked, its chunks are not.
///
/// # Errors
/// As [`Artefact::open`].
pub fn inspect_file(path: &Path) -> Result<Inspection, Error> {
    Artefact::open(path).map(|artefact| artefact.inspection())
}

/// Decodes every chunk and checks it against its checksum.
///
/// # Errors
/// [`Error::Chunk`] for the first damaged chunk found, [`Error::Format`] for a damaged end,
/// [`Error::Cancelled`], [`Error::Io`].
pub fn verify_file(
    path: &Path,
    options: DecompressOptions,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress),
) -> Result<Inspection, Error> {
    let artefact = Artefact::open(path)?;
    let team = Team {
        threads: options.threads,
        background: options.background,
        cancel,
    };
    artefact.verify(team, progress)?;
    Ok(artefact.inspection())
}

/// Checksum of raw content, for whoever compares it with a seek table.
pub(crate) fn matches(table: &SeekTable, entry: &Entry, raw: &[u8]) -> bool {
    format::checksum(table.codec.algorithm(), raw) == entry.checksum
}
