//! The host's end of the control channel.
//!
//! ```text
//!   AgentClient, ExecSession, ExecInput ──> Endpoint <── one task: connect, drive, connect again
//!            ^                                                │
//!            └── watch<GuestView>, inbox per exec stream <────┘ (dispatch)
//! ```
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU32},
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

pub use exec::{ExecEvent, ExecInput, ExecSession};

/// How long the guest may take to say that a command started or a shutdown was accepted.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// How long a closing client waits for the guest to hear that its commands are over.
const GOODBYE_WITHIN: Duration = Duration::from_millis(500);

/// What the guest has told so far. Instants are on the host's clock: time of arrival minus the age
/// the guest gave, so the guest's own clocks never matter.
#[derive(Debug, Clone, Default)]
pub struct GuestView {
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
    next_stream: AtomicU32,
    pings: Mutex<HashMap<u64, oneshot::Sender<()>>>,
    shutdowns: Mutex<Vec<oneshot::Sender<()>>>,
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
        AgentError::Unavailable(lock(&self.problem).clone())
    }

    fn require_connected(&self) -> Result<(), AgentError> {
        if self.endpoint.established() {
            Ok(())
        } else {
            Err(self.unavailable())
        }
    }

    /// Waits for an answer while the channel lives.
    async fn answer(
        &self,
        answer: oneshot::Receiver<()>,
        within: Duration,
    ) -> Result<(), AgentError> {
        tokio::select! {
            got = tokio::time::timeout(within, answer) => match got {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(AgentError::Lost),
                Err(_) => Err(AgentError::Timeout(within)),
            },
            () = self.cancel.cancelled() => Err(AgentError::Lost),
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
            next_stream: AtomicU32::new(MAIN_STREAM + 1),
            pings: Mutex::default(),
            shutdowns: Mutex::default(),
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

    /// A round trip with a fresh nonce. Waits for a connection if there is none, all within `timeout`.
    pub async fn ping(&self, timeout: Duration) -> Result<(), AgentError> {
        let shared = &self.handle.shared;
        let nonce = rand::random();
        let round_trip = async {
            let mut view = self.view();
            view.wait_for(|v| v.connected)
                .await
                .map_err(|_| AgentError::Lost)?;
            let (sender, receiver) = oneshot::channel();
            lock(&shared.pings).insert(nonce, sender);
            shared
                .endpoint
                .send(MAIN_STREAM, &ToGuest::Ping { nonce })?;
            shared.answer(receiver, timeout).await
        };
        let result = tokio::time::timeout(timeout, round_trip).await;
        lock(&shared.pings).remove(&nonce);
        match result {
            Ok(done) => done,
            Err(_) if shared.endpoint.established() => Err(AgentError::Timeout(timeout)),
            Err(_) => Err(shared.unavailable()),
        }
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
        shared.cancel.cancel();
        let task = lock(&self.handle.task).take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(%error, "the control channel's task ended badly");
        }
    }
}
