//! Snapshots and forks: keep a moment, look at what is kept, come back to it, make new instances of it.
use axum::{Json, extract::State, http::StatusCode, response::Response};
use doze_api::{
    CreateSnapshotRequest, ForkInstanceRequest, ForkSnapshotRequest, Instance,
    RestoreSnapshotRequest, Snapshot, SnapshotKind,
};
use doze_engine::{Engine, EngineError, InstanceView, SnapshotFilter};
use futures::{StreamExt as _, stream};

use super::{
    AppState,
    errors::ApiError,
    extract::{JsonBody, OptionalJsonBody, QueryReader, Segment, Segments},
    instances::json_array,
};
use crate::convert;

/// Folders that are measured at the same time for one list.
const MEASURED_AT_ONCE: usize = 8;

/// Keep a moment of an instance
///
/// Standby: memory and disk of a Running or Standby instance; a running guest is paused for the moment of the copy.
/// Stopped: the disk of a Stopped instance.
#[utoipa::path(post, path = "/instances/{id}/snapshots", tag = "snapshots", operation_id = "createInstanceSnapshot",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body = CreateSnapshotRequest,
    responses(
        (status = 201, description = "It is durable", body = Snapshot),
        (status = 400, description = "A field is wrong", body = doze_api::ErrorBody),
        (status = 404, description = "There is no such instance", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state, the name is taken, or no room on the disk", body = doze_api::ErrorBody),
        (status = 501, description = "A field is not built yet", body = doze_api::ErrorBody),
    ))]
pub(super) async fn create(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    JsonBody(request): JsonBody<CreateSnapshotRequest>,
) -> Result<(StatusCode, Json<Snapshot>), ApiError> {
    query.finish("none")?;
    let request = convert::snapshot::create(request)?;
    let snapshot = state.engine().create_snapshot(&id, request).await?;
    let answer = measured(state.engine(), &snapshot).await?;
    Ok((StatusCode::CREATED, Json(answer)))
}

/// List snapshots
#[utoipa::path(get, path = "/snapshots", tag = "snapshots", operation_id = "listSnapshots",
    params(
        ("kind" = Option<SnapshotKind>, Query, description = "Only those of this kind"),
        ("name" = Option<String>, Query, description = "Only those of this name"),
        ("source_instance_id" = Option<String>, Query, description = "Only those of the instance with this id, which may be gone"),
        ("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
            description = "Only those with all of these tags: `?tags[team]=backend&tags[env]=x`"),
    ),
    responses((status = 200, description = "In order of creation", body = Vec<Snapshot>)))]
pub(super) async fn list(
    State(state): State<AppState>,
    mut query: QueryReader,
) -> Result<Response, ApiError> {
    let allowed = SnapshotKind::ALL.map(SnapshotKind::as_str).join(", ");
    let kind: Option<SnapshotKind> = query.value("kind", &allowed, |text| text.parse().ok())?;
    let filter = SnapshotFilter {
        kind: kind.map(convert::snapshot::kind),
        name: query.text("name")?,
        source_id: query.text("source_instance_id")?,
        tags: query.map("tags")?,
    };
    query.finish("kind, name, source_instance_id, tags[KEY]")?;
    let found = state.engine().list_snapshots(&filter);
    let engine = state.engine();
    let answers: Vec<_> = stream::iter(found)
        .map(|snapshot| async move { measured(engine, &snapshot).await })
        .buffered(MEASURED_AT_ONCE)
        .collect()
        .await;
    let mut snapshots = Vec::with_capacity(answers.len());
    for answer in answers {
        match answer {
            Ok(snapshot) => snapshots.push(snapshot),
            // Deleted since the list was made.
            Err(EngineError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    json_array(snapshots.iter())
}

/// Look at a snapshot
#[utoipa::path(get, path = "/snapshots/{snapshot_id}", tag = "snapshots", operation_id = "getSnapshot",
    params(("snapshot_id" = String, Path, description = "Id, or unique prefix of an id")),
    responses(
        (status = 200, description = "The snapshot", body = Snapshot),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "The prefix is ambiguous", body = doze_api::ErrorBody),
    ))]
