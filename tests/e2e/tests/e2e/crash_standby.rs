//! kill -9 at every named point inside standby and restore, of the server alone and of server and VMM.
//!
//! ```text
//!   sleeper (one per board) ─ witness in its memory ─ server with DOZE_KILL_AT ─ command ─ the server dies
//!      ^                                                     [ its VMM is killed, too ]        │
//!      └── the whole cycle once more <── the table's outcome, and `checks::agree` <── restart ─┘
//!                                                          [ which dies at a point of its own ]
//! ```
//! What must be found is a table of its own here ([`POINTS`]), not derived from the server's. A test run
//! reaches every point on a board that its seed chooses, and a sample of the rest; a campaign takes all.
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{Api, Case, Group, Sample, Witness, World, checks, procs};
use http::Method;
use serde_json::json;

const BOARDS: [&str; 2] = ["qemu-microvm", "qemu"];
/// Cases beyond one per point that a test run takes.
const SAMPLED: usize = 4;

/// How the server comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Standby,
    Restore,
    /// A restore of a snapshot whose device state is altered.
    BadRestore,
    /// A start that gives the memory up.
    Discard,
    /// A standby that a restore interrupts.
    Interrupted,
    /// The server died at this point before, and dies again while it recovers.
    Recovery(&'static str),
}

/// What a restart must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The guest goes on as if nothing had been.
    Runs,
    /// In standby, and its memory is what it was.
    Sleeps,
    /// Stopped with a reason that has this word; the disk is kept.
    Stopped(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    pub point: &'static str,
    way: Way,
    /// The VMM is killed after the server: a power cut that the disk survives.
    with_vmm: bool,
    outcome: Outcome,
}

impl Scenario {
    fn name(&self) -> String {
        let with_vmm = if self.with_vmm { ".and-vmm" } else { "" };
        match self.way {
            Way::Recovery(first) => format!("{first}.then.{}{with_vmm}", self.point),
            Way::Discard if self.point == "start.admitted" => format!("discard.{}", self.point),
            _ => format!("{}{with_vmm}", self.point),
        }
    }
}

/// The way to each point that is reached from a running or sleeping guest, and what is found after the
/// death of the server, and of server and VMM. `None`: it makes no difference, there is no VMM.
#[rustfmt::skip]
const POINTS: &[(&str, Way, Outcome, Option<Outcome>)] = {
    use Outcome::{Runs, Sleeps, Stopped};
    const GONE: Option<Outcome> = Some(Stopped("monitor"));
    &[
        ("standby.admitted", Way::Standby, Runs, GONE),
        ("standby.flushed", Way::Standby, Runs, GONE),
        ("standby.paused", Way::Standby, Runs, GONE),
        ("standby.saved", Way::Standby, Runs, GONE),
        ("standby.sealed", Way::Standby, Runs, GONE),
        ("standby.marked", Way::Standby, Sleeps, Some(Sleeps)),
        ("standby.committed", Way::Standby, Sleeps, Some(Sleeps)),
        ("standby.machine_killed", Way::Standby, Sleeps, None),
        ("standby.recorded", Way::Standby, Sleeps, None),
        ("standby.resumed", Way::Interrupted, Runs, GONE),
        ("restore.admitted", Way::Restore, Sleeps, None),
        ("restore.verified", Way::Restore, Sleeps, None),
        ("restore.spawned", Way::Restore, Sleeps, Some(Sleeps)),
        ("restore.loaded", Way::Restore, Sleeps, Some(Sleeps)),
        ("restore.consumed", Way::Restore, Sleeps, Some(Stopped("memory is lost"))),
        ("restore.resumed", Way::Restore, Runs, Some(Stopped("memory is lost"))),
        ("restore.recorded", Way::Restore, Runs, GONE),
        ("restore.answered", Way::Restore, Runs, GONE),
        ("restore.undone", Way::BadRestore, Sleeps, None),
        ("start.memory_discarded", Way::Discard, Stopped("ended before"), None),
    ]
};

