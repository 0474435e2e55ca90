//! What has happened since the server's start, for the metrics.
use std::{collections::BTreeMap, sync::Mutex};

use crate::context::lock;

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ended {
    Asleep,
    /// Somebody came, or it could not be known whether.
    CalledOff,
    Failed,
}

impl Ended {
    pub const fn as_str(self) -> &'static str {
        match self {
            Ended::Asleep => "asleep",
            Ended::CalledOff => "called_off",
            Ended::Failed => "failed",
        }
    }
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failed {
    /// Reading the kernel's table around a standby.
    Dump,
    /// Our nftables rules are not there.
    Rules,
    /// Writing down what is remembered.
    Remember,
    /// Reading what was remembered.
    Recall,
    /// The standby itself.
    Standby,
    /// The regular reading of the table.
    Reconcile,
}

impl Failed {
    pub const ALL: [Failed; 6] = [
        Failed::Dump,
        Failed::Rules,
        Failed::Remember,
        Failed::Recall,
        Failed::Standby,
        Failed::Reconcile,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Failed::Dump => "dump",
            Failed::Rules => "rules",
            Failed::Remember => "remember",
            Failed::Recall => "recall",
            Failed::Standby => "standby",
            Failed::Reconcile => "reconcile",
        }
    }
}

#[derive(Default)]
pub struct Counters {
    ended: Mutex<BTreeMap<Ended, u64>>,
    failed: Mutex<BTreeMap<Failed, u64>>,
}

impl Counters {
    pub fn ended(&self, how: Ended) {
        *lock(&self.ended).entry(how).or_default() += 1;
    }

    pub fn failed(&self, what: Failed) {
        *lock(&self.failed).entry(what).or_default() += 1;
    }

    /// Every outcome is there, also what never happened.
    pub fn attempts(&self) -> BTreeMap<&'static str, u64> {
        let counted = lock(&self.ended);
        let all = [Ended::Asleep, Ended::CalledOff, Ended::Failed];
        all.map(|how| (how.as_str(), counted.get(&how).copied().unwrap_or(0)))
            .into()
    }

    pub fn errors(&self) -> BTreeMap<&'static str, u64> {
        let counted = lock(&self.failed);
        Failed::ALL
            .map(|what| (what.as_str(), counted.get(&what).copied().unwrap_or(0)))
            .into()
    }
}
