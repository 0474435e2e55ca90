//! What can happen to an instance, and what the server may be doing with it: the words in which the engine tells
//! a record's story to [`Record::apply`](crate::Record::apply).
use serde::{Deserialize, Serialize};

use crate::{Cause, Stamp};

/// What the server is doing with an instance. Recorded before its first effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Until the CPUs first run; undone (the instance vanishes) when it fails before.
    Create,
    /// Until the CPUs run; undone (Stopped again) when it fails before.
    Start,
    /// Until the VMM is gone.
    Stop,
    /// Until nothing is left; never undone.
    Delete,
    /// Until the VMM is gone and its memory kept; undone (the guest goes on) before the snapshot is
    /// committed, finished after it.
    Standby,
    /// Until the CPUs run again; undone (Standby, the snapshot untouched) when it fails before.
    Restore,
    /// Of a new instance: until it is what its caller wished; undone (the instance vanishes) when it fails before.
    Fork,
    /// Of a running guest, for a snapshot or a fork of it: until the guest goes on.
    Snapshot,
    /// Until memory and disk are those of a stored snapshot; undone before its commit, finished after it.
    Rollback,
}

impl Operation {
    pub const ALL: [Operation; 9] = [
        Operation::Create,
        Operation::Start,
        Operation::Stop,
        Operation::Delete,
        Operation::Standby,
        Operation::Restore,
        Operation::Fork,
        Operation::Snapshot,
        Operation::Rollback,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Operation::Create => "create",
            Operation::Start => "start",
            Operation::Stop => "stop",
            Operation::Delete => "delete",
            Operation::Standby => "standby",
            Operation::Restore => "restore",
            Operation::Fork => "fork",
            Operation::Snapshot => "snapshot",
            Operation::Rollback => "rollback",
        }
    }
}

/// Identity of a VMM process: a pid alone is never enough.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: i32,
    /// Clock ticks after boot at which it started.
    pub start_ticks: u64,
    pub boot_id: String,
}

/// How the guest's program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0-255; 128 + n after signal n.
    pub code: i32,
    /// Empty for code 0.
    pub message: String,
}

/// Something that has happened. Told to [`Record::apply`] together with its stamp.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fact {
    /// A command was admitted: this operation is now in flight.
    Admitted(Operation),
    /// A VMM process was found or started; its CPUs have not run.
    MachineSpawned(ProcessRef),
    /// The VMM acknowledged that the CPUs run. `agent` says whether the guest has one to wait for.
    CpusStarted { agent: bool },
    /// The guest's program was executed (stamp: the guest's own account of when).
    ProgramStarted,
    /// The guest's agent takes commands (stamp: likewise).
    AgentReady,
    /// The guest's program ended; the machine goes on until it powers off.
    ProgramExited(Exit),
    /// The guest powered off or will never run again; its VMM is still there.
    GuestPoweredOff,
    /// The VMM process is gone and reaped. `failure` when it was not asked to go.
    MachineGone { failure: Option<String> },
    /// The VMM process was found gone by a server that had not been there to see it go (stamp: when it was
    /// found). `last_seen` is the last proof of life; what lies between is an estimate.
    MachineFoundGone {
        failure: Option<String>,
        last_seen: Stamp,
    },
    /// The guest was found off by a server that had not been there to see it power off; the VMM is there.
    GuestFoundOff { last_seen: Stamp },
    /// The operation in flight gave up and has undone what it did.
    OperationFailed { reason: String },
    /// The VMM acknowledged that the CPUs stand still, for a standby or a snapshot.
    CpusPaused,
    /// Memory, device state and manifest are durable: from here on the instance sleeps, whatever happens.
    SnapshotCommitted,
    /// A standby gave up before its commit; the guest goes on (stamp: the resume acknowledgement, when it
    /// had been paused). Without a reason nothing failed: it was not wanted any more.
    StandbyAbandoned { reason: Option<String> },
    /// A restore's VMM acknowledged that the CPUs run. The snapshot was consumed just before. `agent`
    /// says whether the guest has one whose answer makes it Running.
    Resumed { process: ProcessRef, agent: bool },
    /// The restored guest's agent answered a question asked after the CPUs ran.
    AgentAnswered,
    /// The restored guest's agent did not answer in time, while its CPUs ran: it is Running without that proof.
    AnswerOverdue,
    /// A restore consumed the snapshot, but its guest is gone: only the disk is left. `last_seen` is the last
    /// moment at which it may have run.
    MemoryLost { reason: String, last_seen: Stamp },
    /// A start from disk gave the snapshot up, as its caller wished.
    MemoryDiscarded,
    /// A snapshot of a running guest has what it needs, or gave up; the guest goes on (stamp: the resume
    /// acknowledgement, when it had been paused).
    GuestContinued,
    /// A new instance has its copy of memory or disk and rests: Standby with memory, Stopped without.
    Forked,
    /// Memory and disk are those of a stored snapshot. `memory_of` is the record the memory was captured with;
    /// without, only the disk is.
    RolledBack {
        memory_of: Option<Box<crate::Record>>,
    },
}

