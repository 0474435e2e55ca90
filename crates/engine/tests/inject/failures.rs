//! Every call fails once, in each of its ways, and the server lives on; and the store's refusals likewise.
use std::{fmt, time::Duration};

use crate::{
    campaign::{dry_run, marked},
    check::{self, End, Faults, Ledgers},
    commands::{command, unscheduled},
    lab::{Lab, settle, settled},
    pool::{Report, on_all_cores, wanted},
    scenario::{NAME, Op, Scenario},
    scenarios,
    steps::{Act, Step},
};

/// What could not be recorded waits for the next command: there is nothing more to wait for.
const REST: Duration = Duration::from_millis(700);

struct Job {
    scenario: Scenario,
    step: Step,
    act: Act,
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {}", self.act, self.step)
    }
}

fn jobs() -> Vec<Job> {
    let mut scenarios = [scenarios::plain(), scenarios::copies()].concat();
    scenarios.retain(|scenario| wanted(scenario.name));
    let dry = on_all_cores(&scenarios, dry_run);
    let mut jobs = Vec::new();
    for (scenario, run) in scenarios.iter().zip(dry) {
        for step in run.steps {
            // A commit that failed after it was durable looks the same to the server.
            let ways: &[Act] = if step.label.ends_with("store.commit") {
                &[Act::Refuse]
            } else if step.label.starts_with("before ") {
                &[Act::Refuse, Act::RefuseAfter, Act::Die, Act::DieAfter]
            } else {
                &[]
            };
            // The row of an instance nobody was told of is found at the next start.
            let unknown = scenario.op == Op::Create && step == Step::new("after store.commit", 1);
            // A schedule that cannot be recorded is left alone for half a minute.
            let unknown =
                unknown || scenario.op == Op::Schedule && step.label.ends_with("store.commit");
            for act in ways.iter().filter(|_| !unknown) {
                jobs.push(Job {
                    scenario: scenario.clone().failing(&step, *act),
                    step: step.clone(),
                    act: *act,
                });
            }
        }
    }
    jobs
}

fn run(job: &Job) -> Faults {
    let scenario = &job.scenario;
    let lab = Lab::new(scenario.packs);
    let mut ledgers = Ledgers::default();
    let stake = scenario.prepare(&lab);
    let plans = vec![(job.step.clone(), job.act)];
    lab.world.state().steps.arm(plans);
    let mut answered = scenario.act(&lab, REST).is_ok();
    lab.world.state().steps.disarm();
    let mut faults = Faults::new();
    let (engine, world) = (lab.engine(), lab.world.clone());
    let rests = lab.run(settled(&engine, &world, NAME, REST));
    // What the store refused is recorded with the next command.
    let recorded = !job.step.label.ends_with("store.commit");
    if recorded && rests.is_none_or(|view| view.record.operation().is_none()) {
        let end = End {
            power: false,
            marked: marked(&lab),
            committed: false,
            answered,
        };
        faults.extend(check::outcome(&lab, scenario, &stake, end));
    }
    // Once more: it succeeds, unless it has nothing to do any more.
    let again = lab.run(command(engine.clone(), world.clone(), scenario.op));
    if scenario.op == Op::Schedule {
        lab.run(unscheduled(&engine, &world));
    }
    lab.run(settle(&engine, &world, REST));
    faults.extend(check::consistent(&lab, &mut ledgers));
    answered |= again.is_ok();
    let end = End {
        power: false,
        marked: marked(&lab),
        committed: false,
        answered,
    };
    if again.is_ok() {
        faults.extend(check::outcome(&lab, scenario, &stake, end));
    }
    let lost = lab
        .view(NAME)
        .is_some_and(|view| view.record.failure().is_some());
    if !answered && !lost {
        faults.push(format!("it fails again, without a reason: {again:?}"));
    }
    faults.extend(check::usable(&lab, &mut ledgers, scenario, &stake));
    faults
}

#[test]
fn a_failure_at_any_step_is_reported_or_mended() {
    let jobs = jobs();
    let found = on_all_cores(&jobs, run);
    let mut report = Report::default();
    for (job, faults) in jobs.iter().zip(found) {
        report.add(job.scenario.name, faults, job);
    }
    println!("{} failures injected, one per run", jobs.len());
    report.conclude();
}
