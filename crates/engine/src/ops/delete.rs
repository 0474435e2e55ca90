//! Delete: the machine, the TAP, the files, the record, in this order. Never undone; a crash or an error
//! in between is finished later.
use doze_host::files;
use doze_lifecycle::{Fact, Operation};

use super::{Cancel, stop};
use crate::{
    EngineError,
    context::{blocking, io_error, net_error},
    instance::{Instance, store_error},
    kill::KillPoint,
};

pub async fn run(
    instance: &mut Instance,
    cancel: &Cancel,
    graceful: bool,
) -> Result<(), EngineError> {
    if instance.record.operation() != Some(Operation::Delete) {
        instance.commit(Fact::Admitted(Operation::Delete)).await?;
    }
    instance.reach(KillPoint::DeleteAdmitted);
    if graceful && instance.record.machine().is_some() {
        stop::power_off(instance, cancel).await?;
    }
    dismantle(instance).await
}

/// Everything that is left, whatever it is. Can be repeated.
pub async fn dismantle(instance: &mut Instance) -> Result<(), EngineError> {
    instance
        .end_machine(KillPoint::DeleteMachineKilled, None)
        .await?;
    delete_tap(instance).await?;
    instance.reach(KillPoint::DeleteTapRemoved);
    let dir = instance.dir();
    blocking("removing the instance's files", move || {
        files::remove_tree(&dir)
    })
    .await?
    .map_err(io_error("removing the instance's files"))?;
    instance.reach(KillPoint::DeleteFilesRemoved);
    instance
        .ctx
        .store
        .remove(&instance.id)
        .await
        .map_err(store_error)?;
    instance.ctx.release_memory(&instance.id);
    instance.reach(KillPoint::DeleteRecordRemoved);
    Ok(())
}

/// Without a network that works there is nothing to ask; a TAP that is there all the same has no
/// record after this and goes at the server's next start.
async fn delete_tap(instance: &Instance) -> Result<(), EngineError> {
    let Some(claim) = &instance.claim else {
        return Ok(());
    };
    match instance.ctx.network().await {
        Ok(Some(network)) => network.delete_tap(&claim.tap).await.map_err(net_error),
        Ok(None) => Ok(()),
        Err(error) => {
            instance.note(&format!("TAP {} is not removed: {error}", claim.tap));
            Ok(())
        }
    }
}
