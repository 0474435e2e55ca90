//! Telling files.
use std::{
    fs::File,
    hash::Hasher,
    io::{self, Write},
};

use twox_hash::XxHash64;
use zstd::bulk::Compressor;

use super::{
    BLOCK, CODEC_RAW, CODEC_ZSTD, DATA, DATA_HEADER, END, FILE, FILE_END, MAGIC, MAX_FILE,
    MAX_FILES, RECORD_HEADER, StreamError, StreamFault, VERSION, block_length, is_plain,
};
use crate::sparse;

/// Of zstd: the stream is to be no slower than a network.
const LEVEL: i32 = 1;

/// Where the bytes of a file come from that is told.
pub trait Source {
    /// Fills `block` with what is at `offset`, a multiple of [`BLOCK`]. `false`, with any content, when all of it
    /// is zeros.
    ///
    /// # Errors
    /// When it cannot be read, or ends before the block does.
    fn read(&mut self, offset: u64, block: &mut [u8]) -> io::Result<bool>;

    /// Asked after a block of zeros at `offset`: nothing but zeros comes before the answer; `None`: to the end.
    ///
    /// # Errors
    /// When it cannot be told.
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>>;
}

struct SparseFile<'a>(&'a File);

impl Source for SparseFile<'_> {
    fn read(&mut self, offset: u64, block: &mut [u8]) -> io::Result<bool> {
        sparse::read(self.0, offset, block)
    }

    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        sparse::next_data(self.0, offset)
    }
}

/// Writes a stream. Nothing is a stream before [`StreamWriter::finish`].
pub struct StreamWriter<W> {
    inner: W,
    compressor: Compressor<'static>,
    /// The record that is being made.
    record: Vec<u8>,
    records: u64,
    at: u64,
    all: XxHash64,
    names: Vec<String>,
}

impl<W: Write> StreamWriter<W> {
    /// # Errors
    /// [`StreamError::Write`], [`StreamError::Encoder`].
    pub fn new(inner: W) -> Result<Self, StreamError> {
        let compressor =
            Compressor::new(LEVEL).map_err(|source| StreamError::Encoder { source })?;
        let mut writer = Self {
            inner,
            compressor,
            record: Vec::with_capacity(RECORD_HEADER + DATA_HEADER + BLOCK + 8),
            records: 0,
            at: 0,
            all: XxHash64::with_seed(0),
            names: Vec::new(),
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        Ok(writer)
    }

    /// Tells `bytes` as a file of that name.
    ///
    /// # Errors
    /// As [`StreamWriter::file`].
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), StreamError> {
        self.begin(name, bytes.len() as u64)?;
        let mut content = Content::default();
        for (number, block) in bytes.chunks(BLOCK).enumerate() {
            self.block(&mut content, (number * BLOCK) as u64, block)?;
        }
        self.end(&content)
    }

    /// Tells the first `size` bytes of `file`. Holes and blocks of zeros are left out. Nobody may write to it
    /// meanwhile.
    ///
    /// # Errors
    /// As [`StreamWriter::source`].
    pub fn file(&mut self, name: &str, file: &File, size: u64) -> Result<(), StreamError> {
        self.source(name, size, &mut SparseFile(file))
    }

    /// Tells the first `size` bytes of whatever can be read block by block, as a file of that name.
    ///
    /// # Errors
    /// [`StreamError::Broken`] for a name or size that no reader takes, [`StreamError::Source`],
    /// [`StreamError::Write`].
    pub fn source(
        &mut self,
        name: &str,
        size: u64,
        source: &mut dyn Source,
    ) -> Result<(), StreamError> {
        self.begin(name, size)?;
        let mut content = Content::default();
        let mut buffer = vec![0; BLOCK.min(usize::try_from(size).unwrap_or(BLOCK))];
        let mut offset = 0;
        while let Some(length) = block_length(offset, size) {
            let block = &mut buffer[..length];
            let failed = |source| StreamError::Source {
                name: name.to_owned(),
                offset,
                source,
            };
            if source.read(offset, block).map_err(failed)? {
                self.block(&mut content, offset, block)?;
                offset += BLOCK as u64;
            } else {
                let data = source.next_data(offset).map_err(failed)?;
                let data = data.unwrap_or(size).min(size);
                // The block that holds it, and always the next one at least.
                offset = (data - data % BLOCK as u64).max(offset + BLOCK as u64);
            }
        }
        self.end(&content)
    }

