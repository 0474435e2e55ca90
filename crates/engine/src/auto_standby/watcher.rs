//! One task per instance that decides when it may fall asleep, and asks its driver for it.
//!
//! It owns what is remembered of the instance. Whatever wakes it (a change of the instance, of its
//! connections or sessions, a hold, a timer), it looks at what is true now, never at what the signal was
//! about, so that no signal can be missed. It changes nothing of the instance: the driver does, and looks again before it does.
use std::{future::Future, net::IpAddr, pin::Pin, sync::Arc, time::Duration};

use doze_lifecycle::{Operation, Stamp, State};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot, watch},
    time::Instant,
};
use tracing::Instrument as _;

use super::{
    Controller,
    attempt::Attempt,
    counters::{Ended, Failed},
    decide::{self, Memory, Seen, Span, Verdict, enabled},
    eyes::Sight,
    facts::{self, Looked},
    status::{Progress, Status},
};
use crate::{
    EngineError, InstanceView,
    driver::Message,
    instance::{Published, store_error},
    now,
};

/// While somebody is there, connections are looked at this often at most, however many come and go.
const PACE: Duration = Duration::from_millis(100);
/// An instance that has become idle is written down as such when it has been for this long: many short
/// connections must not be as many writes.
const SETTLED: Duration = Duration::from_secs(1);
/// After an attempt that was called off. What called it off is seen by then.
const SHORT_PAUSE: Duration = Duration::from_secs(1);
/// After an attempt that failed, doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LAST_PAUSE: Duration = Duration::from_secs(300);

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Outcome = Result<Arc<InstanceView>, EngineError>;

/// What the task can be asked.
pub enum Ask {
    Hold {
        reply: oneshot::Sender<Result<Status, EngineError>>,
    },
}

/// What readers get.
#[derive(Clone, Default)]
pub struct Shown {
    pub memory: Memory,
    pub progress: Progress,
}

enum Stage {
    Resting,
    Queued(Boxed<Option<OwnedSemaphorePermit>>),
    /// Its turn has come.
    Called(Option<OwnedSemaphorePermit>),
    Requested {
        attempt: Arc<Attempt>,
        done: Boxed<Outcome>,
    },
}

enum Event {
    Looked,
    Gone,
    Asked(Ask),
    Turn(Option<OwnedSemaphorePermit>),
    Done(Box<Outcome>),
}

pub struct Watcher {
    pub id: String,
    pub controller: Arc<Controller>,
    pub published: watch::Receiver<Published>,
    /// Weak: the driver ends when nobody else can reach it.
    pub driver: mpsc::WeakSender<Message>,
    pub asks: mpsc::Receiver<Ask>,
    pub shown: watch::Sender<Shown>,
    pub memory: Memory,
    kept: Memory,
    stage: Stage,
    /// Signals of the tracker about this address.
    flows: Option<(IpAddr, watch::Receiver<u64>)>,
    sessions: Option<watch::Receiver<usize>>,
    /// What was over when last looked; `None`: never looked.
    known: Option<Sight>,
    busy: bool,
    looked: Instant,
    settles: Option<Instant>,
    failures: u32,
}

impl Watcher {
    pub fn new(
        id: String,
        controller: Arc<Controller>,
        published: watch::Receiver<Published>,
        driver: mpsc::WeakSender<Message>,
        asks: mpsc::Receiver<Ask>,
        memory: Memory,
    ) -> (Watcher, watch::Receiver<Shown>) {
        let shown = watch::Sender::new(Shown {
            memory: memory.clone(),
            progress: Progress::Resting,
        });
        let reader = shown.subscribe();
        let watcher = Watcher {
            id,
            controller,
            published,
            driver,
            asks,
            shown,
            kept: memory.clone(),
            memory,
            stage: Stage::Resting,
            flows: None,
            sessions: None,
            known: None,
            busy: false,
            looked: Instant::now(),
            settles: None,
            failures: 0,
        };
        (watcher, reader)
    }

