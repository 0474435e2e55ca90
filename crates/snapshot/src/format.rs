//! What is at the end of an artefact: who made it, and where each chunk is. Pure; no file is touched.
//!
//! All numbers are little-endian.
//!
//! ```text
//!  artefact    data frame, one per chunk | info frame | seek table frame
//!
//!  info frame  u32 0x184D2A5D   skippable, so plain tools pass over it
//!              u32 44           length of what follows
//!              "DOZEMEM\0"
//!              u8 version (1) | u8 algorithm (1 zstd, 2 lz4) | u8 level | u8 log2 of the chunk size
//!              u32 data frames
//!              u64 raw size
//!              u32 chunks that are all zeros
//!              u64 XXH64 of the data frames' seek table entries
//!              u64 XXH64 of the payload up to here
//!
//!  seek table  u32 0x184D2A5E
//!              u32 length of what follows
//!              entries: u32 compressed size | u32 raw size | u32 checksum, one per frame, the info frame's
//!                       (52, 0, hash of nothing) last
//!              u32 entries | u8 0x80 (entries have checksums) | u32 magic
//! ```
//!
//! For zstd that is exactly the published seekable format 0.1.0 (zstd's
//! `contrib/seekable_format/zstd_seekable_compression_format.md`; magic 0x8F92EAB1, checksum = low half of
//! XXH64), so its readers find the chunks too. For LZ4, which has none, the same layout with the magic
//! `DLZ4`, and XXH32 as checksum, as in LZ4 frames. In both cases the entry's checksum is the one that ends
//! the data frame, so the content is hashed once.
//!
//! A raw file of no bytes is one frame of nothing: a file without any data frame is not what all tools
//! take for a compressed file.
use twox_hash::{XxHash32, XxHash64};

use crate::{
    error::Fault,
    fields::Fields,
    options::{Algorithm, ChunkSize, Codec},
};

/// Data frames at most, in one artefact: 1 TiB of memory in chunks of the default size.
pub const MAX_FRAMES: u64 = 1 << 20;
/// Bytes at most that are allocated for the end of an artefact: the bytes themselves and what is made of
/// them.
pub const MAX_TABLE_MEMORY: u64 = MAX_FRAMES * (ENTRY + size_of::<Entry>()) as u64 + 4096;
/// The seek table's last bytes, which say how long it is.
pub const FOOTER: usize = 9;

const VERSION: u8 = 1;
const SKIPPABLE_INFO: u32 = 0x184D_2A5D;
const SKIPPABLE_TABLE: u32 = 0x184D_2A5E;
const ZSTD_SEEKABLE: u32 = 0x8F92_EAB1;
const LZ4_SEEKABLE: u32 = u32::from_le_bytes(*b"DLZ4");
const HAS_CHECKSUMS: u8 = 0x80;
const MAGIC: &[u8; 8] = b"DOZEMEM\0";
const ENTRY: usize = 12;
const SKIPPABLE_HEADER: usize = 8;
const INFO_PAYLOAD: usize = 44;
const INFO_FRAME: usize = SKIPPABLE_HEADER + INFO_PAYLOAD;

/// Largest frame for a chunk of this size: both algorithms store what they cannot shrink, with a few bytes
/// around it (zstd `ZSTD_COMPRESSBOUND`; LZ4 frame format: 4 per block and up to 27).
pub const fn max_frame(chunk_size: ChunkSize) -> u64 {
    chunk_size.bytes() + chunk_size.bytes() / 64 + 1024
}

/// Checksum of a chunk's raw content, as its frame and the seek table carry it.
pub fn checksum(algorithm: Algorithm, raw: &[u8]) -> u32 {
    match algorithm {
        // "the least significant 32 bits of the XXH64 digest": what zstd ends its frames with too.
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the low half is what is asked for"
        )]
        Algorithm::Zstd => XxHash64::oneshot(0, raw) as u32,
        Algorithm::Lz4 => XxHash32::oneshot(0, raw),
    }
}

