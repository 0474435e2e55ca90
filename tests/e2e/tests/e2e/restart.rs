//! The server goes and comes back; guests do not notice.
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, checks, exec, procs, redis::Redis, server::Server};

use crate::stateful;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        graceful_restart_leaves_guests_running,
        crash_leaves_guests_running,
        program_exit_while_the_server_is_down,
        vmm_killed_while_the_server_is_down,
        vmm_killed_under_the_server,
        many_crashes_in_a_row,
        second_server_is_refused,
    ]
}

fn vmm_of(server: &Server, id: &str) -> Result<i32> {
    let vmms: Vec<_> = procs::vmms(&server.data_dir)?
        .into_iter()
        .filter(|v| v.instance == id)
        .collect();
    ensure!(vmms.len() == 1, "{id} has {} VMMs: {vmms:?}", vmms.len());
    Ok(vmms[0].pid)
}

async fn graceful_restart_leaves_guests_running(world: &World) -> Result<()> {
    let api = world.api_with_demo().await?;
    let id = world.boot(stateful::demo(world, "through")).await?;
    let address = stateful::address(world, &id).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    redis.command(&["SET", "n", "1"]).await?;
    let (pid, before) = (vmm_of(&world.server, &id)?, api.instance(&id).await?);
    world.server.stop().await?;
    ensure!(vmm_of(&world.server, &id)? == pid);
    // Nobody is there to manage it, and it goes on: the open connection, and new ones.
    ensure!(redis.command(&["INCR", "n"]).await? == "2");
    ensure!(
        Redis::ready(address, Duration::from_secs(10))
            .await?
            .command(&["INCR", "n"])
            .await?
            == "3"
    );
    world.server.start().await?;
    ensure!(vmm_of(&world.server, &id)? == pid, "the VMM was replaced");
    api.wait(&id, "Running", 20).await?;
    let after = api.instance(&id).await?;
    for field in ["id", "name", "created_at", "started_at", "network"] {
        ensure!(
            before[field] == after[field],
            "{field}: {} became {}",
            before[field],
            after[field]
        );
    }
    ensure!(
        redis.command(&["INCR", "n"]).await? == "4",
        "the connection was lost"
    );
    ensure!(exec::run(api, &id, &["echo", "back"]).await?.ok()? == "back");
    ensure!(
        !api.log_lines(&id, "?source=app").await?.is_empty(),
        "the log is gone"
    );
    let stop = format!("/instances/{id}/stop");
    let (waited, stopped) = tokio::join!(api.wait(&id, "Stopped", 60), api.post_empty(&stop));
    waited?;
    ensure!(stopped?.expect(200)?["exit_code"] == 0);
    api.remove(&id).await
}

async fn crash_leaves_guests_running(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("crash").await?;
    // A command in flight ends with its server; the guest's agent does not keep it.
    let request =
        serde_json::json!({"command": ["sh", "-c", "echo $$; sleep 1000 & wait"], "tty": false});
    let mut session = exec::Exec::open(api, &id, &request).await?;
    let command: u32 = session.until(|t| t.contains('\n')).await?.trim().parse()?;
    let pid = vmm_of(&world.server, &id)?;
    world.server.kill().await?;
    drop(session);
    ensure!(vmm_of(&world.server, &id)? == pid);
    world.server.start().await?;
    api.wait(&id, "Running", 20).await?;
    checks::agree(api, &world.server).await?;
    ensure!(vmm_of(&world.server, &id)? == pid, "the VMM was replaced");
    let gone = format!(
        "i=0; while kill -0 {command} 2>/dev/null; do i=$((i+1)); test $i -lt 100 || exit 1; sleep 0.1; done"
    );
    exec::sh(api, &id, &gone)
        .await
        .context("the old server's command still runs")?;
    api.remove(&id).await
}

