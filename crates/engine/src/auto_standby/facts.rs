//! What is true of an instance now, collected for [`super::decide`].
use std::net::IpAddr;

use doze_agent::client::AgentClient;
use doze_host::conntrack::policy::Policy;
use doze_lifecycle::State;

use super::{
    Controller,
    decide::{Blind, Facts, Reach, Seen},
    eyes::Sight,
};
use crate::InstanceView;

pub struct Looked<'a> {
    pub facts: Facts<'a>,
    /// What was seen of its connections, if anybody looked.
    pub sight: Option<Sight>,
}

/// Where connections of this instance would be looked for; `None`: nobody wants to know.
pub fn observed_address(view: &InstanceView) -> Option<IpAddr> {
    match &view.spec.auto_standby {
        Some(Policy::Enabled(_)) => view.network.as_ref().map(|claim| claim.ip.into()),
        Some(Policy::Disabled) | None => None,
    }
}

pub fn of<'a>(
    view: &'a InstanceView,
    controller: &Controller,
    agent: Option<&AgentClient>,
) -> Looked<'a> {
    let policy = view.spec.auto_standby.as_ref();
    let address = observed_address(view);
    let reach = match (view.spec.network_enabled, &view.network) {
        (false, _) => Reach::NoNetwork,
        (true, None) => Reach::NoAddress,
        (true, Some(_)) => Reach::Address,
    };
    let mut sight = None;
    let seen = match (policy, address, controller.eyes()) {
        (Some(Policy::Enabled(policy)), Some(ip), Some(eyes)) => {
            eyes.known(ip, policy).map(|found| {
                let connections = found.active;
                sight = Some(found);
                Seen {
                    connections,
                    passed_by: false,
                    sessions: agent.map_or(0, AgentClient::open_sessions),
                }
            })
        }
        // Never asked for.
        _ => Err(Blind::Resyncing),
    };
    let facts = Facts {
        supported: controller.eyes().is_some(),
        policy,
        reach,
        running_since: (view.state() == State::Running).then(|| view.record.current_since()),
        seen,
    };
    Looked { facts, sight }
}
