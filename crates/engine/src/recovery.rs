//! Every record is made to agree with what is really there: at start-up, and when an operation could not
//! even record its own end.
//!
//! | operation in flight | its machine runs | its machine never ran or is gone |
//! |---|---|---|
//! | none | reattached | Stopped, with the reason |
//! | create | kept: the create is complete | undone: the instance vanishes |
//! | start | kept: the start is complete | undone: Stopped |
//! | stop | the stop goes on | Stopped |
//! | standby, without the mark | resumed: the guest goes on | Stopped, with the reason |
//! | standby, with the mark | killed: the standby is complete | Standby |
//! | restore, with the mark | killed: its CPUs never ran; Standby | Standby, the snapshot untouched |
//! | restore, without the mark | kept: the restore is complete; still paused: Standby, the mark returns | Stopped, its memory is lost |
//! | delete | the delete goes on | the delete goes on |
//! | fork, booting | kept: the fork is complete | undone: the instance vanishes |
//! | fork, waking or resting | undone: the instance vanishes | undone: the instance vanishes |
//! | snapshot | resumed: the guest goes on | Stopped, with the reason |
//! | rollback, without `incoming` | given up: as it was | given up: as it was |
//! | rollback, with `incoming` | killed; finished | finished |
use std::collections::HashSet;

use doze_host::{
    net::{NetError, Network},
    process::ProcessId,
};
use doze_lifecycle::{Cause, Fact, Operation, State};
use doze_snapshot::manifest;
use doze_vmm::{MachineStatus, Monitor};

use crate::{
    EngineError,
    context::{Context, blocking, io_error},
    instance::{Instance, Live, SNAPSHOT, process_id, vmm_error},
    life_sign,
    ops::{self, Cancel},
    proof::Proof,
};

/// Whether the instance needs more than being read: only these cost time at start-up.
pub fn is_needed(instance: &Instance) -> bool {
    instance.record.operation().is_some() || instance.record.machine().is_some()
}

/// Makes one record true. `Ok(false)`: the instance is gone.
pub async fn run(instance: &mut Instance) -> Result<bool, EngineError> {
    let before = instance.on_behalf.replace(Cause::Recovery);
    let outcome = reconcile(instance).await;
    instance.on_behalf = before;
    outcome
}

async fn reconcile(instance: &mut Instance) -> Result<bool, EngineError> {
    // Otherwise this server has just begun, and nobody knows what happened before.
    let watched = instance.live.is_some();
    reattach(instance).await?;
    // Its CPUs never ran with our knowledge: it goes.
    let live = instance.live.as_ref();
    let known = live
        .map(|live| live.machine.process().clone())
        .or_else(|| instance.record.machine().map(process_id));
    kill_marked(instance, known.as_ref()).await?;
    let status = status(instance).await?;
    let ran = match status {
        MachineStatus::Running | MachineStatus::Paused => true,
        // It powered off while we were away; what its disk holds is a complete run.
        MachineStatus::Shutdown | MachineStatus::Failed => true,
        MachineStatus::Prelaunch | MachineStatus::Gone => false,
    };
    let cancel = Cancel::new();
    match instance.record.operation() {
        Some(Operation::Delete) => {
            instance.note("finishing a delete that the server's end interrupted");
            ops::delete::run(instance, &cancel, false).await?;
            return Ok(false);
        }
        // One that woke with another's memory had not been told who it is.
        Some(Operation::Create | Operation::Fork) if !ran || instance.record.has_snapshot() => {
            instance.kill_machine().await?;
            forget_machine(instance, None).await?;
            ops::create::undo(instance, "the server ended before the guest ran").await?;
            return Ok(false);
        }
        Some(Operation::Start) if !ran => {
            instance.kill_machine().await?;
            forget_machine(instance, None).await?;
            if !instance.record.has_snapshot() {
                instance.discard_memory().await;
            }
            let reason = "the server ended before the guest ran".to_owned();
            instance.commit(Fact::OperationFailed { reason }).await?;
        }
        Some(Operation::Create | Operation::Fork | Operation::Start) => {
            instance.note("the guest ran although the server ended before it said so");
            let agent = !instance.spec.skip_guest_agent;
            instance.commit(Fact::CpusStarted { agent }).await?;
        }
        Some(Operation::Stop) => {
            instance.note("finishing a stop that the server's end interrupted");
            ops::stop::run(instance, &cancel).await?;
        }
        Some(Operation::Standby) => {
            if ops::standby::is_marked(instance).await? {
                instance.note("finishing a standby that the server's end interrupted");
                ops::standby::complete(instance, status).await?;
            } else {
                book_pause(instance, status, watched).await?;
                let reason = "the server ended before the snapshot was complete";
                ops::standby::undo(instance, Some(reason)).await?;
            }
        }
        Some(Operation::Snapshot) if status != MachineStatus::Gone => {
            book_pause(instance, status, watched).await?;
            ops::capture::go_on(instance).await?;
        }
        // Booked below.
        Some(Operation::Snapshot) => {}
        Some(Operation::Rollback) => {
            ops::rollback::undo(instance, "the server ended before it was committed").await?;
        }
        Some(Operation::Restore) => {
            ops::restore::undo(instance, "the server ended before the guest ran").await?;
        }
        None => {}
    }
    let status = self::status(instance).await?;
    settle(instance, status).await?;
    ask_for_proof(instance);
    if let Some(live) = &instance.live {
        instance.ctx.reserve_memory(&instance.id, instance.spec.memory_bytes).or_else(|error| {
            // It runs already; a smaller limit than before only keeps others from starting.
            tracing::warn!(instance = %instance.id, %error, "running beyond the configured limit");
            Ok::<(), EngineError>(())
        })?;
        tracing::info!(instance = %instance.id, pid = live.machine.process().pid, "reattached");
    }
    instance.publish();
    Ok(true)
}

