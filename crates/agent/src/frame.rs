//! Frames on the byte stream, and finding them again after bytes were lost.
//!
//! virtio-serial drops what is in flight when the host's end disconnects, and a reconnect may
//! begin in the middle of an old frame. So a frame starts with a magic, its header and its payload
//! carry their own checksums, and the decoder looks for the next magic whenever one does not hold.
//!
//! ```text
//!   0     4  5  6     8     12      16    24    32         40   44      48
//!   magic |v |k |flags| link| stream| seq | ack | waited_us| len| crc32 | payload | crc32
//!         └────────────── covered by the header's crc32 ───────┘         └ covered by the last one
//! ```
//!
//! All numbers are little-endian. Nothing is allocated for a length beyond [`MAX_PAYLOAD`].
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes no text contains.
pub const MAGIC: [u8; 4] = [0xD0, 0x5E, 0xA9, 0x1C];
/// Layout version; the only one there is.
pub const VERSION: u8 = 1;
/// Bytes before the payload.
pub const HEADER_LEN: usize = 48;
/// Payload bytes of one frame at most.
pub const MAX_PAYLOAD: usize = 64 << 10;
const TRAILER_LEN: usize = 4;
/// Bytes of the largest frame.
pub const MAX_FRAME: usize = HEADER_LEN + MAX_PAYLOAD + TRAILER_LEN;

/// The frame counts in the sequence (is acknowledged, sent again, delivered once).
pub const FLAG_SEQUENCED: u16 = 1;
/// The receiver acknowledges at once.
pub const FLAG_ACK_NOW: u16 = 2;

/// What a frame carries. A number of its own on the wire, so that a newer peer's kinds can be
/// skipped instead of breaking the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(pub u8);

impl Kind {
    /// JSON of [`crate::session::Hello`]; unsequenced.
    pub const HELLO: Self = Self(1);
    /// Only the header matters; unsequenced.
    pub const ACK: Self = Self(2);
    /// JSON of a message.
    pub const CONTROL: Self = Self(3);
    /// Raw bytes of a stream.
    pub const DATA: Self = Self(4);
    /// u32: this many more bytes of the stream may be sent.
    pub const CREDIT: Self = Self(5);
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub flags: u16,
    /// Names the pair of epochs this frame belongs to; see [`crate::session`].
    pub link: u32,
    pub stream: u32,
    /// Own number if sequenced, else the highest number written so far.
    pub seq: u64,
    /// Highest number received in order.
    pub ack: u64,
    /// Microseconds the frame waited at its sender before this transmission.
    pub waited_us: u64,
    pub payload: Bytes,
}

impl Frame {
    /// Appends the frame to `out`. The payload is at most [`MAX_PAYLOAD`] bytes; whoever makes a
    /// frame has checked that.
    pub fn encode(&self, out: &mut BytesMut) {
        debug_assert!(self.payload.len() <= MAX_PAYLOAD);
        let start = out.len();
        out.reserve(HEADER_LEN + self.payload.len() + TRAILER_LEN);
        out.put_slice(&MAGIC);
        out.put_u8(VERSION);
        out.put_u8(self.kind.0);
        out.put_u16_le(self.flags);
        out.put_u32_le(self.link);
        out.put_u32_le(self.stream);
        out.put_u64_le(self.seq);
        out.put_u64_le(self.ack);
        out.put_u64_le(self.waited_us);
        out.put_u32_le(self.payload.len() as u32);
        let crc = crc32fast::hash(&out[start + MAGIC.len()..]);
        out.put_u32_le(crc);
        out.put_slice(&self.payload);
        out.put_u32_le(crc32fast::hash(&self.payload));
    }
}

/// Finds frames in a byte stream. Holds at most one frame's bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    buf: BytesMut,
    skipped: u64,
}

