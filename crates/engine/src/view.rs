//! What readers see of an instance. Published by its driver after every durable change.
use std::{collections::BTreeMap, net::Ipv4Addr, sync::Arc};

use doze_host::conntrack::policy::Policy;
use doze_lifecycle::{Record, Stamp, State};
use doze_vmm::Hypervisor;
use serde::{Deserialize, Serialize};

use crate::compression::{
    plan::{MemoryCompression, Running},
    policy::SnapshotPolicy,
};

/// What the user asked for. Changed only by start overrides and by PATCH.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Normalised image reference, as answers carry it.
    pub image: String,
    /// Manifest digest the instance was made from; the rootfs is looked up by it.
    pub image_digest: String,
    pub platform: String,
    pub hypervisor: Hypervisor,
    pub vcpus: u32,
    pub memory_bytes: u64,
    pub overlay_bytes: u64,
    /// The request's own variables.
    pub env: BTreeMap<String, String>,
    /// Override of the image's entrypoint; `None`: the image's.
    pub entrypoint: Option<Vec<String>>,
    /// Override of the image's command; `None`: the image's.
    pub cmd: Option<Vec<String>>,
    pub tags: BTreeMap<String, String>,
    pub network_enabled: bool,
    pub skip_guest_agent: bool,
    /// `None`: never given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<Policy>,
    /// `None`: never given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,
}

/// Network claims of an instance, held from create to delete.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkClaim {
    pub ip: Ipv4Addr,
    pub mac: String,
    /// At most 15 characters, unique on this host.
    pub tap: String,
}

/// One consistent look at an instance.
#[derive(Debug, Clone)]
pub struct InstanceView {
    /// CUID2, 24 characters.
    pub id: String,
    pub name: String,
    /// Microseconds since the Unix epoch.
    pub created_at_us: i64,
    pub spec: Arc<InstanceSpec>,
    pub network: Option<NetworkClaim>,
    /// State, operation in flight, ledger, exit, start and stop stamps.
    pub record: Arc<Record>,
    /// How its memory is kept while it sleeps; `None`: as it is.
    pub compression: Option<MemoryCompression>,
    /// Whether that is being done.
    pub compressing: Option<Running>,
    /// Set when the state could not be determined; the wire then says `Unknown`.
    pub unknown: Option<String>,
}

impl InstanceView {
    pub fn state(&self) -> State {
        self.record.state()
    }
    /// Whether its memory is being compressed, and not only going to be.
    pub fn is_compressing(&self) -> bool {
        self.compressing.as_ref().is_some_and(Running::is_running)
    }
    /// Milliseconds per phase up to `now`, the live phase included; phases never entered are absent.
    pub fn phase_durations_ms(&self, now: &Stamp) -> BTreeMap<&'static str, u64> {
        self.record.ledger().durations_ms(now)
    }
}
