//! A live QEMU process: one task owns the monitor connection, everyone else asks it or reads its
//! published status.
//!
//! ```text
//!   Machine::resume ──Request──> keeper task ──QMP──> qemu
//!          ^                       |   ^ events, end of file
//!          '------- answer --------'   '-- pidfd: process gone
//!                                  '--> watch<MachineStatus>
//! ```
//!
//! Invariants
//! - The status is what QEMU answers to `query-status`, asked after every event and after every command,
//!   *before* the command's caller hears of it: the watch never lags behind a call that returned.
//! - `Gone` comes from the pidfd alone, and nothing is published after it.
//! - A lost connection means nothing by itself: either the process ends, or we connect again and
//!   repeat the request. `cont` and `stop` may be repeated: they name the state wanted.
//! - Dropping the machine ends the task and closes the connection, so that the next one to attach is served.
use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use doze_host::process::{ProcessHandle, ProcessId};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    log,
    qmp::{Cont, Qmp, QmpError, QueryStatus, RunState, Stop},
};
use crate::{Machine, MachineStatus, VmmError};

/// For one exchange with a VMM that lives. `stop` flushes the disks first, which takes as long as the
/// host's disk needs.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// For the process to be gone after SIGKILL (the contract's number).
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Between attempts to connect to a socket that is not there (yet).
const RETRY_FIRST: Duration = Duration::from_millis(2);
const RETRY_MOST: Duration = Duration::from_millis(100);

/// What the keeper is asked to do.
#[derive(Debug, Clone, Copy)]
enum Wish {
    Cont,
    Stop,
    Status,
}

impl Wish {
    fn name(self) -> &'static str {
        match self {
            Self::Cont => "cont",
            Self::Stop => "stop",
            Self::Status => "query-status",
        }
    }
}

#[derive(Debug)]
struct Request {
    wish: Wish,
    /// Closed when the caller gave up: then the wish is dropped.
    answer: oneshot::Sender<Result<MachineStatus, VmmError>>,
}

/// Where the files of a machine are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub qmp_socket: PathBuf,
    pub agent_socket: PathBuf,
    pub vmm_log: PathBuf,
}

#[derive(Debug)]
pub(super) struct QemuMachine {
    process: Arc<ProcessHandle>,
    places: Places,
    /// Where this process's words begin in the log.
    log_start: u64,
    status: Arc<watch::Sender<MachineStatus>>,
    requests: mpsc::Sender<Request>,
    _keeper: AbortOnDropHandle<()>,
}

/// Connects to a process and learns its first status. `Ok(None)` when the process is gone.
pub(super) async fn take_up(
    process: Arc<ProcessHandle>,
    places: Places,
    log_start: u64,
    deadline: Duration,
    during: &'static str,
) -> Result<Option<QemuMachine>, VmmError> {
    let first = async {
        let mut qmp = connect(&places.qmp_socket, process.id()).await?;
        let state = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await;
        Ok::<_, VmmError>((qmp, meaning(&state.map_err(for_caller)?)))
    };
    let (qmp, status) = tokio::select! {
        // A process that ends is the better explanation for whatever the connection reports.
        biased;
        gone = process.exited() => {
            gone.map_err(cannot_watch)?;
            return Ok(None);
        }
        first = timeout(deadline, first) => match first {
            Ok(Ok(first)) => first,
            Ok(Err(e)) => return ended_or(&process, e).await,
            Err(_) => return Err(VmmError::Timeout { command: during, seconds: deadline.as_secs() }),
        },
    };
    let status = Arc::new(watch::Sender::new(status));
    let (requests, inbox) = mpsc::channel(1);
    let keeper = Keeper {
        process: process.clone(),
        qmp_socket: places.qmp_socket.clone(),
        status: status.clone(),
        inbox,
        pending: None,
    };
    Ok(Some(QemuMachine {
        process,
        places,
        log_start,
        status,
        requests,
        _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run(qmp))),
    }))
}

/// A connection may break a moment before the process that held it counts as gone.
async fn ended_or(
    process: &ProcessHandle,
    error: VmmError,
) -> Result<Option<QemuMachine>, VmmError> {
    match timeout(Duration::from_secs(1), process.exited()).await {
        Ok(Ok(())) => Ok(None),
        Ok(Err(e)) => Err(cannot_watch(e)),
        Err(_) => Err(error),
    }
}

