//! One task per instance: the only one that changes it.
//!
//! ```text
//!   mailbox ──> admit (pure table) ──> run an operation ── while it runs: join, queue or interrupt
//!   machine status, guest view ──> facts      (level-triggered: what is true now, not what was missed)
//! ```
//!
//! An operation owns the [`Instance`] while it runs and gives it back; nobody else can touch it, so
//! there is no lock. A caller that hangs up stops nothing: its reply is simply not delivered.
use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc};

use doze_host::conntrack::policy::Policy;
use doze_lifecycle::{Admission, Cause, Command, Fact, Operation, admission::admit};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::Instrument as _;

use crate::{
    EngineError, InstanceView, MemoryCompression, StandbyOptions, StartOverrides,
    auto_standby::Attempt,
    instance::{Instance, Published},
    observe::idle,
    ops::{self, Cancel},
    recovery,
};

pub type Reply = oneshot::Sender<Result<Arc<InstanceView>, EngineError>>;

/// What the mailbox takes.
pub enum Message {
    Create {
        reply: Reply,
    },
    Start {
        overrides: StartOverrides,
        /// A sleeping instance boots from its disk; its memory is lost.
        discard_memory: bool,
        reply: Reply,
    },
    Stop {
        reply: Reply,
    },
    Standby {
        /// How the memory is to be kept.
        options: StandbyOptions,
        /// Not a user wants it, but nobody wanted the instance.
        auto: Option<Arc<Attempt>>,
        reply: Reply,
    },
    /// Change what may be changed of its spec, in whatever state it is.
    Update {
        auto_standby: Policy,
        reply: Reply,
    },
    Restore {
        reply: Reply,
    },
    Delete {
        graceful: bool,
        reply: Reply,
    },
    /// A copy of this moment, for a snapshot or a fork.
    Capture {
        command: Command,
        cause: Cause,
        plan: ops::capture::Plan,
        reply: Reply,
    },
    /// Make this new instance of a copy.
    Fork {
        plan: ops::fork::Plan,
        reply: Reply,
    },
    /// Back to a stored snapshot. The plan is taken when it begins.
    Rollback {
        plan: Option<Box<ops::rollback::Plan>>,
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
    /// `plan`: how the memory of the instance is kept, if it sleeps or is about to.
    fn command(&self, plan: Option<&MemoryCompression>) -> Option<Command> {
        match self {
            Message::Start {
                overrides,
                discard_memory,
                ..
            } => Some(Command::Start {
                overrides: !overrides.is_empty(),
                discard_memory: *discard_memory,
            }),
            Message::Stop { .. } => Some(Command::Stop),
            Message::Standby { options, .. } => Some(Command::Standby {
                options: options.wants_something(plan),
            }),
            Message::Restore { .. } => Some(Command::Restore),
            Message::Delete { graceful, .. } => Some(Command::Delete {
                graceful: *graceful,
            }),
            Message::Capture { command, .. } => Some(*command),
            Message::Rollback { .. } => Some(Command::Rollback),
            Message::Create { .. } | Message::Fork { .. } | Message::Update { .. } => None,
            Message::Recover { .. } | Message::Retire { .. } => None,
        }
    }

    /// For traces.
    fn name(&self) -> &'static str {
        match self {
            Message::Create { .. } => "create",
            Message::Start { .. } => "start",
            Message::Stop { .. } => "stop",
            Message::Standby { .. } => "standby",
            Message::Update { .. } => "update",
            Message::Restore { .. } => "restore",
            Message::Delete { .. } => "delete",
            Message::Capture {
                command: Command::Fork { .. },
                ..
            } => "copy for a fork",
            Message::Capture { .. } => "copy for a snapshot",
            Message::Fork { .. } => "fork",
            Message::Rollback { .. } => "rollback",
            Message::Recover { .. } | Message::Retire { .. } => "recover",
        }
    }

