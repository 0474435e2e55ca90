//! What changes nothing, what is refused and with which advice, and the two ways out of a sleep that
//! give the memory up.
use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Api, Case, Reply, World, checks, exec};
use http::Method;
use serde_json::{Value, json};

use super::{folder, restore, standby};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        standby_no_ops_and_refusals,
        discarding_memory_boots_from_disk,
        deleting_a_sleeper_leaves_nothing,
    ]
}

/// What a command that changes nothing must leave as it was.
async fn stamps(api: &Api, id: &str) -> Result<Value> {
    let instance = api.instance(id).await?;
    let fields = [
        "state",
        "current_phase",
        "current_phase_since",
        "started_at",
        "has_snapshot",
    ];
    let phases = instance["phase_durations_ms"]
        .as_object()
        .context("phases")?;
    let names: Vec<&String> = phases.keys().collect();
    Ok(json!([fields.map(|f| instance[f].clone()), names]))
}

/// The contract's ways to say nothing, and one that says nothing of effect.
async fn every_empty_body(api: &Api, path: &str) -> Result<Vec<Reply>> {
    let raw = |kind, body: &str| api.send_raw(Method::POST, path, kind, body.to_owned());
    Ok(vec![
        api.post_empty(path).await?,
        api.post(path, json!({})).await?,
        raw("application/json", "").await?,
        raw("application/octet-stream", "{}").await?,
    ])
}

async fn standby_no_ops_and_refusals(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = api.create(world.tiny("table")).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    let path = |verb: &str| format!("/instances/{id}/{verb}");
    let early = api.post_empty(&path("restore")).await?.expect(200)?;
    ensure!(
        matches!(early["state"].as_str(), Some("Initializing" | "Running")),
        "{early}"
    );
    api.wait(&id, "Running", 90).await?;
    running(api, &id).await.context("Running")?;
    standby(world, &id).await?;
    sleeping(api, &id).await.context("Standby")?;
    super::asleep(world, &id)?;
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "echo fine").await? == "fine");
    api.post_empty(&path("stop")).await?.expect(200)?;
    stopped(api, &id).await.context("Stopped")?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await?;
    for verb in ["standby", "restore"] {
        api.post_empty(&path(verb))
            .await?
            .refused(404, "not_found", &[&id])?;
    }
    Ok(())
}

async fn running(api: &Api, id: &str) -> Result<()> {
    let path = |verb: &str| format!("/instances/{id}/{verb}");
    let before = stamps(api, id).await?;
    for reply in every_empty_body(api, &path("restore")).await? {
        reply.expect(200)?;
    }
    api.post(&path("start"), json!({"discard_memory": true}))
        .await?
        .refused(409, "invalid_state", &["Running", "discard_memory"])?;
    bad_bodies(api, id).await?;
    let after = stamps(api, id).await?;
    ensure!(before == after, "{before} became {after}");
    Ok(())
}

async fn sleeping(api: &Api, id: &str) -> Result<()> {
    let path = |verb: &str| format!("/instances/{id}/{verb}");
    let before = stamps(api, id).await?;
    for reply in every_empty_body(api, &path("standby")).await? {
        ensure!(reply.expect(200)?["state"] == "Standby");
    }
    for options in [
        json!({"compression": {"enabled": false}}),
        json!({"compression_delay": "30s"}),
    ] {
        let answer = api.post(&path("standby"), options).await?.expect(200)?;
        ensure!(answer["state"] == "Standby", "{answer}");
    }
    bad_bodies(api, id).await?;
    api.post_empty(&path("stop")).await?.refused(
        409,
        "invalid_state",
        &["Standby", "restore it first", "discard_memory"],
    )?;
    for start in every_empty_body(api, &path("start")).await? {
        start.refused(
            409,
            "invalid_state",
            &["Standby", "restore it", "discard_memory"],
        )?;
    }
    for overrides in [json!({"cmd": ["true"]}), json!({"discard_memory": false})] {
        api.post(&path("start"), overrides).await?.refused(
            409,
            "invalid_state",
            &["Standby", "restore it", "discard_memory"],
        )?;
    }
    let request = json!({"command": ["true"], "tty": false, "wait_for_agent": 5});
    let exec::Opened::Refused(reply) = exec::Exec::try_open(api, id, &request).await? else {
        anyhow::bail!("exec into a sleeping instance was upgraded");
    };
    reply.refused(409, "invalid_state", &["Standby", "restore it first"])?;
    let after = stamps(api, id).await?;
    ensure!(before == after, "{before} became {after}");
    Ok(())
}

