//! An instance's durable record and the one function that changes it.
//!
//! ```text
//!           MachineSpawned      CpusStarted          ProgramStarted + AgentReady
//!   Stopped ─────────────> Created ─────> Initializing ─────────────> Running
//!      ^                      │             │  ^     └─ GuestPoweredOff ──┤
//!      │      MachineGone     │             │  │                          v
//!      ├──────────────────────┴─────────────│──│───── MachineGone <── Shutdown
//!      │                         CpusPaused │  │ Resumed, then AgentAnswered or AnswerOverdue ─> Running
//!      │ MemoryLost, MemoryDiscarded        v  │
//!      └─────────────── Standby <─────── Paused, SnapshotCommitted
//!                               MachineGone
//! ```
//! A standby is undone until `SnapshotCommitted` (`StandbyAbandoned`: the guest goes on) and finished
//! after it. A snapshot of a running guest pauses it on the way (`GuestContinued`). A fork begins as Created, with
//! the memory of its source if there is one, and rests (`Forked`) or runs (`CpusStarted`, `Resumed`) next.
//!
//! An operation in flight (`operation`) and the state are two things: the state is where the guest is, the
//! operation is what the server has promised to finish or undo, also after a crash.
use serde::{Deserialize, Serialize};

use crate::{Cause, Exit, Fact, Ledger, Operation, ProcessRef, Stamp, State};

/// Version of the record's stored form. Older ones are migrated when read.
pub const RECORD_VERSION: u32 = 4;

/// The fact cannot happen here: a defect of the caller, nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{fact} cannot happen to an instance that is {state} with {} in flight",
        operation.map_or("nothing", Operation::as_str))]
pub struct IllegalFact {
    pub fact: &'static str,
    pub state: State,
    pub operation: Option<Operation>,
}

/// How far the current boot has come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Boot {
    agent_expected: bool,
    program_started: Option<Stamp>,
    agent_ready: Option<Stamp>,
    /// Since the last restore: whether the agent has to prove itself, and when it did.
    #[serde(default)]
    proof: Proof,
}

/// Whether a restored guest's agent has answered.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Proof {
    /// Not restored since its boot, or without an agent.
    #[default]
    NotNeeded,
    Awaited,
    /// Not given in time. The guest has its CPUs all the same, and is Running since then; a late answer is taken.
    Overdue(Stamp),
    Given(Stamp),
}

impl Boot {
    /// What is left of it in another record, begun at `at`: how far the guest had come, and none of the moments. They may
    /// be another host's, or nobody's.
    fn taken_over(&self, at: &Stamp) -> Boot {
        let then = |told: &Option<Stamp>| told.as_ref().map(|_| at.clone());
        Boot {
            agent_expected: self.agent_expected,
            program_started: then(&self.program_started),
            agent_ready: then(&self.agent_ready),
            // What it still had to prove it has to prove when it wakes.
            proof: Proof::NotNeeded,
        }
    }

    /// When the guest became ready, if it did: the latest of what it waited for, and not before `since`, when
    /// the current phase began. What happened in another boot of the host was before it.
    fn completed(&self, since: &Stamp) -> Option<Stamp> {
        // Whatever it has not said: it uses its CPUs.
        if let Proof::Overdue(at) = &self.proof {
            return Some(match at.boot_id == since.boot_id {
                true => since.clone().later(at.clone()),
                false => since.clone(),
            });
        }
        let program = Some(self.program_started.as_ref()?);
        let agent = match self.agent_expected {
            true => Some(self.agent_ready.as_ref()?),
            false => None,
        };
        let proof = match &self.proof {
            Proof::NotNeeded => None,
            Proof::Awaited | Proof::Overdue(_) => return None,
            Proof::Given(at) => Some(at),
        };
        let told = [program, agent, proof].into_iter().flatten();
        let comparable = told.filter(|at| at.boot_id == since.boot_id);
        Some(comparable.fold(since.clone(), |latest, at| latest.later(at.clone())))
    }
}

/// The durable truth about one instance's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    state: State,
    operation: Option<Operation>,
    machine: Option<ProcessRef>,
    boot: Boot,
    ledger: Ledger,
    exit: Option<Exit>,
    /// Why the last operation or run failed, until the next start.
    failure: Option<String>,
    started_at_us: Option<i64>,
    stopped_at_us: Option<i64>,
    /// How often the CPUs were started from nothing.
    boots: u64,
    /// A committed snapshot is there to come back to.
    #[serde(default)]
    snapshot: bool,
    /// How often the CPUs went on from a snapshot, since the record was made.
    #[serde(default)]
    restores: u64,
}

