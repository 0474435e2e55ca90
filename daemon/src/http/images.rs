//! Images: list, look, delete. Names travel percent-encoded in one path segment.
use axum::{Json, Router, extract::State, http::StatusCode, routing};
use doze_api::Image;

use super::{
    AppState,
    errors::ApiError,
    extract::{QueryReader, Segment},
};
use crate::convert;

/// List images
#[utoipa::path(get, path = "/images", tag = "images", operation_id = "listImages",
    params(("tags" = Option<std::collections::BTreeMap<String, String>>, Query, style = DeepObject, explode,
        description = "Only those with all of these tags: `?tags[team]=backend&tags[env]=x`")),
    responses((status = 200, description = "Sorted by name", body = Vec<Image>)))]
pub(super) async fn list(
    State(state): State<AppState>,
    mut query: QueryReader,
) -> Result<Json<Vec<Image>>, ApiError> {
    let tags = query.map("tags")?;
    query.finish("tags[KEY]")?;
    let images = state
        .engine()
        .image_list()
        .await?
        .into_iter()
        .filter(|image| {
            tags.iter()
                .all(|(key, value)| image.tags.get(key) == Some(value))
        })
        .map(convert::image::image)
        .collect();
    Ok(Json(images))
}

/// Look at an image
#[utoipa::path(get, path = "/images/{name}", tag = "images", operation_id = "getImage",
    params(("name" = String, Path, description = "Any equivalent form of the name, percent-encoded")),
    responses(
        (status = 200, description = "The image", body = Image),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
    ))]
pub(super) async fn get(
    State(state): State<AppState>,
    Segment(name): Segment,
    query: QueryReader,
) -> Result<Json<Image>, ApiError> {
    query.finish("none")?;
    look(&state, &name).await
}

/// Delete an image
#[utoipa::path(delete, path = "/images/{name}", tag = "images", operation_id = "deleteImage",
    params(("name" = String, Path, description = "Any equivalent form of the name, percent-encoded")),
    responses(
        (status = 204, description = "The name is gone, and its content if nothing else needs it"),
        (status = 404, description = "There is none", body = doze_api::ErrorBody),
        (status = 409, description = "An instance uses it", body = doze_api::ErrorBody),
    ))]
pub(super) async fn delete(
    State(state): State<AppState>,
    Segment(name): Segment,
    query: QueryReader,
) -> Result<StatusCode, ApiError> {
    query.finish("none")?;
    remove(&state, &name).await
}

async fn look(state: &AppState, name: &str) -> Result<Json<Image>, ApiError> {
    let image = state.engine().image_get(name).await?;
    Ok(Json(convert::image::image(image)))
}

async fn remove(state: &AppState, name: &str) -> Result<StatusCode, ApiError> {
    state.engine().image_delete(name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /images/import` takes the path of an image that is called `import`; here it gets its look
/// and its delete back.
pub(super) fn shadowed() -> Router<AppState> {
    let get = |State(state): State<AppState>| async move { look(&state, "import").await };
    let delete = |State(state): State<AppState>| async move { remove(&state, "import").await };
    Router::new().route("/images/import", routing::get(get).delete(delete))
}
