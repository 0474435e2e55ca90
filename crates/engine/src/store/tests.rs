//! The store on a real file: durability, refusals, addresses, group commit.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::collections::{BTreeMap, HashSet};

use doze_lifecycle::Stamp;
use doze_vmm::Hypervisor;

use super::*;

fn stored(id: &str, name: &str) -> StoredInstance {
    let at = Stamp {
        boot_id: "b".into(),
        boottime_us: 1,
        wall_us: 1,
    };
    let spec = InstanceSpec {
        image: "docker.io/library/a:latest".into(),
        image_digest: "sha256:0".into(),
        platform: "linux/amd64".into(),
        hypervisor: Hypervisor::Qemu,
        vcpus: 1,
        memory_bytes: 1,
        overlay_bytes: 1,
        env: BTreeMap::new(),
        entrypoint: None,
        cmd: None,
        tags: BTreeMap::new(),
        network_enabled: true,
        skip_guest_agent: false,
        auto_standby: None,
        snapshot_policy: None,
    };
    StoredInstance {
        id: id.into(),
        name: name.into(),
        created_at_us: 1,
        claim: None,
        document: Document {
            spec,
            record: Record::creating(at),
            machine: None,
            inherited: false,
            rollback: None,
            compression: None,
        },
    }
}

fn pool(prefix: u8) -> AddressPool {
    let network = Ipv4Addr::new(10, 1, 0, 0);
    AddressPool {
        subnet: Subnet { network, prefix },
        gateway: Ipv4Addr::new(10, 1, 0, 1),
    }
}

#[tokio::test]
async fn what_was_answered_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    let (store, Contents { instances: all, .. }) = Store::open(&path).unwrap();
    assert!(all.is_empty());
    let claim = store
        .insert(stored("i1", "one"), Some(pool(24)))
        .await
        .unwrap()
        .unwrap();
    store.insert(stored("i2", "two"), None).await.unwrap();
    store
        .insert(stored("i3", "three"), Some(pool(24)))
        .await
        .unwrap();
    let mut changed = stored("i1", "one").document;
    changed.spec.vcpus = 4;
    store.update("i1", changed.clone()).await.unwrap();
    store.remove("i3").await.unwrap();
    // No orderly end: a second reader sees what is on disk.
    let (_, Contents { instances: all, .. }) = Store::open(&path).unwrap();
    assert_eq!(all.len(), 2);
    assert_eq!(all[0].claim, Some(claim));
    assert_eq!(all[0].document, changed);
    assert_eq!(all[1].claim, None);
}

#[tokio::test]
async fn a_taken_name_is_refused_and_takes_no_address() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(&dir.path().join("doze.db")).unwrap();
    store
        .insert(stored("i1", "one"), Some(pool(24)))
        .await
        .unwrap();
    let refused = store
        .insert(stored("i2", "one"), Some(pool(24)))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, StoreError::NameTaken { holder, .. } if holder == "i1"),
        "{refused}"
    );
    let missing = store
        .update("i2", stored("i2", "x").document)
        .await
        .unwrap_err();
    assert!(matches!(missing, StoreError::Missing(_)), "{missing}");
    // The refused one left nothing: the name is free once its holder is gone.
    store.remove("i1").await.unwrap();
    store
        .insert(stored("i2", "one"), Some(pool(24)))
        .await
        .unwrap();
}

#[tokio::test]
async fn addresses_are_unique_not_reused_at_once_and_run_out_with_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(&dir.path().join("doze.db")).unwrap();
    // A /29 has six hosts, one of them the gateway.
    let mut seen = HashSet::new();
    for n in 0..5 {
        let id = format!("i{n}");
        let claim = store
            .insert(stored(&id, &id), Some(pool(29)))
            .await
            .unwrap()
            .unwrap();
        assert!(claim.tap.len() <= 15 && seen.insert(claim.ip), "{claim:?}");
        assert_ne!(claim.ip, pool(29).gateway);
    }
    let full = store
        .insert(stored("i9", "i9"), Some(pool(29)))
        .await
        .unwrap_err();
    assert!(matches!(full, StoreError::NoAddress { .. }), "{full}");
    store.remove("i0").await.unwrap();
    store.remove("i1").await.unwrap();
    let first = store
        .insert(stored("j0", "j0"), Some(pool(29)))
        .await
        .unwrap()
        .unwrap();
    store.remove("j0").await.unwrap();
    let second = store
        .insert(stored("j1", "j1"), Some(pool(29)))
        .await
        .unwrap()
        .unwrap();
    assert_ne!(
        first.ip, second.ip,
        "a freed address is the last to be given out again"
    );
}

