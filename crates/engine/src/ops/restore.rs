//! Restore: a sleeping guest goes on where it was.
//!
//! ```text
//!   admitted ─> turn ─> verified ─> VMM waits ─> channel up ─> loaded ─> mark consumed ─> CPUs run ─> recorded ─> answered
//!      └────────── a failure: the VMM goes, the snapshot stays as it was ──────────┘└── only forward ──┘
//! ```
//! Consuming the mark just before the guest's first instruction is the commit point: memory and disks
//! change from there on, and the device state fits neither. At most three store commits: admitted, resumed,
//! answered.
use std::{path::Path, time::Duration};

use doze_host::files;
use doze_lifecycle::{Fact, Operation, Stamp};
use doze_snapshot::manifest::{self, Manifest, MemoryCodec};
use doze_vmm::{MachineDescription, MachineStatus};
use tokio::sync::watch;

use super::{
    Cancel, Laps, check, launch,
    standby::{ROOM, manifest_error},
};
use crate::{
    EngineError, Preparation, Progress,
    compression::{self, codec_error, files as memory_files},
    context::{blocking, io_error},
    instance::{Instance, Live, MEMORY, RUN_DIR, SNAPSHOT, process_ref, vmm_error},
    kill::KillPoint,
    life_sign, now,
    proof::{ANSWER_PATIENCE, Proof},
};

/// For the control channel's socket to be connected after the VMM made it.
const LINK_PATIENCE: Duration = Duration::from_secs(20);

/// From Standby to Running (Initializing while the guest has not answered). On error the instance
/// sleeps on, unless its guest had begun to run.
pub async fn run(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    instance.commit(Fact::Admitted(Operation::Restore)).await?;
    instance.reach(KillPoint::RestoreAdmitted);
    let mut laps = Laps::start("restore");
    if let Err(error) = wake(instance, cancel, &mut laps).await {
        instance.note(&format!("restore failed: {error}"));
        if let Err(undoing) = undo(instance, &error.to_string()).await {
            // Looked at again before the next command and by the regular check.
            instance.note(&format!("undoing the restore failed: {undoing}"));
        }
        return Err(error);
    }
    prove(instance, cancel).await?;
    laps.lap("answered");
    instance.note(laps.text());
    Ok(())
}

/// Wakes a fork with its source's memory. On error its guest never ran, or is not who it should be.
pub async fn awaken(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    check_agent(instance)?;
    let mut laps = Laps::start("waking the fork");
    wake(instance, cancel, &mut laps).await?;
    prove(instance, cancel).await?;
    laps.lap("answered");
    instance.note(laps.text());
    let refused = instance.live.as_ref().and_then(|live| {
        let answer = live.proof.as_ref()?.answer.borrow().clone()?;
        (!answer.identity_applied).then(|| answer.problem.unwrap_or_else(|| TOO_OLD.to_owned()))
    });
    match refused {
        Some(problem) if instance.inherited => Err(EngineError::Snapshot {
            reason: format!("the guest did not take its new identity: {problem}"),
        }),
        Some(_) | None => Ok(()),
    }
}

const TOO_OLD: &str = "its agent is too old to know of one";

/// Only an agent can give a copy the addresses of its own.
pub fn check_agent(instance: &Instance) -> Result<(), EngineError> {
    if instance.inherited && instance.spec.skip_guest_agent && instance.claim.is_some() {
        return Err(no_agent(instance.record.state()));
    }
    Ok(())
}

pub fn no_agent(state: doze_lifecycle::State) -> EngineError {
    EngineError::InvalidState {
        state,
        refusal: doze_lifecycle::Refusal {
            command: doze_lifecycle::Command::Fork { from_running: true },
            state,
            operation: None,
            advice: "it has a network but no guest agent (skip_guest_agent), which would give the copy its own addresses; fork it when it is Stopped",
        },
    }
}

