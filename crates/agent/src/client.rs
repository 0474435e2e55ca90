//! The host's end of the control channel.
use std::{path::PathBuf, time::{Duration, Instant}};

use bytes::Bytes;
use tokio::sync::watch;

use crate::message::{ExecRequest, ProgramExit};

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

/// One guest's control channel. Clones share it. A background task (re)connects to the socket until
/// [`AgentClient::close`] or the last clone is dropped.
#[derive(Clone)]
pub struct AgentClient {
    view: watch::Receiver<GuestView>,
}

impl AgentClient {
    pub fn connect(socket: PathBuf) -> Self {
        let _ = socket;
        unimplemented!()
    }
    pub fn view(&self) -> watch::Receiver<GuestView> {
        self.view.clone()
    }
    /// A round trip with a fresh nonce.
    pub async fn ping(&self, timeout: Duration) -> Result<(), AgentError> {
        let _ = timeout;
        unimplemented!()
    }
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecSession, AgentError> {
        let _ = request;
        unimplemented!()
    }
    /// Asks init to end the program (stop signal, then SIGKILL after `grace`), sync, unmount and power off.
    /// Returns when the guest accepted; the machine's power-off is the proof.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), AgentError> {
        let _ = grace;
        unimplemented!()
    }
    /// Stops the background task and waits for it.
    pub async fn close(self) {}
}

/// What a running command sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// stdout and stderr merged, at most 64 KiB a piece.
    Output(Bytes),
    Exit(ProgramExit),
    /// The session cannot go on (guest gone, standby, server shutting down); final.
    Failed(String),
}

/// A command in the guest. Dropping it kills the command's process group.
pub struct ExecSession {
    _private: (),
}

impl ExecSession {
    /// Next event; `None` after `Exit` or `Failed`. Flow-controlled: not reading stops the command's output.
    pub async fn next(&mut self) -> Option<ExecEvent> {
        unimplemented!()
    }
    /// A cloneable sender half for input, so that reading and writing can go on at once.
    pub fn input(&self) -> ExecInput {
        unimplemented!()
    }
}

#[derive(Clone)]
pub struct ExecInput {
    _private: (),
}

impl ExecInput {
    /// Waits for room (flow control). An error after the command ended.
    pub async fn write(&self, data: Bytes) -> Result<(), AgentError> {
        let _ = data;
        unimplemented!()
    }
    /// End of input (EOF on stdin; ^D on a tty).
    pub async fn close(&self) -> Result<(), AgentError> {
        unimplemented!()
    }
    pub async fn resize(&self, rows: u16, cols: u16) -> Result<(), AgentError> {
        let _ = (rows, cols);
        unimplemented!()
    }
}
