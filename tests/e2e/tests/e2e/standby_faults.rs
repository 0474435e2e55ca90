//! What can go wrong with a guest that falls asleep, sleeps or wakes: files altered or missing, another
//! QEMU, a VMM that dies or hangs; `standby_disk` has the disk's share. A committed snapshot is never lost, a broken
//! one never offered, and whatever is refused says why.
use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{Case, Group, Reply, Sample, Witness, World, checks, exec, procs, sample::Random};
use serde_json::Value;

use crate::crash_standby::{
    act, cycle, found, instance_dir, kill_vmms, only_vmm, sleeper, wait_until,
};

pub const BOARDS: [&str; 2] = ["qemu-microvm", "qemu"];
/// The same on both boards.
pub fn groups(sample: &Sample) -> Vec<Group> {
    BOARDS
        .map(|board| group(board, "faults", faults(sample)))
        .into()
}

pub fn group(board: &str, name: &str, cases: Vec<Case>) -> Group {
    Group::on(board, &format!("-{name}"), cases)
}

fn faults(sample: &Sample) -> Vec<Case> {
    let mut cases = doze_e2e::cases![
        altered_files_are_refused,
        another_qemu,
        vmm_dies_during_standby,
        vmm_ends_at_restore,
    ];
    let (random, rounds) = (sample.random("kill"), if sample.campaign { 20 } else { 2 });
    cases.push(
        Case::new("vmm_is_killed_during_restore", move |world: &World| {
            Box::pin(vmm_is_killed_during_restore(world, random.clone(), rounds))
        })
        // Twenty rounds, each with a boot where the memory is lost.
        .deadline(Duration::from_secs(600)),
    );
    if sample.campaign {
        // Waits for deadlines of half a minute.
        cases.push(
            Case::new("vmm_hangs_during_standby", |world| {
                Box::pin(vmm_hangs_during_standby(world))
            })
            .deadline(Duration::from_secs(400)),
        );
    }
    cases
}

/// A restore that must be refused as a conflict and say all of these words, also in the instance's
/// `failure`, and leave the snapshot and its instance as they were.
async fn refused(world: &World, id: &str, words: &[&str]) -> Result<()> {
    conflict(world, id, words).await?;
    let api = world.api().await?;
    checks::agree(api, &world.server).await.map(drop)
}

/// The same where something is missing that has to be there.
async fn conflict(world: &World, id: &str, words: &[&str]) -> Result<()> {
    let api = world.api().await?;
    let before = snapshot_files(world, id)?;
    let reply = api.post_empty(&format!("/instances/{id}/restore")).await?;
    reply.refused(409, "conflict", words)?;
    let instance = api.instance(id).await?;
    ensure!(instance["state"] == "Standby", "{instance}");
    let failure = instance["failure"].as_str().unwrap_or_default();
    for word in words {
        ensure!(
            failure.contains(word),
            "failure does not say {word:?}: {instance}"
        );
    }
    ensure!(
        snapshot_files(world, id)? == before,
        "a refused restore changed the snapshot"
    );
    Ok(())
}

/// Every file of the snapshot's folder with its content.
fn snapshot_files(world: &World, id: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(instance_dir(world, id).join("snapshot"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        files.push((name, fs::read(entry.path())?));
    }
    files.sort();
    Ok(files)
}

async fn altered_files_are_refused(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    act(api, &id, "standby", None).await?;
    let dir = instance_dir(world, &id);

    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 6] = [
        ("snapshot/state", |content| {
            content.truncate(content.len() / 2)
        }),
        ("snapshot/state", |content| flip(content)),
        ("snapshot/state", Vec::clear),
        ("snapshot/manifest.json", |content| flip(content)),
        ("snapshot/manifest.json", |content| {
            content.truncate(content.len() / 2);
        }),
        ("snapshot/manifest.json", Vec::clear),
    ];
    for (name, damage) in damages {
        let path = dir.join(name);
        let good = fs::read(&path)?;
        let mut bad = good.clone();
        damage(&mut bad);
        fs::write(&path, &bad)?;
        refused(world, &id, &[&path.to_string_lossy()])
            .await
            .with_context(|| format!("{name}, {} of {} bytes", bad.len(), good.len()))?;
        fs::write(&path, &good)?;
    }
    for name in ["snapshot/state", "snapshot/manifest.json", "memory"] {
        let (path, away) = (dir.join(name), dir.join("away"));
        fs::rename(&path, &away)?;
        let outcome = conflict(world, &id, &[&path.to_string_lossy()]).await;
        fs::rename(&away, &path)?;
        outcome.with_context(|| format!("{name} is missing"))?;
        checks::agree(api, &world.server).await?;
    }
    // Longer only: what a shorter one loses could not be put back.
    let memory = fs::OpenOptions::new()
        .write(true)
        .open(dir.join("memory"))?;
    let size = memory.metadata()?.len();
    memory.set_len(size + 4096)?;
    let (found, wanted) = ((size + 4096).to_string(), size.to_string());
    let path = dir.join("memory");
    refused(world, &id, &[&path.to_string_lossy(), &found, &wanted]).await?;
    memory.set_len(size)?;

    act(api, &id, "restore", None).await?;
    witness.survived(api, &id).await?;
    let instance = api.instance(&id).await?;
    ensure!(
        instance["failure"].is_null(),
        "a failure that is over: {instance}"
    );
    cycle(world, &id).await
}

