//! Taking files, believing nothing.
use std::{
    fs::File,
    hash::Hasher,
    io::{self, Read},
};

use twox_hash::XxHash64;
use zstd::bulk::Decompressor;

use super::{
    BLOCK, CODEC_RAW, CODEC_ZSTD, DATA, DATA_HEADER, END, FILE, FILE_END, MAGIC, MAX_FILE,
    MAX_FILES, RECORD_HEADER, StreamError, StreamFault, VERSION, block_length, is_plain,
    max_payload, write::Content,
};
use crate::{fields::Fields, sparse};

/// Reads a stream: [`StreamReader::next_file`], then [`StreamReader::next_block`] until there is none, and so on.
/// What was read is only good when `next_file` has answered `None`.
pub struct StreamReader<R> {
    inner: R,
    decompressor: Decompressor<'static>,
    /// The record that was read last, whole.
    record: Vec<u8>,
    raw: Vec<u8>,
    records: u64,
    /// Bytes read.
    at: u64,
    all: XxHash64,
    names: Vec<String>,
    file: Option<Taking>,
    ended: bool,
}

/// The file whose blocks come.
struct Taking {
    size: u64,
    /// No block may begin before.
    next: u64,
    content: Content,
}

/// A file begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHeader {
    /// One plain component, told once in a stream.
    pub name: String,
    /// Bytes, claimed: at most [`MAX_FILE`].
    pub size: u64,
}

/// One block of a file. What no block tells is zeros.
#[derive(Debug)]
pub struct Block<'a> {
    /// Offsets grow, and a block ends inside its file.
    pub offset: u64,
    pub bytes: &'a [u8],
}

impl Block<'_> {
    /// Writes it to a file whose range there is a hole; pages of zeros stay holes.
    ///
    /// # Errors
    /// Of the file.
    pub fn write_to(&self, file: &File) -> io::Result<()> {
        sparse::write(file, self.offset, self.bytes)
    }
}

