//! Snapshots that move: `GET /snapshots/{id}/export` and `POST /snapshots/import`. Additions of doze.
//!
//! ```text
//!   engine, on a thread ──Outlet──> at most QUEUE pieces ──> body          client slow: the thread waits
//!   body ──feed──> at most QUEUE pieces ──Intake──> engine, on a thread    engine slow: the client waits
//! ```
//! Nothing is staged: neither way is more than a few pieces ever in memory, and the engine refuses a stream by its
//! first pieces. Whoever stands still for a minute is given up.
use std::{
    io::{self, Read, Write},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, BodyDataStream},
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing,
};
use bytes::{Buf, Bytes};
use doze_api::Snapshot;
use doze_engine::EngineError;
use futures::{Stream, StreamExt, stream};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    AppState,
    errors::{ApiError, chain},
    extract::{QueryReader, Segment},
    openapi::Octets,
    snapshots::{self, measured},
};
use crate::convert::fields;

const OCTETS: &str = "application/octet-stream";
/// Bytes sent at once.
const PIECE: usize = 256 << 10;
/// Pieces between the two sides.
const QUEUE: usize = 4;
/// Whoever stands still for this long is given up.
const STALL: Duration = Duration::from_secs(60);
/// Bytes of a refused upload that are still read, so that its client reads the answer instead of an error.
const DRAIN: u64 = 64 << 20;

/// Take a snapshot along
#[utoipa::path(get, path = "/snapshots/{snapshot_id}/export", tag = "snapshots", operation_id = "exportSnapshot",
    description = "Addition of doze. One stream with everything but the image, for `POST /snapshots/import` of another host. A stream that ends early is not whole, and is refused there.",
    params(("snapshot_id" = String, Path, description = "Id, or unique prefix of an id")),
    responses(
        (status = 200, description = "The stream", body = inline(Octets), content_type = "application/octet-stream"),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "The prefix is ambiguous, or the snapshot is damaged", body = doze_api::ErrorBody),
    ))]
pub(super) async fn export(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Response, ApiError> {
    query.finish("none")?;
    let id = state.engine().get_snapshot(&id)?.id.clone();
    let (pieces, mut taken) = mpsc::channel(QUEUE);
    let outlet = Outlet::new(pieces, Handle::current(), state.stopping().clone());
    let engine = state.engine().clone();
    let export = state
        .sessions()
        .spawn(async move { engine.export_snapshot(&id, outlet).await });
    // Until there is a first piece, what goes wrong has a status.
    match taken.recv().await {
        Some(first) => {
            let stopping = state.stopping().clone();
            let body = Body::from_stream(rest(first, taken, export, stopping));
            Ok(([(header::CONTENT_TYPE, OCTETS)], body).into_response())
        }
        None => {
            outcome(export).await?;
            Err(ApiError::internal("the export has no content"))
        }
    }
}

async fn outcome(export: JoinHandle<Result<(), EngineError>>) -> Result<(), ApiError> {
    match export.await {
        Ok(done) => Ok(done?),
        Err(error) => Err(ApiError::internal(format!("the export: {error}"))),
    }
}

/// All pieces; an error at the end, which aborts the connection, when they are not all there is.
fn rest(
    first: Bytes,
    taken: mpsc::Receiver<Bytes>,
    export: JoinHandle<Result<(), EngineError>>,
    stopping: CancellationToken,
) -> impl Stream<Item = io::Result<Bytes>> {
    let begin = (Some(first), taken, Some(export), stopping);
    stream::try_unfold(begin, |(first, mut taken, export, stopping)| async move {
        let piece = match first {
            Some(first) => Some(first),
            None => tokio::select! {
                piece = taken.recv() => piece,
                () = stopping.cancelled() => return Err(io::Error::other("the server stops")),
            },
        };
        if let Some(piece) = piece {
            return Ok(Some((piece, (None, taken, export, stopping))));
        }
        if let Some(export) = export {
            outcome(export).await.map_err(|error| {
                tracing::warn!(%error, "an export broke off");
                io::Error::other(error.body.message)
            })?;
        }
        Ok(None)
    })
}

/// The writer's end of an export. Must be used on a thread that may block.
struct Outlet {
    pieces: mpsc::Sender<Bytes>,
    runtime: Handle,
    /// Nobody takes pieces off a client that reads nothing: this ends the wait for it.
    stopping: CancellationToken,
    piece: Vec<u8>,
}

impl Outlet {
    fn new(pieces: mpsc::Sender<Bytes>, runtime: Handle, stopping: CancellationToken) -> Self {
        Self {
            pieces,
            runtime,
            stopping,
            piece: Vec::with_capacity(PIECE),
        }
    }
}

impl Write for Outlet {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE - self.piece.len();
        let taken = bytes.len().min(room);
        self.piece.extend_from_slice(&bytes[..taken]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.runtime.block_on(async {
            tokio::select! {
                sent = timeout(STALL, self.pieces.send(piece.into())) => match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
                    Err(_) => Err(io::ErrorKind::TimedOut.into()),
                },
                () = self.stopping.cancelled() => Err(io::Error::other("the server stops")),
            }
        })
    }
}

