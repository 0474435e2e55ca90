//! Crashes at every step of every operation, with the VMMs left alive and with all of them gone.
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use doze_engine::KillPoint;

use crate::{
    check::{self, End, Faults, Ledgers},
    commands::unscheduled,
    lab::{Lab, PATIENCE, settle},
    pool::{Report, on_all_cores, rounds, seed},
    scenario::{NAME, Op, Scenario, Stake},
    scenarios,
    steps::{Act, Dice, Step},
};

/// Steps of a recovery, about; a crash that is due later does not take place.
const RECOVERY: usize = 20;
/// For a crash to take place.
const ATTEMPTS: usize = 5;
/// And where two commands race, which may go the same way for long.
const RACE_ATTEMPTS: usize = 15;
/// One in so many runs of a scenario with two commands may pass its step by all the same.
const PASSED_BY: usize = 10;

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

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.crash {
            Some(step) => write!(f, "crashed at {step}")?,
            None => write!(f, "crashed when everything was answered")?,
        }
        if self.power {
            write!(f, ", power lost")?;
        }
        match self.again {
            Some(at) => write!(f, ", again at step {at} of the recovery"),
            None => Ok(()),
        }
    }
}

/// What the scenario does when nothing disturbs it.
pub struct DryRun {
    pub steps: Vec<Step>,
    pub points: Vec<KillPoint>,
    pub faults: Faults,
}

pub fn dry_run(scenario: &Scenario) -> DryRun {
    let lab = Lab::new(scenario.packs);
    let mut ledgers = Ledgers::default();
    let stake = scenario.prepare(&lab);
    lab.world.state().steps.arm(scenario.plans());
    let answered = scenario.act(&lab, PATIENCE / 2).is_ok();
    let steps = lab.world.state().steps.disarm();
    let mut faults = check::consistent(&lab, &mut ledgers);
    let end = End {
        power: false,
        marked: marked(&lab),
        committed: committed(&lab),
        answered,
    };
    faults.extend(check::outcome(&lab, scenario, &stake, end));
    faults.extend(check::usable(&lab, &mut ledgers, scenario, &stake));
    DryRun {
        steps,
        points: lab.world.points(),
        faults,
    }
}

pub fn marked(lab: &Lab) -> bool {
    let view = lab.view(NAME);
    view.is_some_and(|view| lab.instance_dir(&view.id).join("snapshot").exists())
}

fn committed(lab: &Lab) -> bool {
    lab.view(NAME).is_some_and(|view| {
        let alive = lab.world.counter(&view.id).is_some();
        alive && lab.instance_dir(&view.id).join("incoming").exists()
    })
}

struct Found {
    faults: Faults,
    points: Vec<KillPoint>,
    /// The planned crash took place.
    crashed: bool,
    crashed_again: bool,
}

/// A step that two things race for (a guest that powers off before its acknowledgement is read) may be
/// passed by: then once more.
fn crash_run(scenario: &Scenario, job: &Job) -> Found {
    let mut found = crash_once(scenario, job);
    let attempts = match scenario.then {
        Some(_) => RACE_ATTEMPTS,
        None => ATTEMPTS,
    };
    for _ in 1..attempts {
        if found.crashed || !found.faults.is_empty() {
            break;
        }
        found = crash_once(scenario, job);
    }
    found
}