/// On success the CPUs run and the record says so. On error they never ran, or the record could
/// not be told; [`undo`] finds out which.
async fn wake(
    instance: &mut Instance,
    cancel: &Cancel,
    laps: &mut Laps,
) -> Result<(), EngineError> {
    let ctx = instance.ctx.clone();
    let _turn = tokio::select! {
        turn = ctx.restore_turn() => turn?,
        () = cancel.cancelled() => return check(cancel),
    };
    let place = instance.dir().join(SNAPSHOT);
    let manifest = verify(instance, &instance.dir()).await?;
    let mut description = manifest.machine;
    // Its kernel may have seen this moment before.
    description
        .renew_generation()
        .map_err(io_error("making a machine's generation"))?;
    ctx.reserve_memory(&instance.id, description.memory_bytes)?;
    // On a full disk it would die as soon as it touches a page that its file has not yet. How many it will touch
    // nobody knows: disk, like memory, is overcommitted, but never begun without room.
    let _room = ctx.reserve_disk(&instance.dir(), ROOM)?;
    let monitor = ctx.monitor(description.hypervisor)?.clone();
    monitor
        .check_loads(&description, &manifest.monitor_version)
        .await
        .map_err(vmm_error)?;
    laps.lap("verified");
    instance.reach(KillPoint::RestoreVerified);
    check(cancel)?;
    if compression::unpack(instance, cancel).await? == Preparation::Decompress {
        laps.lap("decompressed");
    }

    launch::make_tap(instance).await?;
    reset_run_dir(instance).await?;
    crate::logs::mark_run(&description.vmm_log, instance.record.boots())
        .map_err(io_error("writing the VMM log"))?;
    let machine = monitor
        .spawn_to_load(&description)
        .await
        .map_err(vmm_error)?;
    laps.lap("machine waits");
    instance.reach(KillPoint::RestoreSpawned);
    instance.description = Some(description);
    let live = Live::new(machine, false);
    let (machine, agent) = (live.machine.clone(), live.agent.clone());
    // From here on `kill_machine` finds it.
    instance.live = Some(live);
    // What the guest had written when it fell asleep must have somewhere to go while it is loaded.
    let mut status = machine.watch();
    tokio::select! {
        linked = agent.linked(LINK_PATIENCE) => linked?,
        // It died; the load says so.
        _ = status.wait_for(|status| super::stop::is_off(*status)) => {}
        () = cancel.cancelled() => return check(cancel),
    }
    machine.load(&place).await.map_err(vmm_error)?;
    laps.lap("loaded");
    instance.reach(KillPoint::RestoreLoaded);
    // The last moment to change one's mind.
    check(cancel)?;
    still_there(&status)?;
    // From here on the raw memory changes, and nothing else may be taken for it.
    let dir = instance.dir();
    blocking("removing compressed memory", move || {
        memory_files::drop_artefacts(&dir)
    })
    .await?
    .map_err(io_error("removing compressed memory"))?;
    instance.reach(KillPoint::RestoreArtefactDropped);
    blocking("consuming the snapshot", move || manifest::consume(&place))
        .await?
        .map_err(manifest_error)?;
    instance.reach(KillPoint::RestoreConsumed);
    machine.resume().await.map_err(vmm_error)?;
    let resumed_at = now();
    laps.lap("resumed");
    instance.reach(KillPoint::RestoreResumed);
    record_resumed(instance, &resumed_at).await
}

/// A machine that died before its CPUs ran must not take the snapshot with it.
fn still_there(status: &watch::Receiver<MachineStatus>) -> Result<(), EngineError> {
    match super::stop::is_off(*status.borrow()) {
        false => Ok(()),
        true => Err(EngineError::Internal {
            context: "restore".into(),
            reason: "its machine monitor died before the guest ran".into(),
        }),
    }
}

/// Its CPUs run. Recorded with the process, so that a later server finds it.
async fn record_resumed(instance: &mut Instance, at: &Stamp) -> Result<(), EngineError> {
    let identity = launch::new_identity(instance);
    let Some(live) = instance.live.as_mut() else {
        return Err(EngineError::Internal {
            context: "restore".into(),
            reason: "its machine is out of reach".into(),
        });
    };
    live.proof = Some(Proof::ask(
        live.agent.clone(),
        instance.id.clone(),
        identity,
    ));
    let fact = Fact::Resumed {
        process: process_ref(live.machine.process()),
        agent: !instance.spec.skip_guest_agent,
    };
    instance.commit_at(fact, at).await?;
    instance.reach(KillPoint::RestoreRecorded);
    Ok(())
}

