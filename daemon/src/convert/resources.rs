//! What the host has and what is in use, in the words of the wire.
use std::{collections::BTreeMap, sync::Arc};

use doze_api::{DiskBreakdown, ResourceAllocation, ResourceStatus, Resources};
use doze_engine::{DiskUsage, Engine, EngineError, InstanceView};

/// What is there to be used.
#[derive(Debug, Clone, Copy)]
struct Host {
    cpus: u64,
    memory: u64,
}

impl Host {
    fn detect() -> Host {
        let info = rustix::system::sysinfo();
        Host {
            // As this process may use it: affinity and CPU quotas count. Unknown is 0, which nobody mistakes.
            cpus: std::thread::available_parallelism().map_or(0, |count| count.get() as u64),
            memory: info.totalram.saturating_mul(u64::from(info.mem_unit)),
        }
    }
}

pub(crate) async fn resources(engine: &Engine) -> Result<Resources, EngineError> {
    let disk = engine.disk_usage().await?;
    Ok(answer(
        Host::detect(),
        engine.memory_usage(),
        &disk,
        &engine.list(),
    ))
}

fn answer(
    host: Host,
    (booked, memory_limit): (u64, u64),
    disk: &DiskUsage,
    instances: &[Arc<InstanceView>],
) -> Resources {
    let on_disk: BTreeMap<&str, u64> = disk
        .instances
        .iter()
        .map(|(id, _, bytes)| (id.as_str(), *bytes))
        .collect();
    let allocations: Vec<_> = instances
        .iter()
        .map(|view| allocation(view, on_disk.get(view.id.as_str()).copied()))
        .collect();
    let vcpus = allocations.iter().map(|allocation| allocation.cpu).sum();
    let configured = memory_limit != host.memory;
    Resources {
        // Nothing keeps the guests from having more vCPUs than the host has CPUs.
        cpu: status("cpu", host.cpus, host.cpus, vcpus, Some("detected"), false),
        memory: status(
            "memory",
            host.memory,
            memory_limit,
            booked,
            Some(if configured { "configured" } else { "detected" }),
            true,
        ),
        // Others use this file system, too: what they hold cannot be allocated here.
        disk: status(
            "disk",
            disk.capacity,
            disk.allocated.saturating_add(disk.free),
            disk.allocated,
            Some("detected"),
            true,
        ),
        network: status("network", 0, 0, 0, None, false),
        disk_breakdown: Some(DiskBreakdown {
            images_bytes: disk.images,
            oci_cache_bytes: 0,
            overlays_bytes: disk.overlays,
            volumes_bytes: 0,
            memory_bytes: disk.memory,
            snapshots_bytes: disk.snapshots,
        }),
        gpu: None,
        allocations,
    }
}

fn status(
    kind: &str,
    capacity: u64,
    limit: u64,
    allocated: u64,
    source: Option<&str>,
    enforced: bool,
) -> ResourceStatus {
    ResourceStatus {
        kind: kind.to_owned(),
        capacity,
        oversub_ratio: match capacity {
            0 => 1.0,
            capacity => limit as f64 / capacity as f64,
        },
        effective_limit: limit,
        allocated,
        available: limit.saturating_sub(allocated),
        source: source.map(str::to_owned),
        enforced,
    }
}

