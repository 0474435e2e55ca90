//! The one place where a failure becomes an HTTP answer.
//!
//! Every error body is the contract's `{code, message, details?, inner_error?}`. The published
//! clients retry 409 and 5xx on their own; what another try cannot mend carries
//! `x-should-retry: false`.
use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use doze_agent::client::AgentError;
use doze_api::{ErrorBody, ErrorDetail};
use doze_engine::EngineError;
use doze_image::ImageError;

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    /// Boxed: results carry it through every check, and most of them succeed.
    pub body: Box<ErrorBody>,
    /// Whether a client's automatic retry could help.
    retry: bool,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let retry = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
        Self {
            status,
            body: Box::new(ErrorBody::new(code, message)),
            retry,
        }
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// A field (of body, query or path) that is not allowed, by code.
    pub fn invalid(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    pub fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub fn not_implemented(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, "not_implemented", message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    fn dependency_missing(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "dependency_missing",
            message,
        )
        .without_retry()
    }

    fn without_retry(mut self) -> Self {
        self.retry = false;
        self
    }

    /// Several complaints in one answer; the first gives the code. `None` without any.
    pub fn all(mut complaints: Vec<ApiError>) -> Option<Self> {
        if complaints.len() <= 1 {
            return complaints.pop();
        }
        // What is wrong outranks what is merely not built.
        complaints.sort_by_key(|complaint| complaint.status == StatusCode::NOT_IMPLEMENTED);
        let details = complaints
            .iter()
            .map(|complaint| ErrorDetail {
                code: complaint.body.code.clone(),
                message: complaint.body.message.clone(),
            })
            .collect();
        let others = complaints.len() - 1;
        let mut first = complaints.swap_remove(0);
        let plural = if others == 1 { "" } else { "s" };
        first.body.message = format!("{} (and {others} more problem{plural})", first.body.message);
        first.body.details = details;
        Some(first)
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.status.as_u16(), self.body)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(&self.body)).into_response();
        let headers = response.headers_mut();
        let retried_by_clients =
            self.status == StatusCode::CONFLICT || self.status.is_server_error();
        if retried_by_clients && !self.retry {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"doze\""),
            );
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        let answer = match error {
            EngineError::NotFound { .. } | EngineError::ImageNotFound { .. } => {
                ApiError::not_found(message)
            }
            EngineError::Ambiguous { .. } | EngineError::Interrupted { .. } => {
                ApiError::conflict("conflict", message)
            }
            EngineError::NameTaken { .. } | EngineError::SnapshotNameTaken { .. } => {
                ApiError::conflict("name_conflict", message)
            }
            EngineError::InvalidField { code, .. } => ApiError::invalid(code, message),
            EngineError::InvalidState { .. } | EngineError::Asleep { .. } => {
                ApiError::conflict("invalid_state", message)
            }
            EngineError::BrokenStream { .. } => ApiError::invalid("invalid_request", message),
            EngineError::NotImportable { .. } => ApiError::conflict("conflict", message),
            EngineError::Snapshot { .. } => ApiError::conflict("conflict", message),
            EngineError::ImageInUse { .. } => ApiError::conflict("in_use", message),
            EngineError::Capacity { .. } => ApiError::conflict("insufficient_capacity", message),
            EngineError::DependencyMissing { .. } => ApiError::dependency_missing(message),
            EngineError::NotImplemented { .. } => ApiError::not_implemented(message),
            EngineError::Agent(error) => error.into(),
            EngineError::Image(error) => error.into(),
            EngineError::ShuttingDown => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "internal_error", message)
            }
            EngineError::Internal { .. } => ApiError::internal(message),
        };
        answer.logged()
    }
}

