//! Create, start, stop, delete: states, exits and the phase ledger.
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, exec, phases, procs};
use serde_json::{Value, json};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        create_reaches_running,
        guest_is_what_was_asked_for,
        image_defaults_and_overrides,
        image_user_and_working_dir,
        phases_follow_our_stopwatch,
        stop_is_orderly,
        stop_kills_what_ignores_sigterm,
        start_overrides_are_kept,
        no_ops_change_nothing,
        program_exit_code,
        program_killed_by_signal,
        program_not_found,
        program_not_executable,
        stop_during_boot,
        delete_during_boot,
        delete_leaves_nothing,
        delete_gracefully,
        skip_guest_agent,
    ]
}

async fn create_reaches_running(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("first");
    request["tags"] = json!({"team": "backend"});
    request["env"] = json!({"GREETING": "hello"});
    let created = api.create(request.clone()).await?;
    ensure!(
        matches!(
            created["state"].as_str(),
            Some("Created" | "Initializing" | "Running")
        ),
        "a new instance is {}",
        created["state"]
    );
    let id = created["id"].as_str().context("id")?;
    ensure!(
        id.len() == 24
            && id
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()),
        "id {id:?} is no CUID2"
    );
    api.wait(id, "Running", 90).await?;
    let instance = api.instance(id).await?;
    ensure!(instance["state"] == "Running");
    ensure!(instance["name"] == request["name"] && instance["hypervisor"] == request["hypervisor"]);
    ensure!(
        instance["image"] == "docker.io/library/tiny:latest",
        "image {}",
        instance["image"]
    );
    ensure!(instance["tags"] == request["tags"] && instance["env"] == request["env"]);
    ensure!(
        instance["vcpus"] == 1 && instance["size"] == "256MB" && instance["overlay_size"] == "64MB",
        "{instance}"
    );
    ensure!(instance["platform"] == "linux/amd64" && instance["has_snapshot"] == false);
    ensure!(instance["exit_code"] == Value::Null && instance["stopped_at"] == Value::Null);
    phases::parse_time(instance["started_at"].as_str().context("started_at")?)?;
    let ip = instance["network"]["ip"].as_str().context("network.ip")?;
    ensure!(ip.starts_with(&world.server.subnet), "ip {ip}");
    let vmms = procs::vmms(&world.server.data_dir)?;
    ensure!(
        vmms.iter().filter(|v| v.instance == id).count() == 1,
        "VMMs: {vmms:?}"
    );
    ensure!(exec::sh(api, id, "echo $GREETING $FROM_IMAGE").await? == "hello yes");
    api.remove(id).await
}

/// The guest itself says which kernel, memory, CPUs and name it has.
async fn guest_is_what_was_asked_for(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("asked");
    request["size"] = json!("320MB");
    request["vcpus"] = json!(2);
    request["overlay_size"] = json!("96MB");
    let name = request["name"].as_str().context("name")?.to_owned();
    let id = world.boot(request).await?;
    let release = exec::sh(api, &id, "uname -r").await?;
    let kernel = std::fs::read(&world.tools.kernel)?;
    // The version string stands in the bzImage's header, at 0x200 + the u16 at 0x20e
    // (Documentation/arch/x86/boot.rst, kernel_version).
    let at = kernel
        .get(0x20e..0x210)
        .map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])) + 0x200)
        .context("bzImage")?;
    let version: Vec<u8> = kernel[at..]
        .iter()
        .take_while(|b| **b != b' ' && **b != 0)
        .copied()
        .collect();
    ensure!(
        release.as_bytes() == version,
        "guest runs {release}, booted {:?}",
        String::from_utf8_lossy(&version)
    );
    ensure!(exec::sh(api, &id, "hostname").await? == name);
    ensure!(exec::sh(api, &id, "grep -c ^processor /proc/cpuinfo").await? == "2");
    let memory: u64 = exec::sh(api, &id, "awk '/MemTotal/ {print $2}' /proc/meminfo")
        .await?
        .parse()?;
    // The kernel keeps some for itself.
    ensure!(
        (230_000..=327_680).contains(&memory),
        "MemTotal is {memory} kB of 320 MiB"
    );
    let overlay: u64 = exec::sh(api, &id, "df -k / | tail -1 | awk '{print $2}'")
        .await?
        .parse()?;
    ensure!(
        (60_000..=98_304).contains(&overlay),
        "the root has {overlay} kB of a 96 MiB overlay"
    );
    for path in [
        "/proc/self",
        "/sys/class",
        "/dev/null",
        "/dev/pts",
        "/dev/shm",
    ] {
        exec::sh(api, &id, &format!("test -e {path}")).await?;
    }
    exec::sh(
        api,
        &id,
        "touch /tmp/a /etc/b && echo x > /etc/from-image && rm /srv/not-executable",
    )
    .await?;
    api.remove(&id).await
}

