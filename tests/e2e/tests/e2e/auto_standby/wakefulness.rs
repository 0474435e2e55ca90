//! Who keeps an instance awake, and who does not.
use doze_e2e::exec::Exec;
use doze_e2e::sandbox::OUTSIDE;
use doze_e2e::{exec, server::free_port};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::*;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        an_open_connection_keeps_it_awake_until_it_closes,
        its_own_connections_do_not,
        ignored_clients_do_not,
        silent_clients_do_for_so_long_only,
        exec_sessions_do,
    ]
}

async fn an_open_connection_keeps_it_awake_until_it_closes(world: &World) -> Result<()> {
    let (id, address) = redis(world, "awake").await?;
    let api = world.api().await?;
    let mut first = Redis::connect(address, PATIENCE).await?;
    let mut second = Redis::connect(address, PATIENCE).await?;
    first.command(&["SET", "colour", "green"]).await?;
    set(api, &id, &on(TIMEOUT)).await?;
    let active = reaches(api, &id, ("active", "active_inbound_connections")).await?;
    ensure!(
        active["active_inbound_connections"] == 2
            && active["awake_because"] == json!(["inbound_connections"])
            && active["tracking_mode"] == "conntrack_events_v4_tcp"
            && active["eligible"] == true
            && active["countdown_remaining"].is_null(),
        "{active}"
    );
    // Nothing is said, and still they are there.
    stays_awake(api, &id, TIMEOUT * 2).await?;
    ensure!(first.command(&["GET", "colour"]).await? == "green");
    drop(first);
    let one = async {
        while status(api, &id).await?["active_inbound_connections"] != 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, one)
        .await
        .context("one is left")??;
    stays_awake(api, &id, TIMEOUT + Duration::from_secs(1)).await?;
    ensure!(second.command(&["GET", "colour"]).await? == "green");
    let closed = now_ms();
    drop(second);
    let idle = reaches(api, &id, ("idle_countdown", "idle_timeout_not_elapsed")).await?;
    ensure!(
        moment(&idle, "idle_since")? >= closed
            && moment(&idle, "last_inbound_activity_at")? >= closed - ms(TIMEOUT)
            && moment(&idle, "next_standby_at")? >= closed + ms(TIMEOUT)
            && idle["idle_timeout"] == "4s"
            && idle["awake_because"] == json!([]),
        "closed at {closed}: {idle}"
    );
    let paused = falls_asleep(api, &id).await?;
    not_before(paused, closed, TIMEOUT)?;
    let asleep = status(api, &id).await?;
    ensure!(
        pair(&asleep) == ("ineligible", "instance_not_running") && asleep["eligible"] == false,
        "{asleep}"
    );
    // Awake again it has the whole timeout before it.
    let woken = now_ms();
    restore(api, &id).await?;
    let mut again = Redis::connect(address, PATIENCE).await?;
    ensure!(again.command(&["GET", "colour"]).await? == "green");
    drop(again);
    not_before(falls_asleep(api, &id).await?, woken, TIMEOUT)?;
    api.remove(&id).await
}

/// A connection that the guest has opened outwards, and that stays open.
async fn its_own_connections_do_not(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("outwards").await?;
    let port = free_port()?;
    let mut listener = world.sandbox.outside_keeper(port)?.spawn()?;
    let mut lines = BufReader::new(listener.stdout.take().context("stdout")?).lines();
    ensure!(lines.next_line().await?.as_deref() == Some("listening"));
    let script = format!(
        "(sleep 100000 | nc {OUTSIDE} {port} > /dev/shm/said) </dev/null >/dev/null 2>&1 & i=0; \
         while ! test -s /dev/shm/said; do i=$((i+1)); test $i -lt 300 || exit 1; sleep 0.1; done"
    );
    exec::sh(api, &id, &script)
        .await
        .context("talk to the outside")?;
    ensure!(lines.next_line().await?.is_some(), "nobody was accepted");
    let before = now_ms();
    set(api, &id, &on(TIMEOUT)).await?;
    let paused = falls_asleep(api, &id).await?;
    not_before(paused, before, TIMEOUT)?;
    ensure!(listener.try_wait()?.is_none(), "the connection had ended");
    api.remove(&id).await
}

