//! A plain HTTP client: it shows what really travels, where an SDK would smooth it over.
use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::{Stream, StreamExt as _};
use http::Method;
use serde_json::{Value, json};

use crate::phases::{PhaseCheck, now_ms};

/// One server's API with a token.
#[derive(Debug, Clone)]
pub struct Api {
    pub base: String,
    pub token: Option<String>,
    http: reqwest::Client,
    phases: Arc<PhaseCheck>,
}

/// An answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Reply {
    pub request: String,
    pub status: u16,
    pub headers: http::HeaderMap,
    pub text: String,
    /// Null when the body is not JSON.
    pub body: Value,
}

impl Reply {
    /// The body, if the status is this one.
    pub fn expect(self, status: u16) -> Result<Value> {
        ensure!(
            self.status == status,
            "{}: {} (wanted {status}): {}",
            self.request,
            self.status,
            self.text
        );
        Ok(self.body)
    }

    /// An error of this status and code whose message holds every one of `words`; and, for the statuses
    /// SDKs would otherwise retry, the header that stops them.
    pub fn refused(&self, status: u16, code: &str, words: &[&str]) -> Result<()> {
        let at = |what: &str| anyhow!("{}: {what}: {} {}", self.request, self.status, self.text);
        ensure!(
            self.status == status,
            at(&format!("wanted {status} {code}"))
        );
        ensure!(
            self.body["code"] == code,
            at(&format!("wanted code {code}"))
        );
        let message = self.body["message"]
            .as_str()
            .ok_or_else(|| at("no message"))?;
        for word in words {
            ensure!(
                message.contains(word),
                at(&format!("the message does not say {word:?}"))
            );
        }
        if matches!(status, 409 | 501) {
            let header = self
                .headers
                .get("x-should-retry")
                .and_then(|v| v.to_str().ok());
            ensure!(
                header == Some("false"),
                at("x-should-retry: false is missing")
            );
        }
        Ok(())
    }
}

impl Api {
    pub fn new(base: String, token: Option<String>) -> Result<Self> {
        // Never through a proxy: the server is on our own loopback.
        let http = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(310))
            .build()?;
        Ok(Self {
            base,
            token,
            http,
            phases: Arc::default(),
        })
    }

    /// The same server, without or with another token.
    #[must_use]
    pub fn with_token(&self, token: Option<String>) -> Self {
        Self {
            token,
            ..self.clone()
        }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply> {
        let sent = now_ms();
        let mut request = self.request(method.clone(), path);
        if let Some(body) = body {
            request = request.json(body);
        }
        let name = format!("{method} {path}");
        let answer = request.send().await.with_context(|| name.clone())?;
        let reply = read(name, answer).await?;
        self.phases.check(&reply.body, sent)?;
        Ok(reply)
    }

    /// Sends a body that need not be JSON.
    pub async fn send_raw(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: impl Into<reqwest::Body>,
    ) -> Result<Reply> {
        let name = format!("{method} {path}");
        let request = self
            .request(method, path)
            .header("content-type", content_type)
            .body(body);
        read(name.clone(), request.send().await.context(name)?).await
    }

    pub async fn get(&self, path: &str) -> Result<Reply> {
        self.send(Method::GET, path, None).await
    }
    pub async fn post(&self, path: &str, body: Value) -> Result<Reply> {
        self.send(Method::POST, path, Some(&body)).await
    }
    /// A read whose body is received and not looked at, for measurements.
    pub async fn fetch(&self, path: &str) -> Result<()> {
        self.open(path).await?.bytes().await?;
        Ok(())
    }
    /// An answer whose body is for the caller to read, or to leave.
    pub async fn open(&self, path: &str) -> Result<reqwest::Response> {
        let answer = self.request(Method::GET, path).send().await?;
        ensure!(
            answer.status().is_success(),
            "GET {path}: {}",
            answer.status()
        );
        Ok(answer)
    }
    /// Without body and content type.
    pub async fn post_empty(&self, path: &str) -> Result<Reply> {
        self.send(Method::POST, path, None).await
    }
    pub async fn delete(&self, path: &str) -> Result<Reply> {
        self.send(Method::DELETE, path, None).await
    }

    pub async fn instance(&self, key: &str) -> Result<Value> {
        self.get(&format!("/instances/{key}")).await?.expect(200)
    }
    pub async fn instances(&self) -> Result<Vec<Value>> {
        let list = self.get("/instances").await?.expect(200)?;
        list.as_array()
            .cloned()
            .context("the list of instances is not an array")
    }
    /// 201 and the new instance.
    pub async fn create(&self, body: Value) -> Result<Value> {
        self.post("/instances", body).await?.expect(201)
    }
    /// Waits for the state; anything else is an error that shows the instance.
    pub async fn wait(&self, key: &str, state: &str, seconds: u32) -> Result<()> {
        let answer = self
            .get(&format!(
                "/instances/{key}/wait?state={state}&timeout={seconds}s"
            ))
            .await?
            .expect(200)?;
        if answer["timed_out"] == json!(false) && answer["state"] == state {
            return Ok(());
        }
        let instance = self.get(&format!("/instances/{key}")).await?;
        bail!(
            "waiting for {state}: {answer}; the instance: {}",
            instance.text
        )
    }
    pub async fn remove(&self, key: &str) -> Result<()> {
        let reply = self.delete(&format!("/instances/{key}")).await?;
        ensure!(
            reply.status == 204,
            "delete {key}: {} {}",
            reply.status,
            reply.text
        );
        Ok(())
    }

    /// Opens the log stream.
    pub async fn logs(&self, key: &str, query: &str) -> Result<LogStream> {
        let path = format!("/instances/{key}/logs{query}");
        let answer = self
            .request(Method::GET, &path)
            .header("accept", "text/event-stream")
            .send()
            .await?;
        let status = answer.status().as_u16();
        if status != 200 {
            bail!("GET {path}: {status} {}", answer.text().await?);
        }
        let kind = answer
            .headers()
            .get("content-type")
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        ensure!(
            kind.starts_with("text/event-stream"),
            "content-type of logs is {kind:?}"
        );
        let bytes = answer
            .bytes_stream()
            .map(|piece| piece.map(|b| b.to_vec()).map_err(anyhow::Error::from));
        Ok(LogStream {
            bytes: Box::pin(bytes),
            buffer: Vec::new(),
        })
    }

    /// All lines of a stream that is not followed.
    pub async fn log_lines(&self, key: &str, query: &str) -> Result<Vec<String>> {
        let mut stream = self.logs(key, query).await?;
        let mut lines = Vec::new();
        while let Some(line) = stream.next().await? {
            lines.push(line);
        }
        Ok(lines)
    }
}

