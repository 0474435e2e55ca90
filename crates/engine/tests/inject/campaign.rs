//! Crashes at every step of every operation, with the VMMs left alive and with all of them gone.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use doze_engine::KillPoint;

use crate::{
    check::{self, End, Faults, Ledgers},
    lab::{Lab, settled},
    scenario::{self, NAME, Scenario, Stake},
    steps::{Act, Dice, Step},
};

/// Points that no scenario here can reach, and why.
const UNREACHABLE: [(&str, &str); 0] = [];

/// Worth a line: something there waited for a deadline of the product.
const SLOW: std::time::Duration = std::time::Duration::from_secs(3);

/// 1 by default; more samples more.
pub fn rounds() -> u64 {
    match std::env::var("DOZE_CAMPAIGN_ROUNDS") {
        Ok(text) => text.parse().expect("DOZE_CAMPAIGN_ROUNDS is a number"),
        Err(_) => 0,
    }
}

/// One run.
#[derive(Debug, Clone)]
struct Job {
    scenario: usize,
    /// `None`: after everything was answered.
    crash: Option<Step>,
    power: bool,
    /// The recovery is crashed, too, at this step of it.
    again: Option<usize>,
}

/// Runs everything in `jobs` on all cores; what is wrong, by job.
fn on_all_cores<J: Sync + std::fmt::Debug, R: Send>(
    jobs: &[J],
    work: impl Fn(&J) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, R)>> = Mutex::default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        // More threads than cores: a run waits for its guest most of the time.
        for _ in 0..cores * 4 {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { return };
                    let begun = std::time::Instant::now();
                    let result = work(job);
                    if begun.elapsed() > SLOW {
                        println!("{:?} took {:?}", job, begun.elapsed());
                    }
                    done.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The steps of a scenario that nothing disturbs, and the kill points it reached.
fn dry_run(scenario: &Scenario) -> (Vec<Step>, Vec<KillPoint>, Faults) {
    let lab = Lab::new();
    let mut ledgers = Ledgers::default();
    let stake = scenario.prepare(&lab);
    lab.world.state().steps.arm(scenario.plans());
    let answered = scenario.act(&lab).is_ok();
    let steps = lab.world.state().steps.disarm();
    let mut faults = check::consistent(&lab, &mut ledgers);
    let end = End {
        power: false,
        marked: marked(&lab),
        answered,
    };
    faults.extend(check::outcome(&lab, scenario, &stake, end));
    faults.extend(check::usable(&lab, &mut ledgers, scenario, &stake));
    (steps, lab.world.points(), faults)
}

fn marked(lab: &Lab) -> bool {
    let view = lab.view(NAME);
    view.is_some_and(|view| lab.instance_dir(&view.id).join("snapshot").exists())
}

/// What one run found, the kill points it reached, and whether its crash took place.
struct Found {
    faults: Faults,
    points: Vec<KillPoint>,
    crashed: bool,
    crashed_again: bool,
}

fn crash_run(scenario: &Scenario, job: &Job) -> Found {
    let mut lab = Lab::new();
    let mut ledgers = Ledgers::default();
    let stake = scenario.prepare(&lab);
    if let Some(view) = lab.view(NAME) {
        ledgers.check(&view);
    }
    let first = job.crash.clone().map(|step| (step, Act::Crash));
    let plans = first.into_iter().chain(scenario.plans()).collect();
    lab.world.state().steps.arm(plans);
    let answered = scenario.act(&lab).is_ok();
    let crashed = lab.world.crashed();
    let end = End {
        power: job.power,
        marked: marked(&lab),
        answered,
    };
    let mut faults = crash(&mut lab, job.power);
    let mut crashed_again = false;
    if let Some(step) = job.again {
        let mut state = lab.world.state();
        state.steps.arm(Vec::new());
        state.steps.crash_at = Some(step);
        drop(state);
        lab.open();
        crashed_again = lab.world.crashed();
        faults.extend(crash(&mut lab, false));
    }
    lab.open();
    faults.extend(after_restart(&lab, &mut ledgers, scenario, &stake, end));
    Found {
        faults,
        points: lab.world.points(),
        crashed: crashed || job.crash.is_none(),
        crashed_again,
    }
}

fn crash(lab: &mut Lab, power: bool) -> Faults {
    lab.crash();
    lab.world.state().habits.deaf = false;
    if power {
        lab.world.power_loss();
    }
    std::mem::take(&mut lab.world.state().violations)
}

fn after_restart(
    lab: &Lab,
    ledgers: &mut Ledgers,
    scenario: &Scenario,
    stake: &Stake,
    end: End,
) -> Faults {
    let engine = lab.engine();
    lab.run(settled(&engine, &lab.world, NAME));
    let mut faults = check::consistent(lab, ledgers);
    faults.extend(check::outcome(lab, scenario, stake, end));
    faults.extend(check::usable(lab, ledgers, scenario, stake));
    faults
}

#[test]
fn a_crash_at_any_step_loses_nothing() {
    let scenarios: Vec<Scenario> = [scenario::plain(), scenario::troubled()].concat();
    let mut reached: BTreeSet<&str> = BTreeSet::new();
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut jobs = Vec::new();
    let seed = std::env::var("DOZE_CAMPAIGN_SEED").map_or(1, |text| text.parse().unwrap());
    let mut dice = Dice(seed);
    let dry = on_all_cores(&scenarios, dry_run);
    let mut sizes = Vec::new();
    for (index, (steps, points, faults)) in dry.into_iter().enumerate() {
        let name = scenarios[index].name;
        reached.extend(points.iter().map(|point| point.name()));
        for fault in faults {
            wrong
                .entry(format!("{name}: {fault}"))
                .or_default()
                .push("undisturbed".to_owned());
        }
        sizes.push((name, steps.len()));
        for step in steps.into_iter().map(Some).chain([None]) {
            for power in [false, true] {
                let job = Job {
                    scenario: index,
                    crash: step.clone(),
                    power,
                    again: None,
                };
                jobs.push(job.clone());
                let depth = 1..=if rounds() > 0 { 20 } else { 0 };
                jobs.extend(depth.map(|again| Job {
                    again: Some(again),
                    ..job.clone()
                }));
                if dice.one_in(4) {
                    let again = Some(1 + dice.below(12));
                    jobs.push(Job { again, ..job });
                }
            }
        }
    }
    let found = on_all_cores(&jobs, |job| crash_run(&scenarios[job.scenario], job));
    let mut missed = Vec::new();
    for (job, found) in jobs.iter().zip(&found) {
        let name = scenarios[job.scenario].name;
        reached.extend(found.points.iter().map(|point| point.name()));
        let end = match &job.crash {
            Some(step) => step.to_string(),
            None => "everything was answered".to_owned(),
        };
        let power = if job.power { ", power lost" } else { "" };
        let again = job
            .again
            .map_or(String::new(), |at| format!(", again at step {at}"));
        if !found.crashed {
            missed.push(format!("{name}: {end}"));
        }
        for fault in &found.faults {
            let at = format!("{end}{power}{again}");
            wrong
                .entry(format!("{name}: {fault}"))
                .or_default()
                .push(at);
        }
    }
    let twice = found.iter().filter(|found| found.crashed_again).count();
    for (name, steps) in &sizes {
        println!("{name}: {steps} steps, VMMs alive and gone");
    }
    println!(
        "{} runs (seed {seed}), {twice} of them crashed again while recovering; {} of {} kill points reached",
        jobs.len(),
        reached.len(),
        KillPoint::ALL.len()
    );
    println!("not reached a second time: {}", missed.len());
    for name in &missed {
        println!("  {name}");
    }
    for (fault, at) in &wrong {
        println!(
            "FAULT {fault}\n    crashed at ({} runs): {}",
            at.len(),
            at[..at.len().min(6)].join("; ")
        );
    }
    let unreached: Vec<&str> = KillPoint::ALL
        .iter()
        .map(|point| point.name())
        .filter(|name| !reached.contains(name))
        .filter(|name| !UNREACHABLE.iter().any(|(known, _)| known == name))
        .collect();
    assert!(unreached.is_empty(), "no scenario reaches {unreached:?}");
    assert!(wrong.is_empty(), "{} kinds of faults", wrong.len());
}
