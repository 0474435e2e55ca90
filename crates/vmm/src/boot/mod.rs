//! Kernel and initramfs for a boot, content-addressed under `<data_dir>/boot/`.
//!
//! ```text
//!   vmlinuz ──extract──> vmlinux-SHA256      <─┐
//!   lib/modules/V ─┐                           ├─ index-SHA256.json: what they were made of
//!   init ──────────┴──> initramfs-SHA256     <─┘
//! ```
//!
//! A file is named after its content and never changes, so that a saved machine can rely on it: a new kernel
//! or init makes new files beside the old. The index only spares work: it says which sources, by
//! identity, size and times, gave which files. Lost or stale, everything is made again, with
//! the same names. Any number of callers and servers may prepare at once: files
//! appear whole (stage, fsync, rename), and two that make the same file make the same bytes.
use std::path::{Path, PathBuf};

mod adopt;
mod cache;
mod initramfs;
mod modules;
mod vmlinux;

/// Where the operator's kernel and modules are.
#[derive(Debug, Clone)]
pub struct KernelSource {
    /// bzImage or vmlinux.
    pub image: PathBuf,
    /// Module tree of that kernel (`lib/modules/VERSION`); `None` for a kernel with all built in.
    pub modules: Option<PathBuf>,
    /// Static init and agent, an ELF executable.
    pub init: &'static [u8],
}

/// What a machine boots from. Both files are immutable and named after their content's SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("kernel image {path}: {reason}")]
    Kernel { path: PathBuf, reason: String },
    #[error("kernel modules {path}: {reason}")]
    Modules { path: PathBuf, reason: String },
    #[error("the {} is not the one it was announced as: its SHA-256 is {found}, not {expected}", .part.word())]
    Foreign {
        part: BootPart,
        expected: String,
        found: String,
    },
    #[error("{context}")]
    Io {
        context: String,
        #[source]
        source: std::io::Error,
    },
}

/// Extracts an uncompressed kernel and builds the (uncompressed) initramfs once; later calls with
/// the same sources find them. Blocking: about a second the first time, then a millisecond.
///
/// `cache` is created with mode 0700 if absent.
///
/// # Errors
/// [`BootError::Kernel`] and [`BootError::Modules`] for what the operator configured, with the way out;
/// [`BootError::Io`] for the disk. Nothing half-made is left.
pub fn prepare(source: &KernelSource, cache: &Path) -> Result<BootFiles, BootError> {
    cache::prepare(source, cache)
}

/// One of the two files, as its name begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootPart {
    Kernel,
    Initramfs,
}

impl BootPart {
    const fn kind(self) -> &'static str {
        match self {
            BootPart::Kernel => "vmlinux",
            BootPart::Initramfs => "initramfs",
        }
    }

    const fn word(self) -> &'static str {
        match self {
            BootPart::Kernel => "kernel",
            BootPart::Initramfs => "initramfs",
        }
    }

    /// Where the file with this content lies, if it is there. `sha256`: 64 lower-case hexadecimal digits.
    pub fn place(self, cache: &Path, sha256: &str) -> PathBuf {
        cache.join(format!("{}-{sha256}", self.kind()))
    }
}

/// A file that came from elsewhere, on its way into the cache: its content is the one it was announced with.
#[derive(Debug)]
pub struct Verified {
    part: BootPart,
    path: PathBuf,
    sha256: String,
    size: u64,
}

impl Verified {
    /// Where it gets its place.
    pub fn place(&self, cache: &Path) -> PathBuf {
        self.part.place(cache, &self.sha256)
    }
}

/// SHA-256 of a boot file's content, lower-case hexadecimal. Blocking: some 100 ms.
///
/// # Errors
/// [`BootError::Io`].
pub fn digest(path: &Path) -> Result<String, BootError> {
    adopt::digest(path).map(|(sha256, _)| sha256)
}

/// Reads the file `path` and compares its content with `sha256`; makes it durable.
///
/// # Errors
/// [`BootError::Foreign`] when it is another one, [`BootError::Io`].
pub fn verify(part: BootPart, path: &Path, sha256: &str) -> Result<Verified, BootError> {
    adopt::verify(part, path, sha256)
}

/// Moves a verified file, which must lie on the same file system, to its place in `cache`, durably; `true` when
/// there was none of that content. One that is there stays: machines rely on it.
///
/// # Errors
/// [`BootError::Io`].
pub fn adopt(file: &Verified, cache: &Path) -> Result<bool, BootError> {
    adopt::adopt(file, cache)
}

fn cannot(what: &str, path: &Path, source: std::io::Error) -> BootError {
    BootError::Io {
        context: format!("cannot {what} {}", path.display()),
        source,
    }
}