async fn program_exit_while_the_server_is_down(world: &World) -> Result<()> {
    let api = world.api().await?;
    let cmd = [
        "/bin/sh",
        "-c",
        "while ! test -e /tmp/end; do sleep 0.2; done; exit 5",
    ];
    let id = world.boot(world.tiny_running("leaves", &cmd)).await?;
    // It ends when nobody looks: the command that tells it to waits longer than the server lives.
    exec::sh(
        api,
        &id,
        "(sleep 3; touch /tmp/end) >/dev/null 2>&1 </dev/null & true",
    )
    .await?;
    vmm_of(&world.server, &id)?;
    world.server.stop().await?;
    // The machine monitor stays for its server to look at, so the guest's console tells.
    let console = world
        .server
        .data_dir
        .join("instances")
        .join(&id)
        .join("vmm.log");
    let ended = async {
        while !std::fs::read_to_string(&console).is_ok_and(|c| c.contains("program-exit")) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ended)
        .await
        .context("the program did not end")?;
    world.server.start().await?;
    // The guest may still be busy with powering off.
    api.wait(&id, "Stopped", 30).await?;
    let instance = api.instance(&id).await?;
    ensure!(
        instance["state"] == "Stopped" && instance["exit_code"] == 5,
        "{instance}"
    );
    checks::agree(api, &world.server).await?;
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    api.wait(&id, "Running", 90).await?;
    api.remove(&id).await
}

async fn vmm_killed_while_the_server_is_down(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("dies-alone").await?;
    let pid = vmm_of(&world.server, &id)?;
    world.server.kill().await?;
    procs::kill(pid)?;
    wait_for_exit(pid, 10).await?;
    world.server.start().await?;
    let instance = api.instance(&id).await?;
    ensure!(instance["state"] == "Stopped", "{instance}");
    ensure!(
        instance["exit_message"]
            .as_str()
            .is_some_and(|m| !m.is_empty()),
        "no word about why: {instance}"
    );
    checks::agree(api, &world.server).await?;
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    api.wait(&id, "Running", 90).await?;
    api.remove(&id).await
}

async fn vmm_killed_under_the_server(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("dies").await?;
    let pid = vmm_of(&world.server, &id)?;
    let (waited, killed) = tokio::join!(api.wait(&id, "Stopped", 30), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        procs::kill(pid)
    });
    killed?;
    waited?;
    let instance = api.instance(&id).await?;
    let message = instance["exit_message"]
        .as_str()
        .unwrap_or_default()
        .to_lowercase();
    ensure!(
        ["vmm", "qemu", "monitor", "machine"]
            .iter()
            .any(|w| message.contains(w)),
        "not telling: {instance}"
    );
    checks::agree(api, &world.server).await?;
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    api.wait(&id, "Running", 90).await?;
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

async fn many_crashes_in_a_row(world: &World) -> Result<()> {
    let api = world.api().await?;
    let running = world.boot_tiny("stays").await?;
    let stopped = world.boot_tiny("rests").await?;
    api.post_empty(&format!("/instances/{stopped}/stop"))
        .await?
        .expect(200)?;
    let pid = vmm_of(&world.server, &running)?;
    for _ in 0..3 {
        world.server.kill().await?;
        world.server.start().await?;
        ensure!(vmm_of(&world.server, &running)? == pid);
    }
    api.wait(&running, "Running", 20).await?;
    let instances = checks::agree(api, &world.server).await?;
    ensure!(
        instances
            .iter()
            .any(|i| i["id"] == stopped.as_str() && i["state"] == "Stopped")
    );
    api.remove(&running).await?;
    api.remove(&stopped).await
}

async fn second_server_is_refused(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("owned").await?;
    let (status, log) = world.server.start_must_fail().await?;
    ensure!(!status.success());
    ensure!(
        log.contains("data_dir") || log.contains(&*world.server.data_dir.to_string_lossy()),
        "the refusal names no folder: {log}"
    );
    // The first one is not disturbed.
    ensure!(exec::sh(api, &id, "echo fine").await? == "fine");
    checks::agree(api, &world.server).await?;
    api.remove(&id).await
}

/// Waits until the process is gone.
async fn wait_for_exit(pid: i32, seconds: u64) -> Result<()> {
    let proc = std::path::PathBuf::from(format!("/proc/{pid}/cmdline"));
    let gone = async {
        // A zombie's command line is empty.
        while std::fs::read(&proc).is_ok_and(|c| !c.is_empty()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(seconds), gone)
        .await
        .with_context(|| format!("process {pid} lives on"))
}
