//! kill -9 at every named point of a compression and of a restore from compressed memory, of the server alone and of
//! server and VMMs: the raw memory or the artefact is complete, and the next server knows which.
//!
//! ```text
//!   sleeper ─ witness in its memory ─ server with DOZE_KILL_AT ─ falls asleep | is kept | wakes ─ the server dies
//!      ^                                                                                         │
//!      └── wakes with its witness <── compressed again, one form, no stage file <── restart <── files looked at
//! ```
use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Api, Case, Group, Sample, Witness, World, checks,
    compression::{balanced, forms, plain_tool_reads, quiet, reaches, snapshot_reaches},
    sample::Random,
};
use serde_json::json;

use crate::{
    compression::{CODECS, Codec, drop_snapshot, fork, sleep, snapshot_dir, take, text},
    crash_standby::{act, cycle, die_in_recovery, found, instance_dir, kill_vmms, settle, sleeper},
};

const BOARDS: [&str; 2] = ["qemu-microvm", "qemu"];
/// Cases beyond one per point that a test run takes.
const SAMPLED: usize = 2;
const CODEC: Codec = CODECS[1];

/// How the server comes to a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The memory of an instance that fell asleep is compressed.
    Asleep,
    /// A stored snapshot's of an instance that runs on.
    Stored,
    /// An instance with compressed memory is woken.
    Woken,
}

/// In which forms the memory lies when the server is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lies {
    Both,
    Raw,
    Compressed,
}

