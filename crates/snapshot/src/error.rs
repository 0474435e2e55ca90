//! Why a codec call failed. Every error names the file; what is wrong *inside* a file also names where.
use std::{io, path::PathBuf};

use crate::options::Algorithm;

/// What a call of this crate fails with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Asked to stop. Nothing was left behind.
    #[error("cancelled")]
    Cancelled,
    #[error("{algorithm} level {level} does not exist; allowed is {min} to {max}")]
    Level {
        algorithm: Algorithm,
        level: i64,
        min: u8,
        max: u8,
    },
    #[error("chunk size {bytes} is not supported; allowed are 64 KiB, 256 KiB, 1 MiB and 4 MiB")]
    ChunkSize { bytes: u64 },
    #[error("{} already exists; remove it or choose another name", .path.display())]
    Exists { path: PathBuf },
    #[error("{} is not a regular file", .path.display())]
    NotAFile { path: PathBuf },
    #[error(
        "{} has {size} bytes; with chunks of {chunk_size} bytes at most {max} can be compressed", .path.display()
    )]
    TooLarge {
        path: PathBuf,
        size: u64,
        chunk_size: u64,
        max: u64,
    },
    #[error("{} was changed while it was compressed; nothing was written, try again once nobody writes to it", .path.display())]
    SourceChanged { path: PathBuf },
    /// The structure around the chunks is damaged or foreign.
    #[error("{}: {fault} (at byte {offset})", .path.display())]
    Format {
        path: PathBuf,
        /// Where in the file.
        offset: u64,
        fault: Fault,
    },
    /// One chunk is damaged.
    #[error("{}: chunk {chunk}, at byte {offset}: {fault}", .path.display())]
    Chunk {
        path: PathBuf,
        /// Which chunk, from 0; it starts at `chunk` times the chunk size in the raw file.
        chunk: u64,
        /// Where it begins in `path`.
        offset: u64,
        fault: Fault,
    },
    #[error("cannot {step} {}", .path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot {step}")]
    Threads {
        step: &'static str,
        source: io::Error,
    },
    /// The C library refused what it must accept: out of memory, or a defect.
    #[error("chunk {chunk} cannot be compressed: {reason}")]
    Encoder { chunk: u64, reason: String },
    #[error("a worker thread ended unexpectedly; this is a defect in doze")]
    Worker,
}

impl Error {
    pub(crate) fn io(
        step: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Error + use<> {
        let path = path.to_owned();
        move |source| Error::Io { step, path, source }
    }
}

/// What is wrong with the content of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("this is no memory image of doze, or its end is missing")]
    NoSeekTable,
    #[error("the seek table is damaged: {0}")]
    Table(&'static str),
    #[error("the info frame is damaged: {0}")]
    Info(&'static str),
    #[error("the format's version is {found}; this doze reads version {known}")]
    Version { found: u8, known: u8 },
    #[error("the seek table claims {claimed} {what}; at most {cap} are read")]
    Cap {
        what: &'static str,
        claimed: u64,
        cap: u64,
    },
    #[error("the frame is damaged: {0}")]
    Frame(String),
    #[error("its content's checksum is {found:08x}, the seek table says {expected:08x}")]
    Checksum { expected: u32, found: u32 },
    #[error("the file ends inside it")]
    Truncated,
    #[error("what was written does not read back the same")]
    ReadBack,
}