fn cannot_watch(source: io::Error) -> VmmError {
    VmmError::Io {
        context: "cannot watch the VMM process".to_owned(),
        source,
    }
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
async fn connect(path: &Path, id: &ProcessId) -> Result<Qmp, VmmError> {
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
fn meaning(state: &RunState) -> MachineStatus {
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

fn for_caller(error: QmpError) -> VmmError {
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

/// `Gone` is final.
fn publish(status: &watch::Sender<MachineStatus>, new: MachineStatus) {
    status.send_if_modified(|now| {
        let changes = *now != new && *now != MachineStatus::Gone;
        if changes {
            *now = new;
        }
        changes
    });
}

/// The one that talks to QEMU.
struct Keeper {
    process: Arc<ProcessHandle>,
    qmp_socket: PathBuf,
    status: Arc<watch::Sender<MachineStatus>>,
    inbox: mpsc::Receiver<Request>,
    /// Taken from the inbox, not yet answered.
    pending: Option<Request>,
}

/// Why a connection was left.
enum Left {
    Lost(io::Error),
    ProcessGone,
    MachineDropped,
}

impl Keeper {
    async fn run(mut self, mut qmp: Qmp) {
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

    /// Answers the request, or keeps it for the next connection when this one breaks.
    async fn fulfil(&mut self, qmp: &mut Qmp, request: Request) -> io::Result<()> {
        if request.answer.is_closed() {
            return Ok(());
        }
        let done = match request.wish {
            Wish::Cont => qmp.execute(&Cont {}, COMMAND_DEADLINE).await.map(drop),
            Wish::Stop => qmp.execute(&Stop {}, COMMAND_DEADLINE).await.map(drop),
            Wish::Status => Ok(()),
        };
        // Also after a refusal or a timeout: the command may have had an effect.
        let state = match &done {
            Err(QmpError::Lost(_)) => None,
            Ok(()) | Err(_) => Some(self.refresh(qmp).await),
        };
        let answer = match (done, state) {
            (Err(QmpError::Lost(e)), _) | (_, Some(Err(QmpError::Lost(e)))) => {
                self.pending = Some(request);
                return Err(e);
            }
            (Err(e), _) | (Ok(()), Some(Err(e))) => Err(for_caller(e)),
            (Ok(()), Some(Ok(status))) => Ok(status),
            (Ok(()), None) => Ok(*self.status.borrow()),
        };
        // The caller may have given up meanwhile; the watch tells it what happened.
        let _ = request.answer.send(answer);
        Ok(())
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

impl QemuMachine {
    async fn ask(&self, wish: Wish) -> Result<MachineStatus, VmmError> {
        let (answer, heard) = oneshot::channel();
        let exchange = async {
            // Both fail only when the keeper ended, and it ends with the process.
            self.requests.send(Request { wish, answer }).await.ok()?;
            heard.await.ok()
        };
        // Twice: a request in front of ours has a deadline of its own.
        match timeout(2 * COMMAND_DEADLINE, exchange).await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(self.exited(wish.name())),
            Err(_) => Err(VmmError::Timeout {
                command: wish.name(),
                seconds: 2 * COMMAND_DEADLINE.as_secs(),
            }),
        }
    }

    fn exited(&self, during: &'static str) -> VmmError {
        VmmError::Exited {
            during,
            log: log::tail(&self.places.vmm_log, self.log_start),
        }
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn process(&self) -> &ProcessId {
        self.process.id()
    }

    fn agent_socket(&self) -> &Path {
        &self.places.agent_socket
    }

    fn watch(&self) -> watch::Receiver<MachineStatus> {
        self.status.subscribe()
    }

    async fn status(&self) -> Result<MachineStatus, VmmError> {
        match self.ask(Wish::Status).await {
            Err(VmmError::Exited { .. }) => Ok(MachineStatus::Gone),
            other => other,
        }
    }

    async fn resume(&self) -> Result<(), VmmError> {
        // The guest may have powered off by the time of the answer: it was resumed all the same.
        self.ask(Wish::Cont).await.map(drop)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        match self.ask(Wish::Stop).await? {
            MachineStatus::Paused | MachineStatus::Prelaunch => Ok(()),
            // QEMU acknowledges `stop` in any state.
            other => Err(VmmError::Refused {
                command: "stop",
                message: format!("the machine cannot be paused, it is {other:?}"),
            }),
        }
    }

    async fn kill(&self) -> Result<(), VmmError> {
        end(&self.process).await?;
        publish(&self.status, MachineStatus::Gone);
        Ok(())
    }
}

/// SIGKILL, then waits until the process is gone.
pub(super) async fn end(process: &ProcessHandle) -> Result<(), VmmError> {
    process.kill().map_err(|source| VmmError::Io {
        context: format!("cannot kill the VMM process {}", process.id().pid),
        source,
    })?;
    timeout(KILL_DEADLINE, process.exited())
        .await
        .map_err(|_| VmmError::Timeout {
            command: "kill",
            seconds: KILL_DEADLINE.as_secs(),
        })?
        .map_err(cannot_watch)
}

#[cfg(test)]
mod tests;
