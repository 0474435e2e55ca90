//! Snapshots outlive what they were taken of, are found again, give their disk back, and come by themselves.
use std::{os::unix::fs::MetadataExt as _, time::Duration};

use anyhow::{Result, ensure};
use doze_e2e::{Case, World};
use serde_json::{Value, json};

use super::{folder, fork, post, prepare, remember, remembered, remove_all, snapshot, text};

/// The name of the instance whose schedule runs while the other cases do.
const REGULAR: &str = "regular";

pub fn begin() -> Vec<Case> {
    doze_e2e::cases![a_schedule_is_set]
}

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_snapshot_outlives_its_source,
        lists_and_filters,
        a_copy_is_sparse_and_a_deleted_one_gives_its_disk_back,
        resources_count_what_is_shared_once,
        a_restart_keeps_all_of_it,
        the_schedule_ran,
    ]
}

async fn a_schedule_is_set(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let mut request = world.tiny(REGULAR);
    request["name"] = json!(REGULAR);
    world.boot(request).await?;
    let path = format!("/instances/{REGULAR}/snapshot-schedule");
    let put =
        |body: Value| async move { api.send(http::Method::PUT, &path_of(), Some(&body)).await };
    api.get(&path)
        .await?
        .refused(404, "not_found", &["schedule"])?;
    for (body, word) in [
        (
            json!({"interval": "59s", "retention": {"max_count": 1}}),
            "interval",
        ),
        (json!({"interval": "1m", "retention": {}}), "retention"),
        (
            json!({"interval": "60", "retention": {"max_count": 1}}),
            "interval",
        ),
        (
            json!({"interval": "1m", "retention": {"max_count": 1}, "name_prefix": "A"}),
            "name_prefix",
        ),
    ] {
        let reply = put(body).await?;
        ensure!(
            reply.status == 400 && reply.text.contains(word),
            "{}",
            reply.text
        );
    }
    let body = json!({
        "interval": "1m", "retention": {"max_count": 1}, "name_prefix": "auto", "metadata": {"by": "schedule"}
    });
    let set = put(body.clone()).await?.expect(200)?;
    ensure!(
        set["interval"] == "1m0s" && set["name_prefix"] == "auto",
        "{set}"
    );
    // The same interval keeps its cadence.
    let again = put(body).await?.expect(200)?;
    ensure!(set["next_run_at"] == again["next_run_at"], "{set}, {again}");
    Ok(())
}

fn path_of() -> String {
    format!("/instances/{REGULAR}/snapshot-schedule")
}

async fn taken(world: &World) -> Result<Vec<Value>> {
    let list = world
        .api()
        .await?
        .get("/snapshots?tags[by]=schedule")
        .await?;
    let list = list.expect(200)?;
    Ok(list.as_array().cloned().unwrap_or_default())
}

