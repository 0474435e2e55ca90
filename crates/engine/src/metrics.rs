//! What happened since this server started, counted where it is booked.
//!
//! Counters never run backwards, although the live part of a phase is provisional until the guest has
//! told its side: what was shown once is the least that is shown later.
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use doze_lifecycle::{Cause, Ledger, Stamp, State};

use crate::{InstanceView, context::lock};

/// One change of phase, as it is counted.
pub type Change = (State, State, Cause);

pub struct Metrics {
    start: Stamp,
    counted: Mutex<Counted>,
}

#[derive(Default)]
struct Counted {
    changes: BTreeMap<Change, u64>,
    /// Microseconds of closed intervals, as far as they lie after the server's start.
    closed_us: BTreeMap<State, u64>,
    shown_us: BTreeMap<State, u64>,
}

/// One look at the counters.
#[derive(Debug, Clone, Default)]
pub struct MetricsView {
    /// Instances by state now; every state is there.
    pub instances: BTreeMap<State, u64>,
    /// Microseconds spent by all instances since the server's start; every phase is there.
    pub phase_us: BTreeMap<State, u64>,
    /// Changes of phase since the server's start.
    pub changes: BTreeMap<Change, u64>,
}

impl Metrics {
    pub fn new(start: Stamp) -> Metrics {
        Metrics {
            start,
            counted: Mutex::default(),
        }
    }

    /// Counts what the second ledger has beyond the first, and publishes it with `show` in the same moment: nobody
    /// sees it counted twice.
    pub fn booked(&self, before: &Ledger, after: &Ledger, show: impl FnOnce()) {
        let new = after
            .transitions_total()
            .saturating_sub(before.transitions_total());
        let kept = after.transitions().len();
        let new = usize::try_from(new).unwrap_or(kept).min(kept);
        let mut since = before.since().clone();
        let mut counted = lock(&self.counted);
        for change in after.transitions().skip(kept - new) {
            let key = (change.from, change.to, change.cause);
            *counted.changes.entry(key).or_default() += 1;
            let begin = since.later(self.start.clone());
            *counted.closed_us.entry(change.from).or_default() += change.at.since_us(&begin);
            since = change.at.clone();
        }
        show();
    }

    /// Keeps what an instance spent in its last phase when `remove` takes it off the list.
    pub fn forgotten(&self, now: &Stamp, remove: impl FnOnce() -> Option<Arc<InstanceView>>) {
        let mut counted = lock(&self.counted);
        if let Some(view) = remove() {
            let ledger = view.record.ledger();
            *counted.closed_us.entry(ledger.current()).or_default() += self.live_us(ledger, now);
        }
    }

    fn live_us(&self, ledger: &Ledger, now: &Stamp) -> u64 {
        now.since_us(&ledger.since().clone().later(self.start.clone()))
    }

    pub fn view(&self, list: impl FnOnce() -> Vec<Arc<InstanceView>>, now: &Stamp) -> MetricsView {
        let zero = || State::ALL.map(|state| (state, 0)).into_iter().collect();
        let mut view = MetricsView {
            instances: zero(),
            phase_us: zero(),
            changes: BTreeMap::new(),
        };
        let mut counted = lock(&self.counted);
        let instances = list();
        view.changes.clone_from(&counted.changes);
        for (state, us) in &counted.closed_us {
            *view.phase_us.entry(*state).or_default() += us;
        }
        for instance in instances {
            let ledger = instance.record.ledger();
            *view.instances.entry(instance.state()).or_default() += 1;
            *view.phase_us.entry(ledger.current()).or_default() += self.live_us(ledger, now);
        }
        for (state, us) in &mut view.phase_us {
            let shown = counted.shown_us.entry(*state).or_default();
            *shown = (*shown).max(*us);
            *us = *shown;
        }
        view
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use doze_lifecycle::{Fact, ProcessRef, Record};

    use super::*;

    fn at(seconds: u64) -> Stamp {
        Stamp {
            boot_id: "b".into(),
            boottime_us: seconds * 1_000_000,
            wall_us: 0,
        }
    }

    fn view_of(record: Record) -> Arc<InstanceView> {
        let spec = serde_json::json!({
            "image": "i", "image_digest": "d", "platform": "p", "hypervisor": "qemu",
            "vcpus": 1, "memory_bytes": 1, "overlay_bytes": 1, "env": {}, "tags": {},
            "entrypoint": null, "cmd": null, "network_enabled": false, "skip_guest_agent": false
        });
        Arc::new(InstanceView {
            id: "i".into(),
            name: "n".into(),
            created_at_us: 0,
            spec: Arc::new(serde_json::from_value(spec).unwrap()),
            network: None,
            record: Arc::new(record),
            compression: None,
            compressing: None,
            unknown: None,
        })
    }

    /// A sleeper's time before this server was there is not this server's.
    #[test]
    fn a_phase_that_began_in_another_boot_counts_from_the_start() {
        let mut start = at(10);
        start.boot_id = "c".into();
        let mut now = at(15);
        now.boot_id = "c".into();
        now.wall_us = 1_000_000_000;
        let metrics = Metrics::new(start);
        let list = || vec![view_of(Record::stopped(at(0)))];
        let view = metrics.view(list, &now);
        assert_eq!(view.phase_us[&State::Stopped], 5_000_000);
    }

    #[test]
    fn only_what_happened_since_the_start_is_counted_and_deleting_keeps_it() {
        let metrics = Metrics::new(at(10));
        let created = Record::creating(at(0));
        let process = ProcessRef {
            pid: 1,
            start_ticks: 1,
            boot_id: "b".into(),
        };
        let spawned = created
            .apply(&Fact::MachineSpawned(process), &at(1), None)
            .unwrap();
        metrics.booked(created.ledger(), spawned.ledger(), || {});
        let started = spawned
            .apply(
                &Fact::CpusStarted { agent: true },
                &at(13),
                Some(Cause::User),
            )
            .unwrap();
        metrics.booked(spawned.ledger(), started.ledger(), || {});
        metrics.forgotten(&at(20), || Some(view_of(started)));
        metrics.forgotten(&at(25), || None);
        let view = metrics.view(Vec::new, &at(30));
        assert_eq!(view.phase_us[&State::Created], 3_000_000);
        assert_eq!(view.phase_us[&State::Initializing], 7_000_000);
        assert_eq!(
            view.changes,
            BTreeMap::from([((State::Created, State::Initializing, Cause::User), 1)])
        );
        assert_eq!(view.instances[&State::Created], 0);
    }
}
