//! `POST /images/import`: an uploaded archive becomes an image. An addition of doze.
//!
//! ```text
//!   body ──> <data_dir>/uploads/NAME (0600, size cap) ──> engine.image_import ──> Image
//!                      └── removed when done, given up, or at the next start of the server
//! ```
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use axum::{
    Json,
    body::{Body, BodyDataStream},
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use doze_api::{Image, ImportEvent};
use doze_engine::EngineError;
use futures::{StreamExt, stream};
use tokio::{
    fs,
    io::AsyncWriteExt,
    sync::{mpsc, oneshot},
};

use super::{
    AppState,
    errors::{ApiError, chain},
    extract::QueryReader,
    openapi::Octets,
};
use crate::convert::{self, fields};

const NDJSON: &str = "application/x-ndjson";
/// An upload that stands still for this long is given up.
const STALL: Duration = Duration::from_secs(60);

/// Import an image
#[utoipa::path(post, path = "/images/import", tag = "images", operation_id = "importImage",
    description = "Addition of doze. The body is a tar of an OCI layout, or a docker archive. With `Accept: application/x-ndjson` the answer is a stream of `ImportEvent` lines, the last of which is `image` or `error`.",
    params(
        ("name" = String, Query, description = "Image reference; normalised"),
        ("platform" = Option<String>, Query, description = "os/arch[/variant]; the host's by default"),
        ("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "Tags of the image: `?tags[team]=backend`"),
    ),
    request_body(content = inline(Octets), content_type = "application/x-tar"),
    responses(
        (status = 201, description = "The image is ready", body = Image),
        (status = 400, description = "The archive is broken or unsafe, or a parameter is wrong", body = doze_api::ErrorBody),
        (status = 413, description = "The archive is too large", body = doze_api::ErrorBody),
    ))]
pub(super) async fn import(
    State(state): State<AppState>,
    mut query: QueryReader,
    request: Request,
) -> Result<Response, ApiError> {
    let wanted = Wanted::read(&mut query)?;
    query.finish("name, platform, tags[KEY]")?;
    let progress = accepts_ndjson(request.headers());
    let limit = state.inner.max_import_bytes;
    if let Some(length) = content_length(request.headers())
        && length > limit
    {
        return Err(too_large(limit));
    }
    let upload = Upload::receive(
        &state.inner.uploads,
        request.into_body().into_data_stream(),
        limit,
    );
    let upload = tokio::select! {
        upload = upload => upload?,
        () = state.stopping().cancelled() => return Err(EngineError::ShuttingDown.into()),
    };
    let received = upload.bytes;
    let (events, result) = run(&state, wanted, upload);
    match progress {
        true => Ok(stream_progress(received, events, result)),
        false => {
            let image = result.await.unwrap_or_else(|_| Err(abandoned()))?;
            Ok((StatusCode::CREATED, Json(image)).into_response())
        }
    }
}

/// What the query says.
#[derive(Debug)]
struct Wanted {
    name: String,
    platform: Option<String>,
    tags: std::collections::BTreeMap<String, String>,
}

impl Wanted {
    fn read(query: &mut QueryReader) -> Result<Self, ApiError> {
        let name = query.text("name")?.ok_or_else(|| {
            ApiError::invalid(
                "missing_field",
                "name: missing; allowed: an image reference",
            )
        })?;
        name.parse::<doze_image::Reference>()
            .map_err(|error| ApiError::invalid("invalid_name", format!("name: {error}")))?;
        let platform = query.text("platform")?;
        platform.as_deref().map_or(Ok(()), fields::platform)?;
        let tags = query.map("tags")?;
        match ApiError::all(fields::tags(&tags)) {
            Some(error) => Err(error),
            None => Ok(Self {
                name,
                platform,
                tags,
            }),
        }
    }
}

fn accepts_ndjson(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|kind| kind.split(';').next().unwrap_or_default().trim() == NDJSON)
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn too_large(limit: u64) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "invalid_size",
        format!(
            "the archive is too large; allowed: {} (images.max_import_bytes)",
            doze_api::format_size(limit)
        ),
    )
}

fn abandoned() -> ApiError {
    ApiError::internal("the import ended without an outcome; the server's log has the details")
}

/// A staged archive; removed when dropped.
#[derive(Debug)]
struct Upload {
    path: PathBuf,
    bytes: u64,
}

impl Drop for Upload {
    fn drop(&mut self) {
        // One unlink; what fails here is removed at the next start.
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a staged upload");
        }
    }
}

