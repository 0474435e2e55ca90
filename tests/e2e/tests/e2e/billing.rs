//! The ledger against a stopwatch that is not the server's: a counter inside the guest whose lines reach the
//! host's disk. A line proves that the guest ran when it was seen; a gap between lines, that it may
//! not have. So every phase has a least and a most that no ledger can argue with:
//!
//! ```text
//!   create sent ... seen Running ── lines ── last line | standby sent ... answered | restore sent ... seen Running
//!   └───────────────── most that it ran ────────────────────────────────┘
//!                        └─ least ─┘                     └─ least it slept ─┘
//! ```
use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Api, Case, World,
    phases::{durations, now_ms, parse_time},
    procs,
};
use serde_json::Value;
use tokio::task::JoinHandle;

/// The counter's pace is 100 ms. Seconds of the billing example, all runs and the sleep; the campaign has
/// the issue's own.
const EXAMPLE: &str = "4,6,2";
const EXAMPLE_VARIABLE: &str = "DOZE_E2E_BILLING";
/// Milliseconds that whole numbers and two clocks may lose at each end.
const ROUNDING: i128 = 3;
const COUNTER: [&str; 3] = [
    "/bin/sh",
    "-c",
    "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done",
];

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        the_billing_example,
        a_sleep_before_the_boot_was_over,
        a_vmm_that_dies_under_the_server,
        a_vmm_that_dies_while_the_server_is_away,
        a_server_that_is_killed_while_it_runs,
        stop_and_start_are_explained,
    ]
    .into_iter()
    .map(|case| case.deadline(Duration::from_secs(600)))
    .collect()
}

/// A line of the counter; milliseconds of our clock.
#[derive(Debug, Clone, Copy)]
struct Line {
    /// The last look that did not find it.
    missed: i128,
    seen: i128,
}

/// When lines of the counter were seen.
struct Stopwatch {
    seen: Arc<Mutex<Vec<Line>>>,
    reading: JoinHandle<()>,
}

impl Stopwatch {
    fn start(world: &World, id: &str) -> Self {
        let log = world
            .server
            .data_dir
            .join("instances")
            .join(id)
            .join("app.log");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reading = tokio::spawn(watch(log, seen.clone()));
        Self { seen, reading }
    }

