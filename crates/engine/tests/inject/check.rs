//! What must hold whenever nothing is in flight, and what a restart must have made of an operation.
use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
    sync::Arc,
};

use doze_engine::{
    EngineError, InstanceView, MemoryCompression, Progress, SnapshotKind, StandbyOptions,
    StartOverrides, TargetState,
};
use doze_lifecycle::State;
use doze_vmm::MachineStatus;

use crate::{
    commands::unscheduled,
    copies,
    lab::{Lab, PATIENCE, packed, settled},
    scenario::{Begin, NAME, Op, Scenario, Stake},
};

/// Faults found, for people.
pub type Faults = Vec<String>;

/// Per instance: the sum of its phases minus the boot clock. It never changes.
#[derive(Default)]
pub struct Ledgers(HashMap<String, i128>);

impl Ledgers {
    pub fn check(&mut self, view: &InstanceView) -> Option<String> {
        let now = doze_engine::now();
        let phases = view.record.ledger().durations_us(&now);
        let sum: i128 = phases.values().map(|us| i128::from(*us)).sum();
        let offset = sum - i128::from(now.boottime_us);
        let first = *self.0.entry(view.id.clone()).or_insert(offset);
        (first != offset).then(|| {
            let lost = first - offset;
            format!("phases do not add up to the time elapsed: {lost} us are missing")
        })
    }
}

/// Records, files and processes agree.
pub fn consistent(lab: &Lab, ledgers: &mut Ledgers) -> Faults {
    lab.run(packed(&lab.engine(), &lab.world));
    let mut faults = std::mem::take(&mut lab.world.state().violations);
    let views = lab.engine().list();
    for view in &views {
        faults.extend(record_and_world(lab, view));
        faults.extend(record_and_files(lab, view));
        faults.extend(ledgers.check(view));
    }
    faults.extend(copies::consistent(lab, &views));
    let known: BTreeSet<&str> = views.iter().map(|view| view.id.as_str()).collect();
    for vmm in lab.world.state().vmms.values() {
        if !known.contains(vmm.instance.as_str()) {
            faults.push(format!("a VMM of {} is nobody's", vmm.instance));
        }
    }
    for folder in names(&lab.data_dir().join("instances")) {
        if !known.contains(folder.as_str()) {
            faults.push(format!("the folder of {folder} is nobody's"));
        }
    }
    faults
}

fn record_and_world(lab: &Lab, view: &InstanceView) -> Faults {
    let mut faults = Faults::new();
    let record = &view.record;
    let state = lab.world.state();
    let live: Vec<_> = state
        .vmms
        .values()
        .filter(|vmm| vmm.instance == view.id)
        .collect();
    let named = record.machine().map(|machine| machine.pid);
    let pids: Vec<i32> = live.iter().map(|vmm| vmm.process.pid).collect();
    if pids != named.into_iter().collect::<Vec<_>>() {
        faults.push(format!(
            "{}: its record names VMM {named:?}, there are {pids:?}",
            record.state()
        ));
    }
    if let Some(operation) = record.operation() {
        faults.push(format!("a {} is left in flight", operation.as_str()));
    }
    let status = live.first().map(|vmm| *vmm.status.borrow());
    let expected = match record.state() {
        State::Initializing | State::Running => Some(MachineStatus::Running),
        State::Stopped | State::Standby => None,
        State::Created | State::Paused | State::Shutdown => {
            faults.push(format!("it rests in {}", record.state()));
            status
        }
    };
    if status != expected {
        faults.push(format!("{}, but its VMM is {status:?}", record.state()));
    }
    faults
}

fn record_and_files(lab: &Lab, view: &InstanceView) -> Faults {
    let mut faults = Faults::new();
    let record = &view.record;
    let dir = lab.instance_dir(&view.id);
    let sleeps = record.state() == State::Standby;
    let awake = record.machine().is_some();
    let packed = sleeps && is_packed(view.compression.as_ref());
    let rules = [
        // What is left of a consumed snapshot goes at the next standby or stop of a guest that runs.
        ("snapshot", sleeps, !sleeps),
        ("snapshot.stage", false, true),
        ("snapshot.consumed", false, !awake),
        (
            "memory",
            (sleeps && !packed) || awake,
            packed || !(sleeps || awake),
        ),
        ("memory.lz4", packed, !packed),
        ("run", awake, !awake),
        ("incoming", false, true),
        ("incoming.stage", false, true),
    ];
    for (name, must, must_not) in rules {
        let there = dir.join(name).exists();
        if must && !there {
            faults.push(format!("{}: {name} is missing", record.state()));
        }
        if must_not && there {
            faults.push(format!("{}: {name} is left", record.state()));
        }
    }
    faults.extend(half_made(&dir));
    if sleeps != record.has_snapshot() {
        faults.push(format!(
            "{} with has_snapshot {}",
            record.state(),
            record.has_snapshot()
        ));
    }
    faults
}

pub fn is_packed(compression: Option<&MemoryCompression>) -> bool {
    compression.is_some_and(|c| matches!(c.progress, Progress::Compressed { .. }))
}

