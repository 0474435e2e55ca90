//! Artefacts that somebody altered, and disks that are full: refused by name, nothing lost, and it works again once it
//! can.
use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Case, Group, Reply, Sample, Witness, World, checks,
    compression::{balanced, reaches, snapshot_reaches},
    disk::{Disk, Filler, Kind},
    exec,
    procs::Held,
};
use serde_json::json;

use super::{
    Codec, SLOW, alive, all_is_well, codec, drop_snapshot, fork, group, guest, only, sleep,
    snapshot_dir, take, text, wake,
};
use crate::{
    crash_standby::{act, instance_dir},
    standby_faults::BOARDS,
};

/// Holds the boot files, images, and the memory of one small guest twice.
const DISK: u64 = 768 << 20;
/// For the server's database, and for no memory: what comes to nothing gives this back.
const ENOUGH_TO_RECORD: u64 = 1 << 20;
/// Less than the server wants to see before it begins anything.
const TOO_LITTLE: u64 = 8 << 20;

/// A test run takes altered files on the board that its seed chooses and full disks on the other.
pub fn cases(sample: &Sample, board: usize) -> Vec<Case> {
    match sample.campaign || board == sample.random("altered artefacts").below(2) {
        true => doze_e2e::cases![altered_artefacts_are_refused_and_kept],
        false => vec![],
    }
}

pub fn groups(sample: &Sample) -> Vec<Group> {
    let chosen = sample.random("altered artefacts").below(2);
    let boards = BOARDS.into_iter().enumerate();
    let taken = boards.filter(|(at, _)| sample.campaign || *at != chosen);
    taken
        .map(|(_, board)| {
            let cases = doze_e2e::cases![
                disk_full_at_compression,
                disk_full_at_decompression,
                disk_full_while_decompressing,
            ];
            group(board, "compression-full-disk", cases)
        })
        .collect()
}

type Damage = fn(&mut Vec<u8>);

async fn altered_artefacts_are_refused_and_kept(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "altered", 16).await?;
    for codec in [codec("zstd", 1), codec("lz4", 0)] {
        sleep(api, &id, json!({"compression": codec.request()})).await?;
        reaches(api, &id, &["compressed"], 300).await?;
        let path = instance_dir(world, &id).join(codec.artefact());
        let good = fs::read(&path)?;
        let damages: [(&str, Damage, &[&str]); 5] = [
            (
                "a bit in a chunk",
                |content| flip(content),
                &["chunk ", "at byte "],
            ),
            ("the last byte", |content| flip_last(content), &["at byte "]),
            (
                "half of it",
                |content| content.truncate(content.len() / 2),
                &["at byte "],
            ),
            (
                "a byte less",
                |content| content.truncate(content.len() - 1),
                &["at byte "],
            ),
            ("nothing", Vec::clear, &["at byte "]),
        ];
        for (what, damage, words) in damages {
            let mut bad = good.clone();
            damage(&mut bad);
            fs::write(&path, &bad)?;
            refused(world, &id, codec.artefact(), &bad, words)
                .await
                .with_context(|| format!("{what}, {codec:?}"))?;
        }
        let mut bad = good.clone();
        flip(&mut bad);
        fs::write(&path, &bad)?;
        // Nobody is made of it who would not wake.
        let name = world.unique("fork");
        let body = json!({"name": name, "target_state": "Running"});
        api.post(&format!("/instances/{id}/fork"), body)
            .await?
            .refused(409, "conflict", &["chunk ", "at byte "])?;
        let gone = api.get(&format!("/instances/{name}")).await?;
        gone.refused(404, "not_found", &[])?;
        checks::agree(api, &world.server).await?;
        fs::write(&path, &good)?;
        wake(world, &id).await?;
        witness.survived(api, &id).await?;
        ensure!(api.instance(&id).await?["failure"].is_null());
    }
    damaged_snapshot(world, &id, &witness).await?;
    // The way out for whoever has no good one.
    sleep(api, &id, json!({"compression": codec("lz4", 0).request()})).await?;
    reaches(api, &id, &["compressed"], 300).await?;
    let path = instance_dir(world, &id).join("memory.lz4");
    let mut bad = fs::read(&path)?;
    flip(&mut bad);
    fs::write(&path, &bad)?;
    refused(world, &id, "memory.lz4", &bad, &["chunk "]).await?;
    act(api, &id, "start", Some(json!({"discard_memory": true}))).await?;
    api.wait(&id, "Running", 90).await?;
    witness.lost_but_disk_kept(api, &id).await?;
    only(world, &id, "memory")?;
    all_is_well(world).await?;
    api.remove(&id).await
}

