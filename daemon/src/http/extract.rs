//! Reading requests strictly: bodies, queries and path segments, with errors that say where.
use std::collections::BTreeMap;

use axum::{
    body::Bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request, rejection::PathRejection},
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use super::errors::ApiError;

/// Bytes of a JSON body at most.
pub const MAX_BODY: usize = 1 << 20;

/// A JSON body. The content type does not matter; unknown fields are refused by the types.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = body(request, state).await?;
        if bytes.trim_ascii().is_empty() {
            return Err(ApiError::bad_request(
                "the request has no body; allowed: a JSON object",
            ));
        }
        parse_json(&bytes).map(JsonBody)
    }
}

/// A JSON body that may be missing, which is the same as `{}`.
pub struct OptionalJsonBody<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for OptionalJsonBody<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = body(request, state).await?;
        match bytes.trim_ascii() {
            b"" | b"null" => Ok(OptionalJsonBody(T::default())),
            text => parse_json(text).map(OptionalJsonBody),
        }
    }
}

/// No body is expected; `{}` is what some clients send all the same.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nothing {}

async fn body<S: Send + Sync>(request: Request, state: &S) -> Result<Bytes, ApiError> {
    Bytes::from_request(request, state)
        .await
        .map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "bad_request",
                format!("the body is too large; allowed: {MAX_BODY} bytes"),
            ),
            _ => ApiError::bad_request(format!("cannot read the body: {rejection}")),
        })
}

/// Strict JSON with the position of what is malformed and the path of what is not allowed.
pub fn parse_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, ApiError> {
    // Derived types would take its elements for their fields, in the order of their declaration.
    if text.trim_ascii_start().starts_with(b"[") {
        return Err(ApiError::invalid(
            "invalid_field",
            "the body is an array; allowed: a JSON object",
        ));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value: T = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        json_error(&path, error.inner())
    })?;
    deserializer
        .end()
        .map_err(|error| json_error(".", &error))?;
    Ok(value)
}

fn json_error(path: &str, error: &serde_json::Error) -> ApiError {
    if !error.is_data() {
        return ApiError::bad_request(format!("the body is not valid JSON: {error}"));
    }
    let message = error.to_string();
    // serde's own words for the two cases that have codes of their own.
    if message.starts_with("missing field") {
        return ApiError::invalid("missing_field", located(path, &message));
    }
    ApiError::invalid("invalid_field", located(path, &message))
}

fn located(path: &str, message: &str) -> String {
    match path {
        "." | "?" => message.to_owned(),
        path => format!("{path}: {message}"),
    }
}

/// The `{id}` or `{name}` of a path, percent-decoded.
pub struct Segment(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segment {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path(segment) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection: PathRejection| {
                ApiError::bad_request(format!("the path cannot be read: {rejection}"))
            })?;
        Ok(Segment(segment))
    }
}

/// Two of them: `{id}` and `{snapshot_id}`.
pub struct Segments(pub String, pub String);

impl<S: Send + Sync> FromRequestParts<S> for Segments {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Path((first, second)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|rejection: PathRejection| {
                ApiError::bad_request(format!("the path cannot be read: {rejection}"))
            })?;
        Ok(Segments(first, second))
    }
}

/// A query as pairs, taken out one by one; what is left over is refused.
pub struct QueryReader {
    pairs: Vec<(String, String)>,
}

impl<S: Send + Sync> FromRequestParts<S> for QueryReader {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri)
            .map_err(|error| ApiError::bad_request(format!("the query cannot be read: {error}")))?;
        Ok(QueryReader { pairs })
    }
}