    /// Ends the stream and gives back where it went, flushed.
    ///
    /// # Errors
    /// [`StreamError::Write`].
    pub fn finish(mut self) -> Result<W, StreamError> {
        let mut payload = [0; 12];
        // At most MAX_FILES.
        payload[..4].copy_from_slice(&(self.names.len() as u32).to_le_bytes());
        payload[4..].copy_from_slice(&self.all.finish().to_le_bytes());
        self.small(END, &payload)?;
        self.inner
            .flush()
            .map_err(|source| StreamError::Write { source })?;
        Ok(self.inner)
    }

    fn begin(&mut self, name: &str, size: u64) -> Result<(), StreamError> {
        let fault = match () {
            () if !is_plain(name) => Some(StreamFault::Name(name.to_owned())),
            () if self.names.iter().any(|told| told == name) => Some(StreamFault::Duplicate),
            () if self.names.len() == MAX_FILES => {
                Some(StreamFault::Order("it has too many files"))
            }
            () if size > MAX_FILE => Some(StreamFault::Size {
                claimed: size,
                cap: MAX_FILE,
            }),
            () => None,
        };
        if let Some(fault) = fault {
            return Err(StreamError::Broken {
                at: self.at,
                file: Some(name.to_owned()),
                fault,
            });
        }
        self.names.push(name.to_owned());
        let payload = [&size.to_le_bytes(), name.as_bytes()].concat();
        self.small(FILE, &payload)
    }

    fn block(&mut self, content: &mut Content, offset: u64, raw: &[u8]) -> Result<(), StreamError> {
        if sparse::is_zero(raw) {
            return Ok(());
        }
        content.add(offset, raw);
        self.record.clear();
        self.record.extend_from_slice(&[DATA, 0, 0, 0, 0]);
        self.record.extend_from_slice(&offset.to_le_bytes());
        // At most BLOCK.
        self.record
            .extend_from_slice(&(raw.len() as u32).to_le_bytes());
        self.record.push(CODEC_ZSTD);
        let begin = self.record.len();
        // One byte too few for what does not get smaller.
        self.record.resize(begin + raw.len() - 1, 0);
        let packed = self
            .compressor
            .compress_to_buffer(raw, &mut self.record[begin..]);
        if let Ok(length) = packed {
            self.record.truncate(begin + length);
        } else {
            self.record.truncate(begin);
            self.record[begin - 1] = CODEC_RAW;
            self.record.extend_from_slice(raw);
        }
        self.record()
    }

    fn end(&mut self, content: &Content) -> Result<(), StreamError> {
        let mut payload = [0; 16];
        payload[..8].copy_from_slice(&content.blocks.to_le_bytes());
        payload[8..].copy_from_slice(&content.hash.finish().to_le_bytes());
        self.small(FILE_END, &payload)
    }

    fn small(&mut self, kind: u8, payload: &[u8]) -> Result<(), StreamError> {
        self.record.clear();
        self.record.extend_from_slice(&[kind, 0, 0, 0, 0]);
        self.record.extend_from_slice(payload);
        self.record()
    }

    /// Completes the record with length and checksum and writes it.
    fn record(&mut self) -> Result<(), StreamError> {
        let mut record = std::mem::take(&mut self.record);
        // At most max_payload.
        let length = (record.len() - RECORD_HEADER) as u32;
        record[1..RECORD_HEADER].copy_from_slice(&length.to_le_bytes());
        let checksum = XxHash64::oneshot(self.records, &record);
        record.extend_from_slice(&checksum.to_le_bytes());
        self.records += 1;
        let written = self.put(&record);
        self.record = record;
        written
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.all.write(bytes);
        self.at += bytes.len() as u64;
        self.inner
            .write_all(bytes)
            .map_err(|source| StreamError::Write { source })
    }
}

/// What a file's FILE_END says.
pub(super) struct Content {
    pub blocks: u64,
    hash: XxHash64,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            blocks: 0,
            hash: XxHash64::with_seed(0),
        }
    }
}

impl Content {
    pub fn add(&mut self, offset: u64, raw: &[u8]) {
        self.blocks += 1;
        self.hash.write(&offset.to_le_bytes());
        self.hash.write(raw);
    }

    pub fn finish(&self) -> u64 {
        self.hash.finish()
    }
}
