//! Instances that nobody uses fall asleep by themselves, and never under a live client: real connections,
//! the kernel's own tracking of them, real guests.
use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Api, Case, Group, Sample, World,
    phases::{now_ms, parse_time},
    redis::Redis,
};
use http::Method;
use serde_json::{Value, json};

use crate::stateful;

mod boundary;
mod faults;
mod policy;
mod restart;
mod sdk;
mod wakefulness;

/// How long an instance may be idle here. Long enough for a loaded machine to look in between.
const TIMEOUT: Duration = Duration::from_secs(4);
/// For what takes no time of its own.
const PATIENCE: Duration = Duration::from_secs(90);

pub fn groups(sample: &Sample) -> Vec<Group> {
    let group = |hypervisor: &str, suffix: &str, cases: Vec<Case>| {
        let cases = cases.into_iter().map(patient).collect();
        Group::on(hypervisor, &format!("-auto-standby{suffix}"), cases)
    };
    let mut all = wakefulness::cases();
    all.extend(policy::cases());
    let mut restarts = restart::cases();
    restarts.extend(faults::cases());
    vec![
        group("qemu-microvm", "", all).calm(),
        group("qemu", "", wakefulness::cases()).calm(),
        group("qemu-microvm", "-restart", restarts).calm(),
        group("qemu-microvm", "-boundary", boundary::cases(sample)),
        group("qemu-microvm", "-sdk", sdk::cases()).calm(),
    ]
}

fn patient(case: Case) -> Case {
    case.deadline(Duration::from_secs(400))
}

fn on(timeout: Duration) -> Value {
    json!({"enabled": true, "idle_timeout": format!("{}ms", timeout.as_millis())})
}

/// A redis that keeps everything in memory only, with this policy.
fn forgetful(world: &World, stem: &str, policy: Value) -> Value {
    let mut request = stateful::demo(world, stem);
    request["cmd"] = json!([
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--appendonly",
        "no"
    ]);
    if !policy.is_null() {
        request["auto_standby"] = policy;
    }
    request
}

/// Boots one that answers, and that no policy puts to sleep yet.
async fn redis(world: &World, stem: &str) -> Result<(String, SocketAddr)> {
    world.api_with_demo().await?;
    let id = world.boot(forgetful(world, stem, Value::Null)).await?;
    let address = stateful::address(world, &id).await?;
    Redis::ready(address, PATIENCE).await?;
    Ok((id, address))
}

async fn set(api: &Api, id: &str, policy: &Value) -> Result<Value> {
    let body = json!({"auto_standby": policy});
    let path = format!("/instances/{id}");
    api.send(Method::PATCH, &path, Some(&body))
        .await?
        .expect(200)
}

async fn status(api: &Api, id: &str) -> Result<Value> {
    let path = format!("/instances/{id}/auto-standby/status");
    api.get(&path).await?.expect(200)
}

async fn hold(api: &Api, id: &str) -> Result<Value> {
    let path = format!("/instances/{id}/auto-standby/hold");
    api.post_empty(&path).await?.expect(200)
}

/// Status and reason.
fn pair(status: &Value) -> (&str, &str) {
    let text = |field: &str| status[field].as_str().unwrap_or("(none)");
    (text("status"), text("reason"))
}

/// Asks until it says so; the answer that did.
async fn reaches(api: &Api, id: &str, wanted: (&str, &str)) -> Result<Value> {
    let asking = async {
        loop {
            let status = status(api, id).await?;
            if pair(&status) == wanted {
                return anyhow::Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(status) => status,
        Err(_) => bail!("never {wanted:?}: {}", status(api, id).await?),
    }
}

/// Waits until it sleeps; when it was paused for that, Unix milliseconds, with auto-standby as the cause.
async fn falls_asleep(api: &Api, id: &str) -> Result<i128> {
    api.wait(id, "Standby", 90).await?;
    paused_at(api, id).await
}

async fn paused_at(api: &Api, id: &str) -> Result<i128> {
    let phases = api
        .get(&format!("/instances/{id}/phases"))
        .await?
        .expect(200)?;
    let changes = phases["transitions"].as_array().context("transitions")?;
    let paused = changes.iter().rev().find(|c| c["to"] == "paused");
    let paused = paused.with_context(|| format!("never paused: {phases}"))?;
    ensure!(paused["cause"] == "auto-standby", "{paused}");
    parse_time(paused["at"].as_str().context("at")?)
}

async fn restore(api: &Api, id: &str) -> Result<()> {
    let path = format!("/instances/{id}/restore");
    let answer = api.post_empty(&path).await?.expect(200)?;
    if answer["state"] != "Running" {
        api.wait(id, "Running", 90).await?;
    }
    Ok(())
}

/// For so long it must be Running whenever it is asked.
async fn stays_awake(api: &Api, id: &str, duration: Duration) -> Result<()> {
    let end = tokio::time::Instant::now() + duration;
    while tokio::time::Instant::now() < end {
        let instance = api.instance(id).await?;
        ensure!(
            instance["state"] == "Running",
            "it fell asleep: {instance}; {}",
            status(api, id).await?
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn ms(duration: Duration) -> i128 {
    i128::try_from(duration.as_millis()).unwrap_or(i128::MAX)
}

/// When an answer's moment lies, Unix milliseconds.
fn moment(status: &Value, field: &str) -> Result<i128> {
    let text = status[field].as_str();
    parse_time(text.with_context(|| format!("no {field}: {status}"))?)
}

/// Not earlier than one idle timeout after this.
fn not_before(paused: i128, quiet_since: i128, timeout: Duration) -> Result<()> {
    ensure!(
        paused >= quiet_since + ms(timeout),
        "paused {} ms after the last client had gone, before its timeout of {timeout:?} (now {})",
        paused - quiet_since,
        now_ms()
    );
    Ok(())
}
