//! Unpacks image layers, in order, into one folder, trusting nothing they say.
//!
//! ```text
//!   compressed layer -> decompress -> hash (diff_id) -> TarStream -> Unpacker
//!                                                                      | one entry at a time
//!        path:  leading / stripped, '..' refused                       v
//!        place: walk() from the root's descriptor, links read as after chroot
//!        write: the last name is created new, never followed, never overwritten in place
//! ```
//!
//! Layers are change sets (OCI image-spec, layer.md): `.wh.NAME` removes NAME of the layers below,
//! `.wh..wh..opq` everything of the layers below in its folder, and neither touches what its own
//! layer brings, in whatever order the entries come.
//!
//! Where the specification is silent this does what container runtimes do: a folder entry over a
//! folder keeps the content and replaces the metadata; over anything else, also over a symlink to a
//! folder, the old thing goes first. Missing parents are created with mode 0755, owner 0:0 and time 0.
use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Read},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};

use crate::ImageError;

mod compression;
mod create;
pub mod tar_stream;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use compression::{decompress, is_compressed};
use tar_stream::{Entry, Kind, Skip, TarError, TarStream, Time};
use walk::{Absent, Place, WalkError};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Book-keeping of the file system that invented whiteouts; not content.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Longest name of one component (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// What one image may grow to. Beyond is [`ImageError::Unsafe`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all layers' archives, decompressed.
    pub bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
}

impl Default for Limits {
    /// 64 GiB, two million entries.
    fn default() -> Self {
        Self {
            bytes: 64 << 30,
            entries: 2_000_000,
        }
    }
}

/// The tree under construction.
#[derive(Debug)]
pub struct Unpacker {
    root: OwnedFd,
    /// What is being imported, for messages.
    source: PathBuf,
    limits: Limits,
    entries: u64,
    bytes: u64,
    /// Times of folders by real path, set at the end since every change in a folder moves its time.
    folder_times: BTreeMap<Vec<u8>, Time>,
}

/// One layer being unpacked.
struct Layer<'a> {
    label: &'a str,
    source: &'a Path,
    /// Real paths this layer brought: whiteouts of the same layer leave them alone.
    brought: BTreeSet<Vec<u8>>,
}

impl Unpacker {
    /// `root` is an empty folder that nobody else changes meanwhile; errors name `source`.
    ///
    /// # Errors
    /// `Missing` without root's rights: owners and device nodes could not be kept.
    pub fn new(root: &Path, source: &Path, limits: Limits) -> Result<Self, ImageError> {
        if !rustix::process::geteuid().is_root() {
            return Err(ImageError::Missing {
                what: "unpacking an image keeps each file's owner, which needs root".into(),
                mend: "run doze serve (or doze image import) as root".into(),
            });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())
            .map_err(ImageError::io(format!("open {}", root.display())))?;
        rustix::fs::fchmod(&root, Mode::from_raw_mode(0o755))
            .map_err(ImageError::io("set the mode of the stage folder"))?;
        Ok(Self {
            root,
            source: source.to_owned(),
            limits,
            entries: 0,
            bytes: 0,
            folder_times: BTreeMap::from([(Vec::new(), Time::default())]),
        })
    }

