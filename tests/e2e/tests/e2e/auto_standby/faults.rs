//! What the server hears of connections gets lost. Then everybody counts as busy until the truth is known
//! again.
use doze_e2e::{exec, procs};

use super::*;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        nobody_sleeps_while_the_socket_is_lost,
        nobody_sleeps_without_our_rules,
        nobody_sleeps_unseen,
        nobody_sleeps_where_the_kernel_shows_no_connections,
    ]
}

const SEEN: &str = "doze_conntrack_events_total{result=\"disconnect\"}";

async fn metric(api: &Api, name: &str) -> Result<f64> {
    let text = api.get("/metrics").await?.text;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.with_context(|| format!("no {name} in\n{text}"))?;
    value.trim().parse().context("metric")
}

async fn nobody_sleeps_while_the_socket_is_lost(world: &World) -> Result<()> {
    let (id, address) = redis(world, "deaf").await?;
    let api = world.api().await?;
    world.server.stop().await?;
    let deaf = Duration::from_secs(8);
    // The kernel says nothing of the end of connections that began while nobody listened: the regular reading
    // of the table does.
    let deafening = [
        ("DOZE_TEST_CUT_CONNTRACK", "8s"),
        ("DOZE_AUTO_STANDBY__RECONCILE_INTERVAL", "2s"),
    ];
    world.server.start_with(&deafening).await?;
    let outcome = async {
        set(api, &id, &on(TIMEOUT)).await?;
        reaches(api, &id, ("idle_countdown", "idle_timeout_not_elapsed")).await?;
        let cut = now_ms();
        procs::signal_usr2(world.server.pid().await?)?;
        let error = reaches(api, &id, ("error", "observer_error")).await?;
        ensure!(
            error["observer_error"].is_string() && error["eligible"] == false,
            "{error}"
        );
        ensure!(metric(api, SEEN).await? >= 1.0);
        // Longer than its timeout, and nobody knows who is there.
        let client = Redis::connect(address, PATIENCE).await?;
        stays_awake(api, &id, TIMEOUT + Duration::from_secs(1)).await?;
        // Heard of by the dump that follows the new subscription.
        reaches(api, &id, ("active", "active_inbound_connections")).await?;
        ensure!(now_ms() >= cut + ms(deaf), "it heard although it was deaf");
        let closed = now_ms();
        drop(client);
        not_before(falls_asleep(api, &id).await?, closed, TIMEOUT)
    }
    .await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    api.remove(&id).await
}

/// Somebody flushes all rules, ours with them: the kernel tracks nobody, and everybody looks idle.
async fn nobody_sleeps_without_our_rules(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("untracked").await?;
    let rules = procs::ruleset()?;
    ensure!(rules.contains(&world.server.bridge), "{rules}");
    let table = format!("doze-{}", world.server.bridge);
    for family in ["inet", "bridge"] {
        let output = std::process::Command::new("nft")
            .args(["delete", "table", family, &table])
            .output()?;
        ensure!(output.status.success(), "{output:?}");
    }
    set(api, &id, &on(Duration::from_millis(500))).await?;
    let name = "doze_auto_standby_attempts_total{status=\"called_off\"}";
    let tried = async {
        while metric(api, name).await? < 1.0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, tried)
        .await
        .context("an attempt")??;
    stays_awake(api, &id, Duration::from_secs(3)).await?;
    ensure!(metric(api, "doze_auto_standby_errors_total{operation=\"rules\"}").await? >= 1.0);
    // A restart puts them back.
    world.server.stop().await?;
    world.server.start().await?;
    falls_asleep(api, &id).await?;
    api.remove(&id).await
}

/// A server that cannot look at connections starts, says so, and lets nobody sleep.
async fn nobody_sleeps_unseen(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("unseen").await?;
    world.server.stop().await?;
    let blind = [("DOZE_NETWORK__ENABLED", "false")];
    world.server.start_with(&blind).await?;
    let outcome = is_unsupported(api, &id).await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    falls_asleep(api, &id).await?;
    api.remove(&id).await
}

/// The same with a network and without connection tracking over netlink: the kernel refuses its socket.
async fn nobody_sleeps_where_the_kernel_shows_no_connections(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("untold").await?;
    world.server.stop().await?;
    world.server.start_without_conntrack().await?;
    let outcome = async {
        is_unsupported(api, &id).await?;
        let log = world.server.log_tail();
        ensure!(
            log.contains("this kernel offers no connection tracking over netlink"),
            "{log}"
        );
        // Everything else is as ever.
        let rules = procs::ruleset()?;
        ensure!(rules.contains(&world.server.bridge), "{rules}");
        ensure!(api.instance(&id).await?["network"]["enabled"] == true);
        ensure!(exec::sh(api, &id, "echo here").await?.trim() == "here");
        anyhow::Ok(())
    }
    .await;
    world.server.stop().await?;
    world.server.start().await?;
    outcome?;
    falls_asleep(api, &id).await?;
    api.remove(&id).await
}

async fn is_unsupported(api: &Api, id: &str) -> Result<()> {
    set(api, id, &on(Duration::from_millis(200))).await?;
    for answer in [status(api, id).await?, hold(api, id).await?] {
        ensure!(
            pair(&answer) == ("unsupported", "unsupported_platform")
                && answer["supported"] == false
                && answer["hold_until"].is_null(),
            "{answer}"
        );
    }
    stays_awake(api, id, Duration::from_secs(2)).await
}
