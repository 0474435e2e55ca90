//! What the OpenAPI document says about the server as a whole.
use anyhow::Context;
use doze_api::{
    EndOfInputFrame, ErrorBody, ExecExit, ExecStart, ImportEvent, LogSource, ResizeFrame,
};
use utoipa::{
    OpenApi,
    openapi::{
        self, ContentBuilder, OpenApiVersion, RefOr, ResponseBuilder,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

/// A body that is bytes: an image's archive, an exported snapshot.
#[derive(utoipa::ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "only described")]
pub(super) struct Octets(Vec<u8>);

#[derive(OpenApi)]
#[openapi(
    info(
        title = "doze",
        description = "Runs OCI images as microVMs. Follows the hypeman API; what this server adds and what it does not serve yet is listed in docs/api.md.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "http://localhost:4973", description = "The default address")),
    tags(
        (name = "instances", description = "microVMs and what runs in them"),
        (name = "snapshots", description = "Moments of an instance: kept, restored, forked, taken on a schedule"),
        (name = "images", description = "OCI images on this host"),
        (name = "server", description = "The server itself")
    ),
    components(schemas(ErrorBody, ExecStart, ResizeFrame, EndOfInputFrame, ExecExit, ImportEvent, LogSource)),
    security(("bearer" = []))
)]
struct Document;

/// The document without its operations.
pub(super) fn base() -> openapi::OpenApi {
    let mut document = Document::openapi();
    document.openapi = OpenApiVersion::Version31;
    document.info.version = doze_api::CONTRACT_VERSION.to_owned();
    let scheme = SecurityScheme::Http(
        HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("JWT")
            .description(Some("HS256; `doze token` prints one"))
            .build(),
    );
    document
        .components
        .get_or_insert_default()
        .add_security_scheme("bearer", scheme);
    document
}

/// Adds what every operation has in common: any other answer is the error body.
pub(super) fn finish(document: &mut openapi::OpenApi) {
    let error = ResponseBuilder::new()
        .description("Any other outcome")
        .content(
            "application/json",
            ContentBuilder::new()
                .schema(Some(openapi::Ref::from_schema_name("Error")))
                .build(),
        )
        .build();
    for path in document.paths.paths.values_mut() {
        for operation in [
            &mut path.get,
            &mut path.put,
            &mut path.post,
            &mut path.delete,
            &mut path.patch,
        ]
        .into_iter()
        .flatten()
        {
            operation
                .responses
                .responses
                .insert("default".to_owned(), RefOr::T(error.clone()));
        }
    }
}

pub(super) fn yaml(document: &openapi::OpenApi) -> anyhow::Result<String> {
    document.to_yaml().context("render the OpenAPI document")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::path::Path;

    use crate::http::document;

    /// The API is code; the document beside it must say the same. `UPDATE_OPENAPI=1` rewrites it.
    #[test]
    fn the_checked_in_document_is_current() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi/doze.yaml");
        let current = super::yaml(&document()).unwrap();
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(&path, &current).unwrap();
        }
        let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            checked_in == current,
            "openapi/doze.yaml is stale; run UPDATE_OPENAPI=1 cargo test -p doze-daemon openapi"
        );
    }

    #[test]
    fn it_is_openapi_3_1_of_the_contract() {
        let document = serde_json::to_value(document()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], doze_api::CONTRACT_VERSION);
        assert_eq!(
            document["paths"]["/health"]["get"]["security"],
            serde_json::json!([])
        );
        assert_eq!(document["security"], serde_json::json!([{"bearer": []}]));
    }

    /// Every `$ref` leads somewhere.
    #[test]
    fn references_resolve() {
        let document = serde_json::to_value(document()).unwrap();
        let mut stack = vec![&document];
        let mut count = 0;
        while let Some(value) = stack.pop() {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(target) = map.get("$ref").and_then(|v| v.as_str()) {
                        let pointer = target.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{target}");
                        count += 1;
                    }
                    stack.extend(map.values());
                }
                serde_json::Value::Array(items) => stack.extend(items),
                _ => {}
            }
        }
        assert!(count > 20, "{count} references");
    }
}