pub(super) async fn get(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<Json<Snapshot>, ApiError> {
    query.finish("none")?;
    let snapshot = state.engine().get_snapshot(&id)?;
    Ok(Json(measured(state.engine(), &snapshot).await?))
}

/// Delete a snapshot
#[utoipa::path(delete, path = "/snapshots/{snapshot_id}", tag = "snapshots", operation_id = "deleteSnapshot",
    params(("snapshot_id" = String, Path, description = "Id, or unique prefix of an id")),
    responses(
        (status = 204, description = "It is gone; what was made from it stays"),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn delete(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
) -> Result<StatusCode, ApiError> {
    query.finish("none")?;
    state.engine().delete_snapshot(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Bring an instance back to one of its snapshots
#[utoipa::path(post, path = "/instances/{id}/snapshots/{snapshot_id}/restore", tag = "snapshots",
    operation_id = "restoreInstanceSnapshot",
    params(
        ("id" = String, Path, description = "Id, name, or unique prefix of an id"),
        ("snapshot_id" = String, Path, description = "Id, or unique prefix of an id"),
    ),
    request_body(content = Option<RestoreSnapshotRequest>, description = "Where it is to end"),
    responses(
        (status = 200, description = "It is what it was then", body = Instance),
        (status = 400, description = "A field is wrong, or does not fit the snapshot's kind", body = doze_api::ErrorBody),
        (status = 404, description = "There is no such instance, or no such snapshot of it", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state, no room, or a snapshot that cannot be used", body = doze_api::ErrorBody),
    ))]
pub(super) async fn restore(
    State(state): State<AppState>,
    Segments(id, snapshot_id): Segments,
    query: QueryReader,
    OptionalJsonBody(request): OptionalJsonBody<RestoreSnapshotRequest>,
) -> Result<Json<Instance>, ApiError> {
    query.finish("none")?;
    let target = convert::snapshot::restore(&request)?;
    let engine = state.engine();
    let instance = engine.get(&id)?;
    let snapshot = engine.get_snapshot(&snapshot_id)?;
    // Below this path lie the instance's own ones only.
    if snapshot.source_id != instance.id {
        return Err(ApiError::not_found(format!(
            "snapshot {:?} is of {}, not of {}; fork it instead",
            snapshot.id, snapshot.source_name, instance.name
        )));
    }
    let revival = target.of(snapshot.kind)?;
    let view = engine
        .restore_snapshot(&instance.id, &snapshot.id, revival)
        .await?;
    Ok(Json(answer(&view)))
}

/// Make a new instance from a snapshot
#[utoipa::path(post, path = "/snapshots/{snapshot_id}/fork", tag = "snapshots", operation_id = "forkSnapshot",
    params(("snapshot_id" = String, Path, description = "Id, or unique prefix of an id")),
    request_body = ForkSnapshotRequest,
    responses(
        (status = 201, description = "The new instance", body = Instance),
        (status = 400, description = "A field is wrong, or does not fit the snapshot's kind", body = doze_api::ErrorBody),
        (status = 404, description = "There is no such snapshot", body = doze_api::ErrorBody),
        (status = 409, description = "The name is taken, no room, or a snapshot that cannot be used", body = doze_api::ErrorBody),
    ))]
pub(super) async fn fork(
    State(state): State<AppState>,
    Segment(snapshot_id): Segment,
    query: QueryReader,
    JsonBody(request): JsonBody<ForkSnapshotRequest>,
) -> Result<(StatusCode, Json<Instance>), ApiError> {
    query.finish("none")?;
    let (name, target) = convert::snapshot::fork_snapshot(request)?;
    let engine = state.engine();
    let snapshot = engine.get_snapshot(&snapshot_id)?;
    let revival = target.of(snapshot.kind)?;
    let view = engine.fork_snapshot(&snapshot.id, name, revival).await?;
    Ok((StatusCode::CREATED, Json(answer(&view))))
}

/// Make a new instance from an instance
///
/// The source goes on undisturbed; a running one is paused for the moment of the copy, and only with `from_running`.
#[utoipa::path(post, path = "/instances/{id}/fork", tag = "snapshots", operation_id = "forkInstance",
    params(("id" = String, Path, description = "Id, name, or unique prefix of an id")),
    request_body = ForkInstanceRequest,
    responses(
        (status = 201, description = "The new instance", body = Instance),
        (status = 400, description = "A field is wrong", body = doze_api::ErrorBody),
        (status = 404, description = "There is no such instance", body = doze_api::ErrorBody),
        (status = 409, description = "Not in this state or to this one, the name is taken, or no room", body = doze_api::ErrorBody),
    ))]
pub(super) async fn fork_instance(
    State(state): State<AppState>,
    Segment(id): Segment,
    query: QueryReader,
    JsonBody(request): JsonBody<ForkInstanceRequest>,
) -> Result<(StatusCode, Json<Instance>), ApiError> {
    query.finish("none")?;
    let request = convert::snapshot::fork_instance(request)?;
    let engine = state.engine();
    let source = engine.get(&id)?;
    convert::snapshot::fits_source(request.target, source.state())?;
    let view = engine.fork(&source.id, request).await?;
    Ok((StatusCode::CREATED, Json(answer(&view))))
}

fn answer(view: &InstanceView) -> Instance {
    convert::instance::instance(view, &doze_engine::now())
}

/// A snapshot with the disk it holds at this moment: deleting a file it shares with makes it hold more alone, and
/// nothing else says so.
pub(super) async fn measured(
    engine: &Engine,
    snapshot: &doze_engine::Snapshot,
) -> Result<Snapshot, EngineError> {
    let allocated = engine.snapshot_allocated(&snapshot.id).await?;
    Ok(convert::snapshot::snapshot(snapshot, allocated))
}
