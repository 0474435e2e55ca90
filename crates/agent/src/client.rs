//! The host's end of the control channel.
//!
//! ```text
//!   AgentClient, ExecSession, ExecInput ──> Endpoint <── one task: connect, drive, connect again
//!            ^                                                │
//!            └── watch<GuestView>, inbox per exec stream <────┘ (dispatch)
//! ```
//!
//! One client serves one life of one machine monitor. Around a standby and a restore:
//!
//! ```text
//!   open_sessions ─> policy ─> close_with(reason) ─> monitor killed   (the guest hears nothing)
//!   connect ─> linked ─> device state loaded ─> CPUs run ─> restored  (the guest answers a new nonce)
//! ```
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::AtomicU32},
    time::{Duration, Instant},
};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::{
    endpoint::Endpoint,
    message::{ExecRequest, ProgramExit, ToGuest},
    session::{MAIN_STREAM, Role, SendError},
};

mod exec;
mod link;
mod restored;
#[cfg(test)]
mod tests;

pub use exec::{ExecEvent, ExecInput, ExecSession};
pub use restored::Answer;

/// How long the guest may take to say that a command started or a shutdown was accepted.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long a closing client waits for the guest to hear that its commands are over.
const GOODBYE_WITHIN: Duration = Duration::from_millis(500);

/// What the guest has told so far. Instants are on the host's clock: time of arrival minus the age
/// the guest gave, so the guest's own clocks never matter.
#[derive(Debug, Clone, Default)]
pub struct GuestView {
    /// The socket is connected; whether anybody answers there is another matter.
    pub linked: bool,
    /// A handshake completed and the stream is up.
    pub connected: bool,
    /// Random per boot of the guest.
    pub guest_epoch: Option<u64>,
    pub program_started: Option<Instant>,
    pub agent_ready: Option<Instant>,
    pub program_exit: Option<ProgramExit>,
    /// The guest could not do what its configuration says (missing disk, bad user, ...).
    pub boot_error: Option<String>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    #[error("the guest agent does not answer: {0}")]
    Unavailable(String),
    /// The guest's agent refused or could not do it.
    #[error("{0}")]
    Refused(String),
    #[error("no answer from the guest agent within {0:?}")]
    Timeout(Duration),
    #[error("the connection to the guest agent was lost; the command's fate is unknown")]
    Lost,
}

impl From<SendError> for AgentError {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Closed => Self::Lost,
            SendError::TooLarge(_) => Self::Refused(error.to_string()),
            SendError::Full => Self::Unavailable(error.to_string()),
        }
    }
}

/// One guest's control channel. Clones share it. A background task (re)connects to the socket until
/// [`AgentClient::close`] or the last clone is dropped.
#[derive(Clone)]
pub struct AgentClient {
    view: watch::Receiver<GuestView>,
    handle: Arc<Handle>,
}

/// Ends the background task with the last clone.
struct Handle {
    shared: Arc<Shared>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.cancel.cancel();
    }
}

/// What the background task and the handles share.
struct Shared {
    endpoint: Endpoint,
    view: watch::Sender<GuestView>,
    streams: Mutex<HashMap<u32, Arc<exec::Inbox>>>,
    /// How many those are; see [`Shared::recount`].
    sessions: watch::Sender<usize>,
    next_stream: AtomicU32,
    pings: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    shutdowns: Mutex<Vec<oneshot::Sender<()>>>,
    restores: Mutex<HashMap<u64, oneshot::Sender<restored::Reply>>>,
    /// Why [`AgentClient::close_with`] ended it.
    closed: OnceLock<String>,
    /// Why there is no connection.
    problem: Mutex<String>,
    cancel: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section leaves its map whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn unavailable(&self) -> AgentError {
        let why = self.closed.get().cloned();
        AgentError::Unavailable(why.unwrap_or_else(|| lock(&self.problem).clone()))
    }

    /// Tells who waits for it how many sessions there are; called after every change of `streams`.
    fn recount(&self) {
        // Under the lock, so that the last one to count has counted the last change.
        let streams = lock(&self.streams);
        self.sessions.send_if_modified(|known| {
            let changed = *known != streams.len();
            *known = streams.len();
            changed
        });
    }

    /// What callers get that this channel's end interrupts.
    fn gone(&self) -> AgentError {
        match self.closed.get() {
            Some(why) => AgentError::Unavailable(why.clone()),
            None => AgentError::Lost,
        }
    }

    /// Waits for what the background task makes of the connection.
    async fn reached(&self, state: impl FnMut(&GuestView) -> bool) -> Result<(), AgentError> {
        let mut view = self.view.subscribe();
        tokio::select! {
            reached = view.wait_for(state) => reached.map(drop).map_err(|_| self.gone()),
            () = self.cancel.cancelled() => Err(self.gone()),
        }
    }

    fn require_connected(&self) -> Result<(), AgentError> {
        if self.endpoint.established() {
            Ok(())
        } else {
            Err(self.unavailable())
        }
    }

    /// Waits for an answer while the channel lives.
    async fn answer<T>(
        &self,
        answer: oneshot::Receiver<T>,
        within: Duration,
    ) -> Result<T, AgentError> {
        tokio::select! {
            got = tokio::time::timeout(within, answer) => match got {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(_)) => Err(self.gone()),
                Err(_) => Err(AgentError::Timeout(within)),
            },
            () = self.cancel.cancelled() => Err(self.gone()),
        }
    }

    /// All of `work` within `timeout`; says whether it was the guest or the way to it that took too long.
    async fn within<T>(
        &self,
        timeout: Duration,
        work: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        match tokio::time::timeout(timeout, work).await {
            Ok(done) => done,
            Err(_) if self.endpoint.established() => Err(AgentError::Timeout(timeout)),
            Err(_) => Err(self.unavailable()),
        }
    }
}