/// By now its time has come at least once; a second one replaces the first.
async fn the_schedule_ran(world: &World) -> Result<()> {
    let api = world.api().await?;
    let ran = async {
        loop {
            let all = taken(world).await?;
            ensure!(
                all.len() <= 2,
                "one is kept, and one is being replaced: {all:?}"
            );
            if let Some(last) = all.last() {
                return anyhow::Ok(last.clone());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let last = tokio::time::timeout(Duration::from_secs(120), ran).await??;
    ensure!(text(&last, "name")?.starts_with("auto-2"), "{last}");
    ensure!(
        last["kind"] == "Standby" && last["scheduled"] == true,
        "{last}"
    );
    let schedule = api.get(&path_of()).await?.expect(200)?;
    ensure!(
        schedule["last_error"].is_null() && schedule["last_run_at"].is_string(),
        "{schedule}"
    );
    // Its instance gone, a schedule that only counts has nothing more to do; its snapshots stay.
    let id = text(&api.instance(REGULAR).await?, "id")?;
    let reply = api.delete(&path_of()).await?;
    ensure!(reply.status == 204, "{}", reply.text);
    api.get(&path_of())
        .await?
        .refused(404, "not_found", &["schedule"])?;
    remove_all(world, &[id]).await?;
    for left in taken(world).await? {
        api.delete(&format!("/snapshots/{}", text(&left, "id")?))
            .await?;
    }
    Ok(())
}

async fn a_snapshot_outlives_its_source(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("mortal").await?;
    remember(api, &id, "alive").await?;
    let kept = snapshot(world, &id, json!({"kind": "Standby"})).await?;
    let kept = text(&kept, "id")?;
    api.remove(&id).await?;
    // Its image is still needed.
    let reply = api.delete("/images/tiny").await?;
    reply.refused(409, "in_use", &[])?;
    let body = json!({"name": world.unique("heir")});
    let made = fork(world, &format!("/snapshots/{kept}/fork"), body, "Running").await?;
    let heir = text(&made, "id")?;
    ensure!(remembered(api, &heir).await?.0 == "alive");
    api.delete(&format!("/snapshots/{kept}")).await?;
    remove_all(world, &[heir]).await
}

async fn lists_and_filters(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("many").await?;
    let mut made = Vec::new();
    for name in ["one", "two"] {
        let body = json!({"kind": "Standby", "name": name, "tags": {"n": name}});
        made.push(text(&snapshot(world, &id, body).await?, "id")?);
    }
    let ids = |list: Value| -> Vec<String> {
        let all = list.as_array().cloned().unwrap_or_default();
        all.iter()
            .filter_map(|s| s["id"].as_str().map(str::to_owned))
            .collect()
    };
    let by_source = format!("/snapshots?source_instance_id={id}");
    for (query, expected) in [
        (by_source.clone(), made.clone()),
        (format!("{by_source}&name=two"), made[1..].to_vec()),
        (format!("{by_source}&tags[n]=one"), made[..1].to_vec()),
        (format!("{by_source}&kind=Stopped"), Vec::new()),
    ] {
        let found = ids(api.get(&query).await?.expect(200)?);
        ensure!(found == expected, "{query}: {found:?}");
    }
    let got = api
        .get(&format!("/snapshots/{}", made[0]))
        .await?
        .expect(200)?;
    ensure!(got["name"] == "one", "{got}");
    api.get("/snapshots?kind=Paused")
        .await?
        .refused(400, "invalid_field", &["kind"])?;
    for snapshot in made {
        api.delete(&format!("/snapshots/{snapshot}")).await?;
    }
    remove_all(world, &[id]).await
}

fn free(world: &World) -> Result<u64> {
    let stat = rustix::fs::statvfs(&world.server.data_dir)?;
    Ok(stat.f_bavail * stat.f_frsize)
}

/// Never dense: a copy holds what its source holds. Where blocks are shared it holds next to nothing.
async fn a_copy_is_sparse_and_a_deleted_one_gives_its_disk_back(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("sparse").await?;
    crate::standby::standby(world, &id).await?;
    let held = |dir: std::path::PathBuf| -> Result<u64> {
        Ok(std::fs::metadata(dir.join("memory"))?.blocks() * 512)
    };
    let before = free(world)?;
    let kept = snapshot(world, &id, json!({"kind": "Standby"})).await?;
    let after = free(world)?;
    let kept_id = text(&kept, "id")?;
    let dir = world.server.data_dir.join("snapshots").join(&kept_id);
    let (of_source, of_copy) = (held(folder(world, &id))?, held(dir.clone())?);
    ensure!(
        of_source < 200 << 20,
        "the memory is not sparse: {of_source}"
    );
    ensure!(
        of_copy <= of_source + (1 << 20),
        "{of_copy} bytes, the source has {of_source}"
    );
    let (size, uncompressed) = (&kept["size_bytes"], &kept["uncompressed_size_bytes"]);
    ensure!(size.as_u64() > Some(256 << 20), "{kept}");
    ensure!(uncompressed.as_u64() == Some(256 << 20), "{kept}");
    ensure!(kept["compression_state"] == "none", "{kept}");
    if world.name.ends_with(super::REFLINK) {
        let used = before.saturating_sub(after);
        ensure!(used < 16 << 20, "a shared copy took {used} bytes");
    }
    api.delete(&format!("/snapshots/{kept_id}")).await?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    remove_all(world, &[id]).await
}

async fn resources_count_what_is_shared_once(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("shared").await?;
    crate::standby::standby(world, &id).await?;
    let resources = || async { api.get("/resources").await?.expect(200) };
    let allocated = |told: &Value| told["disk"]["allocated"].as_u64().unwrap_or(0);
    let before = resources().await?;
    ensure!(before["disk"]["capacity"].as_u64() > Some(0), "{before}");
    let kept = snapshot(world, &id, json!({"kind": "Standby"})).await?;
    let after = resources().await?;
    let grown = allocated(&after).saturating_sub(allocated(&before));
    let memory = std::fs::metadata(folder(world, &id).join("memory"))?.blocks() * 512;
    match world.name.ends_with(super::REFLINK) {
        true => ensure!(grown < 16 << 20, "it grew by {grown}: {after}"),
        false => ensure!(
            grown + (1 << 20) > memory,
            "{memory} were copied, it grew by {grown}"
        ),
    }
    api.delete(&format!("/snapshots/{}", text(&kept, "id")?))
        .await?;
    remove_all(world, &[id]).await
}

async fn a_restart_keeps_all_of_it(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("restarted").await?;
    remember(api, &id, "before").await?;
    let kept = snapshot(world, &id, json!({"kind": "Standby", "name": "kept"})).await?;
    let body =
        json!({"name": world.unique("asleep"), "from_running": true, "target_state": "Standby"});
    let asleep = fork(world, &format!("/instances/{id}/fork"), body, "Standby").await?;
    world.server.kill().await?;
    world.server.start().await?;
    let api = world.api().await?;
    let again = api
        .get(&format!("/snapshots/{}", text(&kept, "id")?))
        .await?
        .expect(200)?;
    for field in [
        "id",
        "name",
        "kind",
        "created_at",
        "size_bytes",
        "source_instance_id",
    ] {
        ensure!(again[field] == kept[field], "{field}: {again}");
    }
    // A sleeping fork still has to be told who it is.
    let asleep = text(&asleep, "id")?;
    crate::standby::restore(world, &asleep).await?;
    ensure!(remembered(api, &asleep).await?.0 == "before");
    let back = format!("/instances/{id}/snapshots/kept/restore");
    remember(api, &id, "after").await?;
    post(world, &back, json!({})).await?.expect(200)?;
    ensure!(remembered(api, &id).await?.0 == "before");
    api.delete(&format!("/snapshots/{}", text(&kept, "id")?))
        .await?;
    remove_all(world, &[id, asleep]).await
}