impl Record {
    /// A new instance whose creation is in flight.
    pub fn creating(at: Stamp) -> Record {
        Record {
            operation: Some(Operation::Create),
            ..Record::resting(State::Created, at)
        }
    }

    /// A new instance that is being made from another one's disk and, with `memory_of`, from its memory: the
    /// record of that moment says how far its boot had come. Its own time begins now.
    pub fn forking(memory_of: Option<&Record>, at: Stamp) -> Record {
        let mut record = Record {
            operation: Some(Operation::Fork),
            ..Record::resting(State::Created, at)
        };
        if let Some(source) = memory_of {
            record.inherit(source, &record.ledger.since().clone());
        }
        record
    }

    /// What is taken of a record that was read from a stream: state, and how far the guest had come. `agent`: whether
    /// it has one, as its specification says. Moments, sums, counts and reasons are not; its time begins at `at`.
    #[must_use]
    pub fn from_outside(&self, agent: bool, at: &Stamp) -> Record {
        let mut boot = self.boot.taken_over(at);
        boot.agent_expected = agent;
        if self.state == State::Running {
            boot.program_started = Some(at.clone());
            boot.agent_ready = agent.then(|| at.clone());
        }
        Record {
            boot,
            snapshot: self.state == State::Standby,
            boots: u64::from(self.boots > 0),
            ..Record::resting(self.state, at.clone())
        }
    }

    /// A new instance that never ran.
    pub fn stopped(at: Stamp) -> Record {
        Record::resting(State::Stopped, at)
    }

    fn resting(state: State, at: Stamp) -> Record {
        Record {
            version: RECORD_VERSION,
            state,
            operation: None,
            machine: None,
            boot: Boot::default(),
            ledger: Ledger::new(state, at),
            exit: None,
            failure: None,
            started_at_us: None,
            stopped_at_us: None,
            boots: 0,
            snapshot: false,
            restores: 0,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }
    pub fn operation(&self) -> Option<Operation> {
        self.operation
    }
    /// The VMM process, while there is one.
    pub fn machine(&self) -> Option<&ProcessRef> {
        self.machine.as_ref()
    }
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }
    /// When the current phase began.
    pub fn current_since(&self) -> &Stamp {
        self.ledger.since()
    }
    /// How the program of the last (or current) run ended.
    pub fn exit(&self) -> Option<&Exit> {
        self.exit.as_ref()
    }
    /// Why the last operation or run failed, until the next start.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }
    /// Wall clock of the last start of the CPUs, microseconds since the epoch.
    pub fn started_at_us(&self) -> Option<i64> {
        self.started_at_us
    }
    /// Wall clock of the last arrival in Stopped after a run.
    pub fn stopped_at_us(&self) -> Option<i64> {
        self.stopped_at_us
    }
    pub fn boots(&self) -> u64 {
        self.boots
    }
    /// Whether there is a committed snapshot to come back to.
    pub fn has_snapshot(&self) -> bool {
        self.snapshot
    }
    /// How often the guest went on from a snapshot.
    pub fn restores(&self) -> u64 {
        self.restores
    }
    /// Whether a restored guest's agent has yet to answer.
    pub fn awaits_answer(&self) -> bool {
        self.machine.is_some() && matches!(self.boot.proof, Proof::Awaited | Proof::Overdue(_))
    }
    /// Whether the time that a restored guest's agent has for its answer is not over.
    pub fn answer_in_time(&self) -> bool {
        self.machine.is_some() && self.boot.proof == Proof::Awaited
    }
    /// Whether this run's agent has reported itself.
    pub fn agent_ready(&self) -> bool {
        self.boot.agent_ready.is_some()
    }
    /// Whether this run's program has been executed.
    pub fn program_started(&self) -> bool {
        self.boot.program_started.is_some()
    }

