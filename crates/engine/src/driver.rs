//! One task per instance: the only one that changes it.
//!
//! ```text
//!   mailbox ──> admit (pure table) ──> run an operation ── while it runs: join, queue or interrupt
//!   machine status, guest view ──> facts      (level-triggered: what is true now, not what was missed)
//! ```
//!
//! An operation owns the [`Instance`] while it runs and gives it back; nobody else can touch it, so
//! there is no lock. A caller that hangs up stops nothing: its reply is simply not delivered.
use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use doze_lifecycle::{Admission, Command, Fact, Operation, State, admission::admit};
use doze_vmm::MachineStatus;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    EngineError, InstanceView, StartOverrides,
    instance::{Instance, Published},
    now,
    ops::{self, Cancel},
    recovery,
};

/// How long a guest may stay up after it said that its program ended.
const POWER_OFF_PATIENCE: Duration = Duration::from_secs(20);
/// How often log files are looked at for their size.
const LOG_CHECK: Duration = Duration::from_secs(30);

pub type Reply = oneshot::Sender<Result<Arc<InstanceView>, EngineError>>;

/// What the mailbox takes.
pub enum Message {
    Create {
        reply: Reply,
    },
    Start {
        overrides: StartOverrides,
        reply: Reply,
    },
    Stop {
        reply: Reply,
    },
    Delete {
        graceful: bool,
        reply: Reply,
    },
    /// Make the record true (server start). Answers when it is.
    Recover {
        reply: Reply,
    },
    /// Finish what is running, take nothing more, end. The machine goes on.
    Retire {
        reply: oneshot::Sender<()>,
    },
}

impl Message {
    fn command(&self) -> Option<Command> {
        match self {
            Message::Start { overrides, .. } => Some(Command::Start {
                overrides: *overrides != StartOverrides::default(),
            }),
            Message::Stop { .. } => Some(Command::Stop),
            Message::Delete { graceful, .. } => Some(Command::Delete {
                graceful: *graceful,
            }),
            Message::Create { .. } | Message::Recover { .. } | Message::Retire { .. } => None,
        }
    }

    fn reply(self, answer: Result<Arc<InstanceView>, EngineError>) {
        match self {
            Message::Create { reply }
            | Message::Start { reply, .. }
            | Message::Stop { reply }
            | Message::Delete { reply, .. }
            | Message::Recover { reply } => drop(reply.send(answer)),
            Message::Retire { reply } => drop(reply.send(())),
        }
    }
}

/// What an operation gives back.
struct Done {
    instance: Box<Instance>,
    outcome: Result<(), EngineError>,
    /// Nothing of the instance is left.
    gone: bool,
}

struct Busy {
    work: Pin<Box<dyn Future<Output = Done> + Send>>,
    cancel: Cancel,
    owner: Message,
    joined: Vec<Message>,
}

enum Holding {
    Idle(Box<Instance>),
    Busy(Busy),
}

/// Runs until the instance is deleted or the driver is retired. `forget` takes a deleted instance off
/// the registry; it is called before anybody hears that the instance is gone, so that nobody who
/// heard it can still find it.
pub async fn run(
    instance: Instance,
    view: watch::Receiver<Published>,
    mut mailbox: mpsc::Receiver<Message>,
    forget: impl Fn(),
) {
    let mut holding = Holding::Idle(Box::new(instance));
    let mut waiting: VecDeque<Message> = VecDeque::new();
    loop {
        holding = match holding {
            Holding::Idle(mut instance) => {
                let message = match waiting.pop_front() {
                    Some(message) => message,
                    None => match idle(&mut instance, &mut mailbox).await {
                        Some(message) => message,
                        None => return,
                    },
                };
                if let Message::Retire { reply } = message {
                    // The asker may have given up waiting.
                    let _ = reply.send(());
                    return;
                }
                match settle(&mut instance).await {
                    Ok(true) => decide(instance, message),
                    Ok(false) => {
                        forget();
                        waiting.push_front(message);
                        refuse_rest(&view, waiting, mailbox).await;
                        return;
                    }
                    Err(error) => {
                        message.reply(Err(error));
                        Holding::Idle(instance)
                    }
                }
            }
            Holding::Busy(mut busy) => {
                tokio::select! {
                    done = &mut busy.work => {
                        let gone = done.gone;
                        if gone {
                            forget();
                        }
                        let instance = finish(done, busy.owner, busy.joined, &view);
                        if gone {
                            refuse_rest(&view, waiting, mailbox).await;
                            return;
                        }
                        Holding::Idle(instance)
                    }
                    Some(message) = mailbox.recv() => {
                        overlap(&mut busy, message, &view, &mut waiting);
                        Holding::Busy(busy)
                    }
                }
            }
        };
    }
}

