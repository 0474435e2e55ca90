//! One chunk to one frame and back.
mod lz4_frame;
mod zstd_frame;

pub use lz4_frame::{Lz4Decoder, Lz4Encoder};
pub use zstd_frame::{ZstdDecoder, ZstdEncoder};

use crate::{
    cancel::Cancel,
    error::Fault,
    options::{Algorithm, ChunkSize, Codec},
};

/// Why a chunk did not become a frame.
#[derive(Debug)]
pub enum Stopped {
    Cancelled,
    Failed(String),
}

/// Compresses chunks, one after the other; each worker has its own.
pub enum Encoder {
    Zstd(ZstdEncoder),
    Lz4(Lz4Encoder),
}

impl Encoder {
    /// # Errors
    /// What the C library says, in words: out of memory.
    pub fn new(codec: Codec, chunk_size: ChunkSize) -> Result<Self, String> {
        Ok(match codec.algorithm() {
            Algorithm::Zstd => Encoder::Zstd(ZstdEncoder::new(codec.level())?),
            Algorithm::Lz4 => Encoder::Lz4(Lz4Encoder::new(codec.level(), chunk_size)),
        })
    }

    /// Replaces `frame` by a whole frame with content size and checksum; returns the checksum.
    /// Asks `cancel` every few milliseconds of work.
    pub fn encode(
        &mut self,
        raw: &[u8],
        frame: &mut Vec<u8>,
        cancel: &Cancel,
    ) -> Result<u32, Stopped> {
        match self {
            Encoder::Zstd(encoder) => encoder.encode(raw, frame, cancel)?,
            Encoder::Lz4(encoder) => encoder.encode(raw, frame, cancel)?,
        }
        frame
            .last_chunk()
            .map(|end| u32::from_le_bytes(*end))
            .ok_or_else(|| Stopped::Failed("the frame has no checksum".to_owned()))
    }
}

/// Decompresses frames, one after the other; each worker has its own.
pub enum Decoder {
    Zstd(ZstdDecoder),
    Lz4(Lz4Decoder),
}

impl Decoder {
    /// # Errors
    /// What the C library says, in words: out of memory.
    pub fn new(algorithm: Algorithm) -> Result<Self, String> {
        Ok(match algorithm {
            Algorithm::Zstd => Decoder::Zstd(ZstdDecoder::new()?),
            Algorithm::Lz4 => Decoder::Lz4(Lz4Decoder),
        })
    }

    /// Fills all of `raw` from exactly one frame, its checksum checked and equal to `expected`.
    /// Allocates nothing that depends on the frame.
    pub fn decode(&mut self, frame: &[u8], raw: &mut [u8], expected: u32) -> Result<(), Fault> {
        // The frame's own checksum is compared with the content below; with this it also is the table's.
        let found = frame.last_chunk().map(|end| u32::from_le_bytes(*end));
        if found != Some(expected) {
            return Err(Fault::Checksum {
                expected,
                found: found.unwrap_or_default(),
            });
        }
        match self {
            Decoder::Zstd(decoder) => decoder.decode(frame, raw),
            Decoder::Lz4(decoder) => decoder.decode(frame, raw),
        }
        .map_err(Fault::Frame)
    }
}