/// Nobody gives up a guest that runs for a snapshot that could not be woken.
async fn damaged_snapshot(world: &World, id: &str, witness: &Witness) -> Result<()> {
    let api = world.api().await?;
    let body = json!({"kind": "Standby", "compression": codec("zstd", 1).request()});
    let snapshot = text(&take(api, id, body).await?, "id")?;
    snapshot_reaches(api, &snapshot, &["compressed"], 300).await?;
    exec::sh(api, id, "echo later > /dev/shm/later").await?;
    let path = snapshot_dir(world, &snapshot).join("memory.zst");
    let good = fs::read(&path)?;
    let mut bad = good.clone();
    flip(&mut bad);
    fs::write(&path, &bad)?;
    let back = format!("/instances/{id}/snapshots/{snapshot}/restore");
    for target in ["Running", "Standby"] {
        api.post(&back, json!({"target_state": target}))
            .await?
            .refused(409, "conflict", &["chunk ", "at byte "])
            .with_context(|| target.to_owned())?;
        alive(api, id).await?;
        exec::sh(api, id, "cat /dev/shm/later").await?;
        witness.survived(api, id).await?;
    }
    let name = world.unique("fork");
    let body = json!({"name": name, "target_state": "Running"});
    api.post(&format!("/snapshots/{snapshot}/fork"), body)
        .await?
        .refused(409, "conflict", &["chunk ", "at byte "])?;
    let gone = api.get(&format!("/instances/{name}")).await?;
    gone.refused(404, "not_found", &[])?;
    ensure!(fs::read(&path)? == bad, "somebody changed the artefact");
    checks::agree(api, &world.server).await?;
    fs::write(&path, &good)?;
    api.post(&back, json!({})).await?.expect(200)?;
    exec::sh(api, id, "test ! -e /dev/shm/later").await?;
    witness.survived(api, id).await?;
    drop_snapshot(api, &snapshot).await
}

fn flip(content: &mut [u8]) {
    let middle = content.len() / 2;
    if let Some(byte) = content.get_mut(middle) {
        *byte ^= 0x10;
    }
}

fn flip_last(content: &mut [u8]) {
    if let Some(byte) = content.last_mut() {
        *byte ^= 0x10;
    }
}

/// As a conflict that says where, also in the instance's `failure`, and everything is left as it was.
async fn refused(world: &World, id: &str, name: &str, bad: &[u8], words: &[&str]) -> Result<()> {
    let api = world.api().await?;
    let path = instance_dir(world, id).join(name);
    let shown = path.to_string_lossy().into_owned();
    let words = [words, &[shown.as_str()]].concat();
    let reply = api.post_empty(&format!("/instances/{id}/restore")).await?;
    reply.refused(409, "conflict", &words)?;
    let instance = api.instance(id).await?;
    let failure = instance["failure"].as_str().unwrap_or_default();
    ensure!(
        instance["state"] == "Standby" && words.iter().all(|word| failure.contains(word)),
        "{instance}"
    );
    only(world, id, name)?;
    ensure!(
        fs::read(&path)? == bad,
        "a refused restore changed the artefact"
    );
    checks::agree(api, &world.server).await.map(drop)
}

/// Before it begins, and while it writes.
async fn disk_full_at_compression(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Ext4, DISK)?;
    let api = world.api().await?;
    let (id, witness) = guest(world, "crowded", 64).await?;
    let failed = async |account: u64| {
        let error = reaches(api, &id, &["error"], 300).await?;
        let said = error["error"].as_str().unwrap_or_default();
        ensure!(
            said.contains("disk") || said.contains("space"),
            "it does not say why: {error}"
        );
        only(world, &id, "memory")?;
        let counted = balanced(api).await?.sum("", |jobs| jobs.ended["failed"]);
        ensure!(counted == account, "{counted} failed, not {account}");
        // It stays so, also for the next server.
        world.server.stop().await?;
        world.server.start().await?;
        let after = api.instance(&id).await?["standby_compression"].clone();
        ensure!(after == error, "was {error}: {after}");
        anyhow::Ok(())
    };
    let body = json!({"compression": SLOW.request(), "compression_delay": "1s"});
    sleep(api, &id, body).await?;
    let filler = disk.fill(TOO_LITTLE)?;
    failed(1).await.context("before it begins")?;
    drop(filler);
    wake(world, &id).await?;
    witness.survived(api, &id).await?;

    sleep(api, &id, json!({"compression": SLOW.request()})).await?;
    reaches(api, &id, &["compressing"], 60).await?;
    let filler = disk.fill(ENOUGH_TO_RECORD)?;
    failed(1).await.context("while it writes")?;
    drop(filler);
    wake(world, &id).await?;
    witness.survived(api, &id).await?;

    sleep(api, &id, json!({"compression": codec("zstd", 1).request()})).await?;
    reaches(api, &id, &["compressed"], 300).await?;
    only(world, &id, "memory.zst")?;
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    all_is_well(world).await
}

