//! The task that talks to QEMU: one request at a time, the status after each and after every event, and a new
//! connection when one is lost. Its invariants are those of [`super`].
use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use doze_host::process::{ProcessHandle, ProcessId};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{COMMAND_DEADLINE, END_DEADLINE};
use crate::{
    MachineStatus, VmmError,
    qemu::{
        migration::{self, Failure},
        qmp::{Cont, Qmp, QmpError, QueryStatus, RunState, Stop},
    },
};

/// Between attempts to connect to a socket that is not there (yet).
const RETRY_FIRST: Duration = Duration::from_millis(2);
const RETRY_MOST: Duration = Duration::from_millis(100);

/// Closed when the caller gave up: then what it asked for is dropped.
pub(super) type Answer<T> = oneshot::Sender<Result<T, VmmError>>;

/// What may be asked again on a new connection.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wish {
    Cont,
    Stop,
    Status,
}

impl Wish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Cont => "cont",
            Self::Stop => "stop",
            Self::Status => "query-status",
        }
    }
}

/// What the keeper is asked to do.
#[derive(Debug)]
pub(super) enum Request {
    Wish {
        wish: Wish,
        answer: Answer<MachineStatus>,
    },
    /// The device state, in memory: where it goes is the caller's.
    Save {
        answer: Answer<Vec<u8>>,
    },
    Load {
        state: Vec<u8>,
        answer: Answer<()>,
    },
}

/// A socket file proves nothing: it may be another machine's by a mistake in the records.
fn check_peer(qmp: &Qmp, id: &ProcessId) -> Result<(), VmmError> {
    let peer = qmp.peer_pid().map_err(|source| VmmError::Io {
        context: "cannot ask who listens on the monitor socket".to_owned(),
        source,
    })?;
    if peer == Some(id.pid) {
        return Ok(());
    }
    Err(VmmError::Refused {
        command: "connect",
        message: format!(
            "the monitor socket belongs to process {peer:?}, expected is {}",
            id.pid
        ),
    })
}

