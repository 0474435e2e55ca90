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
        compression: None,
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
    let gone = |request: ScheduleRequest, kept| expired(&all, &request, kept, 300);
    assert_eq!(gone(of(Some(2), None), Some("c")), ["a"]);
    assert_eq!(gone(of(None, Some(150)), Some("c")), ["a", "b"]);
    assert_eq!(gone(of(Some(3), Some(300)), Some("c")), [""; 0]);
    assert_eq!(gone(of(Some(1), Some(150)), Some("c")), ["a", "b"]);
    assert_eq!(gone(of(None, Some(50)), None), ["a", "b", "c"]);
    // The one just taken stays, also when a clock that was set back makes it the oldest.
    assert_eq!(gone(of(Some(1), None), Some("a")), ["b", "c"]);
    assert_eq!(gone(of(Some(2), None), Some("a")), ["b"]);
    assert_eq!(gone(of(None, Some(50)), Some("c")), ["a", "b"]);
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

#[test]
fn a_run_further_ahead_than_any_can_be_is_a_clocks_mistake() {
    let schedule = |next_run_at_us| Schedule {
        instance_id: "a".into(),
        request: request(),
        created_at_us: 0,
        updated_at_us: 0,
        next_run_at_us,
        last_run_at_us: None,
        last_snapshot_id: None,
        last_error: None,
    };
    let furthest = later(1_000, MINUTE + jitter_us("a", MINUTE));
    assert!(!is_stray(&schedule(furthest), 1_000));
    assert!(is_stray(&schedule(furthest + 1), 1_000));
    assert!(!is_stray(&schedule(-5), 1_000));
}
