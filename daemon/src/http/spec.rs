//! `GET /spec.yaml`, `GET /spec.json`: the OpenAPI document of this server, rendered once.
use anyhow::Context;
use axum::{extract::State, http::header, response::IntoResponse};
use bytes::Bytes;

use super::AppState;

/// The document in both forms.
pub(super) struct Documents {
    yaml: Bytes,
    json: Bytes,
}

impl Documents {
    pub(super) fn new(document: &utoipa::openapi::OpenApi) -> anyhow::Result<Self> {
        let json = document
            .to_pretty_json()
            .context("render the OpenAPI document")?;
        Ok(Self {
            yaml: super::openapi::yaml(document)?.into(),
            json: json.into(),
        })
    }
}

/// This document as YAML
#[utoipa::path(get, path = "/spec.yaml", tag = "server", operation_id = "getSpecYaml",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/yaml", body = String)))]
pub(super) async fn yaml(State(state): State<AppState>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/yaml")],
        state.inner.spec.yaml.clone(),
    )
}

/// This document as JSON
#[utoipa::path(get, path = "/spec.json", tag = "server", operation_id = "getSpecJson",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json", body = String)))]
pub(super) async fn json(State(state): State<AppState>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        state.inner.spec.json.clone(),
    )
}
