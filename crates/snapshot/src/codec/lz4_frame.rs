//! LZ4 frames (`lz4_Frame_format.md` 1.6.1 of the LZ4 project) around blocks of LZ4's C library.
//!
//! Frames are written and read here, blocks there: a frame is a header, length-prefixed blocks and a
//! checksum, and so nothing is allocated for a frame, a cancel is noticed between blocks, and a forged
//! header can ask for nothing.
//!
//! ```text
//!  u32 magic | FLG | BD | u64 content size | HC | { u32 length, block }... | u32 0 | u32 XXH32
//! ```
use lz4::block::{CompressionMode, compress_bound, compress_to_buffer, decompress_to_buffer};
use twox_hash::XxHash32;

use super::Stopped;
use crate::{cancel::Cancel, fields::Fields, options::ChunkSize};

const MAGIC: u32 = 0x184D_2204;
/// Version 01, independent blocks, no block checksums, content size, content checksum, no dictionary.
const FLG: u8 = 0b0110_1100;
const HEADER: usize = 15;
/// Highest bit of a block's length: the block is stored as it is.
const STORED: u32 = 1 << 31;
/// First level of LZ4's high compression (`LZ4HC_CLEVEL_MIN`).
const FIRST_HIGH: u8 = 2;

pub struct Lz4Encoder {
    mode: CompressionMode,
    /// Block Maximum Size of the BD byte: 4 to 7 for 64 KiB to 4 MiB.
    size_code: u8,
}

/// What a size code stands for, in bytes.
fn block_size(code: u8) -> usize {
    1 << (8 + 2 * usize::from(code))
}

/// Magic to HC, the second byte of the hash of the descriptor before it.
fn header(size_code: u8, content_size: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4] = FLG;
    header[5] = size_code << 4;
    header[6..14].copy_from_slice(&content_size.to_le_bytes());
    header[14] = XxHash32::oneshot(0, &header[4..14]).to_le_bytes()[1];
    header
}

impl Lz4Encoder {
    pub fn new(level: u8, chunk_size: ChunkSize) -> Self {
        let whole = (chunk_size.log2() - 8) / 2;
        if level < FIRST_HIGH {
            // A chunk is done in a few milliseconds: one block.
            Self {
                mode: CompressionMode::DEFAULT,
                size_code: whole,
            }
        } else {
            // Slow enough to look at the cancel flag within a chunk: blocks of 256 KiB.
            Self {
                mode: CompressionMode::HIGHCOMPRESSION(level.into()),
                size_code: whole.min(5),
            }
        }
    }

    pub fn encode(
        &mut self,
        raw: &[u8],
        frame: &mut Vec<u8>,
        cancel: &Cancel,
    ) -> Result<(), Stopped> {
        let failed = |error: std::io::Error| Stopped::Failed(format!("lz4: {error}"));
        frame.clear();
        frame.extend_from_slice(&header(self.size_code, raw.len() as u64));
        for block in raw.chunks(block_size(self.size_code)) {
            if cancel.is_cancelled() {
                return Err(Stopped::Cancelled);
            }
            let at = frame.len() + 4;
            frame.resize(at + compress_bound(block.len()).map_err(failed)?, 0);
            let packed = compress_to_buffer(block, Some(self.mode), false, &mut frame[at..])
                .map_err(failed)?;
            frame.truncate(at + packed);
            let length = if packed < block.len() {
                packed as u32
            } else {
                frame.truncate(at);
                frame.extend_from_slice(block);
                block.len() as u32 | STORED
            };
            frame[at - 4..at].copy_from_slice(&length.to_le_bytes());
        }
        frame.extend_from_slice(&[0; 4]);
        frame.extend_from_slice(&XxHash32::oneshot(0, raw).to_le_bytes());
        Ok(())
    }
}

pub struct Lz4Decoder;

impl Lz4Decoder {
    pub fn decode(&mut self, frame: &[u8], raw: &mut [u8]) -> Result<(), String> {
        let mut fields = Fields(frame);
        let head = fields.bytes(HEADER).ok_or("lz4: the header is cut off")?;
        let code = head[5] >> 4;
        // Ours in every byte, or not ours: nothing to interpret, nothing to get wrong.
        if !(4..=7).contains(&code) || head != header(code, raw.len() as u64) {
            return Err("lz4: the header is not what the seek table leads to expect".to_owned());
        }
        let mut rest = &mut *raw;
        loop {
            let length = fields.u32().ok_or("lz4: a block's length is cut off")?;
            if length == 0 {
                break;
            }
            let stored = length & STORED != 0;
            let block = fields
                .bytes((length & !STORED) as usize)
                .ok_or("lz4: a block is cut off")?;
            let room = rest.len().min(block_size(code));
            // Every block but the last is full, so where it goes does not depend on it.
            let (target, after) = rest.split_at_mut(room);
            let written = if stored {
                if block.len() == room {
                    target.copy_from_slice(block);
                }
                block.len()
            } else {
                decompress_to_buffer(block, Some(room as i32), target)
                    .map_err(|error| format!("lz4: {error}"))?
            };
            if room == 0 || written != room {
                return Err(format!(
                    "lz4: a block holds {written} bytes instead of {room}"
                ));
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(format!("lz4: the last {} bytes are missing", rest.len()));
        }
        let checksum = fields.u32().ok_or("lz4: the checksum is cut off")?;
        if !fields.0.is_empty() {
            return Err("lz4: the frame ends early".to_owned());
        }
        if checksum != XxHash32::oneshot(0, raw) {
            return Err("lz4: the content does not have the frame's checksum".to_owned());
        }
        Ok(())
    }
}
