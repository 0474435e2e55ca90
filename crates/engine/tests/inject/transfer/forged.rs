//! Moments and sums that a stream claims: nothing here is billed from them.
use std::time::Instant;

use doze_engine::{MetricsView, Revival, SnapshotKind, now};
use doze_lifecycle::State;
use serde_json::json;

use super::{altered, import, sent};
use crate::lab::Lab;

fn phases(lab: &Lab) -> MetricsView {
    lab.engine().metrics()
}

#[test]
fn a_forged_record_moves_neither_ledger_nor_metrics() {
    let sent = sent(SnapshotKind::Standby);
    let here = now();
    let moments = [
        // Later than all that will be, in this very boot of the host; its beginning; another host's.
        json!({"boot_id": here.boot_id, "boottime_us": u64::MAX, "wall_us": i64::MAX}),
        json!({"boot_id": here.boot_id, "boottime_us": 0, "wall_us": i64::MIN}),
        json!({"boot_id": "another", "boottime_us": 4_600_000_000_000_000_000_u64, "wall_us": 0}),
    ];
    let begun = Instant::now();
    let there = sent.here.beside();
    for (number, moment) in moments.iter().enumerate() {
        let forged = altered(&sent.stream, |told| {
            let snapshot = &mut told["snapshot"];
            snapshot["created_at_us"] = i64::MAX.into();
            let record = &mut snapshot["record"];
            record["boot"]["program_started"] = moment.clone();
            record["boot"]["agent_ready"] = moment.clone();
            record["boots"] = u64::MAX.into();
            record["ledger"]["since"] = moment.clone();
            record["ledger"]["committed_us"] = json!({"Running": u64::MAX, "Stopped": u64::MAX});
            record["ledger"]["estimated_us"] = json!({"Running": u64::MAX});
            record["ledger"]["transitions_total"] = u64::MAX.into();
        });
        let name = format!("forged-{number}");
        let imported = import(&there, &forged, Some(&name)).unwrap();
        assert!(imported.created_at_us <= now().wall_us);
        let kept = serde_json::to_string(&*imported).unwrap();
        assert!(!kept.contains(&u64::MAX.to_string()), "{kept}");
        let engine = there.engine();
        let fork = there
            .run(async {
                engine
                    .fork_snapshot(&imported.id, name, Revival::default())
                    .await
            })
            .unwrap();
        assert_eq!(fork.state(), State::Running);
        let later = doze_lifecycle::Stamp {
            boottime_us: now().boottime_us + 3_600_000_000,
            ..now()
        };
        let ledger = fork.record.ledger();
        let spent = ledger.durations_us(&later);
        assert!(spent[&State::Running] >= 3_600_000_000, "{spent:?}");
        let most = u64::try_from(begun.elapsed().as_micros()).unwrap();
        let other: u64 = spent.values().sum::<u64>() - spent[&State::Running];
        assert!(other <= most, "{spent:?}");
        assert!(ledger.estimated_ms().is_empty());
    }
    let most = u64::try_from(begun.elapsed().as_micros()).unwrap() * moments.len() as u64;
    let all: u64 = phases(&there).phase_us.values().sum();
    assert!(all <= most, "{:?}", phases(&there).phase_us);
}