impl Decoder {
    /// Takes bytes from the front of `input` until a frame is complete or the input is used up.
    pub fn decode(&mut self, input: &mut &[u8]) -> Option<Frame> {
        loop {
            match self.step() {
                Step::Frame(frame) => return Some(frame),
                Step::Again => {}
                Step::Need(bytes) => {
                    if input.is_empty() {
                        return None;
                    }
                    let take = bytes.min(input.len());
                    self.buf.extend_from_slice(&input[..take]);
                    input.advance(take);
                }
            }
        }
    }

    /// A frame has begun and its end has not come.
    pub fn partial(&self) -> bool {
        !self.buf.is_empty()
    }

    /// Gives up the frame that has begun: its beginning may be all that is left of it, and what
    /// follows may hold whole frames. Call [`Decoder::decode`] again afterwards.
    pub fn abandon(&mut self) {
        self.skip(1);
    }

    /// Forgets everything (a new connection).
    pub fn reset(&mut self) {
        self.buf.clear();
    }

    /// Bytes that belonged to no frame, since the beginning.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn skip(&mut self, bytes: usize) {
        let bytes = bytes.min(self.buf.len());
        self.buf.advance(bytes);
        self.skipped = self.skipped.saturating_add(bytes as u64);
    }

    fn step(&mut self) -> Step {
        let garbage = garbage_before_magic(&self.buf);
        if garbage > 0 {
            self.skip(garbage);
        }
        if self.buf.len() < HEADER_LEN {
            return Step::Need(HEADER_LEN - self.buf.len());
        }
        let Some(header) = Header::parse(&self.buf[..HEADER_LEN]) else {
            self.skip(1);
            return Step::Again;
        };
        let total = HEADER_LEN + header.len + TRAILER_LEN;
        if self.buf.len() < total {
            return Step::Need(total - self.buf.len());
        }
        let payload = &self.buf[HEADER_LEN..HEADER_LEN + header.len];
        let crc = (&self.buf[HEADER_LEN + header.len..total]).get_u32_le();
        if crc32fast::hash(payload) != crc {
            // Bytes were lost inside: the next frame may have begun within this one's length.
            self.skip(1);
            return Step::Again;
        }
        self.buf.advance(HEADER_LEN);
        let payload = self.buf.split_to(header.len).freeze();
        self.buf.advance(TRAILER_LEN);
        Step::Frame(Frame {
            payload,
            ..header.frame
        })
    }
}

enum Step {
    Frame(Frame),
    Need(usize),
    Again,
}

struct Header {
    frame: Frame,
    len: usize,
}

impl Header {
    /// `None` when this is no header we can trust.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (covered, mut crc) = bytes.split_at(HEADER_LEN - 4);
        if crc32fast::hash(&covered[MAGIC.len()..]) != crc.get_u32_le() {
            return None;
        }
        let mut rest = &covered[MAGIC.len()..];
        let version = rest.get_u8();
        let frame = Frame {
            kind: Kind(rest.get_u8()),
            flags: rest.get_u16_le(),
            link: rest.get_u32_le(),
            stream: rest.get_u32_le(),
            seq: rest.get_u64_le(),
            ack: rest.get_u64_le(),
            waited_us: rest.get_u64_le(),
            payload: Bytes::new(),
        };
        let len = rest.get_u32_le() as usize;
        (version == VERSION && len <= MAX_PAYLOAD).then_some(Self { frame, len })
    }
}

