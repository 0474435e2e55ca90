//! `doze standby`, `restore`, `drain`, `start --discard-memory`, and what `ps` says.
use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, exec};
use serde_json::Value;

use super::{asleep, awake};
use crate::cli::{Output, doze};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![cli_standby_and_restore, cli_drain]
}

/// A failed command says why in one line on stderr, and nothing on stdout.
fn failed(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    let said = format!("{}: {:?} {:?}", output.code, output.out, output.err);
    ensure!(output.code == code && output.out.is_empty(), "{said}");
    ensure!(output.err.trim_end().lines().count() == 1, "{said}");
    for word in words {
        ensure!(output.err.contains(word), "no {word:?}: {said}");
    }
    Ok(())
}

async fn cli_standby_and_restore(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("cli").await?;
    let name = api.instance(&id).await?["name"]
        .as_str()
        .context("name")?
        .to_owned();
    exec::sh(api, &id, "echo kept > /dev/shm/kept").await?;
    // Somebody else's command is in flight: its client hears why it ended.
    let script = "echo ready > /dev/shm/started; sleep 100000";
    let sleeper = async { doze(world, &["exec", &name, "sh", "-c", script]).await };
    let standby = async {
        let started = "while ! test -e /dev/shm/started; do sleep 0.05; done";
        exec::sh(api, &id, started).await?;
        doze(world, &["standby", &name]).await?.ok()
    };
    let (ended, said) = tokio::join!(sleeper, standby);
    ensure!(said?.trim() == name);
    failed(&ended?, 125, &["the instance was put to standby"])?;
    asleep(world, &id)?;
    let listed = doze(world, &["ps"]).await?.ok()?;
    let row = listed.lines().find(|line| line.contains(&name));
    ensure!(row.is_some_and(|row| row.contains("Standby")), "{listed}");
    let listed = doze(world, &["ps", "--state", "Standby", "--quiet"]).await?;
    ensure!(listed.ok()?.lines().any(|line| line == name));
    // Again changes nothing; what it cannot do while it sleeps says what to do.
    doze(world, &["standby", &id]).await?.ok()?;
    failed(
        &doze(world, &["stop", &name]).await?,
        1,
        &["Standby", "restore"],
    )?;
    failed(
        &doze(world, &["start", &name]).await?,
        1,
        &["Standby", "restore"],
    )?;
    let exec = doze(world, &["exec", &name, "true"]).await?;
    failed(&exec, 125, &["Standby", "restore"])?;
    ensure!(doze(world, &["restore", &name]).await?.ok()?.trim() == name);
    awake(world, &id)?;
    ensure!(exec::sh(api, &id, "cat /dev/shm/kept").await? == "kept");
    doze(world, &["restore", &name]).await?.ok()?;

    doze(world, &["standby", &name]).await?.ok()?;
    let discard = ["start", "--discard-memory", &name];
    ensure!(doze(world, &discard).await?.ok()?.trim() == name);
    exec::sh(api, &id, "! test -e /dev/shm/kept").await?;
    failed(
        &doze(world, &discard).await?,
        1,
        &["Running", "discard_memory"],
    )?;
    doze(world, &["stop", &name]).await?.ok()?;
    failed(
        &doze(world, &["standby", &name]).await?,
        1,
        &["Stopped", "start"],
    )?;
    failed(
        &doze(world, &["restore", &name]).await?,
        1,
        &["Stopped", "start"],
    )?;
    for verb in ["standby", "restore"] {
        let output = doze(world, &[verb, "no-such-instance"]).await?;
        failed(&output, 1, &["no-such-instance"])?;
    }
    // Of several that fail, each has its line.
    let output = doze(world, &["restore", "no-such-instance", &name]).await?;
    ensure!(
        output.code == 1 && output.err.lines().count() == 2,
        "{}",
        output.err
    );
    api.remove(&id).await
}

async fn cli_drain(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (awake_one, sleeper, off) = (
        world.boot_tiny("drained").await?,
        world.boot_tiny("sleeper").await?,
        world.boot_tiny("off").await?,
    );
    super::standby(world, &sleeper).await?;
    doze(world, &["stop", &off]).await?.ok()?;
    let report: Value = serde_json::from_str(&doze(world, &["drain", "--json"]).await?.ok()?)?;
    for (id, outcome) in [
        (&awake_one, "asleep"),
        (&sleeper, "was asleep"),
        (&off, "not running"),
    ] {
        let lines = report.as_array().context("report")?;
        let line = lines.iter().find(|line| line["id"] == id.as_str());
        ensure!(
            line.is_some_and(|line| line["outcome"] == outcome),
            "{report}"
        );
    }
    asleep(world, &awake_one)?;
    let again = doze(world, &["drain"]).await?.ok()?;
    for (id, outcome) in [(&awake_one, "was asleep"), (&off, "not running")] {
        let name = api.instance(id).await?["name"].clone();
        let name = name.as_str().context("name")?;
        let row = again.lines().find(|line| line.starts_with(name));
        ensure!(row.is_some_and(|row| row.contains(outcome)), "{again}");
    }
    ensure!(
        again.contains("0 put to sleep, ") && again.trim_end().ends_with(", 0 failed"),
        "{again}"
    );
    // What cannot sleep is said, and the rest sleeps all the same.
    super::restore(world, &awake_one).await?;
    super::restore(world, &sleeper).await?;
    world.server.stop().await?;
    let policy = [("DOZE_STANDBY__EXEC_SESSIONS", "refuse")];
    world.server.start_with(&policy).await?;
    let outcome = drain_meets_a_session(world, &awake_one, &sleeper).await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    for id in [&awake_one, &sleeper, &off] {
        api.remove(id).await?;
    }
    Ok(())
}

async fn drain_meets_a_session(world: &World, busy: &str, other: &str) -> Result<()> {
    let api = world.api().await?;
    api.wait(busy, "Running", 30).await?;
    let request = serde_json::json!({"command": ["sh", "-c", "echo ready; read x"], "tty": false});
    let mut session = exec::Exec::open(api, busy, &request).await?;
    session.until(|text| text.contains("ready")).await?;
    let output = doze(world, &["drain"]).await?;
    ensure!(
        output.code == 1
            && output.out.contains("1 put to sleep")
            && output.out.contains("1 failed")
            && output.out.contains("exec sessions"),
        "{}: {}{}",
        output.code,
        output.out,
        output.err
    );
    awake(world, busy)?;
    asleep(world, other)
}
