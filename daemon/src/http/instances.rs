//! Instances: create, list, look, start, stop, wait, delete.
use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use doze_api::{
    CreateInstanceRequest, Instance, InstancePhases, InstanceState, StandbyInstanceRequest,
    StartInstanceRequest, WaitForStateResponse,
};

use super::{
    AppState,
    errors::ApiError,
    extract::{JsonBody, Nothing, OptionalJsonBody, QueryReader, Segment},
};
use crate::convert::{self, fields};

const DEFAULT_WAIT: Duration = Duration::from_secs(60);
const MAX_WAIT: Duration = Duration::from_secs(5 * 60);

/// List instances
#[utoipa::path(get, path = "/instances", tag = "instances", operation_id = "listInstances",
    params(
        ("state" = Option<InstanceState>, Query, description = "Only those in this state"),
        ("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "Only those with all of these tags: `?tags[team]=backend&tags[env]=x`"),
    ),
    responses((status = 200, description = "In order of creation", body = Vec<Instance>)))]
pub(super) async fn list(
    State(state): State<AppState>,
    mut query: QueryReader,
) -> Result<Response, ApiError> {
    let wanted = state_parameter(&mut query)?;
    let tags = query.map("tags")?;
    query.finish("state, tags[KEY]")?;
    let now = doze_engine::now();
    let views = state.engine().list();
    let instances = views
        .iter()
        .filter(|view| {
            tags.iter()
                .all(|(key, value)| view.spec.tags.get(key) == Some(value))
        })
        .map(|view| convert::instance::instance(view, &now))
        .filter(|instance| wanted.is_none_or(|wanted| instance.state == wanted));
    json_array(instances)
}

/// Written one by one: a thousand instances as values would be megabytes for every caller.
pub(super) fn json_array<T: serde::Serialize>(
    items: impl Iterator<Item = T>,
) -> Result<Response, ApiError> {
    let mut text = vec![b'['];
    for item in items {
        if text.len() > 1 {
            text.push(b',');
        }
        serde_json::to_writer(&mut text, &item)
            .map_err(|error| ApiError::internal(format!("write the answer: {error}")))?;
    }
    text.push(b']');
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Make and boot an instance
#[utoipa::path(post, path = "/instances", tag = "instances", operation_id = "createInstance",
    request_body = CreateInstanceRequest,
    responses(
        (status = 201, description = "Its CPUs run", body = Instance),
        (status = 400, description = "A field is wrong", body = doze_api::ErrorBody),
        (status = 404, description = "The image is not on this host", body = doze_api::ErrorBody),
        (status = 409, description = "The name is taken, or there is no room", body = doze_api::ErrorBody),
        (status = 501, description = "A field is not built yet", body = doze_api::ErrorBody),
    ))]
pub(super) async fn create(
    State(state): State<AppState>,
    query: QueryReader,
    JsonBody(request): JsonBody<CreateInstanceRequest>,
) -> Result<(StatusCode, Json<Instance>), ApiError> {
    query.finish("none")?;
    let request = convert::create::create(request)?;
    let view = state.engine().create(request).await?;
    let answer = convert::instance::instance(&view, &doze_engine::now());
    Ok((StatusCode::CREATED, Json(answer)))
}

/// Look at an instance
#[utoipa::path(get, path = "/instances/{id}", tag = "instances", operation_id = "getInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "The instance", body = Instance),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "The prefix is ambiguous", body = doze_api::ErrorBody),
    ))]
pub(super) async fn get(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let view = state.engine().get(&id)?;
    Ok(Json(convert::instance::instance(
        &view,
        &doze_engine::now(),
    )))
}

/// Stop and delete an instance
#[utoipa::path(delete, path = "/instances/{id}", tag = "instances", operation_id = "deleteInstance",
    params(
        ("id" = String, Path, description = "Id, name, or unique prefix of an id"),
        ("graceful_shutdown" = Option<bool>, Query, description = "Ask the guest to end first (default true)"),
    ),
    responses(
        (status = 204, description = "Nothing of it is left"),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn delete(
    State(state): State<AppState>,
    Segment(id): Segment,
    mut query: QueryReader,
) -> Result<StatusCode, ApiError> {
    let graceful = query.boolean("graceful_shutdown")?.unwrap_or(true);
    query.finish("graceful_shutdown")?;
    state.engine().delete(&id, graceful).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Start a stopped instance
#[utoipa::path(post, path = "/instances/{id}/start", tag = "instances", operation_id = "startInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body(content = Option<StartInstanceRequest>, description = "Overrides; what is absent keeps its value"),
    responses(
        (status = 200, description = "Its CPUs run", body = Instance),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state", body = doze_api::ErrorBody),
    ))]
pub(super) async fn start(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    OptionalJsonBody(request): OptionalJsonBody<StartInstanceRequest>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let discard_memory = request.discard_memory;
    let overrides = convert::create::start(request)?;
    let view = state.engine().start(&id, overrides, discard_memory).await?;
    Ok(Json(convert::instance::instance(
        &view,
        &doze_engine::now(),
    )))
}

/// Stop an instance
#[utoipa::path(post, path = "/instances/{id}/stop", tag = "instances", operation_id = "stopInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "It is stopped", body = Instance),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state", body = doze_api::ErrorBody),
    ))]