/// How many bytes at the front cannot be the beginning of a magic.
fn garbage_before_magic(buf: &[u8]) -> usize {
    let mut at = 0;
    while at < buf.len() {
        let rest = &buf[at..];
        let known = rest.len().min(MAGIC.len());
        if rest[..known] == MAGIC[..known] {
            return at;
        }
        at += 1;
    }
    buf.len()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn frame(seq: u64, payload: Vec<u8>) -> Frame {
        Frame {
            kind: Kind::DATA,
            flags: FLAG_SEQUENCED,
            link: 7,
            stream: 3,
            seq,
            ack: seq / 2,
            waited_us: 11,
            payload: payload.into(),
        }
    }

    fn decode_all(decoder: &mut Decoder, mut input: &[u8]) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.decode(&mut input)).collect()
    }

    #[test]
    fn header_has_the_documented_length() {
        let mut out = BytesMut::new();
        frame(1, Vec::new()).encode(&mut out);
        assert_eq!(out.len(), HEADER_LEN + TRAILER_LEN);
    }

    #[test]
    fn a_length_beyond_the_cap_is_not_a_frame() {
        let mut out = BytesMut::new();
        frame(1, Vec::new()).encode(&mut out);
        out[40..44].copy_from_slice(&u32::MAX.to_le_bytes());
        let crc = crc32fast::hash(&out[4..44]);
        out[44..48].copy_from_slice(&crc.to_le_bytes());
        let mut decoder = Decoder::default();
        assert!(decode_all(&mut decoder, &out).is_empty());
        assert!(!decoder.partial(), "nothing may be waited for");
    }

    #[test]
    fn a_cut_frame_hides_later_ones_only_until_abandoned() {
        let (mut cut, mut whole) = (BytesMut::new(), BytesMut::new());
        frame(1, vec![9; 5000]).encode(&mut cut);
        frame(2, vec![1, 2, 3]).encode(&mut whole);
        let mut wire = cut[..100].to_vec();
        wire.extend_from_slice(&whole);
        let mut decoder = Decoder::default();
        assert!(decode_all(&mut decoder, &wire).is_empty());
        assert!(decoder.partial());
        decoder.abandon();
        assert_eq!(decode_all(&mut decoder, &[]), [frame(2, vec![1, 2, 3])]);
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(payloads in vec(vec(any::<u8>(), 0..600), 0..12), cut in 1usize..97) {
            let frames: Vec<_> = payloads.into_iter().enumerate().map(|(i, p)| frame(i as u64, p)).collect();
            let mut wire = BytesMut::new();
            frames.iter().for_each(|f| f.encode(&mut wire));
            let mut decoder = Decoder::default();
            let got: Vec<_> = wire.chunks(cut).flat_map(|c| decode_all(&mut decoder, c)).collect();
            prop_assert_eq!(got, frames);
            prop_assert_eq!(decoder.skipped(), 0);
        }

        #[test]
        fn random_bytes_never_panic_or_grow(input in vec(vec(any::<u8>(), 0..4000), 0..40)) {
            let mut decoder = Decoder::default();
            for chunk in input {
                decode_all(&mut decoder, &chunk);
                prop_assert!(decoder.buf.len() < MAX_FRAME);
            }
        }

        /// Whatever happens to some bytes, every untouched frame is found again.
        #[test]
        fn damage_costs_only_the_damaged(
            payloads in vec(vec(any::<u8>(), 0..300), 1..10),
            flips in vec((any::<prop::sample::Index>(), 1u8..), 0..6),
            garbage in vec(any::<u8>(), 0..200),
        ) {
            let mut wire = Vec::from(&garbage[..]);
            let mut ranges = Vec::new();
            for (i, payload) in payloads.iter().enumerate() {
                let mut one = BytesMut::new();
                frame(i as u64, payload.clone()).encode(&mut one);
                ranges.push(wire.len()..wire.len() + one.len());
                wire.extend_from_slice(&one);
            }
            let mut hit = Vec::new();
            for (at, with) in flips {
                let at = at.index(wire.len());
                wire[at] ^= with;
                hit.push(at);
            }
            let mut decoder = Decoder::default();
            let mut got = decode_all(&mut decoder, &wire);
            while decoder.partial() {
                decoder.abandon();
                got.extend(decode_all(&mut decoder, &[]));
            }
            for (i, range) in ranges.iter().enumerate() {
                if !hit.iter().any(|at| range.contains(at)) {
                    prop_assert!(got.iter().any(|f| f.seq == i as u64), "frame {} lost", i);
                }
            }
        }
    }
}
