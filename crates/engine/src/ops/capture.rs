//! Capture: a copy of what an instance is at this moment, in a folder of its own, for a snapshot or a fork.
//!
//! ```text
//!   at rest: clone ─────────────────────────────────────────────────────────────> synced
//!   running: admitted ─> flush ─> pause ─> save, clone ─> CPUs run ─> recorded ─> synced
//!                          └──────── a failure, a delete: the guest goes on ──┘
//! ```
//! Nothing of the instance changes, except that a running guest stands still for the moment that saving its device
//! state and cloning its files takes. Whoever asked gives the copy its place; until then it is nobody's, so
//! there is nothing to undo after a crash but the pause.
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use doze_host::files;
use doze_lifecycle::{Fact, Operation, Record, State};
use doze_snapshot::manifest;
use doze_vmm::{MachineDescription, SavedFile};

use super::{
    Cancel, Laps, check,
    standby::{self, ROOM, manifest_error},
};
use crate::{
    EngineError, InstanceSpec,
    context::{blocking, io_error, lock},
    copies::{self, Durable},
    instance::{Instance, MEMORY, OVERLAY, SNAPSHOT, vmm_error},
    kill::KillPoint,
    now,
};

/// A copy, and what its source was when it was made.
#[derive(Debug)]
pub struct Captured {
    pub dir: PathBuf,
    /// What the source was: Running, Standby or Stopped.
    pub state: State,
    pub spec: Arc<InstanceSpec>,
    pub record: Arc<Record>,
    pub inherited: bool,
}

impl Captured {
    pub fn has_memory(&self) -> bool {
        self.state != State::Stopped
    }
}

/// What to copy.
#[derive(Debug, Clone)]
pub struct Plan {
    /// A new folder.
    pub dir: PathBuf,
    pub durable: Durable,
    pub outcome: Outcome,
}

/// Where the operation leaves its result for whoever asked.
pub type Outcome = Arc<Mutex<Option<Captured>>>;

/// Copies into the new folder. On error nothing is there, and a running guest goes on.
pub async fn run(instance: &mut Instance, cancel: &Cancel, plan: &Plan) -> Result<(), EngineError> {
    let Plan { dir, outcome, .. } = plan;
    let state = instance.record.state();
    let mut laps = Laps::start("copying it");
    let made = match state {
        State::Running => of_running(instance, cancel, plan, &mut laps).await,
        State::Standby => of_resting(instance, cancel, plan, true).await,
        State::Stopped => of_resting(instance, cancel, plan, false).await,
        State::Created | State::Initializing | State::Paused | State::Shutdown => {
            Err(EngineError::Internal {
                context: "copying an instance".into(),
                reason: format!("it is {state}"),
            })
        }
    };
    if let Err(error) = made {
        instance.note(&format!("copying it failed: {error}"));
        let dir = dir.to_owned();
        let removed = blocking("removing a half-made copy", move || {
            files::remove_tree(&dir)
        });
        if let Err(removing) = removed.await? {
            // It goes at the next start.
            instance.note(&format!("removing the half-made copy: {removing}"));
        }
        return Err(error);
    }
    laps.lap("copied");
    instance.note(laps.text());
    let captured = Captured {
        dir: dir.to_owned(),
        state,
        spec: instance.spec.clone(),
        record: instance.record.clone(),
        inherited: instance.inherited,
    };
    *lock(outcome) = Some(captured);
    Ok(())
}

async fn of_resting(
    instance: &mut Instance,
    cancel: &Cancel,
    plan: &Plan,
    memory: bool,
) -> Result<(), EngineError> {
    check(cancel)?;
    let _room = room(instance, memory).await?;
    let (from, to, cancelled) = (instance.dir(), plan.dir.clone(), cancel.clone());
    let durable = plan.durable;
    blocking("copying an instance", move || {
        if memory {
            // What is altered must not be spread.
            manifest::read::<MachineDescription>(&from.join(SNAPSHOT)).map_err(manifest_error)?;
        }
        copies::clone_rest(&from, &to, memory, &|| cancelled.is_cancelled())
            .and_then(|()| copies::sync(&to, durable))
            .map_err(|e| copy_error(&cancelled, &e))
    })
    .await?
}

