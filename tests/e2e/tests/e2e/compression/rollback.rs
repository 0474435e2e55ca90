//! Going back in place while jobs work at the instance's memory and at the snapshot's. A compressor that outlived
//! the folder it reads would remove the raw file that has come into its place; then the memory is another, or gone.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Case, Sample, Witness, World,
    compression::{Account, balanced, forms, quiet, snapshot_reaches},
    exec,
    sample::Random,
};
use serde_json::json;

use super::{
    CODECS, Codec, all_is_well, codec, drop_snapshot, fork, guest, moments::MIB, only, sleep,
    snapshot_dir, take, text, wake,
};
use crate::{crash_standby::act, standby_faults::BOARDS};

/// Long enough at work for somebody to come, and not longer.
const STEADY: Codec = codec("zstd", 7);
/// Beyond what the slowest guest needs to do anything.
const JITTER: usize = 2500;

pub fn cases(sample: &Sample, board: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    let chosen = sample.random("rollback").below(2);
    if sample.campaign || board == chosen {
        cases.extend(doze_e2e::cases![in_place_while_both_jobs_work]);
    }
    if sample.campaign || board != chosen {
        let (random, rounds, mib) = match sample.campaign {
            // On each board.
            true => (sample.random(BOARDS[board]), 50, MIB),
            false => (sample.random(BOARDS[board]), 5, 64),
        };
        cases.push(Case::new("at_any_moment", move |world: &World| {
            Box::pin(at_any_moment(world, random.clone(), rounds, mib))
        }));
    }
    cases
}

async fn in_place_while_both_jobs_work(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "mixed", MIB).await?;
    let before = balanced(api).await?;
    exec::sh(api, &id, "rm -f /dev/shm/later").await?;
    let body = json!({"kind": "Standby", "compression": STEADY.request()});
    let made = take(api, &id, body).await?;
    let snapshot = text(&made, "id")?;
    exec::sh(api, &id, "echo later > /dev/shm/later").await?;
    sleep(api, &id, json!({"compression": STEADY.request()})).await?;
    let both = async {
        while balanced(api).await?.sum("", |jobs| jobs.active) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), both)
        .await
        .context("both jobs at work")??;
    let back = format!("/instances/{id}/snapshots/{snapshot}/restore");
    let answer = api
        .post(&back, json!({"target_state": "Standby"}))
        .await?
        .expect(200)?;
    // Its own plan went with its memory, and nobody wants what has come compressed.
    ensure!(
        answer["state"] == "Standby" && answer["standby_compression"].is_null(),
        "{answer}"
    );
    let account = quiet(api, 300).await?;
    only(world, &id, "memory")?;
    wake(world, &id).await?;
    is_the_snapshots(world, &id, &witness)
        .await
        .context("after both jobs")?;
    for source in ["standby", "snapshot"] {
        let key = (source.to_owned(), "snapshot_restore".to_owned());
        let came = |account: &Account| account.preemptions.get(&key).copied().unwrap_or_default();
        ensure!(came(&account) == came(&before) + 1, "{source}: {account:?}");
    }
    // The snapshot's job began again, and what it made is as good.
    let compressed = snapshot_reaches(api, &snapshot, &["compressed"], 300).await?;
    let found = forms(&snapshot_dir(world, &snapshot))?;
    ensure!(found == [STEADY.artefact()], "{found:?}: {compressed}");
    exec::sh(api, &id, "echo later > /dev/shm/later").await?;
    let answer = api
        .post(&back, json!({"target_state": "Running"}))
        .await?
        .expect(200)?;
    ensure!(answer["state"] == "Running", "{answer}");
    is_the_snapshots(world, &id, &witness)
        .await
        .context("from the artefact")?;
    drop_snapshot(api, &snapshot).await?;
    all_is_well(world).await
}

async fn is_the_snapshots(world: &World, id: &str, witness: &Witness) -> Result<()> {
    let api = world.api().await?;
    witness.survived(api, id).await?;
    exec::sh(api, id, "test ! -e /dev/shm/later")
        .await
        .map(drop)
}

/// Random waits between falling asleep, whoever comes, and the awakening.
async fn at_any_moment(world: &World, mut random: Random, rounds: usize, mib: u32) -> Result<()> {
    let (mut done, mut next) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if next.is_empty() {
            // Each has come before any comes again.
            next = random.choose(COMES.to_vec(), COMES.len());
        }
        let comes = next.pop().unwrap_or(Comes::Restore);
        let order = Order::draw(&mut random, comes);
        one_round(world, order, mib)
            .await
            .with_context(|| format!("round {round}: {order:?}"))?;
        done.push(format!("{:?} after {} ms", order.comes, order.first));
    }
    println!("    {}: {}", world.name, done.join(", "));
    all_is_well(world).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comes {
    Restore,
    ForkAsleep,
    ForkAwake,
    Snapshot,
    Rollback,
    RollbackAwake,
    Stop,
    Discard,
    Delete,
}

