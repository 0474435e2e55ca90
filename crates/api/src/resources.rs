//! What the host has, and how much of it is in use, on the wire.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Answer of `GET /resources`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// vCPUs.
    pub cpu: ResourceStatus,
    /// Bytes of memory booked by machines that exist.
    pub memory: ResourceStatus,
    /// Bytes of the file system of the data folder. What several files share counts once.
    pub disk: ResourceStatus,
    /// Not measured: all zero.
    pub network: ResourceStatus,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_breakdown: Option<DiskBreakdown>,
    /// Always null: this server hands no GPUs to instances.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub gpu: Option<serde_json::Value>,
    /// One entry per instance.
    pub allocations: Vec<ResourceAllocation>,
}

/// One kind of resource.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResourceStatus {
    /// `cpu`, `memory`, `disk` or `network`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the host has.
    pub capacity: u64,
    /// `effective_limit / capacity`.
    pub oversub_ratio: f64,
    /// What may be allocated in all.
    pub effective_limit: u64,
    pub allocated: u64,
    /// `effective_limit - allocated`.
    pub available: u64,
    /// `detected` or `configured`; absent when it is not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Addition of doze: what goes beyond the limit is refused.
    #[serde(default)]
    pub enforced: bool,
}

/// What holds the disk. What several kinds share is counted with the first of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskBreakdown {
    /// Root file systems of images.
    #[serde(default)]
    pub images_bytes: u64,
    /// Always 0: layers are not kept.
    #[serde(default)]
    pub oci_cache_bytes: u64,
    /// Writable disks of instances.
    #[serde(default)]
    pub overlays_bytes: u64,
    /// Always 0: there are no volumes.
    #[serde(default)]
    pub volumes_bytes: u64,
    /// Addition of doze: memory of instances, running or asleep.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Addition of doze: stored snapshots.
    #[serde(default)]
    pub snapshots_bytes: u64,
}

/// What one instance holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResourceAllocation {
    #[serde(default)]
    pub instance_id: String,
    #[serde(default)]
    pub instance_name: String,
    /// vCPUs; 0 while it has no machine.
    #[serde(default)]
    pub cpu: u64,
    /// Bytes; 0 while it has no machine.
    #[serde(default)]
    pub memory_bytes: u64,
    /// Bytes of disk its files hold; what it shares with others counts with each.
    #[serde(default)]
    pub disk_bytes: u64,
    /// Always 0: without limit.
    #[serde(default)]
    pub disk_io_bps: u64,
    /// Always 0: without limit.
    #[serde(default)]
    pub network_download_bps: u64,
    /// Always 0: without limit.
    #[serde(default)]
    pub network_upload_bps: u64,
}