impl AgentClient {
    /// Must be called within a tokio runtime. The socket need not exist yet.
    pub fn connect(socket: PathBuf) -> Self {
        let (sender, view) = watch::channel(GuestView::default());
        let shared = Arc::new(Shared {
            endpoint: Endpoint::new(Role::Host, rand::random()),
            view: sender,
            streams: Mutex::default(),
            sessions: watch::Sender::new(0),
            next_stream: AtomicU32::new(MAIN_STREAM + 1),
            pings: Mutex::default(),
            shutdowns: Mutex::default(),
            restores: Mutex::default(),
            closed: OnceLock::new(),
            problem: Mutex::new(format!("not yet connected to {}", socket.display())),
            cancel: CancellationToken::new(),
        });
        let task = tokio::spawn(link::run(shared.clone(), socket));
        let handle = Arc::new(Handle {
            shared,
            task: Mutex::new(Some(task)),
        });
        Self { view, handle }
    }

    pub fn view(&self) -> watch::Receiver<GuestView> {
        self.view.clone()
    }

    /// Waits until the socket is connected, whether or not a guest answers there: what must have happened
    /// before a machine monitor loads the state of its devices.
    ///
    /// A socket that listens connects before its owner accepts; the monitor's own account of its
    /// character device says whether it has.
    ///
    /// # Errors
    /// [`AgentError::Unavailable`] with the reason after `timeout`.
    pub async fn linked(&self, timeout: Duration) -> Result<(), AgentError> {
        let shared = &self.handle.shared;
        match tokio::time::timeout(timeout, shared.reached(|v| v.linked)).await {
            Ok(linked) => linked,
            Err(_) => Err(shared.unavailable()),
        }
    }

    /// Exec sessions that began, or are about to, and have not ended.
    pub fn open_sessions(&self) -> usize {
        lock(&self.handle.shared.streams).len()
    }

    /// The number of [`AgentClient::open_sessions`], whenever it changes.
    pub fn sessions(&self) -> watch::Receiver<usize> {
        self.handle.shared.sessions.subscribe()
    }

    /// A round trip with a fresh nonce. Waits for a connection if there is none, all within `timeout`.
    pub async fn ping(&self, timeout: Duration) -> Result<(), AgentError> {
        let shared = &self.handle.shared;
        let nonce = rand::random();
        let round_trip = async {
            shared.reached(|v| v.connected).await?;
            let (sender, receiver) = oneshot::channel();
            lock(&shared.pings).insert(nonce, sender);
            shared
                .endpoint
                .send(MAIN_STREAM, &ToGuest::Ping { nonce })?;
            shared.answer(receiver, timeout).await
        };
        let result = shared.within(timeout, round_trip).await;
        lock(&shared.pings).remove(&nonce);
        result
    }

    /// Starts a command. Answers when the guest started it; a command that cannot be started ends
    /// with [`ExecEvent::Exit`] 126 or 127, as in a shell.
    ///
    /// # Errors
    /// [`AgentError::Unavailable`] when not connected now, [`AgentError::Refused`] by the guest.
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecSession, AgentError> {
        let shared = &self.handle.shared;
        shared.require_connected()?;
        ExecSession::begin(shared.clone(), request).await
    }

    /// Asks init to end the program (stop signal, then SIGKILL after `grace`), sync, unmount and power off.
    /// Returns when the guest accepted; the machine's power-off is the proof.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), AgentError> {
        let shared = &self.handle.shared;
        shared.require_connected()?;
        let (sender, receiver) = oneshot::channel();
        lock(&shared.shutdowns).push(sender);
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        shared
            .endpoint
            .send(MAIN_STREAM, &ToGuest::Shutdown { grace_ms })?;
        shared.answer(receiver, ANSWER_WITHIN).await
    }

    /// Ends the sessions that still run, here and in the guest, stops the background task and waits for it.
    pub async fn close(self) {
        let shared = &self.handle.shared;
        link::fail_all(shared, "the control channel was closed");
        if shared.endpoint.established() {
            let told = tokio::time::timeout(GOODBYE_WITHIN, shared.endpoint.flushed()).await;
            if told.is_err() {
                // A guest that is paused or hung; it ends them when it hears the next server.
                tracing::debug!("the guest was not told that its commands are over");
            }
        }
        self.stopped().await;
    }

    /// Ends the channel like [`AgentClient::close`], for a guest that cannot hear it: its CPUs are stopped or
    /// its monitor is gone. Nothing is sent and nothing is waited for. The sessions that still run end here
    /// with `why`; there, as soon as the guest runs again and hears of another client.
    pub async fn close_with(self, why: &str) {
        let shared = &self.handle.shared;
        // The first reason stands: what it ended was told so.
        shared.closed.get_or_init(|| why.to_owned());
        // Before anything else, so that nothing that ends now is still written to the guest.
        shared.cancel.cancel();
        link::end_all(shared);
        self.stopped().await;
    }

    async fn stopped(&self) {
        self.handle.shared.cancel.cancel();
        let task = lock(&self.handle.task).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the control channel's task ended badly");
        }
    }
}
