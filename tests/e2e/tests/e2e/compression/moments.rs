//! What comes while a compression waits for its time, works, is about to end, or is over: the memory is always that
//! of the guest which fell asleep, and a source that sleeps on keeps its plan.
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Case, Sample, Witness, World,
    compression::{Account, balanced, forms, plain_tool_reads, reaches},
};
use serde_json::{Value, json};

use super::{
    CODECS, Codec, SLOW, all_is_well, drop_snapshot, fork, guest, only, sleep, snapshot_dir, take,
    text, wake,
};
use crate::crash_standby::instance_dir;

/// Of mixed data in the guest's memory.
pub const MIB: u32 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Pending,
    Compressing,
    /// The artefact has just got its name.
    Ending,
    Compressed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Restore,
    ForkAsleep,
    ForkAwake,
    Snapshot,
}

const MOMENTS: [Moment; 4] = [
    Moment::Pending,
    Moment::Compressing,
    Moment::Ending,
    Moment::Compressed,
];
const OPERATIONS: [Operation; 4] = [
    Operation::Restore,
    Operation::ForkAsleep,
    Operation::ForkAwake,
    Operation::Snapshot,
];

#[derive(Debug, Clone, Copy)]
struct Meeting {
    moment: Moment,
    operation: Operation,
    codec: Codec,
}

impl Meeting {
    fn name(self) -> String {
        let name = format!(
            "{:?}_when_{:?}.{}-{}",
            self.operation, self.moment, self.codec.algorithm, self.codec.level
        );
        name.to_lowercase()
    }
}

/// A test run brings each moment together with an operation that its seed chooses, half of them on each board, with
/// codecs that are fast enough; a campaign brings each together with each on both, and takes every codec to its end.
pub fn cases(sample: &Sample, board: usize) -> Vec<Case> {
    let mut random = sample.random("compression");
    let mut meetings = Vec::new();
    if sample.campaign {
        for moment in MOMENTS {
            for operation in OPERATIONS {
                // Every one of them, whatever the seed, all the way, which takes the slow one minutes.
                let whole = moment == Moment::Compressed && operation == Operation::Restore;
                let fits = |codec: &Codec| match moment {
                    Moment::Pending => true,
                    // Nobody meets a fast one at work.
                    Moment::Compressing => codec.level >= 9,
                    Moment::Ending | Moment::Compressed => whole || *codec != SLOW,
                };
                let all: Vec<Codec> = CODECS.into_iter().filter(fits).collect();
                let chosen = random.below(all.len());
                for (at, codec) in all.into_iter().enumerate() {
                    if whole || at == chosen {
                        meetings.push(Meeting {
                            moment,
                            operation,
                            codec,
                        });
                    }
                }
            }
        }
    } else {
        let operations = random.choose(OPERATIONS.to_vec(), OPERATIONS.len());
        let moments = random.choose(MOMENTS.to_vec(), MOMENTS.len());
        for (at, (moment, operation)) in moments.into_iter().zip(operations).enumerate() {
            let fast: Vec<Codec> = CODECS.into_iter().filter(|c| c.level <= 3).collect();
            let codec = match moment {
                Moment::Compressing => SLOW,
                _ => fast[random.below(fast.len())],
            };
            if at % 2 == board {
                meetings.push(Meeting {
                    moment,
                    operation,
                    codec,
                });
            }
        }
    }
    let case =
        |meeting: Meeting| Case::new(meeting.name(), move |world| Box::pin(meet(world, meeting)));
    meetings.into_iter().map(case).collect()
}

async fn meet(world: &World, meeting: Meeting) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "mixed", MIB).await?;
    let before = balanced(api).await?;
    let delay = match meeting.moment {
        Moment::Pending => "1h",
        Moment::Compressing | Moment::Ending | Moment::Compressed => "0s",
    };
    let body = json!({"compression": meeting.codec.request(), "compression_delay": delay});
    let answer = sleep(api, &id, body).await?;
    let planned = answer["standby_compression"].clone();
    // Nobody waits for it.
    ensure!(
        matches!(planned["state"].as_str(), Some("pending" | "compressing"))
            && planned["compression"] == meeting.codec.request()
            && planned["compressed_size_bytes"].is_null(),
        "{answer}"
    );
    await_moment(world, &id, meeting).await?;
    match meeting.operation {
        Operation::Restore => {}
        Operation::ForkAsleep | Operation::ForkAwake | Operation::Snapshot => {
            copy(world, &id, meeting, &witness).await?;
            sleeps_on(world, &id, meeting, &planned).await?;
        }
    }
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    counted(&before, &balanced(api).await?, meeting)?;
    all_is_well(world).await
}

