//! kill -9 at every named point inside snapshot, fork, rollback, import and the delete of a snapshot, of the server alone
//! and of server and VMMs.
//!
//! ```text
//!   sleeper (one per board) ─ witness and counter in its memory ─ server with DOZE_KILL_AT ─ command ─ it dies
//!      ^                                                              [ its VMMs are killed, too ]       │
//!      └── once to sleep and awake ── source, fork and snapshot are what the table says <──── restart ───┘
//! ```
//! A fork or snapshot is there and usable, or nothing of it is left. A test run reaches every point on a board that
//! its seed chooses, and a sample of the deaths of server and VMMs; a campaign takes all.
use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{Api, Case, Group, Sample, Witness, World, checks};
use serde_json::{Value, json};

use crate::{
    crash_standby::{cycle, found, instance_dir, kill_vmms, settle, sleeper},
    standby::{COUNTER, counter},
};

const BOARDS: [&str; 2] = ["qemu-microvm", "qemu"];
/// Deaths of server and VMMs that a test run takes.
const SAMPLED: usize = 3;
const FORK: &str = "offspring";
/// The snapshot that is there before.
const OLD: &str = "old";
/// The one that is taken.
const NEW: &str = "new";

/// How the server comes to a point, with the source running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Snapshot,
    Fork,
    /// The fork sleeps.
    ForkAsleep,
    /// A fork of the snapshot that is there before.
    ForkStored,
    Drop,
    /// The snapshot that is there before was exported, and comes back under another name.
    Import,
    Rollback,
    /// To a snapshot whose device state is altered.
    BadRollback,
}

/// What a restart must find of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// It runs on as if nothing had been; without its VMM it is Stopped and says why.
    Same,
    /// It sleeps with the memory of the snapshot.
    Back,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scenario {
    point: &'static str,
    way: Way,
    source: Source,
    /// Fork or snapshot is complete; otherwise nothing of it is left.
    made: bool,
    with_vmm: bool,
}

impl Scenario {
    fn name(&self) -> String {
        let with_vmm = if self.with_vmm { ".and-vmm" } else { "" };
        let way = match self.way {
            Way::ForkAsleep => "asleep.",
            Way::ForkStored => "stored.",
            _ => "",
        };
        format!("{way}{}{with_vmm}", self.point)
    }
}

#[rustfmt::skip]
const POINTS: &[(&str, Way, Source, bool)] = {
    use Source::{Back, Same};
    &[
        ("snapshot.admitted", Way::Snapshot, Same, false),
        ("snapshot.paused", Way::Snapshot, Same, false),
        ("snapshot.copied", Way::Snapshot, Same, false),
        ("snapshot.resumed", Way::Snapshot, Same, false),
        ("snapshot.continued", Way::Snapshot, Same, false),
        ("snapshot.placed", Way::Snapshot, Same, false),
        ("snapshot.recorded", Way::Snapshot, Same, true),
        ("snapshot.row_removed", Way::Drop, Same, false),
        ("snapshot.files_removed", Way::Drop, Same, false),
        ("import.received", Way::Import, Same, false),
        ("import.placed", Way::Import, Same, false),
        ("import.recorded", Way::Import, Same, true),
        ("fork.copied", Way::Fork, Same, false),
        ("fork.recorded", Way::Fork, Same, false),
        ("fork.files_made", Way::Fork, Same, false),
        ("fork.done", Way::Fork, Same, true),
        ("rollback.admitted", Way::Rollback, Same, false),
        ("rollback.staged", Way::Rollback, Same, false),
        ("rollback.marked", Way::Rollback, Back, false),
        ("rollback.machine_killed", Way::Rollback, Back, false),
        ("rollback.swapped", Way::Rollback, Back, false),
        ("rollback.recorded", Way::Rollback, Back, false),
        ("rollback.undone", Way::BadRollback, Same, false),
    ]
};

