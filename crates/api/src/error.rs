//! The body of every answer that is not a success.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Error answer. `code` is for programs, `message` for people: it names the field, the value given
/// and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Error)]
pub struct ErrorBody {
    /// Machine-readable code, for example `not_found`.
    #[schema(example = "not_found")]
    pub code: String,
    /// Human-readable description.
    #[schema(example = "instance \"web\" does not exist")]
    pub message: String,
    /// Every single complaint, when there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub details: Vec<ErrorDetail>,
    /// What caused this error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner_error: Option<ErrorDetail>,
}

/// One complaint of an [`ErrorBody`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    pub code: String,
    pub message: String,
}

impl ErrorBody {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: code.into(),
            message: message.into(),
            details: Vec::new(),
            inner_error: None,
        }
    }
}

impl std::fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}