/// Bring a snapshot along
#[utoipa::path(post, path = "/snapshots/import", tag = "snapshots", operation_id = "importSnapshot",
    description = "Addition of doze. The body is what `GET /snapshots/{snapshot_id}/export` of another host gave. The image must be here already; monitor and CPU must be able to go on with the memory. The snapshot has a new id, and all else that it had there.",
    params(("name" = Option<String>, Query, description = "Another name than it had")),
    request_body(content = inline(Octets), content_type = "application/octet-stream"),
    responses(
        (status = 201, description = "It is durable", body = Snapshot),
        (status = 400, description = "The stream is broken or not whole, or a parameter is wrong", body = doze_api::ErrorBody),
        (status = 409, description = "This host cannot use it (image, monitor, CPU, limits), the name is taken, or no room on the disk", body = doze_api::ErrorBody),
    ))]
pub(super) async fn import(
    State(state): State<AppState>,
    mut query: QueryReader,
    request: Request,
) -> Result<(StatusCode, Json<Snapshot>), ApiError> {
    let name = query.text("name")?;
    query.finish("name")?;
    if let Some(name) = &name {
        fields::label("name", name, fields::MAX_NAME)?;
    }
    let (pieces, source) = mpsc::channel(QUEUE);
    let body = request.into_body().into_data_stream();
    // Of its own: it reads on while the answer to a refused upload is on its way.
    state
        .sessions()
        .spawn(feed(body, pieces, state.stopping().clone()));
    let engine = state.engine().clone();
    let imported = match engine.import_snapshot(Intake::new(source), name).await {
        Ok(imported) => imported,
        // Its stream was cut by us.
        Err(EngineError::BrokenStream { .. }) if state.stopping().is_cancelled() => {
            return Err(EngineError::ShuttingDown.into());
        }
        Err(error) => return Err(error.into()),
    };
    let answer = measured(&engine, &imported).await?;
    Ok((StatusCode::CREATED, Json(answer)))
}

/// `POST /snapshots/import` takes the path of a snapshot that is called `import`; here it gets its look and its
/// delete back.
pub(super) fn shadowed() -> Router<AppState> {
    let own = || Segment("import".to_owned());
    let get = move |state: State<AppState>, query: QueryReader| snapshots::get(state, own(), query);
    let delete =
        move |state: State<AppState>, query: QueryReader| snapshots::delete(state, own(), query);
    Router::new().route("/snapshots/import", routing::get(get).delete(delete))
}

type Piece = io::Result<Bytes>;

/// Hands the body on, piece by piece, as fast as it is taken; the reason when it does not come to its end.
async fn feed(mut body: BodyDataStream, pieces: mpsc::Sender<Piece>, stopping: CancellationToken) {
    let mut drained = 0;
    loop {
        let piece = tokio::select! {
            piece = timeout(STALL, body.next()) => match piece {
                Ok(None) => return,
                Ok(Some(Ok(piece))) => Ok(piece),
                Ok(Some(Err(error))) => {
                    Err(io::Error::other(format!("the upload broke off: {}", chain(&error))))
                }
                Err(_) => {
                    let reason = format!("the upload stood still for {} seconds", STALL.as_secs());
                    Err(io::Error::new(io::ErrorKind::TimedOut, reason))
                }
            },
            () = stopping.cancelled() => Err(io::Error::other("the server stops")),
        };
        let (bytes, ended) = match &piece {
            Ok(piece) => (piece.len() as u64, false),
            Err(_) => (0, true),
        };
        if pieces.send(piece).await.is_err() {
            drained += bytes;
        }
        if ended || drained > DRAIN {
            return;
        }
    }
}