/// Memory that is nothing yet.
pub fn half_made(dir: &Path) -> Faults {
    let stages = names(dir).into_iter();
    let stages = stages.filter(|name| name.starts_with(".memory"));
    stages.map(|name| format!("{name} is left")).collect()
}

pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// How the server's life ended.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// Its VMMs died with it.
    pub power: bool,
    /// The snapshot had its mark then.
    pub marked: bool,
    /// A rollback was committed then, and its VMM alive.
    pub committed: bool,
    /// The first command was answered with success.
    pub answered: bool,
}

/// Whether the instance is now where it may be.
pub fn outcome(lab: &Lab, scenario: &Scenario, stake: &Stake, end: End) -> Faults {
    let mut faults = copies::outcome(lab, scenario, stake, end);
    let Some(view) = lab.view(NAME) else {
        if !(scenario.deletes() || (scenario.does(Op::Create) && !end.answered)) {
            faults.push("the instance is gone".to_owned());
        }
        return faults;
    };
    let record = &view.record;
    let state = record.state();
    if scenario.does(Op::Delete) && end.answered && scenario.op == Op::Delete {
        faults.push("its delete was answered, and it is still there".to_owned());
    }
    let died = died(lab, scenario, &view.id);
    if let Some(exact) = exact(scenario, end, died)
        && state != exact
        && !(exact == State::Running && state == State::Initializing && scenario.mute)
    {
        faults.push(format!(
            "it was answered and must be {exact}, it is {state}"
        ));
    }
    let gives_up = scenario.does(Op::StartDiscarding) || scenario.rolls_back().is_some();
    if end.committed && end.power {
        faults.extend(found_gone(scenario, &view));
    }
    if end.marked && !gives_up && state != State::Standby {
        faults.push(format!(
            "its snapshot was committed, and it is {state} ({:?})",
            record.failure()
        ));
    }
    match state {
        State::Standby if !scenario.sleeps() => faults.push("nobody put it to sleep".into()),
        State::Stopped => {
            faults.extend(stopped(scenario, stake, end.power || died, &view));
            let disk = Some(lab.disk(&view.id));
            let rests = scenario.from == Begin::Stopped && scenario.copies();
            if rests && disk != stake.disk {
                faults.push(format!("its disk changed to {disk:?}"));
            }
        }
        State::Initializing | State::Running => {
            let kept = record.boots() == stake.boots;
            let boots = scenario.does(Op::Start)
                || scenario.does(Op::StartDiscarding)
                || scenario.does(Op::Create)
                || scenario.rolls_back() == Some(TargetState::Running);
            if !kept && !boots {
                faults.push("it booted again".to_owned());
            }
            let memory = lab.world.counter(&view.id);
            let wanted = match kept {
                true => memories(scenario, stake, end.answered),
                false => vec![Some(0)],
            };
            if !wanted.contains(&memory) {
                faults.push(format!(
                    "its memory says {memory:?}, it should say {wanted:?}"
                ));
            }
        }
        State::Standby | State::Created | State::Paused | State::Shutdown => {}
    }
    faults
}

/// What the memory of the same boot may say.
fn memories(scenario: &Scenario, stake: &Stake, answered: bool) -> Vec<Option<u64>> {
    let back = stake.kept.as_ref().map(|kept| kept.counter);
    match scenario.rolls_back() {
        // Not begun, or complete.
        Some(_) if !answered || scenario.then.is_some() => vec![stake.memory, back],
        Some(_) => vec![back],
        None => vec![stake.memory],
    }
}

/// Its VMM died by itself.
fn died(lab: &Lab, scenario: &Scenario, id: &str) -> bool {
    let died = lab.world.state().died.contains(id);
    // Whose VMM it is that dies only the world knows when there are two.
    match scenario.copies() || scenario.rolls_back().is_some() {
        true => died,
        false => scenario.dies(),
    }
}

/// Nobody knows how long a guest ran whose VMM was gone, and its ledger says so.
fn found_gone(scenario: &Scenario, view: &InstanceView) -> Option<String> {
    let estimated = !view.record.ledger().estimated_ms().is_empty();
    let ran = scenario.from == Begin::Running && scenario.rolls_back().is_some();
    (ran && !estimated)
        .then(|| "a VMM that was found gone is booked as if it was seen going".into())
}

/// Where a command that nobody interrupted leaves its instance, also after a crash, once it was answered.
fn exact(scenario: &Scenario, end: End, died: bool) -> Option<State> {
    let awake = match (end.power, died) {
        (true, _) => Some(State::Stopped),
        (false, true) => None,
        (false, false) => Some(State::Running),
    };
    let before = match scenario.from {
        Begin::Nothing => None,
        Begin::Running => awake,
        Begin::Standby | Begin::Forked | Begin::RolledBack => Some(State::Standby),
        Begin::Stopped => Some(State::Stopped),
    };
    if scenario.copies() {
        return before;
    }
    if !end.answered || scenario.then.is_some() {
        return None;
    }
    match scenario.op {
        Op::Create | Op::Start | Op::StartDiscarding | Op::Restore => awake,
        Op::Standby | Op::Pack => Some(State::Standby),
        Op::Stop | Op::PowerOff | Op::Death => Some(State::Stopped),
        Op::Rollback(TargetState::Running) => awake,
        Op::Rollback(TargetState::Standby) => Some(State::Standby),
        Op::Rollback(TargetState::Stopped) => Some(State::Stopped),
        Op::Delete | Op::Discard => None,
        Op::Snapshot | Op::Import | Op::Fork(_) | Op::ForkStored(_) => before,
        Op::DropSnapshot | Op::DropFork | Op::Schedule => before,
    }
}

