//! Who may call: everybody with a token, and everybody at all for `GET /health`.
use axum::{
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{AppState, errors::ApiError};
use crate::secret::Refused;

/// Paths that answer without a token.
const OPEN_PATHS: [&str; 1] = ["/health"];

/// Refuses a request without a good token before anything looks at it. The answer is the same
/// whether the path exists or not. It never says what was wrong with a token, except its expiry and a
/// claim that this server does not understand: both stand in the token, for its holder to read.
pub(super) async fn require_token(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    if OPEN_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    match check(&state, &request) {
        Ok(subject) => {
            if let Some(subject) = subject {
                tracing::Span::current().record("subject", subject);
            }
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

fn unauthorized(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
}

fn check(state: &AppState, request: &Request) -> Result<Option<String>, ApiError> {
    let value = request
        .headers()
        .get(header::AUTHORIZATION)
        .ok_or_else(|| {
            unauthorized(
                "no token; send the header Authorization: Bearer <JWT> (doze token prints one)",
            )
        })?;
    let token = value
        .to_str()
        .ok()
        .and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        })
        .ok_or_else(|| unauthorized("the Authorization header is not Bearer <JWT>"))?;
    state
        .verifier()
        .verify(token)
        .map(|claims| claims.sub)
        .map_err(|error| match error {
            Refused::Claim { .. } => {
                ApiError::new(StatusCode::FORBIDDEN, "forbidden", error.to_string())
            }
            Refused::Invalid(error) => match error.kind() {
                jsonwebtoken::errors::ErrorKind::ExpiredSignature => {
                    unauthorized("the token has expired; doze token prints a new one")
                }
                _ => unauthorized("the token is not good on this server"),
            },
        })
}
