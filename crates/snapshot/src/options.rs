//! What callers choose, checked once when it is made, and what they are told in return.
use std::{fmt, num::NonZeroUsize, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{artefact::Inspection, error::Error};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    Zstd,
    Lz4,
}

impl Algorithm {
    /// Lowest, highest and default level: zstd 1-19 (1), lz4 0-9 (0).
    pub const fn levels(self) -> (u8, u8, u8) {
        match self {
            Algorithm::Zstd => (1, 19, 1),
            Algorithm::Lz4 => (0, 9, 0),
        }
    }

    /// What follows the dot in the artefact's name: `zst`, `lz4`.
    pub const fn extension(self) -> &'static str {
        match self {
            Algorithm::Zstd => "zst",
            Algorithm::Lz4 => "lz4",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Zstd => "zstd",
            Algorithm::Lz4 => "lz4",
        })
    }
}

/// An algorithm with a level that it has, also when it is read from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct Codec {
    algorithm: Algorithm,
    level: u8,
}

#[derive(Serialize, Deserialize)]
struct Unchecked {
    algorithm: Algorithm,
    level: i64,
}

impl TryFrom<Unchecked> for Codec {
    type Error = Error;

    fn try_from(read: Unchecked) -> Result<Codec, Error> {
        Codec::new(read.algorithm, Some(read.level))
    }
}

impl From<Codec> for Unchecked {
    fn from(codec: Codec) -> Unchecked {
        Unchecked {
            algorithm: codec.algorithm,
            level: codec.level.into(),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.algorithm, self.level)
    }
}

impl Codec {
    /// `None` is the algorithm's default level.
    ///
    /// # Errors
    /// [`Error::Level`] outside [`Algorithm::levels`].
    pub fn new(algorithm: Algorithm, level: Option<i64>) -> Result<Self, Error> {
        let (min, max, default) = algorithm.levels();
        let level = match level {
            None => default,
            Some(level) => u8::try_from(level)
                .ok()
                .filter(|level| (min..=max).contains(level))
                .ok_or(Error::Level {
                    algorithm,
                    level,
                    min,
                    max,
                })?,
        };
        Ok(Self { algorithm, level })
    }

    pub fn algorithm(self) -> Algorithm {
        self.algorithm
    }

    pub fn level(self) -> u8 {
        self.level
    }
}

/// Raw bytes per frame: 64 KiB, 256 KiB, 1 MiB (default) or 4 MiB, the block sizes of the LZ4 frame
/// format, so that a chunk can be one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSize(u8);

impl ChunkSize {
    const LOG2: [u8; 4] = [16, 18, 20, 22];
    /// 4 MiB.
    pub const MAX: ChunkSize = ChunkSize(22);

    /// # Errors
    /// [`Error::ChunkSize`] for any other number.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        Self::LOG2
            .into_iter()
            .find(|log2| bytes == 1 << log2)
            .map(Self)
            .ok_or(Error::ChunkSize { bytes })
    }

    pub(crate) fn from_log2(log2: u8) -> Option<Self> {
        Self::LOG2.contains(&log2).then_some(Self(log2))
    }

    pub(crate) fn log2(self) -> u8 {
        self.0
    }

    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The same number for lengths in memory.
    pub(crate) const fn len(self) -> usize {
        1 << self.0
    }
}

impl Default for ChunkSize {
    fn default() -> Self {
        ChunkSize(20)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct CompressOptions {
    pub codec: Codec,
    pub chunk_size: ChunkSize,
    /// Worker threads; `None` is one for each core this process may use. At most 64 are started.
    pub threads: Option<NonZeroUsize>,
    /// Idle I/O and low CPU priority until cancelled. See [`doze_host::background`].
    pub background: bool,
}

impl CompressOptions {
    /// In the foreground, on all cores, with chunks of the default size.
    pub fn new(codec: Codec) -> Self {
        Self {
            codec,
            chunk_size: ChunkSize::default(),
            threads: None,
            background: false,
        }
    }
}

/// The default is all cores, in the foreground.
#[derive(Debug, Clone, Copy, Default)]
pub struct DecompressOptions {
    /// As in [`CompressOptions`].
    pub threads: Option<NonZeroUsize>,
    /// As in [`CompressOptions`].
    pub background: bool,
}

/// What a call is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Compressing or decompressing into the stage file.
    Convert,
    /// Waiting for the disk.
    Sync,
    /// Reading the result back.
    Verify,
}

/// Told on the calling thread, about once per chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    /// Bytes of the raw file that this phase is through with; for [`Phase::Sync`] bytes of the stage file.
    pub done: u64,
    pub total: u64,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    pub convert: Duration,
    pub sync: Duration,
    pub verify: Duration,
}

/// What a finished call did.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The artefact, written or read.
    pub artefact: Inspection,
    pub timings: Timings,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn levels_outside_the_algorithm_are_refused() {
        for (algorithm, good, bad) in [
            (Algorithm::Zstd, [1, 19], [0, 20]),
            (Algorithm::Lz4, [0, 9], [-1, 10]),
        ] {
            for level in good {
                let codec = Codec::new(algorithm, Some(level)).unwrap();
                assert_eq!(i64::from(codec.level()), level);
            }
            for level in bad {
                let error = Codec::new(algorithm, Some(level)).unwrap_err();
                assert!(error.to_string().contains("allowed is"), "{error}");
            }
        }
        assert_eq!(Codec::new(Algorithm::Zstd, None).unwrap().level(), 1);
        assert_eq!(Codec::new(Algorithm::Lz4, None).unwrap().level(), 0);
        assert!(Codec::new(Algorithm::Lz4, Some(i64::MAX)).is_err());
    }

    #[test]
    fn what_is_read_from_a_file_is_checked_too() {
        let codec = Codec::new(Algorithm::Zstd, Some(3)).unwrap();
        let text = serde_json::to_string(&codec).unwrap();
        assert_eq!(text, r#"{"algorithm":"zstd","level":3}"#);
        assert_eq!(serde_json::from_str::<Codec>(&text).unwrap(), codec);
        let bad = serde_json::from_str::<Codec>(r#"{"algorithm":"lz4","level":12}"#);
        assert!(bad.unwrap_err().to_string().contains("0 to 9"));
    }

    #[test]
    fn chunk_sizes() {
        assert_eq!(ChunkSize::default().bytes(), 1 << 20);
        assert_eq!(ChunkSize::new(1 << 16).unwrap().len(), 65536);
        for bad in [0, 1, 4096, 1 << 17, 1 << 23, u64::MAX] {
            assert!(ChunkSize::new(bad).is_err());
        }
    }
}