impl QueryReader {
    /// The text of `name`; an empty one counts as absent, a repeated one is refused.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        let mut found = self.pairs.extract_if(.., |(key, _)| key == name);
        let first = found.next().map(|(_, value)| value);
        match found.count() {
            0 => Ok(first.filter(|value| !value.is_empty())),
            more => Err(ApiError::invalid(
                "invalid_field",
                format!("{name}: given {} times; allowed: once", more + 1),
            )),
        }
    }

    /// The value of `name`, read by `read`; `allowed` completes the complaint.
    pub fn value<T>(
        &mut self,
        name: &str,
        allowed: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        read(&text).map(Some).ok_or_else(|| {
            ApiError::invalid(
                "invalid_field",
                format!("{name}: {text:?} is not allowed; allowed: {allowed}"),
            )
        })
    }

    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.value(name, "true, false", |text| match text {
            "true" | "1" => Some(true),
            "false" | "0" => Some(false),
            _ => None,
        })
    }

    /// `name[key]=value` pairs (OpenAPI's deepObject style).
    pub fn map(&mut self, name: &str) -> Result<BTreeMap<String, String>, ApiError> {
        let mut map = BTreeMap::new();
        let mut rest = Vec::new();
        for (key, value) in std::mem::take(&mut self.pairs) {
            let inner = key
                .strip_prefix(name)
                .and_then(|key| key.strip_prefix('[')?.strip_suffix(']'));
            match inner {
                None => rest.push((key, value)),
                Some(inner) => {
                    if map.insert(inner.to_owned(), value).is_some() {
                        return Err(ApiError::invalid(
                            "invalid_field",
                            format!("{key}: given more than once"),
                        ));
                    }
                }
            }
        }
        self.pairs = rest;
        Ok(map)
    }

    /// Everything was taken, or it is refused: a filter that is silently ignored does harm.
    pub fn finish(self, allowed: &str) -> Result<(), ApiError> {
        match self.pairs.first() {
            None => Ok(()),
            Some((name, _)) => Err(ApiError::invalid(
                "invalid_field",
                format!("{name}: unknown query parameter; allowed: {allowed}"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    fn query(text: &str) -> QueryReader {
        let uri: axum::http::Uri = format!("/x?{text}").parse().unwrap();
        let Query(pairs) = Query::try_from_uri(&uri).unwrap();
        QueryReader { pairs }
    }

    #[test]
    fn deep_objects_and_plain_values() {
        let mut q = query("tags%5Bteam%5D=a+b&tags[env]=%C3%BC&state=Running&follow=true&empty=");
        let tags = q.map("tags").unwrap();
        assert_eq!(tags["team"], "a b");
        assert_eq!(tags["env"], "ü");
        assert_eq!(q.text("state").unwrap().as_deref(), Some("Running"));
        assert_eq!(q.boolean("follow").unwrap(), Some(true));
        assert_eq!(q.text("empty").unwrap(), None);
        q.finish("").unwrap();
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut q = query("follow=maybe");
        assert!(
            q.boolean("follow")
                .unwrap_err()
                .body
                .message
                .contains("\"maybe\"")
        );
        let mut q = query("a=1&a=2");
        assert!(q.text("a").unwrap_err().body.message.contains("2 times"));
        let mut q = query("tags[a]=1&tags[a]=2");
        assert!(q.map("tags").is_err());
        let error = query("tag=x").finish("state, tags[KEY]").unwrap_err();
        assert!(error.body.message.starts_with("tag: unknown"));
    }

    #[test]
    fn json_errors_say_where() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "only read")]
        struct Inner {
            port: u16,
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "only read")]
        struct Outer {
            inner: Inner,
        }
        let code_and_text = |text: &str| {
            let error = parse_json::<Outer>(text.as_bytes()).unwrap_err();
            (error.body.code, error.body.message)
        };
        let (code, text) = code_and_text("{\n  \"inner\": }");
        assert_eq!(code, "bad_request");
        assert!(text.contains("line 2 column"), "{text}");
        let (code, text) = code_and_text("{\"inner\":{\"port\":1,\"prt\":2}}");
        assert_eq!(code, "invalid_field");
        assert!(text.contains("`prt`") && text.contains("inner"), "{text}");
        let (code, text) = code_and_text("{\"inner\":{}}");
        assert_eq!(code, "missing_field");
        assert!(text.contains("`port`"), "{text}");
        let (code, text) = code_and_text("{\"inner\":{\"port\":70000}}");
        assert_eq!(code, "invalid_field");
        assert!(text.starts_with("inner.port: "), "{text}");
        assert_eq!(code_and_text("{\"inner\":{\"port\":1}} x").0, "bad_request");
        let (code, text) = code_and_text(" [{\"port\":1}]");
        assert_eq!(code, "invalid_field");
        assert!(text.contains("array"), "{text}");
    }
}