    /// Applies one uncompressed layer; `progress` hears the bytes read of it so far.
    ///
    /// The stream is read to its end, also behind the archive's end.
    ///
    /// # Errors
    /// `Unsafe` names layer, entry and reason; the tree is then only good for removal.
    pub fn layer<R: Read>(
        &mut self,
        label: &str,
        stream: R,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), ImageError> {
        let source = self.source.clone();
        let mut layer = Layer {
            label,
            source: &source,
            brought: BTreeSet::new(),
        };
        let allowance = self.limits.bytes.saturating_sub(self.bytes);
        let mut tar = TarStream::new(Metered::new(stream, allowance, progress));
        while let Some(entry) = tar.next_entry().map_err(|e| layer.tar_error(b"", e))? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                let reason = format!("the image has more than {} entries", self.limits.entries);
                return Err(layer.refuse(&entry.path, reason));
            }
            self.apply(&mut layer, &entry, &mut tar)?;
        }
        let mut rest = tar.into_inner();
        io::copy(&mut rest, &mut io::sink()).map_err(|e| layer.tar_error(b"", e.into()))?;
        self.bytes += rest.finish();
        Ok(())
    }

    /// Sets the folders' times; the tree is complete then.
    pub fn finish(self) -> Result<(), ImageError> {
        for (path, time) in &self.folder_times {
            let components: Vec<&[u8]> = path.split(|b| *b == b'/').collect();
            let set = || -> Result<(), WalkError> {
                let place = walk::walk(self.root.as_fd(), &components, Absent::Refuse)?;
                // A later layer may have put a link on the way: that leads to another folder.
                if place.path() == *path {
                    create::set_folder_time(&place, *time)?;
                }
                Ok(())
            };
            match set() {
                // A later layer replaced or removed it.
                Err(WalkError::Absent(_) | WalkError::NotAFolder(_) | WalkError::Links) => {}
                other => other.map_err(|e| ImageError::Io {
                    context: format!("set the time of folder {:?}", walk::lossy(path)),
                    source: io::Error::other(e),
                })?,
            }
        }
        Ok(())
    }

    fn apply<R: Skip>(
        &mut self,
        layer: &mut Layer<'_>,
        entry: &Entry,
        tar: &mut TarStream<R>,
    ) -> Result<(), ImageError> {
        let components = layer.components(&entry.path, &entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.apply_to_root(layer, entry);
        };
        if name.starts_with(WHITEOUT) {
            return self.whiteout(layer, entry, parents, name);
        }
        let link = match &entry.kind {
            Kind::HardLink(target) => Some(self.link_target(layer, entry, target)?),
            _ => None,
        };
        let place = self.parent(layer, entry, parents)?;
        let path = place.path_of(name);
        if path.len() > walk::MAX_PATH {
            return Err(layer.walk_error(&entry.path, WalkError::TooDeep));
        }
        if link
            .as_ref()
            .is_some_and(|(target, last)| target.path_of(last) == path)
        {
            return Err(layer.refuse(&entry.path, "a hard link to itself".into()));
        }
        self.make_room(&place, name, &path, &entry.kind)
            .map_err(|e| layer.io_error(entry, "replace", e))?;
        create::create(layer, entry, &place, name, link, tar)?;
        if entry.kind == Kind::Directory {
            self.folder_times.insert(path.clone(), entry.mtime);
        }
        layer.brought.insert(path);
        Ok(())
    }

    /// An entry for the root itself: only its metadata matters.
    fn apply_to_root(&mut self, layer: &Layer<'_>, entry: &Entry) -> Result<(), ImageError> {
        if entry.kind != Kind::Directory {
            return Err(layer.refuse(&entry.path, "the root must be a folder".into()));
        }
        create::set_folder_metadata(self.root.as_fd(), layer, entry)?;
        self.folder_times.insert(Vec::new(), entry.mtime);
        Ok(())
    }

    fn parent(
        &mut self,
        layer: &mut Layer<'_>,
        entry: &Entry,
        parents: &[&[u8]],
    ) -> Result<Place, ImageError> {
        let mut created = Vec::new();
        let found = walk::walk(
            self.root.as_fd(),
            parents,
            Absent::Create(&mut |path| created.push(path)),
        );
        for path in created {
            self.folder_times.insert(path.clone(), Time::default());
            layer.brought.insert(path);
        }
        found.map_err(|e| layer.walk_error(&entry.path, e))
    }

    /// The folder that holds a hard link's target, and the target's name in it.
    fn link_target(
        &self,
        layer: &Layer<'_>,
        entry: &Entry,
        target: &[u8],
    ) -> Result<(Place, Vec<u8>), ImageError> {
        let components = layer.components(&entry.path, target)?;
        let Some((name, parents)) = components.split_last() else {
            return Err(layer.refuse(&entry.path, "a hard link to the root".into()));
        };
        let place = walk::walk(self.root.as_fd(), parents, Absent::Refuse)
            .map_err(|e| layer.walk_error(&entry.path, e))?;
        Ok((place, name.to_vec()))
    }

    /// Whatever has the name goes, except a folder for a folder.
    fn make_room(
        &mut self,
        place: &Place,
        name: &[u8],
        path: &[u8],
        kind: &Kind,
    ) -> Result<(), Errno> {
        let Some(stat) = walk::stat(place.fd.as_fd(), name)? else {
            return Ok(());
        };
        let is_folder = walk::file_type(&stat) == FileType::Directory;
        if is_folder && *kind == Kind::Directory {
            return Ok(());
        }
        walk::remove(place.fd.as_fd(), name, path, &|_| false)?;
        if is_folder {
            self.folder_times.remove(path);
        }
        Ok(())
    }

    fn whiteout(
        &mut self,
        layer: &Layer<'_>,
        entry: &Entry,
        parents: &[&[u8]],
        name: &[u8],
    ) -> Result<(), ImageError> {
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        let opaque = name == OPAQUE;
        if name.starts_with(WHITEOUT_META) && !opaque {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(layer.refuse(&entry.path, "a whiteout of no name".into()));
        }
        let place = match walk::walk(self.root.as_fd(), parents, Absent::Refuse) {
            Ok(place) => place,
            // Nothing below to hide.
            Err(WalkError::Absent(_) | WalkError::NotAFolder(_)) => return Ok(()),
            Err(e) => return Err(layer.walk_error(&entry.path, e)),
        };
        let keep = |path: &[u8]| layer.brought.contains(path);
        let removed = if opaque {
            walk::open_folder_to_read(place.fd.as_fd(), b".")
                .and_then(|folder| walk::remove_content(folder.as_fd(), &place.path(), &keep))
        } else {
            walk::remove(place.fd.as_fd(), hidden, &place.path_of(hidden), &keep)
        };
        removed.map_err(|e| layer.io_error(entry, "remove what it hides", e))?;
        Ok(())
    }
}

