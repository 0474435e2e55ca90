//! Every kind of copy, state of its source and target state: what is allowed does what it says, what is not is
//! refused and changes nothing.
use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World};
use serde_json::{Value, json};

use super::{fork, post, prepare, remember, remembered, remove_all, snapshot, text};
use crate::standby::{restore, standby};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        forks_of_a_running_instance,
        forks_of_a_sleeping_instance,
        forks_of_a_stopped_instance,
        a_snapshot_with_memory,
        a_snapshot_of_a_disk,
    ]
}

fn other_board(world: &World) -> &'static str {
    match world.hypervisor.as_str() {
        "qemu" => "qemu-microvm",
        _ => "qemu",
    }
}

fn pair(memory: &str, disk: &str) -> (String, String) {
    (memory.to_owned(), disk.to_owned())
}

async fn stop(world: &World, id: &str) -> Result<()> {
    let reply = post(world, &format!("/instances/{id}/stop"), json!({})).await?;
    ensure!(reply.expect(200)?["state"] == "Stopped");
    Ok(())
}

async fn start(world: &World, id: &str) -> Result<()> {
    let api = world.api().await?;
    post(world, &format!("/instances/{id}/start"), json!({}))
        .await?
        .expect(200)?;
    api.wait(id, "Running", 120).await
}

/// What a fork that rests has, once it runs: memory and disk.
async fn wakes_with(world: &World, made: &Value, expected: (String, String)) -> Result<String> {
    let id = text(made, "id")?;
    match made["state"].as_str() {
        Some("Standby") => drop(restore(world, &id).await?),
        Some("Stopped") => start(world, &id).await?,
        _ => world.api().await?.wait(&id, "Running", 120).await?,
    }
    let found = remembered(world.api().await?, &id).await?;
    ensure!(found == expected, "{id} knows {found:?}, not {expected:?}");
    Ok(id)
}

async fn forks_of_a_running_instance(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("running").await?;
    remember(api, &id, "now").await?;
    let path = format!("/instances/{id}/fork");
    post(world, &path, json!({"name": world.unique("no")}))
        .await?
        .refused(409, "invalid_state", &["from_running", "Running"])?;
    post(world, &path, json!({"name": "No", "from_running": true}))
        .await?
        .refused(400, "invalid_name", &["name", "No"])?;
    let taken = text(&api.instance(&id).await?, "name")?;
    post(world, &path, json!({"name": taken, "from_running": true}))
        .await?
        .refused(409, "name_conflict", &["name", &taken])?;
    let mut all = vec![id.clone()];
    for (target, state, known) in [
        ("Standby", "Standby", pair("now", "now")),
        ("Stopped", "Stopped", pair("nothing", "now")),
    ] {
        let body =
            json!({"name": world.unique("fork"), "from_running": true, "target_state": target});
        let made = fork(world, &path, body, state).await?;
        let woken = wakes_with(world, &made, known).await;
        all.push(woken.with_context(|| format!("target {target}"))?);
    }
    ensure!(remembered(api, &id).await? == pair("now", "now"));
    remove_all(world, &all).await
}

async fn forks_of_a_sleeping_instance(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("sleeping").await?;
    remember(api, &id, "then").await?;
    standby(world, &id).await?;
    let path = format!("/instances/{id}/fork");
    let mut all = vec![id.clone()];
    for (target, state, known) in [
        (None, "Standby", pair("then", "then")),
        (Some("Running"), "Running", pair("then", "then")),
        (Some("Stopped"), "Stopped", pair("nothing", "then")),
    ] {
        let mut body = json!({"name": world.unique("fork")});
        if let Some(target) = target {
            body["target_state"] = json!(target);
        }
        let made = fork(world, &path, body, state).await?;
        let woken = wakes_with(world, &made, known).await;
        all.push(woken.with_context(|| format!("target {target:?}"))?);
    }
    ensure!(api.instance(&id).await?["state"] == "Standby");
    restore(world, &id).await?;
    ensure!(remembered(api, &id).await? == pair("then", "then"));
    remove_all(world, &all).await
}

async fn forks_of_a_stopped_instance(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("stopped").await?;
    remember(api, &id, "kept").await?;
    stop(world, &id).await?;
    let path = format!("/instances/{id}/fork");
    let body = json!({"name": world.unique("no"), "target_state": "Standby"});
    post(world, &path, body).await?.refused(
        400,
        "invalid_field",
        &["target_state", "Standby", "Stopped"],
    )?;
    let mut all = vec![id.clone()];
    for target in ["Stopped", "Running"] {
        let body = json!({"name": world.unique("fork"), "target_state": target});
        let state = match target {
            "Stopped" => "Stopped",
            _ => "Initializing",
        };
        let made = fork(world, &path, body, state).await?;
        all.push(wakes_with(world, &made, pair("nothing", "kept")).await?);
    }
    ensure!(api.instance(&id).await?["state"] == "Stopped");
    remove_all(world, &all).await
}

