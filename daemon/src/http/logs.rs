//! `GET /instances/{id}/logs`: lines as Server-Sent Events, each `data:` one JSON string.
use std::{convert::Infallible, time::Duration};

use axum::{
    extract::State,
    http::{HeaderName, HeaderValue},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use doze_api::LogSource;
use futures::{Stream, StreamExt, stream};

use super::{
    AppState,
    errors::ApiError,
    extract::{QueryReader, Segment},
};

const DEFAULT_TAIL: usize = 100;
/// A comment this often keeps proxies from cutting a quiet stream; clients skip it.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// Read an instance's log
#[utoipa::path(get, path = "/instances/{id}/logs", tag = "instances", operation_id = "getInstanceLogs",
    params(
        ("id" = String, Path, description = "Id, name, or unique prefix of an id"),
        ("source" = Option<LogSource>, Query, description = "Which log (default app)"),
        ("tail" = Option<u64>, Query, description = "Lines from the end (default 100)"),
        ("follow" = Option<bool>, Query, description = "Go on with new lines (default false)"),
    ),
    responses(
        (status = 200, description = "Events whose data is one JSON string, one line of the log",
            content_type = "text/event-stream", body = String),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn logs(
    State(state): State<AppState>,
    Segment(id): Segment,
    mut query: QueryReader,
) -> Result<Response, ApiError> {
    let sources = LogSource::ALL.map(LogSource::as_str).join(", ");
    let source = query
        .value("source", &sources, |text| text.parse().ok())?
        .unwrap_or_default();
    let tail = query
        .value("tail", "a whole number from 0", |text| text.parse().ok())?
        .unwrap_or(DEFAULT_TAIL);
    let follow = query.boolean("follow")?.unwrap_or(false);
    query.finish("source, tail, follow")?;

    let source = match source {
        LogSource::App => doze_engine::LogSource::App,
        LogSource::Vmm => doze_engine::LogSource::Vmm,
        LogSource::Hypeman => doze_engine::LogSource::Operations,
    };
    let mut lines = state.engine().logs(&id, source, Some(tail), follow).await?;
    let lines = stream::poll_fn(move |cx| lines.poll_recv(cx));
    let stopping = state.stopping().clone();
    let events = events(lines.take_until(stopping.cancelled_owned()));
    let sse = Sse::new(events).keep_alive(KeepAlive::new().interval(HEARTBEAT));
    let unbuffered = (
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(([unbuffered], sse).into_response())
}

fn events(lines: impl Stream<Item = String>) -> impl Stream<Item = Result<Event, Infallible>> {
    // A JSON text has no raw line breaks, so one line of the log is always one `data:` line.
    lines.map(|line| Ok(Event::default().data(serde_json::Value::String(line).to_string())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn every_line_is_one_event_with_one_json_string() {
        let lines = [
            "plain",
            "",
            "tab\tquote\" back\\slash",
            "cr\rlf\nnul\0",
            "ü\u{2028}",
        ];
        let stream = stream::iter(lines.map(str::to_owned));
        let response = Sse::new(events(stream)).into_response();
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let body = axum::body::to_bytes(response.into_body(), 1 << 20)
            .await
            .unwrap();
        let text = std::str::from_utf8(&body).unwrap();
        let events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(events.len(), lines.len(), "{text}");
        for (event, line) in events.iter().zip(lines) {
            assert_eq!(event.lines().count(), 1, "{event}");
            let data = event.strip_prefix("data: ").unwrap();
            assert_eq!(serde_json::from_str::<String>(data).unwrap(), line);
        }
    }
}