impl Layer<'_> {
    /// The path's components: a leading `/` means the image's root, `.` means nothing, `..` is refused.
    fn components<'p>(&self, entry: &[u8], path: &'p [u8]) -> Result<Vec<&'p [u8]>, ImageError> {
        let refuse = |reason: &str| Err(self.refuse(entry, reason.into()));
        if path.contains(&0) {
            return refuse("a zero byte in a path");
        }
        if path.len() > walk::MAX_PATH {
            return refuse("a path longer than 4000 bytes");
        }
        let parts = path.split(|b| *b == b'/');
        let components: Vec<&[u8]> = parts.filter(|p| !p.is_empty() && *p != b".").collect();
        if components.contains(&b"..".as_slice()) {
            return refuse("a path with '..' in it");
        }
        if components.iter().any(|part| part.len() > MAX_NAME) {
            return refuse("a name longer than 255 bytes");
        }
        if components.len() > walk::MAX_DEPTH {
            return refuse("a path of more than 256 components");
        }
        Ok(components)
    }

    fn refuse(&self, entry: &[u8], reason: String) -> ImageError {
        ImageError::Unsafe {
            layer: self.label.to_owned(),
            entry: walk::lossy(entry.get(..MAX_NAME).unwrap_or(entry)),
            reason,
        }
    }

    fn walk_error(&self, entry: &[u8], error: WalkError) -> ImageError {
        match error {
            WalkError::System(errno) => ImageError::Io {
                context: format!(
                    "layer {}: find the place of {:?}",
                    self.label,
                    walk::lossy(entry)
                ),
                source: errno.into(),
            },
            other => self.refuse(entry, other.to_string()),
        }
    }

    fn io_error(&self, entry: &Entry, step: &str, error: Errno) -> ImageError {
        ImageError::Io {
            context: format!(
                "layer {}: entry {:?}: {step}",
                self.label,
                walk::lossy(&entry.path)
            ),
            source: error.into(),
        }
    }

    fn tar_error(&self, entry: &[u8], error: TarError) -> ImageError {
        let within = |reason: String| ImageError::Format {
            path: self.source.to_owned(),
            reason: match entry {
                b"" => format!("layer {}: {reason}", self.label),
                _ => format!(
                    "layer {}: entry {:?}: {reason}",
                    self.label,
                    walk::lossy(entry)
                ),
            },
        };
        match error {
            TarError::Malformed(_) => within(error.to_string()),
            TarError::Read(source) if source.kind() == io::ErrorKind::FileTooLarge => {
                self.refuse(entry, source.to_string())
            }
            TarError::Read(source) if source.raw_os_error().is_some() => ImageError::Io {
                context: format!("read layer {} of {}", self.label, self.source.display()),
                source,
            },
            TarError::Read(source) if source.kind() == io::ErrorKind::UnexpectedEof => {
                within("it ends too early".into())
            }
            TarError::Read(source) => within(source.to_string()),
        }
    }
}

/// Counts a layer's bytes, tells the progress, and stops at the limit.
struct Metered<'p, R> {
    inner: R,
    bytes: u64,
    allowance: u64,
    /// Bytes at which `progress` is told next.
    next_report: u64,
    progress: &'p mut dyn FnMut(u64),
}

impl<'p, R> Metered<'p, R> {
    const STEP: u64 = 4 << 20;

    fn new(inner: R, allowance: u64, progress: &'p mut dyn FnMut(u64)) -> Self {
        progress(0);
        Self {
            inner,
            bytes: 0,
            allowance,
            next_report: Self::STEP,
            progress,
        }
    }

    /// Tells the final count.
    fn finish(self) -> u64 {
        (self.progress)(self.bytes);
        self.bytes
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.bytes += n as u64;
        if self.bytes > self.allowance {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "the unpacked image is larger than the limit",
            ));
        }
        if self.bytes >= self.next_report {
            (self.progress)(self.bytes);
            self.next_report = self.bytes + Self::STEP;
        }
        Ok(n)
    }
}

impl<R: Read> Skip for Metered<'_, R> {}
