//! Device state out of a paused QEMU and back into a new one, by its own migration.
//!
//! ```text
//!   save   we: socketpair ── getfd (one end by SCM_RIGHTS) ── migrate fd: ──> QEMU writes, we read to the end
//!   load   we: socketpair ── getfd ── migrate-incoming fd: ── we write ─────> QEMU reads to the end
//! ```
//!
//! Guest memory is not in the stream: with `x-ignore-shared` QEMU leaves out what is mapped shared from a file.
//! The stream goes over a descriptor of ours, so that QEMU needs neither a path nor a permission: it runs as
//! another user, and may not start programs.
//!
//! Facts of QEMU's migration/migration.c, tried on 7.2:
//! - What `query-migrate` says is the truth; the `MIGRATION` event (capability `events`) is when to ask again.
//! - The thread that writes the state may take the main loop's lock before the loop has answered `migrate`. A state that
//!   the socket does not hold (q35's) must be read by then, or both wait for each other.
//! - QEMU closes its end of an outgoing stream last, after the run state became `postmigrate`. So
//!   the end of the stream *and* `completed` mean that the machine may be resumed.
//! - From `postmigrate` it may be resumed, but not saved again.
//! - A stream that it cannot load ends the process. It does not look at the end of a stream, which describes the
//!   devices for people: only a checksum finds that cut off.
use std::{io, os::unix::net::UnixStream as StdUnixStream, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{sleep, timeout},
};

use super::qmp::{Command, Empty, Qmp, QmpError, QueryStatus, RunState};

/// Bytes of device state that we hold in memory. It has about 73 KB on microvm and 490 KB on q35, most of it firmware;
/// guest memory that came into the stream by mistake shows here.
pub(super) const MAX_STATE: u64 = 64 << 20;

/// For a whole save or load, which take milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// For one command, and for a migration given up to end.
const COMMAND_DEADLINE: Duration = Duration::from_secs(30);

/// Between looks at a state that no event announces.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The descriptor's name in QEMU; the next of the same name replaces it.
const DESCRIPTOR: &str = "doze-state";
const URI: &str = "fd:doze-state";

/// Bytes a second. By default QEMU sends 128 MiB/s (32 MiB/s before 6.0).
const BANDWIDTH: u64 = 1 << 40;

#[derive(Debug, Serialize)]
struct MigrateSetCapabilities {
    capabilities: [Capability; 2],
}
impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Answer = Empty;
}

#[derive(Debug, Serialize)]
struct Capability {
    capability: &'static str,
    state: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct MigrateSetParameters {
    max_bandwidth: u64,
}
impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Answer = Empty;
}

/// Gives the descriptor that comes with it a name.
#[derive(Debug, Serialize)]
struct GetFd {
    fdname: &'static str,
}
impl Command for GetFd {
    const NAME: &'static str = "getfd";
    type Answer = Empty;
}

/// Answers at once; the migration goes on behind it.
#[derive(Debug, Serialize)]
struct Migrate {
    uri: &'static str,
}
impl Command for Migrate {
    const NAME: &'static str = "migrate";
    type Answer = Empty;
}

#[derive(Debug, Serialize)]
struct MigrateIncoming {
    uri: &'static str,
}
impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Answer = Empty;
}

/// Does nothing when there is nothing to cancel.
#[derive(Debug, Serialize)]
struct MigrateCancel {}
impl Command for MigrateCancel {
    const NAME: &'static str = "migrate_cancel";
    type Answer = Empty;
}

#[derive(Debug, Serialize)]
struct QueryMigrate {}
impl Command for QueryMigrate {
    const NAME: &'static str = "query-migrate";
    type Answer = Progress;
}

/// `MigrationInfo` of qapi/migration.json; empty when there never was a migration.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Progress {
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    error_desc: Option<String>,
}

/// `MigrationStatus`, as far as it matters whether to wait.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    Never,
    UnderWay,
    Completed,
    Ended,
}

impl Progress {
    fn stage(&self) -> Stage {
        match self.status.as_deref() {
            None | Some("none") => Stage::Never,
            Some("completed") => Stage::Completed,
            Some("failed" | "cancelled") => Stage::Ended,
            Some(_) => Stage::UnderWay,
        }
    }
}

/// Why there is no state, or none was loaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The caller went away.
    #[error("given up")]
    GivenUp,
    #[error("{context}")]
    Io {
        context: &'static str,
        #[source]
        source: io::Error,
    },
}

fn refused(command: &'static str, message: String) -> Failure {
    Failure::Qmp(QmpError::Refused { command, message })
}

