//! OCI images on this host: references, import, unpacking, and one read-only EROFS rootfs per
//! image digest, content-addressed and shared by every instance of the image.
use std::{collections::BTreeMap, path::{Path, PathBuf}};

use serde::{Deserialize, Serialize};

pub mod reference;
pub use reference::{Reference, ReferenceError};

/// A ready image as one reference sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Normalised reference (`docker.io/library/alpine:latest`, or with `@sha256:...`).
    pub name: String,
    /// Manifest digest, `sha256:<64 hex>`.
    pub digest: String,
    /// RFC 3339 UTC.
    pub created_at: String,
    /// `linux/amd64`.
    pub platform: String,
    /// Bytes of the rootfs file.
    pub size_bytes: u64,
    pub config: ImageConfig,
    /// The EROFS file; immutable, mode 0444.
    pub rootfs: PathBuf,
    pub tags: BTreeMap<String, String>,
}

/// What the image says about how to run it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    /// `KEY=VALUE` in the image's order.
    pub env: Vec<String>,
    pub working_dir: Option<String>,
    /// `user[:group]`, names or numbers, resolved inside the guest.
    pub user: Option<String>,
    /// For example `SIGTERM`.
    pub stop_signal: Option<String>,
}

/// What an import is doing, for progress displays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportEvent {
    Reading { source: String },
    Layer { index: usize, count: usize, bytes: u64 },
    Building,
    Done { digest: String },
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error("image {0} is not on this host")]
    NotFound(String),
    /// Content does not hash to what the manifest says.
    #[error("{what}: digest is {found}, expected {expected}")]
    Digest { what: String, expected: String, found: String },
    /// An archive entry that would leave its folder, or another thing no honest image has.
    #[error("layer {layer}: entry {entry:?}: {reason}")]
    Unsafe { layer: String, entry: String, reason: String },
    #[error("{path}: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("platform {wanted:?} is not in this image; it has {found}")]
    Platform { wanted: String, found: String },
    /// A program this needs is not installed.
    #[error("{what}; {mend}")]
    Missing { what: String, mend: String },
    #[error("{context}")]
    Io { context: String, #[source] source: std::io::Error },
}

/// All images below one folder. Cheap to clone; methods block, call them off the async threads.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens or creates the store and removes what an interrupted import left.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let _ = root;
        unimplemented!()
    }
    /// Imports from an OCI layout (directory or tar) or a docker archive, and points `name` at it.
    /// Nothing is visible before everything is durable.
    pub fn import(
        &self,
        name: &str,
        path: &Path,
        platform: Option<&str>,
        tags: BTreeMap<String, String>,
        progress: &mut dyn FnMut(ImportEvent),
    ) -> Result<Image, ImageError> {
        let _ = (name, path, platform, tags, progress, &self.root);
        unimplemented!()
    }
    /// Any equivalent form of the name: short, tagged, `name@sha256:...`, `name:tag@sha256:...`.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        Err(ImageError::NotFound(name.to_owned()))
    }
    /// All references, sorted by name.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        unimplemented!()
    }
    /// Removes the reference; the content goes too when no other reference and no digest in
    /// `in_use` needs it.
    pub fn delete(&self, name: &str, in_use: &dyn Fn(&str) -> bool) -> Result<(), ImageError> {
        let _ = (name, in_use);
        unimplemented!()
    }
}
