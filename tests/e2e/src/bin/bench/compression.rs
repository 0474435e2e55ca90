//! What compressed memory costs whoever wakes: a guest of 2 GiB with 300 MiB of mixed data in use.
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Api, World, exec};
use serde_json::{Value, json};

use crate::{millis, quantile, standby::FILL};

const CYCLES: usize = 8;
const PATIENCE: Duration = Duration::from_secs(180);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Prints one table.
pub async fn restores(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = boot(world, api, "packed").await?;
    println!(
        "\n| qemu-microvm, 2 GiB, {CYCLES} cycles, page cache warm | median / p90 / worst |\n|---|---|"
    );
    let none = json!({"compression": {"enabled": false}});
    row(
        "restore from raw memory",
        &cycles(api, &id, &none, None).await?,
    )?;
    let ways = [
        ("zstd 1", packing("zstd", 1)),
        ("lz4 0", packing("lz4", 0)),
        ("zstd 19", packing("zstd", 19)),
    ];
    for (name, options) in &ways[..2] {
        let (mut woken, mut packed, mut size) = (Vec::new(), Vec::new(), 0);
        for _ in 0..CYCLES {
            let slept = sleep(api, &id, options).await?;
            let kept = until(api, &id, "compressed").await?;
            packed.push(slept.elapsed());
            size = kept["compressed_size_bytes"].as_u64().context("a size")?;
            woken.push(wake(api, &id).await?);
        }
        row(&format!("restore from {name}"), &woken)?;
        let mib = size as f64 / 1048576.0;
        row(
            &format!("asleep to compressed with {name}, in the background ({mib:.1} MiB)"),
            &packed,
        )?;
    }
    let slow = &ways[2].1;
    row(
        "restore that halts its own zstd 19 at work",
        &cycles(api, &id, slow, Some("compressing")).await?,
    )?;
    let other = boot(world, api, "other").await?;
    sleep(api, &other, slow).await?;
    until(api, &other, "compressing").await?;
    row(
        "restore from raw memory while another one's zstd 19 works",
        &cycles(api, &id, &none, None).await?,
    )?;
    let still = state(api, &other).await?;
    ensure!(
        still["state"] == "compressing",
        "the other one was done: {still}"
    );
    api.remove(&other).await?;
    api.remove(&id).await
}

fn packing(algorithm: &str, level: u8) -> Value {
    json!({"compression": {"enabled": true, "algorithm": algorithm, "level": level}})
}

async fn boot(world: &World, api: &Api, name: &str) -> Result<String> {
    let mut request = world.tiny(name);
    request["size"] = json!("2GB");
    let id = world.boot(request).await?;
    exec::sh(api, &id, FILL).await?;
    Ok(id)
}

/// Restores after a sleep with these options, begun once the memory is in `state`.
async fn cycles(
    api: &Api,
    id: &str,
    options: &Value,
    state: Option<&str>,
) -> Result<Vec<Duration>> {
    let mut woken = Vec::new();
    for _ in 0..CYCLES {
        sleep(api, id, options).await?;
        if let Some(state) = state {
            until(api, id, state).await?;
        }
        woken.push(wake(api, id).await?);
    }
    Ok(woken)
}

async fn sleep(api: &Api, id: &str, options: &Value) -> Result<Instant> {
    let path = format!("/instances/{id}/standby");
    api.post(&path, options.clone()).await?.expect(200)?;
    Ok(Instant::now())
}

async fn wake(api: &Api, id: &str) -> Result<Duration> {
    let begun = Instant::now();
    let path = format!("/instances/{id}/restore");
    let answer = api.post_empty(&path).await?.expect(200)?;
    let took = begun.elapsed();
    ensure!(answer["state"] == "Running", "restored to {answer}");
    Ok(took)
}

async fn state(api: &Api, id: &str) -> Result<Value> {
    let instance = api.get(&format!("/instances/{id}")).await?.expect(200)?;
    Ok(instance["standby_compression"].clone())
}

async fn until(api: &Api, id: &str, wanted: &str) -> Result<Value> {
    let begun = Instant::now();
    loop {
        let kept = state(api, id).await?;
        if kept["state"] == wanted {
            return Ok(kept);
        }
        ensure!(begun.elapsed() < PATIENCE, "not {wanted} but {kept}");
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn row(what: &str, all: &[Duration]) -> Result<()> {
    let mut sorted = all.to_vec();
    sorted.sort();
    println!(
        "| {what} | {} / {} / {} |",
        millis(quantile(&sorted, 0.5)?),
        millis(quantile(&sorted, 0.9)?),
        millis(quantile(&sorted, 1.0)?),
    );
    Ok(())
}
