//! Fields of the contract whose effect is not built yet. Each is refused with 501 naming it, unless
//! it holds the value that means "no effect": a silently ignored policy is worse than an error.
use doze_api::{
    CreateInstanceRequest, CreateNetwork, UpdateInstanceRequest,
    policy::{HealthCheck, HealthCheckType, RestartMode, RestartPolicy},
};

use super::fields::{self, Checked};
use crate::http::errors::ApiError;

/// Everything in `request` that is refused for this reason, or malformed besides.
pub(super) fn check(request: &CreateInstanceRequest) -> Vec<ApiError> {
    let mut complaints = Vec::new();
    let mut add = |outcome: Checked<()>| complaints.extend(outcome.err());
    add(size("hotplug_size", request.hotplug_size.as_deref()));
    add(rate("disk_io_bps", request.disk_io_bps.as_deref()));
    add(empty(
        "devices",
        request.devices.as_deref().unwrap_or_default().is_empty(),
    ));
    add(empty(
        "volumes",
        request.volumes.as_deref().unwrap_or_default().is_empty(),
    ));
    add(empty(
        "credentials",
        request
            .credentials
            .as_ref()
            .is_none_or(|map| map.is_empty()),
    ));
    add(empty(
        "gpu",
        request
            .gpu
            .as_ref()
            .and_then(|gpu| gpu.profile.as_deref())
            .unwrap_or_default()
            .is_empty(),
    ));
    add(expiry(
        request.ttl.as_deref(),
        request.expires_at.as_deref(),
    ));
    add(request.health_check.as_ref().map_or(Ok(()), health_check));
    add(request
        .restart_policy
        .as_ref()
        .map_or(Ok(()), restart_policy));
    if let Some(network) = &request.network {
        complaints.extend(network_fields(network));
    }
    complaints
}

/// The same of a request that changes an instance.
pub(super) fn update(request: &UpdateInstanceRequest) -> Vec<ApiError> {
    let env = request.env.as_ref();
    [
        // It may only change what credentials are bound to, and there are none.
        empty("env", env.is_none_or(|env| env.is_empty())),
        expiry(request.ttl.as_deref(), request.expires_at.as_deref()),
        request.health_check.as_ref().map_or(Ok(()), health_check),
        (request.restart_policy.as_ref()).map_or(Ok(()), restart_policy),
    ]
    .into_iter()
    .filter_map(Result::err)
    .collect()
}

fn not_built(field: &str) -> ApiError {
    ApiError::not_implemented(format!(
        "{field}: not built yet on this server; leave it out or give it its no-effect value"
    ))
}

fn empty(field: &str, is_empty: bool) -> Checked<()> {
    match is_empty {
        true => Ok(()),
        false => Err(not_built(field)),
    }
}

fn size(field: &str, text: Option<&str>) -> Checked<()> {
    let text = text.unwrap_or_default();
    empty(
        field,
        text.is_empty() || fields::any_size(field, text)? == 0,
    )
}

fn rate(field: &str, text: Option<&str>) -> Checked<()> {
    let text = text.unwrap_or_default();
    empty(field, text.is_empty() || fields::rate(field, text)? == 0)
}

fn delay(field: &str, text: Option<&str>) -> Checked<()> {
    let text = text.unwrap_or_default();
    empty(
        field,
        text.is_empty() || fields::duration(field, text)?.is_zero(),
    )
}

fn expiry(ttl: Option<&str>, expires_at: Option<&str>) -> Checked<()> {
    if ttl.is_some() && expires_at.is_some() {
        return Err(ApiError::invalid(
            "invalid_request",
            "ttl, expires_at: both given; allowed: one of them",
        ));
    }
    delay("ttl", ttl)?;
    match expires_at {
        None => Ok(()),
        Some(text) => {
            let format = &time::format_description::well_known::Rfc3339;
            time::OffsetDateTime::parse(text, format).map_err(|_| {
                fields::invalid(
                    "invalid_field",
                    "expires_at",
                    format!("{text:?}"),
                    "an RFC 3339 time, for example 2030-01-02T15:04:05Z",
                )
            })?;
            Err(not_built("expires_at"))
        }
    }
}

fn health_check(check: &HealthCheck) -> Checked<()> {
    for (field, text) in [
        ("health_check.interval", &check.interval),
        ("health_check.timeout", &check.timeout),
        ("health_check.start_period", &check.start_period),
    ] {
        if let Some(text) = text {
            fields::duration(field, text)?;
        }
    }
    let probes = check.http.is_some() || check.tcp.is_some() || check.exec.is_some();
    let off = match check.kind {
        Some(HealthCheckType::None) => true,
        Some(HealthCheckType::Http | HealthCheckType::Tcp | HealthCheckType::Exec) => false,
        None => !probes,
    };
    empty("health_check", off)
}

