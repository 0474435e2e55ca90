//! Commands that meet a standby or a restore in flight, at moments that nobody chose.
//!
//! Whatever the moment: each caller gets an answer that fits the admission table (docs/lifecycle.md), the
//! instance ends where the answers say, a guest that is awake still knows what it knew, and there are never
//! two VMMs for one instance.
use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use doze_e2e::{Api, Case, Reply, World, checks, exec, procs, redis::Redis};
use http::Method;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, sync::watch, task::JoinHandle};

use super::{asleep, awake, forgetful, restore, standby, vmms};
use crate::stateful;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        restore_meets_standby,
        stop_meets_standby,
        delete_meets_standby,
        delete_meets_restore,
        equal_and_opposite_commands,
        callers_hang_up,
    ]
}

/// Looks all the time whether an instance has two VMMs.
struct Watch {
    stop: watch::Sender<bool>,
    task: JoinHandle<Result<()>>,
}

impl Watch {
    fn over(world: &World, id: &str) -> Self {
        let (stop, mut stopped) = watch::channel(false);
        let (data_dir, id) = (world.server.data_dir.clone(), id.to_owned());
        let task = tokio::spawn(async move {
            loop {
                let all = procs::vmms(&data_dir)?;
                let own: Vec<_> = all.iter().filter(|v| v.instance == id).collect();
                ensure!(own.len() <= 1, "two VMMs of {id}: {own:?}");
                let pause = Duration::from_millis(20);
                if tokio::time::timeout(pause, stopped.wait_for(|stop| *stop))
                    .await
                    .is_ok()
                {
                    return Ok(());
                }
            }
        });
        Self { stop, task }
    }

    async fn finish(self) -> Result<()> {
        self.stop.send_replace(true);
        self.task.await?
    }
}

/// A random moment within the given part, one of `parts`, of the time that an operation takes.
fn moment(took: Duration, part: u32, parts: u32) -> Duration {
    // The standard library's only source of random bits: the keys of its hash maps.
    let random = RandomState::new().hash_one(part) % 1000;
    let within = u32::try_from(random).unwrap_or(0);
    took * (part * 1000 + within) / (parts * 1000)
}

async fn post(api: &Api, id: &str, verb: &str) -> Result<Reply> {
    api.post_empty(&format!("/instances/{id}/{verb}")).await
}

/// `first` at once, `second` when it has been on its way for a while; both answers.
async fn meet(
    api: &Api,
    id: &str,
    first: &str,
    second: &str,
    after: Duration,
) -> Result<(Reply, Reply)> {
    let later = async {
        tokio::time::sleep(after).await;
        match second {
            "delete" => api.delete(&format!("/instances/{id}")).await,
            verb => post(api, id, verb).await,
        }
    };
    let (first, second) = tokio::join!(post(api, id, first), later);
    Ok((first?, second?))
}

async fn state(api: &Api, id: &str) -> Result<String> {
    let instance = api.instance(id).await?;
    Ok(instance["state"].as_str().context("state")?.to_owned())
}

/// How long a standby and a restore take here and now.
async fn times(world: &World, id: &str) -> Result<(Duration, Duration)> {
    let begin = Instant::now();
    standby(world, id).await?;
    let slept = begin.elapsed();
    restore(world, id).await?;
    Ok((slept, begin.elapsed() - slept))
}

/// What the caller of an operation is told that another command put an end to.
fn interrupted(reply: &Reply) -> Result<()> {
    reply.refused(409, "conflict", &[])
}