    /// Until the instance is gone, or its driver is.
    pub async fn run(mut self) {
        loop {
            let verdict = self.look();
            self.act(&verdict);
            self.show();
            // What failed is said already, and tried again.
            let _said = self.keep(false).await;
            match self.wait(&verdict).await {
                Event::Looked => {}
                Event::Gone => return,
                Event::Asked(Ask::Hold { reply }) => {
                    // Whoever hung up does not want the answer.
                    let _ = reply.send(self.hold().await);
                }
                Event::Turn(permit) => self.stage = Stage::Called(permit),
                Event::Done(outcome) => self.finish(*outcome),
            }
        }
    }

    /// What is true now, and what follows. Signals up to here are taken note of.
    fn look(&mut self) -> Verdict {
        self.subscribe();
        let published = self.published.borrow_and_update().clone();
        self.looked = Instant::now();
        let looked = facts::of(&published.view, &self.controller, published.agent.as_ref());
        let Looked { mut facts, sight } = looked;
        if let (Ok(seen), Some(sight), Some(known)) = (&mut facts.seen, &sight, &self.known) {
            seen.passed_by = !sight.over.is_subset(&known.over);
        }
        if sight.is_some() {
            self.known = sight;
        }
        let (memory, verdict) = decide::look(&self.memory, &facts, &now());
        self.busy = facts.seen.as_ref().is_ok_and(Seen::is_busy);
        if memory.idle_since != self.memory.idle_since {
            self.settles = Some(Instant::now() + SETTLED);
            match &verdict {
                Verdict::Active(seen) => tracing::debug!(
                    instance = %self.id,
                    connections = seen.connections,
                    sessions = seen.sessions,
                    "it is in use"
                ),
                Verdict::Idle { remaining } => {
                    tracing::debug!(instance = %self.id, ?remaining, "nobody uses it");
                }
                other => tracing::debug!(instance = %self.id, ?other, "its countdown ended"),
            }
        }
        self.memory = memory;
        verdict
    }

    /// Before looking: what happens afterwards wakes us.
    fn subscribe(&mut self) {
        let published = self.published.borrow();
        let wanted = facts::observed_address(&published.view);
        self.sessions = published
            .agent
            .as_ref()
            .filter(|_| wanted.is_some())
            .map(|agent| agent.sessions());
        drop(published);
        match (&mut self.flows, wanted, self.controller.eyes()) {
            (Some((ip, signal)), Some(wanted), _) if *ip == wanted => {
                signal.borrow_and_update();
            }
            (flows, Some(wanted), Some(eyes)) => {
                *flows = Some((wanted, eyes.tracker().watch(wanted)));
            }
            (flows, _, _) => {
                *flows = None;
                self.known = None;
            }
        }
    }

    fn act(&mut self, verdict: &Verdict) {
        let stage = std::mem::replace(&mut self.stage, Stage::Resting);
        self.stage = match (stage, verdict.is_due()) {
            (Stage::Resting, true) => {
                tracing::debug!(instance = %self.id, "nobody used it for its idle timeout; it waits for its turn to sleep");
                let turns = self.controller.turns();
                Stage::Queued(Box::pin(async move { turns.acquire_owned().await.ok() }))
            }
            (Stage::Resting, false) => Stage::Resting,
            (queued @ Stage::Queued(_), true) => queued,
            (Stage::Queued(_) | Stage::Called(_), false) => {
                tracing::info!(instance = %self.id, ?verdict, "it does not fall asleep: it is not idle any more");
                Stage::Resting
            }
            (Stage::Called(permit), true) => self.request(permit),
            (Stage::Requested { attempt, done }, _) => {
                if let Some(why) = self.unwanted(verdict) {
                    attempt.call_off(why);
                }
                Stage::Requested { attempt, done }
            }
        };
    }

