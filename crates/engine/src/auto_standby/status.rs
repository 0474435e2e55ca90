//! What is told of an instance's auto-standby: the words of the contract and what each stands for. Pure.
use std::time::Duration;

use doze_lifecycle::Stamp;

use super::decide::{Facts, Memory, Verdict, enabled};

/// How connections are observed: the kernel's connection tracking, by its events, TCP over IPv4.
pub const TRACKING_MODE: &str = "conntrack_events_v4_tcp";
/// On a host that does not let us.
const NO_TRACKING: &str = "none";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StatusWord {
    Unsupported,
    Disabled,
    Ineligible,
    Active,
    IdleCountdown,
    ReadyForStandby,
    StandbyRequested,
    Error,
}

impl StatusWord {
    pub const ALL: [StatusWord; 8] = [
        StatusWord::Unsupported,
        StatusWord::Disabled,
        StatusWord::Ineligible,
        StatusWord::Active,
        StatusWord::IdleCountdown,
        StatusWord::ReadyForStandby,
        StatusWord::StandbyRequested,
        StatusWord::Error,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            StatusWord::Unsupported => "unsupported",
            StatusWord::Disabled => "disabled",
            StatusWord::Ineligible => "ineligible",
            StatusWord::Active => "active",
            StatusWord::IdleCountdown => "idle_countdown",
            StatusWord::ReadyForStandby => "ready_for_standby",
            StatusWord::StandbyRequested => "standby_requested",
            StatusWord::Error => "error",
        }
    }
}

/// Why. The contract knows `has_vgpu` besides, which no instance of this server can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    UnsupportedPlatform,
    PolicyMissing,
    PolicyDisabled,
    InstanceNotRunning,
    NetworkDisabled,
    MissingIp,
    ActiveInboundConnections,
    IdleTimeoutNotElapsed,
    ObserverError,
    ReadyForStandby,
}

/// Who keeps an instance awake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AwakeBecause {
    InboundConnections,
    ExecSessions,
}

/// How far the way to sleep has been gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Progress {
    #[default]
    Resting,
    /// Waits for its turn.
    Queued,
    /// The driver has been told.
    Requested,
}

/// One answer. Durations and moments are of the time of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub status: StatusWord,
    pub reason: Reason,
    pub supported: bool,
    pub configured: bool,
    pub enabled: bool,
    /// Nothing but being used, a timeout or a hold is in the way of its falling asleep.
    pub eligible: bool,
    pub tracking_mode: &'static str,
    pub active_inbound_connections: u64,
    pub awake_because: Vec<AwakeBecause>,
    /// Why connections are not known.
    pub observer_error: Option<String>,
    pub idle_timeout: Option<Duration>,
    pub countdown_remaining: Option<Duration>,
    /// Microseconds since the Unix epoch, as all moments here.
    pub idle_since_us: Option<i64>,
    pub last_inbound_activity_us: Option<i64>,
    pub next_standby_us: Option<i64>,
    pub hold_until_us: Option<i64>,
}

impl Status {
    pub fn of(
        memory: &Memory,
        facts: &Facts<'_>,
        verdict: &Verdict,
        progress: Progress,
        now: &Stamp,
    ) -> Status {
        let (word, reason) = words(verdict, progress);
        let policy = enabled(facts);
        let after = |left: Duration| {
            let us = i64::try_from(left.as_micros()).unwrap_or(i64::MAX);
            now.wall_us.saturating_add(us)
        };
        let (mut countdown_remaining, mut idle_since_us) = (None, None);
        if let Verdict::Idle { remaining } = verdict {
            countdown_remaining = Some(*remaining);
            // On today's clock, which may have been set since.
            idle_since_us = memory.idle_since.as_ref().map(|since| {
                let ago = i64::try_from(now.since_us(since)).unwrap_or(i64::MAX);
                now.wall_us.saturating_sub(ago)
            });
        }
        Status {
            status: word,
            reason,
            supported: facts.supported,
            configured: facts.policy.is_some(),
            enabled: policy.is_some(),
            eligible: is_eligible(word),
            tracking_mode: match facts.supported {
                true => TRACKING_MODE,
                false => NO_TRACKING,
            },
            active_inbound_connections: match verdict {
                Verdict::Active(seen) => seen.connections,
                _ => 0,
            },
            awake_because: awake_because(verdict),
            observer_error: match verdict {
                Verdict::Blind(blind) => Some(blind.to_string()),
                _ => None,
            },
            idle_timeout: policy.map(|policy| policy.idle_timeout),
            countdown_remaining,
            idle_since_us,
            last_inbound_activity_us: memory
                .last_activity
                .as_ref()
                .filter(|_| policy.is_some())
                .map(|at| at.wall_us),
            next_standby_us: countdown_remaining.map(after),
            hold_until_us: policy
                .and(memory.hold.as_ref())
                .map(|hold| hold.left(now))
                .filter(|left| !left.is_zero())
                .map(after),
        }
    }
}

/// Exhaustive, so that a new verdict finds its words.
fn words(verdict: &Verdict, progress: Progress) -> (StatusWord, Reason) {
    use Reason as R;
    use StatusWord as S;
    match (verdict, progress) {
        (Verdict::Unsupported, _) => (S::Unsupported, R::UnsupportedPlatform),
        (Verdict::NoPolicy, _) => (S::Disabled, R::PolicyMissing),
        (Verdict::Disabled, _) => (S::Disabled, R::PolicyDisabled),
        // Its CPUs stand still already.
        (Verdict::NotRunning, Progress::Requested) => (S::StandbyRequested, R::ReadyForStandby),
        (Verdict::NotRunning, _) => (S::Ineligible, R::InstanceNotRunning),
        (Verdict::NoNetwork, _) => (S::Ineligible, R::NetworkDisabled),
        (Verdict::NoAddress, _) => (S::Ineligible, R::MissingIp),
        (Verdict::Blind(_), _) => (S::Error, R::ObserverError),
        (Verdict::Active(_), _) => (S::Active, R::ActiveInboundConnections),
        (Verdict::Idle { .. }, Progress::Requested) => (S::StandbyRequested, R::ReadyForStandby),
        (Verdict::Idle { remaining }, _) if !remaining.is_zero() => {
            (S::IdleCountdown, R::IdleTimeoutNotElapsed)
        }
        (Verdict::Idle { .. }, _) => (S::ReadyForStandby, R::ReadyForStandby),
    }
}

fn is_eligible(word: StatusWord) -> bool {
    match word {
        StatusWord::Unsupported | StatusWord::Disabled => false,
        StatusWord::Ineligible | StatusWord::Error => false,
        StatusWord::Active | StatusWord::IdleCountdown => true,
        StatusWord::ReadyForStandby | StatusWord::StandbyRequested => true,
    }
}

fn awake_because(verdict: &Verdict) -> Vec<AwakeBecause> {
    let Verdict::Active(seen) = verdict else {
        return Vec::new();
    };
    let connections = (seen.connections > 0).then_some(AwakeBecause::InboundConnections);
    let sessions = (seen.sessions > 0).then_some(AwakeBecause::ExecSessions);
    connections.into_iter().chain(sessions).collect()
}
