//! Which command may begin when: one pure table, shown in docs/lifecycle.md.
use std::fmt;

use crate::{Operation, State};

/// What a caller may ask of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Command {
    /// `overrides`: the request changes entrypoint or command. `discard_memory`: a sleeping instance boots from
    /// its disk instead.
    Start {
        overrides: bool,
        discard_memory: bool,
    },
    Stop,
    /// `options`: the request says how the snapshot is to be kept.
    Standby {
        options: bool,
    },
    Restore,
    /// `graceful`: the guest gets time to end by itself.
    Delete {
        graceful: bool,
    },
    Exec,
    /// A copy to keep: of memory and disk, or (`stopped`) of the disk alone.
    Snapshot {
        stopped: bool,
    },
    /// A copy that becomes a new instance. `from_running`: a running guest may be paused for it.
    Fork {
        from_running: bool,
    },
    /// Back to a stored snapshot, in place.
    Rollback,
}

impl Command {
    pub const ALL: [Command; 15] = [
        Command::START,
        Command::Start {
            overrides: true,
            discard_memory: false,
        },
        Command::Start {
            overrides: false,
            discard_memory: true,
        },
        Command::Stop,
        Command::Standby { options: false },
        Command::Standby { options: true },
        Command::Restore,
        Command::Delete { graceful: true },
        Command::Delete { graceful: false },
        Command::Exec,
        Command::Snapshot { stopped: false },
        Command::Snapshot { stopped: true },
        Command::Fork {
            from_running: false,
        },
        Command::Fork { from_running: true },
        Command::Rollback,
    ];

    /// A start without anything to say.
    pub const START: Command = Command::Start {
        overrides: false,
        discard_memory: false,
    };

    pub const fn as_str(self) -> &'static str {
        match self {
            Command::Start {
                discard_memory: true,
                ..
            } => "start discarding memory",
            Command::Start {
                overrides: true, ..
            } => "start with overrides",
            Command::Start { .. } => "start",
            Command::Stop => "stop",
            Command::Standby { options: false } => "standby",
            Command::Standby { options: true } => "standby with options",
            Command::Restore => "restore",
            Command::Delete { graceful: true } => "delete gracefully",
            Command::Delete { graceful: false } => "delete",
            Command::Exec => "exec",
            Command::Snapshot { stopped: false } => "snapshot",
            Command::Snapshot { stopped: true } => "snapshot as Stopped",
            Command::Fork {
                from_running: false,
            } => "fork",
            Command::Fork { from_running: true } => "fork from running",
            Command::Rollback => "restore a snapshot of",
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
        Some(Operation::Snapshot) => during_snapshot(state, command),
        Some(in_flight) => during(in_flight, command, refuse),
        None => at_rest(state, command, refuse),
    }
}

/// Whoever comes while the guest is being copied waits the moment it takes; a delete has no use for the copy.
fn during_snapshot(state: State, command: Command) -> Admission {
    use Admission::{Interrupt, Run, Wait};
    match command {
        Command::Exec if state == State::Running => Run,
        Command::Exec | Command::Start { .. } | Command::Stop => Wait,
        Command::Standby { .. } | Command::Restore => Wait,
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
        Command::Delete { .. } => Interrupt,
    }
}

fn during(
    in_flight: Operation,
    command: Command,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    match in_flight {
        Operation::Snapshot => Admission::Wait,
        // What becomes of it is decided before anything else.
        Operation::Fork | Operation::Rollback => match command {
            Command::Delete { .. } => Admission::Interrupt,
            Command::Start { .. } | Command::Stop | Command::Exec => Admission::Wait,
            Command::Standby { .. } | Command::Restore => Admission::Wait,
            Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Admission::Wait,
        },
        Operation::Create => during_create(command, refuse),
        Operation::Start => during_start(command, refuse),
        Operation::Stop => during_stop(command, refuse),
        Operation::Standby => during_standby(command, refuse),
        Operation::Restore => during_restore(command, refuse),
        Operation::Delete => match command {
            Command::Delete { .. } => Admission::Join,
            Command::Start { .. } | Command::Stop | Command::Exec => {
                refuse("it is being deleted; create a new one")
            }
            Command::Standby { .. } | Command::Restore => {
                refuse("it is being deleted; create a new one")
            }
            Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => {
                refuse("it is being deleted; create a new one")
            }
        },
    }
}

const START_OVERRIDES: &str = "overrides take effect on a start from Stopped; stop it first";
const NO_MEMORY: &str = "there is no sleeping memory to discard; start it without discard_memory";
const STANDBY_OPTIONS: &str =
    "options take effect when it goes to sleep; restore it first, or leave them out";

fn during_create(command: Command, refuse: impl Fn(&'static str) -> Admission) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match command {
        Command::Start {
            discard_memory: true,
            ..
        } => refuse(NO_MEMORY),
        Command::Start {
            overrides: true, ..
        } => refuse(START_OVERRIDES),
        Command::Start { .. } => Join,
        // A created instance that was never there cannot be stopped: let it come up first.
        Command::Stop | Command::Standby { .. } | Command::Restore | Command::Exec => Wait,
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
        Command::Delete { .. } => Interrupt,
    }
}