async fn image_defaults_and_overrides(world: &World) -> Result<()> {
    let api = world.api().await?;
    // The former case changed these files in its own overlay; the image's are shared and read-only.
    let id = world.pet().await?;
    ensure!(
        exec::sh(api, id, "cat /etc/from-image /srv/not-executable").await?
            == "untouched\njust text"
    );
    let mut request = world.tiny("entry");
    request["entrypoint"] = json!(["/bin/sh", "-c"]);
    request["cmd"] = json!(["echo from $0 $X; exit 9", "zero"]);
    request["env"] = json!({"X": "the request", "FROM_IMAGE": "no"});
    let id = api.create(request).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    api.wait(&id, "Stopped", 90).await?;
    ensure!(api.instance(&id).await?["exit_code"] == 9);
    let lines = api.log_lines(&id, "?source=app").await?;
    ensure!(
        lines.iter().any(|l| l == "from zero the request"),
        "app log: {lines:?}"
    );
    api.remove(&id).await
}

async fn image_user_and_working_dir(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("user");
    request["image"] = json!("tiny-user");
    let id = world.boot(request).await?;
    let line = api
        .logs(&id, "?source=app&follow=true")
        .await?
        .until(|l| l.starts_with("uid="), 30)
        .await?;
    ensure!(
        line == "uid=1234 gid=1235 cwd=/srv/made/by/init home=/home",
        "{line}"
    );
    api.remove(&id).await?;
    let mut request = world.tiny("numeric");
    request["image"] = json!("tiny-numeric");
    let id = world.boot(request).await?;
    let line = api
        .logs(&id, "?source=app&follow=true")
        .await?
        .until(|l| l.starts_with("uid="), 30)
        .await?;
    ensure!(line.starts_with("uid=4321 gid=8765"), "{line}");
    api.remove(&id).await
}

/// Sums, states and monotony are checked on every answer anyway; here our own stopwatch is compared
/// with single phases.
async fn phases_follow_our_stopwatch(world: &World) -> Result<()> {
    const TOLERANCE: i128 = 1_500;
    let api = world.api().await?;
    let created = Instant::now();
    let id = world.boot_tiny("phases").await?;
    let running = Instant::now();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let at_stop = Instant::now();
    let stopped = api
        .post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    let stop_took = at_stop.elapsed();
    ensure!(stopped["state"] == "Stopped", "{stopped}");
    let close = |what: &str, have: i128, want: std::time::Duration| -> Result<()> {
        let want = i128::try_from(want.as_millis())?;
        ensure!(
            (have - want).abs() <= TOLERANCE,
            "{what}: the ledger has {have} ms, the stopwatch {want} ms"
        );
        Ok(())
    };
    let sums = phases::durations(&stopped)?;
    let of = |phase: &str| sums.get(phase).copied().unwrap_or(0);
    close(
        "until Running",
        of("created") + of("initializing"),
        running - created,
    )?;
    close(
        "running",
        of("running") + of("shutdown"),
        at_stop - running + stop_took,
    )?;
    ensure!(
        of("running") >= 1_900,
        "running has {} ms of more than 2 s",
        of("running")
    );
    // A phase that is over does not change any more.
    let first = phases::durations(&api.instance(&id).await?)?;
    let later = phases::durations(&api.instance(&id).await?)?;
    for phase in ["created", "initializing", "running"] {
        ensure!(
            first.get(phase) == later.get(phase),
            "{phase} went on while Stopped: {first:?}, {later:?}"
        );
        ensure!(
            first.get(phase) == sums.get(phase),
            "{phase} changed after the stop: {sums:?}, {first:?}"
        );
    }
    ensure!(later["stopped"] >= first["stopped"]);
    api.remove(&id).await
}

async fn stop_is_orderly(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("orderly").await?;
    api.logs(&id, "?follow=true")
        .await?
        .until(|l| l == "program runs", 30)
        .await?;
    exec::sh(api, &id, "echo survives > /root/note").await?;
    let stopped = api
        .post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    ensure!(
        stopped["state"] == "Stopped" && stopped["exit_code"] == 0,
        "{stopped}"
    );
    phases::parse_time(stopped["stopped_at"].as_str().context("stopped_at")?)?;
    let lines = api.log_lines(&id, "").await?;
    ensure!(
        lines.iter().any(|l| l == "program ends"),
        "the program did not get SIGTERM: {lines:?}"
    );
    let vmms = procs::vmms(&world.server.data_dir)?;
    ensure!(
        !vmms.iter().any(|v| v.instance == id),
        "a VMM of a Stopped instance: {vmms:?}"
    );
    let started = api
        .post(&format!("/instances/{id}/start"), json!({}))
        .await?
        .expect(200)?;
    ensure!(
        matches!(started["state"].as_str(), Some("Initializing" | "Running")),
        "{started}"
    );
    ensure!(
        started["exit_code"] == Value::Null,
        "the exit code of the last run is still there: {started}"
    );
    api.wait(&id, "Running", 90).await?;
    ensure!(exec::sh(api, &id, "cat /root/note").await? == "survives");
    api.remove(&id).await
}

