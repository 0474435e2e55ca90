//! Who may call: everybody with a token, and everybody at all for `GET /health`.
use axum::{
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::{AppState, errors::ApiError};

/// Paths that answer without a token.
const OPEN_PATHS: [&str; 1] = ["/health"];

/// Refuses a request without a good token before anything looks at it. The answer is the same
/// whether the path exists or not, and never says what of a token was wrong but its expiry, which
/// its holder can read himself.
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
        Err(message) => {
            ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message).into_response()
        }
    }
}

fn check(state: &AppState, request: &Request) -> Result<Option<String>, String> {
    let value = request
        .headers()
        .get(header::AUTHORIZATION)
        .ok_or("no token; send the header Authorization: Bearer <JWT> (doze token prints one)")?;
    let token = value
        .to_str()
        .ok()
        .and_then(|value| {
            let (scheme, token) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
        })
        .ok_or("the Authorization header is not Bearer <JWT>")?;
    state
        .verifier()
        .verify(token)
        .map(|claims| claims.sub)
        .map_err(|error| match error.kind() {
            jsonwebtoken::errors::ErrorKind::ExpiredSignature => {
                "the token has expired; doze token prints a new one".to_owned()
            }
            _ => "the token is not good on this server".to_owned(),
        })
}