/// A guest that a standby had paused when the server died has stood still since, whatever the record says. While
/// the server was there it said that the guest runs, and what was said is never taken back: the pause
/// begins when it is seen.
async fn book_pause(
    instance: &mut Instance,
    status: MachineStatus,
    watched: bool,
) -> Result<(), EngineError> {
    let runs = match instance.record.state() {
        State::Initializing | State::Running => true,
        State::Created | State::Paused | State::Shutdown => false,
        State::Stopped | State::Standby => false,
    };
    if !runs || status != MachineStatus::Paused {
        return Ok(());
    }
    let since = match watched {
        true => crate::now(),
        false => life_sign::last_seen(instance).await?,
    };
    instance.commit_at(Fact::CpusPaused, &since).await
}

async fn status(instance: &Instance) -> Result<MachineStatus, EngineError> {
    match &instance.live {
        Some(live) => live.machine.status().await.map_err(vmm_error),
        None => Ok(MachineStatus::Gone),
    }
}

/// A restored guest that had not answered when the server ended is asked again.
fn ask_for_proof(instance: &mut Instance) {
    let identity = ops::launch::new_identity(instance);
    if instance.record.awaits_answer()
        && let Some(live) = instance.live.as_mut()
        && live.proof.is_none()
    {
        live.proof = Some(Proof::ask(
            live.agent.clone(),
            instance.id.clone(),
            identity,
        ));
    }
}

/// What is left after the operation: a machine that is gone or off is booked as such.
async fn settle(instance: &mut Instance, status: MachineStatus) -> Result<(), EngineError> {
    if instance.record.machine().is_none() {
        return Ok(());
    }
    match status {
        MachineStatus::Running | MachineStatus::Paused | MachineStatus::Prelaunch => {
            if instance.record.state() == State::Created {
                // No operation, no CPUs that ever ran: nobody will start it.
                instance.kill_machine().await?;
                return forget_machine(instance, Some("its machine never ran")).await;
            }
            if status == MachineStatus::Paused
                && let Some(live) = &instance.live
            {
                live.machine.resume().await.map_err(vmm_error)?;
            }
            make_network(instance).await
        }
        MachineStatus::Shutdown | MachineStatus::Failed => {
            // Before anything is written to its files.
            let last_seen = life_sign::last_seen(instance).await?;
            instance.collect_exit().await?;
            if instance.record.state() != State::Shutdown {
                instance.commit(Fact::GuestFoundOff { last_seen }).await?;
            }
            crate::observe::power_off(instance, status, None).await
        }
        MachineStatus::Gone => {
            let last_seen = life_sign::last_seen(instance).await?;
            let failure = "its machine monitor was gone when the server started";
            instance.collect_exit().await?;
            let failure = instance.record.exit().is_none().then_some(failure);
            instance.kill_machine().await?;
            instance.discard_memory().await;
            let failure = failure.map(str::to_owned);
            instance
                .commit(Fact::MachineFoundGone { failure, last_seen })
                .await
        }
    }
}

async fn forget_machine(instance: &mut Instance, failure: Option<&str>) -> Result<(), EngineError> {
    if instance.record.machine().is_none() {
        return Ok(());
    }
    instance.discard_memory().await;
    let failure = failure.map(str::to_owned);
    instance.commit(Fact::MachineGone { failure }).await
}

async fn make_network(instance: &Instance) -> Result<(), EngineError> {
    match instance.ctx.network().await? {
        Some(_) => ops::launch::make_tap(instance).await,
        None => Ok(()),
    }
}