async fn stop_kills_what_ignores_sigterm(world: &World) -> Result<()> {
    let api = world.api().await?;
    let script = "trap '' TERM; echo ignoring; while :; do sleep 1; done";
    let id = world
        .boot(world.tiny_running("stubborn", &["/bin/sh", "-c", script]))
        .await?;
    let mut log = api.logs(&id, "?follow=true").await?;
    log.until(|l| l == "ignoring", 30).await?;
    let stopped = api
        .post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    ensure!(
        stopped["state"] == "Stopped" && stopped["exit_code"] == 137,
        "{stopped}"
    );
    ensure!(
        stopped["exit_message"]
            .as_str()
            .is_some_and(|m| m.contains("killed by signal 9 (SIGKILL)")),
        "{stopped}"
    );
    api.remove(&id).await
}

async fn start_overrides_are_kept(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("overrides").await?;
    let start = format!("/instances/{id}/start");
    api.post(&start, json!({"cmd": ["true"]})).await?.refused(
        409,
        "invalid_state",
        &["stop it first"],
    )?;
    let stop = format!("/instances/{id}/stop");
    api.post_empty(&stop).await?.expect(200)?;
    let cmd = json!({"cmd": ["/bin/sh", "-c", "echo overridden; exec sleep 100000"]});
    for body in [cmd, json!({})] {
        api.post(&start, body).await?.expect(200)?;
        api.wait(&id, "Running", 90).await?;
        exec::sh(
            api,
            &id,
            "tr '\\0' ' ' < /proc/$(pidof sleep)/cmdline | grep -q 100000",
        )
        .await?;
        api.post_empty(&stop).await?.expect(200)?;
    }
    let lines = api.log_lines(&id, "").await?;
    ensure!(
        lines.iter().filter(|l| *l == "overridden").count() == 2,
        "{lines:?}"
    );
    api.remove(&id).await
}

async fn no_ops_change_nothing(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("noop").await?;
    let before = api.instance(&id).await?;
    // The contract's three ways to say "no body".
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    api.post(&format!("/instances/{id}/start"), json!({}))
        .await?
        .expect(200)?;
    api.send_raw(
        http::Method::POST,
        &format!("/instances/{id}/start"),
        "application/json",
        String::new(),
    )
    .await?
    .expect(200)?;
    let after = api.instance(&id).await?;
    for field in ["state", "started_at", "current_phase_since"] {
        ensure!(
            before[field] == after[field],
            "{field} went from {} to {}",
            before[field],
            after[field]
        );
    }
    api.post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    let before = api.instance(&id).await?;
    api.post(&format!("/instances/{id}/stop"), json!({}))
        .await?
        .expect(200)?;
    let after = api.instance(&id).await?;
    for field in ["state", "stopped_at", "current_phase_since", "exit_code"] {
        ensure!(
            before[field] == after[field],
            "{field} went from {} to {}",
            before[field],
            after[field]
        );
    }
    api.remove(&id).await
}

/// Runs to the end by itself; the instance afterwards.
async fn run_to_end(world: &World, stem: &str, cmd: &[&str]) -> Result<Value> {
    let api = world.api().await?;
    let id = api.create(world.tiny_running(stem, cmd)).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    api.wait(&id, "Stopped", 90).await?;
    let instance = api.instance(&id).await?;
    ensure!(
        !procs::vmms(&world.server.data_dir)?
            .iter()
            .any(|v| v.instance == id),
        "its VMM lives on"
    );
    api.remove(&id).await?;
    Ok(instance)
}

async fn program_exit_code(world: &World) -> Result<()> {
    let ended = run_to_end(world, "three", &["/bin/sh", "-c", "exit 3"]).await?;
    ensure!(ended["exit_code"] == 3, "{ended}");
    ensure!(
        ended["exit_message"]
            .as_str()
            .is_some_and(|m| m.contains("code 3")),
        "{ended}"
    );
    Ok(())
}

async fn program_killed_by_signal(world: &World) -> Result<()> {
    let ended = run_to_end(world, "killed", &["/bin/sh", "-c", "kill -9 $$"]).await?;
    ensure!(ended["exit_code"] == 137, "{ended}");
    ensure!(
        ended["exit_message"]
            .as_str()
            .is_some_and(|m| m.contains("killed by signal 9 (SIGKILL)")),
        "{ended}"
    );
    Ok(())
}