    /// What the record becomes when `fact` happened at `at`. The only way a record changes.
    /// `on_behalf` is who wanted what is being done; without, the fact speaks for itself.
    ///
    /// # Errors
    /// [`IllegalFact`] when the fact cannot happen in this state with this operation in flight.
    pub fn apply(
        &self,
        fact: &Fact,
        at: &Stamp,
        on_behalf: Option<Cause>,
    ) -> Result<Record, IllegalFact> {
        if !self.allows(fact) {
            return Err(IllegalFact {
                fact: fact.name(),
                state: self.state,
                operation: self.operation,
            });
        }
        let cause = fact.cause(on_behalf);
        let mut next = self.clone();
        // What is written from here on an older program might not understand.
        next.version = RECORD_VERSION;
        match fact {
            Fact::Admitted(operation) => next.operation = Some(*operation),
            Fact::MachineSpawned(process) => {
                next.begin_run(process.clone());
                next.enter(State::Created, at, cause);
            }
            Fact::CpusStarted { agent } => {
                next.boot.agent_expected = *agent;
                next.boots += 1;
                next.started_at_us = Some(at.wall_us);
                next.operation = None;
                next.enter(State::Initializing, at, cause);
            }
            Fact::ProgramStarted => {
                next.boot.program_started.get_or_insert_with(|| at.clone());
                next.finish_boot(cause);
            }
            Fact::AgentReady => {
                next.boot.agent_ready.get_or_insert_with(|| at.clone());
                next.finish_boot(cause);
            }
            Fact::ProgramExited(exit) => next.exit = Some(exit.clone()),
            Fact::GuestPoweredOff => next.enter(State::Shutdown, at, cause),
            Fact::MachineGone { failure } => next.end_run(failure.as_deref(), at, cause),
            Fact::MachineFoundGone { failure, last_seen } => {
                // It was not seen later than now.
                let last_seen = next.ledger.between(last_seen, at);
                next.end_run(failure.as_deref(), &last_seen, cause);
                next.ledger.estimate(at);
            }
            Fact::GuestFoundOff { last_seen } => {
                let last_seen = next.ledger.between(last_seen, at);
                next.enter(State::Shutdown, &last_seen, cause);
                next.ledger.estimate(at);
            }
            Fact::OperationFailed { reason } => next.give_up(reason),
            Fact::CpusPaused => next.enter(State::Paused, at, cause),
            Fact::SnapshotCommitted => {
                next.snapshot = true;
                next.failure = None;
            }
            Fact::StandbyAbandoned { reason } => {
                next.abandon_standby(reason.as_deref(), at, cause);
            }
            Fact::Resumed { process, agent } => next.wake(process, *agent, at, cause),
            Fact::AgentAnswered => {
                next.boot.proof = Proof::Given(at.clone());
                next.finish_boot(cause);
            }
            Fact::AnswerOverdue => {
                next.boot.proof = Proof::Overdue(at.clone());
                next.finish_boot(cause);
            }
            Fact::MemoryLost { reason, last_seen } => {
                next.operation = None;
                next.failure = Some(reason.clone());
                let last_seen = next.ledger.between(last_seen, at);
                next.forget_memory(&last_seen, cause);
                next.ledger.estimate(at);
            }
            Fact::MemoryDiscarded => next.forget_memory(at, cause),
            Fact::GuestContinued => {
                next.operation = None;
                next.go_on(at, cause);
            }
            Fact::Forked => {
                next.operation = None;
                let rest = match next.snapshot {
                    true => State::Standby,
                    false => State::Stopped,
                };
                next.enter(rest, at, cause);
            }
            Fact::RolledBack { memory_of } => next.roll_back(memory_of.as_deref(), at, cause),
        }
        Ok(next)
    }