async fn restore_meets_standby(world: &World) -> Result<()> {
    const PARTS: u32 = 8;
    let api = world.api_with_demo().await?;
    let id = world.boot(forgetful(world, "met")).await?;
    let address = stateful::address(world, &id).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    let (took, _) = times(world, &id).await?;
    let watch = Watch::over(world, &id);
    let (mut given_up, mut woken) = (0, 0);
    for part in 0..PARTS {
        let after = moment(took, part, PARTS);
        let work = async {
            let (slept, restored) = meet(api, &id, "standby", "restore", after).await?;
            let restored = restored.expect(200)?;
            match (slept.status, state(api, &id).await?.as_str()) {
                // Interrupted before the commit: the guest went on.
                (409, "Running") => {
                    interrupted(&slept)?;
                    given_up += 1;
                }
                // Beyond it: the standby completed, then the restore began.
                (200, "Running") => {
                    ensure!(restored["state"] == "Running", "{restored}");
                    woken += 1;
                }
                // The restore came first and changed nothing.
                (200, "Standby") => {
                    ensure!(restored["state"] == "Running", "{restored}");
                    restore(world, &id).await?;
                }
                (status, state) => bail!("standby: {status} {}; then {state}", slept.text),
            }
            awake(world, &id)?;
            // The same connection, and the count goes on: this memory, not another.
            ensure!(redis.command(&["INCR", "met"]).await? == (part + 1).to_string());
            anyhow::Ok(())
        };
        work.await
            .with_context(|| format!("{after:?} of {took:?}"))?;
    }
    watch.finish().await?;
    println!("    {}: {given_up} given up, {woken} completed", world.name);
    ensure!(given_up > 0, "no restore ever met a standby in flight");
    // And nothing of it is in the way of the next.
    standby(world, &id).await?;
    restore(world, &id).await?;
    ensure!(redis.command(&["GET", "met"]).await? == PARTS.to_string());
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn stop_meets_standby(world: &World) -> Result<()> {
    const PARTS: u32 = 4;
    let api = world.api().await?;
    let id = world.boot_tiny("met").await?;
    let (took, _) = times(world, &id).await?;
    let watch = Watch::over(world, &id);
    for part in 0..PARTS {
        exec::sh(api, &id, &format!("echo {part} > /dev/shm/kept")).await?;
        let after = moment(took, part, PARTS);
        let work = async {
            let (slept, stopped) = meet(api, &id, "standby", "stop", after).await?;
            match state(api, &id).await?.as_str() {
                // Interrupted, or never begun because the stop came first.
                "Stopped" => {
                    ensure!(stopped.expect(200)?["state"] == "Stopped");
                    ensure!(slept.status == 409, "{} {}", slept.status, slept.text);
                    ensure!(vmms(world, &id)?.is_empty());
                    post(api, &id, "start").await?.expect(200)?;
                    api.wait(&id, "Running", 90).await?;
                }
                // Committed: what sleeps is not stopped.
                "Standby" => {
                    slept.expect(200)?;
                    stopped.refused(409, "invalid_state", &["Standby", "restore it first"])?;
                    asleep(world, &id)?;
                    restore(world, &id).await?;
                    let kept = exec::sh(api, &id, "cat /dev/shm/kept").await?;
                    ensure!(kept == part.to_string(), "{kept}");
                }
                other => bail!("it is {other}; {}; {}", slept.text, stopped.text),
            }
            awake(world, &id)
        };
        work.await
            .with_context(|| format!("{after:?} of {took:?}"))?;
    }
    watch.finish().await?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

/// The answer of a command whose instance was deleted under it.
fn deleted_under(reply: &Reply) -> Result<()> {
    match (reply.status, reply.body["code"].as_str()) {
        (200, _) | (409, Some("conflict" | "invalid_state")) | (404, Some("not_found")) => Ok(()),
        _ => Err(anyhow!(
            "{}: {} {}",
            reply.request,
            reply.status,
            reply.text
        )),
    }
}

async fn delete_meets_standby(world: &World) -> Result<()> {
    let api = world.api().await?;
    for part in 0..3 {
        let before = world.footprint()?;
        let id = world.boot_tiny("met").await?;
        let (took, _) = times(world, &id).await?;
        let watch = Watch::over(world, &id);
        let after = moment(took, part, 3);
        let (slept, deleted) = meet(api, &id, "standby", "delete", after).await?;
        watch.finish().await?;
        vanished(world, &before, &slept, &deleted)
            .with_context(|| format!("{after:?} of {took:?}"))?;
    }
    Ok(())
}

async fn delete_meets_restore(world: &World) -> Result<()> {
    let api = world.api().await?;
    for part in 0..3 {
        let before = world.footprint()?;
        let id = world.boot_tiny("met").await?;
        let (_, took) = times(world, &id).await?;
        standby(world, &id).await?;
        let watch = Watch::over(world, &id);
        let after = moment(took, part, 3);
        let (woken, deleted) = meet(api, &id, "restore", "delete", after).await?;
        watch.finish().await?;
        vanished(world, &before, &woken, &deleted)
            .with_context(|| format!("{after:?} of {took:?}"))?;
    }
    Ok(())
}

fn vanished(
    world: &World,
    before: &procs::Footprint,
    first: &Reply,
    deleted: &Reply,
) -> Result<()> {
    ensure!(deleted.status == 204, "{} {}", deleted.status, deleted.text);
    deleted_under(first)?;
    let left = world.footprint()?.new_since(before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// Two that want the same share one operation; of two that want the opposite, the later one waits.
async fn equal_and_opposite_commands(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("pairs").await?;
    exec::sh(api, &id, "echo kept > /dev/shm/kept").await?;
    let (_, took) = times(world, &id).await?;
    let watch = Watch::over(world, &id);
    for (verb, wanted) in [("standby", "Standby"), ("restore", "Running")] {
        let (one, two) = meet(api, &id, verb, verb, took / 10).await?;
        for reply in [one, two] {
            let answer = reply.expect(200)?;
            ensure!(answer["state"] == wanted, "{answer}");
        }
    }
    standby(world, &id).await?;
    // In the middle of a restore: it completes, then the guest sleeps again, or stops.
    let (woken, slept) = meet(api, &id, "restore", "standby", took / 2).await?;
    woken.expect(200)?;
    ensure!(slept.expect(200)?["state"] == "Standby");
    asleep(world, &id)?;
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    standby(world, &id).await?;
    let (woken, stopped) = meet(api, &id, "restore", "stop", took / 2).await?;
    woken.expect(200)?;
    ensure!(stopped.expect(200)?["state"] == "Stopped");
    watch.finish().await?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

/// Sends a whole request without body and gives the connection, on which nothing was read.
async fn request(api: &Api, method: &Method, path: &str) -> Result<TcpStream> {
    let host = api.base.trim_start_matches("http://");
    let token = api.token.as_deref().context("token")?;
    let mut stream = TcpStream::connect(host).await?;
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nContent-Length: 0\r\n\r\n"
    );
    stream.write_all(text.as_bytes()).await?;
    Ok(stream)
}

/// Returns when the instance is in another state than this one: something is in flight, or done.
async fn leaves(api: &Api, id: &str, old: &str) -> Result<()> {
    let change = async {
        while state(api, id).await? == old {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), change)
        .await
        .with_context(|| format!("it stays {old}"))?
}

/// Nobody is left to hear the answer: the operation completes all the same.
async fn callers_hang_up(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("hung-up").await?;
    exec::sh(api, &id, "echo kept > /dev/shm/kept").await?;
    let watch = Watch::over(world, &id);
    let path = |verb: &str| format!("/instances/{id}/{verb}");
    for _ in 0..3 {
        let caller = request(api, &Method::POST, &path("standby")).await?;
        leaves(api, &id, "Running").await?;
        drop(caller);
        api.wait(&id, "Standby", 30).await?;
        asleep(world, &id)?;
        let caller = request(api, &Method::POST, &path("restore")).await?;
        leaves(api, &id, "Standby").await?;
        drop(caller);
        api.wait(&id, "Running", 30).await?;
        ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    }
    watch.finish().await?;
    let before = checks::agree(api, &world.server).await?.len();
    standby(world, &id).await?;
    let caller = request(api, &Method::DELETE, &format!("/instances/{id}")).await?;
    let gone = async {
        while api.get(&format!("/instances/{id}")).await?.status != 404 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await??;
    drop(caller);
    ensure!(checks::agree(api, &world.server).await?.len() == before - 1);
    Ok(())
}
