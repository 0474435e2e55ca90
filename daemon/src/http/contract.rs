//! Endpoints of the contract that this server does not serve yet. Each answers 501 and says so:
//! never a fake success, and never a 404 that would make a client believe in a wrong address.
use axum::{Router, http::Method, routing::MethodFilter};

use super::{AppState, errors::ApiError};

/// Method and path, as the published clients call them.
pub const NOT_SERVED: &[(Method, &str)] = &[
    (Method::GET, "/builders"),
    (Method::POST, "/builders"),
    (Method::GET, "/builders/{id}"),
    (Method::DELETE, "/builders/{id}"),
    (Method::POST, "/builders/{id}/prune"),
    (Method::GET, "/builds"),
    (Method::POST, "/builds"),
    (Method::GET, "/builds/{id}"),
    (Method::DELETE, "/builds/{id}"),
    (Method::GET, "/builds/{id}/events"),
    (Method::GET, "/devices"),
    (Method::POST, "/devices"),
    (Method::GET, "/devices/available"),
    (Method::GET, "/devices/{id}"),
    (Method::DELETE, "/devices/{id}"),
    (Method::POST, "/images"),
    (Method::POST, "/images/{name}/tag"),
    (Method::GET, "/ingresses"),
    (Method::POST, "/ingresses"),
    (Method::GET, "/ingresses/{id}"),
    (Method::DELETE, "/ingresses/{id}"),
    (Method::GET, "/instances/{id}/cp"),
    (Method::GET, "/instances/{id}/stat"),
    (Method::GET, "/instances/{id}/stats"),
    (Method::POST, "/instances/{id}/volumes/{volume_id}"),
    (Method::DELETE, "/instances/{id}/volumes/{volume_id}"),
    (Method::GET, "/pushes"),
    (Method::POST, "/pushes"),
    (Method::GET, "/pushes/{id}"),
    (Method::POST, "/resources/memory/reclaim"),
    (Method::GET, "/volumes"),
    (Method::POST, "/volumes"),
    (Method::POST, "/volumes/from-archive"),
    (Method::GET, "/volumes/{id}"),
    (Method::DELETE, "/volumes/{id}"),
];

/// The image registry inside the contract (the OCI distribution protocol): any method, any path.
pub const NOT_SERVED_TREES: &[&str] = &["/v2", "/v2/", "/v2/{*path}"];

/// Their routes.
pub(super) fn router() -> Router<AppState> {
    let trees = NOT_SERVED_TREES.iter().fold(Router::new(), |router, path| {
        let refuse = || async {
            ApiError::not_implemented("the image registry /v2 is not built yet on this server")
        };
        router.route(path, axum::routing::any(refuse))
    });
    NOT_SERVED.iter().fold(trees, |router, (method, path)| {
        // The table holds standard methods only, each of which has a filter (a test sees to it).
        let Ok(filter) = MethodFilter::try_from(method.clone()) else {
            return router;
        };
        let message = format!("{method} {path} is not built yet on this server");
        router.route(
            path,
            axum::routing::on(
                filter,
                move || async move { ApiError::not_implemented(message) },
            ),
        )
    })
}
