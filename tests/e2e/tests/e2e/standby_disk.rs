//! The disk's share of what can go wrong with a guest that falls asleep, sleeps or wakes: it is full, or its
//! power goes. On small file systems of their own ([`Disk`]).
use std::{fs, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Case, Group, Sample, Witness, World, checks,
    disk::{Disk, Kind},
    exec, procs,
    sample::Random,
};

use crate::{
    crash_standby::{self, Scenario, act, cycle, found, kill_vmms, settle, sleeper},
    standby_faults::{BOARDS, failed, group},
};

/// Holds the boot files, images, and the memory of one small guest.
const DISK: u64 = 512 << 20;
/// Less than the server wants to see before it begins a standby, and enough for a guest to go on.
const TOO_LITTLE: u64 = 8 << 20;

/// A test run takes power loss on the board that its seed chooses and the full disk on the other.
pub fn groups(sample: &Sample) -> Vec<Group> {
    let chosen = sample.random("disk").below(BOARDS.len());
    let mut groups = Vec::new();
    for (at, board) in BOARDS.into_iter().enumerate() {
        if sample.campaign || at == chosen {
            groups.push(group(board, "power-loss", power_loss(sample, board)));
        }
        if sample.campaign || at != chosen {
            let cases = doze_e2e::cases![
                disk_full_at_standby,
                full_disk_costs_the_guest_not_the_server
            ];
            groups.push(group(board, "full-disk", cases));
        }
    }
    groups
}

fn power_loss(sample: &Sample, board: &str) -> Vec<Case> {
    let mut random = sample.random("power loss");
    let mut cases = doze_e2e::cases![power_loss_after_standby];
    let all = crash_standby::with_vmm();
    let count = if sample.campaign { all.len() } else { 3 };
    for scenario in random.choose(all, count) {
        cases.push(Case::new(
            format!("power_loss_at.{}", scenario.point),
            move |world: &World| Box::pin(power_loss_at(world, scenario)),
        ));
    }
    let rounds = if sample.campaign { 20 } else { 2 };
    let random = sample.random(board);
    cases.push(
        Case::new("power_loss_at_any_moment", move |world: &World| {
            Box::pin(power_loss_at_any_moment(world, random.clone(), rounds))
        })
        .deadline(Duration::from_secs(600)),
    );
    cases
}

async fn disk_full_at_standby(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Ext4, DISK)?;
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let filler = disk.fill(TOO_LITTLE)?;
    for _ in 0..2 {
        let reply = api.post_empty(&format!("/instances/{id}/standby")).await?;
        reply.refused(
            409,
            "insufficient_capacity",
            &["disk", "16", "wanted", "available"],
        )?;
        let instance = api.instance(&id).await?;
        ensure!(instance["state"] == "Running", "{instance}");
        checks::agree(api, &world.server).await?;
        witness.survived(api, &id).await?;
    }
    drop(filler);
    act(api, &id, "standby", None).await?;
    found(world, &id, &witness, "Standby", "").await?;
    // Awake on a disk that is as good as full it might die at the next page it touches; asleep it is safe.
    act(api, &id, "standby", None).await?;
    let filler = disk.fill(TOO_LITTLE)?;
    api.post_empty(&format!("/instances/{id}/restore"))
        .await?
        .refused(
            409,
            "insufficient_capacity",
            &["disk", "16", "wanted", "available"],
        )?;
    drop(filler);
    found(world, &id, &witness, "Standby", "").await?;
    cycle(world, &id).await
}