/// What else can happen: the same point by another way, and a second death while the first is repaired.
#[rustfmt::skip]
const MORE: &[(&str, Way, Outcome)] = {
    use Outcome::{Runs, Sleeps};
    &[
        ("start.admitted", Way::Discard, Sleeps),
        ("standby.resumed", Way::Recovery("standby.saved"), Runs),
        ("standby.machine_killed", Way::Recovery("standby.marked"), Sleeps),
        ("standby.recorded", Way::Recovery("standby.marked"), Sleeps),
        ("standby.machine_killed", Way::Recovery("standby.committed"), Sleeps),
        ("standby.recorded", Way::Recovery("standby.committed"), Sleeps),
        ("restore.undone", Way::Recovery("restore.loaded"), Sleeps),
        ("restore.undone", Way::Recovery("restore.consumed"), Sleeps),
        ("restore.recorded", Way::Recovery("restore.resumed"), Runs),
    ]
};

/// Whether the point is one of this file's.
pub fn covers(point: &str) -> bool {
    POINTS.iter().any(|(known, ..)| *known == point)
}

/// The server's death alone, once per point.
fn base() -> Vec<Scenario> {
    let scenario =
        |(point, way, outcome, _): &(&'static str, Way, Outcome, Option<Outcome>)| Scenario {
            point,
            way: *way,
            with_vmm: false,
            outcome: *outcome,
        };
    POINTS.iter().map(scenario).collect()
}

/// The death of server and VMM, once per point where that is something else.
pub fn with_vmm() -> Vec<Scenario> {
    let with_vmm = POINTS.iter().filter_map(|(point, way, _, outcome)| {
        outcome.map(|outcome| Scenario {
            point,
            way: *way,
            with_vmm: true,
            outcome,
        })
    });
    with_vmm.collect()
}

/// All but what [`base`] has.
fn more() -> Vec<Scenario> {
    let others = MORE.iter().map(|(point, way, outcome)| Scenario {
        point,
        way: *way,
        with_vmm: false,
        outcome: *outcome,
    });
    with_vmm().into_iter().chain(others).collect()
}

/// One group per board.
///
/// # Errors
/// When the table names a point that the server does not have.
pub fn groups(points: &[String], sample: &Sample) -> Result<Vec<Group>> {
    for scenario in base().iter().chain(&more()) {
        ensure!(
            points.iter().any(|point| point == scenario.point),
            "the server has no kill point {:?}",
            scenario.point
        );
    }
    let chosen = choose(sample);
    if !doze_e2e::harness::only_lists() {
        let all = BOARDS.len() * (base().len() + more().len());
        let taken: usize = chosen.iter().map(|(_, scenarios)| scenarios.len()).sum();
        println!(
            "kill -9 in standby and restore: {} points, {taken} of {all} cases, seed {}",
            POINTS.len(),
            sample.seed
        );
    }
    Ok(chosen.into_iter().map(group).collect())
}

