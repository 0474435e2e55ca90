//! What must hold of forks and stored snapshots.
use std::{collections::BTreeSet, sync::Arc};

use doze_engine::{InstanceView, Snapshot, SnapshotFilter, TargetState};
use doze_lifecycle::State;

use crate::{
    check::{End, Faults, half_made, is_packed, names, sleeps_and_wakes, wakes},
    commands::fork_stored,
    content::{self, Content},
    lab::{Lab, PATIENCE, settled},
    scenario::{FORK, KEPT, NEW, Op, Scenario, Stake},
};

/// An instance that is made of a snapshot to see whether it can be.
const PROBE: &str = "probe";
/// Two clocks are read one after the other.
const CLOCKS_US: i128 = 500_000;

fn stored(lab: &Lab) -> Vec<Arc<Snapshot>> {
    lab.engine().list_snapshots(&SnapshotFilter::default())
}

/// Folders are those of the rows, and nobody is called Running who takes himself for another one.
pub fn consistent(lab: &Lab, views: &[Arc<InstanceView>]) -> Faults {
    let mut faults = Faults::new();
    for name in names(&lab.data_dir().join("captures")) {
        faults.push(format!("the copy {name} is nobody's"));
    }
    let folders: BTreeSet<String> = names(&lab.data_dir().join("snapshots"))
        .into_iter()
        .collect();
    let rows: BTreeSet<String> = stored(lab).iter().map(|s| s.id.clone()).collect();
    if folders != rows {
        faults.push(format!("snapshots {rows:?}, but their folders {folders:?}"));
    }
    let mut booked = 0;
    for view in views {
        if view.record.machine().is_some() {
            booked += view.spec.memory_bytes;
        }
        if view.state() == State::Running && !lab.world.is_itself(&view.id) {
            faults.push(format!("{} is Running and is not itself", view.name));
        }
        faults.extend(age(view));
    }
    let (found, _) = lab.engine().memory_usage();
    if found != booked {
        faults.push(format!("{found} bytes of memory are booked, not {booked}"));
    }
    faults
}

/// Its ledger holds the time since it was made, and nobody else's.
fn age(view: &InstanceView) -> Option<String> {
    let now = doze_engine::now();
    let phases = view.record.ledger().durations_us(&now);
    let sum: i128 = phases.values().map(|us| i128::from(*us)).sum();
    let age = i128::from(now.wall_us - view.created_at_us);
    ((sum - age).abs() > CLOCKS_US).then(|| format!("its phases are {sum} us, its age {age} us"))
}

/// Whether forks and snapshots are now what they may be: whole or not there.
pub fn outcome(lab: &Lab, scenario: &Scenario, stake: &Stake, end: End) -> Faults {
    let mut faults = fork_outcome(lab, scenario, stake, end);
    let called = |name: &str| {
        let all = stored(lab);
        all.into_iter().any(|s| s.name.as_deref() == Some(name))
    };
    let dropped = scenario.does(Op::DropSnapshot);
    if scenario.kept.is_some() && !dropped && !called(KEPT) {
        faults.push("a snapshot is gone that nobody deleted".into());
    }
    if scenario.op == Op::DropSnapshot && end.answered && called(KEPT) {
        faults.push("a snapshot's delete was answered, and it is still there".into());
    }
    let made = [Op::Snapshot, Op::Import].contains(&scenario.op);
    if made && end.answered && !called(NEW) {
        faults.push("a snapshot was answered and is gone".into());
    }
    let scheduled = stored(lab).iter().filter(|s| s.scheduled).count();
    let wanted = match (scenario.op, end.answered) {
        // Its outcome is answered before the older one goes.
        (Op::Schedule, true) => 1..=1,
        (Op::Schedule, false) => 1..=2,
        _ => 0..=0,
    };
    if !wanted.contains(&scheduled) {
        faults.push(format!("{scheduled} scheduled snapshots, not {wanted:?}"));
    }
    for snapshot in stored(lab) {
        faults.extend(whole(lab, &snapshot));
    }
    faults
}

/// There is one form of it, the one that its row tells of.
fn memory_of(dir: &std::path::Path, packed: bool) -> std::io::Result<Content> {
    let (raw, artefact) = (dir.join("memory"), dir.join("memory.lz4"));
    if (raw.exists(), artefact.exists()) != (!packed, packed) {
        let text = format!("packed {packed}, and there are {:?}", names(dir));
        return Err(std::io::Error::other(text));
    }
    if !packed {
        return content::of_memory(&raw);
    }
    let unpacked = tempfile::tempdir()?;
    let raw = unpacked.path().join("memory");
    let (options, cancel) = Default::default();
    doze_snapshot::decompress_file(&artefact, &raw, options, &cancel, &mut |_| {})
        .map_err(std::io::Error::other)?;
    content::of_memory(&raw)
}

/// Its files are those that its row tells of.
pub fn whole(lab: &Lab, snapshot: &Snapshot) -> Option<String> {
    let dir = lab.snapshot_dir(&snapshot.id);
    let mut size = 0;
    let mut folders = vec![dir.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            match meta.is_dir() {
                true => folders.push(entry.path()),
                false => size += meta.len(),
            }
        }
    }
    if size != snapshot.size_bytes {
        let row = snapshot.size_bytes;
        return Some(format!(
            "a snapshot's files have {size} bytes, its row says {row}"
        ));
    }
    if snapshot.memory_bytes == 0 {
        return None;
    }
    if let Some(left) = half_made(&dir).pop() {
        return Some(format!("in a snapshot {left}"));
    }
    let parts = (
        memory_of(&dir, is_packed(snapshot.compression.as_ref())),
        content::of_overlay(&dir.join("overlay.raw")),
        content::saved(&dir.join("snapshot/state")),
    );
    match parts {
        (Ok(memory), Ok(disk), Ok(saved)) if memory == disk && disk == saved.content => None,
        other => Some(format!("a snapshot's parts do not fit: {other:?}")),
    }
}

