//! Zstandard frames (RFC 8878) through zstd's C API.
use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, InBuffer, OutBuffer, ResetDirective, compress_bound,
    find_frame_compressed_size, get_error_name, get_frame_content_size,
};

use super::Stopped;
use crate::cancel::Cancel;

/// Frame_Header_Descriptor, bit 2: a content checksum ends the frame (RFC 8878, 3.1.1.1.1).
const CHECKSUM_FLAG: u8 = 1 << 2;
const MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

/// How a chunk is fed to the compressor, so that a cancel is noticed in time. A block of 128 KiB takes
/// 40 ms and more at level 19, so high levels end their blocks early: that costs under 1 % of size.
#[derive(Clone, Copy)]
enum Feed {
    /// In one call; the fastest, because zstd then copies nothing.
    Whole,
    /// So many bytes a call, blocks as zstd likes them.
    Steps(usize),
    /// So many bytes a call, each ending a block.
    Blocks(usize),
}

impl Feed {
    fn at(level: u8) -> Self {
        match level {
            0..=4 => Feed::Whole,
            5..=12 => Feed::Steps(64 << 10),
            _ => Feed::Blocks(32 << 10),
        }
    }
}

pub struct ZstdEncoder {
    context: CCtx<'static>,
    feed: Feed,
}

fn reason(code: usize) -> String {
    format!("zstd: {}", get_error_name(code))
}

fn failed(code: usize) -> Stopped {
    Stopped::Failed(reason(code))
}

impl ZstdEncoder {
    pub fn new(level: u8) -> Result<Self, String> {
        let mut context = CCtx::try_create().ok_or("zstd: out of memory")?;
        for parameter in [
            CParameter::CompressionLevel(level.into()),
            CParameter::ChecksumFlag(true),
            CParameter::ContentSizeFlag(true),
        ] {
            context.set_parameter(parameter).map_err(reason)?;
        }
        Ok(Self {
            context,
            feed: Feed::at(level),
        })
    }

    pub fn encode(
        &mut self,
        raw: &[u8],
        frame: &mut Vec<u8>,
        cancel: &Cancel,
    ) -> Result<(), Stopped> {
        frame.clear();
        // Blocks that end early add a header of 3 bytes each.
        frame.reserve(compress_bound(raw.len()) + 4 * raw.len().div_ceil(4096) + 64);
        if cancel.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        let (step, flush) = match self.feed {
            Feed::Whole => {
                return self.context.compress2(frame, raw).map(drop).map_err(failed);
            }
            Feed::Steps(step) => (step, false),
            Feed::Blocks(step) => (step, true),
        };
        self.stream(raw, frame, cancel, step, flush)
            .inspect_err(|_| {
                // Half a frame is in there. A context that cannot be reset fails the next call by itself.
                let _nothing_else_to_do = self.context.reset(ResetDirective::SessionOnly);
            })
    }

    fn stream(
        &mut self,
        raw: &[u8],
        frame: &mut Vec<u8>,
        cancel: &Cancel,
        step: usize,
        flush: bool,
    ) -> Result<(), Stopped> {
        let context = &mut self.context;
        let full = || Stopped::Failed("zstd: a frame larger than the bound".to_owned());
        context
            .set_pledged_src_size(Some(raw.len() as u64))
            .map_err(failed)?;
        let mut output = OutBuffer::around(frame);
        for part in raw.chunks(step) {
            if cancel.is_cancelled() {
                return Err(Stopped::Cancelled);
            }
            let mut input = InBuffer::around(part);
            while input.pos() < part.len() {
                context
                    .compress_stream(&mut output, &mut input)
                    .map_err(failed)?;
                if output.pos() == output.capacity() {
                    return Err(full());
                }
            }
            while flush && context.flush_stream(&mut output).map_err(failed)? > 0 {
                if output.pos() == output.capacity() {
                    return Err(full());
                }
            }
        }
        while context.end_stream(&mut output).map_err(failed)? > 0 {
            if output.pos() == output.capacity() {
                return Err(full());
            }
        }
        Ok(())
    }
}

pub struct ZstdDecoder {
    context: DCtx<'static>,
}

impl ZstdDecoder {
    pub fn new() -> Result<Self, String> {
        Ok(Self {
            context: DCtx::try_create().ok_or("zstd: out of memory")?,
        })
    }

    /// In one call with all input and room for all output, for which zstd needs no window of its own,
    /// whatever the frame's header asks for.
    pub fn decode(&mut self, frame: &[u8], raw: &mut [u8]) -> Result<(), String> {
        // Not what zstd would read besides: older formats, skippable frames, frames in a row.
        if !frame.starts_with(&MAGIC) {
            return Err("zstd: this is no zstd frame".to_owned());
        }
        if frame.get(4).is_none_or(|flags| flags & CHECKSUM_FLAG == 0) {
            return Err("zstd: the frame has no checksum".to_owned());
        }
        if find_frame_compressed_size(frame).map_err(reason)? != frame.len() {
            return Err("zstd: the frame ends early".to_owned());
        }
        if get_frame_content_size(frame).ok().flatten() != Some(raw.len() as u64) {
            return Err(
                "zstd: the frame's content has another size than the seek table says".to_owned(),
            );
        }
        match self.context.decompress(raw, frame) {
            Ok(length) if length == raw.len() => Ok(()),
            Ok(length) => Err(format!(
                "zstd: {length} bytes came out instead of {}",
                raw.len()
            )),
            Err(code) => Err(reason(code)),
        }
    }
}
