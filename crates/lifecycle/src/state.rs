//! The states of an instance, as they stand on the wire.
use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Where an instance is in its life. A phase of the ledger is the same thing in lower case.
///
/// `Unknown` is not here: it is a diagnosis about an instance, not a place where time is spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum State {
    /// A VMM is being prepared or built; its CPUs never ran.
    Created,
    /// The guest runs; its program has not started or its agent is not ready.
    Initializing,
    /// The guest's program has started and its agent is ready.
    Running,
    /// The guest's CPUs are stopped, its VMM is there.
    Paused,
    /// The guest powered off, its VMM is still there.
    Shutdown,
    /// No VMM, no memory to come back to.
    Stopped,
    /// No VMM; memory and device state are kept.
    Standby,
}

impl State {
    pub const ALL: [State; 7] = [
        State::Created,
        State::Initializing,
        State::Running,
        State::Paused,
        State::Shutdown,
        State::Stopped,
        State::Standby,
    ];

    /// The wire's spelling.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Created => "Created",
            State::Initializing => "Initializing",
            State::Running => "Running",
            State::Paused => "Paused",
            State::Shutdown => "Shutdown",
            State::Stopped => "Stopped",
            State::Standby => "Standby",
        }
    }

    /// The phase this state's time is booked under: the state in lower case.
    pub const fn phase(self) -> &'static str {
        match self {
            State::Created => "created",
            State::Initializing => "initializing",
            State::Running => "running",
            State::Paused => "paused",
            State::Shutdown => "shutdown",
            State::Stopped => "stopped",
            State::Standby => "standby",
        }
    }

    /// Whether a VMM process may exist in this state.
    pub const fn has_machine(self) -> bool {
        match self {
            State::Created | State::Initializing | State::Running => true,
            State::Paused | State::Shutdown => true,
            State::Stopped | State::Standby => false,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is not a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a state; allowed: Created, Initializing, Running, Paused, Shutdown, Stopped, Standby"
)]
pub struct ParseStateError(pub String);

impl FromStr for State {
    type Err = ParseStateError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        State::ALL
            .into_iter()
            .find(|state| state.as_str() == s)
            .ok_or_else(|| ParseStateError(s.to_owned()))
    }
}