fn restart_policy(policy: &RestartPolicy) -> Checked<()> {
    for (field, text) in [
        ("restart_policy.backoff", &policy.backoff),
        ("restart_policy.stable_after", &policy.stable_after),
    ] {
        if let Some(text) = text {
            fields::duration(field, text)?;
        }
    }
    let off = match policy.policy {
        None | Some(RestartMode::Never) => true,
        Some(RestartMode::Always | RestartMode::OnFailure) => false,
    };
    empty("restart_policy", off)
}

fn network_fields(network: &CreateNetwork) -> Vec<ApiError> {
    let egress = network
        .egress
        .as_ref()
        .is_some_and(|egress| egress.enabled == Some(true));
    [
        rate(
            "network.bandwidth_download",
            network.bandwidth_download.as_deref(),
        ),
        rate(
            "network.bandwidth_upload",
            network.bandwidth_upload.as_deref(),
        ),
        empty("network.egress", !egress),
    ]
    .into_iter()
    .filter_map(Result::err)
    .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn complaints(fields: &Value) -> Vec<(u16, String)> {
        let mut body = json!({"name": "a", "image": "b"});
        for (key, value) in fields.as_object().unwrap() {
            body[key] = value.clone();
        }
        let request = serde_json::from_value(body).unwrap();
        check(&request)
            .into_iter()
            .map(|error| (error.status.as_u16(), error.body.message))
            .collect()
    }

    #[test]
    fn values_without_effect_pass() {
        for fields in [
            json!({}),
            json!({"gpu": {}, "health_check": {}, "restart_policy": {}}),
            json!({"health_check": {"type": "none", "interval": "5s"}}),
            json!({"restart_policy": {"policy": "never", "max_attempts": 3}}),
            json!({"devices": [], "volumes": [], "credentials": {}, "ttl": "0s"}),
            json!({"hotplug_size": "", "disk_io_bps": "0", "gpu": {"profile": ""}}),
            json!({"network": {"egress": {"enabled": false}, "bandwidth_upload": ""}}),
            json!({"skip_kernel_headers": true}),
        ] {
            assert_eq!(complaints(&fields), [], "{fields}");
        }
    }

    #[test]
    fn values_with_effect_are_refused_by_name() {
        for (field, fields) in [
            (
                "credentials",
                json!({"credentials": {"K": {"source": {"env": "R"}, "inject": []}}}),
            ),
            ("devices", json!({"devices": ["l4"]})),
            ("disk_io_bps", json!({"disk_io_bps": "100MB/s"})),
            ("expires_at", json!({"expires_at": "2030-01-02T15:04:05Z"})),
            ("gpu", json!({"gpu": {"profile": "L40S-1Q"}})),
            (
                "health_check",
                json!({"health_check": {"type": "tcp", "tcp": {"port": 80}}}),
            ),
            (
                "health_check",
                json!({"health_check": {"http": {"port": 80}}}),
            ),
            ("hotplug_size", json!({"hotplug_size": "1GB"})),
            (
                "network.bandwidth_download",
                json!({"network": {"bandwidth_download": "1Gbps"}}),
            ),
            (
                "network.bandwidth_upload",
                json!({"network": {"bandwidth_upload": "125MB/s"}}),
            ),
            (
                "network.egress",
                json!({"network": {"egress": {"enabled": true}}}),
            ),
            (
                "restart_policy",
                json!({"restart_policy": {"policy": "on_failure"}}),
            ),
            ("ttl", json!({"ttl": "1h"})),
            (
                "volumes",
                json!({"volumes": [{"volume_id": "v", "mount_path": "/m"}]}),
            ),
        ] {
            let found = complaints(&fields);
            assert_eq!(found.len(), 1, "{fields}: {found:?}");
            assert_eq!(found[0].0, 501);
            assert!(found[0].1.starts_with(&format!("{field}: ")), "{found:?}");
        }
    }

    #[test]
    fn malformed_values_are_wrong_before_they_are_unbuilt() {
        for fields in [
            json!({"ttl": "soon"}),
            json!({"ttl": "-1s"}),
            json!({"ttl": "1h", "expires_at": "2030-01-02T15:04:05Z"}),
            json!({"expires_at": "tomorrow"}),
            json!({"hotplug_size": "big"}),
            json!({"disk_io_bps": "fast"}),
            json!({"restart_policy": {"policy": "always", "backoff": "1"}}),
        ] {
            let found = complaints(&fields);
            assert_eq!(found.len(), 1, "{fields}: {found:?}");
            assert_eq!(found[0].0, 400, "{fields}: {found:?}");
        }
    }
}
