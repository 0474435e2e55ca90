//! kill -9 of the server at every named point inside create, start, stop and delete; `crash_standby` has
//! those inside standby and restore, `crash_copies` those inside snapshot, fork and rollback, `crash_compression`
//! those of compressed memory.
//!
//! The server kills itself when it reaches the point that `DOZE_KILL_AT` names. After a restart
//! without it, what the API says, processes, TAPs and files must agree, and the instance must be
//! either gone or fully usable. One case per point and operation; a point without a case fails the
//! run, and so does a case whose point was never reached.
use std::{process::Command, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use doze_e2e::{Api, Case, Group, World, checks, exec, preflight::Tools, procs};
use serde_json::json;

use crate::{crash_compression, crash_copies, crash_standby};

/// What is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    Start,
    Stop,
    DeleteRunning,
    DeleteStopped,
    DeleteGracefully,
}

impl Operation {
    const ALL: [Self; 6] = [
        Self::Create,
        Self::Start,
        Self::Stop,
        Self::DeleteRunning,
        Self::DeleteStopped,
        Self::DeleteGracefully,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::DeleteRunning => "delete_running",
            Self::DeleteStopped => "delete_stopped",
            Self::DeleteGracefully => "delete_gracefully",
        }
    }

    /// Whether this operation passes the point. Points are named after the operation they are in;
    /// `launch` is what create and start share.
    fn passes(self, point: &str) -> bool {
        let part = point.split('.').next().unwrap_or_default();
        match self {
            Self::Create => matches!(part, "create" | "launch"),
            // Where it gives memory up is `crash_standby`'s.
            Self::Start => matches!(part, "start" | "launch") && point != "start.memory_discarded",
            Self::Stop => part == "stop",
            Self::DeleteRunning => part == "delete",
            // No machine: nothing to kill.
            Self::DeleteStopped => part == "delete" && !point.contains("machine"),
            Self::DeleteGracefully => part == "delete" && point.contains("machine"),
        }
    }
}

/// Names of all points, from the executable itself.
pub fn kill_points(tools: &Tools) -> Result<Vec<String>> {
    let output = Command::new(&tools.doze)
        .args(["debug", "kill-points"])
        .output()
        .context("doze debug kill-points")?;
    ensure!(
        output.status.success(),
        "doze debug kill-points: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let points: Vec<String> = String::from_utf8(output.stdout)?
        .lines()
        .map(str::to_owned)
        .collect();
    ensure!(!points.is_empty(), "doze debug kill-points prints none");
    Ok(points)
}

/// All points on `qemu-microvm`; on `qemu`, where only the monitor's part differs, those around it.
pub fn groups(points: &[String]) -> Result<Vec<Group>> {
    for point in points {
        ensure!(
            Operation::ALL.iter().any(|op| op.passes(point))
                || crash_standby::covers(point)
                || crash_copies::covers(point)
                || crash_compression::covers(point),
            "no operation is known to pass kill point {point:?}"
        );
    }
    let mut groups = Vec::new();
    for operation in Operation::ALL {
        groups.push(group(
            "qemu-microvm",
            operation,
            points.iter().filter(|p| operation.passes(p)),
        ));
    }
    let monitor = [
        "launch.spawned",
        "launch.resumed",
        "stop.guest_asked",
        "delete.machine_killed",
    ];
    for operation in [Operation::Start, Operation::Stop, Operation::DeleteRunning] {
        let chosen = points
            .iter()
            .filter(|p| operation.passes(p) && monitor.contains(&p.as_str()));
        groups.push(group("qemu", operation, chosen));
    }
    ensure!(
        groups.iter().all(|g| !g.cases.is_empty()),
        "an operation has no kill point"
    );
    Ok(groups)
}

fn group<'a>(
    hypervisor: &str,
    operation: Operation,
    points: impl Iterator<Item = &'a String>,
) -> Group {
    let case = |point: &String| {
        let point = point.clone();
        Case::new(point.clone(), move |world| {
            let point = point.clone();
            Box::pin(async move { crash(world, operation, &point).await })
        })
    };
    let suffix = format!("-kill9-{}", operation.name());
    Group::on(hypervisor, &suffix, points.map(case).collect())
}

