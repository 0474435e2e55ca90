//! What a guest notices of its sleep: nothing that it must not, and all that it must.
use std::{os::unix::fs::MetadataExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, checks, exec, phases::now_ms, redis::Redis, traffic::Traffic};
use serde_json::json;

use super::{asleep, awake, clock_is_right, folder, forgetful, no_complaint, restore, standby};
use crate::stateful;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        boots_that_were_cut_in_two,
        clock_and_entropy_after_a_sleep,
        freed_memory_leaves_the_file,
        agentless_guests_sleep,
    ]
}

/// Put to sleep at once after create or start has answered, and a little later.
async fn boots_that_were_cut_in_two(world: &World) -> Result<()> {
    let api = world.api().await?;
    let request = world.tiny("cut");
    let created = api.create(request).await?;
    let id = created["id"].as_str().context("id")?.to_owned();
    ensure!(created["state"] == "Initializing", "{created}");
    for delay in [0, 300, 900] {
        if delay > 0 {
            let path = |verb| format!("/instances/{id}/{verb}");
            api.post_empty(&path("stop")).await?.expect(200)?;
            api.post_empty(&path("start")).await?.expect(200)?;
        }
        // Where in its boot the guest is then is what differs.
        tokio::time::sleep(Duration::from_millis(delay)).await;
        let work = async {
            let slept = standby(world, &id).await?;
            let phases = slept["phase_durations_ms"].as_object().context("phases")?;
            ensure!(
                delay > 0 || !phases.contains_key("running"),
                "it was Running already: {slept}"
            );
            let path = format!("/instances/{id}/restore");
            let woken = api.post_empty(&path).await?.expect(200)?;
            ensure!(
                matches!(woken["state"].as_str(), Some("Initializing" | "Running")),
                "{woken}"
            );
            api.wait(&id, "Running", 90).await?;
            awake(world, &id)?;
            ensure!(exec::sh(api, &id, "echo booted").await? == "booted");
            anyhow::Ok(())
        };
        work.await.with_context(|| format!("after {delay} ms"))?;
    }
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn clock_and_entropy_after_a_sleep(world: &World) -> Result<()> {
    const SLEEP: Duration = Duration::from_secs(3);
    let api = world.api_with_demo().await?;
    let id = world.boot(forgetful(world, "clock")).await?;
    let address = stateful::address(world, &id).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    let mut traffic = Traffic::start(address).await?;
    let mut drawn = Vec::new();
    for _ in 0..2 {
        redis.command(&["SET", "key", "value", "EX", "2"]).await?;
        standby(world, &id).await?;
        tokio::time::sleep(SLEEP).await;
        // Still, after all the time without an answer.
        traffic.goes_on().await?;
        restore(world, &id).await?;
        clock_is_right(&mut redis).await?;
        let before = now_ms();
        let date: i128 = exec::sh(api, &id, "date +%s").await?.parse()?;
        ensure!(
            date * 1000 > before - 2000 && date * 1000 <= now_ms() + 1000,
            "date says {date}, we say {before} ms"
        );
        // What was to expire meanwhile has expired.
        ensure!(redis.command(&["GET", "key"]).await? == "(nil)");
        traffic.catches_up().await?;
        drawn.push(exec::sh(api, &id, "cat /proc/sys/kernel/random/uuid").await?);
    }
    ensure!(drawn[0] != drawn[1], "{drawn:?}");
    traffic.finish().await?;
    no_complaint(api, &id).await?;
    api.remove(&id).await
}

/// Bytes the file really takes.
fn allocated(file: &Path) -> Result<u64> {
    let about = std::fs::metadata(file).with_context(|| format!("{}", file.display()))?;
    // st_blocks counts 512 bytes whatever the file system's block size (stat(2)).
    Ok(about.blocks() * 512)
}

/// Free page reporting punches holes into the memory file, of a guest that booted and of one that woke.
async fn freed_memory_leaves_the_file(world: &World) -> Result<()> {
    const PARTS: u64 = 75;
    const FILL: u64 = PARTS * (4 << 20);
    // Most of it: what the guest's allocator keeps in small pieces is not reported.
    const FREED: u64 = FILL / 10 * 8;
    let api = world.api().await?;
    let mut request = world.tiny("frees");
    request["size"] = json!("512MB");
    let id = world.boot(request).await?;
    let memory = folder(world, &id).join("memory");
    // Random, so that nothing on the way finds it empty or alike; a whole of it would take minutes.
    let prepare = "mkdir -p /tmp/big && mount -t tmpfs -o size=400m none /tmp/big && \
                   head -c 4194304 /dev/urandom > /tmp/big/part";
    exec::sh(api, &id, prepare).await?;
    for sleep in [false, true] {
        let empty = allocated(&memory)?;
        let fill = format!("cat $(yes /tmp/big/part | head -n {PARTS}) > /tmp/big/x");
        exec::sh(api, &id, &fill).await?;
        let full = allocated(&memory)?;
        ensure!(full >= FILL, "{full} bytes hold {FILL}; before: {empty}");
        if sleep {
            standby(world, &id).await?;
            ensure!(allocated(&memory)? >= FILL, "the sleeping memory has holes");
            restore(world, &id).await?;
            let same = "head -c 4194304 /tmp/big/x | cmp - /tmp/big/part && tail -c 4194304 /tmp/big/x | cmp - /tmp/big/part";
            exec::sh(api, &id, same).await?;
        }
        let full = allocated(&memory)?;
        exec::sh(api, &id, "rm /tmp/big/x").await?;
        let shrunk = async {
            loop {
                if allocated(&memory)? + FREED <= full {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let outcome = tokio::time::timeout(Duration::from_secs(60), shrunk).await;
        let now = allocated(&memory)?;
        outcome.with_context(|| {
            format!("restored: {sleep}; {now} of {full} bytes are still there, empty: {empty}")
        })??;
    }
    ensure!(exec::sh(api, &id, "echo fine").await? == "fine");
    api.remove(&id).await
}

async fn agentless_guests_sleep(world: &World) -> Result<()> {
    let api = world.api().await?;
    let ticks = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done";
    let mut request = world.tiny_running("agentless", &["/bin/sh", "-c", ticks]);
    request["skip_guest_agent"] = json!(true);
    let id = world.boot(request).await?;
    let mut log = api.logs(&id, "?follow=true").await?;
    let mut last = 0;
    for _ in 0..2 {
        last = next_tick(&mut log, last).await?;
        standby(world, &id).await?;
        asleep(world, &id)?;
        restore(world, &id).await?;
    }
    // The program counts on, and no line of it was lost or said twice.
    for _ in 0..5 {
        last = next_tick(&mut log, last).await?;
    }
    let ended = api.post_empty(&format!("/instances/{id}/stop")).await?;
    ensure!(ended.expect(200)?["state"] == "Stopped");
    api.remove(&id).await
}

/// The next line of a program that counts, which must be the next number.
async fn next_tick(log: &mut doze_e2e::api::LogStream, last: u64) -> Result<u64> {
    let line = log.until(|line| line.starts_with("tick "), 30).await?;
    let tick: u64 = line.trim_start_matches("tick ").parse()?;
    ensure!(tick == last + 1, "tick {tick} after {last}");
    Ok(tick)
}
