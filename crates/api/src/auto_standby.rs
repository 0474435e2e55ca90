//! Automatic standby: its status, and the request that changes the policy.
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::policy::{AutoStandbyPolicy, HealthCheck, RestartPolicy};

/// Body of `PATCH /instances/{id}`; what is absent stays as it is, all of it is applied or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateInstanceRequest {
    /// Replaces the whole policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandbyPolicy>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<std::collections::BTreeMap<String, String>>,
    /// RFC 3339; not together with `ttl`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Go duration; `0s` is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
}

/// Where an instance is on its way to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoStandbyState {
    Unsupported,
    Disabled,
    Ineligible,
    Active,
    IdleCountdown,
    ReadyForStandby,
    StandbyRequested,
    Error,
}

impl AutoStandbyState {
    pub const fn as_str(self) -> &'static str {
        match self {
            AutoStandbyState::Unsupported => "unsupported",
            AutoStandbyState::Disabled => "disabled",
            AutoStandbyState::Ineligible => "ineligible",
            AutoStandbyState::Active => "active",
            AutoStandbyState::IdleCountdown => "idle_countdown",
            AutoStandbyState::ReadyForStandby => "ready_for_standby",
            AutoStandbyState::StandbyRequested => "standby_requested",
            AutoStandbyState::Error => "error",
        }
    }
}

/// Why it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutoStandbyReason {
    UnsupportedPlatform,
    PolicyMissing,
    PolicyDisabled,
    InstanceNotRunning,
    NetworkDisabled,
    MissingIp,
    HasVgpu,
    ActiveInboundConnections,
    IdleTimeoutNotElapsed,
    ObserverError,
    ReadyForStandby,
}

/// Who keeps an instance awake. An addition of doze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AwakeBecause {
    InboundConnections,
    ExecSessions,
}

/// Answer of `GET /instances/{id}/auto-standby/status` and `POST /instances/{id}/auto-standby/hold`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutoStandbyStatus {
    pub status: AutoStandbyState,
    pub reason: AutoStandbyReason,
    /// This host lets the server see connections.
    pub supported: bool,
    /// The instance was given a policy.
    pub configured: bool,
    /// The policy is on.
    pub enabled: bool,
    /// Only use, a timeout or a hold keeps it from falling asleep.
    pub eligible: bool,
    /// `conntrack_events_v4_tcp`: the kernel's connection tracking by its events, TCP over IPv4.
    pub tracking_mode: String,
    /// Connections that keep it awake now.
    pub active_inbound_connections: u64,
    /// Addition of doze: who keeps it awake now.
    #[serde(default)]
    pub awake_because: Vec<AwakeBecause>,
    /// Addition of doze: why connections are not known, with the status `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observer_error: Option<String>,
    /// Go duration.
    #[serde(default)]
    pub idle_timeout: Option<String>,
    /// Since when nobody has used it.
    #[serde(default)]
    #[schema(format = DateTime)]
    pub idle_since: Option<String>,
    /// When a connection that counts was last seen.
    #[serde(default)]
    #[schema(format = DateTime)]
    pub last_inbound_activity_at: Option<String>,
    /// Go duration until it may fall asleep.
    #[serde(default)]
    pub countdown_remaining: Option<String>,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub next_standby_at: Option<String>,
    #[serde(default)]
    #[schema(format = DateTime)]
    pub hold_until: Option<String>,
}
