//! What a schedule decides, without a clock.
#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;

const MINUTE: u64 = 60_000_000;

fn request() -> ScheduleRequest {
    ScheduleRequest {
        interval_us: MINUTE,
        max_count: None,
        max_age_us: None,
        metadata: BTreeMap::new(),
        name_prefix: None,
    }
}

fn taken(id: &str, at_us: i64) -> Arc<Snapshot> {
    let record = doze_lifecycle::Record::stopped(now());
    let spec = serde_json::json!({
        "image": "i", "image_digest": "d", "platform": "p", "hypervisor": "qemu", "vcpus": 1,
        "memory_bytes": 1, "overlay_bytes": 1, "env": {}, "tags": {}, "entrypoint": null,
        "cmd": null, "network_enabled": false, "skip_guest_agent": false
    });
    Arc::new(Snapshot {
        id: id.into(),
        name: None,
        kind: SnapshotKind::Stopped,
        source_id: "one".into(),
        source_name: "one".into(),
        created_at_us: at_us,
        tags: BTreeMap::new(),
        scheduled: true,
        size_bytes: 0,
        memory_bytes: 0,
        spec: serde_json::from_value(spec).unwrap(),
        record,
        inherited: false,
    })
}

#[test]
fn what_was_missed_is_made_up_for_once_and_the_cadence_stays() {
    let minute = MINUTE as i64;
    assert_eq!(next_run(minute, MINUTE, minute), 2 * minute);
    assert_eq!(next_run(minute, MINUTE, minute + 1), 2 * minute);
    assert_eq!(next_run(minute, MINUTE, 10 * minute + 5), 11 * minute);
    // A clock that was set back does not bring runs forward.
    assert_eq!(next_run(5 * minute, MINUTE, 0), 6 * minute);
}

#[test]
fn the_jitter_of_an_instance_is_always_the_same_and_bounded() {
    assert_eq!(jitter_us("a", MINUTE), jitter_us("a", MINUTE));
    assert_ne!(jitter_us("a", MINUTE), jitter_us("b", MINUTE));
    for id in ["a", "b", "c", "d"] {
        assert!(jitter_us(id, MINUTE) < MINUTE / 10);
        assert!(jitter_us(id, 1_000 * MINUTE) < MAX_JITTER_US);
    }
}

#[test]
fn retention_counts_and_looks_at_the_age() {
    let all = [taken("a", 0), taken("b", 100), taken("c", 200)];
    let of = |max_count, max_age_us| ScheduleRequest {
        max_count,
        max_age_us,
        ..request()
    };
    assert_eq!(expired(&all, &of(Some(2), None), 300), ["a"]);
    assert_eq!(expired(&all, &of(None, Some(150)), 300), ["a", "b"]);
    assert_eq!(expired(&all, &of(Some(3), Some(300)), 300), [""; 0]);
    assert_eq!(expired(&all, &of(Some(1), Some(150)), 300), ["a", "b"]);
}

#[test]
fn a_name_of_a_run_is_a_name_of_a_snapshot() {
    let at = 1_700_000_000_000_000;
    assert_eq!(name_of_run(&request(), at), "scheduled-20231114t221320");
    let prefix = Some("p".repeat(47));
    let longest = ScheduleRequest {
        name_prefix: prefix,
        ..request()
    };
    assert_eq!(name_of_run(&longest, at).len(), 63);
}
