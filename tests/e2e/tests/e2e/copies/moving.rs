//! Snapshots move: one server exports, another one imports and forks.
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Api, Case, Witness, World, checks,
    disk::{Disk, Kind},
    exec,
    server::{Server, ServerOptions},
    world::import_tiny,
};
use futures::{StreamExt as _, stream};
use http::Method;
use serde_json::{Value, json};

use super::{post, prepare, remember, remembered, remove_all, snapshot, text};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_snapshot_moves_to_another_server,
        callers_that_hang_up_leave_nothing,
        exports_and_imports_are_checked
    ]
}

/// Older than whatever saved: neither board loads that.
const OLDER: &str = "7.2.0";
/// Of the other server, whose disk can be filled.
const DISK: u64 = 2 << 30;
/// Less than the server wants to see before it takes in a stream.
const TOO_LITTLE: u64 = 8 << 20;
/// For what a server does when its caller has gone.
const PATIENCE: Duration = Duration::from_secs(30);
const OCTETS: &str = "application/octet-stream";

async fn a_snapshot_moves_to_another_server(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let id = world.boot_tiny("mover").await?;
    let witness = Witness::plant(api, &id).await?;
    remember(api, &id, "moved").await?;
    let request = json!({"kind": "Standby", "name": "moving", "tags": {"team": "a"}});
    let kept = snapshot(world, &id, request).await?;
    // What comes after is not in it.
    remember(api, &id, "stayed").await?;
    let file = world.server.dir.join("moving.doze");
    let (stored, target) = (text(&kept, "id")?, shown(&file));
    let export = ["snapshot", "export", "-o", &target, &stored];
    let exported = doze(&world.server, &export).await?;
    ensure!(exported.contains("moving.doze"), "{exported}");

    let other = elsewhere(world).await?;
    let outcome = async {
        refusals(world, &other, &file).await?;
        arrives(world, &other.server, &file, &kept, &witness).await?;
        a_disk_arrives(world, &other.server, &id).await
    };
    let outcome = outcome.await;
    other.leave(outcome).await?;
    returns(world, &id, &kept, &file, &witness).await?;
    fs::remove_file(&file)?;
    remove_all(world, &[id]).await
}

/// Another server, on a small disk of its own. Its QEMU says that it is the version in a file, while there is one.
struct Elsewhere {
    server: Server,
    disk: Disk,
    qemu: PathBuf,
    version: PathBuf,
}

async fn elsewhere(world: &World) -> Result<Elsewhere> {
    let server = world.another_server(&ServerOptions {
        default_hypervisor: world.hypervisor.clone(),
        ..ServerOptions::default()
    })?;
    let disk = Disk::of_server(&server, Kind::Ext4, DISK)?;
    let (qemu, version) = (server.dir.join("qemu"), server.dir.join("version"));
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
    fs::write(&qemu, script)?;
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755))?;
    server.use_qemu(&qemu)?;
    server.start().await?;
    Ok(Elsewhere {
        server,
        disk,
        qemu,
        version,
    })
}

impl Elsewhere {
    async fn restart(&self, change: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        self.server.stop().await?;
        change(self)?;
        self.server.start().await
    }

    /// Everything is removed, whatever the outcome, which is answered.
    async fn leave(self, outcome: Result<()>) -> Result<()> {
        let outcome = outcome.map_err(|e| anyhow::anyhow!("{e:#}\n{}", self.server.log_tail()));
        let cleared = async {
            let api = self.server.api().await?;
            for instance in api.instances().await? {
                api.remove(instance["id"].as_str().context("id")?).await?;
            }
            checks::agree(&api, &self.server).await.map(drop)
        };
        let cleared = cleared.await;
        self.server.stop().await?;
        outcome?;
        cleared?;
        self.disk.unmount()
    }
}

