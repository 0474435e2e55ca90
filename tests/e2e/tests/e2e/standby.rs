//! Standby and restore, seen from outside: by the guest's neighbours, its clients, its operator.
//!
//! ```text
//!   this file        what every case relies on; 20 cycles under load; states on the wire
//!   refusals         no-ops, 409s, start from the disk, delete while asleep
//!   interrupts       commands that meet a standby or a restore in flight, callers that hang up
//!   sessions         exec across a standby
//!   guest            clock, entropy, memory, boots that were cut in two, guests without agent
//!   host             restarts of the server, many restores at once
//!   cli              the command line
//! ```
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Api, Case, World, checks, exec,
    phases::{self, now_ms},
    procs::{self, Tap},
    redis::Redis,
    traffic::Traffic,
};
use serde_json::{Value, json};

use crate::stateful;

mod cli;
mod guest;
mod host;
mod interrupts;
mod refusals;
mod sessions;
mod snapshot_tool;

const CYCLES: u32 = 20;

pub fn cases() -> Vec<Case> {
    let mut cases = doze_e2e::cases![twenty_cycles_lose_nothing, states_on_the_wire];
    cases.extend(refusals::cases());
    cases.extend(sessions::cases());
    cases.extend(guest::cases());
    cases.extend(interrupts::cases());
    cases.extend(host::cases());
    cases.extend(snapshot_tool::cases());
    // Last: one of them puts everything to sleep.
    cases.extend(cli::cases());
    let patient = |case: Case| case.deadline(Duration::from_secs(300));
    cases.into_iter().map(patient).collect()
}

/// A redis that keeps everything in memory only: what it knows after a sleep, the memory has kept.
pub(crate) fn forgetful(world: &World, stem: &str) -> Value {
    let mut request = stateful::demo(world, stem);
    request["cmd"] = json!([
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--dir",
        "/data",
        "--save",
        "",
        "--appendonly",
        "no"
    ]);
    request
}

/// 200, asleep, and everything outside says so too; the answer.
pub(crate) async fn standby(world: &World, id: &str) -> Result<Value> {
    let answer = world
        .api()
        .await?
        .post_empty(&format!("/instances/{id}/standby"))
        .await?
        .expect(200)?;
    ensure!(
        answer["state"] == "Standby"
            && answer["has_snapshot"] == true
            && answer["current_phase"] == "standby",
        "{answer}"
    );
    asleep(world, id)?;
    Ok(answer)
}

/// 200, and its guest has proved that it lives; the answer.
pub(crate) async fn restore(world: &World, id: &str) -> Result<Value> {
    let answer = world
        .api()
        .await?
        .post_empty(&format!("/instances/{id}/restore"))
        .await?
        .expect(200)?;
    ensure!(
        answer["state"] == "Running"
            && answer["has_snapshot"] == false
            && answer["current_phase"] == "running",
        "{answer}"
    );
    awake(world, id)?;
    Ok(answer)
}

fn folder(world: &World, id: &str) -> PathBuf {
    world.server.data_dir.join("instances").join(id)
}

/// Pids of its VMMs.
pub(crate) fn vmms(world: &World, id: &str) -> Result<Vec<i32>> {
    let all = procs::vmms(&world.server.data_dir)?;
    let own = all.into_iter().filter(|v| v.instance == id);
    Ok(own.map(|v| v.pid).collect())
}

pub(crate) fn tap(world: &World, id: &str) -> Result<Tap> {
    procs::taps(&world.server.bridge)?
        .into_iter()
        .find(|(_, alias)| alias == id)
        .with_context(|| format!("{id} has no TAP"))
}