/// A campaign: everything on both boards. Otherwise every point on one of them, and some of the rest.
fn choose(sample: &Sample) -> [(&'static str, Vec<Scenario>); 2] {
    if sample.campaign {
        let all: Vec<Scenario> = base().into_iter().chain(more()).collect();
        return BOARDS.map(|board| (board, all.clone()));
    }
    let mut random = sample.random("kill -9 in standby");
    let mut chosen = BOARDS.map(|board| (board, Vec::new()));
    for scenario in base() {
        chosen[random.below(BOARDS.len())].1.push(scenario);
    }
    for scenario in random.choose(more(), SAMPLED) {
        chosen[random.below(BOARDS.len())].1.push(scenario);
    }
    chosen
}

fn group((board, scenarios): (&'static str, Vec<Scenario>)) -> Group {
    let case = |scenario: Scenario| {
        Case::new(scenario.name(), move |world| {
            Box::pin(crash(world, scenario))
        })
    };
    let cases = scenarios.into_iter().map(case).collect();
    Group::on(board, "-kill9-standby", cases)
}

/// The guest that a group's cases share, Running; booted anew when a failed case left it in a bad way.
pub async fn sleeper(world: &World) -> Result<String> {
    const NAME: &str = "sleeper";
    let api = world.api().await?;
    let found = api.get(&format!("/instances/{NAME}")).await?;
    let id = found.body["id"].as_str().unwrap_or_default().to_owned();
    match (found.status, found.body["state"].as_str()) {
        (200, Some("Running")) => return Ok(id),
        (200, Some("Stopped")) => {
            act(api, &id, "start", None).await?;
            api.wait(&id, "Running", 90).await?;
            return Ok(id);
        }
        (200, Some("Standby")) if act(api, &id, "restore", None).await.is_ok() => {
            return Ok(id);
        }
        (200, _) => api.remove(&id).await?,
        _ => {}
    }
    let mut request = world.tiny(NAME);
    request["name"] = json!(NAME);
    world.boot(request).await
}

/// `POST /instances/{id}/{verb}`, which must succeed.
pub async fn act(
    api: &Api,
    id: &str,
    verb: &str,
    body: Option<serde_json::Value>,
) -> Result<serde_json::Value> {
    let path = format!("/instances/{id}/{verb}");
    api.send(Method::POST, &path, body.as_ref())
        .await?
        .expect(200)
}

async fn crash(world: &World, scenario: Scenario) -> Result<()> {
    let (id, witness) = die(world, scenario).await?;
    if scenario.with_vmm {
        kill_vmms(world).await?;
    }
    if let Way::Recovery(_) = scenario.way {
        die_in_recovery(world, scenario.point).await?;
    }
    come_back(world, scenario, &id, &witness).await
}

/// Plants a witness in the sleeper's memory and lets the server die at the scenario's (first) point.
pub async fn die(world: &World, scenario: Scenario) -> Result<(String, Witness)> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let (way, first) = match scenario.way {
        Way::Recovery(first) => (way_to(first)?, first),
        way => (way, scenario.point),
    };
    if matches!(way, Way::Restore | Way::BadRestore | Way::Discard) {
        act(api, &id, "standby", None).await?;
    }
    world.server.stop().await?;
    world.server.start_with(&[("DOZE_KILL_AT", first)]).await?;
    provoke(world, api, &id, way, first).await?;
    Ok((id, witness))
}

/// Starts the server and looks for the scenario's outcome; then everything must work once more.
pub async fn come_back(
    world: &World,
    scenario: Scenario,
    id: &str,
    witness: &Witness,
) -> Result<()> {
    world.server.start().await?;
    let api = world.api().await?;
    settle(api, id).await?;
    let (state, reason) = match scenario.outcome {
        Outcome::Runs => ("Running", ""),
        Outcome::Sleeps => ("Standby", ""),
        Outcome::Stopped(reason) => ("Stopped", reason),
    };
    found(world, id, witness, state, reason).await?;
    cycle(world, id).await
}

/// Once to sleep and awake, with all there is to check.
pub async fn cycle(world: &World, id: &str) -> Result<()> {
    let api = world.api().await?;
    let witness = Witness::plant(api, id).await?;
    act(api, id, "standby", None).await?;
    act(api, id, "restore", None).await?;
    witness.survived(api, id).await?;
    checks::agree(api, &world.server).await.map(drop)
}

fn way_to(point: &str) -> Result<Way> {
    POINTS
        .iter()
        .find(|(known, ..)| *known == point)
        .map(|(_, way, ..)| *way)
        .with_context(|| format!("no way to {point}"))
}

/// Makes the server die at the point it is armed for.
async fn provoke(world: &World, api: &Api, id: &str, way: Way, point: &str) -> Result<()> {
    let answer = match way {
        Way::Standby => act(api, id, "standby", None).await,
        Way::Restore => act(api, id, "restore", None).await,
        Way::Discard => act(api, id, "start", Some(json!({"discard_memory": true}))).await,
        Way::BadRestore => {
            let state = instance_dir(world, id).join("snapshot/state");
            let good = std::fs::read(&state)?;
            let mut bad = good.clone();
            if let Some(byte) = bad.last_mut() {
                *byte ^= 1;
            }
            std::fs::write(&state, bad)?;
            let answer = act(api, id, "restore", None).await;
            std::fs::write(&state, good)?;
            answer
        }
        Way::Interrupted => interrupted(world, api, id).await,
        Way::Recovery(first) => bail!("{first} is reached by itself"),
    };
    let patience = Duration::from_secs(if answer.is_ok() { 5 } else { 30 });
    if world.server.died(patience).await? {
        return Ok(());
    }
    world.server.stop().await?;
    world.server.start().await?;
    bail!("{way:?} never reached {point}; its answer was {answer:?}")
}

/// A standby that a restore comes into. Its VMM is held still until both are on their way, so that the
/// standby cannot be over before.
async fn interrupted(world: &World, api: &Api, id: &str) -> Result<serde_json::Value> {
    let held = procs::Held::new(only_vmm(world, id)?)?;
    let stage = instance_dir(world, id).join("snapshot.stage");
    let restore = async {
        wait_until("the standby has begun", 30, || Ok(stage.exists())).await?;
        let restore = act(api, id, "restore", None);
        let release = async {
            // Nobody tells when a request has arrived; far less than this is enough.
            tokio::time::sleep(Duration::from_millis(500)).await;
            held.release()
        };
        let (answer, released) = tokio::join!(restore, release);
        released?;
        answer
    };
    let (standby, restore) = tokio::join!(act(api, id, "standby", None), restore);
    ensure!(
        standby.is_err(),
        "the standby succeeded although a restore came in between"
    );
    restore
}

/// The next start dies, too, at a point on the way of its repairs.
pub async fn die_in_recovery(world: &World, point: &str) -> Result<()> {
    use std::os::unix::process::ExitStatusExt as _;
    let (status, log) = world
        .server
        .start_must_fail_with(&[("DOZE_KILL_AT", point)])
        .await
        .with_context(|| format!("a recovery that dies at {point}"))?;
    ensure!(
        status.signal() == Some(9),
        "the recovery ended with {status}, not at {point}; {log}"
    );
    Ok(())
}

/// The instance must be in this state, for a reason that has this word, and leave it as that state promises;
/// it is Running afterwards.
pub async fn found(
    world: &World,
    id: &str,
    witness: &Witness,
    outcome: &str,
    reason: &str,
) -> Result<()> {
    let api = world.api().await?;
    let instances = checks::agree(api, &world.server).await?;
    let instance = instances
        .iter()
        .find(|i| i["id"] == id)
        .with_context(|| format!("{id} is gone"))?;
    ensure!(
        instance["state"] == outcome,
        "wanted {outcome}, found {instance}"
    );
    match outcome {
        "Running" => witness.survived(api, id).await,
        "Standby" => {
            act(api, id, "restore", None).await?;
            witness.survived(api, id).await
        }
        _ => {
            let said = format!("{} {}", instance["exit_message"], instance["failure"]);
            ensure!(
                said != "null null" && said.contains(reason),
                "not the reason: {instance}"
            );
            act(api, id, "start", None).await?;
            api.wait(id, "Running", 90).await?;
            witness.lost_but_disk_kept(api, id).await?;
            checks::agree(api, &world.server).await.map(drop)
        }
    }
}

/// A restarted server may still ask a restored guest for its answer.
pub async fn settle(api: &Api, id: &str) -> Result<()> {
    for _ in 0..150 {
        let instance = api.instance(id).await?;
        if matches!(
            instance["state"].as_str(),
            Some("Running" | "Stopped" | "Standby")
        ) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    bail!("after 30 s it rests nowhere: {}", api.instance(id).await?)
}

pub fn instance_dir(world: &World, id: &str) -> std::path::PathBuf {
    world.server.data_dir.join("instances").join(id)
}

/// SIGKILL for every VMM; returns when they are gone.
pub async fn kill_vmms(world: &World) -> Result<()> {
    for vmm in procs::vmms(&world.server.data_dir)? {
        procs::kill(vmm.pid)?;
    }
    wait_until("the VMMs are gone", 10, || {
        Ok(procs::vmms(&world.server.data_dir)?.is_empty())
    })
    .await
}

/// The pid of the one VMM that the instance must have.
pub fn only_vmm(world: &World, id: &str) -> Result<i32> {
    let vmms: Vec<i32> = procs::vmms(&world.server.data_dir)?
        .into_iter()
        .filter(|v| v.instance == id)
        .map(|v| v.pid)
        .collect();
    match vmms[..] {
        [pid] => Ok(pid),
        _ => bail!("{id} has {} VMMs: {vmms:?}", vmms.len()),
    }
}

/// Looks every 10 ms; for what nobody announces.
pub async fn wait_until(what: &str, seconds: u64, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let look = async {
        while !holds()? {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(seconds), look)
        .await
        .with_context(|| format!("waited {seconds} s until {what}"))?
}