/// What is wrong with a stream, and what has to be said about it.
type Damage = fn(&mut Vec<u8>);
const DAMAGES: [(Damage, &[&str]); 8] = [
    (|all| all.truncate(all.len() - 40), &["cut off"]),
    (|all| all.truncate(all.len() / 2), &["cut off"]),
    (Vec::clear, &["no snapshot that doze exported"]),
    (
        |all| *all = b"something else".to_vec(),
        &["no snapshot that doze exported"],
    ),
    (|all| flip(all, 50), &["damaged", "byte"]),
    (|all| flip(all, 0), &["damaged", "snapshot.json"]),
    (|all| all.push(b'\n'), &["follows its end"]),
    (|all| all[14] = 2, &["version is 2"]),
];

/// One bit, at so many hundredths of it, or in what is told first.
fn flip(all: &mut [u8], part: usize) {
    let at = match part {
        0 => 200,
        part => all.len() * part / 100,
    };
    all[at] ^= 1;
}

/// Everything that can be wrong is told, and leaves nothing.
async fn refusals(world: &World, other: &Elsewhere, file: &Path) -> Result<()> {
    let server = &other.server;
    refused(server, file, &["image", "tiny", "doze image import"]).await?;
    import_tiny(&world.tools, server).await?;

    let whole = fs::read(file)?;
    let bad = server.dir.join("bad.doze");
    for (damage, words) in DAMAGES {
        let mut damaged = whole.clone();
        damage(&mut damaged);
        fs::write(&bad, &damaged)?;
        refused(server, &bad, words).await?;
    }
    fs::remove_file(&bad)?;

    let filler = other.disk.fill(TOO_LITTLE)?;
    refused(server, file, &["disk", "wanted", "available"]).await?;
    drop(filler);

    let here = world.api().await?.get("/capabilities").await?.expect(200)?;
    let mut runtimes = here["runtimes"].as_array().into_iter().flatten();
    let real = runtimes.find(|runtime| runtime["name"] == world.hypervisor.as_str());
    let real = real.and_then(|runtime| runtime["version"].as_str());
    let real = real.context("version")?;
    other
        .restart(|other| Ok(fs::write(&other.version, OLDER)?))
        .await?;
    refused(server, file, &[OLDER, real]).await?;
    let none = server.dir.join("none");
    other
        .restart(|other| {
            fs::remove_file(&other.version)?;
            other.server.use_qemu(&none)
        })
        .await?;
    refused(server, file, &["cannot run here", &shown(&none)]).await?;
    other
        .restart(|other| other.server.use_qemu(&other.qemu))
        .await
}

async fn refused(server: &Server, file: &Path, words: &[&str]) -> Result<()> {
    let Err(error) = doze(server, &["snapshot", "import", &shown(file)]).await else {
        bail!("{} was taken, {words:?} was expected", file.display());
    };
    let error = format!("{error:#}");
    let missing = words.iter().find(|word| !error.contains(**word));
    ensure!(missing.is_none(), "{missing:?} is not in: {error}");
    ensure!(!error.contains('\n'), "more than a line: {error}");
    left(server, &[])
}

/// Folders of snapshots are these, and there is no copy that nobody wanted.
fn left(server: &Server, snapshots: &[&str]) -> Result<()> {
    for (folder, expected) in [("captures", &[][..]), ("snapshots", snapshots)] {
        let entries = fs::read_dir(server.data_dir.join(folder))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let found: BTreeSet<String> = names.collect::<Result<_>>()?;
        let expected = expected.iter().map(|name| (*name).to_owned()).collect();
        ensure!(found == expected, "{folder}: {found:?}, not {expected:?}");
    }
    Ok(())
}

