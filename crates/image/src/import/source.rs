//! One way to read files from a folder or from inside a tar archive.
//!
//! An archive is indexed once and then read in place; only a compressed one is unpacked first, into
//! the stage folder, since its members cannot be found otherwise.
use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{
    ImageError,
    layer::{
        self,
        tar_stream::{Kind, Skip, TarError, TarStream},
    },
};

/// Manifests, indexes and configurations (the cap registries use too).
pub(crate) const MAX_JSON: u64 = 4 << 20;
/// Members of the archive around the layers; an image has three per layer at most.
const MAX_MEMBERS: usize = 100_000;
/// Links between members that are followed.
const MAX_LINKS: usize = 8;

/// What is being imported.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    members: Members,
}

#[derive(Debug)]
enum Members {
    Folder,
    Archive {
        file: File,
        index: BTreeMap<String, Member>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    Content {
        offset: u64,
        size: u64,
    },
    /// Another member's name.
    Link(String),
}

/// A member's content and size.
pub(crate) type Opened<'s> = (Box<dyn Read + 's>, u64);

impl Source {
    /// `scratch` is where a compressed archive is unpacked, at most `limit` bytes of it.
    pub(crate) fn open(path: &Path, scratch: &Path, limit: u64) -> Result<Self, ImageError> {
        let failed = || ImageError::io(format!("open {}", path.display()));
        let meta = std::fs::metadata(path).map_err(failed())?;
        let members = if meta.is_dir() {
            Members::Folder
        } else if meta.is_file() {
            let file = File::open(path).map_err(failed())?;
            let mut magic = [0; 4];
            let n = file.read_at(&mut magic, 0).map_err(failed())?;
            let file = if layer::is_compressed(magic.get(..n).unwrap_or_default()) {
                unpack(path, &file, scratch, limit)?
            } else {
                file
            };
            let index = index(path, &file)?;
            Members::Archive { file, index }
        } else {
            return Err(ImageError::format(path, "is neither a folder nor a file"));
        };
        let path = path.to_owned();
        Ok(Self { path, members })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn format_error(&self, reason: impl Into<String>) -> ImageError {
        ImageError::format(&self.path, reason)
    }

    /// Content and size of a member; `None` when there is no such file.
    pub(crate) fn open_member(&self, name: &str) -> Result<Option<Opened<'_>>, ImageError> {
        let Some(name) = normalise(name.as_bytes()) else {
            return Err(self.format_error(format!("{name:?} is not a path inside it")));
        };
        match &self.members {
            Members::Folder => self.open_in_folder(&name),
            Members::Archive { file, index } => {
                let mut member = index.get(&name);
                for _ in 0..MAX_LINKS {
                    match member {
                        Some(Member::Link(target)) => member = index.get(target),
                        _ => break,
                    }
                }
                match member {
                    None => Ok(None),
                    Some(Member::Link(_)) => {
                        Err(self.format_error(format!("{name:?} is a link that leads nowhere")))
                    }
                    Some(Member::Content { offset, size }) => {
                        let part = FilePart {
                            file,
                            position: *offset,
                            end: offset.saturating_add(*size),
                        };
                        Ok(Some((Box::new(part), *size)))
                    }
                }
            }
        }
    }

    fn open_in_folder(&self, name: &str) -> Result<Option<Opened<'_>>, ImageError> {
        let path = self.path.join(name);
        let failed = || ImageError::io(format!("open {}", path.display()));
        // Links are followed (build tools link blobs to their caches), but opening must not hang on
        // a fifo.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path)
        {
            Ok(file) => file,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            Err(e) => return Err(failed()(e)),
        };
        let meta = file.metadata().map_err(failed())?;
        if !meta.is_file() {
            return Ok(None);
        }
        Ok(Some((Box::new(file), meta.len())))
    }

    /// A whole small member.
    pub(crate) fn json(&self, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
        let Some((reader, size)) = self.open_member(name)? else {
            return Ok(None);
        };
        let too_large = || self.format_error(format!("{name} is larger than 4 MiB"));
        if size > MAX_JSON {
            return Err(too_large());
        }
        let mut content = Vec::new();
        reader
            .take(MAX_JSON + 1)
            .read_to_end(&mut content)
            .map_err(ImageError::io(format!(
                "read {name} of {}",
                self.path.display()
            )))?;
        if content.len() as u64 > MAX_JSON {
            return Err(too_large());
        }
        Ok(Some(content))
    }

    /// Parses a small member that must be there.
    pub(crate) fn parse<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        content: &[u8],
    ) -> Result<T, ImageError> {
        serde_json::from_slice(content)
            .map_err(|e| self.format_error(format!("{name} cannot be understood: {e}")))
    }
}

/// Reads one member without moving the file's own offset.
struct FilePart<'f> {
    file: &'f File,
    position: u64,
    end: u64,
}

