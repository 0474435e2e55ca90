//! What forks and snapshots take, where files share blocks and where they do not.
use std::{
    fs,
    io::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    World,
    disk::{Disk, Kind},
    exec,
};
use serde_json::json;

use crate::{millis, quantile, standby::laps};

const ROUNDS: usize = 10;
const AT_ONCE: usize = 10;
const AT_ONCE_ROUNDS: usize = 5;
/// More than ten waking guests use.
const FREE_MIB: usize = 1280;
const DISK: u64 = 12 << 30;
/// 100 MiB that are new since the last snapshot, and dirty.
const DIRTY: &str = "dd if=/dev/urandom of=/dev/shm/noise bs=1M count=100 2>/dev/null";

/// Before the world's first server start.
pub fn share_blocks(world: &World) -> Result<()> {
    Disk::of(world, Kind::Xfs, DISK).map(drop)
}

/// Prints one table.
pub async fn copies(world: &World, place: &str) -> Result<()> {
    for hypervisor in ["qemu-microvm", "qemu"] {
        println!(
            "\n| {hypervisor}, 512 MiB, 100 MiB of noise, {place} | median / p90 / worst | aim where blocks are shared |\n|---|---|---|"
        );
        one(world, hypervisor).await?;
    }
    Ok(())
}

async fn one(world: &World, hypervisor: &str) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("source");
    request["hypervisor"] = json!(hypervisor);
    request["size"] = json!("512MB");
    let id = world.boot(request).await?;
    let (mut pauses, mut calls) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        exec::sh(api, &id, DIRTY).await?;
        let begun = Instant::now();
        let path = format!("/instances/{id}/snapshots");
        let kept = api
            .post(&path, json!({"kind": "Standby"}))
            .await?
            .expect(201)?;
        let took = begun.elapsed();
        let laps = laps(api, &id, "copying it took").await?;
        let at = |what: &str| {
            laps.get(what)
                .copied()
                .with_context(|| format!("no {what}"))
        };
        if round > 0 {
            pauses.push(at("resumed")?.saturating_sub(at("paused")?));
            calls.push(took);
        }
        let kept = kept["id"].as_str().context("id")?;
        api.delete(&format!("/snapshots/{kept}")).await?;
    }
    row(
        "snapshot of a running guest, its pause",
        &mut pauses,
        "100 ms",
    )?;
    row(
        "snapshot of a running guest, call to answer",
        &mut calls,
        "",
    )?;
    api.post_empty(&format!("/instances/{id}/standby"))
        .await?
        .expect(200)?;
    let (mut forks, mut windows) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let (took, window) = fork(world, &id).await?;
        if round > 0 {
            forks.push(took);
            windows.push(window);
        }
    }
    row(
        "fork of a sleeping instance, call to verified answer",
        &mut forks,
        "500 ms",
    )?;
    row(
        "of it, from the resume to the identity's acknowledgement",
        &mut windows,
        "",
    )?;
    let mut together = Vec::new();
    for round in 0..=AT_ONCE_ROUNDS {
        free_memory(world).await?;
        let begun = Instant::now();
        let all =
            futures::future::try_join_all((0..AT_ONCE).map(|_| start_fork(world, &id))).await?;
        if round > 0 {
            together.push(begun.elapsed());
        }
        for made in all {
            api.remove(&made).await?;
        }
    }
    row(
        "ten forks at once, until the last has answered (5 rounds)",
        &mut together,
        "3 s",
    )?;
    api.remove(&id).await
}

/// Sees to it that there is free memory that was in use a moment ago. In a virtual machine with free page reporting the
/// host takes back what is free for two seconds, and whoever takes it next waits for its return (docs/performance.md,
/// "Compressed memory").
async fn free_memory(world: &World) -> Result<()> {
    let path = world.sandbox.home.join("free");
    let written = tokio::task::spawn_blocking(move || {
        let mut file = fs::File::create(&path)?;
        let block = vec![1; 1 << 20];
        for _ in 0..FREE_MIB {
            file.write_all(&block)?;
        }
        fs::remove_file(&path)
    });
    written.await?.context("make memory free")
}

/// The call, and the part of it in which the guest runs and has not said yet that it is somebody else.
async fn fork(world: &World, source: &str) -> Result<(Duration, Duration)> {
    let begun = Instant::now();
    let made = start_fork(world, source).await?;
    let took = begun.elapsed();
    let api = world.api().await?;
    let laps = laps(api, &made, "waking the fork took").await?;
    let at = |what: &str| laps.get(what).with_context(|| format!("no {what}"));
    let window = at("answered")?.saturating_sub(*at("resumed")?);
    api.remove(&made).await?;
    Ok((took, window))
}

async fn start_fork(world: &World, source: &str) -> Result<String> {
    let body = json!({"name": world.unique("fork"), "target_state": "Running"});
    let api = world.api().await?;
    let made = api
        .post(&format!("/instances/{source}/fork"), body)
        .await?
        .expect(201)?;
    ensure!(made["state"] == "Running", "{made}");
    Ok(made["id"].as_str().context("id")?.to_owned())
}

fn row(what: &str, all: &mut [Duration], aim: &str) -> Result<()> {
    all.sort();
    println!(
        "| {what} | {} / {} / {} | {aim} |",
        millis(quantile(all, 0.5)?),
        millis(quantile(all, 0.9)?),
        millis(quantile(all, 1.0)?)
    );
    Ok(())
}
