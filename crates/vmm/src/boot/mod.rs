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

fn cannot(what: &str, path: &Path, source: std::io::Error) -> BootError {
    BootError::Io {
        context: format!("cannot {what} {}", path.display()),
        source,
    }
}
