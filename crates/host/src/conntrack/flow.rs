//! A tracked connection as the kernel describes it.
use std::{fmt, net::IpAddr};

/// The address family of a flow. Connections of IPv6 sockets to IPv4-mapped addresses
/// (`::ffff:a.b.c.d`) are IPv4 on the wire, and here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    Ipv4,
    Ipv6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// The transport protocols that are observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    /// Protocol numbers of RFC 9293 and RFC 768 (IANA "Protocol Numbers").
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    pub(super) const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

/// `enum tcp_conntrack` of linux/netfilter/nf_conntrack_tcp.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TcpState {
    None,
    SynSent,
    SynReceived,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    /// A SYN from either side (simultaneous open). The number was LISTEN once.
    SynSent2,
    /// A number that this version does not know.
    Unknown(u8),
}

impl TcpState {
    pub const fn from_number(number: u8) -> Self {
        match number {
            0 => Self::None,
            1 => Self::SynSent,
            2 => Self::SynReceived,
            3 => Self::Established,
            4 => Self::FinWait,
            5 => Self::CloseWait,
            6 => Self::LastAck,
            7 => Self::TimeWait,
            8 => Self::Close,
            9 => Self::SynSent2,
            other => Self::Unknown(other),
        }
    }

    pub const fn number(self) -> u8 {
        match self {
            Self::None => 0,
            Self::SynSent => 1,
            Self::SynReceived => 2,
            Self::Established => 3,
            Self::FinWait => 4,
            Self::CloseWait => 5,
            Self::LastAck => 6,
            Self::TimeWait => 7,
            Self::Close => 8,
            Self::SynSent2 => 9,
            Self::Unknown(other) => other,
        }
    }
}

/// `enum ip_conntrack_status` of linux/netfilter/nf_conntrack_common.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Status(pub u32);

impl Status {
    /// Packets were seen in both directions.
    pub const SEEN_REPLY: Self = Self(1 << 1);
    /// Not to be dropped early when the table is full.
    pub const ASSURED: Self = Self(1 << 2);
    /// The first packet has left the host.
    pub const CONFIRMED: Self = Self(1 << 3);
    /// Being removed.
    pub const DYING: Self = Self(1 << 9);
    /// The timeout is fixed by a rule.
    pub const FIXED_TIMEOUT: Self = Self(1 << 10);
    /// In a flow table: packets bypass the tracking, and its timeout says nothing.
    pub const OFFLOAD: Self = Self(1 << 14);
    /// As [`Status::OFFLOAD`], in the network card.
    pub const HARDWARE_OFFLOAD: Self = Self(1 << 15);

    pub const fn contains(self, bits: Self) -> bool {
        self.0 & bits.0 == bits.0
    }

    pub const fn intersects(self, bits: Self) -> bool {
        self.0 & bits.0 != 0
    }
}

/// One direction of a flow, as its first packet in that direction showed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub source: IpAddr,
    pub source_port: u16,
    pub destination: IpAddr,
    pub destination_port: u16,
}

/// A tracked connection, or what one message says about it.
///
/// The kernel tells flows apart by zone, protocol and original tuple. The `id` is a hash of 32 bits
/// (`nf_ct_get_id`): it tells a flow from an earlier one with the same tuple, and nothing more; among
/// 200,000 flows some share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    pub id: u32,
    pub zone: u16,
    pub protocol: Protocol,
    /// As the initiator sent it: its destination is whom the client meant, before any translation.
    pub original: Tuple,
    /// What answers look like, after translation.
    pub reply: Tuple,
    /// `None` where the message does not say: other protocols than TCP, and events about something
    /// else (a mark, the first reply).
    pub state: Option<TcpState>,
    pub status: Status,
    /// Seconds until the kernel forgets the flow if no further packet comes, at the time of the
    /// message. Events are not sent for packets that change nothing, so this ages.
    pub timeout: Option<u32>,
}

impl Flow {
    pub const fn family(&self) -> Family {
        match self.original.destination {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_keeps_its_number() {
        for number in 0..=255 {
            assert_eq!(TcpState::from_number(number).number(), number);
        }
        assert_eq!(TcpState::from_number(10), TcpState::Unknown(10));
    }
}
