#![allow(clippy::unwrap_used, reason = "tests")]
use serde_json::{Value, json};

use super::*;

fn form(body: Value) -> Result<Value, Vec<(String, String)>> {
    let read = serde_json::from_value(body).unwrap();
    policy(&read)
        .map(|policy| serde_json::to_value(shown(&policy)).unwrap())
        .map_err(|errors| {
            let pair = |e: ApiError| (e.body.code.clone(), e.body.message.clone());
            errors.into_iter().map(pair).collect()
        })
}

#[test]
fn a_policy_has_one_form() {
    let written = json!({
        "enabled": true, "idle_timeout": "90s", "max_flow_idle": "1h",
        "ignore_source_cidrs": ["192.168.7.9/16", "10.0.0.0/8", "192.168.0.0/16"],
        "ignore_destination_ports": [9100, 22, 9100],
    });
    let canonical = json!({
        "enabled": true, "idle_timeout": "1m30s", "max_flow_idle": "1h0m0s",
        "ignore_source_cidrs": ["10.0.0.0/8", "192.168.0.0/16"],
        "ignore_destination_ports": [22, 9100],
    });
    assert_eq!(form(written), Ok(canonical.clone()));
    assert_eq!(form(canonical.clone()), Ok(canonical));
}

#[test]
fn a_disabled_one_drops_the_rest() {
    for body in [
        json!({}),
        json!({"enabled": false, "idle_timeout": "5m", "ignore_destination_ports": [0]}),
        json!({"idle_timeout": "soon"}),
    ] {
        assert_eq!(form(body), Ok(json!({"enabled": false})));
    }
}

#[test]
fn what_is_wrong_is_named_and_all_of_it() {
    let wrong = json!({
        "enabled": true, "idle_timeout": "5", "ignore_source_cidrs": ["10.0.0.1", "::/129"],
        "ignore_destination_ports": [80, 0], "max_flow_idle": "0s",
    });
    let errors = form(wrong).unwrap_err();
    assert_eq!(errors.len(), 5, "{errors:?}");
    for (field, (code, message)) in [
        "auto_standby.idle_timeout",
        "auto_standby.ignore_source_cidrs[0]",
        "auto_standby.ignore_source_cidrs[1]",
        "auto_standby.ignore_destination_ports[1]",
        "auto_standby.max_flow_idle",
    ]
    .iter()
    .zip(&errors)
    {
        assert_eq!(code, "invalid_field");
        assert!(message.starts_with(field), "{message}");
    }
    for (body, code) in [
        (json!({"enabled": true}), "missing_field"),
        (
            json!({"enabled": true, "idle_timeout": "0s"}),
            "invalid_field",
        ),
        (
            json!({"enabled": true, "idle_timeout": "-5m"}),
            "invalid_field",
        ),
    ] {
        let errors = form(body).unwrap_err();
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert_eq!(errors[0].0, code);
        assert!(
            errors[0].1.contains("auto_standby.idle_timeout"),
            "{errors:?}"
        );
    }
}

#[test]
fn an_update_is_applied_whole_or_not_at_all() {
    let read = |body: Value| update(serde_json::from_value(body).unwrap());
    assert_eq!(
        read(json!({"auto_standby": {"enabled": false}})),
        Ok(Some(Policy::Disabled))
    );
    assert_eq!(read(json!({"ttl": "0s", "env": {}})), Ok(None));
    let on = json!({"enabled": true, "idle_timeout": "1m"});
    for (body, status, code) in [
        (json!({}), 400, "invalid_request"),
        (
            json!({"auto_standby": {"enabled": true}}),
            400,
            "missing_field",
        ),
        (
            json!({"auto_standby": on, "ttl": "1h"}),
            501,
            "not_implemented",
        ),
        (
            json!({"auto_standby": on, "env": {"A": "b"}}),
            501,
            "not_implemented",
        ),
        (
            json!({"auto_standby": on, "expires_at": "2030-01-02T15:04:05Z"}),
            501,
            "not_implemented",
        ),
        (
            json!({"auto_standby": on, "expires_at": "soon"}),
            400,
            "invalid_field",
        ),
        (
            json!({"auto_standby": on, "health_check": {"type": "tcp", "tcp": {"port": 1}}}),
            501,
            "not_implemented",
        ),
        (
            json!({"auto_standby": on, "restart_policy": {"policy": "always"}}),
            501,
            "not_implemented",
        ),
    ] {
        let error = read(body.clone()).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.body.code.as_str()),
            (status, code),
            "{body}"
        );
    }
}
