//! `GET /capabilities`: what works on this server and host, and nothing else.
use axum::{Json, extract::State};
use doze_api::Capabilities;

use super::AppState;
use crate::convert;

/// What works on this server
#[utoipa::path(get, path = "/capabilities", tag = "server", operation_id = "getCapabilities",
    responses((status = 200, description = "Monitors, features, network and image platforms", body = Capabilities)))]
pub(super) async fn capabilities(State(state): State<AppState>) -> Json<Capabilities> {
    Json(convert::capabilities::capabilities(state.engine()).await)
}
