//! `doze auto-standby`: when instances fall asleep by themselves, what keeps them awake, and the policy.
use doze_api::{
    AutoStandbyState, AutoStandbyStatus, AwakeBecause, UpdateInstanceRequest,
    policy::AutoStandbyPolicy,
};

use super::common;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show where an instance is on its way to sleep, and what keeps it awake
    Status(Status),
    /// Keep an instance awake for one idle timeout from now
    Hold(Status),
    /// Say when an instance falls asleep by itself; replaces the former policy
    Set(Set),
}

#[derive(Debug, clap::Args)]
pub struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Instance: name, id or beginning of an id
    name: String,
}

#[derive(Debug, clap::Args)]
pub struct Set {
    /// Sleep when no client has been connected for this long, for example 5m
    #[arg(long, value_name = "DURATION", required_unless_present = "off")]
    idle_timeout: Option<String>,
    /// Clients in this network do not count; repeat for several
    #[arg(long = "ignore-source", value_name = "CIDR")]
    ignore_source: Vec<String>,
    /// Connections to this port do not count; repeat for several
    #[arg(long = "ignore-port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    ignore_port: Vec<u16>,
    /// Connections that have been silent for longer do not count, for example 2h
    #[arg(long, value_name = "DURATION")]
    max_flow_idle: Option<String>,
    /// Never sleep by itself
    #[arg(long, conflicts_with_all = ["idle_timeout", "ignore_source", "ignore_port", "max_flow_idle"])]
    off: bool,
    /// Instance: name, id or beginning of an id
    name: String,
}

pub async fn run(command: Command, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let (answer, json) = match &command {
        Command::Status(args) => (
            server.client.auto_standby_status(&args.name).await,
            args.json,
        ),
        Command::Hold(args) => (server.client.hold_instance(&args.name).await, args.json),
        Command::Set(args) => {
            let request = args.request();
            let answer = server.client.update_instance(&args.name, &request);
            let instance = answer.await.map_err(|e| server.explain(&e))?;
            let policy = instance.auto_standby.unwrap_or_default();
            output::line(&sentence(&policy))?;
            return Ok(0);
        }
    };
    let status = answer.map_err(|e| server.explain(&e))?;
    match json {
        true => output::json(&status)?,
        false => output::line(&render(&status))?,
    }
    Ok(0)
}

impl Set {
    fn request(&self) -> UpdateInstanceRequest {
        let policy = match self.off {
            true => AutoStandbyPolicy {
                enabled: Some(false),
                ..AutoStandbyPolicy::default()
            },
            false => AutoStandbyPolicy {
                enabled: Some(true),
                idle_timeout: self.idle_timeout.clone(),
                ignore_source_cidrs: some(self.ignore_source.clone()),
                ignore_destination_ports: some(self.ignore_port.clone()),
                max_flow_idle: self.max_flow_idle.clone(),
            },
        };
        UpdateInstanceRequest {
            auto_standby: Some(policy),
            ..UpdateInstanceRequest::default()
        }
    }
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

fn sentence(policy: &AutoStandbyPolicy) -> String {
    match (policy.enabled, &policy.idle_timeout) {
        (Some(true), Some(timeout)) => {
            format!("falls asleep when nobody has used it for {timeout}")
        }
        _ => "does not fall asleep by itself".to_owned(),
    }
}

/// One line per thing that is known.
fn render(status: &AutoStandbyStatus) -> String {
    let reason = serde_json::to_value(status.reason).ok();
    let reason = reason.as_ref().and_then(|r| r.as_str()).unwrap_or_default();
    let who = status.awake_because.iter().map(|who| match who {
        AwakeBecause::InboundConnections => {
            format!("{} connections", status.active_inbound_connections)
        }
        AwakeBecause::ExecSessions => "exec sessions".to_owned(),
    });
    let awake = who.collect::<Vec<_>>().join(", ");
    let rows = [
        ("status", Some(status.status.as_str().to_owned())),
        ("reason", Some(reason.to_owned())),
        ("awake because of", Some(awake)),
        ("idle timeout", status.idle_timeout.clone()),
        ("idle since", status.idle_since.clone()),
        ("sleeps in", status.countdown_remaining.clone()),
        ("held until", status.hold_until.clone()),
        ("last connection", status.last_inbound_activity_at.clone()),
        ("error", status.observer_error.clone()),
    ];
    let known = rows.into_iter().filter_map(|(name, value)| {
        let value = value.filter(|value| !value.is_empty())?;
        Some(format!("{name:<16}  {value}"))
    });
    known.collect::<Vec<_>>().join("\n")
}

/// As `doze ps` shows it.
pub fn word(status: &AutoStandbyStatus) -> String {
    match status.status {
        AutoStandbyState::IdleCountdown => {
            let left = status.countdown_remaining.as_deref().unwrap_or("?");
            format!("in {}", common::whole_seconds(left))
        }
        AutoStandbyState::Active => "awake".to_owned(),
        AutoStandbyState::ReadyForStandby | AutoStandbyState::StandbyRequested => "now".to_owned(),
        AutoStandbyState::Ineligible => "-".to_owned(),
        AutoStandbyState::Disabled => "off".to_owned(),
        AutoStandbyState::Unsupported | AutoStandbyState::Error => {
            status.status.as_str().to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn status(extra: serde_json::Value) -> AutoStandbyStatus {
        let mut body = serde_json::json!({
            "status": "active", "reason": "active_inbound_connections", "supported": true,
            "configured": true, "enabled": true, "eligible": true, "tracking_mode": "m",
            "active_inbound_connections": 2, "idle_timeout": "5m0s",
            "awake_because": ["inbound_connections", "exec_sessions"]
        });
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn it_says_who_keeps_it_awake() {
        let text = render(&status(serde_json::json!({})));
        assert!(
            text.contains("awake because of  2 connections, exec sessions"),
            "{text}"
        );
        assert!(!text.contains("held until"), "{text}");
    }

    #[test]
    fn ps_has_one_word_for_each() {
        let counting = serde_json::json!({
            "status": "idle_countdown", "reason": "idle_timeout_not_elapsed",
            "countdown_remaining": "4m59.123456s"
        });
        assert_eq!(word(&status(counting)), "in 4m59s");
        assert_eq!(word(&status(serde_json::json!({}))), "awake");
    }
}