/// The same points by another way, and those of others on the way of a copy.
#[rustfmt::skip]
const MORE: &[(&str, Way, Source, bool)] = {
    use Source::{Back, Same};
    &[
        ("fork.files_made", Way::ForkAsleep, Same, false),
        ("fork.done", Way::ForkAsleep, Same, true),
        ("fork.copied", Way::ForkStored, Same, false),
        ("fork.done", Way::ForkStored, Same, true),
        ("snapshot.paused", Way::Fork, Same, false),
        ("restore.consumed", Way::Fork, Same, false),
        ("restore.resumed", Way::Fork, Same, false),
        ("restore.recorded", Way::Fork, Same, true),
        ("restore.loaded", Way::Rollback, Back, false),
    ]
};

/// Whether the point is one of this file's.
pub fn covers(point: &str) -> bool {
    POINTS.iter().any(|(known, ..)| *known == point)
}

fn scenarios(table: &[(&'static str, Way, Source, bool)], with_vmm: bool) -> Vec<Scenario> {
    let scenario = |(point, way, source, made): &(&'static str, Way, Source, bool)| Scenario {
        point,
        way: *way,
        source: *source,
        made: *made,
        with_vmm,
    };
    table.iter().map(scenario).collect()
}

/// One group per board.
///
/// # Errors
/// When the table names a point that the server does not have.
pub fn groups(points: &[String], sample: &Sample) -> Result<Vec<Group>> {
    for (point, ..) in POINTS.iter().chain(MORE) {
        ensure!(
            points.iter().any(|known| known == point),
            "the server has no kill point {point:?}"
        );
    }
    let more = [scenarios(MORE, false), scenarios(POINTS, true)].concat();
    let mut chosen = BOARDS.map(|board| (board, Vec::new()));
    if sample.campaign {
        for (_, all) in &mut chosen {
            *all = [scenarios(POINTS, false), more.clone()].concat();
        }
    } else {
        let mut random = sample.random("kill -9 in copies");
        for scenario in scenarios(POINTS, false) {
            chosen[random.below(BOARDS.len())].1.push(scenario);
        }
        for scenario in random.choose(more, SAMPLED) {
            chosen[random.below(BOARDS.len())].1.push(scenario);
        }
    }
    let case = |scenario: Scenario| {
        Case::new(scenario.name(), move |world| {
            Box::pin(crash(world, scenario))
        })
        .deadline(Duration::from_secs(240))
    };
    let group = |(board, scenarios): (&str, Vec<Scenario>)| {
        let cases = scenarios.into_iter().map(case).collect();
        Group::on(board, "-kill9-copies", cases)
    };
    Ok(chosen.into_iter().map(group).collect())
}

async fn crash(world: &World, scenario: Scenario) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    clear(api).await?;
    exec_counter(api, &id).await?;
    let old_witness = Witness::plant(api, &id).await?;
    let old = match scenario.way {
        Way::Snapshot | Way::Fork | Way::ForkAsleep => None,
        Way::ForkStored | Way::Drop | Way::Import | Way::Rollback | Way::BadRollback => {
            Some(take(api, &id, OLD).await?)
        }
    };
    let exported = match (scenario.way, &old) {
        (Way::Import, Some(old)) => {
            let export = api.open(&format!("/snapshots/{old}/export")).await?;
            export.bytes().await?.to_vec()
        }
        _ => Vec::new(),
    };
    let witness = match scenario.way {
        Way::ForkStored | Way::Import => old_witness.clone(),
        _ => Witness::plant(api, &id).await?,
    };
    let counted = counter(api, &id).await?;
    world.server.stop().await?;
    world
        .server
        .start_with(&[("DOZE_KILL_AT", scenario.point)])
        .await?;
    let old = old.as_deref();
    provoke(world, api, &id, scenario, old, exported).await?;
    if scenario.with_vmm {
        kill_vmms(world).await?;
    }
    world.server.start().await?;
    settle(api, &id).await?;
    let forked = api.get(&format!("/instances/{FORK}")).await?;
    if forked.status == 200 {
        settle(api, FORK).await?;
    }
    nothing_half_made(world, api).await?;
    forks(world, api, scenario, &witness).await?;
    snapshots(api, scenario, &witness, old).await?;
    match (scenario.source, scenario.with_vmm) {
        (Source::Same, false) => {
            found(world, &id, &witness, "Running", "").await?;
            let now = counter(api, &id).await?;
            ensure!(
                now.0 == counted.0 && now.1 >= counted.1,
                "it counted {counted:?} and then {now:?}"
            );
        }
        (Source::Same, true) => found(world, &id, &witness, "Stopped", "monitor").await?,
        (Source::Back, _) => found(world, &id, &old_witness, "Standby", "").await?,
    }
    clear(api).await?;
    cycle(world, &id).await
}

async fn exec_counter(api: &Api, id: &str) -> Result<()> {
    if counter(api, id).await.is_err() {
        doze_e2e::exec::sh(api, id, COUNTER).await?;
    }
    Ok(())
}

async fn take(api: &Api, id: &str, name: &str) -> Result<String> {
    let body = json!({"kind": "Standby", "name": name});
    let path = format!("/instances/{id}/snapshots");
    let made = api.post(&path, body).await?.expect(201)?;
    let id = made["id"].as_str().context("id")?;
    Ok(id.to_owned())
}

/// Fork and snapshots of an earlier case.
async fn clear(api: &Api) -> Result<()> {
    if api.get(&format!("/instances/{FORK}")).await?.status == 200 {
        api.remove(FORK).await?;
    }
    for snapshot in listed(api).await? {
        let id = snapshot["id"].as_str().context("id")?;
        let reply = api.delete(&format!("/snapshots/{id}")).await?;
        ensure!(reply.status == 204, "{}", reply.text);
    }
    Ok(())
}

async fn listed(api: &Api) -> Result<Vec<Value>> {
    let list = api.get("/snapshots").await?.expect(200)?;
    Ok(list.as_array().cloned().unwrap_or_default())
}

/// Makes the server die at the point it is armed for.
async fn provoke(
    world: &World,
    api: &Api,
    id: &str,
    scenario: Scenario,
    old: Option<&str>,
    exported: Vec<u8>,
) -> Result<()> {
    let old = old.unwrap_or_default();
    let fork = |target: &str| json!({"name": FORK, "from_running": true, "target_state": target});
    let back = format!("/instances/{id}/snapshots/{old}/restore");
    let answer = match scenario.way {
        Way::Snapshot => take(api, id, NEW).await.map(drop),
        Way::Fork => made(api, &format!("/instances/{id}/fork"), fork("Running")).await,
        Way::ForkAsleep => made(api, &format!("/instances/{id}/fork"), fork("Standby")).await,
        Way::ForkStored => {
            let body = json!({"name": FORK, "target_state": "Running"});
            made(api, &format!("/snapshots/{old}/fork"), body).await
        }
        Way::Import => {
            let path = format!("/snapshots/import?name={NEW}");
            let octets = "application/octet-stream";
            let reply = api
                .send_raw(http::Method::POST, &path, octets, exported)
                .await;
            reply.and_then(|reply| reply.expect(201)).map(drop)
        }
        Way::Drop => api.delete(&format!("/snapshots/{old}")).await.map(drop),
        Way::Rollback => api.post(&back, json!({})).await.map(drop),
        Way::BadRollback => {
            let state = world.server.data_dir.join("snapshots").join(old);
            let state = state.join("snapshot/state");
            let good = std::fs::read(&state)?;
            let mut bad = good.clone();
            if let Some(byte) = bad.last_mut() {
                *byte ^= 1;
            }
            std::fs::write(&state, bad)?;
            let answer = api.post(&back, json!({})).await.map(drop);
            std::fs::write(&state, good)?;
            answer
        }
    };
    let patience = Duration::from_secs(if answer.is_ok() { 5 } else { 30 });
    if world.server.died(patience).await? {
        return Ok(());
    }
    world.server.stop().await?;
    world.server.start().await?;
    bail!("{scenario:?} never reached its point; the answer was {answer:?}")
}

async fn made(api: &Api, path: &str, body: Value) -> Result<()> {
    api.post(path, body).await?.expect(201).map(drop)
}

/// What belongs to no instance and no snapshot is gone; `checks::agree` looks for the rest.
async fn nothing_half_made(world: &World, api: &Api) -> Result<()> {
    let data = &world.server.data_dir;
    let names = |folder: &str| -> Result<BTreeSet<String>> {
        let entries = std::fs::read_dir(data.join(folder))?;
        let names = entries.map(|entry| anyhow::Ok(entry?.file_name().to_string_lossy().into()));
        names.collect()
    };
    let captures = names("captures")?;
    ensure!(captures.is_empty(), "copies are left: {captures:?}");
    let listed = listed(api).await?;
    let rows: BTreeSet<String> = listed
        .iter()
        .filter_map(|s| s["id"].as_str().map(str::to_owned))
        .collect();
    let folders = names("snapshots")?;
    ensure!(
        rows == folders,
        "snapshots {rows:?}, their folders {folders:?}"
    );
    for instance in checks::agree(api, &world.server).await? {
        let dir = instance_dir(world, instance["id"].as_str().context("id")?);
        for left in ["incoming", "incoming.stage"] {
            ensure!(!dir.join(left).exists(), "{left} is left of {instance}");
        }
    }
    Ok(())
}

/// The fork is complete, with its source's memory, or there is none.
async fn forks(world: &World, api: &Api, scenario: Scenario, witness: &Witness) -> Result<()> {
    let forks = matches!(scenario.way, Way::Fork | Way::ForkAsleep | Way::ForkStored);
    let reply = api.get(&format!("/instances/{FORK}")).await?;
    if !forks || !scenario.made {
        return reply.refused(404, "not_found", &[]);
    }
    let fork = reply.expect(200)?;
    let id = fork["id"].as_str().context("id")?;
    let (state, reason) = match (scenario.way, scenario.with_vmm) {
        (Way::ForkAsleep, _) => ("Standby", ""),
        (_, false) => ("Running", ""),
        (_, true) => ("Stopped", "monitor"),
    };
    found(world, id, witness, state, reason).await?;
    let hostname = doze_e2e::exec::sh(api, id, "hostname").await?;
    ensure!(hostname == FORK, "the fork calls itself {hostname}");
    api.remove(id).await
}

/// Every snapshot can be made an instance of, and there is none but those that must be.
async fn snapshots(
    api: &Api,
    scenario: Scenario,
    witness: &Witness,
    old: Option<&str>,
) -> Result<()> {
    let all = listed(api).await?;
    let names: BTreeSet<&str> = all.iter().filter_map(|s| s["name"].as_str()).collect();
    let mut wanted = BTreeSet::new();
    if old.is_some() && scenario.way != Way::Drop {
        wanted.insert(OLD);
    }
    if matches!(scenario.way, Way::Snapshot | Way::Import) && scenario.made {
        wanted.insert(NEW);
    }
    ensure!(
        names == wanted && all.len() == wanted.len(),
        "snapshots {names:?}, not {wanted:?}"
    );
    for snapshot in &all {
        let id = snapshot["id"].as_str().context("id")?;
        let body = json!({"name": FORK, "target_state": "Running"});
        made(api, &format!("/snapshots/{id}/fork"), body).await?;
        if snapshot["name"] == NEW {
            witness.survived(api, FORK).await?;
        }
        api.remove(FORK).await?;
    }
    Ok(())
}
