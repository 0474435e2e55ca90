//! Reads a tar archive entry by entry from a stream nobody trusts.
//!
//! The `tar` crate's own iterator is not used for layers: it reads extension headers of any size
//! into memory, and splits PAX records at newlines, which breaks binary values such as
//! `security.capability`. Its [`tar::Header`] does the field decoding here.
//!
//! Understood: ustar and GNU headers, GNU long names (`L`, `K`), PAX extended (`x`) and global (`g`)
//! headers (POSIX.1-2017, pax, "pax Extended Header"). Refused: sparse files in any form, which
//! container image writers do not produce.
use std::{
    collections::BTreeMap,
    io::{self, Read},
};

const BLOCK: usize = 512;
/// Largest extension header, and largest sum of global ones; real ones are a few hundred bytes,
/// xattr values reach 64 KiB.
const MAX_EXTENSION: u64 = 1 << 20;

/// What ended the reading of an archive.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("the archive is malformed: {0}")]
    Malformed(String),
    #[error("the archive cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// A number of the header, read by the `tar` crate. A blank field is 0, as all readers take it.
fn field<T: Default>(raw: &[u8], value: io::Result<T>) -> Result<T, TarError> {
    if raw.iter().all(|b| matches!(b, 0 | b' ')) {
        return Ok(T::default());
    }
    value.map_err(|e| malformed(e.to_string()))
}

fn malformed(reason: impl Into<String>) -> TarError {
    TarError::Malformed(reason.into())
}

/// What an entry is, with what only that kind has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    /// Target, verbatim.
    Symlink(Vec<u8>),
    /// Name of an entry of the same tree.
    HardLink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    /// The type flag of something else.
    Other(u8),
}

/// Seconds and nanoseconds since 1970; times before are 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// One entry's header, extensions applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As written: may be absolute, may contain `..`, need not be UTF-8.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Bytes of content that follow; read them with [`TarStream::read_content`].
    pub size: u64,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    pub mtime: Time,
    /// From `SCHILY.xattr.NAME` records.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// PAX records, keyed as written. A later record of one key replaces an earlier one.