async fn stopped(api: &Api, id: &str) -> Result<()> {
    let path = |verb: &str| format!("/instances/{id}/{verb}");
    let before = stamps(api, id).await?;
    api.post_empty(&path("standby")).await?.refused(
        409,
        "invalid_state",
        &["Stopped", "start it first"],
    )?;
    api.post_empty(&path("restore")).await?.refused(
        409,
        "invalid_state",
        &["Stopped", "start it instead"],
    )?;
    api.post(&path("start"), json!({"discard_memory": true}))
        .await?
        .refused(409, "invalid_state", &["Stopped", "without discard_memory"])?;
    let after = stamps(api, id).await?;
    ensure!(before == after, "{before} became {after}");
    Ok(())
}

/// Refused whatever the state, and without any effect.
async fn bad_bodies(api: &Api, id: &str) -> Result<()> {
    let (standby, restore) = (
        format!("/instances/{id}/standby"),
        format!("/instances/{id}/restore"),
    );
    let compress = json!({"compression": {"enabled": true, "algorithm": "zstd", "level": 20}});
    api.post(&standby, compress).await?.refused(
        400,
        "invalid_field",
        &["compression.level", "20", "1 to 19"],
    )?;
    api.post(&standby, json!({"compression_delay": "soon"}))
        .await?
        .refused(400, "invalid_field", &["compression_delay", "soon"])?;
    api.post(&standby, json!({"no_such_field": 1}))
        .await?
        .refused(400, "invalid_field", &["no_such_field"])?;
    api.post(&restore, json!({"no_such_field": 1}))
        .await?
        .refused(400, "invalid_field", &["no_such_field"])?;
    let raw =
        |path, body: &str| api.send_raw(Method::POST, path, "application/json", body.to_owned());
    for path in [&standby, &restore] {
        for body in ["{", "[]", "7"] {
            let reply = raw(path, body).await?;
            ensure!(
                reply.status == 400,
                "{body}: {} {}",
                reply.status,
                reply.text
            );
        }
    }
    Ok(())
}

/// The operator's way out: the disk stays, the memory goes, and only when asked for.
async fn discarding_memory_boots_from_disk(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("discard").await?;
    exec::sh(
        api,
        &id,
        "echo disk > /root/kept; sync; echo memory > /dev/shm/lost",
    )
    .await?;
    standby(world, &id).await?;
    let path = format!("/instances/{id}/start");
    let started = api
        .post(&path, json!({"discard_memory": true}))
        .await?
        .expect(200)?;
    ensure!(
        matches!(started["state"].as_str(), Some("Initializing" | "Running"))
            && started["has_snapshot"] == false,
        "{started}"
    );
    api.wait(&id, "Running", 90).await?;
    super::awake(world, &id)?;
    ensure!(exec::sh(api, &id, "cat /root/kept").await? == "disk");
    exec::sh(api, &id, "! test -e /dev/shm/lost").await?;
    // And it sleeps and wakes as ever.
    exec::sh(api, &id, "echo again > /dev/shm/kept").await?;
    standby(world, &id).await?;
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "again");
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn deleting_a_sleeper_leaves_nothing(world: &World) -> Result<()> {
    let api = world.api().await?;
    for query in ["", "?graceful_shutdown=true"] {
        let before = world.footprint()?;
        let id = world.boot_tiny("deleted").await?;
        standby(world, &id).await?;
        let reply = api.delete(&format!("/instances/{id}{query}")).await?;
        ensure!(reply.status == 204, "{} {}", reply.status, reply.text);
        let left = world.footprint()?.new_since(&before);
        ensure!(left.is_empty(), "left behind: {left:?}");
        ensure!(!folder(world, &id).exists());
        api.get(&format!("/instances/{id}"))
            .await?
            .refused(404, "not_found", &[&id])?;
    }
    Ok(())
}
