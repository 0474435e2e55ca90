//! Making boot files once, and knowing them again.
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use doze_host::files::{create_private_dir, write_atomic};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BootError, BootFiles, BootPart, KernelSource, cannot, initramfs, modules, vmlinux};

/// Part of the index's name: changes when the same sources would give other files.
const RECIPE: u32 = 1;

/// No kernel image is larger.
const MAX_IMAGE: u64 = 1 << 30;

/// What was made of what.
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    /// Every file that went in.
    sources: Vec<Stamp>,
    kernel: Made,
    initramfs: Made,
}

/// A file as it was when it was read. A change gives another size or another change time,
/// which nobody can set back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    path: PathBuf,
    dev: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Made {
    name: String,
    size: u64,
}

pub(super) fn prepare(source: &KernelSource, cache: &Path) -> Result<BootFiles, BootError> {
    let index_path = cache.join(format!("index-{}.json", key(source)));
    if let Some(files) = known(&index_path, cache) {
        return Ok(files);
    }
    create_private_dir(cache).map_err(|e| cannot("prepare the folder", cache, e))?;
    let index = make(source, cache)?;
    let files = files(&index, cache);
    let text = serde_json::to_vec_pretty(&index)
        .map_err(|e| cannot("write", &index_path, io::Error::other(e)))?;
    write_atomic(&index_path, &text, 0o600).map_err(|e| cannot("write", &index_path, e))?;
    Ok(files)
}

/// Tells configurations apart; whether the files are still the same is in the stamps.
fn key(source: &KernelSource) -> String {
    let mut hash = Sha256::new();
    hash.update(RECIPE.to_le_bytes());
    for path in [Some(&source.image), source.modules.as_ref()] {
        let path = path.map(|path| path.as_os_str().as_encoded_bytes());
        hash.update((path.map_or(u64::MAX, |path| path.len() as u64)).to_le_bytes());
        hash.update(path.unwrap_or_default());
    }
    hash.update(init_digest(source.init));
    hex::encode(hash.finalize())
}

/// SHA-256 of the init. It lives as long as the program, so its address says that it is the same.
fn init_digest(init: &'static [u8]) -> [u8; 32] {
    static KNOWN: Mutex<BTreeMap<(usize, usize), [u8; 32]>> = Mutex::new(BTreeMap::new());
    // A panic between lock and unlock is impossible, and a map of digests cannot be half-written.
    let mut known = KNOWN
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    *known
        .entry((init.as_ptr().addr(), init.len()))
        .or_insert_with(|| Sha256::digest(init).into())
}

/// The files, if the index names them, they are whole, and no source has changed since.
fn known(index_path: &Path, cache: &Path) -> Option<BootFiles> {
    let text = match fs::read(index_path) {
        Ok(text) => text,
        Err(e) => {
            if e.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %index_path.display(), error = %e, "boot files are made again");
            }
            return None;
        }
    };
    let index: Index = match serde_json::from_slice(&text) {
        Ok(index) => index,
        Err(e) => {
            tracing::warn!(path = %index_path.display(), error = %e, "boot files are made again");
            return None;
        }
    };
    let whole = |made: &Made| {
        fs::symlink_metadata(cache.join(&made.name))
            .is_ok_and(|meta| meta.is_file() && meta.len() == made.size)
    };
    let unchanged = |known: &Stamp| stamp(&known.path).is_ok_and(|now| now == *known);
    (whole(&index.kernel) && whole(&index.initramfs) && index.sources.iter().all(unchanged))
        .then(|| files(&index, cache))
}

fn files(index: &Index, cache: &Path) -> BootFiles {
    BootFiles {
        kernel: cache.join(&index.kernel.name),
        initramfs: cache.join(&index.initramfs.name),
    }
}

fn make(source: &KernelSource, cache: &Path) -> Result<Index, BootError> {
    let bad_kernel = |reason: String| BootError::Kernel {
        path: source.image.clone(),
        reason,
    };
    let mut sources = vec![stamp(&source.image).map_err(|e| missing_image(&source.image, e))?];
    if sources[0].size > MAX_IMAGE {
        return Err(bad_kernel(format!("it is larger than {MAX_IMAGE} bytes")));
    }
    let image = fs::read(&source.image).map_err(|e| missing_image(&source.image, e))?;
    let kernel = vmlinux::extract(&image).map_err(bad_kernel)?;
    let loaded = match &source.modules {
        None => Vec::new(),
        Some(dir) => {
            let builtin = dir.join("modules.builtin");
            sources.extend(stamp(&builtin).ok());
            modules::resolve(dir, vmlinux::version(&kernel))?
        }
    };
    sources.extend(loaded.iter().map(|module| module.source.clone()));
    let archive = initramfs::assemble(source.init, &loaded)
        .map_err(|e| cannot("assemble an initramfs for", &source.image, e))?;
    Ok(Index {
        sources,
        kernel: keep(cache, BootPart::Kernel.kind(), &kernel)?,
        initramfs: keep(cache, BootPart::Initramfs.kind(), &archive)?,
    })
}

fn missing_image(path: &Path, e: io::Error) -> BootError {
    match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => {
            BootError::Kernel {
                path: path.to_owned(),
                reason: format!(
                    "it cannot be read: {e}; set [kernel] image to a bzImage or vmlinux"
                ),
            }
        }
        _ => cannot("read", path, e),
    }
}

/// Writes the content under its own name. Already there and whole: nothing to do.
fn keep(cache: &Path, kind: &str, content: &[u8]) -> Result<Made, BootError> {
    let name = format!("{kind}-{}", hex::encode(Sha256::digest(content)));
    let path = cache.join(&name);
    let size = content.len() as u64;
    if !is_whole(&path, size) {
        write_atomic(&path, content, 0o400).map_err(|e| cannot("write", &path, e))?;
    }
    Ok(Made { name, size })
}

/// Files are named after their content, and appear whole.
pub(super) fn is_whole(path: &Path, size: u64) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == size)
}

/// Taken before the file is read: a change meanwhile shows the next time.
pub(super) fn stamp(path: &Path) -> io::Result<Stamp> {
    let meta = fs::metadata(path)?;
    Ok(Stamp {
        path: path.to_owned(),
        dev: meta.dev(),
        inode: meta.ino(),
        size: meta.size(),
        changed: (meta.ctime(), meta.ctime_nsec()),
    })
}