/// Tries until the process answers; the caller bounds it. Nothing announces a listening socket (the file
/// appears before `listen`), hence the attempts, at most ten a second.
///
/// # Errors
/// Only when another process answers.
pub(super) async fn connect(path: &Path, id: &ProcessId) -> Result<Qmp, VmmError> {
    let mut pause = RETRY_FIRST;
    loop {
        match Qmp::connect(path, COMMAND_DEADLINE).await {
            Ok(qmp) => return check_peer(&qmp, id).map(|()| qmp),
            Err(e) => tracing::trace!(path = %path.display(), error = %e, "not connected yet"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_MOST);
    }
}

/// `RunState` of qapi/run-state.json, from the point of view of who wants to use the guest.
pub(super) fn meaning(state: &RunState) -> MachineStatus {
    match state.status.as_str() {
        "prelaunch" | "inmigrate" | "preconfig" => MachineStatus::Prelaunch,
        "running" => MachineStatus::Running,
        "paused" | "suspended" | "debug" | "postmigrate" | "finish-migrate" | "save-vm"
        | "restore-vm" | "colo" => MachineStatus::Paused,
        "shutdown" => MachineStatus::Shutdown,
        "internal-error" | "io-error" | "guest-panicked" | "watchdog" => MachineStatus::Failed,
        unknown => {
            tracing::warn!(status = unknown, "the VMM reports a state we do not know");
            if state.running {
                MachineStatus::Running
            } else {
                MachineStatus::Paused
            }
        }
    }
}

pub(super) fn for_caller(error: QmpError) -> VmmError {
    match error {
        QmpError::Lost(source) => VmmError::Io {
            context: "the connection to the VMM was lost".to_owned(),
            source,
        },
        QmpError::Refused { command, message } => VmmError::Refused { command, message },
        QmpError::Timeout { command, deadline } => VmmError::Timeout {
            command,
            seconds: deadline.as_secs(),
        },
    }
}

impl Failure {
    fn for_caller(self) -> VmmError {
        match self {
            Self::Qmp(e) => for_caller(e),
            // Nobody hears it.
            Self::GivenUp => VmmError::Unsupported("given up".to_owned()),
            Self::Io { context, source } => VmmError::Io {
                context: context.to_owned(),
                source,
            },
        }
    }
}

/// `Gone` is final.
pub(super) fn publish(status: &watch::Sender<MachineStatus>, new: MachineStatus) {
    status.send_if_modified(|now| {
        let changes = *now != new && *now != MachineStatus::Gone;
        if changes {
            *now = new;
        }
        changes
    });
}

/// The one that talks to QEMU.
pub(super) struct Keeper {
    pub process: Arc<ProcessHandle>,
    pub qmp_socket: PathBuf,
    pub status: Arc<watch::Sender<MachineStatus>>,
    pub inbox: mpsc::Receiver<Request>,
    /// Taken from the inbox, not yet answered.
    pub pending: Option<Request>,
}

/// Why a connection was left.
enum Left {
    Lost(io::Error),
    ProcessGone,
    MachineDropped,
}

impl Keeper {
    pub async fn run(mut self, mut qmp: Qmp) {
        let process = self.process.clone();
        let mut gone = std::pin::pin!(until_gone(&process));
        loop {
            match self.serve(&mut qmp, gone.as_mut()).await {
                Left::MachineDropped => return,
                Left::ProcessGone => break,
                Left::Lost(e) => {
                    tracing::debug!(pid = process.id().pid, error = %e, "monitor connection lost");
                }
            }
            qmp = tokio::select! {
                biased;
                () = gone.as_mut() => break,
                qmp = connect(&self.qmp_socket, process.id()) => match qmp {
                    Ok(qmp) => qmp,
                    Err(e) => {
                        // Nobody to talk to; requests run into their deadline. Killing still works.
                        tracing::error!(pid = process.id().pid, error = %e, "no way back to the VMM");
                        gone.as_mut().await;
                        break;
                    }
                },
            };
        }
        // Before the inbox closes: who finds it closed must find `Gone` published.
        publish(&self.status, MachineStatus::Gone);
    }

    async fn serve(&mut self, qmp: &mut Qmp, mut gone: Pin<&mut impl Future<Output = ()>>) -> Left {
        if let Err(QmpError::Lost(e)) = self.settle(qmp).await {
            return Left::Lost(e);
        }
        let mut stale = true;
        loop {
            if let Some(request) = self.pending.take() {
                match self.fulfil(qmp, request).await {
                    Ok(()) => stale = false,
                    Err(e) => return Left::Lost(e),
                }
            }
            if qmp.take_event_pending() || stale {
                stale = false;
                if let Err(QmpError::Lost(e)) = self.refresh(qmp).await {
                    return Left::Lost(e);
                }
            }
            tokio::select! {
                biased;
                () = gone.as_mut() => return Left::ProcessGone,
                request = self.inbox.recv() => match request {
                    Some(request) => self.pending = Some(request),
                    None => return Left::MachineDropped,
                },
                event = qmp.event() => match event {
                    Ok(_) => stale = true,
                    Err(QmpError::Lost(e)) => return Left::Lost(e),
                    Err(e) => tracing::warn!(error = %e, "while waiting for events"),
                },
            }
        }
    }

    /// Whoever began a migration that is under way on a new connection has gone, and with it the other
    /// end of the stream. A machine that waits for its state has none.
    async fn settle(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        let state = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await?;
        if state.status == "inmigrate" {
            return Ok(());
        }
        let settled = migration::settle(qmp).await;
        if let Err(e) = &settled {
            tracing::warn!(pid = self.process.id().pid, error = %e, "cannot end an earlier migration");
        }
        settled
    }

    /// Answers the request; fails when the connection breaks. Also after a refusal or a timeout the status
    /// is asked: the command may have had an effect.
    async fn fulfil(&mut self, qmp: &mut Qmp, request: Request) -> io::Result<()> {
        match request {
            Request::Wish { wish, answer } if !answer.is_closed() => {
                self.grant(qmp, wish, answer).await
            }
            Request::Save { mut answer } if !answer.is_closed() => {
                let saved = migration::save(qmp, answer.closed()).await;
                self.conclude(qmp, saved, answer).await
            }
            Request::Load { state, mut answer } if !answer.is_closed() => {
                let loaded = migration::load(qmp, &state, answer.closed()).await;
                self.conclude(qmp, loaded, answer).await
            }
            Request::Wish { .. } | Request::Save { .. } | Request::Load { .. } => Ok(()),
        }
    }

    /// Keeps the wish for the next connection when this one breaks.
    async fn grant(
        &mut self,
        qmp: &mut Qmp,
        wish: Wish,
        answer: Answer<MachineStatus>,
    ) -> io::Result<()> {
        let done = match wish {
            Wish::Cont => qmp.execute(&Cont {}, COMMAND_DEADLINE).await.map(drop),
            Wish::Stop => qmp.execute(&Stop {}, COMMAND_DEADLINE).await.map(drop),
            Wish::Status => Ok(()),
        };
        let state = match &done {
            Err(QmpError::Lost(_)) => None,
            Ok(()) | Err(_) => Some(self.refresh(qmp).await),
        };
        let reply = match (done, state) {
            (Err(QmpError::Lost(e)), _) | (_, Some(Err(QmpError::Lost(e)))) => {
                self.pending = Some(Request::Wish { wish, answer });
                return Err(e);
            }
            (Err(e), _) | (Ok(()), Some(Err(e))) => Err(for_caller(e)),
            (Ok(()), Some(Ok(status))) => Ok(status),
            (Ok(()), None) => Ok(*self.status.borrow()),
        };
        // The caller may have given up meanwhile; the watch tells it what happened.
        let _ = answer.send(reply);
        Ok(())
    }

    /// Tells how a migration ended, after the status. It is not repeated: it fails with the connection, or
    /// with the process if that is why.
    async fn conclude<T>(
        &mut self,
        qmp: &mut Qmp,
        outcome: Result<T, Failure>,
        answer: Answer<T>,
    ) -> io::Result<()> {
        let refreshed = match &outcome {
            Err(Failure::Qmp(QmpError::Lost(_))) => Ok(()),
            Ok(_) | Err(_) => self.refresh(qmp).await.map(drop),
        };
        let lost = match (outcome, refreshed) {
            (Err(Failure::Qmp(QmpError::Lost(e))), _) | (Ok(_), Err(QmpError::Lost(e))) => e,
            (Err(failure), refreshed) => {
                let _ = answer.send(Err(failure.for_caller()));
                return match refreshed {
                    Err(QmpError::Lost(e)) => Err(e),
                    Ok(()) | Err(_) => Ok(()),
                };
            }
            (Ok(_), Err(e)) => {
                let _ = answer.send(Err(for_caller(e)));
                return Ok(());
            }
            (Ok(done), Ok(())) => {
                let _ = answer.send(Ok(done));
                return Ok(());
            }
        };
        if let Ok(Ok(())) = timeout(END_DEADLINE, self.process.exited()).await {
            // An answer dropped means that the process ended, so this comes first.
            publish(&self.status, MachineStatus::Gone);
        } else {
            let copy = io::Error::new(lost.kind(), lost.to_string());
            let _ = answer.send(Err(for_caller(QmpError::Lost(copy))));
        }
        Err(lost)
    }

    async fn refresh(&self, qmp: &mut Qmp) -> Result<MachineStatus, QmpError> {
        let state = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await;
        if let Err(e) = &state {
            tracing::warn!(pid = self.process.id().pid, error = %e, "cannot ask the VMM's status");
        }
        let status = meaning(&state?);
        publish(&self.status, status);
        Ok(status)
    }
}

/// Resolves when the process is gone, whatever it takes to notice.
async fn until_gone(process: &ProcessHandle) {
    while let Err(e) = process.exited().await {
        // Out of descriptors, most likely; a later attempt may find one.
        tracing::error!(pid = process.id().pid, error = %e, "cannot watch the VMM process");
        sleep(Duration::from_secs(1)).await;
    }
}