/// What the host holds of a sleeping instance: memory, snapshot and TAP, and nothing that runs.
fn asleep(world: &World, id: &str) -> Result<()> {
    let folder = folder(world, id);
    let vmms = vmms(world, id)?;
    ensure!(vmms.is_empty(), "{id} sleeps and has VMMs: {vmms:?}");
    tap(world, id)?;
    for (name, wanted) in [
        ("memory", true),
        ("snapshot", true),
        ("snapshot.stage", false),
        ("snapshot.consumed", false),
        ("run", false),
    ] {
        ensure!(
            folder.join(name).exists() == wanted,
            "{id} sleeps; its {name} is {}",
            if wanted { "missing" } else { "still there" }
        );
    }
    let sockets = sockets(&folder)?;
    ensure!(sockets.is_empty(), "{id} sleeps and has {sockets:?}");
    Ok(())
}

/// What the host holds of an instance that runs: one VMM, and no snapshot that could be taken for its
/// memory.
fn awake(world: &World, id: &str) -> Result<()> {
    let folder = folder(world, id);
    let vmms = vmms(world, id)?;
    ensure!(vmms.len() == 1, "{id} runs and has VMMs: {vmms:?}");
    tap(world, id)?;
    for name in ["snapshot", "snapshot.stage", "snapshot.consumed"] {
        ensure!(!folder.join(name).exists(), "{id} runs and has a {name}");
    }
    Ok(())
}

fn sockets(dir: &Path) -> Result<Vec<PathBuf>> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_socket() {
            found.push(entry.path());
        } else if kind.is_dir() {
            found.extend(sockets(&entry.path())?);
        }
    }
    Ok(found)
}

/// No line of its operations log complains about what a restored guest could not do.
async fn no_complaint(api: &Api, id: &str) -> Result<()> {
    let log = api.log_lines(id, "?source=hypeman").await?;
    let complaint = log.iter().find(|line| {
        ["restored, but", "cannot reseed", "failed", "given up"]
            .iter()
            .any(|word| line.contains(word))
    });
    ensure!(complaint.is_none(), "operations log: {complaint:?}");
    Ok(())
}

/// The guest's wall clock against ours, to the microsecond: at most a second apart.
async fn clock_is_right(redis: &mut Redis) -> Result<()> {
    const SCRIPT: &str =
        "local t = redis.call('TIME') return string.format('%.0f', t[1] * 1000000 + t[2])";
    let before = now_ms();
    let guest: i128 = redis.command(&["EVAL", SCRIPT, "0"]).await?.parse()?;
    let guest = guest / 1000;
    ensure!(
        (before - 1000..=now_ms() + 1000).contains(&guest),
        "the guest's clock is {} ms away from ours",
        guest - before
    );
    Ok(())
}

/// Counts in a file, never stops, and writes its pid beside the number.
pub(crate) const COUNTER: &str = "rm -f /dev/shm/counter; (i=0; while :; do i=$((i+1)); echo $$ $i > /dev/shm/next; \
     mv /dev/shm/next /dev/shm/counter; sleep 0.05; done) >/dev/null 2>&1 </dev/null & \
     while ! test -e /dev/shm/counter; do sleep 0.05; done";

pub(crate) async fn counter(api: &Api, id: &str) -> Result<(u32, u64)> {
    let text = exec::sh(api, id, "cat /dev/shm/counter").await?;
    let (pid, count) = text.split_once(' ').context("counter")?;
    Ok((pid.parse()?, count.parse()?))
}