fn during_start(command: Command, refuse: impl Fn(&'static str) -> Admission) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match command {
        Command::Start {
            discard_memory: true,
            ..
        } => refuse(NO_MEMORY),
        Command::Start {
            overrides: true, ..
        } => refuse(START_OVERRIDES),
        Command::Start { .. } => Join,
        Command::Standby { .. } | Command::Restore | Command::Exec => Wait,
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
        Command::Stop | Command::Delete { .. } => Interrupt,
    }
}

fn during_stop(command: Command, refuse: impl Fn(&'static str) -> Admission) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match command {
        Command::Start { .. } => Wait,
        Command::Stop => Join,
        Command::Delete { graceful: true } => Wait,
        Command::Delete { graceful: false } => Interrupt,
        Command::Standby { .. } | Command::Restore | Command::Exec => {
            refuse("it is stopping; start it again first")
        }
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
    }
}

/// Whoever wants the guest awake (or gone) interrupts: before the commit the guest goes on as if nothing
/// had been; after it the standby completes and the command is decided again.
fn during_standby(command: Command, refuse: impl Fn(&'static str) -> Admission) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match command {
        Command::Start {
            discard_memory: true,
            ..
        } => Wait,
        Command::Start {
            overrides: true, ..
        } => refuse(START_OVERRIDES),
        Command::Start { .. } => refuse("it is going to sleep; restore it instead"),
        Command::Standby { options: false } => Join,
        Command::Standby { options: true } => refuse(STANDBY_OPTIONS),
        Command::Stop | Command::Restore | Command::Delete { .. } => Interrupt,
        Command::Exec => refuse("it is going to sleep; restore it first"),
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
    }
}

fn during_restore(command: Command, refuse: impl Fn(&'static str) -> Admission) -> Admission {
    use Admission::{Interrupt, Join, Wait};
    match command {
        Command::Start {
            overrides: true, ..
        } => refuse(START_OVERRIDES),
        Command::Start { .. } | Command::Stop | Command::Standby { .. } | Command::Exec => Wait,
        Command::Restore => Join,
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => Wait,
        Command::Delete { .. } => Interrupt,
    }
}

fn at_rest(
    state: State,
    command: Command,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    use Admission::{NoOp, Run};
    match command {
        Command::Delete { .. } => Run,
        Command::Start {
            overrides,
            discard_memory,
        } => start_at_rest(state, overrides, discard_memory, refuse),
        Command::Stop => match state {
            State::Stopped => NoOp,
            State::Created | State::Initializing | State::Running => Run,
            State::Paused | State::Shutdown => Run,
            State::Standby => {
                refuse("restore it first, delete it, or start it from its disk with discard_memory")
            }
        },
        Command::Standby { options } => match (state, options) {
            (State::Initializing | State::Running, _) => Run,
            (State::Standby, false) => NoOp,
            (State::Standby, true) => refuse(STANDBY_OPTIONS),
            (State::Stopped, _) => refuse("start it first"),
            (State::Created | State::Paused | State::Shutdown, _) => {
                refuse("wait until it is Running")
            }
        },
        Command::Restore => match state {
            State::Standby => Run,
            State::Initializing | State::Running => NoOp,
            State::Stopped => refuse("it has no memory to come back to; start it instead"),
            State::Created | State::Paused | State::Shutdown => refuse("it does not sleep"),
        },
        Command::Exec => match state {
            State::Initializing | State::Running => Run,
            State::Stopped => refuse("start it first"),
            State::Standby => refuse("restore it first"),
            State::Created | State::Paused | State::Shutdown => refuse("wait until it is Running"),
        },
        Command::Snapshot { stopped } => snapshot_at_rest(state, stopped, refuse),
        Command::Fork { from_running } => match state {
            State::Stopped | State::Standby => Run,
            State::Running if from_running => Run,
            State::Running => refuse(
                "set from_running to fork a running instance (it is paused for a moment), or put it to standby first",
            ),
            State::Created | State::Initializing | State::Paused | State::Shutdown => {
                refuse("wait until it is Running")
            }
        },
        Command::Rollback => match state {
            State::Stopped | State::Standby | State::Initializing | State::Running => Run,
            State::Created | State::Paused | State::Shutdown => refuse("wait until it is at rest"),
        },
    }
}

fn snapshot_at_rest(
    state: State,
    stopped: bool,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    match (state, stopped) {
        (State::Running | State::Standby, false) => Admission::Run,
        (State::Stopped, true) => Admission::Run,
        (State::Stopped, false) => {
            refuse("it has no memory to keep; ask for the kind Stopped, or start it first")
        }
        (_, true) => refuse("stop it first, or ask for the kind Standby"),
        (State::Created | State::Initializing | State::Paused | State::Shutdown, false) => {
            refuse("wait until it is Running")
        }
    }
}

fn start_at_rest(
    state: State,
    overrides: bool,
    discard_memory: bool,
    refuse: impl Fn(&'static str) -> Admission,
) -> Admission {
    match (state, overrides, discard_memory) {
        (State::Stopped, _, false) => Admission::Run,
        (State::Standby, _, true) => Admission::Run,
        (State::Standby, _, false) => refuse(
            "restore it instead, or boot it from its disk with discard_memory: its memory is lost then",
        ),
        (_, _, true) => refuse(NO_MEMORY),
        (State::Initializing | State::Running, false, false) => Admission::NoOp,
        (State::Initializing | State::Running, true, false) => refuse(START_OVERRIDES),
        (State::Created | State::Paused | State::Shutdown, _, false) => refuse("stop it first"),
    }
}
