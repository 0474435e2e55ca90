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
//! This side of the picture is here, the task in `keeper`.
//!
//! Invariants
//! - The status is what QEMU answers to `query-status`, asked after every event and after every command,
//!   *before* the command's caller hears of it: the watch never lags behind a call that returned.
//! - `Gone` comes from the pidfd alone, and nothing is published after it.
//! - A lost connection means nothing by itself: either the process ends, or we connect again and
//!   repeat the request. `cont` and `stop` may be repeated: they name the state wanted. A save or a load is
//!   not: it fails.
//! - No command is sent while a migration that nobody waits for is under way: the task ends one that its
//!   caller gave up, and one it finds on a new connection (an earlier server's, or its own), before all else.
//! - Dropping the machine ends the task and closes the connection, so that the next one to attach is served.
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use doze_host::process::{ProcessHandle, ProcessId};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::{log, migration, qmp::QueryStatus, state_file};
use crate::{Machine, MachineStatus, SavedFile, VmmError};

mod keeper;
use keeper::{Answer, Keeper, Request, Wish, connect, for_caller, meaning, publish};

/// For one exchange with a VMM that lives. `stop` flushes the disks first, which takes as long as the
/// host's disk needs.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// For a save or a load as its caller sees it: the migration, and ending one that did not end by itself.
const MIGRATION_DEADLINE: Duration = migration::DEADLINE.saturating_add(COMMAND_DEADLINE);

/// For the process to be gone after SIGKILL (the contract's number).
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A connection may break this long before the process that held it counts as gone.
const END_DEADLINE: Duration = Duration::from_secs(1);

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
    version: String,
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
        version: qmp.version().to_owned(),
        places,
        log_start,
        status,
        requests,
        _keeper: AbortOnDropHandle::new(tokio::spawn(keeper.run(qmp))),
    }))
}

async fn ended_or(
    process: &ProcessHandle,
    error: VmmError,
) -> Result<Option<QemuMachine>, VmmError> {
    match timeout(END_DEADLINE, process.exited()).await {
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

impl QemuMachine {
    async fn wish(&self, wish: Wish) -> Result<MachineStatus, VmmError> {
        let request = |answer| Request::Wish { wish, answer };
        self.ask(wish.name(), COMMAND_DEADLINE, request).await
    }

    async fn ask<T>(
        &self,
        command: &'static str,
        deadline: Duration,
        request: impl FnOnce(Answer<T>) -> Request,
    ) -> Result<T, VmmError> {
        let (answer, heard) = oneshot::channel();
        let exchange = async {
            // Both fail only when the keeper ended, and it ends with the process.
            self.requests.send(request(answer)).await.ok()?;
            heard.await.ok()
        };
        // A request in front of ours, given up by its caller, has a deadline of its own.
        let deadline = deadline + COMMAND_DEADLINE;
        match timeout(deadline, exchange).await {
            Ok(Some(answer)) => answer,
            Ok(None) => Err(self.exited(command)),
            Err(_) => Err(VmmError::Timeout {
                command,
                seconds: deadline.as_secs(),
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

    fn version(&self) -> &str {
        &self.version
    }

    fn agent_socket(&self) -> &Path {
        &self.places.agent_socket
    }

    fn watch(&self) -> watch::Receiver<MachineStatus> {
        self.status.subscribe()
    }

    async fn status(&self) -> Result<MachineStatus, VmmError> {
        match self.wish(Wish::Status).await {
            Err(VmmError::Exited { .. }) => Ok(MachineStatus::Gone),
            other => other,
        }
    }

    async fn resume(&self) -> Result<(), VmmError> {
        // The guest may have powered off by the time of the answer: it was resumed all the same.
        self.wish(Wish::Cont).await.map(drop)
    }

    async fn pause(&self) -> Result<(), VmmError> {
        match self.wish(Wish::Stop).await? {
            MachineStatus::Paused | MachineStatus::Prelaunch => Ok(()),
            // QEMU acknowledges `stop` in any state.
            other => Err(VmmError::Refused {
                command: "stop",
                message: format!("the machine cannot be paused, it is {other:?}"),
            }),
        }
    }

    async fn save(&self, folder: &Path) -> Result<Vec<SavedFile>, VmmError> {
        let request = |answer| Request::Save { answer };
        let state = self.ask("save", MIGRATION_DEADLINE, request).await?;
        let folder = folder.to_owned();
        let written = blocking(move || state_file::write(&folder, &state)).await?;
        Ok(vec![written])
    }

    async fn load(&self, folder: &Path) -> Result<(), VmmError> {
        let folder = folder.to_owned();
        let state = blocking(move || state_file::read(&folder)).await?;
        let request = |answer| Request::Load { state, answer };
        self.ask("load", MIGRATION_DEADLINE, request).await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        end(&self.process).await?;
        publish(&self.status, MachineStatus::Gone);
        Ok(())
    }
}

/// Runs what waits for a disk or for /proc where waiting is allowed.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmmError> + Send + 'static,
) -> Result<T, VmmError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| {
        Err(VmmError::Io {
            context: "a background thread ended early".to_owned(),
            source: io::Error::other(e),
        })
    })
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