fn stopped(scenario: &Scenario, stake: &Stake, died: bool, view: &Arc<InstanceView>) -> Faults {
    let by_command = [
        Op::Stop,
        Op::StartDiscarding,
        Op::Start,
        Op::PowerOff,
        Op::Death,
        Op::Create,
    ]
    .into_iter()
    .any(|op| scenario.does(op));
    // A disk alone has no memory to come back to.
    let back = scenario.rolls_back() == Some(TargetState::Stopped)
        || scenario.kept == Some(SnapshotKind::Stopped) && scenario.rolls_back().is_some();
    let by_command = by_command || back || scenario.from == Begin::Stopped;
    if stake.memory.is_some() && !by_command && !died {
        return vec![format!(
            "its VMM lived and its memory is lost ({:?})",
            view.record.failure()
        )];
    }
    if !by_command && view.record.failure().is_none() {
        return vec!["it is Stopped and nothing says why".to_owned()];
    }
    Faults::new()
}

/// Whatever it is now, it can be used, and deleted without a trace, and what was copied from it, too.
pub fn usable(lab: &Lab, ledgers: &mut Ledgers, scenario: &Scenario, stake: &Stake) -> Faults {
    lab.world.state().habits = Default::default();
    if scenario.op == Op::Schedule {
        lab.run(unscheduled(&lab.engine(), &lab.world));
    }
    let mut faults = copies::usable(lab, scenario, stake);
    let memories = memories(scenario, stake, false);
    faults.extend(wakes(lab, NAME, scenario, &memories));
    if lab.view(NAME).is_none() {
        let made = lab.run(lab.engine().create(Lab::request(NAME)));
        faults.extend(made.err().map(|e| format!("it cannot be made again: {e}")));
    }
    faults.extend(sleeps_and_wakes(lab, NAME));
    faults.extend(consistent(lab, ledgers));
    if let Err(error) = lab.run(lab.engine().delete(NAME, false)) {
        faults.push(format!("it cannot be deleted: {error}"));
    }
    faults.extend(consistent(lab, ledgers));
    faults
}

/// Awake again, if it is there, with one of these memories if it slept.
pub fn wakes(lab: &Lab, name: &str, scenario: &Scenario, memories: &[Option<u64>]) -> Faults {
    let (engine, world) = (lab.engine(), lab.world.clone());
    let outcome = lab.run(async {
        if !scenario.sleeps() {
            // What the store refused to record is recorded with a command, even one that is refused.
            let _ = engine.start(name, StartOverrides::default(), false).await;
        }
        let view = settled(&engine, &world, name, PATIENCE / 2).await;
        let Some(view) = view else {
            return Ok(None);
        };
        match view.state() {
            State::Standby if scenario.altered => {
                match engine.restore(name).await {
                    Err(EngineError::Snapshot { .. }) => {}
                    other => return Ok(Some(format!("an altered state is restored: {other:?}"))),
                }
                let overrides = StartOverrides::default();
                engine.start(name, overrides, true).await?;
            }
            State::Standby => {
                engine.restore(name).await?;
                let memory = world.counter(&view.id);
                if !memories.contains(&memory) {
                    return Ok(Some(format!("restored to {memory:?}, not {memories:?}")));
                }
            }
            State::Stopped => drop(engine.start(name, StartOverrides::default(), false).await?),
            State::Created | State::Initializing | State::Running => {}
            State::Paused | State::Shutdown => {}
        }
        Ok::<_, EngineError>(None)
    });
    let fault = outcome.unwrap_or_else(|e| Some(format!("{name} cannot be used: {e}")));
    fault.into_iter().collect()
}

pub fn sleeps_and_wakes(lab: &Lab, name: &str) -> Faults {
    let (engine, world) = (lab.engine(), lab.world.clone());
    let outcome = lab.run(async {
        let view = settled(&engine, &world, name, PATIENCE / 2).await;
        let id = view.map(|view| view.id.clone()).unwrap_or_default();
        let before = world.counter(&id);
        engine.standby(name, StandbyOptions::default()).await?;
        engine.restore(name).await?;
        let after = world.counter(&id);
        Ok::<_, EngineError>(
            (before != after).then(|| format!("slept with {before:?}, woke with {after:?}")),
        )
    });
    let fault = outcome.unwrap_or_else(|e| Some(format!("{name} cannot sleep and wake: {e}")));
    fault.into_iter().collect()
}
