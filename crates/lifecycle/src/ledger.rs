//! The phase ledger: how long an instance has been in each phase, fit for billing.
//!
//! The ledger keeps its own timeline. Between two stamps of the same boot it advances by the boot
//! clock (which counts suspended time and cannot be stepped); between stamps of different boots by the
//! difference of the wall clocks, never by less than zero. So the sum of all phases and the
//! timeline's length are the same number, whatever NTP or an operator does to the clock.
//!
//! The last transitions are kept beside the sums, with their moments and causes, so that a bill can be
//! explained.
use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

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

    /// The earlier of two moments of one boot; of different boots, the first.
    pub(crate) fn earlier_of(self, other: &Stamp) -> Stamp {
        if other.precedes(&self) {
            other.clone()
        } else {
            self
        }
    }

    /// The later of two moments; of different boots, the second.
    #[must_use]
    pub fn later(self, other: Stamp) -> Stamp {
        if other.precedes(&self) { self } else { other }
    }
}

/// Transitions that are kept; older ones are counted.
pub const KEPT_TRANSITIONS: usize = 100;

/// What brought a transition about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// A command of the API.
    User,
    /// Nobody used the instance for its idle timeout.
    AutoStandby,
    /// Somebody wanted to talk to it while it slept.
    Wake,
    /// A snapshot schedule.
    Schedule,
    /// The guest itself: its boot finished, its program ended, it answered.
    Guest,
    /// The machine monitor or the guest's kernel died.
    Crash,
    /// The server came back and put right what its end had interrupted.
    Recovery,
}

impl Cause {
    pub const ALL: [Cause; 7] = [
        Cause::User,
        Cause::AutoStandby,
        Cause::Wake,
        Cause::Schedule,
        Cause::Guest,
        Cause::Crash,
        Cause::Recovery,
    ];

    /// As on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Cause::User => "user",
            Cause::AutoStandby => "auto-standby",
            Cause::Wake => "wake",
            Cause::Schedule => "schedule",
            Cause::Guest => "guest",
            Cause::Crash => "crash",
            Cause::Recovery => "recovery",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One change of phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    pub from: State,
    pub to: State,
    /// When, on the ledger's timeline.
    pub at: Stamp,
    pub cause: Cause,
}

/// Time spent per phase, and the phase that is running up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Closed intervals, microseconds per phase. Entries never shrink.
    committed_us: BTreeMap<State, u64>,
    current: State,
    since: Stamp,
    /// The part of the sums that nobody saw, microseconds per phase. Never shrinks.
    #[serde(default)]
    estimated_us: BTreeMap<State, u64>,
    /// The newest [`KEPT_TRANSITIONS`], oldest first.
    #[serde(default)]
    transitions: VecDeque<Transition>,
    /// All transitions there ever were.
    #[serde(default)]
    transitions_total: u64,
}

impl Ledger {
    pub fn new(first: State, at: Stamp) -> Ledger {
        Ledger {
            committed_us: BTreeMap::new(),
            current: first,
            since: at,
            estimated_us: BTreeMap::new(),
            transitions: VecDeque::new(),
            transitions_total: 0,
        }
    }

    /// The newest transitions, oldest first; [`KEPT_TRANSITIONS`] at most.
    pub fn transitions(&self) -> impl ExactSizeIterator<Item = &Transition> {
        self.transitions.iter()
    }

    /// How many transitions there were in all.
    pub fn transitions_total(&self) -> u64 {
        self.transitions_total
    }

    /// The part of [`Ledger::durations_ms`] that nobody saw, in whole milliseconds under the wire's names.
    pub fn estimated_ms(&self) -> BTreeMap<&'static str, u64> {
        self.estimated_us
            .iter()
            .map(|(state, us)| (state.phase(), us / 1000))
            .collect()
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
    pub(crate) fn enter(&mut self, phase: State, at: &Stamp, cause: Cause) {
        if phase == self.current {
            return;
        }
        let entry = self.committed_us.entry(self.current).or_insert(0);
        *entry = entry.saturating_add(at.since_us(&self.since));
        if !at.precedes(&self.since) {
            self.since = at.clone();
        }
        if self.transitions.len() == KEPT_TRANSITIONS {
            self.transitions.pop_front();
        }
        self.transitions.push_back(Transition {
            from: self.current,
            to: phase,
            at: self.since.clone(),
            cause,
        });
        self.transitions_total += 1;
        self.current = phase;
    }

    /// Says that what the current phase has lasted up to `now` was concluded, not seen.
    pub(crate) fn estimate(&mut self, now: &Stamp) {
        let unseen = now.since_us(&self.since);
        if unseen > 0 {
            let entry = self.estimated_us.entry(self.current).or_insert(0);
            *entry = entry.saturating_add(unseen);
        }
    }

    /// `moment` as far as it can lie between the current phase's beginning and `now`: of a boot before both it is
    /// that beginning.
    pub(crate) fn between(&self, moment: &Stamp, now: &Stamp) -> Stamp {
        if moment.boot_id == self.since.boot_id || moment.boot_id == now.boot_id {
            moment.clone().earlier_of(now)
        } else {
            self.since.clone()
        }
    }

    /// The moment `wall_us`, read from a clock that everybody can see (a file's time), on this ledger's
    /// timeline: not before the current phase began and not after `now`.
    #[must_use]
    pub fn moment(&self, wall_us: i64, now: &Stamp) -> Stamp {
        let most = now.since_us(&self.since);
        let elapsed = u64::try_from(i128::from(wall_us) - i128::from(self.since.wall_us))
            .unwrap_or(0)
            .min(most);
        if elapsed == most {
            return now.clone();
        }
        Stamp {
            boot_id: self.since.boot_id.clone(),
            boottime_us: self.since.boottime_us.saturating_add(elapsed),
            wall_us: self
                .since
                .wall_us
                .saturating_add(i64::try_from(elapsed).unwrap_or(i64::MAX)),
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
