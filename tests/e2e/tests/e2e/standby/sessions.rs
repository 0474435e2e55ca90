//! Commands in the guest that are running when it is told to sleep: ended with a reason, or in the way.
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Api, Case, World,
    exec::{self, Event, Exec},
};
use serde_json::json;

use super::{restore, standby};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![sessions_end_with_a_reason, sessions_may_refuse_a_standby]
}

async fn open(api: &Api, id: &str, script: &str, tty: bool) -> Result<Exec> {
    let request = json!({"command": ["sh", "-c", script], "tty": tty});
    let mut session = Exec::open(api, id, &request).await?;
    session.until(|text| text.contains("ready")).await?;
    Ok(session)
}

/// Reads to the end: the close frame's code and reason.
async fn end_of(mut session: Exec) -> Result<(u16, String)> {
    let end = async {
        loop {
            match session.next().await? {
                Event::Output(_) => {}
                Event::Closed(Some(close)) => return Ok(close),
                other => bail!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), end)
        .await
        .context("the session hangs")?
}

async fn sessions_end_with_a_reason(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("sessions").await?;
    let waits = "echo ready $$ > /dev/shm/waits; echo ready; sleep 100000 & wait";
    let sessions = [
        ("silent", open(api, &id, waits, false).await?),
        ("tty", open(api, &id, "echo ready; exec cat", true).await?),
        // Nobody reads what this one says, so that every buffer on the way is full.
        ("loud", open(api, &id, "echo ready; exec yes", false).await?),
    ];
    standby(world, &id).await?;
    for (what, session) in sessions {
        let (code, reason) = end_of(session).await.context(what)?;
        ensure!(
            code == 1011 && reason.contains("the instance was put to standby"),
            "{what}: closed with {code} {reason:?}"
        );
    }
    restore(world, &id).await?;
    ensure!(exec::sh(api, &id, "echo new").await? == "new");
    // The guest hears of it, too: a command without a client does not run on.
    let gone = "read _ pid < /dev/shm/waits; i=0; \
                while kill -0 $pid 2>/dev/null; do i=$((i+1)); test $i -lt 100 || exit 1; sleep 0.1; done";
    exec::sh(api, &id, gone)
        .await
        .context("the command outlived its client")?;
    api.remove(&id).await
}

async fn sessions_may_refuse_a_standby(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("busy").await?;
    world.server.stop().await?;
    let policy = [("DOZE_STANDBY__EXEC_SESSIONS", "refuse")];
    world.server.start_with(&policy).await?;
    let outcome = refuses(world, api, &id).await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    api.remove(&id).await
}

async fn refuses(world: &World, api: &Api, id: &str) -> Result<()> {
    api.wait(id, "Running", 30).await?;
    let script = "echo ready; read word; echo got $word";
    let mut session = open(api, id, script, false).await?;
    let before = api.instance(id).await?;
    api.post_empty(&format!("/instances/{id}/standby"))
        .await?
        .refused(
            409,
            "invalid_state",
            &["Running", "open exec sessions", "exec_sessions"],
        )?;
    let after = api.instance(id).await?;
    for field in ["state", "current_phase_since"] {
        ensure!(before[field] == after[field], "{field}: {after}");
    }
    super::awake(world, id)?;
    // Nobody disturbed it.
    session.stdin(b"through\n").await?;
    ensure!(session.finish().await?.ok()? == "got through");
    standby(world, id).await?;
    restore(world, id).await?;
    Ok(())
}
