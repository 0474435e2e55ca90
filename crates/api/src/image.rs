//! Images on the wire.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ErrorBody;

/// An image of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Normalised reference, for example `docker.io/library/alpine:latest`.
    pub name: String,
    /// Manifest digest.
    pub digest: String,
    pub status: ImageStatus,
    /// RFC 3339, UTC.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// `os/arch[/variant]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Bytes on disk; null until ready.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default)]
    pub cmd: Option<Vec<String>>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub working_dir: Option<String>,
    /// Why `status` is `failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Place in the queue; null when not queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u64>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageStatus {
    Pending,
    Pulling,
    Converting,
    Ready,
    Failed,
}

/// One line of an import's NDJSON progress (`POST /images/import` with
/// `Accept: application/x-ndjson`). `image` or `error` is the last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum ImportEvent {
    /// The upload is complete; its size.
    Received { bytes: u64 },
    /// The archive is being read.
    Reading { source: String },
    /// Layer `index` (from 0) of `count` is being unpacked; `bytes` is its size in the archive.
    Layer {
        index: usize,
        count: usize,
        bytes: u64,
    },
    /// The root file system is being built.
    Building,
    /// Done.
    Image { image: Box<Image> },
    /// Given up; nothing is left behind. `status` is what the HTTP status would have been.
    Error { status: u16, error: ErrorBody },
}