async fn arrives(
    world: &World,
    other: &Server,
    file: &Path,
    kept: &Value,
    witness: &Witness,
) -> Result<()> {
    let api = other.api().await?;
    let printed = doze(other, &["snapshot", "import", &shown(file)]).await?;
    let id = printed.trim();
    let imported = api.get(&format!("/snapshots/{id}")).await?.expect(200)?;
    same_but_id(&imported, kept)?;
    // The same again needs another name.
    let Err(error) = doze(other, &["snapshot", "import", &shown(file)]).await else {
        bail!("a name was taken twice");
    };
    ensure!(format!("{error:#}").contains("moving"), "{error:#}");
    left(other, &[id])?;
    let again = piped(world, other, &text(kept, "id")?, "again").await?;
    let again = again.trim();
    left(other, &[id, again])?;

    let made = forked(&api, id, "arrived").await?;
    let fork = text(&made, "id")?;
    witness.survived(&api, &fork).await?;
    let moved = ("moved".to_owned(), "moved".to_owned());
    let found = remembered(&api, &fork).await?;
    ensure!(found == moved, "{found:?}");
    let ip = made["network"]["ip"].as_str().context("ip")?;
    let net = other.subnet.rsplit_once('.').map_or("", |(net, _)| net);
    ensure!(ip.starts_with(net), "{ip} is not of {}", other.subnet);
    let addresses = exec::sh(&api, &fork, "ip -4 addr show dev eth0").await?;
    ensure!(addresses.contains(ip), "{ip} is not in {addresses}");
    // It sleeps and wakes like one that was booted here, and from its disk it boots with this server's kernel.
    for step in ["standby", "restore"] {
        let path = format!("/instances/{fork}/{step}");
        api.post_empty(&path).await?.expect(200)?;
    }
    witness.survived(&api, &fork).await?;
    for step in ["stop", "start"] {
        let path = format!("/instances/{fork}/{step}");
        api.post_empty(&path).await?.expect(200)?;
    }
    api.wait(&fork, "Running", 90).await?;
    witness.lost_but_disk_kept(&api, &fork).await?;
    // What was imported does not go with what was made from it, and not the other way round.
    api.remove(&fork).await?;
    removed(&api, id).await?;
    let made = forked(&api, again, "again").await?;
    witness.survived(&api, &text(&made, "id")?).await?;
    api.remove("again").await?;
    left(other, &[again])
}

/// From one server into the other one, without a file in between.
async fn piped(world: &World, to: &Server, snapshot: &str, name: &str) -> Result<String> {
    const SCRIPT: &str = "DOZE_URL=$FROM DOZE_TOKEN=$FROM_TOKEN \"$DOZE\" snapshot export \"$SNAPSHOT\" | \
         DOZE_URL=$TO DOZE_TOKEN=$TO_TOKEN \"$DOZE\" snapshot import --name \"$NAME\" -";
    let (from_token, to_token) = (world.server.token().await?, to.token().await?);
    let output = tokio::process::Command::new("sh")
        .args(["-c", SCRIPT])
        .env("DOZE", &world.tools.doze)
        .env("FROM", world.server.base_url())
        .env("FROM_TOKEN", from_token)
        .env("TO", to.base_url())
        .env("TO_TOKEN", to_token)
        .env("SNAPSHOT", snapshot)
        .env("NAME", name)
        .kill_on_drop(true)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.is_empty(),
        "{}: {said}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn same_but_id(imported: &Value, kept: &Value) -> Result<()> {
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
        let (found, wanted) = (&imported[field], &kept[field]);
        ensure!(found == wanted, "{field}: {found} instead of {wanted}");
    }
    Ok(())
}

async fn forked(api: &Api, snapshot: &str, name: &str) -> Result<Value> {
    let body = json!({"name": name, "target_state": "Running"});
    let path = format!("/snapshots/{snapshot}/fork");
    let made = api.post(&path, body).await?.expect(201)?;
    let id = text(&made, "id")?;
    api.wait(&id, "Running", 90).await?;
    Ok(made)
}

async fn removed(api: &Api, snapshot: &str) -> Result<()> {
    let reply = api.delete(&format!("/snapshots/{snapshot}")).await?;
    ensure!(reply.status == 204, "{}", reply.text);
    Ok(())
}

async fn upload(api: &Api, query: &str, body: impl Into<reqwest::Body>) -> Result<Value> {
    let path = format!("/snapshots/import{query}");
    let reply = api.send_raw(Method::POST, &path, OCTETS, body).await?;
    reply.expect(201)
}

