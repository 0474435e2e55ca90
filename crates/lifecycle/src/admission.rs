//! Which command may begin when: one pure table, shown in docs/lifecycle.md.
use std::fmt;

use crate::{State, record::Operation};

/// What a caller may ask of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// `overrides`: the request changes entrypoint or command.
    Start {
        overrides: bool,
    },
    Stop,
    /// `graceful`: the guest gets time to end by itself.
    Delete {
        graceful: bool,
    },
    Exec,
}

impl Command {
    pub const ALL: [Command; 6] = [
        Command::Start { overrides: false },
        Command::Start { overrides: true },
        Command::Stop,
        Command::Delete { graceful: true },
        Command::Delete { graceful: false },
        Command::Exec,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Command::Start { overrides: false } => "start",
            Command::Start { overrides: true } => "start with overrides",
            Command::Stop => "stop",
            Command::Delete { graceful: true } => "delete gracefully",
            Command::Delete { graceful: false } => "delete",
            Command::Exec => "exec",
        }
    }
}

/// What happens to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Admission {
    /// It begins now.
    Run,
    /// It succeeds and changes nothing.
    NoOp,
    /// The operation in flight does the same; its outcome is the answer.
    Join,
    /// It is decided again when the operation in flight is over.
    Wait,
    /// The operation in flight is told to give up; then it is decided again.
    Interrupt,
    /// 409.
    Refuse(Refusal),
}

impl Admission {
    pub const fn as_str(self) -> &'static str {
        match self {
            Admission::Run => "run",
            Admission::NoOp => "no-op",
            Admission::Join => "join",
            Admission::Wait => "wait",
            Admission::Interrupt => "interrupt",
            Admission::Refuse(_) => "refuse",
        }
    }
}

/// Why not, and what would help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Refusal {
    pub command: Command,
    pub state: State,
    pub operation: Option<Operation>,
    pub advice: &'static str,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "state: cannot {} an instance that is {}",
            self.command.as_str(),
            self.state
        )?;
        if let Some(operation) = self.operation {
            write!(f, " (a {} is in flight)", operation.as_str())?;
        }
        write!(f, "; {}", self.advice)
    }
}

/// Decides. Exhaustive over (operation, state, command): nothing is decided by a default arm.
pub fn admit(state: State, operation: Option<Operation>, command: Command) -> Admission {
    let refuse = |advice| {
        Admission::Refuse(Refusal {
            command,
            state,
            operation,
            advice,
        })
    };
    match operation {
        Some(in_flight) => during(in_flight, command, refuse),
        None => at_rest(state, command, refuse),
    }
}

fn during(
    in_flight: Operation,
    command: Command,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match (in_flight, command) {
        (Operation::Create | Operation::Start, Command::Start { overrides: false }) => Join,
        (Operation::Create | Operation::Start, Command::Start { overrides: true }) => {
            refuse("overrides take effect on a start from Stopped; stop it first")
        }
        // A created instance that was never there cannot be stopped: let it come up first.
        (Operation::Create, Command::Stop) => Wait,
        (Operation::Start, Command::Stop) => Interrupt,
        (Operation::Create | Operation::Start, Command::Delete { .. }) => Interrupt,
        (Operation::Create | Operation::Start, Command::Exec) => Wait,
        (Operation::Stop, Command::Start { .. }) => Wait,
        (Operation::Stop, Command::Stop) => Join,
        (Operation::Stop, Command::Delete { graceful: true }) => Wait,
        (Operation::Stop, Command::Delete { graceful: false }) => Interrupt,
        (Operation::Stop, Command::Exec) => refuse("it is stopping; start it again first"),
        (Operation::Delete, Command::Delete { .. }) => Join,
        (Operation::Delete, Command::Start { .. } | Command::Stop | Command::Exec) => {
            refuse("it is being deleted; create a new one")
        }
    }
}

fn at_rest(
    state: State,
    command: Command,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    use Admission::{NoOp, Run};
    match (state, command) {
        (_, Command::Delete { .. }) => Run,
        (State::Stopped, Command::Start { .. }) => Run,
        (State::Initializing | State::Running, Command::Start { overrides: false }) => NoOp,
        (State::Initializing | State::Running, Command::Start { overrides: true }) => {
            refuse("overrides take effect on a start from Stopped; stop it first")
        }
        (State::Created | State::Paused | State::Shutdown, Command::Start { .. }) => {
            refuse("stop it first")
        }
        (State::Standby, Command::Start { .. }) => refuse("restore it instead"),
        (State::Stopped, Command::Stop) => NoOp,
        (
            State::Created | State::Initializing | State::Running | State::Paused | State::Shutdown,
            Command::Stop,
        ) => Run,
        (State::Standby, Command::Stop) => refuse("restore it first, or delete it"),
        (State::Initializing | State::Running, Command::Exec) => Run,
        (State::Stopped, Command::Exec) => refuse("start it first"),
        (State::Standby, Command::Exec) => refuse("restore it first"),
        (State::Created | State::Paused | State::Shutdown, Command::Exec) => {
            refuse("wait until it is Running")
        }
    }
}