impl Fact {
    /// Who brought it about: what the guest does and what dies speaks for itself, the rest was wanted by
    /// somebody.
    pub(crate) fn cause(&self, on_behalf: Option<Cause>) -> Cause {
        match self {
            Fact::ProgramStarted | Fact::AgentReady | Fact::AgentAnswered => Cause::Guest,
            Fact::MachineGone { failure: Some(_) } => Cause::Crash,
            Fact::MachineFoundGone {
                failure: Some(_), ..
            } => Cause::Crash,
            Fact::MachineFoundGone { failure: None, .. } => on_behalf.unwrap_or(Cause::Recovery),
            Fact::MemoryLost { .. } => Cause::Crash,
            // The guest said nothing: what was done to it goes on.
            Fact::AnswerOverdue => on_behalf.unwrap_or(Cause::Guest),
            // Powering off was asked for by a stop, or is the guest's own wish.
            Fact::GuestFoundOff { .. } => Cause::Guest,
            Fact::GuestPoweredOff | Fact::ProgramExited(_) => on_behalf.unwrap_or(Cause::Guest),
            Fact::MachineGone { failure: None } => on_behalf.unwrap_or(Cause::Guest),
            Fact::Admitted(_) | Fact::MachineSpawned(_) | Fact::CpusStarted { .. } => {
                on_behalf.unwrap_or(Cause::User)
            }
            Fact::OperationFailed { .. } | Fact::CpusPaused | Fact::SnapshotCommitted => {
                on_behalf.unwrap_or(Cause::User)
            }
            Fact::StandbyAbandoned { .. } | Fact::Resumed { .. } | Fact::MemoryDiscarded => {
                on_behalf.unwrap_or(Cause::User)
            }
            Fact::GuestContinued | Fact::Forked | Fact::RolledBack { .. } => {
                on_behalf.unwrap_or(Cause::User)
            }
        }
    }

    /// Name without payload, for messages and tables.
    pub const fn name(&self) -> &'static str {
        match self {
            Fact::Admitted(_) => "Admitted",
            Fact::MachineSpawned(_) => "MachineSpawned",
            Fact::CpusStarted { .. } => "CpusStarted",
            Fact::ProgramStarted => "ProgramStarted",
            Fact::AgentReady => "AgentReady",
            Fact::ProgramExited(_) => "ProgramExited",
            Fact::GuestPoweredOff => "GuestPoweredOff",
            Fact::MachineGone { .. } => "MachineGone",
            Fact::MachineFoundGone { .. } => "MachineFoundGone",
            Fact::GuestFoundOff { .. } => "GuestFoundOff",
            Fact::OperationFailed { .. } => "OperationFailed",
            Fact::CpusPaused => "CpusPaused",
            Fact::SnapshotCommitted => "SnapshotCommitted",
            Fact::StandbyAbandoned { .. } => "StandbyAbandoned",
            Fact::Resumed { .. } => "Resumed",
            Fact::AgentAnswered => "AgentAnswered",
            Fact::AnswerOverdue => "AnswerOverdue",
            Fact::MemoryLost { .. } => "MemoryLost",
            Fact::MemoryDiscarded => "MemoryDiscarded",
            Fact::GuestContinued => "GuestContinued",
            Fact::Forked => "Forked",
            Fact::RolledBack { .. } => "RolledBack",
        }
    }
}