/// The disk of a stopped instance, over HTTP alone.
async fn a_disk_arrives(world: &World, other: &Server, id: &str) -> Result<()> {
    let (here, there) = (world.api().await?, other.api().await?);
    here.post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    let kept = snapshot(world, id, json!({"kind": "Stopped"})).await?;
    let stored = text(&kept, "id")?;
    let export = here.open(&format!("/snapshots/{stored}/export")).await?;
    let stream = export.bytes().await?;
    let imported = upload(&there, "?name=disk", stream).await?;
    ensure!(
        imported["name"] == "disk" && imported["kind"] == "Stopped",
        "{imported}"
    );
    let made = forked(&there, &text(&imported, "id")?, "disk").await?;
    let found = remembered(&there, &text(&made, "id")?).await?;
    ensure!(
        found == ("nothing".to_owned(), "stayed".to_owned()),
        "{found:?}"
    );
    removed(here, &stored).await
}

/// Imported where it came from, its source is brought back to it.
async fn returns(
    world: &World,
    id: &str,
    kept: &Value,
    file: &Path,
    witness: &Witness,
) -> Result<()> {
    let api = world.api().await?;
    let taken = upload(api, "", fs::read(file)?).await;
    let taken = taken.err().context("a name was taken twice")?;
    ensure!(format!("{taken:#}").contains("name_conflict"), "{taken:#}");
    let imported = upload(api, "?name=returned", fs::read(file)?).await?;
    let stored = text(&imported, "id")?;
    let path = format!("/instances/{id}/snapshots/{stored}/restore");
    let back = api.post(&path, json!({})).await?.expect(200)?;
    ensure!(back["state"] == "Running", "{back}");
    witness.survived(api, id).await?;
    let found = remembered(api, id).await?;
    ensure!(
        found == ("moved".to_owned(), "moved".to_owned()),
        "{found:?}"
    );
    removed(api, &stored).await?;
    removed(api, &text(kept, "id")?).await
}

/// Half of a stream, and then nothing any more.
fn stalled(stream: &[u8]) -> reqwest::Body {
    let half = stream[..stream.len() / 2].to_vec();
    let begun = stream::iter([Ok::<_, std::io::Error>(half)]);
    reqwest::Body::wrap_stream(begun.chain(stream::pending()))
}

async fn callers_that_hang_up_leave_nothing(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    // Of the cases before.
    let before = stored(&world.server)?;
    let id = world.boot_tiny("leaver").await?;
    let kept = snapshot(world, &id, json!({"kind": "Standby", "name": "left"})).await?;
    let one = text(&kept, "id")?;
    let path = format!("/snapshots/{one}/export");
    let stream = api.open(&path).await?.bytes().await?;

    // An import whose caller hangs up, and one whose server dies.
    let begun = || upload(api, "?name=never", stalled(&stream));
    tokio::select! {
        answer = begun() => bail!("half a stream was answered: {answer:?}"),
        arriving = until(|| Ok(copies(&world.server)? == 1)) => arriving?,
    }
    until(|| Ok(copies(&world.server)? == 0)).await?;
    tokio::select! {
        answer = begun() => bail!("half a stream was answered: {answer:?}"),
        arriving = until(|| Ok(copies(&world.server)? == 1)) => arriving?,
    }
    world.server.kill().await?;
    world.server.start().await?;
    let with_it: Vec<&str> = before.iter().chain([&one]).map(String::as_str).collect();
    left(&world.server, &with_it)?;

    // An export whose caller hangs up does not keep the snapshot from being deleted.
    let mut export = api.open(&path).await?;
    ensure!(export.chunk().await?.is_some(), "an export without bytes");
    drop(export);
    removed(api, &one).await?;
    let others: Vec<&str> = before.iter().map(String::as_str).collect();
    left(&world.server, &others)?;
    remove_all(world, &[id]).await
}

/// Ids of the snapshots whose folders are there.
fn stored(server: &Server) -> Result<Vec<String>> {
    let entries = fs::read_dir(server.data_dir.join("snapshots"))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

fn copies(server: &Server) -> Result<usize> {
    Ok(fs::read_dir(server.data_dir.join("captures"))?.count())
}

/// Looks again and again; a folder tells nobody.
async fn until(mut reached: impl FnMut() -> Result<bool>) -> Result<()> {
    let looking = async {
        while !reached()? {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, looking).await?
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
