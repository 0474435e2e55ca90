//! Whether a flow is somebody who uses an instance. Pure: no clock, no socket.
use std::{net::IpAddr, time::Duration};

use super::{
    flow::{Flow, Protocol, Status, TcpState},
    policy::Cidr,
};

/// Settings of the kernel's TCP tracking (nf_conntrack-sysctl.rst), seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpTimeouts {
    /// `nf_conntrack_tcp_timeout_established`: 5 days by default.
    pub established: u32,
    /// `nf_conntrack_tcp_timeout_unacknowledged`: 5 minutes by default.
    pub unacknowledged: u32,
    /// `nf_conntrack_tcp_timeout_max_retrans`: 5 minutes by default.
    pub max_retransmissions: u32,
}

impl TcpTimeouts {
    /// How long an established flow had been silent at the time of its message.
    ///
    /// Each packet sets the timeout back to `established`, so what is missing from it is the
    /// silence. `None` where that does not hold: data waits for its acknowledgement or is sent
    /// again (the kernel then gives the flow one of the two short timeouts, so a remainder that
    /// fits them says nothing), a rule fixed the timeout, or packets bypass the tracking.
    pub fn idle(&self, flow: &Flow) -> Option<Duration> {
        let odd = Status(Status::FIXED_TIMEOUT.0 | Status::OFFLOAD.0 | Status::HARDWARE_OFFLOAD.0);
        let remaining = flow.timeout?;
        let short = self.unacknowledged.max(self.max_retransmissions);
        let known = flow.state == Some(TcpState::Established)
            && !flow.status.intersects(odd)
            && remaining > short;
        known.then(|| Duration::from_secs(self.established.saturating_sub(remaining).into()))
    }
}

/// When an established flow counts as left behind by a dead client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdleLimit {
    /// Silent for longer is not active.
    pub longest: Duration,
    pub timeouts: TcpTimeouts,
}

/// What counts for one instance.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    pub instance: IpAddr,
    pub ignore_source_cidrs: &'a [Cidr],
    pub ignore_destination_ports: &'a [u16],
    pub max_flow_idle: Option<IdleLimit>,
}

/// A flow's meaning for one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Active,
    Inactive(Reason),
}

/// Why a flow does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Not addressed to the instance: somebody else's, or the instance's own outbound connection,
    /// whose answers do not make it a client.
    OtherDestination,
    /// Not TCP.
    Protocol,
    IgnoredSource,
    IgnoredPort,
    /// TIME_WAIT, CLOSE or NONE.
    Closed(TcpState),
    /// Silent for so long, which is beyond the limit.
    Idle(Duration),
}

/// Active is a flow to the instance that nothing excludes. Half-open counts, and so does every state
/// that is not known to be an end: a doubt keeps an instance awake.
///
/// The limit on silence sees the flow as its message showed it. A packet since then has sent no
/// event, so decide with a fresh dump.
pub fn classify(flow: &Flow, rules: &Rules<'_>) -> Verdict {
    let source = flow.original.source.to_canonical();
    let inactive = if flow.original.destination.to_canonical() != rules.instance.to_canonical() {
        Reason::OtherDestination
    } else if flow.protocol != Protocol::Tcp {
        Reason::Protocol
    } else if rules
        .ignore_source_cidrs
        .iter()
        .any(|cidr| cidr.contains(source))
    {
        Reason::IgnoredSource
    } else if rules
        .ignore_destination_ports
        .contains(&flow.original.destination_port)
    {
        Reason::IgnoredPort
    } else if let Some(state) = flow.state.filter(|state| is_over(*state)) {
        Reason::Closed(state)
    } else if let Some(idle) = rules
        .max_flow_idle
        .and_then(|limit| limit.exceeded_by(flow))
    {
        Reason::Idle(idle)
    } else {
        return Verdict::Active;
    };
    Verdict::Inactive(inactive)
}

/// [`classify`] without the reason.
pub fn is_active(flow: &Flow, rules: &Rules<'_>) -> bool {
    classify(flow, rules) == Verdict::Active
}

fn is_over(state: TcpState) -> bool {
    match state {
        TcpState::None | TcpState::TimeWait | TcpState::Close => true,
        TcpState::SynSent
        | TcpState::SynSent2
        | TcpState::SynReceived
        | TcpState::Established
        | TcpState::FinWait
        | TcpState::CloseWait
        | TcpState::LastAck
        | TcpState::Unknown(_) => false,
    }
}

impl IdleLimit {
    fn exceeded_by(&self, flow: &Flow) -> Option<Duration> {
        self.timeouts.idle(flow).filter(|idle| *idle > self.longest)
    }
}

#[cfg(test)]
mod tests;
