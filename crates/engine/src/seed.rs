//! Stopped instances in bulk, made through the store's own code, for measuring a full server.
use std::{collections::BTreeMap, path::Path};

use doze_lifecycle::Record;
use doze_vmm::Hypervisor;

use crate::{
    EngineError, InstanceSpec,
    engine::new_id,
    instance::store_error,
    now,
    store::{AddressPool, Document, Store, StoredInstance},
};

/// Adds `count` stopped instances named `seed-0`, `seed-1`, ... to the store in `data_dir`. The server
/// must not run. Their image need not exist; they can be listed and deleted, not started.
pub async fn seed_stopped(
    data_dir: &Path,
    pool: Option<AddressPool>,
    count: usize,
) -> Result<(), EngineError> {
    doze_host::files::create_private_dir(data_dir).map_err(crate::context::io_error("data_dir"))?;
    let (store, _) = Store::open(&data_dir.join("doze.db")).map_err(store_error)?;
    let spec = InstanceSpec {
        image: "docker.io/library/seed:latest".into(),
        image_digest: format!("sha256:{}", "0".repeat(64)),
        platform: "linux/amd64".into(),
        hypervisor: Hypervisor::QemuMicrovm,
        vcpus: 2,
        memory_bytes: 512 << 20,
        overlay_bytes: 10 << 30,
        env: BTreeMap::from([("MODE".into(), "production".into())]),
        entrypoint: None,
        cmd: None,
        tags: BTreeMap::from([("team".into(), "seed".into())]),
        network_enabled: pool.is_some(),
        skip_guest_agent: false,
        auto_standby: None,
        snapshot_policy: None,
    };
    for number in 0..count {
        let at = now();
        let stored = StoredInstance {
            id: new_id(),
            name: format!("seed-{number}"),
            created_at_us: at.wall_us,
            claim: None,
            document: Document {
                spec: spec.clone(),
                record: Record::stopped(at),
                machine: None,
                inherited: false,
                rollback: None,
                compression: None,
            },
        };
        store.insert(stored, pool).await.map_err(store_error)?;
    }
    Ok(())
}
