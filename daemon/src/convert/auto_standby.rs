//! Automatic standby between the wire and the engine.
use std::time::Duration;

use doze_api::{
    AutoStandbyReason, AutoStandbyState, AutoStandbyStatus, AwakeBecause, UpdateInstanceRequest,
    policy::AutoStandbyPolicy,
};
use doze_engine::{Reason, Status, StatusWord};
use doze_host::conntrack::policy::{EnabledPolicy, Policy, PolicyError, PolicyInput};
use doze_lifecycle::duration::GoDuration;

use super::{fields::Checked, instance::timestamp, unbuilt};
use crate::http::errors::ApiError;

/// A policy in its one form. All that is wrong with it comes at once.
pub(crate) fn policy(policy: &AutoStandbyPolicy) -> Result<Policy, Vec<ApiError>> {
    if policy.enabled != Some(true) {
        return Ok(Policy::Disabled);
    }
    let mut complaints = Vec::new();
    let mut read = |field: &str, text: &Option<String>| {
        let text = text.as_deref()?;
        duration(field, text)
            .map_err(|error| complaints.push(error))
            .ok()
    };
    let idle_timeout = read("idle_timeout", &policy.idle_timeout);
    let max_flow_idle = read("max_flow_idle", &policy.max_flow_idle);
    let unreadable = policy.idle_timeout.is_some() && idle_timeout.is_none();
    let input = PolicyInput {
        enabled: true,
        idle_timeout,
        ignore_source_cidrs: policy.ignore_source_cidrs.clone().unwrap_or_default(),
        ignore_destination_ports: policy.ignore_destination_ports.clone().unwrap_or_default(),
        max_flow_idle,
    };
    match input.normalise() {
        Ok(policy) if complaints.is_empty() => return Ok(policy),
        Ok(_) => {}
        Err(errors) => complaints.extend(
            errors
                .into_iter()
                // One complaint about a field is enough.
                .filter(|error| !(unreadable && *error == PolicyError::NoIdleTimeout))
                .map(complaint),
        ),
    }
    Err(complaints)
}

/// A negative one is as little a timeout as none at all.
fn duration(field: &str, text: &str) -> Checked<Duration> {
    let parsed = doze_lifecycle::duration::parse(text).map_err(|error| {
        ApiError::invalid("invalid_field", format!("auto_standby.{field}: {error}"))
    })?;
    Ok(parsed.to_std().unwrap_or(Duration::ZERO))
}

fn complaint(error: PolicyError) -> ApiError {
    let code = match error {
        PolicyError::NoIdleTimeout => "missing_field",
        PolicyError::NotPositive(_) | PolicyError::Cidr { .. } | PolicyError::PortZero(_) => {
            "invalid_field"
        }
    };
    ApiError::invalid(code, error.to_string())
}

/// What a request to change an instance asks for. `None`: nothing that has an effect.
pub(crate) fn update(request: UpdateInstanceRequest) -> Checked<Option<Policy>> {
    if request == UpdateInstanceRequest::default() {
        return Err(ApiError::invalid(
            "invalid_request",
            "the body changes nothing; allowed: at least one of auto_standby, env, expires_at, \
             health_check, restart_policy, ttl",
        ));
    }
    let mut complaints = unbuilt::update(&request);
    let mut wanted = None;
    if let Some(found) = &request.auto_standby {
        match policy(found) {
            Ok(policy) => wanted = Some(policy),
            Err(found) => complaints.extend(found),
        }
    }
    match ApiError::all(complaints) {
        Some(error) => Err(error),
        None => Ok(wanted),
    }
}

/// As instances show it.
pub(crate) fn shown(policy: &Policy) -> AutoStandbyPolicy {
    match policy {
        Policy::Disabled => AutoStandbyPolicy {
            enabled: Some(false),
            ..AutoStandbyPolicy::default()
        },
        Policy::Enabled(policy) => enabled(policy),
    }
}

fn enabled(policy: &EnabledPolicy) -> AutoStandbyPolicy {
    let cidrs = policy.ignore_source_cidrs.iter();
    let filled = |list: Vec<String>| (!list.is_empty()).then_some(list);
    AutoStandbyPolicy {
        enabled: Some(true),
        idle_timeout: Some(go(policy.idle_timeout)),
        ignore_source_cidrs: filled(cidrs.map(ToString::to_string).collect()),
        ignore_destination_ports: (!policy.ignore_destination_ports.is_empty())
            .then(|| policy.ignore_destination_ports.clone()),
        max_flow_idle: policy.max_flow_idle.map(go),
    }
}

/// Beyond what Go can say: the longest it can.
pub(super) fn go(duration: Duration) -> String {
    GoDuration(i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)).to_string()
}

pub(crate) fn status(status: Status) -> AutoStandbyStatus {
    AutoStandbyStatus {
        status: state(status.status),
        reason: reason(status.reason),
        supported: status.supported,
        configured: status.configured,
        enabled: status.enabled,
        eligible: status.eligible,
        tracking_mode: status.tracking_mode.to_owned(),
        active_inbound_connections: status.active_inbound_connections,
        awake_because: status.awake_because.into_iter().map(awake).collect(),
        observer_error: status.observer_error,
        idle_timeout: status.idle_timeout.map(go),
        idle_since: status.idle_since_us.map(timestamp),
        last_inbound_activity_at: status.last_inbound_activity_us.map(timestamp),
        countdown_remaining: status.countdown_remaining.map(go),
        next_standby_at: status.next_standby_us.map(timestamp),
        hold_until: status.hold_until_us.map(timestamp),
    }
}

fn state(word: StatusWord) -> AutoStandbyState {
    match word {
        StatusWord::Unsupported => AutoStandbyState::Unsupported,
        StatusWord::Disabled => AutoStandbyState::Disabled,
        StatusWord::Ineligible => AutoStandbyState::Ineligible,
        StatusWord::Active => AutoStandbyState::Active,
        StatusWord::IdleCountdown => AutoStandbyState::IdleCountdown,
        StatusWord::ReadyForStandby => AutoStandbyState::ReadyForStandby,
        StatusWord::StandbyRequested => AutoStandbyState::StandbyRequested,
        StatusWord::Error => AutoStandbyState::Error,
    }
}

fn reason(reason: Reason) -> AutoStandbyReason {
    match reason {
        Reason::UnsupportedPlatform => AutoStandbyReason::UnsupportedPlatform,
        Reason::PolicyMissing => AutoStandbyReason::PolicyMissing,
        Reason::PolicyDisabled => AutoStandbyReason::PolicyDisabled,
        Reason::InstanceNotRunning => AutoStandbyReason::InstanceNotRunning,
        Reason::NetworkDisabled => AutoStandbyReason::NetworkDisabled,
        Reason::MissingIp => AutoStandbyReason::MissingIp,
        Reason::ActiveInboundConnections => AutoStandbyReason::ActiveInboundConnections,
        Reason::IdleTimeoutNotElapsed => AutoStandbyReason::IdleTimeoutNotElapsed,
        Reason::ObserverError => AutoStandbyReason::ObserverError,
        Reason::ReadyForStandby => AutoStandbyReason::ReadyForStandby,
    }
}

fn awake(because: doze_engine::AwakeBecause) -> AwakeBecause {
    match because {
        doze_engine::AwakeBecause::InboundConnections => AwakeBecause::InboundConnections,
        doze_engine::AwakeBecause::ExecSessions => AwakeBecause::ExecSessions,
    }
}

#[cfg(test)]
mod tests;