/// One chunk in the artefact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where its frame begins.
    pub offset: u64,
    /// Length of its frame, at most [`max_frame`].
    pub compressed: u32,
    /// Of its raw content.
    pub checksum: u32,
}

/// Everything the end of an artefact says, checked against itself and the file's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeekTable {
    pub codec: Codec,
    pub chunk_size: ChunkSize,
    pub raw_size: u64,
    pub zero_chunks: u32,
    pub entries: Vec<Entry>,
}

/// How many chunks a raw file has; never 0, see the module.
pub const fn chunk_count(raw_size: u64, chunk_size: ChunkSize) -> u64 {
    let count = raw_size.div_ceil(chunk_size.bytes());
    if count == 0 { 1 } else { count }
}

/// Bytes in chunk `index` of a raw file: the chunk size, less in the last one.
pub fn chunk_length(raw_size: u64, chunk_size: ChunkSize, index: u64) -> usize {
    let rest = raw_size.saturating_sub(index.saturating_mul(chunk_size.bytes()));
    usize::try_from(rest).map_or(chunk_size.len(), |rest| rest.min(chunk_size.len()))
}

/// What the last [`FOOTER`] bytes say about the end of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    pub algorithm: Algorithm,
    /// Bytes of info and seek table frame together, at the end of the file. At most what
    /// [`MAX_TABLE_MEMORY`] allows for, and not more than the file has.
    pub length: usize,
    frames: u32,
}

impl Tail {
    /// Reads a file's last bytes and sets how many more to read, before anything is allocated.
    ///
    /// # Errors
    /// [`Fault::NoSeekTable`] when it is none of ours, [`Fault::Cap`] when it claims too much, and
    /// [`Fault::Table`] when it cannot be true.
    pub fn parse(footer: &[u8; FOOTER], file_size: u64) -> Result<Tail, Fault> {
        let mut fields = Fields(footer);
        let (Some(count), Some(flags), Some(magic)) = (fields.u32(), fields.u8(), fields.u32())
        else {
            return Err(Fault::NoSeekTable);
        };
        let algorithm = match magic {
            ZSTD_SEEKABLE => Algorithm::Zstd,
            LZ4_SEEKABLE => Algorithm::Lz4,
            _ => return Err(Fault::NoSeekTable),
        };
        if flags != HAS_CHECKSUMS {
            return Err(Fault::Table("its descriptor is not 0x80"));
        }
        let Some(frames) = count.checked_sub(1).filter(|frames| *frames > 0) else {
            return Err(Fault::Table("it has no entry for a chunk"));
        };
        if u64::from(frames) > MAX_FRAMES {
            return Err(Fault::Cap {
                what: "chunks",
                claimed: frames.into(),
                cap: MAX_FRAMES,
            });
        }
        let length = INFO_FRAME + SKIPPABLE_HEADER + ENTRY * (frames as usize + 1) + FOOTER;
        if length as u64 > file_size {
            return Err(Fault::Table("it is longer than the file"));
        }
        Ok(Tail {
            algorithm,
            length,
            frames,
        })
    }
}

impl SeekTable {
    /// Reads the last [`Tail::length`] bytes of a file of `file_size` bytes.
    ///
    /// # Errors
    /// Whatever disagrees: with a checksum, with itself, or with the size of the file.
    pub fn parse(tail: Tail, bytes: &[u8], file_size: u64) -> Result<SeekTable, Fault> {
        let mut fields = Fields(bytes);
        let (Some(info), Some(table)) = (
            fields.bytes(INFO_FRAME),
            fields.bytes(tail.length - INFO_FRAME),
        ) else {
            return Err(Fault::NoSeekTable);
        };
        let entries = table_entries(table)?;
        let (chunk_entries, info_entry) = entries
            .split_at_checked(ENTRY * tail.frames as usize)
            .ok_or(Fault::Table("it is too short"))?;
        let info = Info::parse(info, tail, chunk_entries)?;
        if *info_entry != entry(INFO_FRAME as u32, 0, checksum(tail.algorithm, &[])) {
            return Err(Fault::Table("its last entry is not the info frame's"));
        }
        let entries = info.entries(chunk_entries)?;
        let end = entries
            .last()
            .map_or(0, |last| last.offset + u64::from(last.compressed));
        if end.checked_add(tail.length as u64) != Some(file_size) {
            return Err(Fault::Table(
                "the frames' sizes do not add up to the file's",
            ));
        }
        Ok(SeekTable {
            codec: info.codec,
            chunk_size: info.chunk_size,
            raw_size: info.raw_size,
            zero_chunks: info.zero_chunks,
            entries,
        })
    }