pub(super) async fn stop(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    OptionalJsonBody(Nothing {}): OptionalJsonBody<Nothing>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let view = state.engine().stop(&id).await?;
    Ok(Json(convert::instance::instance(
        &view,
        &doze_engine::now(),
    )))
}

/// Put an instance to sleep
#[utoipa::path(post, path = "/instances/{id}/standby", tag = "instances", operation_id = "standbyInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body(content = Option<StandbyInstanceRequest>, description = "How the memory is kept"),
    responses(
        (status = 200, description = "Its memory is durable and its machine monitor gone", body = Instance),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state, interrupted, or no room on the disk", body = doze_api::ErrorBody),
    ))]
pub(super) async fn standby(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    OptionalJsonBody(request): OptionalJsonBody<StandbyInstanceRequest>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    // Checked before anything changes: the instance runs on when it is wrong.
    let options = convert::compression::standby(&request)?;
    let view = state.engine().standby(&id, options).await?;
    Ok(Json(convert::instance::instance(
        &view,
        &doze_engine::now(),
    )))
}

/// Wake a sleeping instance
#[utoipa::path(post, path = "/instances/{id}/restore", tag = "instances", operation_id = "restoreInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "It goes on where it was: Running once its agent answered", body = Instance),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state, no room, or a snapshot that cannot be used", body = doze_api::ErrorBody),
    ))]
pub(super) async fn restore(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    OptionalJsonBody(Nothing {}): OptionalJsonBody<Nothing>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let view = state.engine().restore(&id).await?;
    Ok(Json(convert::instance::instance(
        &view,
        &doze_engine::now(),
    )))
}

/// Where an instance's time went, and why
#[utoipa::path(get, path = "/instances/{id}/phases", tag = "instances", operation_id = "getInstancePhases",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    responses(
        (status = 200, description = "The ledger and the last changes of phase", body = InstancePhases),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn phases(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Json<InstancePhases>, ApiError> {
    query.finish("none")?;
    let view = state.engine().get(&id)?;
    Ok(Json(convert::instance::phases(&view, &doze_engine::now())))
}

/// Wait until an instance is in a state
#[utoipa::path(get, path = "/instances/{id}/wait", tag = "instances", operation_id = "waitForInstanceState",
    params(
        ("id" = String, Path, description = "Id, name, or unique prefix of an id"),
        ("state" = InstanceState, Query, description = "The state to wait for; not Unknown"),
        ("timeout" = Option<String>, Query, description = "Go duration; 60s by default, 5m at most"),
    ),
    responses(
        (status = 200, description = "Reached, no longer reachable without a new command, or timed out",
            body = WaitForStateResponse),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn wait(
    State(state): State<AppState>,
    Segment(id): Segment,
    mut query: QueryReader,
) -> Result<Json<WaitForStateResponse>, ApiError> {
    let target = state_parameter(&mut query)?;
    let timeout = wait_timeout(query.text("timeout")?.as_deref())?;
    query.finish("state, timeout")?;
    // Whether the instance exists matters more than whether the question makes sense.
    let view = state.engine().get(&id)?;
    let target = target.ok_or_else(|| {
        ApiError::invalid(
            "missing_field",
            "state: missing; allowed: the state to wait for",
        )
    })?;
    let target = convert::instance::target_state(target).ok_or_else(|| {
        fields::invalid(
            "invalid_field",
            "state",
            target,
            "Created, Initializing, Running, Paused, Shutdown, Stopped, Standby",
        )
    })?;
    let engine = state.engine();
    let outcome = tokio::select! {
        outcome = engine.wait(&view.id, target, timeout) => outcome?,
        // A wait that holds up the shutdown helps nobody; the client asks again.
        () = state.stopping().cancelled() => {
            return Err(doze_engine::EngineError::ShuttingDown.into());
        }
    };
    Ok(Json(convert::instance::wait_outcome(outcome)))
}

fn state_parameter(query: &mut QueryReader) -> Result<Option<InstanceState>, ApiError> {
    let allowed = InstanceState::ALL.map(InstanceState::as_str).join(", ");
    query.value("state", &allowed, |text| text.parse().ok())
}

fn wait_timeout(text: Option<&str>) -> Result<Duration, ApiError> {
    let Some(text) = text else {
        return Ok(DEFAULT_WAIT);
    };
    let timeout = fields::duration("timeout", text)?;
    match timeout.is_zero() {
        true => Err(fields::invalid(
            "invalid_field",
            "timeout",
            format!("{text:?}"),
            "a duration above zero, at most 5m",
        )),
        false => Ok(timeout.min(MAX_WAIT)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn waits_are_bounded() {
        assert_eq!(wait_timeout(None), Ok(Duration::from_secs(60)));
        assert_eq!(wait_timeout(Some("1.5s")), Ok(Duration::from_millis(1500)));
        assert_eq!(wait_timeout(Some("1h")), Ok(Duration::from_secs(300)));
        for bad in ["0", "0s", "-1s", "60", "soon"] {
            let error = wait_timeout(Some(bad)).unwrap_err();
            assert_eq!(error.body.code, "invalid_field");
            assert!(error.body.message.starts_with("timeout: "), "{error}");
        }
    }
}