/// The reader's end of an import. Must be used on a thread that may block.
struct Intake {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
}

impl Intake {
    fn new(pieces: mpsc::Receiver<Piece>) -> Self {
        Self {
            pieces,
            piece: Bytes::new(),
        }
    }
}

impl Read for Intake {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[tokio::test]
    async fn a_writer_waits_for_its_reader_and_ends_with_it() {
        let (pieces, mut taken) = mpsc::channel(QUEUE);
        let mut outlet = Outlet::new(pieces, Handle::current(), CancellationToken::new());
        let writing = tokio::task::spawn_blocking(move || {
            outlet.write_all(&vec![7; 3 * PIECE + 1])?;
            outlet.flush()?;
            // More than fits between the two: the reader must be there, or gone.
            outlet.write_all(&vec![8; 2 * QUEUE * PIECE])
        });
        let mut got = Vec::new();
        while got.len() <= 3 * PIECE {
            got.extend_from_slice(&taken.recv().await.unwrap());
        }
        assert!(got == vec![7; 3 * PIECE + 1]);
        drop(taken);
        let error = writing.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    /// The reader is there and takes nothing.
    #[tokio::test]
    async fn a_writer_ends_with_the_server() {
        let (pieces, taken) = mpsc::channel(1);
        let stopping = CancellationToken::new();
        let mut outlet = Outlet::new(pieces, Handle::current(), stopping.clone());
        let writing = tokio::task::spawn_blocking(move || outlet.write_all(&vec![7; 3 * PIECE]));
        stopping.cancel();
        let error = writing.await.unwrap().unwrap_err();
        assert_eq!(error.to_string(), "the server stops");
        drop(taken);
    }

    async fn read_all(items: Vec<Piece>) -> io::Result<Vec<u8>> {
        let body = Body::from_stream(stream::iter(items)).into_data_stream();
        let (pieces, source) = mpsc::channel(QUEUE);
        tokio::spawn(feed(body, pieces, CancellationToken::new()));
        let mut intake = Intake::new(source);
        let reading = move || {
            let mut all = Vec::new();
            intake.read_to_end(&mut all).map(|_| all)
        };
        tokio::task::spawn_blocking(reading).await.unwrap()
    }

    #[tokio::test]
    async fn a_body_is_read_to_its_end_or_to_its_error() {
        let many: Vec<Piece> = (0..20).map(|n| Ok(Bytes::from(vec![n; 3]))).collect();
        let all = read_all(many).await.unwrap();
        assert_eq!((all.len(), all[59]), (60, 19));
        assert!(read_all(vec![]).await.unwrap().is_empty());
        let broken = vec![Ok(Bytes::from_static(b"a")), Err(io::Error::other("gone"))];
        let error = read_all(broken).await.unwrap_err().to_string();
        assert!(
            error.contains("broke off") && error.contains("gone"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_body_that_nobody_wants_is_read_for_a_while() {
        let (pieces, source) = mpsc::channel(QUEUE);
        drop(source);
        let endless = stream::repeat_with(|| Ok::<_, io::Error>(Bytes::from(vec![0; 1 << 20])));
        let body = Body::from_stream(endless).into_data_stream();
        feed(body, pieces, CancellationToken::new()).await;
        let (pieces, mut source) = mpsc::channel(QUEUE);
        let stopped = CancellationToken::new();
        stopped.cancel();
        let silent = Body::from_stream(stream::pending::<Piece>()).into_data_stream();
        feed(silent, pieces, stopped).await;
        assert!(source.recv().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn an_export_that_fails_half_way_aborts_its_body() {
        let (pieces, taken) = mpsc::channel(QUEUE);
        let export = tokio::spawn(async move {
            pieces.send(Bytes::from_static(b"b")).await.unwrap();
            Err(EngineError::ShuttingDown)
        });
        let first = Bytes::from_static(b"a");
        let items: Vec<_> = rest(first, taken, export, CancellationToken::new())
            .collect()
            .await;
        assert_eq!(items.len(), 3);
        assert_eq!(items[1].as_ref().unwrap(), "b");
        assert!(items[2].is_err());
    }
}