async fn program_not_found(world: &World) -> Result<()> {
    let ended = run_to_end(world, "absent", &["no-such-program", "-x"]).await?;
    ensure!(ended["exit_code"] == 127, "{ended}");
    ensure!(
        ended["exit_message"]
            .as_str()
            .is_some_and(|m| m.contains("not found") && m.contains("no-such-program")),
        "{ended}"
    );
    Ok(())
}

async fn program_not_executable(world: &World) -> Result<()> {
    let ended = run_to_end(world, "text", &["/srv/not-executable"]).await?;
    ensure!(ended["exit_code"] == 126, "{ended}");
    Ok(())
}

async fn stop_during_boot(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = api.create(world.tiny("hasty")).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    let stopped = api
        .post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    ensure!(stopped["state"] == "Stopped", "{stopped}");
    ensure!(
        !procs::vmms(&world.server.data_dir)?
            .iter()
            .any(|v| v.instance == id),
        "its VMM lives on"
    );
    // And it is none the worse for it.
    api.post_empty(&format!("/instances/{id}/start"))
        .await?
        .expect(200)?;
    api.wait(&id, "Running", 90).await?;
    ensure!(exec::sh(api, &id, "echo fine").await? == "fine");
    api.remove(&id).await
}

async fn delete_during_boot(world: &World) -> Result<()> {
    let api = world.api().await?;
    let before = world.footprint()?;
    let id = api.create(world.tiny("unwanted")).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    api.remove(&id).await?;
    let left = world.footprint()?.new_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

async fn delete_leaves_nothing(world: &World) -> Result<()> {
    let api = world.api().await?;
    let before = world.footprint()?;
    let id = world.boot_tiny("gone").await?;
    let during = world.footprint()?.new_since(&before);
    ensure!(
        during.iter().any(|l| l.starts_with("tap")) && during.iter().any(|l| l.starts_with("VMM")),
        "{during:?}"
    );
    let tap = procs::taps(&world.server.bridge)?
        .into_iter()
        .find(|(_, alias)| *alias == id)
        .context("no tap")?
        .0;
    api.remove(&id).await?;
    let left = world.footprint()?.new_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(
        !procs::ruleset()?.contains(&tap),
        "a rule for {tap} is left"
    );
    ensure!(!procs::all_taps()?.contains(&tap), "{tap} is left");
    for path in [
        format!("/instances/{id}"),
        format!("/instances/{id}/logs"),
        format!("/instances/{id}/wait?state=Running"),
    ] {
        api.get(&path).await?.refused(404, "not_found", &[&id])?;
    }
    api.delete(&format!("/instances/{id}"))
        .await?
        .refused(404, "not_found", &[&id])
}

async fn delete_gracefully(world: &World) -> Result<()> {
    let api = world.api().await?;
    let before = world.footprint()?;
    let id = world.boot_tiny("graceful").await?;
    let mut log = api.logs(&id, "?follow=true").await?;
    log.until(|l| l == "program runs", 30).await?;
    let delete = async {
        let reply = api
            .delete(&format!("/instances/{id}?graceful_shutdown=true"))
            .await?;
        ensure!(reply.status == 204, "{} {}", reply.status, reply.text);
        Ok(())
    };
    // The stream is open across the delete: it shows the program's last words.
    let (deleted, ended) = tokio::join!(delete, log.until(|l| l == "program ends", 60));
    deleted?;
    ended.context("the program did not get SIGTERM")?;
    let left = world.footprint()?.new_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

async fn skip_guest_agent(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("agentless");
    request["skip_guest_agent"] = json!(true);
    let id = world.boot(request).await?;
    let open = exec::Exec::try_open(
        api,
        &id,
        &json!({"command": ["true"], "tty": false, "wait_for_agent": 5}),
    )
    .await?;
    match open {
        exec::Opened::Refused(reply) => {
            ensure!(
                (400..500).contains(&reply.status),
                "{} {}",
                reply.status,
                reply.text
            );
            ensure!(reply.text.contains("skip_guest_agent"), "{}", reply.text);
        }
        exec::Opened::Session(session) => {
            let outcome = session.finish().await;
            ensure!(
                outcome.is_err(),
                "exec without agent ended like a command: {outcome:?}"
            );
        }
    }
    let mut log = api.logs(&id, "?follow=true").await?;
    log.until(|l| l == "program runs", 30).await?;
    // Lifecycle reports and orderly shutdown stay.
    let stopped = api
        .post_empty(&format!("/instances/{id}/stop"))
        .await?
        .expect(200)?;
    ensure!(
        stopped["state"] == "Stopped" && stopped["exit_code"] == 0,
        "{stopped}"
    );
    api.remove(&id).await
}