async fn await_moment(world: &World, id: &str, meeting: Meeting) -> Result<()> {
    let api = world.api().await?;
    match meeting.moment {
        Moment::Pending => only(world, id, "memory"),
        Moment::Compressing => reaches(api, id, &["compressing"], 30).await.map(drop),
        Moment::Compressed => {
            let done = reaches(api, id, &["compressed"], 1500).await?;
            let artefact = instance_dir(world, id).join(meeting.codec.artefact());
            only(world, id, meeting.codec.artefact())?;
            plain_tool_reads(&artefact)?;
            let bytes = std::fs::metadata(&artefact)?.len();
            ensure!(
                done["compressed_size_bytes"] == bytes
                    && done["uncompressed_size_bytes"] == 512 << 20,
                "{bytes}: {done}"
            );
            Ok(())
        }
        Moment::Ending => {
            let artefact = instance_dir(world, id).join(meeting.codec.artefact());
            let end = Instant::now() + Duration::from_secs(1500);
            while !artefact.try_exists()? {
                ensure!(Instant::now() < end, "{} never came", artefact.display());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        }
    }
}

/// A copy has the source's memory, in the form in which that lay there.
async fn copy(world: &World, id: &str, meeting: Meeting, witness: &Witness) -> Result<()> {
    let api = world.api().await?;
    let as_fork = format!("/instances/{id}/fork");
    let copy = match meeting.operation {
        Operation::ForkAwake => fork(world, &as_fork, "Running").await?.0,
        Operation::ForkAsleep => {
            let (copy, made) = fork(world, &as_fork, "Standby").await?;
            let dir = instance_dir(world, &copy);
            cloned(
                meeting,
                &forms(&dir)?,
                &made["standby_compression"]["state"],
            )
            .with_context(|| made.to_string())?;
            wake(world, &copy).await?;
            copy
        }
        Operation::Snapshot | Operation::Restore => {
            let made = take(api, id, json!({"kind": "Standby"})).await?;
            let snapshot = text(&made, "id")?;
            let state = match &made["compression_state"] {
                none if none == "none" => &Value::Null,
                state => state,
            };
            cloned(meeting, &forms(&snapshot_dir(world, &snapshot))?, state)
                .with_context(|| made.to_string())?;
            let (copy, _) = fork(world, &format!("/snapshots/{snapshot}/fork"), "Running").await?;
            drop_snapshot(api, &snapshot).await?;
            copy
        }
    };
    only(world, &copy, "memory")?;
    witness.survived(api, &copy).await?;
    api.remove(&copy).await
}

/// Compressed if the source was, and otherwise as it is: nobody wants anything else of this guest.
fn cloned(meeting: Meeting, forms: &[String], state: &Value) -> Result<()> {
    let artefact = meeting.codec.artefact();
    let compressed = forms == [artefact] && state == "compressed";
    let raw = forms == ["memory"] && state.is_null();
    let right = match meeting.moment {
        Moment::Pending | Moment::Compressing => raw,
        Moment::Ending => raw || compressed,
        Moment::Compressed => compressed,
    };
    ensure!(right, "{meeting:?}: {state} and {forms:?}");
    Ok(())
}

/// The source's plan is what it was; one that does not take too long is waited for.
async fn sleeps_on(world: &World, id: &str, meeting: Meeting, planned: &Value) -> Result<()> {
    let api = world.api().await?;
    let instance = api.instance(id).await?;
    let now = &instance["standby_compression"];
    let allowed: &[&str] = match meeting.moment {
        Moment::Pending => &["pending"],
        Moment::Compressing | Moment::Ending => &["pending", "compressing", "compressed"],
        Moment::Compressed => &["compressed"],
    };
    ensure!(
        instance["state"] == "Standby"
            && now["state"].as_str().is_some_and(|s| allowed.contains(&s))
            && now["due_at"] == planned["due_at"]
            && now["compression"] == planned["compression"],
        "was {planned}: {instance}"
    );
    if meeting.moment != Moment::Pending && meeting.codec != SLOW {
        reaches(api, id, &["compressed"], 1500).await?;
        only(world, id, meeting.codec.artefact())?;
    }
    Ok(())
}

/// What was halted is counted by whoever came, and how the memory was prepared by what was there.
fn counted(before: &Account, after: &Account, meeting: Meeting) -> Result<()> {
    let by = match meeting.operation {
        Operation::Restore => "restore",
        Operation::ForkAsleep | Operation::ForkAwake => "fork",
        Operation::Snapshot => "snapshot",
    };
    let came = |account: &Account| {
        let key = ("standby".to_owned(), by.to_owned());
        account.preemptions.get(&key).copied().unwrap_or_default()
    };
    let grown = came(after) - came(before);
    let skipped = |account: &Account| account.sum("source=standby", |jobs| jobs.ended["skipped"]);
    let right = match meeting.moment {
        Moment::Pending => grown == 0 && skipped(after) > skipped(before),
        Moment::Compressing if meeting.codec == SLOW => grown == 1,
        Moment::Compressing | Moment::Ending => grown <= 1,
        Moment::Compressed => grown == 0,
    };
    ensure!(
        right,
        "{meeting:?}: {grown} pre-empted by {by}: {before:?}, {after:?}"
    );
    let decompressed = |account: &Account| {
        account
            .preparations
            .get("decompress")
            .copied()
            .unwrap_or_default()
    };
    let unpacked = decompressed(after) - decompressed(before);
    let right = match meeting.moment {
        Moment::Pending => unpacked == 0,
        Moment::Compressing if meeting.codec == SLOW => unpacked == 0,
        Moment::Compressing | Moment::Ending => true,
        Moment::Compressed => unpacked >= 1,
    };
    ensure!(right, "{meeting:?}: {unpacked} decompressed");
    Ok(())
}
