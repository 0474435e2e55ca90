//! The QEMU Machine Protocol: one JSON object per line over a unix socket (QEMU documentation,
//! "QEMU Machine Protocol Specification").
//!
//! ```text
//!   <- {"QMP": {"version": ..}}                   greeting
//!   -> {"execute": "qmp_capabilities", "id": 0}   leaves negotiation mode
//!   <- {"return": {}, "id": 0}
//!   -> {"execute": "cont", "id": 1}
//!   <- {"event": "RESUME", ..}                    events come at any moment, also before answers
//!   <- {"return": {}, "id": 1}
//! ```
//!
//! A client of our own rather than the crate `qapi` 0.15: its message type is an untagged enum over
//! the events it was generated with, so one unknown event ("data did not match any variant", tried)
//! is an error of the whole stream. An event of a newer QEMU must never cost us the machine. Here an
//! event is a name, and commands are typed one by one as they are needed.
//!
//! Invariants: answers are told apart by `id`, so the late answer to a command that was given up is
//! dropped, never taken for another's. Every wait has a deadline.
use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    time::Duration,
};

use futures::{SinkExt, StreamExt};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{io::Interest, net::UnixStream, time::timeout};
use tokio_util::codec::{Framed, LinesCodec, LinesCodecError};

/// Longest line taken from the VMM. The largest answer known (`query-qmp-schema`) has 200 KiB.
const MAX_LINE: usize = 4 << 20;

/// A command with the type of its answer; its own fields are the arguments.
pub(super) trait Command: Serialize {
    const NAME: &'static str;
    type Answer: DeserializeOwned;
}

/// Leaves negotiation mode. Needed once, before all else.
#[derive(Debug, Serialize)]
struct QmpCapabilities {}
impl Command for QmpCapabilities {
    const NAME: &'static str = "qmp_capabilities";
    type Answer = Empty;
}

/// Lets the CPUs run.
#[derive(Debug, Serialize)]
pub(super) struct Cont {}
impl Command for Cont {
    const NAME: &'static str = "cont";
    type Answer = Empty;
}

/// Stops the CPUs and flushes the disks.
#[derive(Debug, Serialize)]
pub(super) struct Stop {}
impl Command for Stop {
    const NAME: &'static str = "stop";
    type Answer = Empty;
}

#[derive(Debug, Serialize)]
pub(super) struct QueryStatus {}
impl Command for QueryStatus {
    const NAME: &'static str = "query-status";
    type Answer = RunState;
}

/// `StatusInfo` of qapi/run-state.json.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct RunState {
    pub status: String,
    pub running: bool,
}

/// Whatever an answer without content holds.
#[derive(Debug, Deserialize)]
pub(super) struct Empty {}