async fn of_running(
    instance: &mut Instance,
    cancel: &Cancel,
    plan: &Plan,
    laps: &mut Laps,
) -> Result<(), EngineError> {
    let _room = room(instance, true).await?;
    instance.commit(Fact::Admitted(Operation::Snapshot)).await?;
    instance.reach(KillPoint::SnapshotAdmitted);
    let frozen = freeze(instance, cancel, &plan.dir, laps).await;
    // The guest goes on first, whatever became of its copy.
    go_on(instance).await?;
    laps.lap("resumed");
    let (version, description, saved) = frozen?;
    let (dir, durable) = (plan.dir.clone(), plan.durable);
    blocking("making a copy durable", move || {
        let place = dir.join(SNAPSHOT);
        let manifest = standby::describe(version, &description, saved);
        manifest::seal(&place, &manifest).map_err(manifest_error)?;
        manifest::publish(&place).map_err(manifest_error)?;
        copies::sync(&dir, durable).map_err(|e| standby::disk_error("a copy", &e))
    })
    .await?
}

type Frozen = (String, MachineDescription, Vec<SavedFile>);

/// Stops the guest, saves its device state and clones its files.
async fn freeze(
    instance: &mut Instance,
    cancel: &Cancel,
    dir: &Path,
    laps: &mut Laps,
) -> Result<Frozen, EngineError> {
    let (Some(live), Some(description)) = (&instance.live, instance.description.clone()) else {
        return Err(EngineError::Internal {
            context: "copying a running guest".into(),
            reason: "its machine is out of reach; stop it, or restart the server".into(),
        });
    };
    let machine = live.machine.clone();
    let stage = manifest::stage_of(&dir.join(SNAPSHOT));
    let (made, made_stage) = (dir.to_owned(), stage.clone());
    blocking("making a copy's folder", move || {
        files::create_private_dir(&made).and_then(|()| files::create_private_dir(&made_stage))
    })
    .await?
    .map_err(io_error("making a copy's folder"))?;
    standby::flush(&description, cancel).await?;
    laps.lap("flushed");
    check(cancel)?;

    machine.pause().await.map_err(vmm_error)?;
    let paused_at = now();
    laps.lap("paused");
    instance.reach(KillPoint::SnapshotPaused);
    let mut facts = crate::observe::markers(instance);
    facts.push((Fact::CpusPaused, paused_at));
    let copying = async {
        let saved = machine.save(&stage).await.map_err(vmm_error)?;
        laps.lap("saved");
        check(cancel)?;
        let (from, to, cancelled) = (
            description.memory.path.clone(),
            dir.to_owned(),
            cancel.clone(),
        );
        let from = from.parent().map(Path::to_owned).unwrap_or_default();
        blocking("cloning a guest", move || {
            [MEMORY, OVERLAY]
                .iter()
                .try_for_each(|name| {
                    copies::clone_file(&from, &to, name, &|| cancelled.is_cancelled())
                })
                .map_err(|e| copy_error(&cancelled, &e))
        })
        .await??;
        laps.lap("cloned");
        Ok::<_, EngineError>(saved)
    };
    let (recorded, saved) = tokio::join!(instance.commit_all(&facts), copying);
    instance.reach(KillPoint::SnapshotCopied);
    recorded?;
    Ok((machine.version().to_owned(), description, saved?))
}

/// Lets the guest run on and records it. Also after a crash.
pub async fn go_on(instance: &mut Instance) -> Result<(), EngineError> {
    if instance.record.operation() != Some(Operation::Snapshot) {
        return Ok(());
    }
    let Some(resumed_at) = standby::resume(instance).await? else {
        return Err(EngineError::Internal {
            context: "copying a running guest".into(),
            reason: "its machine monitor died; see its logs (source vmm)".into(),
        });
    };
    instance.reach(KillPoint::SnapshotResumed);
    instance
        .commit_at(Fact::GuestContinued, &resumed_at)
        .await?;
    instance.reach(KillPoint::SnapshotContinued);
    Ok(())
}

/// Promises the disk what a copy will write.
async fn room(instance: &Instance, memory: bool) -> Result<crate::context::DiskRoom, EngineError> {
    let ctx = &instance.ctx;
    let dir = instance.dir();
    let held = blocking("measuring an instance", move || {
        copies::bytes_to_copy(&dir, memory)
    })
    .await?
    .map_err(io_error("measuring an instance"))?;
    let promise = ctx.reserve_disk(&instance.dir(), held + ROOM)?;
    if !ctx.reflinks().await? {
        return Ok(promise);
    }
    // Shared blocks cost nothing now, but a guest that changes them needs new ones, and a disk that has none
    // kills its machine: so there must be room for all of them, if only at this moment.
    drop(promise);
    ctx.reserve_disk(&instance.dir(), ROOM)
}

/// A copy that was given up because somebody asked says so.
pub fn copy_error(cancel: &Cancel, error: &std::io::Error) -> EngineError {
    match check(cancel) {
        Err(interrupted) if error.kind() == std::io::ErrorKind::Interrupted => interrupted,
        Ok(()) | Err(_) => standby::disk_error("copying an instance", error),
    }
}
