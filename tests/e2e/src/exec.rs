//! Commands in a guest, over the WebSocket protocol itself.
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream,
    tungstenite::{self, Message, client::IntoClientRequest as _},
};

use crate::{Api, Reply};

/// A running command.
pub struct Exec {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

/// What the server sends.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Output(Vec<u8>),
    Exit(i64),
    /// A text frame that is not an exit code.
    Text(String),
    /// The close frame's code and reason; `None`: none came.
    Closed(Option<(u16, String)>),
}

/// A finished command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub output: Vec<u8>,
    pub code: i64,
}

impl Outcome {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }
    /// The output without surrounding space, if the command succeeded.
    pub fn ok(&self) -> Result<String> {
        ensure!(self.code == 0, "exit code {}: {}", self.code, self.text());
        Ok(self.text().trim().to_owned())
    }
}

/// How opening a session ended.
pub enum Opened {
    Session(Exec),
    /// The server answered with plain HTTP instead of the upgrade.
    Refused(Reply),
}

impl Exec {
    /// Upgrades, then sends the request frame.
    pub async fn try_open(api: &Api, key: &str, request: &Value) -> Result<Opened> {
        let url = format!(
            "{}/instances/{key}/exec",
            api.base.replacen("http", "ws", 1)
        );
        let mut upgrade = url.clone().into_client_request()?;
        if let Some(token) = &api.token {
            upgrade
                .headers_mut()
                .insert("authorization", format!("Bearer {token}").parse()?);
        }
        // The Python client's limit; a larger frame from the server is an error here too.
        let config = tungstenite::protocol::WebSocketConfig::default()
            .max_message_size(Some(1 << 20))
            .max_frame_size(Some(1 << 20));
        match tokio_tungstenite::connect_async_with_config(upgrade, Some(config), false).await {
            Ok((mut socket, _)) => {
                socket.send(Message::text(request.to_string())).await?;
                Ok(Opened::Session(Self { socket }))
            }
            Err(tungstenite::Error::Http(answer)) => {
                let text = answer
                    .body()
                    .as_deref()
                    .map(String::from_utf8_lossy)
                    .unwrap_or_default()
                    .into_owned();
                Ok(Opened::Refused(Reply {
                    request: format!("GET {url}"),
                    status: answer.status().as_u16(),
                    headers: answer.headers().clone(),
                    body: serde_json::from_str(&text).unwrap_or(Value::Null),
                    text,
                }))
            }
            Err(e) => Err(e).with_context(|| url),
        }
    }

    pub async fn open(api: &Api, key: &str, request: &Value) -> Result<Self> {
        match Self::try_open(api, key, request).await? {
            Opened::Session(session) => Ok(session),
            Opened::Refused(reply) => bail!("exec refused: {} {}", reply.status, reply.text),
        }
    }

    pub async fn stdin(&mut self, data: &[u8]) -> Result<()> {
        self.socket
            .send(Message::binary(data.to_vec()))
            .await
            .context("send stdin")
    }

    pub async fn resize(&mut self, rows: u16, cols: u16) -> Result<()> {
        let frame = json!({"resize": {"rows": rows, "cols": cols}});
        self.socket
            .send(Message::text(frame.to_string()))
            .await
            .context("send resize")
    }

    pub async fn next(&mut self) -> Result<Event> {
        loop {
            let Some(message) = self.socket.next().await else {
                return Ok(Event::Closed(None));
            };
            match message {
                Ok(Message::Binary(data)) => return Ok(Event::Output(data.to_vec())),
                Ok(Message::Text(text)) => {
                    let frame: Value = serde_json::from_str(&text)
                        .with_context(|| format!("text frame {text:?}"))?;
                    // The Python client accepts nothing beside the exit code in that frame.
                    return Ok(
                        match (
                            frame["exitCode"].as_i64(),
                            frame.as_object().map(|o| o.len()),
                        ) {
                            (Some(code), Some(1)) => Event::Exit(code),
                            _ => Event::Text(text.to_string()),
                        },
                    );
                }
                Ok(Message::Close(frame)) => {
                    return Ok(Event::Closed(
                        frame.map(|f| (f.code.into(), f.reason.to_string())),
                    ));
                }
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Err(tungstenite::Error::ConnectionClosed) => return Ok(Event::Closed(None)),
                Err(e) => return Err(e).context("exec stream"),
            }
        }
    }

    /// Collects output until it satisfies `wanted`.
    pub async fn until(&mut self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut output = Vec::new();
        loop {
            match self.next().await? {
                Event::Output(piece) => output.extend(piece),
                other => bail!("{other:?} after {:?}", String::from_utf8_lossy(&output)),
            }
            let text = String::from_utf8_lossy(&output);
            if wanted(&text) {
                return Ok(text.into_owned());
            }
        }
    }

    pub async fn finish(mut self) -> Result<Outcome> {
        let mut output = Vec::new();
        loop {
            match self.next().await? {
                Event::Output(piece) => output.extend(piece),
                Event::Exit(code) => return Ok(Outcome { output, code }),
                other => bail!("{other:?} after {:?}", String::from_utf8_lossy(&output)),
            }
        }
    }

    /// Vanishes as a killed client does: no close frame, just the end of the connection.
    pub fn hang_up(self) {
        drop(self.socket);
    }
}

/// Runs a command to its end; at most a minute.
pub async fn run(api: &Api, key: &str, command: &[&str]) -> Result<Outcome> {
    run_with(
        api,
        key,
        &json!({"command": command, "tty": false, "wait_for_agent": 60}),
    )
    .await
}

/// As [`run`], with the whole request.
pub async fn run_with(api: &Api, key: &str, request: &Value) -> Result<Outcome> {
    run_within(api, key, request, 60).await
}

/// As [`run_with`], at most so many seconds.
async fn run_within(api: &Api, key: &str, request: &Value, seconds: u64) -> Result<Outcome> {
    let work = async { Exec::open(api, key, request).await?.finish().await };
    tokio::time::timeout(Duration::from_secs(seconds), work)
        .await
        .map_err(|_| anyhow!("{request} has not ended within {seconds} s"))?
        .with_context(|| format!("exec {request}"))
}

/// As [`sh`], for what an emulated guest takes long to do: five minutes at most.
pub async fn long_sh(api: &Api, key: &str, script: &str) -> Result<String> {
    let request = json!({"command": ["sh", "-c", script], "tty": false, "wait_for_agent": 60});
    run_within(api, key, &request, 300)
        .await?
        .ok()
        .with_context(|| format!("script {script:?}"))
}

/// Runs a shell script that must succeed, and gives its output without surrounding space.
pub async fn sh(api: &Api, key: &str, script: &str) -> Result<String> {
    run(api, key, &["sh", "-c", script])
        .await?
        .ok()
        .with_context(|| format!("script {script:?}"))
}