    /// Exhaustive over (fact, state, operation): a new state, operation or fact forces a decision.
    fn allows(&self, fact: &Fact) -> bool {
        use Operation::{Create, Delete, Fork, Restore, Rollback, Snapshot, Standby, Start, Stop};
        use State as S;
        match fact {
            Fact::Admitted(operation) => {
                self.operation.is_none()
                    && match operation {
                        Create | Fork => false,
                        Start => match self.state {
                            S::Stopped | S::Standby => true,
                            S::Created | S::Initializing | S::Running => false,
                            S::Paused | S::Shutdown => false,
                        },
                        Stop => self.state.has_machine(),
                        Delete => true,
                        Standby => self.has_running_guest(),
                        Restore => self.state == S::Standby && self.snapshot,
                        Snapshot => self.state == S::Running,
                        Rollback => match self.state {
                            S::Stopped | S::Standby | S::Initializing | S::Running => true,
                            S::Created | S::Paused | S::Shutdown => false,
                        },
                    }
            }
            Fact::MachineSpawned(_) => {
                self.machine.is_none()
                    && match self.operation {
                        Some(Create) => self.state == S::Created,
                        Some(Fork) => self.state == S::Created && !self.snapshot,
                        Some(Start) => self.state == S::Stopped,
                        Some(Stop | Delete | Standby | Restore) | None => false,
                        Some(Snapshot | Rollback) => false,
                    }
            }
            Fact::CpusStarted { .. } => {
                self.machine.is_some()
                    && self.state == S::Created
                    && match self.operation {
                        Some(Create | Start | Fork) => true,
                        Some(Stop | Delete | Standby | Restore) | None => false,
                        Some(Snapshot | Rollback) => false,
                    }
            }
            Fact::ProgramStarted | Fact::AgentReady => match self.state {
                S::Initializing | S::Running | S::Paused | S::Shutdown => true,
                S::Created | S::Stopped | S::Standby => false,
            },
            // The last word of a run may be read after its machine is gone.
            Fact::ProgramExited(_) => match self.state {
                S::Initializing | S::Running | S::Paused | S::Shutdown | S::Stopped => {
                    self.boots > 0
                }
                S::Created | S::Standby => false,
            },
            Fact::GuestPoweredOff | Fact::GuestFoundOff { .. } => {
                !self.is_committed_standby()
                    && match self.state {
                        S::Initializing | S::Running | S::Paused => true,
                        S::Created | S::Shutdown | S::Stopped | S::Standby => false,
                    }
            }
            Fact::MachineGone { .. } | Fact::MachineFoundGone { .. } => self.machine.is_some(),
            Fact::OperationFailed { .. } => match self.operation {
                // They have undone the machine before they say so.
                Some(Create | Start | Fork) => self.machine.is_none(),
                Some(Restore) => self.snapshot,
                Some(Stop | Rollback) => true,
                // Deleting is finished later, never given up; a standby or snapshot says what became of the guest.
                Some(Delete | Standby | Snapshot) | None => false,
            },
            Fact::CpusPaused => {
                matches!(self.operation, Some(Standby | Snapshot)) && self.has_running_guest()
            }
            Fact::SnapshotCommitted => {
                self.operation == Some(Standby) && self.state == S::Paused && !self.snapshot
            }
            Fact::StandbyAbandoned { .. } => {
                self.operation == Some(Standby) && self.machine.is_some()
            }
            Fact::Resumed { .. } => {
                self.machine.is_none()
                    && match self.operation {
                        Some(Restore) => true,
                        Some(Fork) => self.state == S::Created && self.snapshot,
                        Some(Create | Start | Stop | Delete | Standby | Snapshot | Rollback)
                        | None => false,
                    }
            }
            Fact::AgentAnswered => self.awaits_answer(),
            Fact::AnswerOverdue => self.answer_in_time() && self.has_running_guest(),
            Fact::MemoryLost { .. } => match self.operation {
                Some(Restore) => true,
                Some(Create | Start | Stop | Delete | Standby) | None => false,
                Some(Fork | Snapshot | Rollback) => false,
            },
            Fact::MemoryDiscarded => match self.operation {
                Some(Start) => self.state == S::Standby,
                Some(Create | Stop | Delete | Standby | Restore) | None => false,
                Some(Fork | Snapshot | Rollback) => false,
            },
            Fact::GuestContinued => self.operation == Some(Snapshot) && self.machine.is_some(),
            Fact::Forked => {
                self.operation == Some(Fork) && self.state == S::Created && self.machine.is_none()
            }
            Fact::RolledBack { .. } => self.operation == Some(Rollback) && self.machine.is_none(),
        }
    }

    /// The guest's CPUs run.
    fn has_running_guest(&self) -> bool {
        match self.state {
            State::Initializing | State::Running => true,
            State::Created | State::Paused | State::Shutdown => false,
            State::Stopped | State::Standby => false,
        }
    }

    /// Past the point of no return: the VMM that is still there has nothing left to do.
    fn is_committed_standby(&self) -> bool {
        self.operation == Some(Operation::Standby) && self.snapshot
    }

    fn enter(&mut self, state: State, at: &Stamp, cause: Cause) {
        self.ledger.enter(state, at, cause);
        self.state = state;
    }

