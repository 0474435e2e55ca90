//! The HTTP face: routes as code, one file per resource, and nothing else.
//!
//! ```text
//!   request ──> panic guard ──> log ──> token? ──> route ──> handler ──convert──> Engine
//!                                         │          │          │
//!                                        401     404 405 501   errors.rs: the contract's error body
//! ```
//!
//! Handlers hold no state of their own. A caller that hangs up drops its handler; what the engine
//! has begun goes on.
use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    http::{Method, Uri},
    middleware,
    response::{IntoResponse, Response},
};
use doze_engine::Engine;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower_http::{catch_panic::CatchPanicLayer, trace::TraceLayer};
use utoipa_axum::{router::OpenApiRouter, routes};

mod auth;
mod auto_standby;
mod capabilities;
pub(crate) mod contract;
pub(crate) mod errors;
mod exec;
pub(crate) mod extract;
mod health;
mod images;
mod import;
mod instances;
mod logs;
mod metrics;
mod metrics_auto_standby;
mod metrics_compression;
mod openapi;
mod resources;
mod schedules;
mod snapshot_transfer;
mod snapshots;
mod spec;
#[cfg(test)]
mod tests;

use crate::secret::Verifier;
use errors::ApiError;

/// What every handler may use; clones share it.
#[derive(Clone)]
pub(crate) struct AppState {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Engine,
    verifier: Verifier,
    uploads: PathBuf,
    max_import_bytes: u64,
    stopping: CancellationToken,
    sessions: TaskTracker,
    spec: spec::Documents,
}

/// What a server is made of.
pub(crate) struct Parts {
    pub engine: Engine,
    pub verifier: Verifier,
    /// Existing folder for uploads.
    pub uploads: PathBuf,
    pub max_import_bytes: u64,
}

impl AppState {
    pub(crate) fn new(parts: Parts) -> anyhow::Result<Self> {
        Ok(Self {
            inner: Arc::new(Inner {
                engine: parts.engine,
                verifier: parts.verifier,
                uploads: parts.uploads,
                max_import_bytes: parts.max_import_bytes,
                stopping: CancellationToken::new(),
                sessions: TaskTracker::new(),
                spec: spec::Documents::new(&document())?,
            }),
        })
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.inner.engine
    }

    pub(crate) fn verifier(&self) -> &Verifier {
        &self.inner.verifier
    }

    /// Cancelled when the server stops: open streams end then.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.inner.stopping
    }

    /// Sessions that outlive their request (WebSockets, imports); waited for at shutdown.
    pub(crate) fn sessions(&self) -> &TaskTracker {
        &self.inner.sessions
    }
}

/// Every served endpoint with its documentation.
fn served() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(openapi::base())
        .routes(routes!(health::health))
        .routes(routes!(capabilities::capabilities))
        .routes(routes!(instances::list, instances::create))
        .routes(routes!(
            instances::get,
            instances::delete,
            auto_standby::update
        ))
        .routes(routes!(auto_standby::status))
        .routes(routes!(auto_standby::hold))
        .routes(routes!(instances::start))
        .routes(routes!(instances::stop))
        .routes(routes!(instances::standby))
        .routes(routes!(instances::restore))
        .routes(routes!(instances::wait))
        .routes(routes!(instances::phases))
        .routes(routes!(snapshots::fork_instance))
        .routes(routes!(snapshots::create))
        .routes(routes!(snapshots::restore))
        .routes(routes!(snapshots::list))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(snapshots::fork))
        .routes(routes!(snapshot_transfer::export))
        .routes(routes!(snapshot_transfer::import))
        .routes(routes!(schedules::set, schedules::get, schedules::delete))
        .routes(routes!(resources::resources))
        .routes(routes!(metrics::metrics))
        .routes(routes!(logs::logs))
        .routes(routes!(exec::exec))
        .routes(routes!(images::list))
        .routes(routes!(images::get, images::delete))
        .routes(routes!(import::import))
        .routes(routes!(spec::yaml))
        .routes(routes!(spec::json))
}

/// The OpenAPI document of this server.
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = served().into_openapi();
    openapi::finish(&mut document);
    document
}

/// The complete service.
pub(crate) fn router(state: AppState) -> Router {
    let (served, _) = served().split_for_parts();
    served
        .merge(images::shadowed())
        .merge(snapshot_transfer::shadowed())
        .merge(contract::router())
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(extract::MAX_BODY))
        .layer(middleware::from_fn_with_state(
            state.clone(),
            auth::require_token,
        ))
        .layer(
            TraceLayer::new_for_http()
                .make_span_with(request_span)
                .on_request(())
                .on_response(
                    |response: &Response, latency: Duration, _: &tracing::Span| {
                        tracing::debug!(
                            status = response.status().as_u16(),
                            ms = latency.as_millis(),
                            "answered"
                        );
                    },
                )
                .on_failure(()),
        )
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(state)
}

/// Path and method; never headers, which hold the token.
fn request_span(request: &Request) -> tracing::Span {
    tracing::info_span!(
        "request",
        method = %request.method(),
        path = request.uri().path(),
        subject = tracing::field::Empty,
    )
}

async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::not_found(format!(
        "path: {:?} does not exist; GET /spec.yaml lists what does",
        uri.path()
    ))
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        axum::http::StatusCode::METHOD_NOT_ALLOWED,
        "bad_request",
        format!("method: {method} is not allowed on {:?}", uri.path()),
    )
}

/// A panic is a bug of ours; it must cost one answer and no more.
fn panicked(panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
    let what = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = what, "a request handler panicked");
    ApiError::internal("the server failed on this request; its log has the details").into_response()
}
