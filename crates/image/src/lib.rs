//! OCI images on this host: references, import, unpacking, and one read-only EROFS rootfs per
//! image digest, content-addressed and shared by every instance of the image.
//!
//! ```text
//!   NAME ----- reference: normalised as Docker does -----------------------+
//!                                                                          |
//!   PATH -> import: what is inside?     layer: unpack in order   rootfs:   v   store:
//!           OCI layout, docker archive   whiteouts, links, ...   mkfs.erofs    blobs/sha256-<hex>/
//!           digests of every blob  --->  diff_id of each   --->  one file ---> refs/<name>.json
//! ```
//!
//! Invariants:
//! - Nothing an archive says can name a path outside the stage folder it is unpacked in (`layer`).
//! - Nothing is visible in the store before it is durable (`store`).
//! - The same image digest gives the same rootfs bytes with the same `mkfs.erofs` (`rootfs`).
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

mod digest;
mod import;
mod layer;
pub mod reference;
mod rootfs;
mod store;
#[cfg(test)]
mod testing;

pub use layer::Limits;
pub use reference::{Reference, ReferenceError};
pub use store::ImageStore;

/// A ready image as one reference sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Normalised reference (`docker.io/library/alpine:latest`, or with `@sha256:...`).
    pub name: String,
    /// Manifest digest, `sha256:<64 hex>`.
    pub digest: String,
    /// RFC 3339 UTC: when this host first pointed this name at this digest.
    pub created_at: String,
    /// `linux/amd64`.
    pub platform: String,
    /// Bytes of the rootfs file.
    pub size_bytes: u64,
    pub config: ImageConfig,
    /// The EROFS file; immutable, mode 0444.
    pub rootfs: PathBuf,
    /// Of its bytes, `sha256:<64 hex>`: another `mkfs.erofs` makes others of the same image.
    pub rootfs_digest: String,
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
///
/// The order is `Reading`, then `Layer` events with growing `index` and, within one index, growing
/// `bytes`, then `Building`, then `Done`. An image whose content is already here has no `Layer` and
/// no `Building`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportEvent {
    Reading {
        source: String,
    },
    /// `index` counts from 0; `bytes` of this layer's uncompressed archive have been unpacked.
    Layer {
        index: usize,
        count: usize,
        bytes: u64,
    },
    Building,
    Done {
        digest: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error("image {0} is not on this host")]
    NotFound(String),
    /// Content does not hash to what the manifest says.
    #[error("{what}: digest is {found}, expected {expected}")]
    Digest {
        what: String,
        expected: String,
        found: String,
    },
    /// An archive entry that would leave its folder, or another thing no honest image has.
    #[error("layer {layer}: entry {entry:?}: {reason}")]
    Unsafe {
        layer: String,
        entry: String,
        reason: String,
    },
    #[error("{path}: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("platform {wanted:?} is not in this image; it has {found}")]
    Platform { wanted: String, found: String },
    /// A program this needs is not installed.
    #[error("{what}; {mend}")]
    Missing { what: String, mend: String },
    #[error("{context}")]
    Io {
        context: String,
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// For `map_err`: says what was being done when the system refused.
    pub(crate) fn io<E: Into<io::Error>>(context: impl Into<String>) -> impl FnOnce(E) -> Self {
        let context = context.into();
        move |source| Self::Io {
            context,
            source: source.into(),
        }
    }

    pub(crate) fn format(path: &Path, reason: impl Into<String>) -> Self {
        Self::Format {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
