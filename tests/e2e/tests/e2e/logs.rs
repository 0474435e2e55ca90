//! Logs as Server-Sent Events.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![logs_tail, logs_follow, logs_sources, logs_odd_lines]
}

async fn logs_tail(world: &World) -> Result<()> {
    let api = world.api().await?;
    let script = "i=1; while test $i -le 200; do echo line $i; i=$((i+1)); done; exec sleep 100000";
    let id = world
        .boot(world.tiny_running("tail", &["/bin/sh", "-c", script]))
        .await?;
    api.logs(&id, "?follow=true")
        .await?
        .until(|l| l == "line 200", 60)
        .await?;
    let all = api.log_lines(&id, "?source=app&tail=1000").await?;
    let numbered: Vec<String> = (1..=200).map(|i| format!("line {i}")).collect();
    ensure!(
        all == numbered,
        "{} lines: {:?} ...",
        all.len(),
        all.first()
    );
    ensure!(api.log_lines(&id, "?tail=3").await? == numbered[197..]);
    ensure!(api.log_lines(&id, "?tail=0").await?.is_empty());
    api.get(&format!("/instances/{id}/logs?tail=-1"))
        .await?
        .refused(400, "invalid_field", &["tail", "-1"])?;
    api.get(&format!("/instances/{id}/logs?source=kernel"))
        .await?
        .refused(400, "invalid_field", &["source", "kernel"])?;
    // They outlive the machine, and the next run's lines come after them.
    api.post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    ensure!(api.log_lines(&id, "?tail=1000").await?.len() >= 200);
    api.remove(&id).await
}

async fn logs_follow(world: &World) -> Result<()> {
    let api = world.api().await?;
    let script = "i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.3; done";
    let id = world
        .boot(world.tiny_running("follow", &["/bin/sh", "-c", script]))
        .await?;
    let mut stream = api.logs(&id, "?follow=true&tail=1").await?;
    let number = |line: &str| {
        line.strip_prefix("tick ")
            .and_then(|n| n.parse::<u64>().ok())
    };
    let first = stream.until(|l| number(l).is_some(), 30).await?;
    let first = number(&first).context("no number")?;
    // New lines, none lost, none twice.
    for expected in first + 1..first + 9 {
        let next = stream.until(|_| true, 30).await?;
        ensure!(
            number(&next) == Some(expected),
            "before tick {expected} came {next:?}"
        );
    }
    // A delete ends the stream properly.
    api.remove(&id).await?;
    let end = async {
        while stream.next().await?.is_some() {}
        anyhow::Ok(())
    };
    tokio::time::timeout(Duration::from_secs(20), end)
        .await
        .map_err(|_| anyhow::anyhow!("the stream outlives its instance"))?
}

async fn logs_sources(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let mut log = api.logs(id, "?source=app&follow=true").await?;
    log.until(|l| l == "program runs", 30).await?;
    let app = api.log_lines(id, "?source=app").await?;
    ensure!(app.iter().any(|l| l == "program runs"), "app: {app:?}");
    // The guest's console and the monitor's own words; under `quiet` there may be few, never the program's.
    let vmm = api.log_lines(id, "?source=vmm").await?;
    ensure!(
        !vmm.iter().any(|l| l == "program runs"),
        "the program's output is in the VMM's log"
    );
    let operations = api.log_lines(id, "?source=hypeman").await?;
    ensure!(
        operations
            .iter()
            .any(|l| l.to_lowercase().contains("create")),
        "operations: {operations:?}"
    );
    ensure!(
        operations.iter().any(|l| l.contains("Running")),
        "operations: {operations:?}"
    );
    Ok(())
}

/// Quotes, control characters, invalid UTF-8, a very long line, and one without newline.
async fn logs_odd_lines(world: &World) -> Result<()> {
    let api = world.api().await?;
    let script = "printf 'quote \" back \\\\ tab \\t bell \\a\\n\\n'; printf 'bad \\377 byte\\n'; printf 'snow \\342\\230\\203\\n'; \
                  head -c 100000 /dev/zero | tr '\\0' x; echo; echo done; exec sleep 100000";
    let id = world
        .boot(world.tiny_running("odd", &["/bin/sh", "-c", script]))
        .await?;
    api.logs(&id, "?follow=true")
        .await?
        .until(|l| l == "done", 60)
        .await?;
    let lines = api.log_lines(&id, "").await?;
    for wanted in [
        "quote \" back \\ tab \t bell \u{7}",
        "",
        "bad \u{fffd} byte",
        "snow \u{2603}",
        "done",
    ] {
        ensure!(
            lines.iter().any(|l| l == wanted),
            "{wanted:?} is not among the lines"
        );
    }
    let long: usize = lines
        .iter()
        .filter(|l| l.len() > 1000)
        .map(String::len)
        .sum();
    ensure!(long == 100_000, "the long line came back with {long} bytes");
    api.remove(&id).await
}
