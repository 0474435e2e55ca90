//! Start: a stopped instance boots again from its disks. Stopped again when it fails.
use std::sync::Arc;

use doze_lifecycle::{Fact, Operation, State};

use super::{Cancel, check, launch};
use crate::{EngineError, StartOverrides, instance::Instance, kill::KillPoint};

/// A sleeping instance gives its memory up first, as its caller wished (`discard_memory`).
pub async fn run(
    instance: &mut Instance,
    cancel: &Cancel,
    overrides: StartOverrides,
) -> Result<(), EngineError> {
    let before = instance.spec.clone();
    instance.spec = Arc::new(with_overrides(&before, overrides));
    // Overrides are kept for later starts: they commit together with the intent.
    if let Err(error) = instance.commit(Fact::Admitted(Operation::Start)).await {
        instance.spec = before;
        return Err(error);
    }
    instance.reach(KillPoint::StartAdmitted);
    if instance.record.state() == State::Standby {
        // Whatever would refuse the boot must do so before the memory is given up.
        if let Err(error) = launch::check_host(instance)
            .await
            .and_then(|()| check(cancel))
        {
            instance.ctx.release_memory(&instance.id);
            instance.spec = before;
            let reason = error.to_string();
            instance.commit(Fact::OperationFailed { reason }).await?;
            return Err(error);
        }
        instance.note("its memory is given up for a boot from its disk");
        instance.commit(Fact::MemoryDiscarded).await?;
        instance.reach(KillPoint::StartMemoryDiscarded);
    }
    let outcome = boot(instance, cancel).await;
    if let Err(error) = &outcome {
        instance.ctx.release_memory(&instance.id);
        instance.spec = before;
        launch::end_failed(instance).await?;
        instance.discard_memory().await;
        instance
            .commit(Fact::OperationFailed {
                reason: error.to_string(),
            })
            .await?;
        instance.note(&format!("start failed: {error}"));
    }
    outcome
}

async fn boot(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    launch::write_config(instance).await?;
    instance.reach(KillPoint::StartFilesReset);
    check(cancel)?;
    launch::run(instance, cancel).await
}

fn with_overrides(spec: &crate::InstanceSpec, overrides: StartOverrides) -> crate::InstanceSpec {
    let mut spec = spec.clone();
    if let Some(entrypoint) = overrides.entrypoint {
        spec.entrypoint = Some(entrypoint);
    }
    if let Some(cmd) = overrides.cmd {
        spec.cmd = Some(cmd);
    }
    spec
}