async fn crash(world: &World, operation: Operation, point: &str) -> Result<()> {
    let api = world.api().await?;
    let bystander = world.pet().await?.to_owned();
    let bystander_vmm = vmm_count(world, &bystander)?;
    let name = world.unique("victim");
    prepare(world, api, operation, &name).await?;

    world.server.stop().await?;
    world.server.start_with(&[("DOZE_KILL_AT", point)]).await?;
    let answer = act(world, api, operation, &name).await;
    let died = world
        .server
        .died(Duration::from_secs(if answer.is_ok() { 5 } else { 30 }))
        .await?;
    if !died {
        world.server.stop().await?;
        world.server.start().await?;
        bail!("{operation:?} never reached {point}; its answer was {answer:?}");
    }
    world.server.start().await?;

    settle(api).await?;
    let instances = checks::agree(api, &world.server).await?;
    ensure!(
        vmm_count(world, &bystander)? == bystander_vmm,
        "the bystander's VMMs changed"
    );
    match instances.iter().find(|i| i["name"] == name.as_str()) {
        // A create or delete may have been taken to its end or undone; then nothing may be left, which
        // `agree` has checked, and the name is free again.
        None => ensure!(
            !matches!(operation, Operation::Start | Operation::Stop),
            "a {operation:?} made the instance disappear"
        ),
        Some(instance) => {
            usable(api, &name, instance["state"].as_str().unwrap_or_default()).await?
        }
    }
    // The operation can be done again, to its end this time.
    let request = tiny(world, &name);
    if operation == Operation::Create && !instances.iter().any(|i| i["name"] == name.as_str()) {
        let id = world.boot(request).await?;
        usable(api, &id, "Running").await?;
    }
    let reply = api.delete(&format!("/instances/{name}")).await?;
    ensure!(
        matches!(reply.status, 204 | 404),
        "delete afterwards: {} {}",
        reply.status,
        reply.text
    );
    checks::agree(api, &world.server).await?;
    Ok(())
}

fn tiny(world: &World, name: &str) -> serde_json::Value {
    let mut request = world.tiny("victim");
    request["name"] = json!(name);
    request
}

/// Brings the instance to where the operation begins.
async fn prepare(world: &World, api: &Api, operation: Operation, name: &str) -> Result<()> {
    match operation {
        Operation::Create => return Ok(()),
        Operation::Start | Operation::Stop | Operation::DeleteRunning => {}
        Operation::DeleteStopped | Operation::DeleteGracefully => {}
    }
    let id = world.boot(tiny(world, name)).await?;
    exec::sh(api, &id, "echo kept > /root/kept && sync").await?;
    if matches!(operation, Operation::Start | Operation::DeleteStopped) {
        api.post_empty(&format!("/instances/{id}/stop"))
            .await?
            .expect(200)?;
    }
    Ok(())
}

/// Does the operation; the answer is an error when the server died under it.
async fn act(world: &World, api: &Api, operation: Operation, name: &str) -> Result<()> {
    let (reply, wanted) = match operation {
        Operation::Create => (api.post("/instances", tiny(world, name)).await?, 201),
        Operation::Start => (
            api.post_empty(&format!("/instances/{name}/start")).await?,
            200,
        ),
        Operation::Stop => (
            api.post_empty(&format!("/instances/{name}/stop")).await?,
            200,
        ),
        Operation::DeleteRunning | Operation::DeleteStopped => {
            (api.delete(&format!("/instances/{name}")).await?, 204)
        }
        Operation::DeleteGracefully => (
            api.delete(&format!("/instances/{name}?graceful_shutdown=true"))
                .await?,
            204,
        ),
    };
    if reply.status == wanted {
        Ok(())
    } else {
        Err(anyhow!("{} {}", reply.status, reply.text))
    }
}

/// A restarted server may still be booting a guest or stopping one: waits until every instance rests.
async fn settle(api: &Api) -> Result<()> {
    for _ in 0..300 {
        let instances = api.instances().await?;
        if instances
            .iter()
            .all(|i| matches!(i["state"].as_str(), Some("Running" | "Stopped")))
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!(
        "after a minute some instance neither runs nor rests: {:?}",
        api.instances().await?
    )
}

/// A Running one executes; a Stopped one starts, and has its data.
async fn usable(api: &Api, name: &str, state: &str) -> Result<()> {
    match state {
        "Running" => {}
        "Stopped" => {
            api.post_empty(&format!("/instances/{name}/start"))
                .await?
                .expect(200)?;
            api.wait(name, "Running", 90).await?;
        }
        other => bail!("{name} is {other} after the restart"),
    }
    ensure!(exec::sh(api, name, "echo alive").await? == "alive");
    let kept = exec::sh(api, name, "cat /root/kept 2>/dev/null || echo none").await?;
    ensure!(kept == "kept" || kept == "none", "{kept}");
    Ok(())
}

fn vmm_count(world: &World, id: &str) -> Result<Vec<i32>> {
    Ok(procs::vmms(&world.server.data_dir)?
        .into_iter()
        .filter(|v| v.instance == id)
        .map(|v| v.pid)
        .collect())
}
