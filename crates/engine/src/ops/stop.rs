//! Stop: the program is asked to end, the guest powers off, the VMM goes.
use std::time::Duration;

use doze_lifecycle::{Fact, Operation, State};
use doze_vmm::MachineStatus;

use super::Cancel;
use crate::{EngineError, instance::Instance, kill::KillPoint};

/// How long a guest whose program runs may take to answer on its channel: after a restart of the server
/// the channel is being built up again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// What a guest gets beyond its program's grace: to sync, unmount and power off.
const POWER_OFF_MARGIN: Duration = Duration::from_secs(10);

/// Runs from any state with a machine, also to finish a stop that a crash interrupted.
pub async fn run(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    if instance.record.operation() != Some(Operation::Stop) {
        instance.commit(Fact::Admitted(Operation::Stop)).await?;
    }
    instance.reach(KillPoint::StopAdmitted);
    let interrupted = power_off(instance, cancel).await?;
    if interrupted {
        let reason = "interrupted by a delete".to_owned();
        instance.commit(Fact::OperationFailed { reason }).await?;
        return Err(EngineError::Interrupted { by: "a delete" });
    }
    finish(instance, None).await
}

/// The guest is off: records it, ends the VMM, records that.
pub async fn finish(instance: &mut Instance, failure: Option<String>) -> Result<(), EngineError> {
    instance.collect_exit().await?;
    let off = match instance.record.state() {
        State::Initializing | State::Running | State::Paused => true,
        State::Created | State::Shutdown | State::Stopped | State::Standby => false,
    };
    if off {
        instance.commit(Fact::GuestPoweredOff).await?;
        instance.reach(KillPoint::StopPowerOffRecorded);
    }
    instance
        .end_machine(KillPoint::StopMachineKilled, failure)
        .await?;
    instance.reach(KillPoint::StopMachineGoneRecorded);
    forget_memory(instance).await;
    Ok(())
}

/// The memory of a run that is over, however it ended: it costs disk and is good for nothing. What cannot be
/// removed now goes at the next start. Nothing happens to any other instance.
pub async fn forget_memory(instance: &Instance) {
    if instance.record.state() != State::Stopped {
        return;
    }
    if let Err(error) = super::launch::remove_memory(instance).await {
        instance.note(&format!("removing the memory of the run: {error}"));
    }
}

/// Asks the guest to power off and waits until it did or its time is over. `true`: interrupted.
/// A guest whose program has not started has nothing to save and is not waited for.
pub async fn power_off(instance: &mut Instance, cancel: &Cancel) -> Result<bool, EngineError> {
    let grace = instance.ctx.config.limits.stop_grace;
    let Some(live) = instance.live.as_mut() else {
        return Ok(false);
    };
    if is_off(*live.status.borrow_and_update()) {
        return Ok(false);
    }
    let patience = if instance.record.program_started() || live.reattached {
        CONNECT_PATIENCE
    } else {
        Duration::ZERO
    };
    // The machine may go off by itself at any moment: then there is nobody left to ask.
    let mut status = live.status.clone();
    let off = status.wait_for(|status| is_off(*status));
    let connected = tokio::select! {
        _ = off => return Ok(false),
        () = cancel.cancelled() => return Ok(true),
        waited = tokio::time::timeout(patience, live.guest.wait_for(|guest| guest.connected)) => {
            matches!(waited, Ok(Ok(_)))
        }
    };
    if !connected {
        instance.note("the guest does not answer; ending its machine");
        return Ok(false);
    }
    let off = status.wait_for(|status| is_off(*status));
    let asked = tokio::select! {
        _ = off => return Ok(false),
        () = cancel.cancelled() => return Ok(true),
        asked = live.agent.shutdown(grace) => asked,
    };
    if let Err(error) = asked {
        instance.note(&format!(
            "asking the guest to shut down failed ({error}); ending its machine"
        ));
        return Ok(false);
    }
    instance.reach(KillPoint::StopGuestAsked);
    let Some(live) = instance.live.as_mut() else {
        return Ok(false);
    };
    let off = async {
        live.status
            .wait_for(|status| is_off(*status))
            .await
            .map(|_| ())
    };
    tokio::select! {
        () = cancel.cancelled() => Ok(true),
        waited = tokio::time::timeout(grace + POWER_OFF_MARGIN, off) => {
            // A closed channel means that the VMM's watcher ended: it is gone.
            if waited.is_err() {
                instance.note("the guest did not power off in time; ending its machine");
            }
            Ok(false)
        }
    }
}

pub fn is_off(status: MachineStatus) -> bool {
    match status {
        MachineStatus::Shutdown | MachineStatus::Failed | MachineStatus::Gone => true,
        MachineStatus::Prelaunch | MachineStatus::Running | MachineStatus::Paused => false,
    }
}