impl<R: Read> StreamReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`StreamError::Broken`] for what is no stream of this version, [`StreamError::Read`].
    pub fn new(inner: R) -> Result<Self, StreamError> {
        let decompressor = Decompressor::new().map_err(|source| StreamError::Encoder { source })?;
        let mut reader = Self {
            inner,
            decompressor,
            record: Vec::new(),
            raw: Vec::new(),
            records: 0,
            at: 0,
            all: XxHash64::with_seed(0),
            names: Vec::new(),
            file: None,
            ended: false,
        };
        let mut header = [0; MAGIC.len() + 2];
        let got = reader.fill(&mut header)?;
        let begin = got.min(MAGIC.len());
        if got == 0 || header[..begin] != MAGIC[..begin] {
            return Err(reader.broken(0, StreamFault::Magic));
        }
        if got < header.len() {
            return Err(reader.broken(reader.at, StreamFault::Truncated));
        }
        let found = u16::from_le_bytes([header[14], header[15]]);
        if found != VERSION {
            return Err(reader.broken(0, StreamFault::Version { found }));
        }
        reader.all.write(&header);
        Ok(reader)
    }

    /// The next file; blocks of the one before that were not asked for are read over. `None` when the stream is at
    /// its end and whole.
    ///
    /// # Errors
    /// [`StreamError::Broken`], [`StreamError::Read`]. After an error the reader is of no use.
    pub fn next_file(&mut self) -> Result<Option<FileHeader>, StreamError> {
        while self.next_block()?.is_some() {}
        if self.ended {
            return Ok(None);
        }
        let before = self.all.clone();
        let (kind, at) = self.record()?;
        match kind {
            FILE => self.begin(at).map(Some),
            END => self.end(at, &before).map(|()| None),
            _ => Err(self.broken(at, StreamFault::Order("no file is open here"))),
        }
    }

    /// The next block of the file, checked; `None` when the file is at its end and whole.
    ///
    /// # Errors
    /// As [`StreamReader::next_file`].
    pub fn next_block(&mut self) -> Result<Option<Block<'_>>, StreamError> {
        if self.file.is_none() {
            return Ok(None);
        }
        let (kind, at) = self.record()?;
        match kind {
            DATA => self.block(at).map(Some),
            FILE_END => self.end_file(at).map(|()| None),
            _ => Err(self.broken(at, StreamFault::Order("the file before is not at its end"))),
        }
    }

    /// All of the file that has just begun, which is small.
    ///
    /// # Errors
    /// As [`StreamReader::next_file`]; [`StreamFault::Size`] beyond `cap` bytes.
    pub fn small(&mut self, header: &FileHeader, cap: usize) -> Result<Vec<u8>, StreamError> {
        let Some(size) = usize::try_from(header.size).ok().filter(|s| *s <= cap) else {
            let fault = StreamFault::Size {
                claimed: header.size,
                cap: cap as u64,
            };
            return Err(self.broken(self.at, fault));
        };
        let mut content = vec![0; size];
        while let Some(block) = self.next_block()? {
            // Both inside the file, whose size fits.
            let begin = block.offset as usize;
            content[begin..begin + block.bytes.len()].copy_from_slice(block.bytes);
        }
        Ok(content)
    }

    fn begin(&mut self, at: u64) -> Result<FileHeader, StreamError> {
        let payload = self.payload();
        let mut fields = Fields(payload);
        let Some(size) = fields.u64() else {
            return Err(self.wrong_length(at, "9 to 72"));
        };
        let name = String::from_utf8_lossy(fields.0).into_owned();
        let fault = match () {
            () if !is_plain(&name) => Some(StreamFault::Name(name.clone())),
            () if self.names.len() == MAX_FILES => {
                Some(StreamFault::Order("it brings too many files"))
            }
            () if self.names.contains(&name) => Some(StreamFault::Duplicate),
            () if size > MAX_FILE => Some(StreamFault::Size {
                claimed: size,
                cap: MAX_FILE,
            }),
            () => None,
        };
        if let Some(fault) = fault {
            return Err(StreamError::Broken {
                at,
                file: is_plain(&name).then_some(name),
                fault,
            });
        }
        self.names.push(name.clone());
        self.file = Some(Taking {
            size,
            next: 0,
            content: Content::default(),
        });
        Ok(FileHeader { name, size })
    }

    fn block(&mut self, at: u64) -> Result<Block<'_>, StreamError> {
        let mut fields = Fields(self.payload());
        let (Some(offset), Some(length), Some(codec)) = (fields.u64(), fields.u32(), fields.u8())
        else {
            return Err(self.wrong_length(at, "14 to 1048589"));
        };
        let Some(file) = &mut self.file else {
            return Err(self.broken(at, StreamFault::Order("no file is open here")));
        };
        let whole = block_length(offset, file.size);
        if offset < file.next || whole != usize::try_from(length).ok() {
            let size = file.size;
            let length = u64::from(length);
            return Err(self.broken(
                at,
                StreamFault::Block {
                    offset,
                    length,
                    size,
                },
            ));
        }
        let length = whole.unwrap_or_default();
        let payload = &self.record[RECORD_HEADER + DATA_HEADER..];
        let unpacked = match codec {
            CODEC_RAW if payload.len() == length => {
                self.raw.clear();
                self.raw.extend_from_slice(payload);
                Ok(())
            }
            CODEC_RAW => Err("it is shorter or longer than it says".to_owned()),
            CODEC_ZSTD => {
                self.raw.resize(length, 0);
                let got = self
                    .decompressor
                    .decompress_to_buffer(payload, &mut self.raw[..]);
                match got {
                    Ok(got) if got == length => Ok(()),
                    Ok(_) => Err("it is shorter than it says".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            }
            _ => Err(format!("codec {codec} does not exist")),
        };
        if let Err(reason) = unpacked {
            return Err(self.broken(at, StreamFault::Codec(reason)));
        }
        file.next = offset + BLOCK as u64;
        file.content.add(offset, &self.raw);
        Ok(Block {
            offset,
            bytes: &self.raw,
        })
    }

    fn end_file(&mut self, at: u64) -> Result<(), StreamError> {
        let mut fields = Fields(self.payload());
        let (Some(blocks), Some(content), []) = (fields.u64(), fields.u64(), fields.0) else {
            return Err(self.wrong_length(at, "16"));
        };
        let fault = match &self.file {
            Some(file) if file.content.blocks != blocks => "a block is missing or too many",
            Some(file) if file.content.finish() != content => "its checksum is another",
            Some(_) | None => {
                self.file = None;
                return Ok(());
            }
        };
        Err(self.broken(at, StreamFault::Content(fault)))
    }

    fn end(&mut self, at: u64, before: &XxHash64) -> Result<(), StreamError> {
        let mut fields = Fields(self.payload());
        let (Some(files), Some(all), []) = (fields.u32(), fields.u64(), fields.0) else {
            return Err(self.wrong_length(at, "12"));
        };
        let fault = match () {
            () if u64::from(files) != self.names.len() as u64 => "a file is missing or too many",
            () if all != before.finish() => "its checksum is another",
            () => {
                let end = self.at;
                if self.fill(&mut [0])? != 0 {
                    return Err(self.broken(end, StreamFault::Trailing));
                }
                self.ended = true;
                return Ok(());
            }
        };
        Err(self.broken(at, StreamFault::All(fault)))
    }

    /// Reads one record whole and checks its checksum; kind and place.
    fn record(&mut self) -> Result<(u8, u64), StreamError> {
        let at = self.at;
        let mut header = [0; RECORD_HEADER];
        self.exact(&mut header)?;
        let [kind, length @ ..] = header;
        let length = u32::from_le_bytes(length) as usize;
        let Some(most) = max_payload(kind) else {
            return Err(self.broken(at, StreamFault::Order("a record of an unknown kind")));
        };
        if length > most {
            return Err(self.broken(
                at,
                StreamFault::Length {
                    claimed: length as u64,
                    allowed: format!("at most {most}"),
                },
            ));
        }
        let mut record = std::mem::take(&mut self.record);
        record.clear();
        record.extend_from_slice(&header);
        record.resize(RECORD_HEADER + length, 0);
        let mut checksum = [0; 8];
        self.exact(&mut record[RECORD_HEADER..])?;
        self.exact(&mut checksum)?;
        let expected = u64::from_le_bytes(checksum);
        let found = XxHash64::oneshot(self.records, &record);
        if found != expected {
            return Err(self.broken(at, StreamFault::Record { expected, found }));
        }
        self.all.write(&record);
        self.all.write(&checksum);
        self.records += 1;
        self.record = record;
        Ok((kind, at))
    }

    fn payload(&self) -> &[u8] {
        self.record.get(RECORD_HEADER..).unwrap_or_default()
    }

    fn exact(&mut self, buffer: &mut [u8]) -> Result<(), StreamError> {
        match self.fill(buffer)? == buffer.len() {
            true => Ok(()),
            false => Err(self.broken(self.at, StreamFault::Truncated)),
        }
    }

    /// Reads until the buffer is full or nothing comes any more.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, StreamError> {
        let mut got = 0;
        while got < buffer.len() {
            match self.inner.read(&mut buffer[got..]) {
                Ok(0) => break,
                Ok(more) => {
                    got += more;
                    self.at += more as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(StreamError::Read {
                        at: self.at,
                        source,
                    });
                }
            }
        }
        Ok(got)
    }

    fn wrong_length(&self, at: u64, allowed: &str) -> StreamError {
        let claimed = self.payload().len() as u64;
        let allowed = allowed.to_owned();
        self.broken(at, StreamFault::Length { claimed, allowed })
    }

    fn broken(&self, at: u64, fault: StreamFault) -> StreamError {
        let file = self.file.as_ref().and(self.names.last().cloned());
        StreamError::Broken { at, file, fault }
    }
}
