//! Many callers, random commands, random failures, callers that hang up, servers that crash.
use std::{fmt, time::Duration};

use doze_engine::{
    Engine, EngineError, Revival, SnapshotFilter, StandbyOptions, StartOverrides, TargetState,
};
use doze_lifecycle::State;

use crate::{
    check::{Faults, Ledgers, consistent},
    commands::{back_again, fork, fork_stored, take},
    copies,
    lab::{Lab, PATIENCE, settled},
    pool::{Report, on_all_cores, rounds, seed},
    steps::Dice,
};

/// Kinds of commands below this number; see [`command`].
const KINDS: usize = 15;
const DISCARD: usize = 5;
const DELETE: usize = 7;
const ROLLBACK: usize = 12;
/// The last one is there only when it was made by a fork or a create.
const NAMES: [&str; 3] = ["one", "two", "three"];
const TARGETS: [TargetState; 3] = [
    TargetState::Running,
    TargetState::Standby,
    TargetState::Stopped,
];
const CALLERS: usize = 3;
const COMMANDS: usize = 5;
/// Servers that live one after the other, each with its callers.
const LIVES: usize = 2;
/// One call of this many fails.
const ODDS: usize = 10;
/// Cases by default, and those of one round.
const CASES: usize = 300;
const REST: Duration = Duration::from_millis(300);

struct Case(u64);

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}", self.0)
    }
}

/// What a caller met.
#[derive(Default)]
struct Met {
    faults: Faults,
    /// It hung up on a command that gives memory up, which may still be carried out.
    doomed: Vec<&'static str>,
}

/// One caller: commands one after the other. What was not answered is a fault.
async fn caller(engine: Engine, mut dice: Dice) -> Met {
    let Met {
        mut faults,
        mut doomed,
    } = Met::default();
    for _ in 0..COMMANDS {
        let name = NAMES[dice.below(NAMES.len())];
        let kind = dice.below(KINDS);
        let choice = dice.next();
        let call = tokio::spawn(command(engine.clone(), name, kind, Dice(choice)));
        if dice.one_in(4) {
            // It hangs up, sooner or later.
            for _ in 0..dice.below(40) {
                tokio::task::yield_now().await;
            }
            call.abort();
            if [DISCARD, DELETE, ROLLBACK].contains(&kind) {
                doomed.push(name);
            }
            continue;
        }
        match tokio::time::timeout(PATIENCE * 3 / 4, call).await {
            Ok(answer) => faults.extend(unexpected(answer.unwrap())),
            Err(_) => faults.push(format!("command {kind} got no answer")),
        }
    }
    Met { faults, doomed }
}

async fn command(
    engine: Engine,
    name: &'static str,
    kind: usize,
    mut dice: Dice,
) -> Result<(), EngineError> {
    let discard = kind == DISCARD;
    let target = TARGETS[dice.below(TARGETS.len())];
    let snapshots = engine.list_snapshots(&SnapshotFilter::default());
    let picked = match snapshots.len() {
        0 => String::new(),
        several => snapshots[dice.below(several)].id.clone(),
    };
    match kind {
        0 | 1 => engine
            .standby(name, StandbyOptions::default())
            .await
            .map(drop),
        2 | 3 => engine.restore(name).await.map(drop),
        4 | DISCARD => {
            let overrides = StartOverrides::default();
            engine.start(name, overrides, discard).await.map(drop)
        }
        6 => engine.stop(name).await.map(drop),
        DELETE => match engine.get(name) {
            // Only what was deleted is made again; a delete comes at the end, too.
            Err(_) => engine.create(Lab::request(name)).await.map(drop),
            Ok(_) => engine.delete(name, false).await,
        },
        8 | 9 => take(&engine, name, None).await,
        10 => fork(&engine, name, NAMES[dice.below(NAMES.len())], target).await,
        11 => fork_stored(&engine, &picked, name, target).await,
        ROLLBACK => {
            let revival = Revival {
                target: Some(target),
                hypervisor: None,
            };
            let done = engine.restore_snapshot(name, &picked, revival).await;
            done.map(drop)
        }
        13 => back_again(&engine, &picked, None).await,
        _ => engine.delete_snapshot(&picked).await,
    }
}

/// A driver that ends without an answer is a defect, whatever was injected.
fn unexpected(answer: Result<(), EngineError>) -> Option<String> {
    let error = answer.err()?;
    let text = error.to_string();
    let defect = text.contains("without an answer") || text.contains("cannot happen");
    defect.then_some(text)
}

