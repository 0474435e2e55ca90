//! Copies of a moment: snapshots that are kept, gone back to, and forked; seen from outside.
//!
//! ```text
//!   this file     what every case relies on, and where the cases run: where files share blocks, and where not
//!   forks         ten at once, identities, connections, ledgers
//!   matrix        every kind, state of the source and target state, allowed and refused
//!   moving        exported by one server, imported and forked by another one
//!   keeping       snapshots outlive their source, free their disk, are found, and are taken by a schedule
//! ```
use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Api, Case, Group, World, checks,
    disk::{Disk, Kind},
    exec,
};
use serde_json::Value;

mod forks;
mod keeping;
mod matrix;
mod moving;

/// Sparse: holds ten guests' memories where they do not share blocks.
const DISK: u64 = 6 << 30;
const REFLINK: &str = "-copies-xfs";

pub fn groups() -> Vec<Group> {
    let mut groups = Vec::new();
    for board in ["qemu", "qemu-microvm"] {
        for place in [REFLINK, "-copies"] {
            let mut cases = doze_e2e::cases![place_is_what_it_should_be];
            // First, because its snapshots come by themselves while the others run.
            cases.extend(keeping::begin());
            cases.extend(forks::cases());
            cases.extend(matrix::cases());
            cases.extend(moving::cases());
            cases.extend(keeping::cases());
            let patient = |case: Case| case.deadline(Duration::from_secs(300));
            let cases = cases.into_iter().map(patient).collect();
            groups.push(Group::on(board, place, cases));
        }
    }
    groups
}

/// Before the server's first start.
fn prepare(world: &World) -> Result<()> {
    if world.name.ends_with(REFLINK) {
        Disk::of(world, Kind::Xfs, DISK)?;
    }
    Ok(())
}

async fn place_is_what_it_should_be(world: &World) -> Result<()> {
    prepare(world)?;
    world.api().await?;
    let (one, two) = (
        world.server.data_dir.join("one"),
        world.server.data_dir.join("two"),
    );
    std::fs::write(&one, [7; 8192])?;
    let status = std::process::Command::new("cp")
        .args(["--reflink=always"])
        .args([&one, &two])
        .stderr(std::process::Stdio::null())
        .status()?;
    for path in [one, two] {
        if path.exists() {
            std::fs::remove_file(path)?;
        }
    }
    ensure!(
        status.success() == world.name.ends_with(REFLINK),
        "sharing blocks: {status}"
    );
    Ok(())
}

fn folder(world: &World, id: &str) -> PathBuf {
    world.server.data_dir.join("instances").join(id)
}

fn text(value: &Value, field: &str) -> Result<String> {
    let text = value[field].as_str();
    text.map(str::to_owned)
        .with_context(|| format!("{field} of {value}"))
}

/// 201 and the fork, in this state, with addresses of its own.
async fn fork(world: &World, path: &str, body: Value, state: &str) -> Result<Value> {
    let made = world.api().await?.post(path, body).await?.expect(201)?;
    ensure!(made["state"] == state, "wanted {state}: {made}");
    ensure!(made["has_snapshot"] == (state == "Standby"), "{made}");
    Ok(made)
}

async fn snapshot(world: &World, id: &str, body: Value) -> Result<Value> {
    let path = format!("/instances/{id}/snapshots");
    world.api().await?.post(&path, body).await?.expect(201)
}

async fn post(world: &World, path: &str, body: Value) -> Result<doze_e2e::api::Reply> {
    world.api().await?.post(path, body).await
}

/// Remembers a word in memory and on the disk.
async fn remember(api: &Api, id: &str, word: &str) -> Result<()> {
    let script = format!("echo {word} > /dev/shm/word; echo {word} > /word; sync");
    exec::sh(api, id, &script).await.map(drop)
}

/// What the guest has in memory and on the disk.
async fn remembered(api: &Api, id: &str) -> Result<(String, String)> {
    let memory = exec::sh(api, id, "cat /dev/shm/word 2>/dev/null || echo nothing").await?;
    let disk = exec::sh(api, id, "cat /word").await?;
    Ok((memory, disk))
}

async fn remove_all(world: &World, ids: &[String]) -> Result<()> {
    let api = world.api().await?;
    for id in ids {
        api.remove(id).await?;
    }
    let left = std::fs::read_dir(world.server.data_dir.join("captures"))?.count();
    ensure!(left == 0, "{left} copies are left that nobody wanted");
    checks::agree(api, &world.server).await?;
    Ok(())
}