type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// A way to move past content without looking at it.
pub trait Skip: Read {
    /// Moves `bytes` further; the end of the stream on the way is an error.
    fn skip(&mut self, bytes: u64) -> io::Result<()>
    where
        Self: Sized,
    {
        let skipped = io::copy(&mut self.by_ref().take(bytes), &mut io::sink())?;
        if skipped < bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// Headers and contents in the order of the stream.
#[derive(Debug)]
pub struct TarStream<R> {
    inner: R,
    /// Content of the current entry not yet read.
    content: u64,
    /// Zero bytes behind that content up to the next block.
    padding: u64,
    /// Offset in the stream.
    position: u64,
    globals: Records,
    globals_size: u64,
    ended: bool,
}

impl<R: Skip> TarStream<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            content: 0,
            padding: 0,
            position: 0,
            globals: Records::new(),
            globals_size: 0,
            ended: false,
        }
    }

    /// Offset of the current entry's unread content in the stream.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The stream, wherever reading it has come to.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// Reads the current entry's content; 0 at its end.
    pub fn read_content(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.content)
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let Some(buf) = buf.get_mut(..most).filter(|buf| !buf.is_empty()) else {
            return Ok(0);
        };
        let n = self.inner.read(buf)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.content -= n as u64;
        self.position += n as u64;
        Ok(n)
    }

    /// The next entry, skipping what is left of the current one; `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut long_name = None;
        let mut long_link = None;
        let mut local: Option<Records> = None;
        loop {
            let Some(header) = self.next_header()? else {
                if long_name.is_some() || long_link.is_some() || local.is_some() {
                    return Err(malformed("it ends behind an extension header"));
                }
                return Ok(None);
            };
            let size = field(&header.as_old().size, header.entry_size())?;
            match header.entry_type().as_byte() {
                b'L' => long_name = Some(self.long_value(size)?),
                b'K' => long_link = Some(self.long_value(size)?),
                b'x' => local = Some(self.records(size)?),
                b'g' => self.global(size)?,
                _ => {
                    let mut records = self.globals.clone();
                    records.extend(local.unwrap_or_default());
                    let entry = entry(&header, size, records, long_name, long_link)?;
                    self.begin_content(entry.size)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn begin_content(&mut self, size: u64) -> Result<(), TarError> {
        let padded = size
            .checked_next_multiple_of(BLOCK as u64)
            .ok_or_else(|| malformed("an entry's size overflows"))?;
        self.content = size;
        self.padding = padded - size;
        Ok(())
    }

    /// The next block that is a header, its checksum verified.
    fn next_header(&mut self) -> Result<Option<tar::Header>, TarError> {
        let left = self
            .content
            .checked_add(self.padding)
            .ok_or_else(|| malformed("an entry's size overflows"))?;
        self.inner.skip(left)?;
        self.position = self.position.saturating_add(left);
        (self.content, self.padding) = (0, 0);
        let mut header = tar::Header::new_old();
        // One zero block is taken for the end; the second is often missing in the wild.
        if self.ended || !self.read_block(header.as_mut_bytes())? {
            self.ended = true;
            return Ok(None);
        }
        if header.as_bytes().iter().all(|b| *b == 0) {
            self.ended = true;
            return Ok(None);
        }
        let sum: u32 = header.as_bytes().iter().map(|b| u32::from(*b)).sum();
        let stored: u32 = header.as_old().cksum.iter().map(|b| u32::from(*b)).sum();
        // The checksum is computed with its own field read as eight blanks.
        if sum - stored + 8 * u32::from(b' ') != field(&header.as_old().cksum, header.cksum())? {
            return Err(malformed("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    /// False at a clean end of the stream.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.inner.read(rest) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(malformed("it ends inside a header")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.position += BLOCK as u64;
        Ok(true)
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_EXTENSION {
            return Err(malformed(format!(
                "an extension header has {size} bytes; allowed: up to {MAX_EXTENSION}"
            )));
        }
        self.begin_content(size)?;
        let mut content = vec![0; usize::try_from(size).unwrap_or(0)];
        let mut filled = 0;
        while let Some(rest) = content.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            filled += self.read_content(rest)?;
        }
        Ok(content)
    }

    /// A GNU long name: the name, ended by a zero byte.
    fn long_value(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let mut value = self.extension(size)?;
        if value.last() == Some(&0) {
            value.pop();
        }
        Ok(value)
    }

    fn records(&mut self, size: u64) -> Result<Records, TarError> {
        parse_records(&self.extension(size)?)
    }

    fn global(&mut self, size: u64) -> Result<(), TarError> {
        self.globals_size = self.globals_size.saturating_add(size);
        if self.globals_size > MAX_EXTENSION {
            return Err(malformed("its global extension headers are too large"));
        }
        let records = self.records(size)?;
        self.globals.extend(records);
        Ok(())
    }
}

/// `LENGTH KEY=VALUE\n`, LENGTH counting the whole record in bytes.
fn parse_records(mut rest: &[u8]) -> Result<Records, TarError> {
    let bad = || malformed("a PAX record is malformed");
    let mut records = Records::new();
    while !rest.is_empty() {
        let blank = rest
            .iter()
            .take(8)
            .position(|b| *b == b' ')
            .ok_or_else(bad)?;
        let (digits, _) = rest.split_at(blank);
        let length: usize = std::str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .ok_or_else(bad)?;
        let (record, next) = rest.split_at_checked(length).ok_or_else(bad)?;
        let pair = record
            .get(blank + 1..)
            .and_then(|pair| pair.strip_suffix(b"\n"))
            .ok_or_else(bad)?;
        let equals = pair.iter().position(|b| *b == b'=').ok_or_else(bad)?;
        let (key, value) = pair.split_at(equals);
        records.insert(key.to_vec(), value.get(1..).unwrap_or_default().to_vec());
        rest = next;
    }
    Ok(records)
}

fn entry(
    header: &tar::Header,
    size: u64,
    records: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
) -> Result<Entry, TarError> {
    let text = |key: &[u8]| records.get(key).filter(|value| !value.is_empty());
    let number = |key: &'static str| match text(key.as_bytes()) {
        None => Ok(None),
        Some(value) => std::str::from_utf8(value)
            .ok()
            .and_then(|value| value.parse::<u64>().ok())
            .map(Some)
            .ok_or_else(|| malformed(format!("its PAX record {key:?} is not a number"))),
    };
    if records.keys().any(|key| key.starts_with(b"GNU.sparse.")) {
        return Err(malformed("sparse files are not supported"));
    }
    let path = long_name
        .or_else(|| text(b"path").cloned())
        .unwrap_or_else(|| header.path_bytes().into_owned());
    let link = long_link
        .or_else(|| text(b"linkpath").cloned())
        .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
        .unwrap_or_default();
    let raw = header.as_old();
    let kind = kind(header, &path, size, link)?;
    let size = match kind {
        Kind::File | Kind::Other(_) => number("size")?.unwrap_or(size),
        // POSIX: these have no content whatever the field says.
        _ => 0,
    };
    Ok(Entry {
        kind,
        size,
        mode: field(&raw.mode, header.mode())? & 0o7777,
        uid: number("uid")?.map_or_else(|| field(&raw.uid, header.uid()), Ok)?,
        gid: number("gid")?.map_or_else(|| field(&raw.gid, header.gid()), Ok)?,
        mtime: match text(b"mtime") {
            Some(value) => parse_time(value)?,
            None => Time {
                seconds: header_mtime(header)?,
                nanoseconds: 0,
            },
        },
        xattrs: records
            .iter()
            .filter_map(|(key, value)| {
                Some((key.strip_prefix(b"SCHILY.xattr.")?.to_vec(), value.clone()))
            })
            .collect(),
        path,
    })
}

fn kind(header: &tar::Header, path: &[u8], size: u64, link: Vec<u8>) -> Result<Kind, TarError> {
    let device = || -> Result<(u32, u32), TarError> {
        // Offsets of devmajor and devminor (POSIX.1-2017, pax, "ustar Header Block").
        let raw = |at: usize| header.as_bytes().get(at..at + 8).unwrap_or_default();
        Ok((
            field(raw(329), header.device_major())?.unwrap_or(0),
            field(raw(337), header.device_minor())?.unwrap_or(0),
        ))
    };
    Ok(match header.entry_type().as_byte() {
        // Archives older than ustar mark a folder by its slash only.
        0 | b'0' if path.ends_with(b"/") && size == 0 => Kind::Directory,
        0 | b'0' | b'7' => Kind::File,
        b'1' => Kind::HardLink(link),
        b'2' => Kind::Symlink(link),
        b'3' => {
            let (major, minor) = device()?;
            Kind::CharDevice { major, minor }
        }
        b'4' => {
            let (major, minor) = device()?;
            Kind::BlockDevice { major, minor }
        }
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => return Err(malformed("sparse files are not supported")),
        flag => Kind::Other(flag),
    })
}

/// A negative time comes base-256 encoded and reads as a huge number.
fn header_mtime(header: &tar::Header) -> Result<i64, TarError> {
    if header.as_old().mtime.first().is_some_and(|b| *b == 0xff) {
        return Ok(0);
    }
    Ok(i64::try_from(field(&header.as_old().mtime, header.mtime())?).unwrap_or(i64::MAX))
}

/// `[-]SECONDS[.FRACTION]`.
fn parse_time(value: &[u8]) -> Result<Time, TarError> {
    let bad = || malformed("its PAX time is not a number");
    let text = std::str::from_utf8(value).map_err(|_| bad())?;
    if text.starts_with('-') {
        return Ok(Time::default());
    }
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    Ok(Time {
        seconds: whole.parse().map_err(|_| bad())?,
        nanoseconds: digits.parse().map_err(|_| bad())?,
    })
}

#[cfg(test)]
mod tests;