async fn ignored_clients_do_not(world: &World) -> Result<()> {
    let (id, address) = redis(world, "ignored").await?;
    let api = world.api().await?;
    let mut client = Redis::connect(address, PATIENCE).await?;
    client.command(&["SET", "colour", "green"]).await?;
    let gateway = world.server.gateway();
    for ignored in [
        json!({"ignore_source_cidrs": [format!("{gateway}/32"), "192.0.2.0/24"]}),
        json!({"ignore_destination_ports": [6379]}),
    ] {
        // Another port, another network: it counts.
        let mut other = on(TIMEOUT);
        other["ignore_source_cidrs"] = json!(["192.0.2.0/24"]);
        other["ignore_destination_ports"] = json!([6378, 6380]);
        set(api, &id, &other).await?;
        stays_awake(api, &id, TIMEOUT + Duration::from_secs(1)).await?;
        let mut policy = on(TIMEOUT);
        for (field, value) in ignored.as_object().context("fields")? {
            policy[field] = value.clone();
        }
        let before = now_ms();
        set(api, &id, &policy).await?;
        let paused = falls_asleep(api, &id).await.context(policy.to_string())?;
        not_before(paused, before, TIMEOUT)?;
        // Without a policy it stays awake, and the connection of before goes on.
        set(api, &id, &json!({"enabled": false})).await?;
        restore(api, &id).await?;
        ensure!(client.command(&["GET", "colour"]).await? == "green");
    }
    api.remove(&id).await
}

/// To the kernel a client that died is one that says nothing any more: no FIN, no RST, established for days.
async fn silent_clients_do_for_so_long_only(world: &World) -> Result<()> {
    const SILENCE: Duration = Duration::from_secs(5);
    let (id, address) = redis(world, "silent").await?;
    let api = world.api().await?;
    // A packet sends no event, and neither does its absence: the regular reading of the table tells.
    world.server.stop().await?;
    let often = [("DOZE_AUTO_STANDBY__RECONCILE_INTERVAL", "1s")];
    world.server.start_with(&often).await?;
    let outcome = async {
        let mut client = Redis::connect(address, PATIENCE).await?;
        client.command(&["SET", "colour", "green"]).await?;
        // Without the option it counts however long it is silent.
        set(api, &id, &on(TIMEOUT)).await?;
        stays_awake(api, &id, SILENCE + TIMEOUT + Duration::from_secs(3)).await?;
        let active = status(api, &id).await?;
        ensure!(active["active_inbound_connections"] == 1, "{active}");

        // With it, whoever says something now and then counts.
        let mut limited = on(TIMEOUT);
        limited["max_flow_idle"] = json!(format!("{}s", SILENCE.as_secs()));
        client.command(&["GET", "colour"]).await?;
        let policy = set(api, &id, &limited).await?;
        ensure!(policy["auto_standby"]["max_flow_idle"] == "5s", "{policy}");
        tokio::select! {
            failed = say_something(&mut client) => match failed? {},
            awake = stays_awake(api, &id, (SILENCE + TIMEOUT) * 2) => awake?,
        }

        // And whoever falls silent counts until the limit; from then on the idle timeout runs.
        let said = now_ms();
        client.command(&["GET", "colour"]).await?;
        let idle = reaches(api, &id, ("idle_countdown", "idle_timeout_not_elapsed")).await?;
        ensure!(
            moment(&idle, "idle_since")? >= said + ms(SILENCE)
                && idle["active_inbound_connections"] == 0,
            "said something at {said}: {idle}"
        );
        not_before(falls_asleep(api, &id).await?, said + ms(SILENCE), TIMEOUT)?;

        // It was there all the time.
        set(api, &id, &json!({"enabled": false})).await?;
        restore(api, &id).await?;
        ensure!(client.command(&["GET", "colour"]).await? == "green");
        anyhow::Ok(())
    }
    .await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    api.remove(&id).await
}

/// Each second, for as long as somebody listens.
async fn say_something(client: &mut Redis) -> Result<std::convert::Infallible> {
    let mut pace = tokio::time::interval(Duration::from_secs(1));
    loop {
        pace.tick().await;
        client.command(&["GET", "colour"]).await?;
    }
}

async fn exec_sessions_do(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("session").await?;
    let request = json!({"command": ["sh", "-c", "echo ready; read word; echo got $word"]});
    let mut session = Exec::open(api, &id, &request).await?;
    session.until(|text| text.contains("ready")).await?;
    set(api, &id, &on(TIMEOUT)).await?;
    let active = reaches(api, &id, ("active", "active_inbound_connections")).await?;
    ensure!(
        active["active_inbound_connections"] == 0
            && active["awake_because"] == json!(["exec_sessions"]),
        "{active}"
    );
    stays_awake(api, &id, TIMEOUT * 2).await?;
    session.stdin(b"through\n").await?;
    ensure!(session.finish().await?.ok()? == "got through");
    let ended = now_ms();
    // The server may have heard of the end a moment before us.
    not_before(falls_asleep(api, &id).await?, ended - 2000, TIMEOUT)?;
    api.remove(&id).await
}
