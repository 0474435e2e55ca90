//! From the first frame of an exec session to the engine's request.
use std::time::Duration;

use doze_agent::message::ExecRequest;
use doze_api::ExecStart;

use super::fields::{self, Checked};
use crate::http::errors::ApiError;

/// Nobody waits longer than this for a guest to boot.
const MAX_WAIT_SECONDS: u32 = 300;

/// The request, and how long to wait for the guest's agent.
pub(crate) fn exec(start: ExecStart) -> Checked<(ExecRequest, Duration)> {
    if start.command.first().is_none_or(String::is_empty) {
        return Err(ApiError::invalid(
            "invalid_field",
            "command: empty; allowed: a program and its arguments",
        ));
    }
    fields::words("command", &start.command)?;
    let env = start.env.unwrap_or_default();
    if let Some(error) = ApiError::all(fields::environment("env", &env)) {
        return Err(error);
    }
    if let Some(cwd) = &start.cwd
        && (!cwd.starts_with('/') || cwd.contains('\0'))
    {
        return Err(fields::invalid(
            "invalid_field",
            "cwd",
            format!("{cwd:?}"),
            "an absolute path",
        ));
    }
    for (field, value) in [("rows", start.rows), ("cols", start.cols)] {
        match value {
            Some(0) => return Err(fields::invalid("invalid_field", field, 0, "1 and more")),
            Some(_) if !start.tty => {
                return Err(ApiError::invalid(
                    "invalid_field",
                    format!("{field}: only a tty has it; set tty to true"),
                ));
            }
            Some(_) | None => {}
        }
    }
    let wait = start.wait_for_agent.unwrap_or(0).min(MAX_WAIT_SECONDS);
    let request = ExecRequest {
        command: start.command,
        tty: start.tty,
        env: env.into_iter().collect(),
        cwd: start.cwd,
        timeout_ms: start
            .timeout
            .filter(|seconds| *seconds > 0)
            .map(|seconds| u64::from(seconds) * 1000),
        rows: start.rows,
        cols: start.cols,
    };
    Ok((request, Duration::from_secs(u64::from(wait))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::json;

    use super::*;

    fn convert(frame: serde_json::Value) -> Checked<(ExecRequest, Duration)> {
        exec(crate::http::extract::parse_json(
            frame.to_string().as_bytes(),
        )?)
    }

    #[test]
    fn everything_arrives() {
        let (request, wait) = convert(json!({
            "command": ["sh", "-c", "x"], "tty": true, "env": {"A": "b"}, "cwd": "/tmp",
            "timeout": 3, "wait_for_agent": 9, "rows": 24, "cols": 80,
        }))
        .unwrap();
        assert_eq!(request.command, ["sh", "-c", "x"]);
        assert_eq!(request.env, [("A".to_owned(), "b".to_owned())]);
        assert_eq!(request.timeout_ms, Some(3000));
        assert_eq!((request.rows, request.cols), (Some(24), Some(80)));
        assert_eq!(wait, Duration::from_secs(9));
    }

    #[test]
    fn no_timeout_is_none_and_waits_are_bounded() {
        let (request, wait) =
            convert(json!({"command": ["a"], "timeout": 0, "wait_for_agent": 100000})).unwrap();
        assert_eq!(request.timeout_ms, None);
        assert_eq!(wait, Duration::from_secs(300));
    }

    #[test]
    fn bad_frames_are_refused_by_field() {
        for (frame, field) in [
            (json!({}), "command"),
            (json!({"command": []}), "command"),
            (json!({"command": [""]}), "command"),
            (json!({"command": ["a\0"]}), "command"),
            (json!({"command": "a"}), "command"),
            (json!({"command": ["a"], "stdin": true}), "stdin"),
            (json!({"command": ["a"], "cwd": "x"}), "cwd"),
            (json!({"command": ["a"], "env": {"": "x"}}), "env"),
            (json!({"command": ["a"], "rows": 1}), "rows"),
            (json!({"command": ["a"], "tty": true, "cols": 0}), "cols"),
            (json!({"command": ["a"], "timeout": -1}), "timeout"),
        ] {
            let error = convert(frame.clone()).unwrap_err();
            assert!(error.body.message.contains(field), "{frame}: {error}");
        }
    }
}