async fn read(request: String, answer: reqwest::Response) -> Result<Reply> {
    let status = answer.status().as_u16();
    let headers = answer.headers().clone();
    let text = answer
        .text()
        .await
        .with_context(|| format!("{request}: body"))?;
    let body = serde_json::from_str(&text).unwrap_or(Value::Null);
    Ok(Reply {
        request,
        status,
        headers,
        text,
        body,
    })
}

/// Server-Sent Events whose data are JSON strings.
pub struct LogStream {
    bytes: std::pin::Pin<Box<dyn Stream<Item = Result<Vec<u8>>> + Send>>,
    buffer: Vec<u8>,
}

impl LogStream {
    /// Next line; `None` at the end of the stream. Comments (keep-alives) are passed over.
    pub async fn next(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(line) = parse_event(&event)? {
                    return Ok(Some(line));
                }
                continue;
            }
            match self.bytes.next().await {
                Some(piece) => self.buffer.extend(piece?),
                None => {
                    ensure!(self.buffer.is_empty(), "the stream ended inside an event");
                    return Ok(None);
                }
            }
        }
    }

    /// Reads on until a line satisfies `wanted`.
    pub async fn until(&mut self, wanted: impl Fn(&str) -> bool, seconds: u64) -> Result<String> {
        let search = async {
            loop {
                match self.next().await? {
                    Some(line) if wanted(&line) => return Ok(line),
                    Some(_) => {}
                    None => bail!("the log ended before the wanted line"),
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(seconds), search)
            .await
            .context("the wanted log line never came")?
    }
}

fn parse_event(event: &[u8]) -> Result<Option<String>> {
    let text = std::str::from_utf8(event).context("event is not UTF-8")?;
    let data: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("data:"))
        .map(|d| d.strip_prefix(' ').unwrap_or(d))
        .collect();
    if data.is_empty() {
        return Ok(None);
    }
    let data = data.join("\n");
    let line = serde_json::from_str(&data)
        .with_context(|| format!("event data {data:?} is not a JSON string"))?;
    Ok(Some(line))
}