impl Upload {
    async fn receive(
        folder: &Path,
        mut body: BodyDataStream,
        limit: u64,
    ) -> Result<Self, ApiError> {
        let path = folder.join(format!("import-{:016x}.tar", rand::random::<u64>()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .await
            .map_err(|error| staging(&error))?;
        let mut upload = Upload { path, bytes: 0 };
        loop {
            let chunk = match tokio::time::timeout(STALL, body.next()).await {
                Ok(Some(chunk)) => chunk.map_err(|error| {
                    ApiError::bad_request(format!("the upload broke off: {}", chain(&error)))
                })?,
                Ok(None) => break,
                Err(_) => {
                    return Err(ApiError::new(
                        StatusCode::REQUEST_TIMEOUT,
                        "bad_request",
                        format!("the upload stood still for {} seconds", STALL.as_secs()),
                    ));
                }
            };
            upload.bytes += chunk.len() as u64;
            if upload.bytes > limit {
                return Err(too_large(limit));
            }
            file.write_all(&chunk)
                .await
                .map_err(|error| staging(&error))?;
        }
        file.flush().await.map_err(|error| staging(&error))?;
        if upload.bytes == 0 {
            return Err(ApiError::bad_request(
                "the request has no body; allowed: a tar of an OCI layout, or a docker archive",
            ));
        }
        Ok(upload)
    }
}

fn staging(error: &std::io::Error) -> ApiError {
    if doze_host::files::is_full(error) {
        return ApiError::conflict(
            "insufficient_capacity",
            format!("no room for the upload on the server's disk: {error}"),
        );
    }
    ApiError::internal(format!("stage the upload: {error}"))
}

type Outcome = oneshot::Receiver<Result<Image, ApiError>>;

/// The import goes on though its caller hangs up, and the staged file lives exactly as long.
fn run(
    state: &AppState,
    wanted: Wanted,
    upload: Upload,
) -> (mpsc::UnboundedReceiver<doze_image::ImportEvent>, Outcome) {
    let (events, seen) = mpsc::unbounded_channel();
    let (done, outcome) = oneshot::channel();
    let engine = state.engine().clone();
    state.sessions().spawn(async move {
        let path = upload.path.clone();
        let result = engine
            .image_import(wanted.name, path, wanted.platform, wanted.tags, events)
            .await
            .map(convert::image::image)
            .map_err(|error| without_path(ApiError::from(error), &upload.path));
        drop(upload);
        if let Err(Ok(image)) = done.send(result) {
            tracing::info!(image = %image.name, "imported; the caller had hung up");
        }
    });
    (seen, outcome)
}

/// A client knows nothing of our staging file.
fn without_path(mut error: ApiError, path: &Path) -> ApiError {
    error.body.message = error
        .body
        .message
        .replace(&path.display().to_string(), "the upload");
    error
}

/// Lines of progress, then the outcome. The status is sent before it is known, so the last line
/// carries the real one.
fn stream_progress(
    received: u64,
    mut events: mpsc::UnboundedReceiver<doze_image::ImportEvent>,
    outcome: Outcome,
) -> Response {
    let first = stream::iter([ImportEvent::Received { bytes: received }]);
    let middle = stream::poll_fn(move |cx| events.poll_recv(cx))
        .filter_map(|event| std::future::ready(convert::image::import_event(event)));
    let last = stream::once(async move {
        match outcome.await.unwrap_or_else(|_| Err(abandoned())) {
            Ok(image) => ImportEvent::Image {
                image: Box::new(image),
            },
            Err(error) => ImportEvent::Error {
                status: error.status.as_u16(),
                error: *error.body,
            },
        }
    });
    let lines = first.chain(middle).chain(last).map(|event| {
        serde_json::to_vec(&event).map(|mut line| {
            line.push(b'\n');
            Bytes::from(line)
        })
    });
    (
        StatusCode::CREATED,
        [(header::CONTENT_TYPE, NDJSON)],
        Body::from_stream(lines),
    )
        .into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn body(chunks: &[&'static [u8]]) -> BodyDataStream {
        let chunks: Vec<Result<Bytes, std::io::Error>> = chunks
            .iter()
            .map(|chunk| Ok(Bytes::from_static(chunk)))
            .collect();
        Body::from_stream(stream::iter(chunks)).into_data_stream()
    }

    fn files(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().count()
    }

    #[tokio::test]
    async fn an_upload_is_private_and_leaves_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let upload = Upload::receive(dir.path(), body(&[b"ab", b"c"]), 3)
            .await
            .unwrap();
        assert_eq!(upload.bytes, 3);
        assert_eq!(std::fs::read(&upload.path).unwrap(), b"abc");
        let mode = std::fs::metadata(&upload.path)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(upload);
        assert_eq!(files(dir.path()), 0);
    }

    #[tokio::test]
    async fn too_much_too_little_or_broken_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let error = Upload::receive(dir.path(), body(&[b"ab", b"cd"]), 3)
            .await
            .unwrap_err();
        assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE);
        let error = Upload::receive(dir.path(), body(&[]), 3).await.unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        let broken = stream::iter([
            Ok(Bytes::from_static(b"a")),
            Err(std::io::Error::other("gone")),
        ]);
        let broken = Body::from_stream(broken).into_data_stream();
        let error = Upload::receive(dir.path(), broken, 3).await.unwrap_err();
        assert!(error.body.message.contains("gone"), "{error}");
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn accept_headers() {
        let accepts = |value: &'static str| {
            accepts_ndjson(&HeaderMap::from_iter([(
                header::ACCEPT,
                value.parse().unwrap(),
            )]))
        };
        assert!(accepts("application/x-ndjson"));
        assert!(accepts("application/json, application/x-ndjson; q=0.5"));
        assert!(!accepts("*/*"));
        assert!(!accepts_ndjson(&HeaderMap::new()));
    }

    #[tokio::test]
    async fn progress_ends_with_the_outcome() {
        let (events, seen) = mpsc::unbounded_channel();
        let (done, outcome) = oneshot::channel();
        events.send(doze_image::ImportEvent::Building).unwrap();
        drop(events);
        done.send(Err(ApiError::invalid("invalid_request", "bad layer")))
            .unwrap();
        let response = stream_progress(7, seen, outcome);
        let body = axum::body::to_bytes(response.into_body(), 1 << 20)
            .await
            .unwrap();
        let lines: Vec<serde_json::Value> = body
            .split_inclusive(|b| *b == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[0],
            serde_json::json!({"event": "received", "bytes": 7})
        );
        assert_eq!(lines[1]["event"], "building");
        assert_eq!(lines[2]["status"], 400);
        assert_eq!(lines[2]["error"]["code"], "invalid_request");
    }
}