async fn a_snapshot_with_memory(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("standby-kind").await?;
    remember(api, &id, "first").await?;
    let own = format!("/instances/{id}/snapshots");
    post(world, &own, json!({"kind": "Stopped"}))
        .await?
        .refused(409, "invalid_state", &["Stopped", "Running"])?;
    post(world, &own, json!({"kind": "Paused"}))
        .await?
        .refused(400, "invalid_field", &["kind"])?;
    let named = json!({"kind": "Standby", "name": "first", "tags": {"a": "b"}});
    let first = snapshot(world, &id, named.clone()).await?;
    ensure!(
        first["kind"] == "Standby" && first["name"] == "first" && first["tags"]["a"] == "b",
        "{first}"
    );
    ensure!(
        first["source_instance_id"] == id.as_str()
            && first["source_hypervisor"] == *world.hypervisor,
        "{first}"
    );
    ensure!(api.instance(&id).await?["state"] == "Running");
    post(world, &own, named)
        .await?
        .refused(409, "name_conflict", &["first"])?;
    remember(api, &id, "second").await?;
    standby(world, &id).await?;
    let second = snapshot(world, &id, json!({"kind": "Standby"})).await?;
    let (first, second) = (text(&first, "id")?, text(&second, "id")?);
    let back = |snapshot: &str| format!("/instances/{id}/snapshots/{snapshot}/restore");
    let refused = json!({"target_hypervisor": other_board(world)});
    post(world, &back(&first), refused.clone()).await?.refused(
        400,
        "invalid_field",
        &["target_hypervisor"],
    )?;
    // From Standby, Running and Stopped; to all three.
    for (snapshot, target, state, known) in [
        (&first, None, "Running", pair("first", "first")),
        (
            &second,
            Some("Standby"),
            "Standby",
            pair("second", "second"),
        ),
        (&first, Some("Stopped"), "Stopped", pair("nothing", "first")),
        (
            &second,
            Some("Running"),
            "Running",
            pair("second", "second"),
        ),
    ] {
        let body = target.map_or(json!({}), |target| json!({"target_state": target}));
        let made = post(world, &back(snapshot), body).await?.expect(200)?;
        ensure!(
            made["state"] == state && made["id"] == id.as_str(),
            "{made}"
        );
        wakes_with(world, &made, known).await?;
        remember(api, &id, "lost").await?;
    }
    let path = format!("/snapshots/{first}/fork");
    let mut body = refused;
    body["name"] = json!(world.unique("no"));
    post(world, &path, body)
        .await?
        .refused(400, "invalid_field", &["target_hypervisor"])?;
    let mut all = vec![id];
    for (target, state, known) in [
        (None, "Running", pair("first", "first")),
        (Some("Standby"), "Standby", pair("first", "first")),
        (Some("Stopped"), "Stopped", pair("nothing", "first")),
    ] {
        let mut body = json!({"name": world.unique("fork")});
        if let Some(target) = target {
            body["target_state"] = json!(target);
        }
        let made = fork(world, &path, body, state).await?;
        all.push(wakes_with(world, &made, known).await?);
    }
    // A snapshot belongs to its source.
    let other = format!("/instances/{}/snapshots/{first}/restore", all[1]);
    post(world, &other, json!({}))
        .await?
        .refused(404, "not_found", &["fork"])?;
    for snapshot in [first, second] {
        let reply = api.delete(&format!("/snapshots/{snapshot}")).await?;
        ensure!(reply.status == 204, "{}", reply.text);
        let reply = api.get(&format!("/snapshots/{snapshot}")).await?;
        reply.refused(404, "not_found", &[&snapshot])?;
    }
    remove_all(world, &all).await
}

async fn a_snapshot_of_a_disk(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("stopped-kind").await?;
    remember(api, &id, "disk").await?;
    stop(world, &id).await?;
    let own = format!("/instances/{id}/snapshots");
    post(world, &own, json!({"kind": "Standby"}))
        .await?
        .refused(409, "invalid_state", &["Stopped"])?;
    let kept = snapshot(world, &id, json!({"kind": "Stopped"})).await?;
    let kept = text(&kept, "id")?;
    start(world, &id).await?;
    remember(api, &id, "lost").await?;
    let back = format!("/instances/{id}/snapshots/{kept}/restore");
    post(world, &back, json!({"target_state": "Standby"}))
        .await?
        .refused(400, "invalid_field", &["target_state", "Standby"])?;
    // From Running, in place, at once on the other board.
    let body = json!({"target_state": "Running", "target_hypervisor": other_board(world)});
    let made = post(world, &back, body).await?.expect(200)?;
    ensure!(made["hypervisor"] == other_board(world), "{made}");
    wakes_with(world, &made, pair("nothing", "disk")).await?;
    remember(api, &id, "lost").await?;
    let body = json!({"target_hypervisor": world.hypervisor});
    let made = post(world, &back, body).await?.expect(200)?;
    ensure!(made["state"] == "Stopped", "{made}");
    wakes_with(world, &made, pair("nothing", "disk")).await?;
    let body = json!({
        "name": world.unique("fork"), "target_state": "Running", "target_hypervisor": other_board(world)
    });
    let made = fork(
        world,
        &format!("/snapshots/{kept}/fork"),
        body,
        "Initializing",
    )
    .await?;
    let forked = wakes_with(world, &made, pair("nothing", "disk")).await?;
    let body = json!({"name": world.unique("no"), "target_state": "Standby"});
    post(world, &format!("/snapshots/{kept}/fork"), body)
        .await?
        .refused(400, "invalid_field", &["target_state"])?;
    api.delete(&format!("/snapshots/{kept}")).await?;
    remove_all(world, &[id, forked]).await
}
