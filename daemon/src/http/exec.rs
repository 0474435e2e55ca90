//! `GET /instances/{id}/exec`: a command in the guest over a WebSocket. Frames: [`doze_api::exec`].
//!
//! ```text
//!   upgrade ──> first frame ──> engine.exec ──> both pumps ──> last frame, close
//!      │            │               │             │  ├── input:  frames ──> ExecInput
//!   404 409     close 1008      close 1011        │  └── output: ExecSession ──> frames, pings
//!                                                 └── client gone: session dropped, command killed
//! ```
//!
//! What is wrong before the upgrade is an HTTP error; afterwards it is a close frame with a reason.
//! Each pump waits for the slower side, so neither a command that does not read nor a client that
//! does not read costs more than a short queue, which also keeps the input that comes while the guest
//! still boots.
//!
//! Pings only keep the way through proxies open and let the kernel notice a peer that is gone. A
//! missing pong ends nothing: a client that has stopped reading on purpose (a paused terminal)
//! cannot answer either.
use std::{future::Future, sync::Arc, time::Duration};

use axum::{
    extract::{
        State,
        ws::{
            CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code,
            rejection::WebSocketUpgradeRejection,
        },
    },
    response::Response,
};
use bytes::Bytes;
use doze_agent::{
    client::{ExecEvent, ExecInput, ExecSession},
    message::ExecRequest,
};
use doze_api::{EndOfInputFrame, ExecExit, ExecResize, MAX_FRAME, ResizeFrame};
use doze_lifecycle::{Admission, Command, admission};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};

use super::{
    AppState,
    errors::ApiError,
    extract::{QueryReader, Segment, parse_json},
};
use crate::convert;

/// A client that has a connection and says nothing is not left to hold it.
const FIRST_FRAME: Duration = Duration::from_secs(10);
const PING: Duration = Duration::from_secs(20);
/// How long the client gets to close its side, so that the last frames are not lost to a reset.
const LINGER: Duration = Duration::from_secs(3);
/// Bytes of one frame of input at most. Clients may receive no more than [`MAX_FRAME`], but the
/// published Python client sends whatever it is given as one frame.
const MAX_INPUT_FRAME: usize = 16 << 20;
/// Frames, and bytes, of input kept while the command is not reading.
const QUEUE: usize = 64;
const QUEUE_BYTES: u32 = 1 << 20;

type Sink = SplitSink<WebSocket, Message>;
type Stream = SplitStream<WebSocket>;

/// Run a command in an instance
#[utoipa::path(get, path = "/instances/{id}/exec", tag = "instances", operation_id = "execInstance",
    description = "A WebSocket. The client's first text frame is an `ExecStart`; binary frames carry input one way (at most 16 MiB each) and merged output the other (at most 1 MiB each); a text frame `ResizeFrame` resizes a tty, an `EndOfInputFrame` ends the input; the server's last text frame is an `ExecExit`. After the upgrade, a failure is a close frame with a reason.",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 101, description = "Send the first frame"),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "It does not run", body = doze_api::ErrorBody),
    ))]
pub(super) async fn exec(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    query.finish("none")?;
    let view = state.engine().get(&id)?;
    if let Admission::Refuse(refusal) =
        admission::admit(view.state(), view.record.operation(), Command::Exec)
    {
        return Err(doze_engine::EngineError::InvalidState {
            state: view.state(),
            refusal,
        }
        .into());
    }
    if view.spec.skip_guest_agent {
        return Err(ApiError::conflict(
            "invalid_state",
            format!(
                "instance {:?} was made with skip_guest_agent; it has no exec",
                view.name
            ),
        ));
    }
    let upgrade = upgrade.map_err(|rejection| {
        ApiError::new(
            rejection.status(),
            "bad_request",
            format!("this path wants a WebSocket: {rejection}"),
        )
    })?;
    // The id, not the caller's key: another instance must not slip in under the same name.
    let id = view.id.clone();
    let tracker = state.sessions().clone();
    Ok(upgrade
        .max_message_size(MAX_INPUT_FRAME)
        .max_frame_size(MAX_INPUT_FRAME)
        .on_upgrade(move |socket| tracker.track_future(session(state, id, socket))))
}

/// Why a session ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    /// The client hung up; nobody is left to be told.
    Gone,
    /// The client broke the protocol.
    Violation(String),
    /// The server or the guest could not go on.
    Failed(String),
    /// This server is stopping.
    Stopping,
}