    fn begin_run(&mut self, process: ProcessRef) {
        self.machine = Some(process);
        self.boot = Boot::default();
        self.exit = None;
        self.failure = None;
    }

    /// Running begins when the guest says so, not when we looked; see [`Ledger::enter`] for markers
    /// older than the current phase.
    fn finish_boot(&mut self, cause: Cause) {
        if self.state == State::Initializing
            && let Some(at) = self.boot.completed(self.ledger.since())
        {
            self.enter(State::Running, &at, cause);
        }
    }

    fn end_run(&mut self, failure: Option<&str>, at: &Stamp, cause: Cause) {
        self.machine = None;
        if self.is_committed_standby() {
            self.operation = None;
            self.enter(State::Standby, at, cause);
            return;
        }
        if let Some(failure) = failure {
            self.failure = Some(failure.to_owned());
        }
        if self.state != State::Created {
            self.stopped_at_us = Some(at.wall_us);
        }
        self.operation = match self.operation {
            Some(Operation::Stop | Operation::Standby) | None => None,
            Some(Operation::Snapshot) => None,
            kept @ Some(Operation::Create | Operation::Start | Operation::Fork) => kept,
            kept @ Some(Operation::Delete | Operation::Restore | Operation::Rollback) => kept,
        };
        self.enter(State::Stopped, at, cause);
    }

    fn abandon_standby(&mut self, reason: Option<&str>, at: &Stamp, cause: Cause) {
        self.operation = None;
        self.snapshot = false;
        self.failure = reason.map(str::to_owned);
        self.go_on(at, cause);
    }

    /// A guest that was paused runs again; what it had become then it still is.
    fn go_on(&mut self, at: &Stamp, cause: Cause) {
        if self.state == State::Paused {
            let phase = match self.boot.completed(self.ledger.since()) {
                Some(_) => State::Running,
                None => State::Initializing,
            };
            self.enter(phase, at, cause);
        }
    }

    /// Takes over the memory that `source` had when it was captured.
    fn inherit(&mut self, source: &Record, at: &Stamp) {
        self.boot = source.boot.taken_over(at);
        self.boots = self.boots.max(1);
        self.snapshot = true;
    }

    fn roll_back(&mut self, memory_of: Option<&Record>, at: &Stamp, cause: Cause) {
        self.operation = None;
        self.failure = None;
        self.exit = None;
        match memory_of {
            Some(source) => {
                self.inherit(source, at);
                self.enter(State::Standby, at, cause);
            }
            None => {
                self.snapshot = false;
                self.enter(State::Stopped, at, cause);
            }
        }
    }

    /// The guest goes on where it was; what it had become then it still is.
    fn wake(&mut self, process: &ProcessRef, agent: bool, at: &Stamp, cause: Cause) {
        self.machine = Some(process.clone());
        self.operation = None;
        self.failure = None;
        self.snapshot = false;
        self.restores += 1;
        // A fork's CPUs start for the first time when it wakes.
        self.started_at_us.get_or_insert(at.wall_us);
        self.boot.proof = if agent {
            Proof::Awaited
        } else {
            Proof::NotNeeded
        };
        self.enter(State::Initializing, at, cause);
        self.finish_boot(cause);
    }

    fn forget_memory(&mut self, at: &Stamp, cause: Cause) {
        self.snapshot = false;
        self.stopped_at_us = Some(at.wall_us);
        self.enter(State::Stopped, at, cause);
    }

    fn give_up(&mut self, reason: &str) {
        self.failure = Some(reason.to_owned());
        // A create that failed leaves nothing: what it made is deleted, also after a crash.
        self.operation = match self.operation {
            Some(Operation::Create | Operation::Fork) => Some(Operation::Delete),
            Some(Operation::Start | Operation::Stop | Operation::Delete) => None,
            Some(Operation::Standby | Operation::Restore) | None => None,
            Some(Operation::Snapshot | Operation::Rollback) => None,
        };
    }

    /// Whether this program knows records of this version.
    ///
    /// # Errors
    /// Both versions, when the record is newer than the program.
    pub fn check_version(&self) -> Result<(), String> {
        if self.version > RECORD_VERSION {
            return Err(format!(
                "record version {} is newer than this program's {RECORD_VERSION}",
                self.version
            ));
        }
        Ok(())
    }
}
