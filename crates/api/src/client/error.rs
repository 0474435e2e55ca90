//! What a call can fail with.
use crate::ErrorBody;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered with an error.
    #[error("{body}")]
    Api {
        /// HTTP status.
        status: u16,
        body: ErrorBody,
    },
    #[error("server address {url:?}: {reason}; allowed: http://host[:port][/prefix]")]
    BaseUrl { url: String, reason: String },
    /// An id or name that cannot stand in a path.
    #[error("{0:?} cannot be an id or a name")]
    Segment(String),
    /// No answer: refused, unreachable, broken off.
    #[error("{context}: {reason}")]
    Transport { context: String, reason: String },
    /// An answer that the contract does not allow.
    #[error("{context}: {reason}")]
    Protocol { context: String, reason: String },
    /// The exec session ended without an exit code.
    #[error("the command's connection closed: {0}")]
    ExecClosed(String),
    /// What was to be uploaded could not be read.
    #[error("read the upload")]
    Upload(#[source] std::io::Error),
}

impl ClientError {
    /// HTTP status of an error answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            ClientError::Api { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Code of an error answer, for example `not_found`.
    pub fn code(&self) -> Option<&str> {
        match self {
            ClientError::Api { body, .. } => Some(&body.code),
            _ => None,
        }
    }

    /// An error answer; a body that is not the contract's (a proxy's page) is quoted.
    pub(super) fn api(status: u16, body: &[u8]) -> Self {
        let body = serde_json::from_slice(body).unwrap_or_else(|_| {
            let text: String = String::from_utf8_lossy(body).chars().take(200).collect();
            ErrorBody::new(
                "internal_error",
                format!("HTTP {status} without an error body: {text:?}"),
            )
        });
        ClientError::Api { status, body }
    }

    /// The innermost cause says most ("Connection refused"); the outer layers repeat each other.
    pub(super) fn transport(
        context: impl Into<String>,
        error: impl std::error::Error + 'static,
    ) -> Self {
        let mut cause: &dyn std::error::Error = &error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        ClientError::Transport {
            context: context.into(),
            reason: cause.to_string(),
        }
    }
}