fn crash_once(scenario: &Scenario, job: &Job) -> Found {
    let mut lab = Lab::new(scenario.packs);
    let mut ledgers = Ledgers::default();
    let stake = scenario.prepare(&lab);
    if let Some(view) = lab.view(NAME) {
        ledgers.check(&view);
    }
    let first = job.crash.clone().map(|step| (step, Act::Crash));
    let plans = first.into_iter().chain(scenario.plans()).collect();
    lab.world.state().steps.arm(plans);
    let answered = scenario.act(&lab, PATIENCE / 2).is_ok();
    let crashed = lab.world.crashed();
    let end = End {
        power: job.power,
        marked: marked(&lab),
        committed: committed(&lab),
        answered,
    };
    let mut faults = crash(&mut lab, job.power);
    let mut crashed_again = false;
    if let Some(step) = job.again {
        lab.world.state().steps.arm_crash_at(step);
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
    if scenario.op == Op::Schedule {
        lab.run(unscheduled(&engine, &lab.world));
    }
    lab.run(settle(&engine, &lab.world, PATIENCE / 2));
    let mut faults = check::consistent(lab, ledgers);
    faults.extend(check::outcome(lab, scenario, stake, end));
    faults.extend(check::usable(lab, ledgers, scenario, stake));
    faults
}

/// Every step of every scenario, plain ones with both ends; second crashes by sample.
fn jobs(scenarios: &[Scenario], dry: &[DryRun]) -> Vec<Job> {
    let mut dice = Dice(seed());
    let mut jobs = Vec::new();
    for (index, run) in dry.iter().enumerate() {
        for crash in run.steps.iter().cloned().map(Some).chain([None]) {
            // The same steps as without compression are sampled, those about it are not.
            if rounds() == 0
                && scenarios[index].packs
                && !crash.as_ref().is_none_or(about_memory)
                && !dice.one_in(4)
            {
                continue;
            }
            // Without rounds, trouble ends in one of the two ways only.
            let sampled = rounds() == 0 && !scenarios[index].thorough;
            let power = dice.one_in(2);
            for power in [power, !power]
                .into_iter()
                .take(if sampled { 1 } else { 2 })
            {
                let job = |again| Job {
                    scenario: index,
                    crash: crash.clone(),
                    power,
                    again,
                };
                jobs.push(job(None));
                if rounds() == 0 && dice.one_in(4) {
                    jobs.push(job(Some(1 + dice.below(RECOVERY))));
                }
            }
        }
    }
    jobs
}

/// Where memory has two forms, or may have.
fn about_memory(step: &Step) -> bool {
    let points = [
        "compression.",
        "restore.decompressed",
        "restore.artefact_dropped",
        "restore.consumed",
        "rollback.swapped",
    ];
    points.iter().any(|point| step.label.contains(point))
}

/// The job, and with rounds asked for the same with a second crash at every step of its recovery.
fn runs(scenario: &Scenario, job: &Job) -> Vec<(Job, Found)> {
    let mut all = vec![(job.clone(), crash_run(scenario, job))];
    if rounds() == 0 {
        return all;
    }
    for step in 1.. {
        let again = Job {
            again: Some(step),
            ..job.clone()
        };
        let found = crash_run(scenario, &again);
        let over = !found.crashed_again;
        all.push((again, found));
        if over {
            break;
        }
    }
    all
}

#[test]
fn a_crash_at_any_step_loses_nothing() {
    let scenarios = scenarios::all();
    let mut report = Report::default();
    let mut reached: BTreeSet<&str> = BTreeSet::new();
    let mut dry = on_all_cores(&scenarios, dry_run);
    for (scenario, run) in scenarios.iter().zip(&mut dry) {
        let faults = std::mem::take(&mut run.faults);
        report.add(scenario.name, faults, &"undisturbed");
        reached.extend(run.points.iter().map(|point| point.name()));
    }
    let jobs = jobs(&scenarios, &dry);
    let all = on_all_cores(&jobs, |job| runs(&scenarios[job.scenario], job));
    let all: Vec<(Job, Found)> = all.into_iter().flatten().collect();
    // How far the first of two commands comes before the second one is for their race to say: the dry run may have
    // gone further than any attempt.
    let mut passed_by: BTreeMap<usize, Vec<&Job>> = BTreeMap::new();
    for (job, found) in &all {
        let scenario = &scenarios[job.scenario];
        reached.extend(found.points.iter().map(|point| point.name()));
        report.add(scenario.name, found.faults.clone(), job);
        if !found.crashed {
            passed_by.entry(job.scenario).or_default().push(job);
        }
    }
    for (index, missed) in passed_by {
        let scenario = &scenarios[index];
        let runs = all.iter().filter(|(job, _)| job.scenario == index).count();
        let allowed = match scenario.then {
            Some(_) => 1 + runs / PASSED_BY,
            None => 0,
        };
        for job in &missed {
            println!("passed by: {}: {job}", scenario.name);
            if missed.len() > allowed {
                let fault = "the crash did not take place".to_owned();
                report.add(scenario.name, vec![fault], job);
            }
        }
    }
    for (index, (scenario, run)) in scenarios.iter().zip(&dry).enumerate() {
        let runs = all.iter().filter(|(job, _)| job.scenario == index).count();
        let steps = run.steps.len();
        println!("{}: {steps} steps, {runs} runs", scenario.name);
    }
    let twice = all.iter().filter(|(_, found)| found.crashed_again).count();
    println!(
        "{} runs (seed {}), {twice} of them crashed again in their recovery; {} of {} kill points reached",
        all.len(),
        seed(),
        reached.len(),
        KillPoint::ALL.len()
    );
    let points = KillPoint::ALL.iter().map(|point| point.name());
    let missing: Vec<&str> = points.filter(|name| !reached.contains(name)).collect();
    let all = scenarios.len() == scenarios::count();
    assert!(
        missing.is_empty() || !all,
        "no scenario reaches {missing:?}"
    );
    report.conclude();
}
