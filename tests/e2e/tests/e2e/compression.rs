//! Compression of memory that sleeps, on real guests whose checksums are taken inside them.
//!
//! ```text
//!   this file    what every case relies on
//!   moments      restore, fork and snapshot while a compression waits, works, ends and is over
//!   rollback     going back in place while jobs work at both ends, and at any moment
//!   policy       who decides, delays, refusals, restarts of the server
//!   faults       altered artefacts, a full disk
//! ```
//! Every case ends with a look at the server's account of its jobs, which must balance.
use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Api, Case, Group, Sample, Witness, World, checks,
    compression::{balanced, forms},
    exec,
};
use serde_json::{Value, json};

use crate::{crash_standby::instance_dir, standby_faults::BOARDS};

mod faults;
mod moments;
mod policy;
mod rollback;

pub fn groups(sample: &Sample) -> Vec<Group> {
    let mut groups = Vec::new();
    for (at, board) in BOARDS.into_iter().enumerate() {
        let mut cases = moments::cases(sample, at);
        cases.extend(rollback::cases(sample, at));
        groups.push(group(board, "compression", cases));
        let mut cases = policy::cases(sample, at);
        cases.extend(faults::cases(sample, at));
        groups.push(group(board, "compression-policy", cases));
    }
    groups.extend(faults::groups(sample));
    groups.retain(|group| !group.cases.is_empty());
    groups
}

fn group(board: &str, name: &str, cases: Vec<Case>) -> Group {
    let patient = |case: Case| case.deadline(Duration::from_secs(1800));
    let cases = cases.into_iter().map(patient).collect();
    Group::on(board, &format!("-{name}"), cases)
}

/// A way to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codec {
    pub algorithm: &'static str,
    pub level: u8,
}

const fn codec(algorithm: &'static str, level: u8) -> Codec {
    Codec { algorithm, level }
}

/// One that takes many seconds, also for little.
pub const SLOW: Codec = codec("zstd", 19);
pub const CODECS: [Codec; 5] = [
    codec("zstd", 1),
    codec("zstd", 3),
    SLOW,
    codec("lz4", 0),
    codec("lz4", 9),
];

impl Codec {
    pub fn request(self) -> Value {
        json!({"enabled": true, "algorithm": self.algorithm, "level": self.level})
    }

    pub fn artefact(self) -> &'static str {
        match self.algorithm {
            "lz4" => "memory.lz4",
            _ => "memory.zst",
        }
    }
}

/// The guest that cases of this size share, Running, and what lies in its memory; anew when a failed case left it in
/// a bad way.
pub async fn guest(world: &World, name: &str, mib: u32) -> Result<(String, Witness)> {
    let api = world.api().await?;
    let found = api.get(&format!("/instances/{name}")).await?;
    if found.status == 200 {
        let id = text(&found.body, "id")?;
        if found.body["state"] == "Running"
            && let Ok(witness) = Witness::read(api, &id).await
        {
            return Ok((id, witness));
        }
        api.remove(&id).await?;
    }
    let mut request = world.tiny(name);
    request["name"] = json!(name);
    // A guest's file system in memory holds half of it.
    request["size"] = json!(if mib > 96 { "512MB" } else { "256MB" });
    let id = world.boot(request).await?;
    let witness = Witness::plant_mixed(api, &id, mib).await?;
    Ok((id, witness))
}

pub fn text(value: &Value, field: &str) -> Result<String> {
    let text = value[field].as_str();
    text.map(str::to_owned)
        .with_context(|| format!("{field} of {value}"))
}

/// 200 and asleep; the answer.
pub async fn sleep(api: &Api, id: &str, body: Value) -> Result<Value> {
    let path = format!("/instances/{id}/standby");
    let answer = api.post(&path, body).await?.expect(200)?;
    ensure!(answer["state"] == "Standby", "{answer}");
    Ok(answer)
}

/// 200 and awake, with memory as its machine has it and nothing beside it.
pub async fn wake(world: &World, id: &str) -> Result<()> {
    let path = format!("/instances/{id}/restore");
    let answer = world.api().await?.post_empty(&path).await?.expect(200)?;
    ensure!(
        answer["state"] == "Running" && answer["standby_compression"].is_null(),
        "{answer}"
    );
    only(world, id, "memory")
}

/// Memory lies in this form, and in no other.
pub fn only(world: &World, id: &str, form: &str) -> Result<()> {
    let found = forms(&instance_dir(world, id))?;
    ensure!(found == [form], "{id}: wanted {form}, found {found:?}");
    Ok(())
}

pub fn snapshot_dir(world: &World, id: &str) -> PathBuf {
    world.server.data_dir.join("snapshots").join(id)
}

pub async fn take(api: &Api, id: &str, body: Value) -> Result<Value> {
    let path = format!("/instances/{id}/snapshots");
    api.post(&path, body).await?.expect(201)
}

/// 201; the fork's id and the answer.
pub async fn fork(world: &World, path: &str, target: &str) -> Result<(String, Value)> {
    let body = json!({"name": world.unique("fork"), "target_state": target});
    let made = world.api().await?.post(path, body).await?.expect(201)?;
    ensure!(made["state"] == target, "wanted {target}: {made}");
    Ok((text(&made, "id")?, made))
}

pub async fn drop_snapshot(api: &Api, id: &str) -> Result<()> {
    let reply = api.delete(&format!("/snapshots/{id}")).await?;
    ensure!(reply.status == 204, "{} {}", reply.status, reply.text);
    Ok(())
}

/// The guest lives, and so does the server's idea of everything.
pub async fn alive(api: &Api, id: &str) -> Result<()> {
    let instance = api.instance(id).await?;
    ensure!(instance["state"] == "Running", "{instance}");
    ensure!(exec::sh(api, id, "echo alive").await? == "alive");
    Ok(())
}

/// For the end of every case.
pub async fn all_is_well(world: &World) -> Result<()> {
    let api = world.api().await?;
    checks::agree(api, &world.server).await?;
    balanced(api).await.map(drop)
}
