//! When snapshots of an instance are taken by themselves.
use axum::{Json, extract::State, http::StatusCode};
use doze_api::{SetSnapshotScheduleRequest, SnapshotSchedule};

use super::{
    AppState,
    errors::ApiError,
    extract::{JsonBody, QueryReader, Segment},
};
use crate::convert;

/// Take snapshots of an instance on a schedule
///
/// Running and Standby instances give Standby snapshots, Stopped ones Stopped. Replaces the schedule there is; a new
/// interval begins a new cadence, anything else keeps the next run.
#[utoipa::path(put, path = "/instances/{id}/snapshot-schedule", tag = "snapshots", operation_id = "setInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body = SetSnapshotScheduleRequest,
    responses(
        (status = 200, description = "The schedule", body = SnapshotSchedule),
        (status = 400, description = "A field is wrong", body = doze_api::ErrorBody),
        (status = 404, description = "There is no such instance", body = doze_api::ErrorBody),
    ))]
pub(super) async fn set(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    JsonBody(request): JsonBody<SetSnapshotScheduleRequest>,
) -> Result<Json<SnapshotSchedule>, ApiError> {
    query.finish("none")?;
    let request = convert::schedule::request(request)?;
    let schedule = state.engine().set_schedule(&id, request).await?;
    Ok(Json(convert::schedule::schedule(schedule)))
}

/// Look at an instance's snapshot schedule
#[utoipa::path(get, path = "/instances/{id}/snapshot-schedule", tag = "snapshots", operation_id = "getInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "The schedule", body = SnapshotSchedule),
        (status = 404, description = "There is no such instance, or it has none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn get(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Json<SnapshotSchedule>, ApiError> {
    query.finish("none")?;
    let schedule = state.engine().get_schedule(&id)?;
    Ok(Json(convert::schedule::schedule(schedule)))
}

/// End an instance's snapshot schedule
#[utoipa::path(delete, path = "/instances/{id}/snapshot-schedule", tag = "snapshots", operation_id = "deleteInstanceSnapshotSchedule",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 204, description = "No more are taken; those there are stay"),
        (status = 404, description = "There is no such instance, or it has none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn delete(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<StatusCode, ApiError> {
    query.finish("none")?;
    state.engine().delete_schedule(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