/// What a fork is made of, and where it is to end.
fn origin(op: Op, stake: &Stake) -> Option<(Option<Content>, TargetState)> {
    match op {
        Op::Fork(target) => Some((stake.disk.clone(), target)),
        Op::ForkStored(target) => Some((stake.kept.clone(), target)),
        _ => None,
    }
}

fn fork_outcome(lab: &Lab, scenario: &Scenario, stake: &Stake, end: End) -> Faults {
    let mut faults = Faults::new();
    let made = scenario.fork().and_then(|op| origin(op, stake));
    let (view, (origin, target)) = match (lab.view(FORK), made) {
        (None, Some(_)) if scenario.fork() == Some(scenario.op) && end.answered => {
            if !scenario.does(Op::DropFork) {
                faults.push("the fork was answered and is gone".into());
            }
            return faults;
        }
        (None, _) => return faults,
        (Some(_), None) => return vec!["there is a fork that nobody asked for".into()],
        (Some(view), Some(made)) => (view, made),
    };
    let died = end.power || lab.world.state().died.contains(&view.id);
    let state = view.state();
    let fits = match target {
        TargetState::Stopped => state == State::Stopped,
        TargetState::Standby => state == State::Standby,
        // Nobody waits for it any more; it stays without a network.
        TargetState::Running if state == State::Initializing => scenario.mute || scenario.stubborn,
        TargetState::Running => state == State::Running || died && state == State::Stopped,
    };
    if !fits {
        let failure = view.record.failure();
        faults.push(format!(
            "the fork to be {target:?} is {state} ({failure:?})"
        ));
    }
    if view.record.boots() > 1 {
        faults.push("the fork booted more than once".into());
    }
    let counter = origin.as_ref().map(|origin| origin.counter);
    let found = lab.world.counter(&view.id);
    // Of a source whose VMM died there was only the disk.
    let booted = found == Some(0) && !lab.world.state().died.is_empty();
    if state == State::Running && found != expected(scenario, counter) && !booted {
        faults.push(format!("the fork's memory says {found:?}, not {counter:?}"));
    }
    if target == TargetState::Stopped && Some(lab.disk(&view.id).counter) != counter {
        faults.push(format!("the fork's disk is not {origin:?}"));
    }
    faults
}

/// What the memory of a running fork says: nothing after a boot.
fn expected(scenario: &Scenario, counter: Option<u64>) -> Option<u64> {
    use crate::scenario::Begin;
    use doze_engine::SnapshotKind;
    let disk = match scenario.fork() {
        Some(Op::ForkStored(_)) => scenario.kept == Some(SnapshotKind::Stopped),
        _ => scenario.from == Begin::Stopped,
    };
    if disk { Some(0) } else { counter }
}

/// The fork can be used and deleted, and every snapshot be made an instance of and deleted.
pub fn usable(lab: &Lab, scenario: &Scenario, stake: &Stake) -> Faults {
    let mut faults = Faults::new();
    let engine = lab.engine();
    if lab.view(FORK).is_some() {
        let made = scenario.fork().and_then(|op| origin(op, stake));
        let counter = made.and_then(|(origin, _)| origin.map(|origin| origin.counter));
        faults.extend(wakes(lab, FORK, scenario, &[counter]));
        if lab.view(FORK).is_some() {
            faults.extend(sleeps_and_wakes(lab, FORK));
            let gone = lab.run(engine.delete(FORK, false));
            faults.extend(
                gone.err()
                    .map(|e| format!("the fork cannot be deleted: {e}")),
            );
        }
    }
    for snapshot in stored(lab) {
        let counter = match snapshot.name.as_deref() {
            Some(KEPT) => stake.kept.as_ref().map(|kept| kept.counter),
            Some(NEW) if scenario.op == Op::Import => stake.kept.as_ref().map(|kept| kept.counter),
            _ => stake.disk.as_ref().map(|disk| disk.counter),
        };
        faults.extend(probe(lab, &snapshot, counter));
        let gone = lab.run(engine.delete_snapshot(&snapshot.id));
        faults.extend(
            gone.err()
                .map(|e| format!("a snapshot cannot be deleted: {e}")),
        );
    }
    faults
}

/// Makes an instance of a snapshot, which has this content.
pub fn probe(lab: &Lab, snapshot: &Snapshot, counter: Option<u64>) -> Faults {
    let (engine, world) = (lab.engine(), lab.world.clone());
    let fault = lab.run(async {
        let memory = snapshot.memory_bytes > 0;
        let target = TargetState::Running;
        if let Err(error) = fork_stored(&engine, &snapshot.id, PROBE, target).await {
            return Some(format!("a snapshot cannot be forked: {error}"));
        }
        let view = settled(&engine, &world, PROBE, PATIENCE / 2).await?;
        let (found, wanted) = match memory {
            true => (world.counter(&view.id), counter),
            false => (world.counter(&view.id), Some(0)),
        };
        let itself = world.is_itself(&view.id);
        let gone = engine.delete(PROBE, false).await;
        if found != wanted || !itself {
            return Some(format!("a snapshot of {wanted:?} wakes with {found:?}"));
        }
        gone.err()
            .map(|e| format!("a snapshot's fork cannot be deleted: {e}"))
    });
    fault.into_iter().collect()
}