async fn reattach(instance: &mut Instance) -> Result<(), EngineError> {
    if instance.live.is_some() {
        return Ok(());
    }
    let Some(description) = &instance.description else {
        return Ok(());
    };
    let monitor = instance.ctx.monitor(description.hypervisor)?.clone();
    let process = match instance.record.machine() {
        Some(machine) => Some(process_id(machine)),
        None => restored_process(instance, monitor.as_ref()).await?,
    };
    let Some(process) = process else {
        return Ok(());
    };
    let found = monitor
        .attach(description, &process)
        .await
        .map_err(vmm_error)?;
    instance.live = found.map(|machine| Live::new(machine, true));
    Ok(())
}

/// A restore records its VMM when the CPUs run. Before that only the mark on the process names it; with the
/// snapshot's mark still there it never ran and is nobody's.
async fn restored_process(
    instance: &Instance,
    monitor: &dyn Monitor,
) -> Result<Option<ProcessId>, EngineError> {
    if instance.record.operation() != Some(Operation::Restore) {
        return Ok(None);
    }
    let place = instance.dir().join(SNAPSHOT);
    let marked = blocking("looking for the snapshot", move || manifest::exists(&place))
        .await?
        .map_err(ops::standby::manifest_error)?;
    if marked {
        return Ok(None);
    }
    let found = monitor.find(&instance.id).await.map_err(vmm_error)?;
    Ok(found.into_iter().next())
}

/// Kills every VMM that carries this instance's mark, except `spare`: one that was spawned just before
/// the server died, or one that could not be attached to.
pub async fn kill_marked(
    instance: &Instance,
    spare: Option<&ProcessId>,
) -> Result<(), EngineError> {
    let monitor = instance.ctx.monitor(instance.spec.hypervisor)?;
    let marked = monitor.find(&instance.id).await.map_err(vmm_error)?;
    for found in marked.into_iter().filter(|id| Some(id) != spare) {
        instance.note(&format!(
            "killing machine monitor {} found by its mark",
            found.pid
        ));
        monitor.kill(&found).await.map_err(vmm_error)?;
    }
    Ok(())
}

/// Folders and TAPs that belong to no record.
pub async fn sweep(
    ctx: &Context,
    known: &HashSet<String>,
    rolling_back: &HashSet<String>,
    snapshots: HashSet<String>,
) -> Result<(), EngineError> {
    let roots = [
        (ctx.config.data_dir.join("instances"), known.clone()),
        (ctx.snapshots_dir(), snapshots),
        // Copies that never got their place.
        (ctx.captures_dir(), HashSet::new()),
    ];
    let rest = known.difference(rolling_back);
    let at_rest: Vec<_> = rest.map(|id| ctx.instance_dir(id)).collect();
    blocking("sweeping folders", move || {
        roots
            .iter()
            .try_for_each(|(root, known)| sweep_folder(root, known))?;
        // The last act of a rollback that is complete.
        at_rest.iter().try_for_each(|dir| {
            let mut left = ops::rollback::LEFTOVERS.iter();
            left.try_for_each(|name| doze_host::files::remove_tree(&dir.join(name)))
        })
    })
    .await?
    .map_err(io_error("sweeping folders"))?;
    match ctx.network().await {
        Ok(Some(network)) => {
            if let Err(error) = sweep_taps(&network, known).await {
                tracing::warn!(%error, "removing TAPs without a record");
            }
        }
        Ok(None) => {}
        // The server starts all the same: images and stopped instances need no network.
        Err(error) => tracing::warn!(%error, "the network could not be set up"),
    }
    Ok(())
}

fn sweep_folder(root: &std::path::Path, known: &HashSet<String>) -> std::io::Result<()> {
    doze_host::files::create_private_dir(root)?;
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        if !name.to_str().is_some_and(|name| known.contains(name)) {
            tracing::info!(folder = %entry.path().display(), "removing a folder without a record");
            doze_host::files::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

/// Only what has the form of our own: an operator's TAP on the bridge stays.
async fn sweep_taps(network: &Network, known: &HashSet<String>) -> Result<(), NetError> {
    for (tap, alias) in network.list_taps().await? {
        if is_our_tap(&tap) && !known.contains(&alias) {
            tracing::info!(tap, "removing a TAP without a record");
            network.delete_tap(&tap).await?;
        }
    }
    Ok(())
}

/// The form of `store::claim_address`: `dz` and eight hexadecimal digits.
fn is_our_tap(name: &str) -> bool {
    name.strip_prefix("dz")
        .is_some_and(|rest| rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}