async fn disk_full_at_decompression(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Ext4, DISK)?;
    let api = world.api().await?;
    let (id, witness) = guest(world, "crowded", 64).await?;
    for codec in [codec("lz4", 0), codec("zstd", 3)] {
        sleep(api, &id, json!({"compression": codec.request()})).await?;
        reaches(api, &id, &["compressed"], 300).await?;
        // Nothing at all, then room for the beginning only.
        for left in [TOO_LITTLE, 48 << 20] {
            let filler = disk.fill(left)?;
            api.post_empty(&format!("/instances/{id}/restore"))
                .await?
                .refused(
                    409,
                    "insufficient_capacity",
                    &["disk", "wanted", "available"],
                )
                .with_context(|| format!("{left} bytes left"))?;
            sleeps_on(world, &id, codec).await?;
            // Where there is no room for a copy there is none for its memory either.
            let body = json!({"name": world.unique("fork"), "target_state": "Running"});
            api.post(&format!("/instances/{id}/fork"), body)
                .await?
                .refused(409, "insufficient_capacity", &["disk"])?;
            drop(filler);
        }
        wake(world, &id).await?;
        witness.survived(api, &id).await?;
    }
    // With room everything works again, also for a copy.
    sleep(api, &id, json!({"compression": codec("lz4", 0).request()})).await?;
    reaches(api, &id, &["compressed"], 300).await?;
    let (copy, _) = fork(world, &format!("/instances/{id}/fork"), "Standby").await?;
    only(world, &copy, "memory.lz4")?;
    api.remove(&copy).await?;
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    all_is_well(world).await
}

/// Somebody else takes the room that there was. What is written by then goes, and the artefact is what counts.
async fn disk_full_while_decompressing(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Ext4, DISK)?;
    let api = world.api().await?;
    let (id, witness) = guest(world, "crowded", 64).await?;
    for codec in [codec("zstd", 1), codec("lz4", 0)] {
        sleep(api, &id, json!({"compression": codec.request()})).await?;
        reaches(api, &id, &["compressed"], 300).await?;
        let mut attempts = 0;
        let filler = loop {
            attempts += 1;
            ensure!(
                attempts <= 10,
                "ten decompressions were over too soon to be met"
            );
            let (reply, filler) = restore_and_fill(world, &disk, &id).await?;
            if let Some(filler) = filler {
                reply.refused(409, "insufficient_capacity", &["disk", "none is left"])?;
                break filler;
            }
            reply.expect(200)?;
            witness.survived(api, &id).await?;
            sleep(api, &id, json!({"compression": codec.request()})).await?;
            reaches(api, &id, &["compressed"], 300).await?;
        };
        sleeps_on(world, &id, codec).await?;
        drop(filler);
        wake(world, &id).await?;
        witness.survived(api, &id).await?;
    }
    all_is_well(world).await
}

/// As it did before somebody tried to wake it.
async fn sleeps_on(world: &World, id: &str, codec: Codec) -> Result<()> {
    let api = world.api().await?;
    only(world, id, codec.artefact())?;
    let instance = api.instance(id).await?;
    ensure!(
        instance["state"] == "Standby" && instance["standby_compression"]["state"] == "compressed",
        "{instance}"
    );
    checks::agree(api, &world.server).await.map(drop)
}

/// A restore, and what fills the disk since the middle of its decompression; `None` when that was over too soon.
async fn restore_and_fill(world: &World, disk: &Disk, id: &str) -> Result<(Reply, Option<Filler>)> {
    let api = world.api().await?;
    let dir = instance_dir(world, id);
    let server = i32::try_from(world.server.pid().await?)?;
    let answered = Arc::new(AtomicBool::new(false));
    let over = answered.clone();
    let held = tokio::task::spawn_blocking(move || held_in_the_middle(&dir, server, &over));
    let restore = async {
        let reply = api.post_empty(&format!("/instances/{id}/restore")).await;
        answered.store(true, Ordering::Relaxed);
        reply
    };
    let fill = async {
        let Some(held) = held.await?? else {
            return Ok(None);
        };
        let filler = disk.fill(0)?;
        held.release()?;
        anyhow::Ok(Some(filler))
    };
    let (reply, filler) = tokio::join!(restore, fill);
    Ok((reply?, filler?))
}

/// Waits for a stage file of memory and stops the server as soon as something is in it. `None` when more than half
/// was there by then, or all of it before anybody looked.
fn held_in_the_middle(dir: &Path, server: i32, answered: &AtomicBool) -> Result<Option<Held>> {
    // A decompression of this size takes a few dozen milliseconds: nothing that tells of it would be in time.
    while staged(dir)?.is_none_or(|bytes| bytes == 0) {
        if answered.load(Ordering::Relaxed) {
            return Ok(None);
        }
        std::hint::spin_loop();
    }
    let held = Held::new(server)?;
    // Of 64 MiB and what the guest itself has in its memory.
    let early = staged(dir)?.is_some_and(|bytes| bytes < 48 << 20);
    Ok(early.then_some(held))
}

/// Bytes of disk that unfinished raw memory uses.
fn staged(dir: &Path) -> Result<Option<u64>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".memory.") && name.ends_with(".stage") {
            return match entry.metadata() {
                Ok(meta) => Ok(Some(meta.blocks() * 512)),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error.into()),
            };
        }
    }
    Ok(None)
}
