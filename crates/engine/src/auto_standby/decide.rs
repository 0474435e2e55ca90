//! What is to become of one instance, out of what is true of it now and what is remembered. Pure: no
//! clock, no socket, no lock.
//!
//! ```text
//!                          busy (a connection, a session)
//!              ┌─────────────────────────────────────────────┐
//!              v                                             │
//!   Active ──────> Idle, remaining > 0 ──────> Idle, remaining = 0 (may sleep)
//!              quiet   └ the latest of idle_timeout, hold, pause after a failure
//! ```
//! Whatever is not known counts as busy.
use std::time::Duration;

use doze_host::conntrack::policy::{EnabledPolicy, Policy};
use doze_lifecycle::Stamp;
use serde::{Deserialize, Serialize};

/// A stretch of time that began at a known moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub since: Stamp,
    pub length: Duration,
}

impl Span {
    /// What is left of it; zero when it is over.
    pub fn left(&self, now: &Stamp) -> Duration {
        self.length
            .saturating_sub(Duration::from_micros(now.since_us(&self.since)))
    }
}

/// What is remembered of an instance between two looks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Since when nobody has used it; `None`: it was in use, or was not looked at, when last looked.
    pub idle_since: Option<Stamp>,
    /// When a client was last seen.
    pub last_activity: Option<Stamp>,
    /// It must not fall asleep before this is over.
    pub hold: Option<Span>,
    /// After a standby that did not come about: when the next one may be tried. Forgotten by a restart.
    #[serde(skip)]
    pub pause: Option<Span>,
}

/// Whether and how an instance can be talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    NoNetwork,
    NoAddress,
    Address,
}

/// What was seen of those who use it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that count now.
    pub connections: u64,
    /// One came and went since the last look.
    pub passed_by: bool,
    pub sessions: usize,
}

impl Seen {
    pub fn is_busy(&self) -> bool {
        self.connections > 0 || self.passed_by || self.sessions > 0
    }
}

/// Why connections are not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blind {
    /// The table is being read again: what it shows then is what matters.
    Resyncing,
    /// Nobody listened for a while: clients may have come and gone.
    Lost(String),
}

impl std::fmt::Display for Blind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Blind::Resyncing => f.write_str("the table of connections is being read"),
            Blind::Lost(why) => f.write_str(why),
        }
    }
}

/// What is true now.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// This host lets us see connections at all.
    pub supported: bool,
    pub policy: Option<&'a Policy>,
    pub reach: Reach,
    /// Since when its state is Running, if it is.
    pub running_since: Option<&'a Stamp>,
    pub seen: Result<Seen, Blind>,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Unsupported,
    NoPolicy,
    Disabled,
    NotRunning,
    NoNetwork,
    NoAddress,
    Blind(Blind),
    Active(Seen),
    /// It may sleep when nothing remains.
    Idle {
        remaining: Duration,
    },
}

impl Verdict {
    pub fn is_due(&self) -> bool {
        *self
            == Verdict::Idle {
                remaining: Duration::ZERO,
            }
    }
}

/// The policy, where there is one and it is on.
pub fn enabled<'a>(facts: &Facts<'a>) -> Option<&'a EnabledPolicy> {
    match facts.policy {
        Some(Policy::Enabled(policy)) => Some(policy),
        Some(Policy::Disabled) | None => None,
    }
}

/// Looks once.
pub fn look(memory: &Memory, facts: &Facts<'_>, now: &Stamp) -> (Memory, Verdict) {
    let mut next = memory.clone();
    next.hold = memory.hold.clone().filter(|hold| !hold.left(now).is_zero());
    next.pause = memory.pause.clone().filter(|p| !p.left(now).is_zero());
    let policy = match facts.policy {
        None => {
            next.idle_since = None;
            return (next, Verdict::NoPolicy);
        }
        Some(Policy::Disabled) => {
            // Switched on again it is idle from then on.
            next.idle_since = None;
            return (next, Verdict::Disabled);
        }
        Some(Policy::Enabled(policy)) => policy,
    };
    if !facts.supported {
        return (next, Verdict::Unsupported);
    }
    let verdict = match (facts.reach, facts.running_since) {
        (Reach::NoNetwork, _) => Verdict::NoNetwork,
        (Reach::NoAddress, _) => Verdict::NoAddress,
        // When it runs again, that is later than all that is remembered.
        (Reach::Address, None) => Verdict::NotRunning,
        (Reach::Address, Some(running_since)) => match &facts.seen {
            Err(blind) => {
                if matches!(blind, Blind::Lost(_)) {
                    next.idle_since = None;
                }
                Verdict::Blind(blind.clone())
            }
            Ok(seen) => return quiet_or_not(next, policy, running_since, *seen, now),
        },
    };
    (next, verdict)
}

fn quiet_or_not(
    mut memory: Memory,
    policy: &EnabledPolicy,
    running_since: &Stamp,
    seen: Seen,
    now: &Stamp,
) -> (Memory, Verdict) {
    if seen.connections > 0 || seen.passed_by {
        memory.last_activity = Some(now.clone());
    }
    if seen.connections > 0 || seen.sessions > 0 {
        memory.idle_since = None;
        return (memory, Verdict::Active(seen));
    }
    let idle_since = match memory.idle_since.take() {
        Some(since) if !seen.passed_by => since.later(running_since.clone()),
        Some(_) | None => now.clone(),
    };
    let idle = Span {
        since: idle_since.clone(),
        length: policy.idle_timeout,
    };
    let spans = [Some(&idle), memory.hold.as_ref(), memory.pause.as_ref()];
    let remaining = spans.into_iter().flatten().map(|span| span.left(now));
    let remaining = remaining.max().unwrap_or_default();
    memory.idle_since = Some(idle_since);
    (memory, Verdict::Idle { remaining })
}

#[cfg(test)]
mod tests;