impl From<AgentError> for ApiError {
    fn from(error: AgentError) -> Self {
        let message = error.to_string();
        match error {
            AgentError::Refused(_) => ApiError::invalid("invalid_request", message),
            AgentError::Unavailable(_) => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "internal_error", message)
            }
            AgentError::Timeout(_) => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "internal_error", message)
            }
            // The command may have run: an automatic second one could do harm.
            AgentError::Lost => {
                ApiError::new(StatusCode::BAD_GATEWAY, "internal_error", message).without_retry()
            }
        }
    }
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        let message = chain(&error);
        match error {
            ImageError::Reference(_) => ApiError::invalid("invalid_name", message),
            ImageError::NotFound(_) => ApiError::not_found(message),
            ImageError::Digest { .. } | ImageError::Unsafe { .. } | ImageError::Format { .. } => {
                ApiError::invalid("invalid_request", message)
            }
            ImageError::Platform { .. } => ApiError::invalid("invalid_platform", message),
            ImageError::Missing { .. } => ApiError::dependency_missing(message),
            ImageError::Io { .. } => ApiError::internal(message),
        }
    }
}

impl ApiError {
    /// The server's own failures belong into its log as well. A guest that does not answer (502 to
    /// 504) is its user's business.
    fn logged(self) -> Self {
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(code = %self.body.code, "{}", self.body.message);
        }
        self
    }
}

/// The message and what it stems from; our errors never repeat their source.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    fn retry_header(error: ApiError) -> Option<HeaderValue> {
        error.into_response().headers().get(&SHOULD_RETRY).cloned()
    }

    #[test]
    fn clients_do_not_retry_what_cannot_change() {
        for error in [
            ApiError::conflict("conflict", ""),
            ApiError::not_implemented(""),
            ApiError::dependency_missing(""),
            ApiError::from(AgentError::Lost),
        ] {
            assert_eq!(retry_header(error.clone()).unwrap(), "false", "{error}");
        }
        for error in [ApiError::internal(""), ApiError::bad_request("")] {
            assert_eq!(retry_header(error), None);
        }
    }

    #[test]
    fn engine_errors_have_their_status_and_code() {
        let named = |id: &str| EngineError::NotFound {
            what: "instance",
            id: id.to_owned(),
        };
        let cases = [
            (named("x"), 404, "not_found"),
            (
                EngineError::Ambiguous {
                    prefix: "a".to_owned(),
                    matches: vec!["ab".to_owned(), "ac".to_owned()],
                },
                409,
                "conflict",
            ),
            (
                EngineError::NameTaken {
                    name: "n".to_owned(),
                    holder: "id".to_owned(),
                },
                409,
                "name_conflict",
            ),
            (
                EngineError::InvalidField {
                    code: "invalid_size",
                    field: "size".to_owned(),
                    value: "1".to_owned(),
                    allowed: "more".to_owned(),
                },
                400,
                "invalid_size",
            ),
            (
                EngineError::Capacity {
                    resource: "memory",
                    wanted: "2".to_owned(),
                    available: "1".to_owned(),
                    limit: "limits.max_total_memory".to_owned(),
                },
                409,
                "insufficient_capacity",
            ),
            (
                EngineError::DependencyMissing {
                    what: "no QEMU".to_owned(),
                    mend: "install it".to_owned(),
                },
                500,
                "dependency_missing",
            ),
            (EngineError::ShuttingDown, 503, "internal_error"),
            (
                EngineError::Image(ImageError::NotFound("x".to_owned())),
                404,
                "not_found",
            ),
        ];
        for (error, status, code) in cases {
            let text = error.to_string();
            let answer = ApiError::from(error);
            assert_eq!(
                (answer.status.as_u16(), answer.body.code.as_str()),
                (status, code),
                "{text}"
            );
            assert_eq!(answer.body.message, text);
        }
    }

    #[test]
    fn several_complaints_stand_in_one_answer() {
        assert_eq!(ApiError::all(vec![]), None);
        let one = ApiError::invalid("invalid_name", "a");
        assert_eq!(ApiError::all(vec![one.clone()]), Some(one.clone()));
        let both = ApiError::all(vec![ApiError::not_implemented("b"), one]).unwrap();
        assert_eq!(both.status, StatusCode::BAD_REQUEST);
        assert_eq!(both.body.code, "invalid_name");
        assert_eq!(both.body.message, "a (and 1 more problem)");
        assert_eq!(both.body.details.len(), 2);
    }
}
