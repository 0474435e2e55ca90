//! The command line: the verbs people type, their exit codes, and what they find by themselves.
use std::{ffi::OsStr, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World};
use serde_json::Value;
use tokio::process::Command;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![cli_walk_through, cli_exit_codes, cli_errors]
}

pub struct Output {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Output {
    pub fn ok(self) -> Result<String> {
        ensure!(
            self.code == 0,
            "exit code {}: {}{}",
            self.code,
            self.out,
            self.err
        );
        Ok(self.out)
    }
}

pub async fn doze(world: &World, args: &[&str]) -> Result<Output> {
    let token = world.server.token().await?;
    let command = Command::new(&world.tools.doze)
        .args(args.iter().map(OsStr::new))
        .env("DOZE_URL", world.server.base_url())
        .env("DOZE_TOKEN", token)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(120), command)
        .await
        .with_context(|| format!("doze {args:?} hangs"))??;
    Ok(Output {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

async fn cli_walk_through(world: &World) -> Result<()> {
    let api = world.api().await?;
    let name = world.unique("cli");
    let out = doze(
        world,
        &["run", "-d", "--name", &name, "--memory", "256MB", "tiny"],
    )
    .await?
    .ok()?;
    let id = api.instance(&name).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    ensure!(
        out.contains(&id) || out.contains(&name),
        "run -d said {out:?}"
    );
    doze(world, &["wait", "--state", "Running", &name])
        .await?
        .ok()?;
    ensure!(doze(world, &["ps"]).await?.ok()?.contains(&name));
    let listed: Value = serde_json::from_str(&doze(world, &["ps", "--json"]).await?.ok()?)?;
    ensure!(
        listed
            .as_array()
            .is_some_and(|l| l.iter().any(|i| i["id"] == id.as_str())),
        "{listed}"
    );
    ensure!(
        doze(world, &["exec", &id[..12], "uname", "-s"])
            .await?
            .ok()?
            .trim()
            == "Linux"
    );
    // Running says that the program was started, not that it has said anything.
    let mut log = api.logs(&id, "?follow=true").await?;
    log.until(|l| l == "program runs", 30).await?;
    ensure!(
        doze(world, &["logs", &name])
            .await?
            .ok()?
            .contains("program runs")
    );
    let inspected: Value = serde_json::from_str(&doze(world, &["inspect", &name]).await?.ok()?)?;
    let shown = inspected
        .as_array()
        .and_then(|l| l.first())
        .unwrap_or(&inspected);
    ensure!(shown["id"] == id.as_str(), "{inspected}");
    doze(world, &["stop", &name]).await?.ok()?;
    ensure!(api.instance(&id).await?["state"] == "Stopped");
    doze(world, &["start", &name]).await?.ok()?;
    ensure!(matches!(
        api.instance(&id).await?["state"].as_str(),
        Some("Initializing" | "Running")
    ));
    ensure!(doze(world, &["image", "ls"]).await?.ok()?.contains("tiny"));
    doze(world, &["rm", "-f", &name]).await?.ok()?;
    api.get(&format!("/instances/{id}"))
        .await?
        .refused(404, "not_found", &[])
}

/// The command's own exit code is the CLI's.
async fn cli_exit_codes(world: &World) -> Result<()> {
    let api = world.api().await?;
    let pet = world.pet().await?;
    for code in [0, 7, 127] {
        let output = doze(world, &["exec", pet, "sh", "-c", &format!("exit {code}")]).await?;
        ensure!(
            output.code == code,
            "exit {code} came back as {}: {}",
            output.code,
            output.err
        );
    }
    let name = world.unique("cli-run");
    let output = doze(
        world,
        &[
            "run",
            "--name",
            &name,
            "--size",
            "256MB",
            "tiny",
            "/bin/sh",
            "-c",
            "echo from the guest; exit 6",
        ],
    )
    .await?;
    ensure!(
        output.code == 6,
        "run came back with {}: {}{}",
        output.code,
        output.out,
        output.err
    );
    ensure!(output.out.contains("from the guest"), "{:?}", output.out);
    api.remove(&name).await
}

async fn cli_errors(world: &World) -> Result<()> {
    world.api().await?;
    let output = doze(world, &["exec", "no-such-instance", "true"]).await?;
    ensure!(
        output.code != 0 && output.err.contains("no-such-instance"),
        "{} {}",
        output.code,
        output.err
    );
    let output = doze(world, &["stop", "no-such-instance"]).await?;
    ensure!(
        output.code != 0 && output.err.contains("no-such-instance"),
        "{} {}",
        output.code,
        output.err
    );
    let output = doze(world, &["run", "nothing/like:this"]).await?;
    ensure!(
        output.code != 0 && output.err.contains("nothing/like"),
        "{} {}",
        output.code,
        output.err
    );
    ensure!(!output.err.contains("panicked"), "{}", output.err);
    Ok(())
}
