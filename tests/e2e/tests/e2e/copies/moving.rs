//! Snapshots move: one server exports, another one imports and forks.
use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Case, World, checks, exec,
    server::{Server, ServerOptions},
    world::import_tiny,
};
use serde_json::{Value, json};

use super::{post, prepare, remember, remembered, remove_all, snapshot, text};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_snapshot_moves_to_another_server,
        exports_and_imports_are_checked
    ]
}

/// Older than whatever saved: neither board loads that.
const OLDER: &str = "7.2.0";

async fn a_snapshot_moves_to_another_server(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("mover").await?;
    remember(api, &id, "moved").await?;
    let request = json!({"kind": "Standby", "name": "moving", "tags": {"team": "a"}});
    let kept = snapshot(world, &id, request).await?;
    // What comes after is not in it.
    remember(api, &id, "stayed").await?;
    let file = world.server.dir.join("moving.doze");
    let exported = doze(
        &world.server,
        &[
            "snapshot",
            "export",
            "-o",
            &shown(&file),
            &text(&kept, "id")?,
        ],
    )
    .await?;
    ensure!(exported.contains("moving.doze"), "{exported}");

    let other = world.another_server(&ServerOptions {
        default_hypervisor: world.hypervisor.clone(),
        ..ServerOptions::default()
    })?;
    let version = install_wrapper(world, &other)?;
    other.start().await?;
    let outcome = async {
        refusals(world, &other, &file, &version).await?;
        arrives(&other, &file, &kept).await
    };
    let outcome = outcome
        .await
        .map_err(|e| anyhow::anyhow!("{e:#}\n{}", other.log_tail()));
    let cleared = clear(&other).await;
    other.stop().await?;
    fs::remove_file(&file)?;
    outcome?;
    cleared?;
    ensure!(remembered(api, &id).await?.0 == "stayed");
    api.delete(&format!("/snapshots/{}", text(&kept, "id")?))
        .await?;
    remove_all(world, &[id]).await
}