async fn session(state: AppState, id: String, socket: WebSocket) {
    let (mut sink, mut stream) = socket.split();
    let end = tokio::select! {
        end = conversation(&state, &id, &mut sink, &mut stream) => end,
        () = state.stopping().cancelled() => End::Stopping,
    };
    tracing::debug!(instance = %id, ?end, "exec session ended");
    farewell(end, sink, stream).await;
}

async fn conversation(state: &AppState, id: &str, sink: &mut Sink, stream: &mut Stream) -> End {
    let start = match timeout(FIRST_FRAME, first_frame(stream)).await {
        Ok(Ok(start)) => start,
        Ok(Err(end)) => return end,
        Err(_) => {
            return End::Violation(format!(
                "no first frame within {} seconds",
                FIRST_FRAME.as_secs()
            ));
        }
    };
    let (request, wait) = start;
    let (queue, mut queued) = mpsc::channel(QUEUE);
    let reading = read(stream, queue);
    tokio::pin!(reading);

    let starting = state.engine().exec(id, request, wait);
    let mut session = tokio::select! {
        started = starting => match started {
            Ok(session) => session,
            Err(error) => return End::Failed(ApiError::from(error).body.message),
        },
        end = &mut reading => return end,
    };
    let input = session.input();
    tokio::select! {
        end = write(&mut session, sink) => end,
        end = &mut reading => end,
        never = feed(&mut queued, &input) => match never {},
    }
}

async fn first_frame(stream: &mut Stream) -> Result<(ExecRequest, Duration), End> {
    loop {
        return match stream.next().await {
            Some(Ok(Message::Text(text))) => parse_json(text.as_str().as_bytes())
                .and_then(convert::exec::exec)
                .map_err(|error| End::Violation(error.body.message)),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Binary(_))) => Err(End::Violation(
                "the first frame is binary; allowed: a text frame with the command".to_owned(),
            )),
            Some(Ok(Message::Close(_))) | None => Err(End::Gone),
            Some(Err(error)) => Err(broken(&error)),
        };
    }
}

/// What a frame after the first asks for.
enum Input {
    /// With its share of the queue's room. A frame larger than all of it is let in when it is empty.
    Data(Bytes, OwnedSemaphorePermit),
    Resize(ExecResize),
    End,
}

/// Reads frames into the queue until the client is gone or wrong. Does not read while it is full.
async fn read(stream: &mut Stream, queue: mpsc::Sender<Input>) -> End {
    let room = Arc::new(Semaphore::new(QUEUE_BYTES as usize));
    loop {
        let input = match stream.next().await {
            Some(Ok(Message::Binary(data))) => {
                let share =
                    u32::try_from(data.len()).map_or(QUEUE_BYTES, |len| len.min(QUEUE_BYTES));
                match room.clone().acquire_many_owned(share).await {
                    Ok(permit) => Input::Data(data, permit),
                    // Nobody closes it.
                    Err(_) => return End::Gone,
                }
            }
            Some(Ok(Message::Text(text))) => match control(text.as_str()) {
                Ok(Control::Resize(resize)) => Input::Resize(resize),
                Ok(Control::EndOfInput) => Input::End,
                Err(reason) => return End::Violation(reason),
            },
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_))) | None => return End::Gone,
            Some(Err(error)) => return broken(&error),
        };
        if queue.send(input).await.is_err() {
            return End::Gone;
        }
    }
}

/// A control frame after the first.
#[derive(Debug, PartialEq, Eq)]
enum Control {
    Resize(ExecResize),
    EndOfInput,
}

fn control(text: &str) -> Result<Control, String> {
    let ends = serde_json::from_str::<EndOfInputFrame>(text);
    if let Ok(EndOfInputFrame { end_of_input: true }) = ends {
        return Ok(Control::EndOfInput);
    }
    let frame: ResizeFrame = parse_json(text.as_bytes()).map_err(|error| error.body.message)?;
    match frame.resize {
        ExecResize { rows: 0, .. } | ExecResize { cols: 0, .. } => {
            Err("resize: rows and cols must be 1 and more".to_owned())
        }
        resize => Ok(Control::Resize(resize)),
    }
}

