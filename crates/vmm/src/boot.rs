//! Kernel and initramfs for a boot, content-addressed under `<data_dir>/boot/`.
use std::path::{Path, PathBuf};

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
    Io { context: String, #[source] source: std::io::Error },
}

/// Extracts an uncompressed kernel and builds the (uncompressed) initramfs once; later calls with
/// the same sources find them. Blocking.
pub fn prepare(source: &KernelSource, cache: &Path) -> Result<BootFiles, BootError> {
    let _ = (source, cache);
    unimplemented!()
}