    /// Who comes before a compression of the memory; `None`: whoever does not touch it.
    fn needs_files(&self) -> Option<&'static str> {
        match self {
            Message::Start { .. } => Some("start"),
            Message::Stop { .. } => Some("stop"),
            Message::Restore { .. } => Some("restore"),
            Message::Delete { .. } => Some("delete"),
            Message::Capture {
                command: Command::Fork { .. },
                ..
            } => Some("fork"),
            Message::Capture { .. } => Some("snapshot"),
            Message::Rollback { .. } => Some("snapshot_restore"),
            // None of them is about an instance that sleeps already.
            Message::Create { .. } | Message::Fork { .. } | Message::Standby { .. } => None,
            Message::Update { .. } | Message::Recover { .. } | Message::Retire { .. } => None,
        }
    }

    fn is_automatic(&self) -> bool {
        matches!(self, Message::Standby { auto: Some(_), .. })
    }

    /// Who wants it.
    fn cause(&self) -> Cause {
        match self {
            Message::Create { .. } | Message::Start { .. } | Message::Stop { .. } => Cause::User,
            Message::Standby { auto: Some(_), .. } => Cause::AutoStandby,
            Message::Standby { .. } | Message::Restore { .. } => Cause::User,
            Message::Delete { .. } | Message::Fork { .. } | Message::Rollback { .. } => Cause::User,
            Message::Capture { cause, .. } => *cause,
            Message::Update { .. } => Cause::User,
            Message::Recover { .. } | Message::Retire { .. } => Cause::Recovery,
        }
    }

    fn reply(self, answer: Result<Arc<InstanceView>, EngineError>) {
        match self {
            Message::Create { reply }
            | Message::Start { reply, .. }
            | Message::Stop { reply }
            | Message::Standby { reply, .. }
            | Message::Update { reply, .. }
            | Message::Restore { reply }
            | Message::Delete { reply, .. }
            | Message::Capture { reply, .. }
            | Message::Fork { reply, .. }
            | Message::Rollback { reply, .. }
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
    /// How many of those that wait, at the front, interrupted it.
    interrupters: usize,
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
    let mut instance = Box::new(instance);
    // What the last server did not get to.
    instance.follow_up();
    let mut holding = Holding::Idle(instance);
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
                    instance.halt_compression("shutdown").await;
                    // The asker may have given up waiting.
                    let _ = reply.send(());
                    return;
                }
                match settle(&mut instance, &message).await {
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

/// Before anything else begins: an operation that could not record its own end (the store refused) is
/// finished or undone, and a machine that could not be attached to is looked for again. `Ok(false)`:
/// that was the instance's end.
async fn settle(instance: &mut Instance, message: &Message) -> Result<bool, EngineError> {
    let adrift = instance.record.machine().is_some() && instance.live.is_none();
    let command = match message {
        // Both know what to do with an unfinished record.
        Message::Create { .. } | Message::Fork { .. } => return Ok(true),
        Message::Recover { .. } | Message::Retire { .. } => return Ok(true),
        // Or need not know.
        Message::Update { .. } => return Ok(true),
        Message::Start { .. } => Command::START,
        Message::Stop { .. } => Command::Stop,
        Message::Standby { .. } => Command::Standby { options: false },
        Message::Restore { .. } => Command::Restore,
        Message::Delete { graceful, .. } => Command::Delete {
            graceful: *graceful,
        },
        Message::Capture { command, .. } => *command,
        Message::Rollback { .. } => Command::Rollback,
    };
    if instance.record.operation().is_none() && !adrift {
        return Ok(true);
    }
    let mut outcome = recovery::run(instance).await;
    let ends_it = match command {
        Command::Delete { .. } => true,
        // Killing the machine of a restore would lose the memory.
        Command::Stop => instance.record.operation() != Some(Operation::Restore),
        Command::Start { .. } | Command::Standby { .. } => false,
        Command::Restore | Command::Exec => false,
        Command::Snapshot { .. } | Command::Fork { .. } | Command::Rollback => false,
    };
    if let Err(error) = &outcome
        && ends_it
    {
        // What does not answer is killed, which needs no answer.
        instance.note(&format!("its machine is out of reach: {error}; killing it"));
        instance.kill_machine().await?;
        outcome = recovery::run(instance).await;
    }
    if outcome.is_err()
        && matches!(command, Command::Delete { .. })
        && instance.record.operation() == Some(Operation::Rollback)
    {
        // What it would have become nobody wants any more.
        let reason = "it is being deleted".to_owned();
        instance.commit(Fact::OperationFailed { reason }).await?;
        return Ok(true);
    }
    match (outcome, command) {
        (Ok(present), _) => Ok(present),
        // They kill what cannot be attached to, by its mark.
        (Err(error), Command::Stop | Command::Delete { .. }) if adrift => {
            instance.note(&format!("its machine is out of reach: {error}"));
            Ok(true)
        }
        (Err(error), _) => Err(error),
    }
}

/// A message to an instance at rest.
fn decide(instance: Box<Instance>, message: Message) -> Holding {
    let Some(command) = message.command(instance.compression.as_ref()) else {
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
fn begin(mut instance: Box<Instance>, mut message: Message) -> Holding {
    let cancel = match &message {
        Message::Standby {
            auto: Some(attempt),
            ..
        } => attempt.cancel(),
        _ => Cancel::new(),
    };
    instance.on_behalf = Some(message.cause());
    let (token, needs_files) = (cancel.clone(), message.needs_files());
    let span = tracing::info_span!(
        "operation", instance = %instance.id, operation = message.name(), cause = message.cause().as_str()
    );
    let task = message.task();
    let work = async move {
        // Here, for all of them: nobody else is at work in an instance's files while an operation runs.
        if let Some(by) = needs_files {
            instance.halt_compression(by).await;
        }
        let (outcome, gone) = operate(&mut instance, &token, task).await;
        if !gone {
            instance.follow_up();
        }
        Done {
            instance,
            outcome,
            gone,
        }
    };
    let work = Box::pin(work.instrument(span));
    Holding::Busy(Busy {
        work,
        cancel,
        owner: message,
        joined: Vec::new(),
        interrupters: 0,
    })
}

/// What a message asks for, without who wants to hear of it.
enum Task {
    Create,
    Start(StartOverrides),
    Stop,
    Standby(Option<Arc<Attempt>>, StandbyOptions),
    Update(Policy),
    Restore,
    Delete { graceful: bool },
    Capture(ops::capture::Plan),
    Fork(ops::fork::Plan),
    Rollback(Option<Box<ops::rollback::Plan>>),
    Recover,
}

impl Message {
    fn task(&mut self) -> Task {
        match self {
            Message::Create { .. } => Task::Create,
            Message::Start { overrides, .. } => Task::Start(overrides.clone()),
            Message::Stop { .. } => Task::Stop,
            Message::Standby { auto, options, .. } => Task::Standby(auto.clone(), *options),
            Message::Update { auto_standby, .. } => Task::Update(auto_standby.clone()),
            Message::Restore { .. } => Task::Restore,
            Message::Delete { graceful, .. } => Task::Delete {
                graceful: *graceful,
            },
            Message::Capture { plan, .. } => Task::Capture(plan.clone()),
            Message::Fork { plan, .. } => Task::Fork(plan.clone()),
            Message::Rollback { plan, .. } => Task::Rollback(plan.take()),
            Message::Recover { .. } | Message::Retire { .. } => Task::Recover,
        }
    }
}

/// The flag says that nothing of the instance is left.
async fn operate(
    instance: &mut Instance,
    cancel: &Cancel,
    task: Task,
) -> (Result<(), EngineError>, bool) {
    let outcome = match task {
        Task::Create => return ops::create::run(instance, cancel).await,
        Task::Fork(plan) => return ops::fork::run(instance, cancel, &plan).await,
        Task::Delete { graceful } => {
            let outcome = ops::delete::run(instance, cancel, graceful).await;
            let gone = outcome.is_ok();
            return (outcome, gone);
        }
        Task::Recover => {
            let outcome = recovery::run(instance).await;
            let gone = matches!(outcome, Ok(false));
            return (outcome.map(drop), gone);
        }
        Task::Start(overrides) => ops::start::run(instance, cancel, overrides).await,
        Task::Stop => ops::stop::run(instance, cancel).await,
        Task::Standby(auto, options) => {
            ops::standby::run(instance, cancel, auto.as_deref(), options).await
        }
        Task::Update(auto_standby) => ops::update::run(instance, auto_standby).await,
        Task::Restore => ops::restore::run(instance, cancel).await,
        Task::Capture(plan) => ops::capture::run(instance, cancel, &plan).await,
        Task::Rollback(Some(plan)) => ops::rollback::run(instance, cancel, *plan).await,
        Task::Rollback(None) => Err(EngineError::Internal {
            context: "rollback".into(),
            reason: "its plan was taken already".into(),
        }),
    };
    (outcome, false)
}

/// A message while an operation runs.
fn overlap(
    busy: &mut Busy,
    message: Message,
    view: &watch::Receiver<Published>,
    waiting: &mut VecDeque<Message>,
) {
    let current = view.borrow().view.clone();
    let Some(command) = message.command(current.compression.as_ref()) else {
        waiting.push_back(message);
        return;
    };
    let record = current.record.clone();
    // The running operation may not have recorded itself yet, or may just have recorded its end.
    let operation = record.operation().or(match busy.owner {
        Message::Create { .. } => Some(Operation::Create),
        Message::Start { .. } => Some(Operation::Start),
        Message::Stop { .. } => Some(Operation::Stop),
        Message::Standby { .. } => Some(Operation::Standby),
        Message::Restore { .. } => Some(Operation::Restore),
        Message::Delete { .. } => Some(Operation::Delete),
        Message::Capture { .. } => Some(Operation::Snapshot),
        Message::Fork { .. } => Some(Operation::Fork),
        Message::Rollback { .. } => Some(Operation::Rollback),
        Message::Recover { .. } | Message::Retire { .. } | Message::Update { .. } => None,
    });
    let Some(operation) = operation else {
        waiting.push_back(message);
        return;
    };
    match admit(record.state(), Some(operation), command) {
        // One that nobody asked for may be called off at any moment; somebody's own is done then.
        Admission::Join if busy.owner.is_automatic() && !message.is_automatic() => {
            waiting.push_back(message);
        }
        Admission::Join => busy.joined.push(message),
        Admission::Interrupt => {
            busy.cancel.cancel();
            // Before those that only wait, but in the order in which they came.
            waiting.insert(busy.interrupters.min(waiting.len()), message);
            busy.interrupters += 1;
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
        mut instance,
        outcome,
        gone,
    } = done;
    instance.on_behalf = None;
    let current = view.borrow().view.clone();
    for message in joined {
        let answer = match (&outcome, &message) {
            (Ok(()), _) => Ok(current.clone()),
            // It wanted it gone, and it is.
            (Err(_), Message::Delete { .. }) if gone => Ok(current.clone()),
            (Err(EngineError::Interrupted { by }), _) => Err(EngineError::Interrupted { by }),
            (Err(_), _) if gone => Err(EngineError::NotFound {
                what: "instance",
                id: current.id.clone(),
            }),
            (Err(error), _) => Err(error.repeated()),
        };
        message.reply(answer);
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