/// Memory is a sparse file: a guest that touches a page for which there is no room takes its VMM down
/// (SIGBUS). Nothing else may follow from that, and with room again everything works.
async fn full_disk_costs_the_guest_not_the_server(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Ext4, DISK)?;
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let filler = disk.fill(0)?;
    let script = "head -c 67108864 /dev/zero | tr '\\0' x > /dev/shm/more; rm -f /dev/shm/more";
    let wrote = exec::run(api, &id, &["sh", "-c", script]).await;
    // The server answers, whatever became of the guest.
    let full = api.instance(&id).await?;
    let reply = api.post_empty(&format!("/instances/{id}/standby")).await?;
    failed(&reply)?;
    println!(
        "on a full disk: writing 64 MiB {}, then {}, standby answers {} {}",
        wrote.map_or_else(
            |e| format!("failed ({e:#})"),
            |o| format!("ended with {}", o.code)
        ),
        full["state"],
        reply.status,
        reply.text
    );
    drop(filler);
    settle(api, &id).await?;
    let state = api.instance(&id).await?["state"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    // What could not be booked on the full disk is booked with the next look at the machine.
    let state = match (
        state.as_str(),
        procs::vmms(&world.server.data_dir)?.is_empty(),
    ) {
        ("Running", true) => {
            api.wait(&id, "Stopped", 60).await?;
            "Stopped"
        }
        ("Running", false) => "Running",
        (state, _) => state,
    }
    .to_owned();
    found(world, &id, &witness, &state, "").await?;
    cycle(world, &id).await
}

/// No process is left, nothing unwritten reaches the disk, and the log is recovered.
async fn lose_power(world: &World, disk: &Disk) -> Result<()> {
    // Proves that something is lost at all.
    let volatile = world.server.data_dir.join("volatile");
    fs::write(&volatile, b"not on the disk yet")?;
    disk.cut_power()?;
    world.server.kill().await?;
    kill_vmms(world).await?;
    disk.restore_power().await?;
    match fs::read(&volatile) {
        Ok(content) if content.is_empty() => fs::remove_file(&volatile).context("volatile"),
        Ok(_) => bail!("the power loss lost nothing: what nobody fsynced is on the disk"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e).context("volatile"),
    }
}

async fn power_loss_after_standby(world: &World) -> Result<()> {
    let disk = Disk::of(world, Kind::Xfs, DISK)?;
    let api = world.api().await?;
    let id = sleeper(world).await?;
    // The second time the snapshot takes the place of one that was consumed.
    for round in ["first", "second"] {
        let witness = Witness::plant(api, &id).await?;
        act(api, &id, "standby", None).await?;
        lose_power(world, &disk).await?;
        world.server.start().await?;
        found(world, &id, &witness, "Standby", "")
            .await
            .with_context(|| format!("{round} round"))?;
    }
    cycle(world, &id).await
}

/// As the death of server and VMM, and the disk holds nothing that was not made durable.
async fn power_loss_at(world: &World, scenario: Scenario) -> Result<()> {
    let disk = Disk::of(world, Kind::Xfs, DISK)?;
    let (id, witness) = crash_standby::die(world, scenario).await?;
    lose_power(world, &disk).await?;
    crash_standby::come_back(world, scenario, &id, &witness).await
}

/// Some milliseconds into a standby, then into a restore. What was answered with success holds; otherwise
/// the guest sleeps with all its memory, or is Stopped and says so.
async fn power_loss_at_any_moment(world: &World, mut random: Random, rounds: usize) -> Result<()> {
    let disk = Disk::of(world, Kind::Xfs, DISK)?;
    let mut outcomes = Vec::new();
    for round in 0..rounds {
        let verb = if round % 2 == 0 { "standby" } else { "restore" };
        let api = world.api().await?;
        let id = sleeper(world).await?;
        let witness = Witness::plant(api, &id).await?;
        if verb == "restore" {
            act(api, &id, "standby", None).await?;
        }
        let delay = random.below(400);
        let path = format!("/instances/{id}/{verb}");
        let cut = async {
            tokio::time::sleep(Duration::from_millis(delay as u64)).await;
            lose_power(world, &disk).await
        };
        let (reply, cut) = tokio::join!(api.post_empty(&path), cut);
        cut?;
        let promised = verb == "standby" && reply.is_ok_and(|reply| reply.status == 200);
        world.server.start().await?;
        settle(api, &id).await?;
        let state = api.instance(&id).await?["state"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let at = format!("{verb} {delay} ms {state}");
        ensure!(
            state == "Standby" || (state == "Stopped" && !promised),
            "{at}, promised: {promised}"
        );
        found(world, &id, &witness, &state, "")
            .await
            .with_context(|| at.clone())?;
        outcomes.push(at);
    }
    println!("power loss at any moment: {}", outcomes.join(", "));
    cycle(world, &sleeper(world).await?).await
}