#[derive(Debug, thiserror::Error)]
pub(super) enum QmpError {
    /// The connection is over; whether the command took effect is unknown.
    #[error("the connection to the VMM was lost")]
    Lost(#[source] io::Error),
    #[error("{command}: the VMM answered: {message}")]
    Refused {
        command: &'static str,
        message: String,
    },
    #[error("{command}: no answer within {} s", deadline.as_secs())]
    Timeout {
        command: &'static str,
        deadline: Duration,
    },
}

/// One line from the VMM. Fields we do not know are ignored.
#[derive(Debug, Default, Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    data: Option<Value>,
    id: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

/// An event's name; the state behind it is asked for, not guessed from the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Event(pub String);

/// A negotiated connection.
#[derive(Debug)]
pub(super) struct Qmp {
    lines: Framed<UnixStream, LinesCodec>,
    next_id: u64,
    version: String,
    event_pending: bool,
}

impl Qmp {
    /// Version of the process at the other end, for example `7.2.22`; empty when it did not say.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Takes over a fresh connection: waits for the greeting, then negotiates.
    ///
    /// QEMU serves one client at a time and leaves the next in the backlog, without a greeting,
    /// until the first has gone: then this ends in [`QmpError::Timeout`].
    pub async fn negotiate(stream: UnixStream, deadline: Duration) -> Result<Self, QmpError> {
        let mut qmp = Self {
            lines: Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE)),
            next_id: 0,
            version: String::new(),
            event_pending: false,
        };
        timeout(deadline, qmp.greeting())
            .await
            .map_err(|_| QmpError::Timeout {
                command: "greeting",
                deadline,
            })??;
        qmp.execute(&QmpCapabilities {}, deadline).await?;
        Ok(qmp)
    }

    /// Connects to the socket at `path` and negotiates. A refused connection is `Lost`.
    pub async fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).await.map_err(QmpError::Lost)?;
        Self::negotiate(stream, deadline).await
    }

    /// The process that listens at the other end, as the kernel recorded it.
    pub fn peer_pid(&self) -> io::Result<Option<i32>> {
        Ok(self.lines.get_ref().peer_cred()?.pid())
    }

    async fn greeting(&mut self) -> Result<(), QmpError> {
        loop {
            if let Some(greeting) = self.message().await?.greeting {
                self.version = version(&greeting);
                return Ok(());
            }
        }
    }

    /// Sends one command and waits for its answer. Events that come meanwhile are kept in mind:
    /// see [`Qmp::take_event_pending`]. Not cancel-safe as to whether the command takes effect.
    pub async fn execute<C: Command>(
        &mut self,
        command: &C,
        deadline: Duration,
    ) -> Result<C::Answer, QmpError> {
        timeout(deadline, self.exchange(command, None))
            .await
            .map_err(|_| QmpError::Timeout {
                command: C::NAME,
                deadline,
            })?
    }

    /// As [`Qmp::execute`], with a descriptor for QEMU to keep (SCM_RIGHTS of unix(7)).
    pub async fn execute_with<C: Command>(
        &mut self,
        command: &C,
        descriptor: impl AsFd,
        deadline: Duration,
    ) -> Result<C::Answer, QmpError> {
        timeout(deadline, self.exchange(command, Some(descriptor.as_fd())))
            .await
            .map_err(|_| QmpError::Timeout {
                command: C::NAME,
                deadline,
            })?
    }

    async fn exchange<C: Command>(
        &mut self,
        command: &C,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<C::Answer, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let malformed = |e: serde_json::Error| QmpError::Refused {
            command: C::NAME,
            message: format!("not understood: {e}"),
        };
        let arguments = serde_json::to_value(command).map_err(malformed)?;
        let line =
            serde_json::json!({ "execute": C::NAME, "arguments": arguments, "id": id }).to_string();
        match descriptor {
            None => self.lines.send(line).await.map_err(lost)?,
            Some(descriptor) => self.send_with(line, descriptor).await?,
        }
        loop {
            let message = self.message().await?;
            if message.event.is_some() {
                self.event_pending = true;
            } else if message.id.as_ref().and_then(Value::as_u64) != Some(id) {
                tracing::debug!(command = C::NAME, ?message, "answer to a command given up");
            } else if let Some(refusal) = message.error {
                return Err(QmpError::Refused {
                    command: C::NAME,
                    message: refusal.desc,
                });
            } else {
                return serde_json::from_value(message.answer.unwrap_or(Value::Null))
                    .map_err(malformed);
            }
        }
    }

    /// The descriptor travels with the first bytes of the line, and QEMU takes the last one that came. What
    /// the socket does not take at once goes through the buffer, so that a line given up half way
    /// is still completed before the next.
    async fn send_with(
        &mut self,
        mut line: String,
        descriptor: BorrowedFd<'_>,
    ) -> Result<(), QmpError> {
        line.push('\n');
        SinkExt::<&str>::flush(&mut self.lines)
            .await
            .map_err(lost)?;
        let stream = self.lines.get_ref();
        let sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let descriptors = [descriptor];
                let mut rights = SendAncillaryBuffer::new(&mut space);
                if !rights.push(SendAncillaryMessage::ScmRights(&descriptors)) {
                    return Err(io::Error::other("no room for a descriptor"));
                }
                let bytes = [IoSlice::new(line.as_bytes())];
                Ok(sendmsg(stream, &bytes, &mut rights, SendFlags::NOSIGNAL)?)
            })
            .await
            .map_err(QmpError::Lost)?;
        let rest = &line.as_bytes()[sent.min(line.len())..];
        self.lines.write_buffer_mut().extend_from_slice(rest);
        SinkExt::<&str>::flush(&mut self.lines).await.map_err(lost)
    }

    /// Whether an event came while a command was under way; forgets it.
    pub fn take_event_pending(&mut self) -> bool {
        std::mem::take(&mut self.event_pending)
    }

    /// The next event. Cancel-safe.
    pub async fn event(&mut self) -> Result<Event, QmpError> {
        loop {
            if let Some(name) = self.message().await?.event {
                return Ok(Event(name));
            }
        }
    }

    /// The next line that is a message. Cancel-safe: a half-read line stays in the buffer.
    async fn message(&mut self) -> Result<Message, QmpError> {
        loop {
            let line = match self.lines.next().await {
                Some(line) => line.map_err(lost)?,
                None => return Err(QmpError::Lost(io::ErrorKind::UnexpectedEof.into())),
            };
            match serde_json::from_str::<Message>(&line) {
                Ok(message) => {
                    if let Some(event) = &message.event {
                        tracing::debug!(event, data = ?message.data, "event of the VMM");
                    }
                    return Ok(message);
                }
                Err(e) => {
                    tracing::warn!(error = %e, line, "the VMM sent a line that is no message")
                }
            }
        }
    }
}