const COMES: [Comes; 9] = [
    Comes::Restore,
    Comes::ForkAsleep,
    Comes::ForkAwake,
    Comes::Snapshot,
    Comes::Rollback,
    Comes::RollbackAwake,
    Comes::Stop,
    Comes::Discard,
    Comes::Delete,
];
const DELAYS: [&str; 3] = ["0s", "300ms", "1h"];

#[derive(Debug, Clone, Copy)]
struct Order {
    codec: Codec,
    /// Of the snapshot, if there is one.
    stored: Codec,
    delay: &'static str,
    /// Milliseconds until somebody comes.
    first: usize,
    comes: Comes,
    /// And until it is woken.
    second: usize,
}

impl Order {
    fn draw(random: &mut Random, comes: Comes) -> Order {
        Order {
            codec: CODECS[random.below(CODECS.len())],
            stored: CODECS[random.below(CODECS.len())],
            delay: DELAYS[random.below(DELAYS.len())],
            first: random.below(JITTER),
            comes,
            second: random.below(JITTER),
        }
    }
}

async fn one_round(world: &World, order: Order, mib: u32) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "restless", mib).await?;
    exec::sh(api, &id, "rm -f /dev/shm/later").await?;
    let stored = json!({"kind": "Standby", "compression": order.stored.request()});
    let mut snapshot = None;
    if matches!(order.comes, Comes::Rollback | Comes::RollbackAwake) {
        snapshot = Some(text(&take(api, &id, stored.clone()).await?, "id")?);
        exec::sh(api, &id, "echo later > /dev/shm/later").await?;
    }
    let body = json!({"compression": order.codec.request(), "compression_delay": order.delay});
    sleep(api, &id, body).await?;
    jitter(order.first).await;
    let mut copy = None;
    let as_fork = format!("/instances/{id}/fork");
    let back = |target: &str| {
        let path = snapshot.as_deref().unwrap_or_default();
        let path = format!("/instances/{id}/snapshots/{path}/restore");
        (path, json!({"target_state": target}))
    };
    match order.comes {
        Comes::Restore => wake(world, &id).await?,
        Comes::ForkAsleep => copy = Some(fork(world, &as_fork, "Standby").await?.0),
        Comes::ForkAwake => copy = Some(fork(world, &as_fork, "Running").await?.0),
        Comes::Snapshot => snapshot = Some(text(&take(api, &id, stored).await?, "id")?),
        Comes::Rollback => {
            let (path, body) = back("Standby");
            api.post(&path, body).await?.expect(200)?;
        }
        Comes::RollbackAwake => {
            let (path, body) = back("Running");
            api.post(&path, body).await?.expect(200)?;
        }
        // Refused, and whoever comes afterwards finds the memory as it was.
        Comes::Stop => api
            .post_empty(&format!("/instances/{id}/stop"))
            .await?
            .refused(409, "invalid_state", &["Standby"])?,
        Comes::Discard => {
            act(api, &id, "start", Some(json!({"discard_memory": true}))).await?;
            api.wait(&id, "Running", 90).await?;
            return witness.lost_but_disk_kept(api, &id).await;
        }
        Comes::Delete => return api.remove(&id).await,
    }
    jitter(order.second).await;
    if let Some(copy) = copy {
        act(api, &copy, "restore", None).await?;
        witness.survived(api, &copy).await.context("the fork")?;
        api.remove(&copy).await?;
    }
    if api.instance(&id).await?["state"] == "Standby" {
        wake(world, &id).await?;
    }
    is_the_snapshots(world, &id, &witness).await?;
    if let Some(snapshot) = snapshot {
        let path = format!("/snapshots/{snapshot}/fork");
        let (copy, _) = fork(world, &path, "Running").await?;
        is_the_snapshots(world, &copy, &witness)
            .await
            .context("the snapshot")?;
        api.remove(&copy).await?;
        drop_snapshot(api, &snapshot).await?;
    }
    only(world, &id, "memory")?;
    balanced(api).await.map(drop)
}

async fn jitter(milliseconds: usize) {
    tokio::time::sleep(Duration::from_millis(milliseconds as u64)).await;
}
