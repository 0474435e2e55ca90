//! What the store keeps on disk as JSON: one record per name, one per content. Both carry a version,
//! are read with a size cap, and are written whole or not at all.
//!
//! File names of references are the normalised name with `/` as `+`, which no reference contains:
//! `docker.io+library+alpine:latest.json`. Names too long for a file name go by their SHA-256
//! (`~<64 hex>.json`); the record inside says the name in either case.
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::Path,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{ImageConfig, ImageError, digest::Digest};

pub(super) const VERSION: u32 = 1;
const SUFFIX: &str = ".json";
/// Below `NAME_MAX` (255) with room for a stage file's decoration.
const MAX_ENCODED: usize = 200;
/// As for the manifests and configurations the records come from.
const MAX_RECORD: u64 = 4 << 20;

/// `refs/<name>.json`: a name and where it points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RefRecord {
    pub version: u32,
    pub name: String,
    pub digest: String,
    pub created_at: String,
    pub tags: BTreeMap<String, String>,
}

/// `blobs/sha256-<hex>/image.json`: what the rootfs beside it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BlobRecord {
    pub version: u32,
    pub digest: String,
    /// Digest form of the name it was first imported as, for content no name points at any more.
    pub name: String,
    pub created_at: String,
    pub platform: String,
    pub size_bytes: u64,
    /// Of `rootfs.erofs`.
    pub rootfs_digest: String,
    pub config: ImageConfig,
}

pub(super) trait Record: DeserializeOwned + Serialize {
    fn version(&self) -> u32;
}

impl Record for RefRecord {
    fn version(&self) -> u32 {
        self.version
    }
}

impl Record for BlobRecord {
    fn version(&self) -> u32 {
        self.version
    }
}

pub(super) fn ref_file_name(name: &str) -> String {
    if name.len() <= MAX_ENCODED {
        format!("{}{SUFFIX}", name.replace('/', "+"))
    } else {
        format!("~{}{SUFFIX}", Digest::of(name.as_bytes()).hex())
    }
}

/// Whether this is a file name of [`ref_file_name`] rather than a leftover.
pub(super) fn is_ref_file_name(file_name: &str) -> bool {
    file_name.ends_with(SUFFIX) && !file_name.starts_with('.')
}

/// `None` when there is no such file.
pub(super) fn read<T: Record>(path: &Path) -> Result<Option<T>, ImageError> {
    let failed = || ImageError::io(format!("read {}", path.display()));
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed()(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_RECORD + 1)
        .read_to_end(&mut text)
        .map_err(failed())?;
    if text.len() as u64 > MAX_RECORD {
        return Err(ImageError::format(path, "the record is larger than 4 MiB"));
    }
    let record: T = serde_json::from_slice(&text)
        .map_err(|e| ImageError::format(path, format!("the record is damaged: {e}")))?;
    if record.version() != VERSION {
        let reason = format!(
            "the record has version {}, this doze reads version {VERSION}",
            record.version()
        );
        return Err(ImageError::format(path, reason));
    }
    Ok(Some(record))
}

/// Durable when it returns.
pub(super) fn write<T: Record>(path: &Path, record: &T) -> Result<(), ImageError> {
    let failed = || ImageError::io(format!("write {}", path.display()));
    let text = serde_json::to_vec_pretty(record).map_err(|e| failed()(io::Error::from(e)))?;
    doze_host::files::write_atomic(path, &text, 0o600).map_err(failed())
}
