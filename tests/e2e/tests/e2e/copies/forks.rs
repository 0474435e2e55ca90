//! Forks of a guest that runs and is used while it is copied.
use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, checks, exec, phases, redis::Redis, traffic::Traffic};
use serde_json::{Value, json};

use super::{fork, prepare, remove_all, text};
use crate::{
    standby::{COUNTER, counter, forgetful, restore, standby, tap, vmms},
    stateful,
};

const FORKS: usize = 10;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![ten_forks_at_once, a_forks_time_is_its_own]
}

/// What tells one guest from another, as the guest itself sees it.
const IDENTITY: &str = "cat /proc/sys/kernel/random/uuid /etc/machine-id /etc/hostname; hostname; \
     cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0";

#[derive(Debug)]
struct Identity {
    uuid: String,
    machine_id: String,
    hostname: String,
    mac: String,
    address: String,
}

async fn identity(world: &World, id: &str) -> Result<Identity> {
    let told = exec::sh(world.api().await?, id, IDENTITY).await?;
    let lines: Vec<&str> = told.lines().collect();
    let [uuid, machine_id, file, hostname, mac, address] = lines[..] else {
        anyhow::bail!("{id} said {told:?}");
    };
    ensure!(
        file == hostname,
        "/etc/hostname {file}, hostname {hostname}"
    );
    Ok(Identity {
        uuid: uuid.into(),
        machine_id: machine_id.into(),
        hostname: hostname.into(),
        mac: mac.into(),
        address: address.into(),
    })
}

/// From a running redis under traffic, all at the same time: each answers at its own address with what its
/// source knew, none is like another, and the source's client never notices.
async fn ten_forks_at_once(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api_with_demo().await?;
    let source = world.boot(forgetful(world, "source")).await?;
    let address = stateful::address(world, &source).await?;
    let mut redis = Redis::ready(address, Duration::from_secs(60)).await?;
    redis.command(&["SET", "colour", "green"]).await?;
    // Ten of them count on an emulated processor: not too fast.
    exec::sh(api, &source, &COUNTER.replacen("sleep 0.05", "sleep 1", 1)).await?;
    let (process, counted) = counter(api, &source).await?;
    let mut traffic = Traffic::start(address).await?;
    traffic.catches_up().await?;
    let before = (vmms(world, &source)?, tap(world, &source)?);
    let names: Vec<String> = (0..FORKS).map(|_| world.unique("fork")).collect();
    let path = format!("/instances/{source}/fork");
    let asked = names.iter().map(|name| {
        let body = json!({"name": name, "from_running": true});
        fork(world, &path, body, "Running")
    });
    let forks: Vec<Value> = futures::future::try_join_all(asked).await?;
    traffic.catches_up().await?;
    ensure!(api.instance(&source).await?["state"] == "Running");
    ensure!(before == (vmms(world, &source)?, tap(world, &source)?));
    let mut all = vec![identity(world, &source).await?];
    for (made, name) in forks.iter().zip(&names) {
        let id = text(made, "id")?;
        let work = async {
            ensure!(made["name"] == name.as_str(), "{made}");
            let own = stateful::address(world, &id).await?;
            ensure!(own != address, "{made}");
            let mut redis = Redis::ready(own, Duration::from_secs(30)).await?;
            ensure!(redis.command(&["GET", "colour"]).await? == "green");
            redis.command(&["SET", "colour", name]).await?;
            let (same, count) = counter(api, &id).await?;
            ensure!(same == process && count >= counted, "{same} counts {count}");
            let told = identity(world, &id).await?;
            ensure!(told.hostname == *name, "{told:?}");
            ensure!(
                made["network"]["mac"] == told.mac.as_str(),
                "{told:?}, {made}"
            );
            let ip = text(&made["network"], "ip")?;
            ensure!(told.address.contains(&format!("{ip}/")), "{told:?}, {made}");
            ensure!(told.address.matches("inet ").count() == 1, "{told:?}");
            all.push(told);
            anyhow::Ok(())
        };
        work.await.with_context(|| format!("fork {name}"))?;
    }
    for (what, field) in [
        ("uuids", (|i| &i.uuid) as fn(&Identity) -> &String),
        ("machine-ids", |i| &i.machine_id),
        ("hostnames", |i| &i.hostname),
        ("MACs", |i| &i.mac),
    ] {
        let distinct: BTreeSet<_> = all.iter().map(field).collect();
        ensure!(distinct.len() == FORKS + 1, "{what}: {all:?}");
    }
    // What a fork does is nobody else's business.
    ensure!(redis.command(&["GET", "colour"]).await? == "green");
    let messages = traffic.finish().await?;
    println!(
        "    {}: {messages} messages while {FORKS} forks were made",
        world.name
    );
    checks::agree(api, &world.server).await?;
    let mut ids = vec![source];
    for made in &forks {
        ids.push(text(made, "id")?);
    }
    // A fork sleeps and wakes as anybody.
    standby(world, &ids[1]).await?;
    restore(world, &ids[1]).await?;
    let own = stateful::address(world, &ids[1]).await?;
    let mut redis = Redis::ready(own, Duration::from_secs(30)).await?;
    ensure!(redis.command(&["GET", "colour"]).await? == names[0]);
    remove_all(world, &ids).await
}

/// Its ledger begins when it is made.
async fn a_forks_time_is_its_own(world: &World) -> Result<()> {
    prepare(world)?;
    let api = world.api().await?;
    let source = world.boot_tiny("old").await?;
    // Running time that a fork must not have.
    let running = async {
        loop {
            let spent = phases::durations(&api.instance(&source).await?)?;
            if spent.get("running").is_some_and(|ms| *ms > 3000) {
                return anyhow::Ok(spent);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let spent = running.await?;
    let begun = std::time::Instant::now();
    let body = json!({"name": world.unique("young"), "from_running": true});
    let made = fork(world, &format!("/instances/{source}/fork"), body, "Running").await?;
    let id = text(&made, "id")?;
    let own = phases::durations(&api.instance(&id).await?)?;
    let total: i128 = own.values().sum();
    let lived = i128::try_from(begun.elapsed().as_millis())?;
    ensure!(
        total <= lived,
        "the fork has {own:?}, and was asked for {lived} ms ago"
    );
    ensure!(
        !own.contains_key("standby") && !own.contains_key("paused"),
        "{own:?}"
    );
    // The source's pause is in its ledger, and its time goes on.
    let after = phases::durations(&api.instance(&source).await?)?;
    ensure!(after.contains_key("paused"), "{after:?}");
    ensure!(after["running"] >= spent["running"], "{after:?}");
    remove_all(world, &[source, id]).await
}
