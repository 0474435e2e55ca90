//! The phase ledger: how long an instance has been in each phase, fit for billing.
//!
//! The ledger keeps its own timeline. Between two stamps of the same boot it advances by the boot
//! clock (which counts suspended time and cannot be stepped); between stamps of different boots by the
//! difference of the wall clocks, never by less than zero. So the sum of all phases and the
//! timeline's length are the same number, whatever NTP or an operator does to the clock.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::State;

/// One moment, on both clocks of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The kernel's boot id; boot clocks compare only within one.
    pub boot_id: String,
    /// CLOCK_BOOTTIME, microseconds.
    pub boottime_us: u64,
    /// CLOCK_REALTIME, microseconds since the Unix epoch.
    pub wall_us: i64,
}

impl Stamp {
    /// This moment, `age_us` microseconds earlier on both clocks.
    #[must_use]
    pub fn earlier(&self, age_us: u64) -> Stamp {
        Stamp {
            boot_id: self.boot_id.clone(),
            boottime_us: self.boottime_us.saturating_sub(age_us),
            wall_us: self
                .wall_us
                .saturating_sub(i64::try_from(age_us).unwrap_or(i64::MAX)),
        }
    }

    /// Microseconds from `earlier` to this moment on the ledger's timeline; zero when it lies ahead.
    pub fn since_us(&self, earlier: &Stamp) -> u64 {
        if self.boot_id == earlier.boot_id {
            self.boottime_us.saturating_sub(earlier.boottime_us)
        } else {
            u64::try_from(i128::from(self.wall_us) - i128::from(earlier.wall_us)).unwrap_or(0)
        }
    }

    /// Whether this moment lies before `other` in the same boot; moments of different boots have no
    /// such order.
    fn precedes(&self, other: &Stamp) -> bool {
        self.boot_id == other.boot_id && self.boottime_us < other.boottime_us
    }

    /// The later of two moments; of different boots, the second.
    #[must_use]
    pub fn later(self, other: Stamp) -> Stamp {
        if other.precedes(&self) { self } else { other }
    }
}

/// Time spent per phase, and the phase that is running up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Closed intervals, microseconds per phase. Entries never shrink.
    committed_us: BTreeMap<State, u64>,
    current: State,
    since: Stamp,
}

impl Ledger {
    pub fn new(first: State, at: Stamp) -> Ledger {
        Ledger {
            committed_us: BTreeMap::new(),
            current: first,
            since: at,
        }
    }

    pub fn current(&self) -> State {
        self.current
    }

    /// When the current phase began.
    pub fn since(&self) -> &Stamp {
        &self.since
    }

    /// Closes the current phase at `at` and begins `phase`. A moment before the current phase began
    /// counts as its beginning, so nothing is booked twice. Entering the current phase changes nothing.
    pub(crate) fn enter(&mut self, phase: State, at: &Stamp) {
        if phase == self.current {
            return;
        }
        let entry = self.committed_us.entry(self.current).or_insert(0);
        *entry = entry.saturating_add(at.since_us(&self.since));
        self.current = phase;
        if !at.precedes(&self.since) {
            self.since = at.clone();
        }
    }

    /// Microseconds per phase up to `now`, the live part included. Phases never entered are absent.
    pub fn durations_us(&self, now: &Stamp) -> BTreeMap<State, u64> {
        let mut sums = self.committed_us.clone();
        let live = sums.entry(self.current).or_insert(0);
        *live = live.saturating_add(now.since_us(&self.since));
        sums
    }

    /// The same in whole milliseconds under the wire's names.
    pub fn durations_ms(&self, now: &Stamp) -> BTreeMap<&'static str, u64> {
        self.durations_us(now)
            .into_iter()
            .map(|(state, us)| (state.phase(), us / 1000))
            .collect()
    }
}