/// `VersionInfo` of qapi/control.json.
fn version(greeting: &Value) -> String {
    let part = |name| greeting["version"]["qemu"][name].as_u64();
    match (part("major"), part("minor"), part("micro")) {
        (Some(major), Some(minor), Some(micro)) => format!("{major}.{minor}.{micro}"),
        _ => String::new(),
    }
}

fn lost(error: LinesCodecError) -> QmpError {
    QmpError::Lost(match error {
        LinesCodecError::Io(e) => e,
        LinesCodecError::MaxLineLengthExceeded => io::Error::new(
            io::ErrorKind::InvalidData,
            format!("the VMM sent a line longer than {MAX_LINE} bytes"),
        ),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// The other end: sends `greeting`, then answers each request with the lines `reply` makes
    /// of it (`ID` stands for the request's id).
    async fn vmm(stream: UnixStream, greeting: &str, reply: impl Fn(&str) -> Vec<&'static str>) {
        let (read, mut write) = stream.into_split();
        write.write_all(greeting.as_bytes()).await.unwrap();
        let mut lines = BufReader::new(read).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let request: Value = serde_json::from_str(&line).unwrap();
            for answer in reply(request["execute"].as_str().unwrap()) {
                let answer = answer.replace("ID", &request["id"].to_string()) + "\r\n";
                if write.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    }

    const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}}, \"capabilities\": [\"oob\"]}}\r\n";
    const DONE: &str = r#"{"return": {}, "id": ID}"#;

    async fn connect(reply: impl Fn(&str) -> Vec<&'static str> + Send + 'static) -> Qmp {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(vmm(theirs, GREETING, move |command| {
            if command == "qmp_capabilities" {
                vec![DONE]
            } else {
                reply(command)
            }
        }));
        Qmp::negotiate(ours, DEADLINE).await.unwrap()
    }

    #[tokio::test]
    async fn unknown_events_garbage_and_stale_answers_do_not_disturb_a_command() {
        let mut qmp = connect(|_| {
            vec![
                r#"{"event": "INVENTED_IN_2040", "data": {"x": [1, {}]}, "timestamp": {}}"#,
                "this is not json",
                r#"{"return": {"status": "paused", "running": false}, "id": 4711}"#,
                r#"{"return": {"status": "paused", "running": false}}"#,
                r#"{"return": {"status": "running", "running": true, "new": 1}, "id": ID}"#,
            ]
        })
        .await;
        let state = qmp.execute(&QueryStatus {}, DEADLINE).await.unwrap();
        assert_eq!((state.status.as_str(), state.running), ("running", true));
        assert_eq!(qmp.version(), "7.2.22");
        assert!(qmp.take_event_pending());
        assert!(!qmp.take_event_pending());
    }

    #[tokio::test]
    async fn a_refusal_names_the_command_and_the_connection_goes_on() {
        let mut qmp = connect(|command| match command {
            "cont" => vec![
                r#"{"error": {"class": "GenericError", "desc": "Resetting required"}, "id": ID}"#,
            ],
            _ => vec![DONE, r#"{"event": "STOP"}"#],
        })
        .await;
        let refused = qmp.execute(&Cont {}, DEADLINE).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            "cont: the VMM answered: Resetting required"
        );
        qmp.execute(&Stop {}, DEADLINE).await.unwrap();
        assert_eq!(qmp.event().await.unwrap(), Event("STOP".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_at_the_deadline() {
        let mut qmp = connect(|_| vec![]).await;
        let e = qmp.execute(&Stop {}, DEADLINE).await.unwrap_err();
        assert_eq!(e.to_string(), "stop: no answer within 20 s");

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let e = Qmp::negotiate(ours, DEADLINE).await.unwrap_err();
        assert!(matches!(
            e,
            QmpError::Timeout {
                command: "greeting",
                ..
            }
        ));
    }

    #[tokio::test]
    async fn a_closed_or_flooding_peer_is_lost() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let e = Qmp::negotiate(ours, DEADLINE).await.unwrap_err();
        assert!(matches!(e, QmpError::Lost(_)), "{e}");

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let flood = vec![b'x'; MAX_LINE + 1];
            let _ = theirs.write_all(&flood).await;
        });
        let e = Qmp::negotiate(ours, DEADLINE).await.unwrap_err();
        assert!(matches!(e, QmpError::Lost(_)), "{e}");
    }
}
