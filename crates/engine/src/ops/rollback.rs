//! Rollback: an instance becomes again what a stored snapshot of it holds, in place.
//!
//! ```text
//!   admitted ─> clone (guest runs) ─> INCOMING ─> VMM gone ─> files swapped ─> recorded ─> restore | start | rest
//!       └───── a failure, a delete ─────┘ └──────────── only forward ──────────────┘
//! ```
//! The name of the folder `incoming` is the commit point. Before it nothing of the instance was touched and a
//! guest that runs goes on; after it whoever finds the folder finishes, file by file, each in one rename, the
//! snapshot's mark last.
use std::path::{Path, PathBuf};

use doze_host::files;
use doze_lifecycle::{Fact, Operation};
use doze_snapshot::manifest;
use doze_vmm::{MachineDescription, MachineStatus};

use super::{
    Cancel, capture, check, launch, restore,
    standby::{ROOM, manifest_error},
    start,
};
use crate::{
    EngineError, StartOverrides, TargetState,
    compression::{self, files as memory_files, stored::Access},
    context::{blocking, io_error},
    copies::{self, Durable, Home},
    instance::{Instance, OVERLAY, SNAPSHOT},
    kill::KillPoint,
    store::PendingRollback,
};

/// The new content, complete and durable: having this name is the commit point.
const INCOMING: &str = "incoming";
const STAGE: &str = "incoming.stage";
/// What no instance has without a rollback in flight.
pub const LEFTOVERS: [&str; 2] = [INCOMING, STAGE];

/// What to bring an instance back to.
pub struct Plan {
    /// The stored snapshot's folder, held open for reading.
    pub dir: PathBuf,
    pub access: Access,
    pub pending: PendingRollback,
    pub target: TargetState,
}

pub async fn run(instance: &mut Instance, cancel: &Cancel, plan: Plan) -> Result<(), EngineError> {
    let Plan {
        dir,
        access,
        pending,
        target,
    } = plan;
    let memory = pending.memory_of.is_some();
    let needed = match instance.ctx.reflinks().await? {
        true => 0,
        false => {
            let dir = dir.clone();
            blocking("measuring a snapshot", move || {
                copies::bytes_to_copy(&dir, memory)
            })
            .await?
            .map_err(io_error("measuring a snapshot"))?
        }
    };
    let room = instance.ctx.reserve_disk(&instance.dir(), needed + ROOM)?;
    // One that is found while a rollback is in flight means that it is committed: an old one must be gone.
    remove(instance, &LEFTOVERS).await?;
    instance.rollback = Some(Box::new(pending));
    if let Err(error) = instance.commit(Fact::Admitted(Operation::Rollback)).await {
        instance.rollback = None;
        return Err(error);
    }
    instance.reach(KillPoint::RollbackAdmitted);
    if let Err(error) = prepare(instance, cancel, &dir, memory, target).await {
        // What was booked for the past is the present's again, or nobody's.
        match instance.live.is_some() {
            true => {
                let bytes = instance.spec.memory_bytes;
                if let Err(error) = instance.ctx.reserve_memory(&instance.id, bytes) {
                    instance.note(&format!("its memory is booked no more: {error}"));
                }
            }
            false => instance.ctx.release_memory(&instance.id),
        }
        instance.note(&format!("rollback failed: {error}"));
        undo(instance, &error.to_string()).await?;
        return Err(error);
    }
    drop((access, room));
    finish(instance).await?;
    match (target, memory) {
        (TargetState::Running, true) => restore::run(instance, cancel).await,
        (TargetState::Running, false) => {
            start::run(instance, cancel, StartOverrides::default()).await
        }
        (TargetState::Standby | TargetState::Stopped, _) => Ok(()),
    }
}

async fn prepare(
    instance: &mut Instance,
    cancel: &Cancel,
    from: &Path,
    memory: bool,
    target: TargetState,
) -> Result<(), EngineError> {
    check(cancel)?;
    let (dir, from, cancelled) = (instance.dir(), from.to_owned(), cancel.clone());
    let (id, claim) = (instance.id.clone(), instance.claim.clone());
    blocking("copying a snapshot", move || {
        let stage = dir.join(STAGE);
        copies::clone_rest(&from, &stage, memory, &|| cancelled.is_cancelled())
            .map_err(|e| capture::copy_error(&cancelled, &e))?;
        if memory {
            let home = Home {
                id: &id,
                dir: &dir,
                claim: claim.as_ref(),
            };
            copies::rehome(&stage, &home).map_err(manifest_error)?;
        }
        copies::sync(&stage, Durable::All).map_err(io_error("making a snapshot's copy durable"))
    })
    .await??;
    instance.reach(KillPoint::RollbackStaged);
    check_host(instance, cancel, memory, target).await?;
    // The last moment to change one's mind.
    check(cancel)?;
    let dir = instance.dir();
    blocking("committing a rollback", move || {
        copies::place(&dir.join(STAGE), &dir.join(INCOMING))
    })
    .await?
    .map_err(io_error("committing a rollback"))?;
    instance.reach(KillPoint::RollbackMarked);
    Ok(())
}

/// Everything that would refuse to wake or boot what comes back, asked before anything is given up for it.
async fn check_host(
    instance: &mut Instance,
    cancel: &Cancel,
    memory: bool,
    target: TargetState,
) -> Result<(), EngineError> {
    let Some(pending) = instance.rollback.clone() else {
        return Ok(());
    };
    if memory {
        let stage = instance.dir().join(STAGE);
        restore::check_loads(instance, &stage, pending.inherited).await?;
        compression::verify(&stage, cancel).await?;
    }
    if target == TargetState::Running {
        let bytes = pending.spec.memory_bytes;
        instance.ctx.reserve_memory(&instance.id, bytes)?;
        if !memory {
            launch::describe(instance, &pending.spec).await?;
        }
    }
    Ok(())
}