/// What a restart must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// In standby, and compressed at once or in time.
    Sleeps,
    Runs,
    /// Stopped with a reason that has this word.
    Stopped(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scenario {
    point: &'static str,
    way: Way,
    lies: Lies,
    with_vmm: bool,
    outcome: Outcome,
    /// The next server dies at this point of its repairs.
    then: Option<&'static str>,
}

impl Scenario {
    fn name(&self) -> String {
        let way = match self.way {
            Way::Asleep => "asleep",
            Way::Stored => "stored",
            Way::Woken => "woken",
        };
        let then = self.then.map(|then| format!(".then.{then}"));
        let vmm = if self.with_vmm { ".and-vmm" } else { "" };
        format!("{way}.{}{vmm}{}", self.point, then.unwrap_or_default())
    }
}

/// The way to each point, what lies there then, and what is found after the death of the server, and of server and
/// VMMs where that is something else.
#[rustfmt::skip]
const POINTS: &[(&str, Way, Lies, Outcome, Option<Outcome>)] = {
    use Outcome::{Runs, Sleeps, Stopped};
    &[
        ("compression.made", Way::Asleep, Lies::Both, Sleeps, None),
        ("compression.raw_removed", Way::Asleep, Lies::Compressed, Sleeps, None),
        ("compression.recorded", Way::Asleep, Lies::Compressed, Sleeps, None),
        ("compression.made", Way::Stored, Lies::Both, Runs, Some(Stopped("monitor"))),
        ("compression.raw_removed", Way::Stored, Lies::Compressed, Runs, Some(Stopped("monitor"))),
        ("compression.recorded", Way::Stored, Lies::Compressed, Runs, Some(Stopped("monitor"))),
        ("restore.decompressed", Way::Woken, Lies::Both, Sleeps, None),
        ("restore.artefact_dropped", Way::Woken, Lies::Raw, Sleeps, Some(Sleeps)),
    ]
};

/// Points of others, with memory that is compressed.
#[rustfmt::skip]
const MORE: &[(&str, Way, Lies, Outcome, Option<Outcome>)] = {
    use Outcome::{Runs, Sleeps, Stopped};
    &[
        ("restore.admitted", Way::Woken, Lies::Compressed, Sleeps, None),
        ("restore.spawned", Way::Woken, Lies::Both, Sleeps, Some(Sleeps)),
        ("restore.loaded", Way::Woken, Lies::Both, Sleeps, Some(Sleeps)),
        ("restore.consumed", Way::Woken, Lies::Raw, Sleeps, Some(Stopped("memory is lost"))),
        ("restore.resumed", Way::Woken, Lies::Raw, Runs, Some(Stopped("memory is lost"))),
    ]
};

/// A first death while it wakes and a second one while that is repaired.
const TWICE: [(&str, Lies); 3] = [
    ("restore.decompressed", Lies::Both),
    ("restore.artefact_dropped", Lies::Raw),
    ("restore.consumed", Lies::Raw),
];

/// Whether the point is one of this file's.
pub fn covers(point: &str) -> bool {
    POINTS.iter().any(|(known, ..)| *known == point)
}

type Row = (&'static str, Way, Lies, Outcome, Option<Outcome>);

fn alone(table: &[Row]) -> Vec<Scenario> {
    let scenario = |(point, way, lies, outcome, _): &Row| Scenario {
        point,
        way: *way,
        lies: *lies,
        with_vmm: false,
        outcome: *outcome,
        then: None,
    };
    table.iter().map(scenario).collect()
}

fn with_vmm(table: &[Row]) -> Vec<Scenario> {
    let differs = table.iter().filter_map(|row| Some((row, row.4?)));
    let scenario = |((point, way, lies, ..), outcome): (&Row, Outcome)| Scenario {
        point,
        way: *way,
        lies: *lies,
        with_vmm: true,
        outcome,
        then: None,
    };
    differs.map(scenario).collect()
}

fn twice() -> Vec<Scenario> {
    let scenario = |(point, lies)| Scenario {
        point,
        way: Way::Woken,
        lies,
        with_vmm: false,
        outcome: Outcome::Sleeps,
        then: Some("restore.undone"),
    };
    TWICE.map(scenario).into()
}

/// One group per board: every point on one of them, and some of the rest; a campaign takes all on both.
///
/// # Errors
/// When the tables name a point that the server does not have.
pub fn groups(points: &[String], sample: &Sample) -> Result<Vec<Group>> {
    for (point, ..) in POINTS.iter().chain(MORE) {
        ensure!(
            points.iter().any(|known| known == point),
            "the server has no kill point {point:?}"
        );
    }
    let more = [with_vmm(POINTS), alone(MORE), with_vmm(MORE), twice()].concat();
    let mut random = sample.random("kill -9 in compression");
    let mut chosen = BOARDS.map(|board| (board, Vec::new()));
    if sample.campaign {
        for (_, all) in &mut chosen {
            *all = [alone(POINTS), more.clone()].concat();
        }
    } else {
        for scenario in alone(POINTS) {
            chosen[random.below(BOARDS.len())].1.push(scenario);
        }
        for scenario in random.choose(more, SAMPLED) {
            chosen[random.below(BOARDS.len())].1.push(scenario);
        }
    }
    let (rounds, codecs) = match sample.campaign {
        true => (20, CODECS.to_vec()),
        false => (1, CODECS.into_iter().filter(|c| c.level <= 3).collect()),
    };
    let anywhere = random.below(BOARDS.len());
    let group = |(at, (board, scenarios)): (usize, (&str, Vec<Scenario>))| {
        let mut cases: Vec<Case> = scenarios.into_iter().map(case).collect();
        if sample.campaign || at == anywhere {
            let (random, codecs) = (sample.random(board), codecs.clone());
            cases.push(
                Case::new("at_any_moment", move |world: &World| {
                    Box::pin(at_any_moment(world, random.clone(), codecs.clone(), rounds))
                })
                .deadline(Duration::from_secs(900)),
            );
        }
        Group::on(board, "-kill9-compression", cases)
    };
    Ok(chosen.into_iter().enumerate().map(group).collect())
}

fn case(scenario: Scenario) -> Case {
    Case::new(scenario.name(), move |world| {
        Box::pin(crash(world, scenario))
    })
    .deadline(Duration::from_secs(900))
}

async fn crash(world: &World, scenario: Scenario) -> Result<()> {
    let api = world.api().await?;
    let id = sleeper(world).await?;
    let witness = Witness::plant(api, &id).await?;
    let body = json!({"compression": CODEC.request()});
    if scenario.way == Way::Woken {
        sleep(api, &id, body.clone()).await?;
        reaches(api, &id, &["compressed"], 300).await?;
    }
    world.server.stop().await?;
    let armed = [("DOZE_KILL_AT", scenario.point)];
    world.server.start_with(&armed).await?;
    let mut snapshot = None;
    let answer = match scenario.way {
        Way::Asleep => sleep(api, &id, body).await,
        Way::Woken => act(api, &id, "restore", None).await,
        Way::Stored => {
            let body = json!({"kind": "Standby", "compression": CODEC.request()});
            let made = take(api, &id, body).await;
            if let Ok(made) = &made {
                snapshot = Some(text(made, "id")?);
            }
            made
        }
    };
    if !world.server.died(Duration::from_secs(300)).await? {
        world.server.stop().await?;
        world.server.start().await?;
        bail!("{scenario:?} never reached its point; the answer was {answer:?}");
    }
    if scenario.with_vmm {
        kill_vmms(world).await?;
    }
    let dir = match (&snapshot, scenario.way) {
        (Some(snapshot), Way::Stored) => snapshot_dir(world, snapshot),
        (None, Way::Stored) => bail!("no snapshot was taken: {answer:?}"),
        (_, Way::Asleep | Way::Woken) => instance_dir(world, &id),
    };
    lies(&dir, scenario.lies)?;
    if let Some(point) = scenario.then {
        die_in_recovery(world, point).await?;
        complete(&dir)?;
    }
    world.server.start().await?;
    settle(api, &id).await?;
    match scenario.outcome {
        Outcome::Sleeps => {
            reaches(api, &id, &["compressed"], 300).await?;
            lies(&dir, Lies::Compressed)?;
            found(world, &id, &witness, "Standby", "").await?;
        }
        Outcome::Runs => found(world, &id, &witness, "Running", "").await?,
        Outcome::Stopped(reason) => found(world, &id, &witness, "Stopped", reason).await?,
    }
    if let Some(snapshot) = snapshot {
        snapshot_is(world, api, &snapshot, &witness).await?;
    }
    let account = quiet(api, 300).await?;
    ensure!(
        account.sum("", |jobs| jobs.ended["failed"]) == 0,
        "{account:?}"
    );
    cycle(world, &id).await
}

/// Memory lies so, and what lies there is complete.
fn lies(dir: &Path, lies: Lies) -> Result<()> {
    let found = forms(dir)?;
    let artefact = CODEC.artefact();
    let wanted: &[&str] = match lies {
        Lies::Both => &["memory", artefact],
        Lies::Raw => &["memory"],
        Lies::Compressed => &[artefact],
    };
    ensure!(found == wanted, "wanted {wanted:?}, found {found:?}");
    complete(dir)
}

/// The raw file, or an artefact that plain tools read to its end; never neither.
fn complete(dir: &Path) -> Result<()> {
    let found = forms(dir)?;
    if found.iter().any(|name| name == "memory") {
        let bytes = std::fs::metadata(dir.join("memory"))?.len();
        ensure!(
            bytes == 256 << 20,
            "{found:?}, and the raw one has {bytes} bytes"
        );
    }
    let mut whole = found
        .iter()
        .filter(|name| !name.starts_with('.'))
        .peekable();
    ensure!(whole.peek().is_some(), "no memory is left: {found:?}");
    for artefact in whole.filter(|name| name.as_str() != "memory") {
        plain_tool_reads(&dir.join(artefact))?;
    }
    Ok(())
}

async fn snapshot_is(world: &World, api: &Api, id: &str, witness: &Witness) -> Result<()> {
    snapshot_reaches(api, id, &["compressed"], 300).await?;
    let left = forms(&snapshot_dir(world, id))?;
    ensure!(
        matches!(&left[..], [one] if one.starts_with("memory.")),
        "{left:?}"
    );
    let path = format!("/snapshots/{id}/fork");
    let (copy, _) = fork(world, &path, "Running").await?;
    witness.survived(api, &copy).await?;
    api.remove(&copy).await?;
    drop_snapshot(api, id).await
}

/// Some time after a snapshot was taken and its source fell asleep, both to be compressed.
async fn at_any_moment(
    world: &World,
    mut random: Random,
    codecs: Vec<Codec>,
    rounds: usize,
) -> Result<()> {
    let mut outcomes = Vec::new();
    for round in 0..rounds {
        let api = world.api().await?;
        let id = sleeper(world).await?;
        let witness = Witness::plant(api, &id).await?;
        let own = codecs[random.below(codecs.len())];
        let stored = codecs[random.below(codecs.len())];
        let body = json!({"kind": "Standby", "compression": stored.request()});
        let snapshot = text(&take(api, &id, body).await?, "id")?;
        sleep(api, &id, json!({"compression": own.request()})).await?;
        let delay = random.below(3000);
        tokio::time::sleep(Duration::from_millis(delay as u64)).await;
        world.server.kill().await?;
        let dirs = [instance_dir(world, &id), snapshot_dir(world, &snapshot)];
        let found_then = [forms(&dirs[0])?, forms(&dirs[1])?];
        let work = async {
            for dir in &dirs {
                complete(dir)?;
            }
            world.server.start().await?;
            reaches(api, &id, &["compressed"], 300).await?;
            snapshot_is(world, api, &snapshot, &witness).await?;
            ensure!(
                forms(&dirs[0])? == [own.artefact()],
                "{:?}",
                forms(&dirs[0])?
            );
            found(world, &id, &witness, "Standby", "").await?;
            balanced(api).await
        };
        work.await.with_context(|| {
            format!("round {round}, {own:?}, {stored:?}, {delay} ms, {found_then:?}")
        })?;
        outcomes.push(format!("{delay} ms {:?}", found_then[0]));
    }
    println!("killed while compressing: {}", outcomes.join(", "));
    checks::agree(world.api().await?, &world.server).await?;
    cycle(world, &sleeper(world).await?).await
}
