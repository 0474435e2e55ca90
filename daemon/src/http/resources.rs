//! `GET /resources`: what the host has, and who holds it.
use axum::{Json, extract::State};
use doze_api::Resources;

use super::{AppState, errors::ApiError, extract::QueryReader};
use crate::convert;

/// What the host has, and who holds it
#[utoipa::path(get, path = "/resources", tag = "server", operation_id = "getResources",
    responses((status = 200, description = "CPUs, memory and disk, as a whole and by instance", body = Resources)))]
pub(super) async fn resources(
    State(state): State<AppState>,
    query: QueryReader,
) -> Result<Json<Resources>, ApiError> {
    query.finish("none")?;
    Ok(Json(convert::resources::resources(state.engine()).await?))
}