/// The device state of the paused machine. Whatever this returns (a lost connection excepted), no migration is
/// under way afterwards, and `cont` works.
pub(super) async fn save(
    qmp: &mut Qmp,
    given_up: impl Future<Output = ()>,
) -> Result<Vec<u8>, Failure> {
    let state = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await?;
    check_saveable(&state)?;
    let outcome = tokio::select! {
        () = given_up => Err(Failure::GivenUp),
        outcome = timeout(DEADLINE, capture(qmp)) => outcome.unwrap_or(Err(Failure::Qmp(QmpError::Timeout {
            command: "migrate",
            deadline: DEADLINE,
        }))),
    };
    match outcome {
        Err(Failure::Qmp(QmpError::Lost(e))) => Err(QmpError::Lost(e).into()),
        Err(failure) => {
            settle(qmp).await?;
            Err(failure)
        }
        Ok(state) => Ok(state),
    }
}

fn check_saveable(state: &RunState) -> Result<(), Failure> {
    match state.status.as_str() {
        "paused" => Ok(()),
        "postmigrate" => Err(refused(
            "migrate",
            "the machine has not run since it was last saved; resume it and pause it before saving it again"
                .to_owned(),
        )),
        other => Err(refused(
            "migrate",
            format!("the machine is {other:?}, only one that is paused can be saved"),
        )),
    }
}

async fn capture(qmp: &mut Qmp) -> Result<Vec<u8>, Failure> {
    prepare(qmp).await?;
    let bandwidth = MigrateSetParameters {
        max_bandwidth: BANDWIDTH,
    };
    qmp.execute(&bandwidth, COMMAND_DEADLINE).await?;
    let stream = hand_over(qmp).await?;
    let migrate = async {
        qmp.execute(&Migrate { uri: URI }, COMMAND_DEADLINE).await?;
        completed(qmp).await
    };
    // Read from the first moment: the answer to `migrate` may come after the state. And one ends without the other
    // when it fails; both are needed.
    let ((), state) = tokio::try_join!(migrate, read_all(stream))?;
    Ok(state)
}

async fn read_all(stream: UnixStream) -> Result<Vec<u8>, Failure> {
    let mut state = Vec::with_capacity(512 << 10);
    stream
        .take(MAX_STATE + 1)
        .read_to_end(&mut state)
        .await
        .map_err(|source| Failure::Io {
            context: "cannot read the device state from the VMM",
            source,
        })?;
    if state.len() as u64 > MAX_STATE {
        return Err(refused(
            "migrate",
            format!(
                "the device state has more than {MAX_STATE} bytes; guest memory must not be in it"
            ),
        ));
    }
    Ok(state)
}

async fn completed(qmp: &mut Qmp) -> Result<(), Failure> {
    loop {
        let progress = qmp.execute(&QueryMigrate {}, COMMAND_DEADLINE).await?;
        match progress.stage() {
            Stage::Completed => return Ok(()),
            Stage::Ended => return Err(refused("migrate", reason(progress))),
            // `migrate` was acknowledged, so there is one.
            Stage::Never | Stage::UnderWay => next_event(qmp).await?,
        }
    }
}

fn reason(progress: Progress) -> String {
    match (progress.status, progress.error_desc) {
        (_, Some(words)) => words,
        (Some(status), None) => format!("the migration is {status}, without a reason given"),
        (None, None) => "the migration ended without a reason given".to_owned(),
    }
}