/// Keys, an open connection that is written to throughout, a process that counts, addresses and clock.
async fn twenty_cycles_lose_nothing(world: &World) -> Result<()> {
    let api = world.api_with_demo().await?;
    let id = world.boot(forgetful(world, "cycles")).await?;
    let address = stateful::address(world, &id).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    redis.command(&["SET", "colour", "green"]).await?;
    exec::sh(api, &id, COUNTER).await?;
    let mut traffic = Traffic::start(address).await?;
    traffic.catches_up().await?;
    let (network, tap_before) = (
        api.instance(&id).await?["network"].clone(),
        tap(world, &id)?,
    );
    ensure!(
        network["ip"].is_string() && network["mac"].is_string(),
        "{network}"
    );
    let mut pids = vec![vmms(world, &id)?[0]];
    let (counting, mut counted) = counter(api, &id).await?;
    for cycle in 1..=CYCLES {
        let work = async {
            let answer = standby(world, &id).await?;
            ensure!(answer["network"] == network, "{answer}");
            ensure!(tap(world, &id)? == tap_before);
            // Nobody is there to answer, and the client writes on.
            traffic.goes_on().await?;
            let answer = restore(world, &id).await?;
            ensure!(answer["network"] == network, "{answer}");
            clock_is_right(&mut redis).await?;
            traffic.catches_up().await?;
            // The connection of before the first sleep.
            ensure!(redis.command(&["INCR", "cycles"]).await? == cycle.to_string());
            ensure!(redis.command(&["GET", "colour"]).await? == "green");
            let (pid, count) = counter(api, &id).await?;
            ensure!(
                pid == counting && count >= counted,
                "process {counting} had counted to {counted}; now {pid} is at {count}"
            );
            counted = count;
            let pid = vmms(world, &id)?[0];
            ensure!(!pids.contains(&pid), "the VMM was not replaced");
            pids.push(pid);
            anyhow::Ok(())
        };
        work.await.with_context(|| format!("cycle {cycle}"))?;
    }
    let more =
        format!("while read pid n < /dev/shm/counter; test $n -le {counted}; do sleep 0.05; done");
    exec::sh(api, &id, &more).await.context("it counts on")?;
    let messages = traffic.finish().await?;
    println!(
        "    {}: {messages} messages through {CYCLES} cycles",
        world.name
    );
    no_complaint(api, &id).await?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn states_on_the_wire(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("wire").await?;
    let running = api.instance(&id).await?;
    ensure!(running["has_snapshot"] == false && running["state"] == "Running");
    let wait = |state: &str| {
        let path = format!("/instances/{id}/wait?state={state}&timeout=60s");
        async move { api.get(&path).await?.expect(200) }
    };
    // Somebody waits for it before anybody asks for it.
    let (waited, slept) = tokio::join!(wait("Standby"), standby(world, &id));
    let slept = slept?;
    let reached = |answer: &Value, state: &str| {
        let right = answer["state"] == state && answer["timed_out"] == false;
        ensure!(right, "waiting for {state}: {answer}");
        Ok(())
    };
    reached(&waited?, "Standby")?;
    for field in ["id", "name", "created_at", "started_at", "network", "tags"] {
        ensure!(running[field] == slept[field], "{field}: {slept}");
    }
    ensure!(
        slept["exit_code"].is_null() && slept["stopped_at"].is_null(),
        "{slept}"
    );
    let listed = api.get("/instances?state=Standby").await?.expect(200)?;
    ensure!(
        listed
            .as_array()
            .is_some_and(|l| l.iter().any(|i| i["id"] == id.as_str())),
        "{listed}"
    );
    // It passed through Paused, and only the phase it is in goes on.
    let first = phases::durations(&slept)?;
    ensure!(first.contains_key("paused"), "{first:?}");
    let later = phases::durations(&api.instance(&id).await?)?;
    for phase in ["created", "initializing", "running", "paused"] {
        ensure!(first.get(phase) == later.get(phase), "{first:?}, {later:?}");
    }
    ensure!(later["standby"] >= first["standby"]);
    // Reached already; and no longer reachable without a command: both answer at once.
    reached(&wait("Standby").await?, "Standby")?;
    reached(&wait("Running").await?, "Standby")?;
    // A wait that begins too early says Standby; one that begins while it restores says Running.
    let waiting = async {
        loop {
            let answer = wait("Running").await?;
            if answer["state"] != "Standby" {
                break anyhow::Ok(answer);
            }
        }
    };
    let (waited, woken) = tokio::join!(waiting, restore(world, &id));
    reached(&waited?, "Running")?;
    let woken = woken?;
    for field in ["id", "name", "created_at", "started_at", "network", "tags"] {
        ensure!(running[field] == woken[field], "{field}: {woken}");
    }
    let durations = phases::durations(&woken)?;
    ensure!(durations["standby"] >= later["standby"], "{durations:?}");
    ensure!(durations["running"] >= later["running"], "{durations:?}");
    reached(&wait("Running").await?, "Running")?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}
