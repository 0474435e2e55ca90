//! Automatic standby: changing the policy, looking at what became of it, holding an instance awake.
use axum::{Json, extract::State};
use doze_api::{AutoStandbyStatus, Instance, UpdateInstanceRequest};

use super::{
    AppState,
    errors::ApiError,
    extract::{JsonBody, Nothing, OptionalJsonBody, QueryReader, Segment},
};
use crate::convert;

/// Change an instance
#[utoipa::path(patch, path = "/instances/{id}", tag = "instances", operation_id = "updateInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body = UpdateInstanceRequest,
    responses(
        (status = 200, description = "All of it is durable", body = Instance),
        (status = 400, description = "A field is wrong, or nothing is to be changed; nothing was", body = doze_api::ErrorBody),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 501, description = "A field is not built yet; nothing was changed", body = doze_api::ErrorBody),
    ))]
pub(super) async fn update(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    JsonBody(request): JsonBody<UpdateInstanceRequest>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let wanted = convert::auto_standby::update(request)?;
    let view = match wanted {
        Some(policy) => state.engine().set_auto_standby(&id, policy).await?,
        None => state.engine().get(&id)?,
    };
    let now = doze_engine::now();
    Ok(Json(convert::instance::instance(&view, &now)))
}

/// Look at an instance's way to sleep
#[utoipa::path(get, path = "/instances/{id}/auto-standby/status", tag = "instances",
    operation_id = "getAutoStandbyStatus",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "What is true now", body = AutoStandbyStatus),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn status(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Json<AutoStandbyStatus>, ApiError> {
    query.finish("none")?;
    let status = state.engine().auto_standby_status(&id)?;
    Ok(Json(convert::auto_standby::status(status)))
}

/// Keep an instance from falling asleep by itself for one idle timeout
#[utoipa::path(post, path = "/instances/{id}/auto-standby/hold", tag = "instances",
    operation_id = "holdAutoStandby",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "It stays awake until hold_until; without a policy that is on, it does anyway",
            body = AutoStandbyStatus),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "It sleeps, or is on its way there; restore it", body = doze_api::ErrorBody),
    ))]
pub(super) async fn hold(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    OptionalJsonBody(Nothing {}): OptionalJsonBody<Nothing>,
) -> Result<Json<AutoStandbyStatus>, ApiError> {
    query.finish("none")?;
    let status = state.engine().hold_awake(&id).await?;
    Ok(Json(convert::auto_standby::status(status)))
}