/// Ends a migration that is under way, if there is one, and waits until the machine may be resumed.
pub(super) async fn settle(qmp: &mut Qmp) -> Result<(), QmpError> {
    let settled = async {
        loop {
            let progress = qmp.execute(&QueryMigrate {}, COMMAND_DEADLINE).await?;
            if progress.stage() != Stage::UnderWay {
                break;
            }
            qmp.execute(&MigrateCancel {}, COMMAND_DEADLINE).await?;
            // `cancelling` may be over before the event of it is noticed, and not every version has the events on.
            let again = timeout(LOOK_AGAIN, next_event(qmp)).await;
            again.unwrap_or(Ok(()))?;
        }
        // A migration that failed leaves this state a moment after it said so, and announces nothing.
        while qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await?.status == "finish-migrate" {
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    };
    timeout(COMMAND_DEADLINE, settled)
        .await
        .unwrap_or(Err(QmpError::Timeout {
            command: "migrate_cancel",
            deadline: COMMAND_DEADLINE,
        }))
}

/// Has the waiting QEMU load this state; afterwards the machine is paused. After an error the process is of no use.
pub(super) async fn load(
    qmp: &mut Qmp,
    state: &[u8],
    given_up: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let now = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await?;
    if now.status != "inmigrate" {
        return Err(refused(
            "migrate-incoming",
            format!(
                "the machine is {:?}, it does not wait for a saved state",
                now.status
            ),
        ));
    }
    tokio::select! {
        () = given_up => Err(Failure::GivenUp),
        outcome = timeout(DEADLINE, restore(qmp, state)) => outcome.unwrap_or(Err(Failure::Qmp(QmpError::Timeout {
            command: "migrate-incoming",
            deadline: DEADLINE,
        }))),
    }
}

async fn restore(qmp: &mut Qmp, state: &[u8]) -> Result<(), Failure> {
    prepare(qmp).await?;
    let stream = hand_over(qmp).await?;
    qmp.execute(&MigrateIncoming { uri: URI }, COMMAND_DEADLINE)
        .await?;
    // QEMU may refuse what it read so far and close: what it says about that matters more than our broken pipe.
    let (written, loaded) = tokio::join!(write_all(stream, state), loaded(qmp));
    loaded?;
    written.map_err(|source| Failure::Io {
        context: "the VMM did not take the whole device state",
        source,
    })
}

async fn write_all(mut stream: UnixStream, state: &[u8]) -> io::Result<()> {
    stream.write_all(state).await?;
    // The end, for a stream that promises more than it has.
    stream.shutdown().await
}

async fn loaded(qmp: &mut Qmp) -> Result<(), Failure> {
    loop {
        let now = qmp.execute(&QueryStatus {}, COMMAND_DEADLINE).await?;
        match now.status.as_str() {
            "paused" => return Ok(()),
            "inmigrate" => {}
            other => {
                return Err(refused(
                    "migrate-incoming",
                    format!("the loaded machine is {other:?}, expected is \"paused\""),
                ));
            }
        }
        let progress = qmp.execute(&QueryMigrate {}, COMMAND_DEADLINE).await?;
        if progress.stage() == Stage::Ended {
            return Err(refused("migrate-incoming", reason(progress)));
        }
        next_event(qmp).await?;
    }
}

/// Returns at once when an event came while a command was under way.
async fn next_event(qmp: &mut Qmp) -> Result<(), QmpError> {
    if !qmp.take_event_pending() {
        qmp.event().await?;
    }
    Ok(())
}

async fn prepare(qmp: &mut Qmp) -> Result<(), QmpError> {
    let capabilities = ["x-ignore-shared", "events"].map(|capability| Capability {
        capability,
        state: true,
    });
    let command = MigrateSetCapabilities { capabilities };
    qmp.execute(&command, COMMAND_DEADLINE).await.map(drop)
}

/// Gives QEMU one end of a connection; returns the other.
async fn hand_over(qmp: &mut Qmp) -> Result<UnixStream, Failure> {
    let cannot = |source| Failure::Io {
        context: "cannot make a connection for the device state",
        source,
    };
    let (ours, theirs) = StdUnixStream::pair().map_err(cannot)?;
    ours.set_nonblocking(true).map_err(cannot)?;
    let ours = UnixStream::from_std(ours).map_err(cannot)?;
    let name = GetFd { fdname: DESCRIPTOR };
    qmp.execute_with(&name, theirs, COMMAND_DEADLINE).await?;
    Ok(ours)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{
        future,
        io::{IoSliceMut, Write},
        mem::MaybeUninit,
        os::fd::OwnedFd,
    };

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use serde_json::{Value, json};

    use super::*;

    const STATE: usize = 4 << 20;

    /// What came, and the descriptor that came with it.
    fn receive(stream: &StdUnixStream, bytes: &mut [u8]) -> (usize, Option<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(bytes)];
        let got = recvmsg(stream, &mut parts, &mut rights, RecvFlags::empty()).unwrap();
        let descriptor = rights.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        (got.bytes, descriptor)
    }

    /// A monitor that has written the state before it answers `migrate`.
    fn writes_first(mut stream: StdUnixStream) {
        stream
            .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")
            .unwrap();
        let (mut line, mut given) = (Vec::new(), None);
        loop {
            let mut bytes = [0; 4096];
            let (length, descriptor) = receive(&stream, &mut bytes);
            if length == 0 {
                return;
            }
            given = descriptor.or(given);
            line.extend_from_slice(&bytes[..length]);
            while let Some(end) = line.iter().position(|byte| *byte == b'\n') {
                let command: Value = serde_json::from_slice(&line[..end]).unwrap();
                line.drain(..=end);
                let answer = match command["execute"].as_str().unwrap() {
                    "query-status" => json!({"status": "paused", "running": false}),
                    "query-migrate" => json!({"status": "completed"}),
                    "migrate" => {
                        let mut out = StdUnixStream::from(given.take().unwrap());
                        out.write_all(&vec![7; STATE]).unwrap();
                        json!({})
                    }
                    _ => json!({}),
                };
                let answer = json!({"return": answer, "id": command["id"]});
                stream
                    .write_all(format!("{answer}\r\n").as_bytes())
                    .unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_state_that_comes_before_the_answer_is_read() {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        let vmm = std::thread::spawn(move || writes_first(theirs));
        ours.set_nonblocking(true).unwrap();
        let ours = UnixStream::from_std(ours).unwrap();
        let mut qmp = Qmp::negotiate(ours, DEADLINE).await.unwrap();
        let saved = timeout(Duration::from_secs(20), save(&mut qmp, future::pending()));
        let state = saved.await.unwrap().unwrap();
        assert_eq!(state, vec![7; STATE]);
        drop(qmp);
        vmm.join().unwrap();
    }
}