    /// Length of chunk `index` in the raw file.
    pub fn chunk_length(&self, index: u64) -> usize {
        chunk_length(self.raw_size, self.chunk_size, index)
    }
}

/// The entries between the table's header and footer.
fn table_entries(table: &[u8]) -> Result<&[u8], Fault> {
    let mut fields = Fields(table);
    if fields.u32() != Some(SKIPPABLE_TABLE) {
        return Err(Fault::Table("its magic number is wrong"));
    }
    if fields.u32().map(u64::from) != Some((table.len() - SKIPPABLE_HEADER) as u64) {
        return Err(Fault::Table(
            "its length and its number of entries disagree",
        ));
    }
    fields
        .bytes(table.len() - SKIPPABLE_HEADER - FOOTER)
        .ok_or(Fault::Table("it is too short"))
}

fn entry(compressed: u32, raw: u32, checksum: u32) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..4].copy_from_slice(&compressed.to_le_bytes());
    bytes[4..8].copy_from_slice(&raw.to_le_bytes());
    bytes[8..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

struct Info {
    codec: Codec,
    chunk_size: ChunkSize,
    raw_size: u64,
    zero_chunks: u32,
}

impl Info {
    fn parse(frame: &[u8], tail: Tail, chunk_entries: &[u8]) -> Result<Info, Fault> {
        let mut fields = Fields(frame);
        if fields.u32() != Some(SKIPPABLE_INFO) || fields.u32() != Some(INFO_PAYLOAD as u32) {
            return Err(Fault::Info("its header is wrong"));
        }
        let payload = fields.0;
        if fields.bytes(MAGIC.len()) != Some(MAGIC) {
            return Err(Fault::NoSeekTable);
        }
        let short = || Fault::Info("it is too short");
        let version = fields.u8().ok_or_else(short)?;
        if version != VERSION {
            return Err(Fault::Version {
                found: version,
                known: VERSION,
            });
        }
        let hashed = payload.get(..INFO_PAYLOAD - 8).ok_or_else(short)?;
        if Fields(&payload[hashed.len()..]).u64() != Some(XxHash64::oneshot(0, hashed)) {
            return Err(Fault::Info("its checksum is wrong"));
        }
        let algorithm = fields.u8().ok_or_else(short)?;
        let level = fields.u8().ok_or_else(short)?;
        let log2 = fields.u8().ok_or_else(short)?;
        let frames = fields.u32().ok_or_else(short)?;
        let raw_size = fields.u64().ok_or_else(short)?;
        let zero_chunks = fields.u32().ok_or_else(short)?;
        let entries_hash = fields.u64().ok_or_else(short)?;
        if algorithm != algorithm_number(tail.algorithm) {
            return Err(Fault::Info("its algorithm is not the seek table's"));
        }
        let codec = Codec::new(tail.algorithm, Some(level.into()))
            .map_err(|_| Fault::Info("its level does not exist"))?;
        let chunk_size =
            ChunkSize::from_log2(log2).ok_or(Fault::Info("its chunk size is not supported"))?;
        if frames != tail.frames || chunk_count(raw_size, chunk_size) != u64::from(frames) {
            return Err(Fault::Info(
                "its raw size and the number of frames disagree",
            ));
        }
        if zero_chunks > frames {
            return Err(Fault::Info(
                "it counts more zero chunks than there are chunks",
            ));
        }
        if entries_hash != XxHash64::oneshot(0, chunk_entries) {
            return Err(Fault::Table("its checksum is wrong"));
        }
        Ok(Info {
            codec,
            chunk_size,
            raw_size,
            zero_chunks,
        })
    }

    fn entries(&self, bytes: &[u8]) -> Result<Vec<Entry>, Fault> {
        let mut entries = Vec::with_capacity(bytes.len() / ENTRY);
        let mut fields = Fields(bytes);
        let mut offset = 0;
        while let (Some(compressed), Some(raw), Some(checksum)) =
            (fields.u32(), fields.u32(), fields.u32())
        {
            if compressed == 0 || u64::from(compressed) > max_frame(self.chunk_size) {
                return Err(Fault::Cap {
                    what: "bytes for one frame",
                    claimed: compressed.into(),
                    cap: max_frame(self.chunk_size),
                });
            }
            let expected = chunk_length(self.raw_size, self.chunk_size, entries.len() as u64);
            if u64::from(raw) != expected as u64 {
                return Err(Fault::Table("a chunk's raw size is wrong"));
            }
            entries.push(Entry {
                offset,
                compressed,
                checksum,
            });
            offset += u64::from(compressed);
        }
        Ok(entries)
    }
}

fn algorithm_number(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::Zstd => 1,
        Algorithm::Lz4 => 2,
    }
}

