//! Runs groups of cases side by side and prints what `cargo test` users expect.
//!
//! libtest cannot share an async world between cases nor bound heavy groups separately, hence an
//! own runner. It understands a name filter, `--exact` and `--list`, and prints libtest's summary.
use std::{
    any::Any,
    collections::VecDeque,
    fmt::Write as _,
    panic::AssertUnwindSafe,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use futures::{FutureExt as _, future::BoxFuture};

use crate::{World, world::WorldOptions};

/// Groups that run at the same time: emulated guests need a core each.
const WORKERS: usize = 2;
/// And one more of those that mostly wait.
const CALM_WORKERS: usize = 1;

type Body = Box<dyn for<'a> Fn(&'a World) -> BoxFuture<'a, Result<()>> + Send + Sync>;

/// One thing that must hold.
pub struct Case {
    name: String,
    deadline: Duration,
    body: Body,
}

impl Case {
    pub fn new(
        name: impl Into<String>,
        body: impl for<'a> Fn(&'a World) -> BoxFuture<'a, Result<()>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            deadline: Duration::from_secs(180),
            body: Box::new(body),
        }
    }
    /// Replaces the default of 180 s after which the case has failed.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

/// `cases![f, g]`: one [`Case`] per async function, named after it.
#[macro_export]
macro_rules! cases {
    ($($(#[$meta:meta])* $case:ident),* $(,)?) => {
        vec![$($crate::Case::new(stringify!($case), |world| ::std::boxed::Box::pin($case(world)))),*]
    };
}

/// Cases that share one world, in this order.
pub struct Group {
    pub name: String,
    pub options: WorldOptions,
    pub cases: Vec<Case>,
    /// Its cases mostly wait for time to pass: it may run beside the two that keep the cores busy.
    pub calm: bool,
}

impl Group {
    /// Named after both, on a server whose instances run on that hypervisor.
    pub fn on(hypervisor: &str, suffix: &str, cases: Vec<Case>) -> Self {
        Self {
            name: format!("{hypervisor}{suffix}"),
            options: WorldOptions {
                hypervisor: hypervisor.to_owned(),
                ..WorldOptions::default()
            },
            cases,
            calm: false,
        }
    }

    #[must_use]
    pub fn calm(self) -> Self {
        Self { calm: true, ..self }
    }
}

/// The next group for a worker: the calm one takes no others, and the others take calm ones last.
fn next(groups: &Mutex<VecDeque<Group>>, calm: bool) -> Option<Group> {
    let mut groups = groups.lock().unwrap_or_else(PoisonError::into_inner);
    match groups.iter().position(|group| group.calm == calm) {
        Some(at) => groups.remove(at),
        None if calm => None,
        None => groups.pop_front(),
    }
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failures: Vec<(String, String)>,
}

struct Arguments {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
}

impl Arguments {
    fn parse(args: impl Iterator<Item = String>) -> Result<Self> {
        let mut parsed = Self {
            filters: vec![],
            skip: vec![],
            exact: false,
            list: false,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--exact" => parsed.exact = true,
                "--list" => parsed.list = true,
                "--skip" => parsed.skip.extend(args.next()),
                // libtest options that change nothing here.
                "--nocapture" | "--no-capture" | "--quiet" | "-q" | "--show-output" => {}
                option if option.starts_with('-') => {
                    return Err(anyhow!("unknown option {option}"));
                }
                filter => parsed.filters.push(filter.to_owned()),
            }
        }
        Ok(parsed)
    }
    fn wants(&self, name: &str) -> bool {
        let hit = |f: &String| {
            if self.exact {
                name == f
            } else {
                name.contains(f.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(hit)) && !self.skip.iter().any(hit)
    }
}

/// Whether the command line only asks for the names of the cases.
pub fn only_lists() -> bool {
    std::env::args().any(|a| a == "--list")
}

/// Runs what the command line selects. `world` makes a group's world; it is torn down after the
/// group's last case, and a failure of that is a failure of the run.
pub async fn run<F>(mut groups: Vec<Group>, world: F) -> ExitCode
where
    F: Fn(&str, &WorldOptions) -> Result<World> + Send + Sync + 'static,
{
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(e) => {
            eprintln!("e2e: {e}");
            return ExitCode::FAILURE;
        }
    };
    let all: usize = groups.iter().map(|g| g.cases.len()).sum();
    for group in &mut groups {
        let prefix = group.name.clone();
        group
            .cases
            .retain(|c| arguments.wants(&format!("{prefix}::{}", c.name)));
    }
    groups.retain(|g| !g.cases.is_empty());
    let selected: usize = groups.iter().map(|g| g.cases.len()).sum();
    if arguments.list {
        for group in &groups {
            for case in &group.cases {
                println!("{}::{}: test", group.name, case.name);
            }
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {selected} tests");
    let started = Instant::now();
    let queue = Arc::new(Mutex::new(VecDeque::from(groups)));
    let tally = Arc::new(Mutex::new(Tally::default()));
    let world = Arc::new(world);
    let kinds = [(false, WORKERS), (true, CALM_WORKERS)];
    let kinds = kinds
        .into_iter()
        .flat_map(|(calm, workers)| std::iter::repeat_n(calm, workers));
    let workers = kinds.map(|calm| {
        let (queue, tally, world) = (queue.clone(), tally.clone(), world.clone());
        tokio::spawn(async move {
            while let Some(group) = next(&queue, calm) {
                run_group(group, &*world, &tally).await;
            }
        })
    });
    for worker in futures::future::join_all(workers).await {
        if let Err(e) = worker {
            let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
            tally
                .failures
                .push(("harness".into(), format!("a worker ended: {e}")));
        }
    }
    let tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
    summary(&tally, all - selected, started.elapsed())
}

async fn run_group<F>(group: Group, world: &F, tally: &Mutex<Tally>)
where
    F: Fn(&str, &WorldOptions) -> Result<World>,
{
    let note = |name: &str, took: Duration, outcome: Result<(), String>| {
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(()) => {
                println!("test {name} ... ok ({:.1}s)", took.as_secs_f64());
                tally.passed += 1;
            }
            Err(report) => {
                println!("test {name} ... FAILED ({:.1}s)", took.as_secs_f64());
                // At once as well as in the summary: a run that is aborted has said why already.
                println!("{report}");
                tally.failures.push((name.to_owned(), report));
            }
        }
    };
    let world = match world(&group.name, &group.options) {
        Ok(world) => world,
        Err(e) => {
            for case in &group.cases {
                note(
                    &format!("{}::{}", group.name, case.name),
                    Duration::ZERO,
                    Err(format!("no world: {e:#}")),
                );
            }
            return;
        }
    };
    for case in &group.cases {
        let name = format!("{}::{}", group.name, case.name);
        let started = Instant::now();
        let outcome = attempt((case.body)(&world), case.deadline).await;
        let outcome = match outcome {
            Ok(()) => Ok(()),
            Err(e) => Err(format!("{}\n{}", chain(&e), world.diagnose().await)),
        };
        note(&name, started.elapsed(), outcome);
    }
    let started = Instant::now();
    if let Err(e) = attempt(world.tear_down(), Duration::from_secs(120)).await {
        let report = format!("{}\n{}", chain(&e), world.diagnose().await);
        note(
            &format!("{}::(tear-down)", group.name),
            started.elapsed(),
            Err(report),
        );
    }
}

/// An error and its causes, on one line; the first line of a report is what the summary repeats.
fn chain(error: &anyhow::Error) -> String {
    let causes: Vec<String> = error
        .chain()
        .map(|cause| cause.to_string().trim().to_owned())
        .collect();
    causes.join(": ")
}

/// An error, a panic and a hang are all the same thing here: a failure with a reason.
async fn attempt(body: impl Future<Output = Result<()>>, deadline: Duration) -> Result<()> {
    match tokio::time::timeout(deadline, AssertUnwindSafe(body).catch_unwind()).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(anyhow!("panicked: {}", panic_text(&*panic))),
        Err(_) => Err(anyhow!("still not done after {deadline:?}")),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}

fn summary(tally: &Tally, filtered: usize, took: Duration) -> ExitCode {
    let mut text = String::new();
    if !tally.failures.is_empty() {
        text.push_str("\nfailures:\n");
        for (name, report) in &tally.failures {
            let first = report.lines().next().unwrap_or_default();
            let _infallible = writeln!(text, "    {name}: {first}");
        }
    }
    println!(
        "{text}\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {filtered} filtered out; finished in {:.2}s\n",
        if tally.failures.is_empty() {
            "ok"
        } else {
            "FAILED"
        },
        tally.passed,
        tally.failures.len(),
        took.as_secs_f64()
    );
    if tally.failures.is_empty() && tally.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
