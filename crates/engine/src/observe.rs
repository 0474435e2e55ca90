//! A driver at rest: books what the machine and its guest do, and ends what is stuck.
//!
//! Level-triggered: looks at what is true now and not yet in the record, so nothing is missed by
//! having been busy.
use std::time::Duration;

use doze_lifecycle::{Fact, Operation, Stamp, State};
use doze_vmm::MachineStatus;
use tokio::{sync::mpsc, time::Instant};

use crate::{
    EngineError, driver::Message, instance::Instance, now, ops, proof::ANSWER_PATIENCE, recovery,
};

/// How long a guest may stay up after it said that its program ended.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(20);
/// How often logs are looked at for their size, and failed attempts are repeated.
const CHECK: Duration = Duration::from_secs(30);

/// At rest: waits for a message while booking what happens to the machine.
pub async fn idle(
    instance: &mut Instance,
    mailbox: &mut mpsc::Receiver<Message>,
) -> Option<Message> {
    let mut check = tokio::time::interval_at(Instant::now() + CHECK, CHECK);
    loop {
        instance.compression_ended().await;
        // Also what came to rest without an operation of its own.
        instance.follow_up();
        let mut done = match observe(instance).await {
            Ok(()) => true,
            Err(error) => {
                instance.note(&format!("booking what happened failed: {error}"));
                false
            }
        };
        if done && is_overdue(instance) {
            done = match instance.record.answer_in_time() && instance.record.exit().is_none() {
                true => answer_overdue(instance).await,
                false => overdue(instance).await,
            };
        }
        // What could not be recorded now (a full disk, a hung process) is tried again with the next check
        // or command, not at once.
        let deadline = deadline(instance).filter(|_| done);
        tokio::select! {
            message = mailbox.recv() => return message,
            () = changed(instance), if done => {}
            () = sleep_until(deadline) => {}
            _ = check.tick(), if recovery::is_needed(instance) => regular_check(instance).await,
        }
    }
}