    /// Why a standby that was asked for should not go on.
    fn unwanted(&self, verdict: &Verdict) -> Option<&'static str> {
        match verdict {
            // Its CPUs stand still: then connections are looked at all the same.
            Verdict::NotRunning | Verdict::Idle { .. } if self.busy => Some("a connection"),
            Verdict::NotRunning => None,
            Verdict::Idle { remaining } if remaining.is_zero() => None,
            Verdict::Idle { .. } => Some("a change of its policy"),
            Verdict::Active(seen) if seen.connections == 0 => Some("an exec session"),
            Verdict::Active(_) => Some("a connection"),
            Verdict::Blind(_) => Some("connections that could not be read"),
            Verdict::Unsupported | Verdict::NoPolicy | Verdict::Disabled => {
                Some("a change of its policy")
            }
            Verdict::NoNetwork | Verdict::NoAddress => Some("a change of its network"),
        }
    }

    fn request(&self, permit: Option<OwnedSemaphorePermit>) -> Stage {
        let (Some(permit), Some(eyes)) = (permit, self.controller.eyes()) else {
            return Stage::Resting;
        };
        let attempt = Arc::new(Attempt::new(eyes.clone(), self.controller.counters()));
        let (reply, answer) = oneshot::channel();
        let message = Message::Standby {
            options: crate::StandbyOptions::default(),
            auto: Some(attempt.clone()),
            reply,
        };
        let driver = self.driver.upgrade();
        let span = tracing::info_span!("auto_standby", instance = %self.id);
        let done = async move {
            let _permit = permit;
            let Some(driver) = driver else {
                return Err(EngineError::ShuttingDown);
            };
            driver
                .send(message)
                .await
                .map_err(|_| EngineError::ShuttingDown)?;
            drop(driver);
            answer.await.unwrap_or(Err(EngineError::ShuttingDown))
        };
        tracing::info!(instance = %self.id, "nobody used it for its idle timeout; asking for its standby");
        Stage::Requested {
            attempt,
            done: Box::pin(done.instrument(span)),
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        self.stage = Stage::Resting;
        let counters = self.controller.counters();
        let pause = match outcome {
            Ok(_) => {
                counters.ended(Ended::Asleep);
                self.failures = 0;
                return;
            }
            Err(EngineError::ShuttingDown | EngineError::NotFound { .. }) => SHORT_PAUSE,
            Err(EngineError::Interrupted { by }) => {
                tracing::info!(instance = %self.id, by, "its standby was called off");
                counters.ended(Ended::CalledOff);
                SHORT_PAUSE
            }
            Err(error) => {
                let pause = LAST_PAUSE.min(FIRST_PAUSE * 2u32.saturating_pow(self.failures));
                self.failures = self.failures.saturating_add(1);
                counters.ended(Ended::Failed);
                counters.failed(Failed::Standby);
                tracing::warn!(instance = %self.id, %error, ?pause, "its standby failed; it is tried again");
                pause
            }
        };
        self.memory.pause = Some(Span {
            since: now(),
            length: pause,
        });
    }

    /// Keeps the instance awake for one idle timeout from now, or says that it is too late.
    async fn hold(&mut self) -> Result<Status, EngineError> {
        let view = self.published.borrow().view.clone();
        self.still_awake(&view)?;
        let looked = facts::of(&view, &self.controller, None);
        if let Some(policy) = enabled(&looked.facts).filter(|_| looked.facts.supported) {
            self.memory.hold = Some(Span {
                since: now(),
                length: policy.idle_timeout,
            });
            self.keep(true).await.map_err(store_error)?;
            tracing::info!(instance = %self.id, until = ?policy.idle_timeout, "held awake");
        }
        let verdict = self.look();
        self.act(&verdict);
        self.show();
        let shown = self.shown.borrow().clone();
        Ok(status(&view, &self.controller, &shown, &self.published))
    }

    fn still_awake(&self, view: &InstanceView) -> Result<(), EngineError> {
        let state = view.state();
        let asleep = || EngineError::Asleep { state };
        let ours = match &self.stage {
            Stage::Requested { attempt, .. } => match attempt.call_off("a hold") {
                true => true,
                false => return Err(asleep()),
            },
            Stage::Resting | Stage::Queued(_) | Stage::Called(_) => false,
        };
        let entering = view.record.operation() == Some(Operation::Standby);
        match state == State::Standby || (entering && !ours) {
            true => Err(asleep()),
            false => Ok(()),
        }
    }

    fn show(&self) {
        let progress = match self.stage {
            Stage::Resting => Progress::Resting,
            Stage::Queued(_) | Stage::Called(_) => Progress::Queued,
            Stage::Requested { .. } => Progress::Requested,
        };
        self.shown.send_replace(Shown {
            memory: self.memory.clone(),
            progress,
        });
    }

    /// Writes down what a restart must know, if it is time to. That it is in use, or was for a moment, is
    /// written at once: what a crash leaves must never let it sleep earlier.
    async fn keep(&mut self, at_once: bool) -> Result<(), crate::store::StoreError> {
        let changed =
            self.memory.idle_since != self.kept.idle_since || self.memory.hold != self.kept.hold;
        let outdated =
            self.kept.idle_since.is_some() && self.memory.idle_since != self.kept.idle_since;
        let settled = self.settles.is_none_or(|at| at <= Instant::now());
        if !changed || !(at_once || outdated || settled) {
            return Ok(());
        }
        let mut memory = self.memory.clone();
        if !settled {
            memory.idle_since = None;
        }
        let written = self.controller.remember(&self.id, &memory).await;
        match &written {
            Ok(()) => self.kept = memory,
            // It is being deleted.
            Err(crate::store::StoreError::Missing(_)) => {
                self.settles = Some(Instant::now() + FIRST_PAUSE);
            }
            Err(error) => {
                self.controller.counters().failed(Failed::Remember);
                self.settles = Some(Instant::now() + FIRST_PAUSE);
                tracing::warn!(instance = %self.id, %error, "its idle time could not be written down; it is tried again");
            }
        }
        written
    }

    async fn wait(&mut self, verdict: &Verdict) -> Event {
        let paced = self.looked + PACE;
        let timer = self.timer(verdict);
        let (flows, sessions, busy) = (&mut self.flows, &mut self.sessions, self.busy);
        let stage = &mut self.stage;
        let connections = async {
            if busy {
                tokio::time::sleep_until(paced).await;
            }
            changed(flows.as_mut().map(|(_, signal)| signal)).await;
        };
        let turn = async {
            match stage {
                Stage::Resting => std::future::pending().await,
                Stage::Queued(turn) => Event::Turn(turn.await),
                Stage::Called(_) => Event::Looked,
                Stage::Requested { done, .. } => Event::Done(Box::new(done.await)),
            }
        };
        tokio::select! {
            changed = self.published.changed() => match changed {
                Ok(()) => Event::Looked,
                Err(_) => Event::Gone,
            },
            Some(ask) = self.asks.recv() => Event::Asked(ask),
            event = turn => event,
            () = connections => Event::Looked,
            () = changed(sessions.as_mut()) => Event::Looked,
            () = sleep_until(timer) => Event::Looked,
        }
    }

    /// When to look again although nothing happens.
    fn timer(&self, verdict: &Verdict) -> Option<Instant> {
        let due = match verdict {
            Verdict::Idle { remaining } if !remaining.is_zero() => {
                // A little later: a timer may fire a moment early by the other clock.
                Some(self.looked + *remaining + Duration::from_millis(1))
            }
            Verdict::Idle { .. } | Verdict::Active(_) | Verdict::Blind(_) => None,
            Verdict::Unsupported | Verdict::NoPolicy | Verdict::Disabled => None,
            Verdict::NotRunning | Verdict::NoNetwork | Verdict::NoAddress => None,
        };
        let unkept = self.memory.idle_since != self.kept.idle_since;
        let keeping = self.settles.filter(|_| unkept);
        match (due, keeping) {
            (Some(due), Some(keeping)) => Some(due.min(keeping)),
            (due, keeping) => due.or(keeping),
        }
    }
}

async fn changed<T>(signal: Option<&mut watch::Receiver<T>>) {
    let told = match signal {
        Some(signal) => signal.changed().await.is_ok(),
        None => false,
    };
    if !told {
        std::future::pending::<()>().await;
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The answer to whoever asks, out of what is shown and what is true at this moment.
pub fn status(
    view: &InstanceView,
    controller: &Controller,
    shown: &Shown,
    published: &watch::Receiver<Published>,
) -> Status {
    let agent = published.borrow().agent.clone();
    let looked = facts::of(view, controller, agent.as_ref());
    let at: Stamp = now();
    let (memory, verdict) = decide::look(&shown.memory, &looked.facts, &at);
    Status::of(&memory, &looked.facts, &verdict, shown.progress, &at)
}