/// One life of the server, from its first caller to its end.
fn life(lab: &Lab, dice: &mut Dice) -> Met {
    let engine = lab.engine();
    {
        let mut state = lab.world.state();
        state.steps.random = Some((Dice(dice.next()), ODDS));
        state.steps.arm(Vec::new());
    }
    let callers: Vec<Dice> = (0..CALLERS).map(|_| Dice(dice.next())).collect();
    let met = lab.run(async {
        let callers = callers
            .into_iter()
            .map(|dice| tokio::spawn(caller(engine.clone(), dice)));
        let mut met = Met::default();
        for caller in callers.collect::<Vec<_>>() {
            let one = caller.await.unwrap();
            met.faults.extend(one.faults);
            met.doomed.extend(one.doomed);
        }
        met
    });
    let mut state = lab.world.state();
    state.steps.random = None;
    state.steps.disarm();
    met
}

/// The counter of every instance that rests in Standby.
fn asleep(lab: &Lab) -> Vec<(String, u64)> {
    let views = lab.engine().list();
    let resting = views
        .iter()
        .filter(|view| view.state() == State::Standby && view.record.operation().is_none());
    resting
        .filter_map(|view| {
            let state = lab.instance_dir(&view.id).join("snapshot/state");
            let saved = crate::content::saved(&state).ok()?;
            Some((view.name.clone(), saved.content.counter))
        })
        .collect()
}

/// Without further failures everything can be used, and what slept wakes with its memory.
fn recovered(lab: &Lab, ledgers: &mut Ledgers, asleep: &[(String, u64)]) -> Faults {
    let mut faults = Faults::new();
    let engine = lab.engine();
    for (name, counter) in asleep {
        match lab.run(engine.restore(name)) {
            Ok(view) if lab.world.counter(&view.id) == Some(*counter) => {}
            Ok(view) => faults.push(format!(
                "fell asleep with {counter}, woke with {:?}",
                lab.world.counter(&view.id)
            )),
            Err(error) => faults.push(format!("a committed snapshot is lost: {error}")),
        }
    }
    for name in NAMES {
        if engine.get(name).is_err() {
            continue;
        }
        let overrides = StartOverrides::default();
        // Whatever was left unfinished is finished first; refused for one that sleeps or is being deleted.
        let _ = lab.run(engine.start(name, overrides, false));
        lab.run(settled(&engine, &lab.world, name, PATIENCE / 4));
        if let Some(view) = lab.view(name)
            && view.state() == State::Running
        {
            lab.world.tick(&view.id);
        }
    }
    faults.extend(consistent(lab, ledgers));
    faults
}

fn run(case: &Case) -> Faults {
    let mut dice = Dice(case.0);
    // Half of them compress whatever sleeps.
    let mut lab = Lab::new(case.0 % 2 == 1);
    let mut ledgers = Ledgers::default();
    let engine = lab.engine();
    for name in &NAMES[..2] {
        lab.run(engine.create(Lab::request(name))).unwrap();
    }
    drop(engine);
    let mut faults = Faults::new();
    for _ in 0..LIVES {
        let met = life(&lab, &mut dice);
        faults.extend(met.faults);
        let engine = lab.engine();
        for name in NAMES {
            lab.run(settled(&engine, &lab.world, name, REST));
        }
        drop(engine);
        let mut sleeping = asleep(&lab);
        sleeping.retain(|(name, _)| !met.doomed.contains(&name.as_str()));
        lab.crash();
        if dice.one_in(2) {
            lab.world.power_loss();
        }
        lab.open();
        faults.extend(recovered(&lab, &mut ledgers, &sleeping));
    }
    let engine = lab.engine();
    for name in NAMES {
        if engine.get(name).is_ok()
            && let Err(error) = lab.run(engine.delete(name, true))
        {
            faults.push(format!("it cannot be deleted: {error}"));
        }
    }
    for snapshot in engine.list_snapshots(&SnapshotFilter::default()) {
        let state = lab.snapshot_dir(&snapshot.id).join("snapshot/state");
        let counter = crate::content::saved(&state).ok();
        let counter = counter.map(|saved| saved.content.counter);
        faults.extend(copies::whole(&lab, &snapshot));
        faults.extend(copies::probe(&lab, &snapshot, counter));
        if let Err(error) = lab.run(engine.delete_snapshot(&snapshot.id)) {
            faults.push(format!("a snapshot cannot be deleted: {error}"));
        }
    }
    faults.extend(consistent(&lab, &mut ledgers));
    faults
}

#[test]
fn random_commands_of_many_callers_leave_nothing_behind() {
    let cases: Vec<Case> = (0..CASES * rounds().max(1))
        .map(|case| Case(seed().wrapping_mul(1_000_000).wrapping_add(case as u64)))
        .collect();
    let found = on_all_cores(&cases, run);
    let mut report = Report::default();
    for (case, faults) in cases.iter().zip(found) {
        report.add("random", faults, case);
    }
    println!(
        "{} cases of {} commands each (DOZE_CAMPAIGN_SEED {})",
        cases.len(),
        LIVES * CALLERS * COMMANDS,
        seed()
    );
    report.conclude();
}