/// Collects the entries of an artefact while its frames are written, in order.
#[derive(Debug)]
pub struct TableWriter {
    codec: Codec,
    chunk_size: ChunkSize,
    raw_size: u64,
    zero_chunks: u32,
    entries: Vec<u8>,
}

impl TableWriter {
    pub fn new(codec: Codec, chunk_size: ChunkSize, raw_size: u64) -> Self {
        Self {
            codec,
            chunk_size,
            raw_size,
            zero_chunks: 0,
            entries: Vec::new(),
        }
    }

    /// The next data frame.
    pub fn push(&mut self, compressed: u32, checksum: u32, zero: bool) {
        let index = (self.entries.len() / ENTRY) as u64;
        let raw = chunk_length(self.raw_size, self.chunk_size, index);
        self.entries
            .extend_from_slice(&entry(compressed, raw as u32, checksum));
        self.zero_chunks += u32::from(zero);
    }

    /// Info frame and seek table frame, which end the file.
    pub fn finish(self) -> Vec<u8> {
        let frames = (self.entries.len() / ENTRY) as u32;
        let mut out =
            Vec::with_capacity(INFO_FRAME + SKIPPABLE_HEADER + self.entries.len() + ENTRY + FOOTER);
        out.extend_from_slice(&SKIPPABLE_INFO.to_le_bytes());
        out.extend_from_slice(&(INFO_PAYLOAD as u32).to_le_bytes());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&[
            VERSION,
            algorithm_number(self.codec.algorithm()),
            self.codec.level(),
            self.chunk_size.log2(),
        ]);
        out.extend_from_slice(&frames.to_le_bytes());
        out.extend_from_slice(&self.raw_size.to_le_bytes());
        out.extend_from_slice(&self.zero_chunks.to_le_bytes());
        out.extend_from_slice(&XxHash64::oneshot(0, &self.entries).to_le_bytes());
        let hash = XxHash64::oneshot(0, &out[SKIPPABLE_HEADER..]);
        out.extend_from_slice(&hash.to_le_bytes());

        out.extend_from_slice(&SKIPPABLE_TABLE.to_le_bytes());
        let length = self.entries.len() + ENTRY + FOOTER;
        out.extend_from_slice(&(length as u32).to_le_bytes());
        out.extend_from_slice(&self.entries);
        let nothing = checksum(self.codec.algorithm(), &[]);
        out.extend_from_slice(&entry(INFO_FRAME as u32, 0, nothing));
        out.extend_from_slice(&(frames + 1).to_le_bytes());
        out.push(HAS_CHECKSUMS);
        let magic = match self.codec.algorithm() {
            Algorithm::Zstd => ZSTD_SEEKABLE,
            Algorithm::Lz4 => LZ4_SEEKABLE,
        };
        out.extend_from_slice(&magic.to_le_bytes());
        out
    }
}
