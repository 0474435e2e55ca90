//! A server that goes and comes back while guests sleep, and many guests that wake at once.
use anyhow::{Result, ensure};
use doze_e2e::{Api, Case, World, checks, exec};
use futures::future::join_all;

use super::{asleep, awake, no_complaint, restore, standby, vmms};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![restarts_do_not_wake, many_restores_wait_their_turn]
}

async fn restarts_do_not_wake(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("through").await?;
    exec::sh(api, &id, "echo kept > /dev/shm/kept").await?;
    let slept = standby(world, &id).await?;
    for crash in [false, true] {
        if crash {
            world.server.kill().await?;
        } else {
            world.server.stop().await?;
        }
        asleep(world, &id)?;
        world.server.start().await?;
        asleep(world, &id)?;
        let instance = api.instance(&id).await?;
        for field in [
            "state",
            "has_snapshot",
            "current_phase_since",
            "network",
            "started_at",
        ] {
            ensure!(instance[field] == slept[field], "{field}: {instance}");
        }
    }
    checks::agree(api, &world.server).await?;
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    let pids = vmms(world, &id)?;
    for crash in [false, true] {
        if crash {
            world.server.kill().await?;
        } else {
            world.server.stop().await?;
        }
        world.server.start().await?;
        api.wait(&id, "Running", 30).await?;
        ensure!(vmms(world, &id)? == pids, "the VMM was replaced");
        awake(world, &id)?;
        ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    }
    // A machine that was found again sleeps as well as one that was started.
    standby(world, &id).await?;
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    no_complaint(api, &id).await?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn many_restores_wait_their_turn(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut ids = Vec::new();
    for number in 0..3 {
        let id = world.boot_tiny("many").await?;
        exec::sh(api, &id, &format!("echo {number} > /dev/shm/kept")).await?;
        ids.push(id);
    }
    for outcome in join_all(ids.iter().map(|id| standby(world, id))).await {
        outcome?;
    }
    world.server.stop().await?;
    let limit = [("DOZE_LIMITS__MAX_CONCURRENT_RESTORES", "1")];
    world.server.start_with(&limit).await?;
    let outcome = all_wake(world, api, &ids).await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    for id in &ids {
        api.remove(id).await?;
    }
    Ok(())
}

async fn all_wake(world: &World, api: &Api, ids: &[String]) -> Result<()> {
    for outcome in join_all(ids.iter().map(|id| restore(world, id))).await {
        outcome?;
    }
    for (number, id) in ids.iter().enumerate() {
        ensure!(exec::sh(api, id, "cat /dev/shm/kept").await? == number.to_string());
    }
    checks::agree(api, &world.server).await?;
    Ok(())
}