/// Waits for the guest's answer and books it. A guest that takes longer is Running without it, with the reason
/// shown until it answers.
async fn prove(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    let mut slow = false;
    if let Some(live) = instance.live.as_mut()
        && instance.record.awaits_answer()
        && let Some(proof) = live.proof.as_mut()
    {
        let mut status = live.status.clone();
        let answered = proof.answer.wait_for(Option::is_some);
        let ended = status.wait_for(|status| super::stop::is_off(*status));
        tokio::select! {
            answered = tokio::time::timeout(ANSWER_PATIENCE, answered) => {
                slow = answered.is_err();
            }
            _ = ended => {}
            () = cancel.cancelled() => {}
        }
    }
    crate::observe::book_answer(instance).await?;
    ended_early(instance).await?;
    if slow {
        crate::observe::book_missing_answer(instance).await?;
    }
    instance.reach(KillPoint::RestoreAnswered);
    let consumed = manifest::consumed_of(&instance.dir().join(SNAPSHOT));
    // Worthless since the guest ran; what cannot be removed now goes with the next standby or stop.
    if let Err(error) = blocking("", move || std::fs::remove_dir_all(consumed)).await? {
        instance.note(&format!("removing the consumed snapshot: {error}"));
    }
    Ok(())
}

/// A machine that died before its guest answered is no restored guest. One that powered off by itself is.
async fn ended_early(instance: &mut Instance) -> Result<(), EngineError> {
    let Some(live) = &instance.live else {
        return Ok(());
    };
    let status = *live.status.borrow();
    match status {
        MachineStatus::Gone | MachineStatus::Failed => {}
        MachineStatus::Prelaunch | MachineStatus::Running => return Ok(()),
        MachineStatus::Paused | MachineStatus::Shutdown => return Ok(()),
    }
    crate::observe::power_off(instance, status, None).await?;
    Err(EngineError::Internal {
        context: "restore".into(),
        reason: format!(
            "the guest ran again, but its machine ended before it answered ({}); its memory is lost, start it from its disk",
            instance
                .record
                .failure()
                .unwrap_or("see its logs, source vmm")
        ),
    })
}

/// Takes a restore back as far as the guest's CPUs have not run, and otherwise records what became of it.
/// Also finishes what a crash interrupted.
pub async fn undo(instance: &mut Instance, reason: &str) -> Result<(), EngineError> {
    if instance.record.operation() != Some(Operation::Restore) {
        return Ok(());
    }
    let place = instance.dir().join(SNAPSHOT);
    let probe = place.clone();
    let marked = blocking("looking for the snapshot", move || manifest::exists(&probe))
        .await?
        .map_err(manifest_error)?;
    let status = match &instance.live {
        Some(live) => live.machine.status().await.map_err(vmm_error)?,
        None => MachineStatus::Gone,
    };
    match (marked, status) {
        // The mark goes before the CPUs run: with it, they never did.
        (true, _) => {
            instance.kill_machine().await?;
            put_memory_back(instance).await?;
        }
        (false, MachineStatus::Paused | MachineStatus::Prelaunch) => {
            // The mark first: with the VMM gone and no mark, a crash in between could not tell that the
            // CPUs never ran.
            blocking("giving the snapshot its mark back", move || {
                manifest::reinstate(&place)
            })
            .await?
            .map_err(manifest_error)?;
            instance.kill_machine().await?;
            put_memory_back(instance).await?;
        }
        (false, MachineStatus::Running | MachineStatus::Shutdown | MachineStatus::Failed) => {
            instance.note("the guest runs although the restore did not say so");
            let at = life_sign::consumed_at(instance).await?;
            return record_resumed(instance, &at).await;
        }
        (false, MachineStatus::Gone) => {
            let last_seen = life_sign::consumed_at(instance).await?;
            instance.kill_machine().await?;
            instance.discard_memory().await;
            instance.reach(KillPoint::RestoreUndone);
            let reason = format!(
                "the guest's memory is lost: its machine ended after the snapshot was consumed ({reason})"
            );
            return instance
                .commit(Fact::MemoryLost { reason, last_seen })
                .await;
        }
    }
    instance.reach(KillPoint::RestoreUndone);
    let reason = format!("the last restore failed: {reason}");
    instance.commit(Fact::OperationFailed { reason }).await
}

