//! `GET /health`: the process answers. Needs no token.
use axum::Json;
use doze_api::{Health, HealthStatus};

/// Whether the server answers
#[utoipa::path(get, path = "/health", tag = "server", operation_id = "getHealth", security(),
    responses((status = 200, description = "It does", body = Health)))]
pub(super) async fn health() -> Json<Health> {
    Json(Health {
        status: HealthStatus::Ok,
    })
}