fn flip(content: &mut [u8]) {
    let middle = content.len() / 2;
    if let Some(byte) = content.get_mut(middle) {
        *byte ^= 1;
    }
}

/// The real QEMU behind a script that can lie about its version and fail at a restore.
struct Wrapper<'a> {
    world: &'a World,
}

impl<'a> Wrapper<'a> {
    /// Restarts the server with it.
    async fn install(world: &'a World) -> Result<Self> {
        let path = world.server.dir.join("qemu");
        let (dir, qemu) = (world.server.dir.display(), world.tools.qemu.display());
        let script = format!(
            "#!/bin/sh\n\
             case \"$*\" in\n\
             *--version*) if test -e '{dir}/version'; then\n\
             echo \"QEMU emulator version $(cat '{dir}/version')\"; exit 0; fi;;\n\
             *-incoming*) if test -e '{dir}/fail'; then echo 'failing as asked' >&2; exit 3; fi;;\n\
             esac\n\
             exec '{qemu}' \"$@\"\n"
        );
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        world.server.stop().await?;
        world.server.use_qemu(&path)?;
        world.server.start().await?;
        Ok(Self { world })
    }

    /// From here on it says that it is this version; `None`: what it is.
    async fn claim(&self, version: Option<&str>) -> Result<()> {
        let server = &self.world.server;
        server.stop().await?;
        set(&server.dir.join("version"), version)?;
        server.start().await
    }

    fn fail(&self, yes: bool) -> Result<()> {
        set(&self.world.server.dir.join("fail"), yes.then_some(""))
    }

    /// Restarts the server without it.
    async fn remove(self) -> Result<()> {
        let server = &self.world.server;
        self.fail(false)?;
        set(&server.dir.join("version"), None)?;
        server.stop().await?;
        server.use_qemu(&self.world.tools.qemu)?;
        server.start().await
    }
}

fn set(path: &Path, content: Option<&str>) -> Result<()> {
    match content {
        Some(content) => fs::write(path, content)?,
        None if path.exists() => fs::remove_file(path)?,
        None => {}
    }
    Ok(())
}

/// The version in the manifest of a sleeping instance.
fn saved_by(world: &World, id: &str) -> Result<String> {
    let path = instance_dir(world, id).join("snapshot/manifest.json");
    let text = fs::read_to_string(&path)?;
    let (_, body) = text.split_once('\n').context("manifest without header")?;
    let manifest: Value = serde_json::from_str(body)?;
    let version = manifest["monitor_version"].as_str();
    version.map(str::to_owned).context("monitor_version")
}

async fn another_qemu(world: &World) -> Result<()> {
    const NEWER: &str = "99.1.0";
    let id = sleeper(world).await?;
    let wrapper = Wrapper::install(world).await?;
    let outcome = versions(world, &wrapper, &id, NEWER).await;
    wrapper.remove().await?;
    outcome?;
    cycle(world, &sleeper(world).await?).await
}

async fn versions(world: &World, wrapper: &Wrapper<'_>, id: &str, newer: &str) -> Result<()> {
    let api = world.api().await?;
    let witness = Witness::plant(api, id).await?;
    act(api, id, "standby", None).await?;
    let real = saved_by(world, id)?;
    wrapper.claim(Some(newer)).await?;
    if world.hypervisor == "qemu-microvm" {
        refused(world, id, &[newer, &real]).await?;
        // An older one is another one, too.
        wrapper.claim(Some("7.2.0")).await?;
        refused(world, id, &["7.2.0", &real]).await?;
        wrapper.claim(None).await?;
        act(api, id, "restore", None).await?;
        return witness.survived(api, id).await;
    }
    act(api, id, "restore", None)
        .await
        .context("a newer QEMU loads what an older one saved")?;
    witness.survived(api, id).await?;
    // The process's own version counts, not what the binary of now says.
    act(api, id, "standby", None).await?;
    let saved = saved_by(world, id)?;
    ensure!(saved == real, "saved by {saved}, not {real}");
    wrapper.claim(Some("7.2.0")).await?;
    refused(world, id, &["7.2.0", &real]).await?;
    wrapper.claim(None).await?;
    act(api, id, "restore", None).await?;
    witness.survived(api, id).await
}