/// At rest: waits for a message while booking what happens to the machine.
async fn idle(instance: &mut Instance, mailbox: &mut mpsc::Receiver<Message>) -> Option<Message> {
    let mut log_check = tokio::time::interval_at(Instant::now() + LOG_CHECK, LOG_CHECK);
    loop {
        if let Err(error) = observe(instance).await {
            instance.note(&format!("booking what happened failed: {error}"));
            // A record that cannot be written now can be written later, or by the next command.
            tokio::select! {
                message = mailbox.recv() => return message,
                _ = log_check.tick() => continue,
            }
        }
        let deadline = deadline(instance);
        tokio::select! {
            message = mailbox.recv() => return message,
            () = changed(instance) => {}
            () = sleep_until(deadline) => overdue(instance).await,
            _ = log_check.tick(), if instance.live.is_some() => {
                crate::logs::trim(&instance.dir(), instance.ctx.config.limits.max_log_bytes).await;
            }
        }
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
        return std::future::pending().await;
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
    tokio::select! {
        () = status => {}
        () = guest => {}
    }
}

/// Books everything that is true of the machine and its guest and not yet in the record.
async fn observe(instance: &mut Instance) -> Result<(), EngineError> {
    let Some(live) = instance.live.as_mut() else {
        return Ok(());
    };
    let guest = live.guest.borrow_and_update().clone();
    let status = *live.status.borrow_and_update();
    let (here, stamp) = (std::time::Instant::now(), now());
    let at = |instant| {
        let age = here.saturating_duration_since(instant);
        stamp.earlier(u64::try_from(age.as_micros()).unwrap_or(u64::MAX))
    };
    let booting = match instance.record.state() {
        State::Initializing | State::Running => true,
        State::Created | State::Paused | State::Shutdown => false,
        State::Stopped | State::Standby => false,
    };
    if booting {
        if let Some(instant) = guest.program_started
            && !instance.record.program_started()
        {
            instance
                .commit_at(Fact::ProgramStarted, &at(instant))
                .await?;
        }
        if let Some(instant) = guest.agent_ready
            && !instance.record.agent_ready()
        {
            instance.commit_at(Fact::AgentReady, &at(instant)).await?;
        }
        if guest.program_exit.is_some() {
            instance.collect_exit().await?;
        }
    }
    match status {
        MachineStatus::Prelaunch | MachineStatus::Running | MachineStatus::Paused => Ok(()),
        MachineStatus::Shutdown | MachineStatus::Failed | MachineStatus::Gone => {
            power_off(instance, status, guest.boot_error).await
        }
    }
}

/// The guest or its VMM ended without being asked.
async fn power_off(
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

/// When the guest's next step is overdue.
fn deadline(instance: &Instance) -> Option<Instant> {
    instance.live.as_ref()?;
    let elapsed = Duration::from_micros(now().since_us(instance.record.current_since()));
    if instance.record.exit().is_some() {
        return Some(Instant::now() + POWER_OFF_PATIENCE);
    }
    match instance.record.state() {
        State::Initializing => Some(
            Instant::now()
                + instance
                    .ctx
                    .config
                    .limits
                    .boot_timeout
                    .saturating_sub(elapsed),
        ),
        State::Created | State::Running | State::Paused => None,
        State::Shutdown | State::Stopped | State::Standby => None,
    }
}

async fn overdue(instance: &mut Instance) {
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
    if let Err(error) = ops::stop::finish(instance, Some(reason)).await {
        instance.note(&format!("ending the machine failed: {error}"));
    }
}

/// An operation that could not record its own end (the store refused) is finished or undone before
/// anything else begins. `Ok(false)`: that was the instance's end.
async fn settle(instance: &mut Instance) -> Result<bool, EngineError> {
    match instance.record.operation() {
        // A create begins with its record already in the store.
        None | Some(Operation::Create) => Ok(true),
        Some(Operation::Start | Operation::Stop | Operation::Delete) => {
            recovery::run(instance).await
        }
    }
}

/// A message to an instance at rest.
fn decide(instance: Box<Instance>, message: Message) -> Holding {
    let Some(command) = message.command() else {
        return begin(instance, message);
    };
    let (state, operation) = (instance.record.state(), instance.record.operation());
    match admit(state, operation, command) {
        Admission::Run => begin(instance, message),
        Admission::NoOp => {
            message.reply(Ok(instance.view()));
            Holding::Idle(instance)
        }
        Admission::Refuse(refusal) => {
            message.reply(Err(EngineError::InvalidState { state, refusal }));
            Holding::Idle(instance)
        }
        Admission::Join | Admission::Wait | Admission::Interrupt => {
            message.reply(Err(EngineError::Internal {
                context: command.as_str().to_owned(),
                reason: "its create could not be recorded as ended; restart the server".to_owned(),
            }));
            Holding::Idle(instance)
        }
    }
}

/// Starts the operation a message asks for.
fn begin(mut instance: Box<Instance>, message: Message) -> Holding {
    let cancel = Cancel::new();
    let token = cancel.clone();
    let work: Pin<Box<dyn Future<Output = Done> + Send>> = match &message {
        Message::Create { .. } => Box::pin(async move {
            let (outcome, gone) = ops::create::run(&mut instance, &token).await;
            Done {
                instance,
                outcome,
                gone,
            }
        }),
        Message::Start { overrides, .. } => {
            let overrides = overrides.clone();
            Box::pin(async move {
                let outcome = ops::start::run(&mut instance, &token, overrides).await;
                Done {
                    instance,
                    outcome,
                    gone: false,
                }
            })
        }
        Message::Stop { .. } => Box::pin(async move {
            let outcome = ops::stop::run(&mut instance, &token).await;
            Done {
                instance,
                outcome,
                gone: false,
            }
        }),
        Message::Delete { graceful, .. } => {
            let graceful = *graceful;
            Box::pin(async move {
                let outcome = ops::delete::run(&mut instance, &token, graceful).await;
                let gone = outcome.is_ok();
                Done {
                    instance,
                    outcome,
                    gone,
                }
            })
        }
        Message::Recover { .. } | Message::Retire { .. } => Box::pin(async move {
            let outcome = recovery::run(&mut instance).await;
            let gone = matches!(outcome, Ok(false));
            Done {
                instance,
                outcome: outcome.map(drop),
                gone,
            }
        }),
    };
    Holding::Busy(Busy {
        work,
        cancel,
        owner: message,
        joined: Vec::new(),
    })
}

/// A message while an operation runs.
fn overlap(
    busy: &mut Busy,
    message: Message,
    view: &watch::Receiver<Published>,
    waiting: &mut VecDeque<Message>,
) {
    let Some(command) = message.command() else {
        waiting.push_back(message);
        return;
    };
    let record = view.borrow().view.record.clone();
    // The running operation may not have recorded itself yet, or may just have recorded its end.
    let operation = record.operation().or(match busy.owner {
        Message::Create { .. } => Some(Operation::Create),
        Message::Start { .. } => Some(Operation::Start),
        Message::Stop { .. } => Some(Operation::Stop),
        Message::Delete { .. } => Some(Operation::Delete),
        Message::Recover { .. } | Message::Retire { .. } => None,
    });
    let Some(operation) = operation else {
        waiting.push_back(message);
        return;
    };
    match admit(record.state(), Some(operation), command) {
        Admission::Join => busy.joined.push(message),
        Admission::Interrupt => {
            busy.cancel.cancel();
            waiting.push_front(message);
        }
        Admission::Wait | Admission::Run | Admission::NoOp => waiting.push_back(message),
        Admission::Refuse(refusal) => {
            message.reply(Err(EngineError::InvalidState {
                state: record.state(),
                refusal,
            }));
        }
    }
}

/// Answers the operation's caller and everybody who joined it.
fn finish(
    done: Done,
    owner: Message,
    joined: Vec<Message>,
    view: &watch::Receiver<Published>,
) -> Box<Instance> {
    let Done {
        instance, outcome, ..
    } = done;
    let current = view.borrow().view.clone();
    for message in joined {
        message.reply(match &outcome {
            Ok(()) => Ok(current.clone()),
            Err(error) => Err(EngineError::Internal {
                context: "the operation this command joined".to_owned(),
                reason: error.to_string(),
            }),
        });
    }
    owner.reply(outcome.map(|()| current));
    instance
}

/// Nothing is left of the instance: whoever still asks is told so.
async fn refuse_rest(
    view: &watch::Receiver<Published>,
    waiting: VecDeque<Message>,
    mut mailbox: mpsc::Receiver<Message>,
) {
    mailbox.close();
    let id = view.borrow().view.id.clone();
    let mut answer = |message: Message| match message {
        // It wanted it gone, and it is.
        Message::Delete { reply, .. } => drop(reply.send(Ok(view.borrow().view.clone()))),
        other => other.reply(Err(EngineError::NotFound {
            what: "instance",
            id: id.clone(),
        })),
    };
    waiting.into_iter().for_each(&mut answer);
    while let Some(message) = mailbox.recv().await {
        answer(message);
    }
}