#[tokio::test]
async fn many_writers_at_once_all_get_their_own_outcome() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    let (store, _) = Store::open(&path).unwrap();
    let jobs = (0..200).map(|n| {
        let instance = stored(&format!("i{n}"), &format!("name-{}", n % 150));
        store.insert(instance, Some(pool(16)))
    });
    let outcomes = futures::future::join_all(jobs).await;
    assert_eq!(outcomes.iter().filter(|o| o.is_ok()).count(), 150);
    let (_, Contents { instances: all, .. }) = Store::open(&path).unwrap();
    let ips: HashSet<_> = all
        .iter()
        .filter_map(|i| i.claim.as_ref())
        .map(|c| c.ip)
        .collect();
    assert_eq!((all.len(), ips.len()), (150, 150));
}

#[test]
fn a_store_of_a_newer_program_is_refused_with_both_versions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    drop(Store::open(&path).unwrap());
    Connection::open(&path)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    let error = Store::open(&path).err().unwrap().to_string();
    assert!(
        error.contains("99") && error.contains("program's 3"),
        "{error}"
    );
}

/// As the first version wrote it, a guest running.
const FIRST_VERSION: &str = r#"{"spec":{"image":"docker.io/library/seed:latest","image_digest":"sha256:0000","platform":"linux/amd64","hypervisor":"qemu-microvm","vcpus":2,"memory_bytes":536870912,"overlay_bytes":10737418240,"env":{"MODE":"production"},"entrypoint":null,"cmd":null,"tags":{"team":"seed"},"network_enabled":false,"skip_guest_agent":false},"record":{"version":1,"state":"Running","operation":null,"machine":{"pid":7,"start_ticks":9,"boot_id":"b"},"boot":{"agent_expected":true,"program_started":{"boot_id":"b","boottime_us":3000000,"wall_us":1003000000},"agent_ready":{"boot_id":"b","boottime_us":2500000,"wall_us":1002500000}},"ledger":{"committed_us":{"Created":500000,"Initializing":1500000},"current":"Running","since":{"boot_id":"b","boottime_us":3000000,"wall_us":1003000000}},"exit":null,"failure":null,"started_at_us":1001500000,"stopped_at_us":null,"boots":1},"machine":null}"#;

#[tokio::test]
async fn what_the_first_version_wrote_is_read_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    drop(Store::open(&path).unwrap());
    Connection::open(&path)
        .unwrap()
        .execute(
            "INSERT INTO instances (id, name, created_at_us, document) VALUES ('old', 'old', 1, ?1)",
            [FIRST_VERSION],
        )
        .unwrap();
    let (_store, Contents { instances: all, .. }) = Store::open(&path).unwrap();
    let record = &all[0].document.record;
    let at = |seconds: u64| doze_lifecycle::Stamp {
        boot_id: "b".into(),
        boottime_us: seconds * 1_000_000,
        wall_us: 0,
    };
    let spent = record.ledger().durations_ms(&at(13));
    assert_eq!(
        (spent["created"], spent["initializing"], spent["running"]),
        (500, 1_500, 10_000)
    );
    assert!(!record.has_snapshot() && record.ledger().transitions().len() == 0);
    let operation = doze_lifecycle::Operation::Standby;
    let asleep = [
        doze_lifecycle::Fact::Admitted(operation),
        doze_lifecycle::Fact::CpusPaused,
        doze_lifecycle::Fact::SnapshotCommitted,
        doze_lifecycle::Fact::MachineGone { failure: None },
    ]
    .iter()
    .fold(record.clone(), |record, fact| {
        record.apply(fact, &at(14), None).unwrap()
    });
    assert_eq!(asleep.state(), doze_lifecycle::State::Standby);
    // An older program would not know what this means.
    let text = serde_json::to_string(&asleep).unwrap();
    assert!(text.contains("\"version\":4"), "{text}");
}