impl Read for FilePart<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_sub(self.position);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let Some(buf) = buf.get_mut(..most).filter(|buf| !buf.is_empty()) else {
            return Ok(0);
        };
        let n = self.file.read_at(buf, self.position)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += n as u64;
        Ok(n)
    }
}

/// `./a//b` is `a/b`; nothing for paths that are empty, not UTF-8 or have `..`.
fn normalise(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let parts: Vec<&str> = name
        .split('/')
        .filter(|p| !matches!(*p, "" | "."))
        .collect();
    let usable = !parts.is_empty() && !parts.contains(&"..") && !name.contains('\0');
    usable.then(|| parts.join("/"))
}

fn unpack(path: &Path, file: &File, scratch: &Path, limit: u64) -> Result<File, ImageError> {
    let failed = || ImageError::io(format!("unpack {}", path.display()));
    let mut plain = tempfile::tempfile_in(scratch).map_err(failed())?;
    let mut reader = layer::decompress(file).map_err(failed())?;
    let mut buffer = vec![0; 128 * 1024];
    let mut total = 0;
    loop {
        let n = match reader.read(&mut buffer) {
            Ok(n) => n,
            Err(e) if e.raw_os_error().is_some() => return Err(failed()(e)),
            Err(e) => return Err(ImageError::format(path, format!("cannot be unpacked: {e}"))),
        };
        let Some(content) = buffer.get(..n).filter(|content| !content.is_empty()) else {
            break;
        };
        total += n as u64;
        if total > limit {
            let reason = format!("unpacks to more than the limit of {limit} bytes");
            return Err(ImageError::format(path, reason));
        }
        plain.write_all(content).map_err(failed())?;
    }
    plain.rewind().map_err(failed())?;
    Ok(plain)
}

fn index(path: &Path, file: &File) -> Result<BTreeMap<String, Member>, ImageError> {
    let failed = |e: TarError| match e {
        TarError::Read(e) if e.raw_os_error().is_some() => {
            ImageError::io(format!("read {}", path.display()))(e)
        }
        TarError::Read(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            ImageError::format(path, "the archive ends too early")
        }
        e => ImageError::format(path, format!("is not a usable tar archive: {e}")),
    };
    let length = file
        .metadata()
        .map_err(ImageError::io(format!("inspect {}", path.display())))?
        .len();
    let mut tar = TarStream::new(Seeker {
        file: BufReader::with_capacity(4096, file),
        position: 0,
        length,
    });
    let mut members = BTreeMap::new();
    while let Some(entry) = tar.next_entry().map_err(failed)? {
        if members.len() >= MAX_MEMBERS {
            let reason = format!("has more than {MAX_MEMBERS} members");
            return Err(ImageError::format(path, reason));
        }
        let Some(name) = normalise(&entry.path) else {
            continue;
        };
        let member = match &entry.kind {
            Kind::File => Member::Content {
                offset: tar.position(),
                size: entry.size,
            },
            Kind::HardLink(target) => match normalise(target) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            // Writers replace a repeated layer by a symlink, relative to the member's folder.
            Kind::Symlink(target) => match beside(&name, target) {
                Some(target) => Member::Link(target),
                None => continue,
            },
            _ => continue,
        };
        members.insert(name, member);
    }
    if members.is_empty() {
        return Err(ImageError::format(path, "is not a tar archive with files"));
    }
    Ok(members)
}

/// The member a relative symlink leads to; nothing when it leads out.
fn beside(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    if target.starts_with('/') {
        return None;
    }
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

/// Skips members by seeking instead of reading them.
struct Seeker<'f> {
    file: BufReader<&'f File>,
    position: u64,
    length: u64,
}

impl Read for Seeker<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Skip for Seeker<'_> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let to = self.position.checked_add(bytes);
        // Seeking beyond the end succeeds; reading there would look like a clean end.
        let to = to
            .filter(|to| *to <= self.length)
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.file.seek(SeekFrom::Start(to))?;
        self.position = to;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn member_names_stay_inside() {
        assert_eq!(normalise(b"./a//b/").unwrap(), "a/b");
        assert_eq!(normalise(b"/a").unwrap(), "a");
        for bad in [&b""[..], b".", b"a/../b", b"..", b"\xff", b"a\0b"] {
            assert_eq!(normalise(bad), None, "{bad:?}");
        }
        assert_eq!(
            beside("x/layer.tar", b"../y/layer.tar").unwrap(),
            "y/layer.tar"
        );
        assert_eq!(beside("layer.tar", b"blob").unwrap(), "blob");
        for bad in [&b"../../etc/passwd"[..], b"/etc/passwd", b"..", b"\xff"] {
            assert_eq!(beside("x/layer.tar", bad), None, "{bad:?}");
        }
    }
}
