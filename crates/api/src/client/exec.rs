//! Commands in a guest, over a WebSocket. See [`crate::exec`] for the frames.
use bytes::Bytes;
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        http::{HeaderValue, header},
        protocol::WebSocketConfig,
    },
};

use super::{Client, ClientError};
use crate::{EndOfInputFrame, ExecExit, ExecResize, ExecStart, MAX_FRAME, ResizeFrame};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What a running command sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// stdout and stderr merged.
    Output(Bytes),
    /// Exit code; the last event.
    Exit(i32),
}

/// A running command. Dropping both halves ends the command.
pub struct ExecSession {
    pub input: ExecInput,
    pub output: ExecOutput,
}

/// Towards the command.
pub struct ExecInput {
    sink: SplitSink<Socket, Message>,
}

/// From the command.
pub struct ExecOutput {
    stream: SplitStream<Socket>,
    ended: bool,
}

impl Client {
    /// `GET /instances/{id}/exec`. What is wrong before the command starts (no such instance, not
    /// running) is a [`ClientError::Api`] from here or a [`ClientError::ExecClosed`] from
    /// [`ExecOutput::next`].
    pub async fn exec(&self, id: &str, start: &ExecStart) -> Result<ExecSession, ClientError> {
        let request = self.websocket_request(&["instances", id, "exec"])?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_FRAME))
            .max_frame_size(Some(MAX_FRAME));
        let (mut socket, _) = connect_async_with_config(request, Some(config), true)
            .await
            .map_err(|error| match error {
                tungstenite::Error::Http(response) => ClientError::api(
                    response.status().as_u16(),
                    response.body().as_deref().unwrap_or_default(),
                ),
                other => ClientError::transport(self.base.as_str(), other),
            })?;
        socket.send(text(start)?).await.map_err(lost)?;
        let (sink, stream) = socket.split();
        Ok(ExecSession {
            input: ExecInput { sink },
            output: ExecOutput {
                stream,
                ended: false,
            },
        })
    }

    fn websocket_request(
        &self,
        segments: &[&str],
    ) -> Result<tungstenite::handshake::client::Request, ClientError> {
        let invalid = |reason: String| ClientError::BaseUrl {
            url: self.base.to_string(),
            reason,
        };
        let mut url = self.url(segments)?;
        url.set_scheme("ws")
            .map_err(|()| invalid("no WebSocket address".to_owned()))?;
        let mut request = url
            .as_str()
            .into_client_request()
            .map_err(|error| invalid(error.to_string()))?;
        if let Some(token) = &self.token {
            let value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|error| invalid(format!("token: {error}")))?;
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        Ok(request)
    }
}

impl ExecInput {
    /// Sends input, waiting while the command does not read.
    pub async fn write(&mut self, data: Bytes) -> Result<(), ClientError> {
        let mut rest = data;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(MAX_FRAME));
            self.sink.send(Message::Binary(piece)).await.map_err(lost)?;
        }
        Ok(())
    }

    /// Tells a tty its new size.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<(), ClientError> {
        let frame = ResizeFrame {
            resize: ExecResize { rows, cols },
        };
        self.sink.send(text(&frame)?).await.map_err(lost)
    }

    /// No more input: the command sees the end of its standard input (`^D` on a tty).
    pub async fn end(&mut self) -> Result<(), ClientError> {
        let frame = EndOfInputFrame { end_of_input: true };
        self.sink.send(text(&frame)?).await.map_err(lost)
    }

    /// Hangs up, which ends the command.
    pub async fn close(&mut self) -> Result<(), ClientError> {
        self.sink.close().await.map_err(lost)
    }
}

impl ExecOutput {
    /// The next event; `None` after [`ExecEvent::Exit`] or an error.
    pub async fn next(&mut self) -> Option<Result<ExecEvent, ClientError>> {
        while !self.ended {
            let event = match self.stream.next().await {
                Some(Ok(Message::Binary(data))) => return Some(Ok(ExecEvent::Output(data))),
                Some(Ok(Message::Text(frame))) => exit(&frame),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Ok(Message::Close(frame))) => Err(ClientError::ExecClosed(frame.map_or_else(
                    || "no reason given".to_owned(),
                    |frame| frame.reason.to_string(),
                ))),
                Some(Err(error)) => Err(lost(error)),
                None => Err(ClientError::ExecClosed("no exit code was sent".to_owned())),
            };
            self.ended = true;
            return Some(event);
        }
        None
    }
}

fn exit(frame: &str) -> Result<ExecEvent, ClientError> {
    serde_json::from_str::<ExecExit>(frame)
        .map(|exit| ExecEvent::Exit(exit.exit_code))
        .map_err(|error| ClientError::Protocol {
            context: "exec".to_owned(),
            reason: format!("unexpected control frame: {error}"),
        })
}

fn text(frame: &impl serde::Serialize) -> Result<Message, ClientError> {
    serde_json::to_string(frame)
        .map(|text| Message::Text(text.into()))
        .map_err(|error| ClientError::Protocol {
            context: "exec".to_owned(),
            reason: error.to_string(),
        })
}

fn lost(error: tungstenite::Error) -> ClientError {
    ClientError::ExecClosed(error.to_string())
}