fn snapshot(id: &str, name: Option<&str>) -> Snapshot {
    let document = stored("source", "source").document;
    Snapshot {
        id: id.into(),
        name: name.map(str::to_owned),
        kind: crate::SnapshotKind::Standby,
        source_id: "source".into(),
        source_name: "source".into(),
        created_at_us: 1,
        tags: BTreeMap::new(),
        scheduled: false,
        size_bytes: 7,
        memory_bytes: 5,
        spec: document.spec,
        record: document.record,
        inherited: false,
        compression: None,
    }
}

#[tokio::test]
async fn snapshots_and_schedules_outlive_their_instance() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    let (store, _) = Store::open(&path).unwrap();
    store
        .insert(stored("source", "source"), None)
        .await
        .unwrap();
    let (one, two) = (snapshot("s1", Some("kept")), snapshot("s2", None));
    store.add_snapshot(one.clone()).await.unwrap();
    store.add_snapshot(two.clone()).await.unwrap();
    let taken = store.add_snapshot(snapshot("s3", Some("kept"))).await;
    let Err(StoreError::SnapshotNameTaken { name, holder }) = taken else {
        panic!("{taken:?}");
    };
    assert_eq!((name.as_str(), holder.as_str()), ("kept", "s1"));
    let schedule = Schedule {
        instance_id: "source".into(),
        request: crate::ScheduleRequest {
            interval_us: 60_000_000,
            max_count: Some(1),
            max_age_us: None,
            metadata: BTreeMap::new(),
            name_prefix: None,
        },
        created_at_us: 1,
        updated_at_us: 1,
        next_run_at_us: 2,
        last_run_at_us: None,
        last_snapshot_id: None,
        last_error: None,
    };
    store.put_schedule(schedule.clone()).await.unwrap();
    let changed = Schedule {
        next_run_at_us: 3,
        ..schedule
    };
    store.put_schedule(changed.clone()).await.unwrap();
    store.remove("source").await.unwrap();
    drop(store);
    let (store, contents) = Store::open(&path).unwrap();
    assert!(contents.instances.is_empty());
    assert_eq!(contents.snapshots, [one.clone(), two]);
    assert_eq!(contents.schedules, [changed]);
    store.remove_snapshot("s2").await.unwrap();
    store.remove_schedule("source").await.unwrap();
    drop(store);
    let (_store, contents) = Store::open(&path).unwrap();
    assert_eq!(contents.snapshots, [one]);
    assert!(contents.schedules.is_empty());
}

/// A table more, and everything that was there is there still.
#[tokio::test]
async fn a_file_of_the_first_schema_gets_room_for_what_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("doze.db");
    let old = Connection::open(&path).unwrap();
    old.execute_batch(SCHEMA_1).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    insert(&old, &stored("i1", "one"), None).unwrap();
    drop(old);
    let (store, Contents { instances: all, .. }) = Store::open(&path).unwrap();
    assert_eq!(all.len(), 1);
    assert!(store.memories().await.unwrap().is_empty());
    store.remember("i1", "first".into()).await.unwrap();
    store.remember("i1", "second".into()).await.unwrap();
    let missing = store.remember("i2", "of nobody".into()).await;
    assert!(matches!(missing, Err(StoreError::Missing(id)) if id == "i2"));
    drop(store);
    let (store, _) = Store::open(&path).unwrap();
    let kept = vec![("i1".to_owned(), "second".to_owned())];
    assert_eq!(store.memories().await.unwrap(), kept);
    store.remove("i1").await.unwrap();
    assert!(store.memories().await.unwrap().is_empty());
}