/// Hands queued input to the command. Never ends by itself: a command that has closed its input
/// may still have output, so the rest of the input is dropped.
async fn feed(queued: &mut mpsc::Receiver<Input>, input: &ExecInput) -> std::convert::Infallible {
    let mut open = true;
    while let Some(next) = queued.recv().await {
        let outcome = match next {
            Input::Data(data, _room) if open => input.write(data).await,
            Input::Resize(resize) if open => input.resize(resize.rows, resize.cols).await,
            Input::End if open => input.close().await,
            Input::Data(..) | Input::Resize(_) | Input::End => continue,
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "the command takes no more input");
            open = false;
        }
    }
    std::future::pending().await
}

/// Sends output as it comes, and pings while there is none.
async fn write(session: &mut ExecSession, sink: &mut Sink) -> End {
    let mut pings = tokio::time::interval(PING);
    pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            event = session.next() => match event {
                Some(ExecEvent::Output(mut data)) => {
                    // The agent's pieces are far smaller; the clients' limit holds all the same.
                    while data.len() > MAX_FRAME {
                        let piece = Message::Binary(data.split_to(MAX_FRAME));
                        if sink.send(piece).await.is_err() {
                            return End::Gone;
                        }
                    }
                    Message::Binary(data)
                }
                Some(ExecEvent::Exit(exit)) => return End::Exit(exit.code),
                Some(ExecEvent::Failed(reason)) => return End::Failed(reason),
                None => return End::Failed("the session ended without an exit code".to_owned()),
            },
            _ = pings.tick() => Message::Ping(Bytes::new()),
        };
        if sink.send(message).await.is_err() {
            return End::Gone;
        }
    }
}

/// The last frames, then the client's own close, so that nothing on the way is lost.
async fn farewell(end: End, mut sink: Sink, mut stream: Stream) {
    let (text, code, reason) = match end {
        End::Gone => return,
        End::Exit(exit_code) => {
            let frame = serde_json::to_string(&ExecExit { exit_code }).unwrap_or_default();
            (Some(frame), close_code::NORMAL, String::new())
        }
        End::Violation(reason) => (None, close_code::POLICY, reason),
        End::Failed(reason) => (None, close_code::ERROR, reason),
        End::Stopping => (
            None,
            close_code::AWAY,
            "the server is shutting down".to_owned(),
        ),
    };
    let close = Message::Close(Some(CloseFrame {
        code,
        reason: fitting(reason).into(),
    }));
    let last = async move {
        if let Some(text) = text {
            sink.send(Message::Text(text.into())).await?;
        }
        sink.send(close).await?;
        while let Some(Ok(_)) = stream.next().await {}
        Ok::<_, axum::Error>(())
    };
    give(last).await;
}

/// The client may be slow or gone; it is not waited for longer than this.
async fn give(last: impl Future<Output = Result<(), axum::Error>>) {
    match timeout(LINGER, last).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the client was gone before the last frame"),
    }
}

/// A close frame carries at most 123 bytes of reason (RFC 6455 section 5.5).
fn fitting(mut reason: String) -> String {
    reason.truncate(reason.floor_char_boundary(123));
    reason
}

fn broken(error: &axum::Error) -> End {
    // Too large a frame, broken framing, or a lost connection: the first two deserve a reason, and
    // for the third sending one fails without harm.
    End::Violation(format!("the connection broke: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn control_frames() {
        assert_eq!(
            control(r#"{"resize":{"rows":24,"cols":80}}"#),
            Ok(Control::Resize(ExecResize { rows: 24, cols: 80 }))
        );
        assert_eq!(control(r#"{"end_of_input":true}"#), Ok(Control::EndOfInput));
        for bad in [
            "",
            "{}",
            "hello",
            r#"{"resize":{"rows":24}}"#,
            r#"{"resize":{"rows":0,"cols":80}}"#,
            r#"{"resize":{"rows":-1,"cols":80}}"#,
            r#"{"resize":{"rows":1,"cols":1},"x":1}"#,
            r#"{"eof":true}"#,
            r#"{"end_of_input":false}"#,
            r#"{"end_of_input":true,"x":1}"#,
        ] {
            assert!(control(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn reasons_fit_into_a_close_frame() {
        assert_eq!(fitting("short".to_owned()), "short");
        let long = fitting("ü".repeat(100));
        assert_eq!(long.len(), 122);
    }
}