    fn all(&self) -> Vec<Line> {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn lines(&self) -> Vec<i128> {
        self.all().into_iter().map(|line| line.seen).collect()
    }

    /// Waits for a line later than `after`.
    async fn ticks_after(&self, after: i128) -> Result<i128> {
        let found = async {
            loop {
                if let Some(at) = self.lines().into_iter().find(|at| *at > after) {
                    return at;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), found)
            .await
            .context("the counter stands still")
    }

    /// The last line seen before `moment`.
    fn last_before(&self, moment: i128) -> Result<i128> {
        self.lines()
            .into_iter()
            .rfind(|at| *at <= moment)
            .context("the counter never counted")
    }

    /// However late the looks come: whatever a look after `from` did not find was written after it.
    fn none_between(&self, from: i128, to: i128) -> Result<()> {
        let between: Vec<_> = self
            .all()
            .into_iter()
            .filter(|line| line.missed > from && line.seen < to)
            .collect();
        ensure!(
            between.is_empty(),
            "the guest counted {} times while it was said to sleep",
            between.len()
        );
        Ok(())
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// Looks often: the moment of looking is the measurement.
async fn watch(log: PathBuf, seen: Arc<Mutex<Vec<Line>>>) {
    let (mut offset, mut missed) = (0, now_ms());
    loop {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let looked = now_ms();
        let Ok(mut file) = fs::File::open(&log) else {
            continue;
        };
        let mut text = Vec::new();
        if file.seek(SeekFrom::Start(offset)).is_err() || file.read_to_end(&mut text).is_err() {
            continue;
        }
        let lines = text.iter().filter(|byte| **byte == b'\n').count();
        offset += text.len() as u64;
        let line = Line {
            missed: std::mem::replace(&mut missed, looked),
            seen: now_ms(),
        };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.extend(std::iter::repeat_n(line, lines));
    }
}

fn within(what: &str, ms: i128, least: i128, most: i128) -> Result<()> {
    println!("    {what}: {ms} ms, proven {least} to {most} ms");
    ensure!(
        ms >= least - ROUNDING && ms <= most + ROUNDING,
        "{what} is {ms} ms, the stopwatch proves {least} to {most} ms"
    );
    Ok(())
}

fn phase(instance: &Value, name: &str) -> Result<i128> {
    Ok(durations(instance)?.get(name).copied().unwrap_or(0))
}

async fn post(api: &Api, id: &str, verb: &str) -> Result<(i128, i128, Value)> {
    let sent = now_ms();
    let answer = api.post_empty(&format!("/instances/{id}/{verb}")).await?;
    let body = answer.expect(200)?;
    Ok((sent, now_ms(), body))
}

/// Boots the counter. When create was sent, and when we saw it Running.
async fn boot(world: &World, stem: &str) -> Result<(String, Stopwatch, i128, i128)> {
    let sent = now_ms();
    let id = world.boot(world.tiny_running(stem, &COUNTER)).await?;
    let running = now_ms();
    let watch = Stopwatch::start(world, &id);
    Ok((id, watch, sent, running))
}

/// 60 s running, 300 s asleep, 30 s running are 90 s and 300 s.
async fn the_billing_example(world: &World) -> Result<()> {
    let text = std::env::var(EXAMPLE_VARIABLE).unwrap_or_else(|_| EXAMPLE.to_owned());
    let seconds: Vec<u64> = text
        .split(',')
        .map(|part| {
            part.parse()
                .with_context(|| format!("{EXAMPLE_VARIABLE}: {part:?}"))
        })
        .collect::<Result<_>>()?;
    let [first, asleep, second] = seconds[..] else {
        anyhow::bail!("{EXAMPLE_VARIABLE} is {text:?}; wanted: three numbers of seconds");
    };
    let api = world.api().await?;
    let (id, watch, created, running) = boot(world, "bill").await?;
    tokio::time::sleep(Duration::from_secs(first)).await;
    let (standby_sent, standby_answered, _) = post(api, &id, "standby").await?;
    let first_least = watch.last_before(standby_sent)? - running;
    tokio::time::sleep(Duration::from_secs(asleep)).await;
    let (restore_sent, restore_answered, body) = post(api, &id, "restore").await?;
    ensure!(body["state"] == "Running", "restored to {}", body["state"]);
    tokio::time::sleep(Duration::from_secs(second)).await;
    watch.ticks_after(restore_answered).await?;
    let (last_sent, last_answered, body) = post(api, &id, "standby").await?;
    // What was written before the pause may reach the file a moment later.
    watch.none_between(standby_answered + 50, restore_sent)?;
    within(
        "running",
        phase(&body, "running")?,
        first_least + watch.last_before(last_sent)? - restore_answered,
        (standby_answered - created) + (last_answered - restore_sent),
    )?;
    let slept = phase(&api.instance(&id).await?, "standby")?;
    within(
        "standby",
        slept,
        restore_sent - standby_answered,
        (restore_answered - standby_sent) + (now_ms() - last_sent),
    )?;
    api.remove(&id).await
}

async fn a_sleep_before_the_boot_was_over(world: &World) -> Result<()> {
    let api = world.api().await?;
    let sent = now_ms();
    let created = api.create(world.tiny_running("early", &COUNTER)).await?;
    let id = created["id"].as_str().context("id")?.to_owned();
    let (_, asleep, body) = post(api, &id, "standby").await?;
    ensure!(
        phase(&body, "running")? == 0,
        "it never ran its program: {body}"
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    let restore_sent = now_ms();
    post(api, &id, "restore").await?;
    api.wait(&id, "Running", 90).await?;
    let running = now_ms();
    let body = api.instance(&id).await?;
    within(
        "standby",
        phase(&body, "standby")?,
        restore_sent - asleep,
        running - sent,
    )?;
    let awake = phase(&body, "initializing")? + phase(&body, "created")? + phase(&body, "paused")?;
    within(
        "before Running, awake",
        awake,
        0,
        (asleep - sent) + (running - restore_sent),
    )?;
    api.remove(&id).await
}

async fn a_vmm_that_dies_under_the_server(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, watch, created, running) = boot(world, "crashes").await?;
    watch.ticks_after(running + 1_000).await?;
    let killing = now_ms();
    kill_vmm(world, &id)?;
    api.wait(&id, "Stopped", 20).await?;
    let stopped = now_ms();
    let body = api.instance(&id).await?;
    within(
        "running",
        phase(&body, "running")?,
        watch.last_before(killing)? - running,
        stopped - created,
    )?;
    ensure!(
        body.get("phase_durations_estimated_ms").is_none(),
        "the server saw it: {body}"
    );
    let last = last_transition(api, &id).await?;
    ensure!(
        last["to"] == "stopped" && last["cause"] == "crash",
        "{last}"
    );
    api.remove(&id).await
}

/// Nobody bills for a guest that was dead, whenever its death is noticed.
async fn a_vmm_that_dies_while_the_server_is_away(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, watch, created, running) = boot(world, "unseen").await?;
    watch.ticks_after(running + 2_000).await?;
    let server_killed = now_ms();
    world.server.kill().await?;
    let proven = watch.ticks_after(server_killed + 500).await?;
    kill_vmm(world, &id)?;
    let dead = now_ms();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let starting = now_ms();
    world.server.start().await?;
    let body = api.instance(&id).await?;
    ensure!(body["state"] == "Stopped", "{}", body["state"]);
    println!(
        "    the guest was last seen {} ms before it was killed",
        dead - proven
    );
    within(
        "running",
        phase(&body, "running")?,
        // The server's heartbeat of a second ago proves that much at least.
        server_killed - 1_500 - running,
        dead - created,
    )?;
    let estimated = body["phase_durations_estimated_ms"]["stopped"]
        .as_i64()
        .with_context(|| format!("nothing is estimated: {body}"))?;
    within(
        "estimated",
        i128::from(estimated),
        starting - dead,
        now_ms() - server_killed + 1_500,
    )?;
    let since = parse_time(body["current_phase_since"].as_str().context("since")?)?;
    ensure!(
        since <= dead + ROUNDING,
        "Stopped since {} ms after it died",
        since - dead
    );
    let last = last_transition(api, &id).await?;
    ensure!(
        last["to"] == "stopped" && last["cause"] == "crash",
        "{last}"
    );
    api.remove(&id).await
}

async fn a_server_that_is_killed_while_it_runs(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, watch, created, running) = boot(world, "goes-on").await?;
    world.server.kill().await?;
    watch.ticks_after(now_ms() + 1_000).await?;
    world.server.start().await?;
    let back = watch.ticks_after(now_ms()).await?;
    let body = api.instance(&id).await?;
    // It ran all the time, and nobody had to guess.
    within(
        "running",
        phase(&body, "running")?,
        back - running,
        now_ms() - created,
    )?;
    ensure!(body.get("phase_durations_estimated_ms").is_none(), "{body}");
    api.remove(&id).await
}

async fn stop_and_start_are_explained(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, watch, created, running) = boot(world, "explained").await?;
    watch.ticks_after(running).await?;
    let (stop_sent, stopped, _) = post(api, &id, "stop").await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (start_sent, _, _) = post(api, &id, "start").await?;
    api.wait(&id, "Running", 90).await?;
    let now = now_ms();
    let body = api.instance(&id).await?;
    within(
        "stopped",
        phase(&body, "stopped")?,
        start_sent - stopped,
        now - stop_sent,
    )?;
    within(
        "running",
        phase(&body, "running")?,
        watch.last_before(stop_sent)? - running,
        (stopped - created) + (now_ms() - start_sent),
    )?;
    let phases = api
        .get(&format!("/instances/{id}/phases"))
        .await?
        .expect(200)?;
    let told: Vec<_> = phases["transitions"]
        .as_array()
        .context("transitions")?
        .iter()
        .map(|t| format!("{}>{} {}", t["from"], t["to"], t["cause"]).replace('"', ""))
        .collect();
    let wanted = [
        "created>initializing user",
        "initializing>running guest",
        "running>shutdown user",
        "shutdown>stopped user",
        "stopped>created user",
        "created>initializing user",
        "initializing>running guest",
    ];
    ensure!(told == wanted, "{told:?}");
    let metrics = api.get("/metrics").await?.text;
    let line = "doze_phase_transitions_total{from=\"running\",to=\"shutdown\",cause=\"user\"} ";
    ensure!(metrics.contains(line), "{line} is not in {metrics}");
    let sum: i128 = durations(&phases)?.values().sum();
    within("all phases", sum, now - created - 1_000, now_ms() - created)?;
    api.remove(&id).await
}

async fn last_transition(api: &Api, id: &str) -> Result<Value> {
    let phases = api
        .get(&format!("/instances/{id}/phases"))
        .await?
        .expect(200)?;
    let all = phases["transitions"].as_array().context("transitions")?;
    all.last().cloned().context("no transition")
}

fn kill_vmm(world: &World, id: &str) -> Result<()> {
    let vmm = procs::vmms(&world.server.data_dir)?
        .into_iter()
        .find(|vmm| vmm.instance == id)
        .context("it has no VMM")?;
    procs::kill(vmm.pid)
}