/// Keeps logs small, also when nothing else works because they filled the disk, and looks again for a
/// machine that could not be attached to, and at an operation that could not be finished or undone.
async fn regular_check(instance: &mut Instance) {
    crate::logs::trim(&instance.dir(), instance.ctx.config.limits.max_log_bytes).await;
    // At rest nobody works at an operation: it is left over. Only a command may end the instance, though.
    let stuck = match instance.record.operation() {
        Some(Operation::Create | Operation::Fork | Operation::Delete) => false,
        Some(Operation::Standby | Operation::Restore | Operation::Start | Operation::Stop) => true,
        Some(Operation::Snapshot | Operation::Rollback) => true,
        None => instance.live.is_none(),
    };
    if stuck && let Err(error) = recovery::run(instance).await {
        instance.note(&format!("it cannot be put right yet: {error}"));
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Resolves when the machine or its guest has something new. A side that ended has nothing more to say.
async fn changed(instance: &mut Instance) {
    let Some(live) = instance.live.as_mut() else {
        // What sleeps has no machine, but perhaps somebody at work on its memory.
        return match &instance.compression_job {
            Some(job) => job.done().await,
            None => std::future::pending().await,
        };
    };
    let status = async {
        if live.status.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let guest = async {
        if live.guest.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let answer = async {
        let told = match live.proof.as_mut() {
            Some(proof) => proof.answer.changed().await.is_ok(),
            None => false,
        };
        if !told {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = status => {}
        () = guest => {}
        () = answer => {}
    }
}

/// Books everything that is true of the machine and its guest and not yet in the record.
async fn observe(instance: &mut Instance) -> Result<(), EngineError> {
    let Some(live) = instance.live.as_mut() else {
        return Ok(());
    };
    let guest = live.guest.borrow_and_update().clone();
    let status = *live.status.borrow_and_update();
    let booting = match instance.record.state() {
        State::Initializing | State::Running => true,
        State::Created | State::Paused | State::Shutdown => false,
        State::Stopped | State::Standby => false,
    };
    if booting {
        let markers = markers(instance);
        if !markers.is_empty() {
            instance.commit_all(&markers).await?;
        }
        if guest.program_exit.is_some() {
            if let Some(live) = instance.live.as_mut() {
                live.exited.get_or_insert_with(Instant::now);
            }
            instance.collect_exit().await?;
        }
    }
    book_answer(instance).await?;
    match status {
        MachineStatus::Prelaunch | MachineStatus::Running | MachineStatus::Paused => Ok(()),
        MachineStatus::Shutdown | MachineStatus::Failed | MachineStatus::Gone => {
            power_off(instance, status, guest.boot_error).await
        }
    }
}

/// What the guest has said of its boot and the record does not hold yet, with its own account of when.
pub fn markers(instance: &Instance) -> Vec<(Fact, Stamp)> {
    let Some(live) = &instance.live else {
        return Vec::new();
    };
    let (here, stamp) = (std::time::Instant::now(), now());
    let at = |instant| {
        let age = here.saturating_duration_since(instant);
        stamp.earlier(u64::try_from(age.as_micros()).unwrap_or(u64::MAX))
    };
    let guest = live.guest.borrow();
    let record = &instance.record;
    let program = guest.program_started.filter(|_| !record.program_started());
    let agent = guest.agent_ready.filter(|_| !record.agent_ready());
    program
        .map(|instant| (Fact::ProgramStarted, at(instant)))
        .into_iter()
        .chain(agent.map(|instant| (Fact::AgentReady, at(instant))))
        .collect()
}

/// Books a restored guest's answer once it is there.
pub async fn book_answer(instance: &mut Instance) -> Result<(), EngineError> {
    let answer = match instance.live.as_mut().and_then(|live| live.proof.as_mut()) {
        Some(proof) if instance.record.awaits_answer() => {
            let answer = proof.answer.borrow_and_update().clone();
            // Said once, however often it is looked at.
            let noted = answer.as_ref().and_then(|a| a.problem.clone());
            let news = proof.noted != noted;
            proof.noted = noted;
            answer.map(|answer| (answer, news))
        }
        Some(_) | None => None,
    };
    let Some((answer, news)) = answer else {
        return Ok(());
    };
    if let Some(problem) = answer.problem.as_ref().filter(|_| news) {
        instance.note(&format!("restored, but {problem}"));
    }
    if instance.inherited {
        if !answer.identity_applied {
            // It has another one's addresses: it stays unreachable.
            return Ok(());
        }
        instance.inherited = false;
        if let Err(error) = ops::launch::make_tap(instance).await {
            instance.inherited = true;
            return Err(error);
        }
    }
    let age = u64::try_from(answer.at.elapsed().as_micros()).unwrap_or(u64::MAX);
    let fact = Fact::AgentAnswered;
    instance.commit_at(fact, &now().earlier(age)).await
}

/// A restored guest kept its answer to itself until its time was over. It has its CPUs, at full service, and is billed for
/// them: otherwise a guest whose agent says nothing would run for ever as one that begins. A copy without its own
/// identity stays off the bridge all the same: that hangs on [`Instance::inherited`], not on the state.
pub async fn book_missing_answer(instance: &mut Instance) -> Result<(), EngineError> {
    let runs = (instance.live.as_ref())
        .is_some_and(|live| *live.status.borrow() == MachineStatus::Running);
    if !runs || !instance.record.answer_in_time() {
        return Ok(());
    }
    instance.commit(Fact::AnswerOverdue).await?;
    instance.note(match instance.inherited {
        true => {
            "it runs without having taken its own identity; it stays off the network until it does"
        }
        false => "restored, but its agent has not answered yet",
    });
    Ok(())
}

/// `false`: it has to be tried again.
async fn answer_overdue(instance: &mut Instance) -> bool {
    match book_missing_answer(instance).await {
        // One that does not run now is looked at again when that changes.
        Ok(()) => !instance.record.answer_in_time(),
        Err(error) => {
            instance.note(&format!("booking a missing answer failed: {error}"));
            false
        }
    }
}

/// The guest or its VMM ended without being asked.
pub async fn power_off(
    instance: &mut Instance,
    status: MachineStatus,
    boot_error: Option<String>,
) -> Result<(), EngineError> {
    instance.collect_exit().await?;
    let failure = match (boot_error, instance.record.exit(), status) {
        (Some(error), _, _) => Some(format!("the guest could not boot: {error}")),
        (None, Some(_), MachineStatus::Shutdown) => None,
        (None, _, MachineStatus::Gone) => Some("its machine monitor died".to_owned()),
        (None, _, MachineStatus::Failed) => {
            Some("its machine failed; see its logs (source vmm)".to_owned())
        }
        (None, _, _) => Some(
            "the guest went down without saying how its program ended; see its logs (source vmm)"
                .to_owned(),
        ),
    };
    if status == MachineStatus::Gone {
        instance
            .end_machine(crate::kill::KillPoint::StopMachineKilled, failure)
            .await
    } else {
        ops::stop::finish(instance, failure).await
    }
}

/// When the guest's next step is overdue. Counted from when we could hear it: a server that was down
/// knows nothing of what the guest said meanwhile.
fn deadline(instance: &Instance) -> Option<Instant> {
    let live = instance.live.as_ref()?;
    if let Some(exited) = live.exited {
        return Some(exited + POWER_OFF_PATIENCE);
    }
    match instance.record.state() {
        State::Initializing if instance.record.answer_in_time() => {
            let asked = live.proof.as_ref().map(|proof| proof.since);
            asked.map(|since| (since + ANSWER_PATIENCE).into())
        }
        State::Initializing => Some(live.since + instance.ctx.config.limits.boot_timeout),
        State::Created | State::Running | State::Paused => None,
        State::Shutdown | State::Stopped | State::Standby => None,
    }
}

fn is_overdue(instance: &Instance) -> bool {
    deadline(instance).is_some_and(|deadline| deadline <= Instant::now())
}

/// Ends a machine whose guest is stuck. `false`: it has to be tried again.
async fn overdue(instance: &mut Instance) -> bool {
    let reason = if instance.record.exit().is_some() {
        "the guest did not power off after its program ended".to_owned()
    } else {
        let limit = instance.ctx.config.limits.boot_timeout;
        format!(
            "the guest did not become ready within {} s (limits.boot_timeout)",
            limit.as_secs()
        )
    };
    instance.note(&reason);
    match ops::stop::finish(instance, Some(reason)).await {
        Ok(()) => true,
        Err(error) => {
            instance.note(&format!("ending the machine failed: {error}"));
            false
        }
    }
}
