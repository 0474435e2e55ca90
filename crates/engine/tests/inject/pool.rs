//! Many runs at once, and one report of them all.
use std::{
    collections::BTreeMap,
    fmt::Display,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Runs named for one kind of fault in the report.
const NAMED: usize = 6;

/// How thorough to be: 0 samples what 1 and more do completely.
pub fn rounds() -> usize {
    number("DOZE_CAMPAIGN_ROUNDS").map_or(0, |rounds| usize::try_from(rounds).unwrap())
}

/// Printed, so that a run can be repeated.
pub fn seed() -> u64 {
    number("DOZE_CAMPAIGN_SEED").unwrap_or(1)
}

/// Whether a scenario of this name is wanted: all of them, unless `DOZE_CAMPAIGN_ONLY` holds a part of the name.
pub fn wanted(name: &str) -> bool {
    std::env::var("DOZE_CAMPAIGN_ONLY").map_or(true, |part| name.contains(&part))
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{variable} is {text:?}, it must be a number")))
}

/// Does `work` for every job; the results in the jobs' order.
pub fn on_all_cores<J: Sync, R: Send>(jobs: &[J], work: impl Fn(&J) -> R + Sync) -> Vec<R> {
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
                    let result = work(job);
                    done.lock().unwrap().push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

/// What was wrong, by kind, with the runs that showed it.
#[derive(Default)]
pub struct Report(BTreeMap<String, Vec<String>>);

impl Report {
    pub fn add(&mut self, scenario: &str, faults: Vec<String>, run: &impl Display) {
        for fault in faults {
            let runs = self.0.entry(format!("{scenario}: {fault}")).or_default();
            runs.push(run.to_string());
        }
    }

    /// Fails the test when there is anything in it.
    pub fn conclude(self) {
        for (fault, runs) in &self.0 {
            let named = runs[..runs.len().min(NAMED)].join("; ");
            println!("FAULT {fault}\n    in {} runs: {named}", runs.len());
        }
        assert!(self.0.is_empty(), "{} kinds of faults", self.0.len());
    }
}