/// Its QEMU says that it is the version in the file that is returned, while there is one.
fn install_wrapper(world: &World, server: &Server) -> Result<PathBuf> {
    let (path, version) = (server.dir.join("qemu"), server.dir.join("version"));
    let script = format!(
        "#!/bin/sh\n\
         case \"$*\" in\n\
         *--version*) if test -e '{version}'; then\n\
         echo \"QEMU emulator version $(cat '{version}')\"; exit 0; fi;;\n\
         esac\n\
         exec '{qemu}' \"$@\"\n",
        version = version.display(),
        qemu = world.tools.qemu.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    server.use_qemu(&path)?;
    Ok(version)
}

/// Everything that can be wrong is told, and leaves nothing.
async fn refusals(world: &World, other: &Server, file: &Path, version: &Path) -> Result<()> {
    refused(other, file, &["image", "tiny", "doze image import"]).await?;
    import_tiny(&world.tools, other).await?;

    let whole = fs::read(file)?;
    let bad = other.dir.join("bad.doze");
    fs::write(&bad, &whole[..whole.len() - 40])?;
    refused(other, &bad, &["cut off"]).await?;
    let mut flipped = whole;
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(&bad, &flipped)?;
    refused(other, &bad, &["damaged", "byte"]).await?;
    fs::write(&bad, "something else")?;
    refused(other, &bad, &["no snapshot that doze exported"]).await?;
    fs::remove_file(&bad)?;

    other.stop().await?;
    fs::write(version, OLDER)?;
    other.start().await?;
    let outcome = async {
        let here = world.api().await?.get("/capabilities").await?.expect(200)?;
        let mut runtimes = here["runtimes"].as_array().into_iter().flatten();
        let real = runtimes.find(|runtime| runtime["name"] == world.hypervisor.as_str());
        let real = real.and_then(|runtime| runtime["version"].as_str());
        refused(other, file, &[OLDER, real.context("version")?]).await
    };
    let outcome = outcome.await;
    other.stop().await?;
    fs::remove_file(version)?;
    other.start().await?;
    outcome
}

async fn refused(server: &Server, file: &Path, words: &[&str]) -> Result<()> {
    let Err(error) = doze(server, &["snapshot", "import", &shown(file)]).await else {
        anyhow::bail!("{} was taken, {words:?} was expected", file.display());
    };
    let error = format!("{error:#}");
    let missing = words.iter().find(|word| !error.contains(**word));
    ensure!(missing.is_none(), "{missing:?} is not in: {error}");
    left(server, 0)
}

/// Folders of snapshots, and no copy that nobody wanted.
fn left(server: &Server, snapshots: usize) -> Result<()> {
    for (folder, expected) in [("captures", 0), ("snapshots", snapshots)] {
        let found = fs::read_dir(server.data_dir.join(folder))?.count();
        ensure!(found == expected, "{found} in {folder}, not {expected}");
    }
    Ok(())
}

async fn arrives(other: &Server, file: &Path, kept: &Value) -> Result<()> {
    let api = other.api().await?;
    let printed = doze(other, &["snapshot", "import", &shown(file)]).await?;
    let id = printed.trim();
    let imported = api.get(&format!("/snapshots/{id}")).await?.expect(200)?;
    ensure!(imported["id"] != kept["id"], "the id is not its own");
    for field in [
        "name",
        "kind",
        "tags",
        "created_at",
        "source_instance_id",
        "source_instance_name",
        "source_hypervisor",
    ] {
        ensure!(
            imported[field] == kept[field],
            "{field}: {} instead of {}",
            imported[field],
            kept[field]
        );
    }
    // The same again needs another name.
    let Err(error) = doze(other, &["snapshot", "import", &shown(file)]).await else {
        anyhow::bail!("a name was taken twice");
    };
    ensure!(format!("{error:#}").contains("moving"), "{error:#}");
    left(other, 1)?;
    let again = ["snapshot", "import", "--name", "again", &shown(file)];
    doze(other, &again).await?;
    left(other, 2)?;

    let path = format!("/snapshots/{id}/fork");
    let made = api
        .post(&path, json!({"name": "arrived"}))
        .await?
        .expect(201)?;
    ensure!(made["state"] == "Running", "{made}");
    let fork = text(&made, "id")?;
    let found = remembered(&api, &fork).await?;
    ensure!(
        found == ("moved".to_owned(), "moved".to_owned()),
        "{found:?}"
    );
    let ip = made["network"]["ip"].as_str().context("ip")?;
    let net = other.subnet.rsplit_once('.').map_or("", |(net, _)| net);
    ensure!(ip.starts_with(net), "{ip} is not of {}", other.subnet);
    let addresses = exec::sh(&api, &fork, "ip -4 addr show dev eth0").await?;
    ensure!(addresses.contains(ip), "{ip} is not in {addresses}");
    // It sleeps and wakes like one that was booted here, and from its disk it boots with this server's kernel.
    for step in ["standby", "restore", "stop", "start"] {
        let path = format!("/instances/{fork}/{step}");
        api.post_empty(&path).await?.expect(200)?;
    }
    api.wait(&fork, "Running", 90).await?;
    ensure!(remembered(&api, &fork).await? == ("nothing".to_owned(), "moved".to_owned()));
    // What was imported does not go with what was made from it, and not the other way round.
    api.remove(&fork).await?;
    let reply = api.delete(&format!("/snapshots/{id}")).await?;
    ensure!(reply.status == 204, "{}", reply.text);
    left(other, 1)
}

async fn clear(other: &Server) -> Result<()> {
    let api = other.api().await?;
    for instance in api.instances().await? {
        api.remove(instance["id"].as_str().context("id")?).await?;
    }
    checks::agree(&api, other).await?;
    Ok(())
}

/// Of what only the API can be asked.
async fn exports_and_imports_are_checked(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    api.get("/snapshots/nosuch/export")
        .await?
        .refused(404, "not_found", &["nosuch"])?;
    post(world, "/snapshots/import", json!({})).await?.refused(
        400,
        "invalid_request",
        &["no snapshot that doze exported"],
    )?;
    post(world, "/snapshots/import?name=No", json!({}))
        .await?
        .refused(400, "invalid_name", &["name", "No"])?;
    let reply = post(world, "/snapshots/import?tag=a", json!({})).await?;
    ensure!(
        reply.status == 400 && reply.text.contains("tag"),
        "{}",
        reply.text
    );
    Ok(())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// `doze ARGS` against this server.
async fn doze(server: &Server, args: &[&str]) -> Result<String> {
    let token = server.token().await?;
    let env = [
        ("DOZE_URL", server.base_url()),
        ("DOZE_TOKEN", token.as_str()),
    ];
    server.doze_with(&env, args.iter().map(OsStr::new)).await
}