/// Held still before its CPUs are to stop, then killed.
async fn vmm_dies_during_standby(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let pid = only_vmm(world, &id)?;
    let _held = procs::Held::new(pid)?;
    let stage = instance_dir(world, &id).join("snapshot.stage");
    let kill = async {
        wait_until("the standby has begun", 30, || Ok(stage.exists())).await?;
        procs::kill(pid)
    };
    let path = format!("/instances/{id}/standby");
    let (reply, killed) = tokio::join!(api.post_empty(&path), kill);
    killed?;
    failed(&reply?)?;
    api.wait(&id, "Stopped", 30).await?;
    found(world, &id, &witness, "Stopped", "monitor").await?;
    cycle(world, &id).await
}

/// An error, with a reason.
pub fn failed(reply: &Reply) -> Result<()> {
    ensure!(
        reply.status >= 400
            && reply.body["message"]
                .as_str()
                .is_some_and(|m| !m.is_empty()),
        "{}: {} {}",
        reply.request,
        reply.status,
        reply.text
    );
    Ok(())
}

async fn vmm_ends_at_restore(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    act(api, &id, "standby", None).await?;
    let wrapper = Wrapper::install(world).await?;
    wrapper.fail(true)?;
    let outcome = async {
        let before = snapshot_files(world, &id)?;
        for _ in 0..2 {
            let reply = api.post_empty(&format!("/instances/{id}/restore")).await?;
            failed(&reply)?;
            let instance = api.instance(&id).await?;
            ensure!(
                instance["state"] == "Standby" && instance["failure"].is_string(),
                "{instance}"
            );
            checks::agree(api, &world.server).await?;
        }
        ensure!(snapshot_files(world, &id)? == before);
        wrapper.fail(false)?;
        act(api, &id, "restore", None).await?;
        witness.survived(api, &id).await
    };
    let outcome = outcome.await;
    wrapper.remove().await?;
    outcome?;
    cycle(world, &id).await
}

/// SIGKILL some milliseconds after the VMM appeared: before the guest's first instruction nothing is
/// lost, after it the instance is Stopped and says so.
async fn vmm_is_killed_during_restore(
    world: &World,
    mut random: Random,
    rounds: usize,
) -> Result<()> {
    let api = world.api().await?;
    let mut outcomes = Vec::new();
    for round in 0..rounds {
        let id = sleeper(world).await?;
        let witness = Witness::plant(api, &id).await?;
        act(api, &id, "standby", None).await?;
        let delay = random.below(300);
        let kill = async {
            wait_until("a VMM appeared", 30, || {
                Ok(!procs::vmms(&world.server.data_dir)?.is_empty())
            })
            .await?;
            tokio::time::sleep(Duration::from_millis(delay as u64)).await;
            kill_vmms(world).await
        };
        let path = format!("/instances/{id}/restore");
        let (reply, killed) = tokio::join!(api.post_empty(&path), kill);
        killed?;
        let reply = reply?;
        let outcome = after_death(world, &id, &witness, &reply)
            .await
            .with_context(|| {
                format!(
                    "round {round}, killed after {delay} ms: {} {}",
                    reply.status, reply.text
                )
            })?;
        outcomes.push(format!("{delay} ms {outcome}"));
    }
    println!("killed during restore: {}", outcomes.join(", "));
    Ok(())
}

async fn after_death(world: &World, id: &str, witness: &Witness, reply: &Reply) -> Result<String> {
    let api = world.api().await?;
    // The VMM is dead: whatever state it was in, it does not stay in one that has a VMM.
    let mut state = String::new();
    for _ in 0..300 {
        state = api.instance(id).await?["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        if matches!(state.as_str(), "Standby" | "Stopped") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    match state.as_str() {
        "Standby" => failed(reply)?,
        "Stopped" => {}
        other => bail!("{other}, and its VMM is dead"),
    }
    found(world, id, witness, &state, "").await?;
    Ok(state)
}

/// A VMM that answers nothing: the standby gives up, and the guest goes on once it can.
async fn vmm_hangs_during_standby(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let held = procs::Held::new(only_vmm(world, &id)?)?;
    let reply = api.post_empty(&format!("/instances/{id}/standby")).await?;
    failed(&reply)?;
    held.release()?;
    // What hung is looked at again every half a minute.
    for _ in 0..90 {
        let instance = api.instance(&id).await?;
        if instance["state"] == "Running" && exec::run(api, &id, &["true"]).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    found(world, &id, &witness, "Running", "").await?;
    cycle(world, &id).await
}