/// From the commit point to the record. Can be repeated, also after a crash.
async fn finish(instance: &mut Instance) -> Result<(), EngineError> {
    let Some(pending) = instance.rollback.clone() else {
        return Err(EngineError::Internal {
            context: "rollback".into(),
            reason: "what it is brought back to is not recorded".into(),
        });
    };
    end_machine(instance).await?;
    let (dir, memory) = (instance.dir(), pending.memory_of.is_some());
    if memory && let Err(error) = launch::make_sleepers_tap(instance).await {
        // A wake makes it, and says what is wrong if it cannot.
        instance.note(&format!("its TAP is not made: {error}"));
    }
    let machine = blocking("swapping files", move || {
        swap(&dir, memory)?;
        machine_of(&dir, memory)
    })
    .await??;
    instance.reach(KillPoint::RollbackSwapped);
    let compression = match memory {
        true => instance.plan_compression_of_copy(instance.dir()).await?,
        false => None,
    };
    let before = (
        instance.spec.clone(),
        std::mem::replace(&mut instance.description, machine),
        instance.inherited,
        std::mem::replace(&mut instance.compression, compression),
    );
    instance.rollback = None;
    instance.spec = std::sync::Arc::new(pending.spec.clone());
    instance.inherited = pending.inherited;
    let back = Fact::RolledBack {
        memory_of: pending.memory_of.clone(),
    };
    if let Err(error) = instance.commit(back).await {
        (
            instance.spec,
            instance.description,
            instance.inherited,
            instance.compression,
        ) = before;
        instance.rollback = Some(pending);
        return Err(error);
    }
    instance.reach(KillPoint::RollbackRecorded);
    // Empty by now; what cannot be removed goes at the next start or before the next one.
    if let Err(error) = remove(instance, &[INCOMING]).await {
        instance.note(&format!("removing what a rollback left: {error}"));
    }
    Ok(())
}

/// The guest that runs gives way. One that ended before is booked up to its last sign of life.
async fn end_machine(instance: &mut Instance) -> Result<(), EngineError> {
    let status = match &instance.live {
        // One that does not answer is killed, which needs no answer.
        Some(live) => live
            .machine
            .status()
            .await
            .unwrap_or(MachineStatus::Running),
        None => MachineStatus::Gone,
    };
    let last_seen = crate::life_sign::last_seen(instance).await?;
    instance.kill_machine().await?;
    instance.reach(KillPoint::RollbackMachineKilled);
    if instance.record.machine().is_none() {
        return Ok(());
    }
    let failure = None;
    let gone = match super::stop::is_off(status) {
        true => Fact::MachineFoundGone { failure, last_seen },
        false => Fact::MachineGone { failure },
    };
    instance.commit(gone).await
}

/// Which machine sleeps now. Recorded with the rollback: without, a crash of its restore could not find its VMM again.
fn machine_of(dir: &Path, memory: bool) -> Result<Option<MachineDescription>, EngineError> {
    match memory {
        true => {
            let manifest = manifest::read(&dir.join(SNAPSHOT)).map_err(manifest_error)?;
            Ok(Some(manifest.machine))
        }
        false => Ok(None),
    }
}

/// Memory first, its mark last: in between there is neither the old nor the new one, and `incoming` says so.
fn swap(dir: &Path, memory: bool) -> Result<(), EngineError> {
    let incoming = dir.join(INCOMING);
    let coming = |name: &str| {
        incoming
            .join(name)
            .try_exists()
            .map_err(io_error("looking for a file"))
    };
    if memory && !coming(SNAPSHOT)? {
        // It was swapped before a crash.
        return Ok(());
    }
    manifest::remove(&dir.join(SNAPSHOT)).map_err(manifest_error)?;
    let held = match memory_files::held(&incoming) {
        Ok(name) => Some(name),
        // There is none in it, or it was swapped before a crash.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(io_error("looking for memory")(error)),
    };
    if !memory || held.is_some() {
        memory_files::remove_all(dir).map_err(io_error("removing memory"))?;
    }
    for name in [Some(OVERLAY), held, Some(SNAPSHOT)].into_iter().flatten() {
        if coming(name)? {
            copies::place(&incoming.join(name), &dir.join(name))
                .map_err(io_error("swapping a file"))?;
        }
    }
    Ok(())
}

/// Takes a rollback back that was not committed, and finishes one that was. Also after a crash.
pub async fn undo(instance: &mut Instance, reason: &str) -> Result<(), EngineError> {
    if instance.record.operation() != Some(Operation::Rollback) {
        return Ok(());
    }
    let incoming = instance.dir().join(INCOMING);
    let committed = blocking("looking for a rollback", move || incoming.try_exists())
        .await?
        .map_err(io_error("looking for a rollback"))?;
    if committed {
        return finish(instance).await;
    }
    remove(instance, &[STAGE]).await?;
    instance.reach(KillPoint::RollbackUndone);
    let reason = format!("the last rollback was given up: {reason}");
    let pending = instance.rollback.take();
    let done = instance.commit(Fact::OperationFailed { reason }).await;
    if done.is_err() {
        instance.rollback = pending;
    }
    done
}

async fn remove(instance: &Instance, names: &'static [&'static str]) -> Result<(), EngineError> {
    let dir = instance.dir();
    blocking("removing a rollback's files", move || {
        names
            .iter()
            .try_for_each(|name| files::remove_tree(&dir.join(name)))
    })
    .await?
    .map_err(io_error("removing a rollback's files"))
}