/// Memory lies as it did before a restore that came to nothing.
async fn put_memory_back(instance: &mut Instance) -> Result<(), EngineError> {
    let compressed = instance
        .compression
        .as_ref()
        .is_some_and(|c| matches!(c.progress, Progress::Compressed { .. }));
    let dir = instance.dir();
    let left = blocking("putting memory back", move || {
        match memory_files::held(&dir) {
            // Somebody else took it; whoever wakes it next is told.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(_) => memory_files::put_back(&dir, compressed).map(Some),
        }
    })
    .await?
    .map_err(io_error("putting memory back"))?;
    match (left, instance.compression.as_mut()) {
        // What it was decompressed from was gone already.
        (Some(true), Some(compression)) if compressed => compression.progress = Progress::Planned,
        // Its job finds out that there is nothing left to do but to say so.
        (Some(false), Some(compression)) if !compressed => compression.progress = Progress::Planned,
        _ => {}
    }
    Ok(())
}

/// Whether what lies in `folder` could be woken here as this instance, without touching anything.
pub async fn check_loads(
    instance: &Instance,
    folder: &Path,
    inherited: bool,
) -> Result<(), EngineError> {
    if inherited && instance.spec.skip_guest_agent && instance.claim.is_some() {
        return Err(no_agent(instance.record.state()));
    }
    let manifest = verify(instance, folder).await?;
    let monitor = instance.ctx.monitor(manifest.machine.hypervisor)?;
    monitor
        .check_loads(&manifest.machine, &manifest.monitor_version)
        .await
        .map_err(vmm_error)
}

/// All that a restore relies on, before anything is touched. `folder`: where memory and snapshot lie now, which
/// need not be where the machine looks for them.
async fn verify(
    instance: &Instance,
    folder: &Path,
) -> Result<Manifest<MachineDescription>, EngineError> {
    let (place, folder) = (folder.join(SNAPSHOT), folder.to_owned());
    let id = instance.id.clone();
    blocking("verifying the snapshot", move || {
        let manifest: Manifest<MachineDescription> =
            manifest::read(&place).map_err(manifest_error)?;
        let machine = &manifest.machine;
        let refuse = |reason: String| Err(EngineError::Snapshot { reason });
        if machine.id != id {
            return refuse(format!("it is of instance {}, not {id}", machine.id));
        }
        match manifest.memory.codec {
            MemoryCodec::Raw => {}
        }
        let expected = manifest.memory.size;
        match memory_files::packed(&folder) {
            Ok(Some(artefact)) => {
                let found = doze_snapshot::inspect_file(&artefact).map_err(codec_error)?;
                if found.raw_size != expected {
                    return refuse(format!(
                        "{} holds {} bytes of memory, the manifest says {expected}",
                        artefact.display(),
                        found.raw_size
                    ));
                }
            }
            Ok(None) => {
                let image = doze_vmm::MemoryImage {
                    path: folder.join(MEMORY),
                    backing: machine.memory.backing,
                };
                if let Err(error) = image.check_size(expected) {
                    return refuse(error.to_string());
                }
            }
            Err(error) => return refuse(error.to_string()),
        }
        let boot = [
            ("kernel", &machine.kernel),
            ("initramfs", &machine.initramfs),
        ];
        let disks = machine.disks.iter().map(|disk| ("disk", &disk.path));
        for (what, path) in boot.into_iter().chain(disks) {
            if let Err(error) = std::fs::metadata(path) {
                return refuse(format!("its {what} {}: {error}", path.display()));
            }
        }
        Ok(manifest)
    })
    .await?
}

async fn reset_run_dir(instance: &Instance) -> Result<(), EngineError> {
    let run = instance.dir().join(RUN_DIR);
    blocking("clearing the last run", move || {
        files::remove_tree(&run)?;
        files::create_private_dir(&run)
    })
    .await?
    .map_err(io_error("clearing what the last run left"))
}
