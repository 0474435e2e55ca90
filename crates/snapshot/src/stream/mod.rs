//! Several files as one stream of bytes, for a snapshot that moves to another host.
//!
//! ```text
//!   stream := header record* END
//!   header := "doze-snapshot\n" version:u16                              16 bytes
//!   record := kind:u8 length:u32 payload[length] checksum:u64            checksum: XXH64 of kind, length and
//!                                                                        payload; its seed is the record's number
//!   kind       payload
//!   1 FILE     size:u64 name[1..=64]                                     a file begins
//!   2 DATA     offset:u64 raw_length:u32 codec:u8 bytes                  one block; codec 0 as it is, 1 zstd
//!   3 FILE_END blocks:u64 content:u64                                    XXH64 of all (offset, raw bytes) of the file
//!   4 END      files:u32 all:u64                                         XXH64 of every byte before this record
//! ```
//! Integers are little endian, records are numbered from 0, and nothing follows END. A file is FILE, any number of
//! DATA, FILE_END. It is cut into blocks of 1 MiB from its begin: a DATA holds exactly one of them (the last may be
//! shorter), offsets only grow, and a block that is not told is zeros. So the length of a stream is bounded by
//! the sizes its files claim, and holes cost nothing.
//!
//! The checksums find accidents: a flipped bit, a lost, repeated or exchanged record, a cut, all with the place.
//! They are no signature. Whoever reads a stream believes nothing that is told in it, neither sizes (nothing is
//! allocated for more than one block) nor names (one component of letters, digits, `-`, `_` and `.`).
//!
//! Pure: any [`std::io::Write`] and [`std::io::Read`] will do.
use std::{fmt, io};

mod read;
mod write;

pub use read::{Block, FileHeader, StreamReader};
pub use write::{Source, StreamWriter};

/// What every stream begins with.
pub const MAGIC: [u8; 14] = *b"doze-snapshot\n";
/// Version of the form this program writes, and the only one it reads.
pub const VERSION: u16 = 1;
/// Bytes of a whole block.
pub const BLOCK: usize = 1 << 20;
/// Bytes of a file's name at most.
pub const MAX_NAME: usize = 64;
/// Files of a stream at most.
pub const MAX_FILES: usize = 64;
/// Bytes of one file at most; whoever reads has limits of his own.
pub const MAX_FILE: u64 = 1 << 44;

const FILE: u8 = 1;
const DATA: u8 = 2;
const FILE_END: u8 = 3;
const END: u8 = 4;

const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// kind and length.
const RECORD_HEADER: usize = 5;
/// offset, raw_length and codec.
const DATA_HEADER: usize = 13;

/// Largest payload of a record of this kind; `None` for a kind that does not exist.
fn max_payload(kind: u8) -> Option<usize> {
    match kind {
        FILE => Some(8 + MAX_NAME),
        DATA => Some(DATA_HEADER + BLOCK),
        FILE_END => Some(16),
        END => Some(12),
        _ => None,
    }
}

/// One component that is harmless on every file system, and no hidden file.
fn is_plain(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Bytes of the block at `offset` of a file of `size` bytes; `None` where none begins.
fn block_length(offset: u64, size: u64) -> Option<usize> {
    let begins = offset < size && offset.is_multiple_of(BLOCK as u64);
    // At most BLOCK.
    begins.then(|| (size - offset).min(BLOCK as u64) as usize)
}

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// What was read is no stream of ours, or not a whole one.
    #[error("at byte {at}{}: {fault}", Within(.file.as_deref()))]
    Broken {
        /// Where the record begins, or the stream ends.
        at: u64,
        /// Whose record it is.
        file: Option<String>,
        fault: StreamFault,
    },
    /// Whoever brings the bytes failed.
    #[error("cannot read the stream after {at} bytes")]
    Read { at: u64, source: io::Error },
    /// Whoever takes the bytes failed.
    #[error("cannot write the stream")]
    Write { source: io::Error },
    /// A file that is to be told cannot be read.
    #[error("cannot read {name} at byte {offset}")]
    Source {
        name: String,
        offset: u64,
        source: io::Error,
    },
    /// The C library refused what it must accept: out of memory, or a defect.
    #[error("a block cannot be compressed")]
    Encoder { source: io::Error },
}

struct Within<'a>(Option<&'a str>);

impl fmt::Display for Within<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, ", in {name}"),
            None => Ok(()),
        }
    }
}

/// What is wrong with a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamFault {
    #[error("this is no snapshot that doze exported")]
    Magic,
    #[error("the stream's version is {found}, this doze reads version {VERSION}")]
    Version { found: u16 },
    #[error("it is cut off here")]
    Truncated,
    #[error("a record is damaged: its checksum is {found:016x}, it says {expected:016x}")]
    Record { expected: u64, found: u64 },
    #[error("a record claims {claimed} bytes, {allowed} are possible")]
    Length { claimed: u64, allowed: String },
    #[error("{0}")]
    Order(&'static str),
    #[error(
        "it brings a file named {0:?}; allowed are up to {MAX_NAME} letters, digits, '-', '_' and '.', none of them first"
    )]
    Name(String),
    #[error("it brings the file a second time")]
    Duplicate,
    #[error("the file claims {claimed} bytes, at most {cap} are read")]
    Size { claimed: u64, cap: u64 },
    #[error("a block at {offset} with {length} bytes is none of a file of {size} bytes")]
    Block { offset: u64, length: u64, size: u64 },
    #[error("a block cannot be decompressed: {0}")]
    Codec(String),
    #[error("the file is not whole: {0}")]
    Content(&'static str),
    #[error("the stream is not whole: {0}")]
    All(&'static str),
    #[error("something follows its end")]
    Trailing,
}

#[cfg(test)]
mod tests;
