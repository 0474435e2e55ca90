//! Logs as a stream of lines, decoded from Server-Sent Events.
//!
//! Grammar: <https://html.spec.whatwg.org/multipage/server-sent-events.html>. Of it, the server uses
//! `data:` fields, each event one JSON string, and comments as heartbeats.
use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt, stream};
use reqwest::{Method, header};

use super::{Client, ClientError};
use crate::LogSource;

/// A line that grows beyond this is not a log line but an attack or a bug.
const MAX_LINE: usize = 16 << 20;

/// Which log lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogsQuery {
    /// Lines from the end; `None`: the server's default (100).
    pub tail: Option<u64>,
    /// Go on with new lines as they appear.
    pub follow: bool,
    pub source: LogSource,
}

/// Lines without their newline. Dropping it ends the request.
pub struct LogStream {
    inner: Pin<Box<dyn Stream<Item = Result<String, ClientError>> + Send>>,
}

impl LogStream {
    /// The next line; `None` when the log ends.
    pub async fn next(&mut self) -> Option<Result<String, ClientError>> {
        self.inner.next().await
    }
}

impl Stream for LogStream {
    type Item = Result<String, ClientError>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(cx)
    }
}

impl Client {
    /// `GET /instances/{id}/logs`.
    pub async fn logs(&self, id: &str, query: &LogsQuery) -> Result<LogStream, ClientError> {
        let mut pairs = vec![
            ("source", query.source.to_string()),
            ("follow", query.follow.to_string()),
        ];
        pairs.extend(query.tail.map(|tail| ("tail", tail.to_string())));
        let request = self
            .request(Method::GET, &["instances", id, "logs"])?
            .header(header::ACCEPT, "text/event-stream")
            .query(&pairs);
        let body = self.send(request).await?.bytes_stream();
        Ok(LogStream {
            inner: Box::pin(lines(body)),
        })
    }
}

fn lines<B, E>(
    body: impl Stream<Item = Result<B, E>> + Send + Unpin,
) -> impl Stream<Item = Result<String, ClientError>> + Send
where
    B: AsRef<[u8]> + Send,
    E: std::error::Error + Send + 'static,
{
    let state = (body, Decoder::default(), VecDeque::new(), false);
    stream::unfold(
        state,
        |(mut body, mut decoder, mut ready, mut ended)| async move {
            loop {
                if let Some(line) = ready.pop_front() {
                    return Some((line, (body, decoder, ready, ended)));
                }
                if ended {
                    return None;
                }
                match body.next().await {
                    Some(Ok(chunk)) => ready.extend(decoder.push(chunk.as_ref())),
                    Some(Err(error)) => {
                        ended = true;
                        ready.push_back(Err(ClientError::transport("read the log", error)));
                    }
                    None => ended = true,
                }
            }
        },
    )
}

/// Bytes in, log lines out.
#[derive(Default)]
struct Decoder {
    line: Vec<u8>,
    data: Option<String>,
}

impl Decoder {
    fn push(&mut self, chunk: &[u8]) -> Vec<Result<String, ClientError>> {
        let mut events = Vec::new();
        for piece in chunk.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(piece);
            if self.line.len() > MAX_LINE {
                self.line.clear();
                events.push(Err(protocol("a line of the event stream is too long")));
            } else if self.line.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                events.extend(self.line(line.trim_ascii_end()));
            }
        }
        events
    }

    /// One line of the stream; an empty one ends the event.
    fn line(&mut self, line: &[u8]) -> Option<Result<String, ClientError>> {
        if line.is_empty() {
            let data = self.data.take()?;
            return Some(
                serde_json::from_str(&data)
                    .map_err(|error| protocol(&format!("an event is not a JSON string: {error}"))),
            );
        }
        if let Some(value) = line.strip_prefix(b"data:") {
            let text = String::from_utf8_lossy(value.strip_prefix(b" ").unwrap_or(value));
            match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(&text);
                }
                None => self.data = Some(text.into_owned()),
            }
        }
        None
    }
}

fn protocol(reason: &str) -> ClientError {
    ClientError::Protocol {
        context: "log stream".to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    fn decode(chunks: &[&[u8]]) -> Vec<Result<String, String>> {
        let mut decoder = Decoder::default();
        chunks
            .iter()
            .flat_map(|chunk| decoder.push(chunk))
            .map(|line| line.map_err(|error| error.to_string()))
            .collect()
    }

    #[test]
    fn whatever_the_chunks_the_lines_are_the_same() {
        let stream = b": heartbeat\n\ndata: \"one\"\n\nevent: x\r\ndata:\"t\\u0077o \xc3\xbc\"\r\n\r\ndata: \"\"\n\n";
        let want: Vec<_> = ["one", "two ü", ""].map(|s| Ok(s.to_owned())).to_vec();
        assert_eq!(decode(&[stream]), want);
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(decode(&bytes), want);
    }

    #[test]
    fn an_event_that_is_no_string_is_an_error() {
        assert!(decode(&[b"data: {\n\n"])[0].is_err());
    }

    #[test]
    fn an_unfinished_event_is_dropped() {
        assert_eq!(decode(&[b"data: \"half"]), []);
    }
}
