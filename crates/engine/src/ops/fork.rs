//! Fork: a copy becomes an instance of its own. Undone completely when it fails.
//!
//! ```text
//!   copy gets its place ─> its machine is ours ─> Stopped | Standby | boots | wakes with another's memory
//! ```
//! A guest that wakes with another's memory has its MAC, IP, hostname and machine-id. Its TAP is no port of the bridge
//! until its agent acknowledged its own ones (`Instance::inherited`).
use std::path::PathBuf;

use doze_host::files;
use doze_lifecycle::Fact;

use super::{Cancel, check, create, delete, launch, restore, standby::manifest_error};
use crate::{
    EngineError, TargetState,
    compression::files as memory_files,
    context::{blocking, io_error},
    copies::{self, Durable, Home},
    instance::{Instance, SNAPSHOT},
    kill::KillPoint,
};

/// What a fork is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The copy; it is moved away.
    pub dir: PathBuf,
    pub target: TargetState,
}

/// Runs with the record already in the store (state Created, operation Fork). The flag says that nothing of
/// the instance is left: it failed and was undone.
pub async fn run(
    instance: &mut Instance,
    cancel: &Cancel,
    plan: &Plan,
) -> (Result<(), EngineError>, bool) {
    instance.reach(KillPoint::ForkRecorded);
    let made = make(instance, cancel, plan).await;
    if let Err(error) = &made
        && instance.record.operation().is_none()
    {
        // Its CPUs ran, and it is not who it should be.
        instance.note(&format!("fork failed: {error}"));
        let gone = delete::run(instance, cancel, false).await;
        return match gone {
            Ok(()) => (made, true),
            Err(deleting) => {
                instance.note(&format!("deleting it failed: {deleting}"));
                (made, false)
            }
        };
    }
    create::or_undo(instance, made).await
}

async fn make(instance: &mut Instance, cancel: &Cancel, plan: &Plan) -> Result<(), EngineError> {
    let (from, home) = (plan.dir.clone(), instance.dir());
    blocking("placing a fork's files", move || {
        copies::place(&from, &home)
    })
    .await?
    .map_err(io_error("placing a fork's files"))?;
    launch::write_config(instance).await?;
    let memory = instance.record.has_snapshot();
    let durable = match plan.target {
        TargetState::Running => Durable::Disk,
        TargetState::Stopped | TargetState::Standby => Durable::All,
    };
    let (dir, id, claim) = (instance.dir(), instance.id.clone(), instance.claim.clone());
    let machine = blocking("making a fork's files its own", move || {
        let machine = match memory {
            true => {
                let home = Home {
                    id: &id,
                    dir: &dir,
                    claim: claim.as_ref(),
                };
                Some(copies::rehome(&dir, &home).map_err(manifest_error)?)
            }
            false => {
                files::remove_tree(&dir.join(SNAPSHOT))
                    .and_then(|()| memory_files::remove_all(&dir))
                    .map_err(io_error("removing memory"))?;
                None
            }
        };
        copies::sync(&dir, durable).map_err(io_error("making a fork durable"))?;
        Ok::<_, EngineError>(machine)
    })
    .await??;
    // Recorded with what it becomes: without, a crash of its first restore could not find its VMM again.
    instance.description = machine;
    instance.reach(KillPoint::ForkFilesMade);
    check(cancel)?;
    match (plan.target, memory) {
        (TargetState::Stopped, _) => instance.commit(Fact::Forked).await?,
        (TargetState::Standby, _) => {
            launch::make_sleepers_tap(instance).await?;
            instance.compression = instance.plan_compression_of_copy(instance.dir()).await?;
            instance.commit(Fact::Forked).await?;
        }
        (TargetState::Running, true) => restore::awaken(instance, cancel).await?,
        (TargetState::Running, false) => launch::run(instance, cancel).await?,
    }
    instance.reach(KillPoint::ForkDone);
    Ok(())
}