/// CPUs and memory belong to machines; one that sleeps or is stopped has none.
fn allocation(view: &InstanceView, disk_bytes: Option<u64>) -> ResourceAllocation {
    let machine = view.state().has_machine();
    let if_machine = |amount: u64| if machine { amount } else { 0 };
    ResourceAllocation {
        instance_id: view.id.clone(),
        instance_name: view.name.clone(),
        cpu: if_machine(u64::from(view.spec.vcpus)),
        memory_bytes: if_machine(view.spec.memory_bytes),
        disk_bytes: disk_bytes.unwrap_or(0),
        disk_io_bps: 0,
        network_download_bps: 0,
        network_upload_bps: 0,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use doze_engine::InstanceSpec;
    use doze_lifecycle::{Record, Stamp};

    use super::*;

    const HOST: Host = Host {
        cpus: 2,
        memory: 8 << 30,
    };

    fn view(id: &str, record: Record) -> Arc<InstanceView> {
        Arc::new(InstanceView {
            id: id.to_owned(),
            name: format!("{id}-name"),
            created_at_us: 0,
            spec: Arc::new(InstanceSpec {
                image: "docker.io/library/alpine:latest".to_owned(),
                image_digest: "sha256:0".to_owned(),
                platform: "linux/amd64".to_owned(),
                hypervisor: doze_vmm::Hypervisor::QemuMicrovm,
                vcpus: 3,
                memory_bytes: 1 << 30,
                overlay_bytes: 10 << 30,
                env: BTreeMap::new(),
                entrypoint: None,
                cmd: None,
                tags: BTreeMap::new(),
                network_enabled: false,
                skip_guest_agent: false,
                auto_standby: None,
                snapshot_policy: None,
            }),
            network: None,
            record: Arc::new(record),
            compression: None,
            compressing: None,
            unknown: None,
        })
    }

    fn stamp() -> Stamp {
        Stamp {
            boot_id: "b".to_owned(),
            boottime_us: 0,
            wall_us: 0,
        }
    }

    #[test]
    fn only_machines_hold_cpu_and_memory_and_everybody_holds_disk() {
        let disk = DiskUsage {
            capacity: 1000,
            free: 500,
            allocated: 300,
            images: 100,
            overlays: 150,
            memory: 30,
            snapshots: 20,
            instances: vec![
                ("awake".to_owned(), "awake-name".to_owned(), 120),
                ("gone".to_owned(), "gone-name".to_owned(), 7),
            ],
        };
        let instances = [
            view("awake", Record::creating(stamp())),
            view("stopped", Record::stopped(stamp())),
        ];
        let answer = answer(HOST, (1 << 30, 4 << 30), &disk, &instances);
        assert_eq!((answer.cpu.allocated, answer.cpu.available), (3, 0));
        assert!(!answer.cpu.enforced);
        assert_eq!(answer.memory.available, 3 << 30);
        assert_eq!(answer.memory.oversub_ratio, 0.5);
        assert_eq!(answer.memory.source.as_deref(), Some("configured"));
        // 200 bytes are somebody else's.
        assert_eq!(
            (answer.disk.effective_limit, answer.disk.available),
            (800, 500)
        );
        let by_instance: Vec<_> = answer
            .allocations
            .iter()
            .map(|a| {
                (
                    a.instance_name.as_str(),
                    a.cpu,
                    a.memory_bytes,
                    a.disk_bytes,
                )
            })
            .collect();
        assert_eq!(
            by_instance,
            [("awake-name", 3, 1 << 30, 120), ("stopped-name", 0, 0, 0)]
        );
        let json = serde_json::to_value(&answer).unwrap();
        assert!(json.as_object().unwrap()["gpu"].is_null());
        assert_eq!(json["network"]["type"], "network");
        assert_eq!(json["network"]["capacity"], 0);
        assert!(json.get("disk_io").is_none());
        assert_eq!(json["disk_breakdown"]["snapshots_bytes"], 20);
    }

    #[test]
    fn an_unlimited_server_takes_what_the_host_has() {
        let answer = answer(HOST, (0, HOST.memory), &DiskUsage::default(), &[]);
        assert_eq!(answer.memory.source.as_deref(), Some("detected"));
        assert_eq!(answer.memory.oversub_ratio, 1.0);
        assert_eq!(answer.disk.oversub_ratio, 1.0);
        assert_eq!(answer.allocations, []);
    }

    #[test]
    fn this_host_has_something() {
        let host = Host::detect();
        assert!(host.cpus > 0 && host.memory > 64 << 20, "{host:?}");
    }
}
