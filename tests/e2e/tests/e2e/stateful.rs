//! A real server program in the guest: redis, with its data on the overlay disk.
use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, exec, redis::Redis};
use serde_json::{Value, json};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![redis_keeps_its_data]
}

/// A create request for the demo image.
pub fn demo(world: &World, stem: &str) -> Value {
    json!({
        "name": world.unique(stem), "image": "demo", "hypervisor": world.hypervisor,
        "size": "256MB", "overlay_size": "128MB",
        // The image's own command, but every write on the disk before it is acknowledged.
        "cmd": ["--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data", "--save", "",
                "--appendonly", "yes", "--appendfsync", "always"]
    })
}

/// Where an instance's redis listens.
pub async fn address(world: &World, id: &str) -> Result<SocketAddr> {
    let instance = world.api().await?.instance(id).await?;
    let ip = instance["network"]["ip"].as_str().context("ip")?;
    format!("{ip}:6379").parse().context("address")
}

async fn redis_keeps_its_data(world: &World) -> Result<()> {
    let api = world.api_with_demo().await?;
    let id = world.boot(demo(world, "redis")).await?;
    let address = address(world, &id).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    ensure!(redis.command(&["PING"]).await? == "PONG");
    ensure!(redis.command(&["SET", "colour", "green"]).await? == "OK");
    ensure!(redis.command(&["INCR", "starts"]).await? == "1");
    ensure!(redis.command(&["GET", "colour"]).await? == "green");
    ensure!(
        exec::run(api, &id, &["redis-cli", "GET", "colour"])
            .await?
            .ok()?
            .contains("green")
    );
    for starts in 2..=3 {
        let stopped = api
            .post_empty(&format!("/instances/{id}/stop"))
            .await?
            .expect(200)?;
        ensure!(
            stopped["state"] == "Stopped" && stopped["exit_code"] == 0,
            "{stopped}"
        );
        ensure!(
            Redis::connect(address, Duration::from_millis(500))
                .await
                .is_err(),
            "a Stopped instance answers"
        );
        api.post_empty(&format!("/instances/{id}/start"))
            .await?
            .expect(200)?;
        api.wait(&id, "Running", 90).await?;
        // The address belongs to the instance, not to the run.
        let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
        ensure!(
            redis.command(&["GET", "colour"]).await? == "green",
            "the data is gone after a start"
        );
        ensure!(redis.command(&["INCR", "starts"]).await? == starts.to_string());
    }
    api.remove(&id).await
}
