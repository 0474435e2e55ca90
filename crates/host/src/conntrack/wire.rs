//! The bytes: netlink (linux/netlink.h), nfnetlink (linux/netfilter/nfnetlink.h) and ctnetlink
//! (linux/netfilter/nfnetlink_conntrack.h). Headers are in host order, the values of ctnetlink's
//! attributes in network order.
//!
//! ```text
//!  nlmsghdr 16  length u32 | type u16 | flags u16 | sequence u32 | port u32
//!  nfgenmsg  4  family u8 | version u8 | resource u16
//!  nlattr  4+n  length u16 (header included) | type u16 | value | padding to 4
//! ```
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::flow::{Family, Flow, Protocol, Status, TcpState, Tuple};

const HEADER: usize = 16;
const GENERIC: usize = 4;
const ATTRIBUTE: usize = 4;
/// `NLA_TYPE_MASK`: without the bits for nested and network order.
const TYPE_MASK: u16 = 0x3fff;

pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
pub(super) const NLMSG_OVERRUN: u16 = 4;
pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const SUBSYSTEM: u16 = 1 << 8; // NFNL_SUBSYS_CTNETLINK
pub(super) const CT_NEW: u16 = SUBSYSTEM;
pub(super) const CT_GET: u16 = SUBSYSTEM | 1;
pub(super) const CT_DELETE: u16 = SUBSYSTEM | 2;
pub(super) const CT_GET_STATS: u16 = SUBSYSTEM | 5;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// net/netfilter/nf_internals.h; the flags alone are in host order.
const CTA_FILTER_F_CTA_IP_DST: u32 = 1 << 1;
const CTA_IP_V4_DST: u16 = 2;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
const CTA_STATS_GLOBAL_MAX_ENTRIES: u16 = 2;

/// What in a message is not as the kernel's headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a message ends {0} bytes before its length says")]
    Short(usize),
    #[error("a length of {0} bytes is shorter than its own header")]
    Length(usize),
    #[error("the attribute {attribute} holds {found} bytes, not {expected}")]
    Size {
        attribute: u16,
        found: usize,
        expected: usize,
    },
    #[error("a flow has no {0}")]
    Missing(&'static str),
    #[error("a datagram of {0} bytes was cut off")]
    Cut(usize),
}

/// One netlink message of a datagram.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// What an event's header says: NEW and UPDATE share a type and differ in flags only
/// (`ctnetlink_conntrack_event`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    New,
    Update,
    Destroy,
    Other,
}

impl Message<'_> {
    pub fn event(&self) -> Kind {
        match self.kind {
            CT_NEW if self.flags & (NLM_F_CREATE | NLM_F_EXCL) != 0 => Kind::New,
            CT_NEW => Kind::Update,
            CT_DELETE => Kind::Destroy,
            _ => Kind::Other,
        }
    }

    /// The errno of `NLMSG_ERROR` and `NLMSG_DONE`; 0 is success, an acknowledgement.
    pub fn errno(&self) -> Result<i32, Malformed> {
        let bytes = self.payload.first_chunk().ok_or(Malformed::Short(4))?;
        Ok(i32::from_ne_bytes(*bytes).saturating_neg())
    }
}

/// The messages of a datagram; ends after the first malformed one.
pub(super) struct Messages<'a>(pub &'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Some(Err(Malformed::Short(HEADER - bytes.len())));
        };
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let payload = match bytes.get(HEADER..length) {
            Some(payload) => payload,
            None if length < HEADER => return Some(Err(Malformed::Length(length))),
            None => return Some(Err(Malformed::Short(length - bytes.len()))),
        };
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload,
        }))
    }
}

/// The attributes of a message or of a nested attribute; ends after the first malformed one.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<(u16, &'a [u8]), Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = std::mem::take(&mut self.0);
        let Some([l0, l1, k0, k1]) = bytes.first_chunk::<ATTRIBUTE>() else {
            return Some(Err(Malformed::Short(ATTRIBUTE - bytes.len())));
        };
        let length = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let value = match bytes.get(ATTRIBUTE..length) {
            Some(value) => value,
            None if length < ATTRIBUTE => return Some(Err(Malformed::Length(length))),
            None => return Some(Err(Malformed::Short(length - bytes.len()))),
        };
        self.0 = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Ok((u16::from_ne_bytes([*k0, *k1]) & TYPE_MASK, value)))
    }
}

fn exactly<const N: usize>(attribute: u16, value: &[u8]) -> Result<[u8; N], Malformed> {
    value.try_into().map_err(|_| Malformed::Size {
        attribute,
        found: value.len(),
        expected: N,
    })
}

fn number(attribute: u16, value: &[u8]) -> Result<u32, Malformed> {
    exactly(attribute, value).map(u32::from_be_bytes)
}

fn short(attribute: u16, value: &[u8]) -> Result<u16, Malformed> {
    exactly(attribute, value).map(u16::from_be_bytes)
}

#[derive(Default)]
struct RawTuple {
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
    protocol: Option<u8>,
    source_port: Option<u16>,
    destination_port: Option<u16>,
    zone: Option<u16>,
}

impl RawTuple {
    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut tuple = Self::default();
        for attribute in Attributes(bytes) {
            match attribute? {
                (CTA_TUPLE_IP, value) => tuple.addresses(value)?,
                (CTA_TUPLE_PROTO, value) => tuple.ports(value)?,
                (kind @ CTA_TUPLE_ZONE, value) => tuple.zone = Some(short(kind, value)?),
                _ => {}
            }
        }
        Ok(tuple)
    }

    fn addresses(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        for attribute in Attributes(bytes) {
            let (kind, value) = attribute?;
            // CTA_IP_V4_SRC, V4_DST, V6_SRC, V6_DST
            let address: IpAddr = match kind {
                1 | 2 => Ipv4Addr::from(exactly::<4>(kind, value)?).into(),
                3 | 4 => Ipv6Addr::from(exactly::<16>(kind, value)?).into(),
                _ => continue,
            };
            if kind % 2 == 1 {
                self.source = Some(address);
            } else {
                self.destination = Some(address);
            }
        }
        Ok(())
    }

    fn ports(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        for attribute in Attributes(bytes) {
            match attribute? {
                (kind @ CTA_PROTO_NUM, value) => {
                    let [number] = exactly(kind, value)?;
                    self.protocol = Some(number);
                }
                (kind @ CTA_PROTO_SRC_PORT, value) => self.source_port = Some(short(kind, value)?),
                (kind @ CTA_PROTO_DST_PORT, value) => {
                    self.destination_port = Some(short(kind, value)?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn complete(&self) -> Result<Tuple, Malformed> {
        Ok(Tuple {
            source: self.source.ok_or(Malformed::Missing("source address"))?,
            source_port: self.source_port.ok_or(Malformed::Missing("source port"))?,
            destination: self
                .destination
                .ok_or(Malformed::Missing("destination address"))?,
            destination_port: self
                .destination_port
                .ok_or(Malformed::Missing("destination port"))?,
        })
    }
}

/// Which flows are wanted; the others cost a look at their first bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub ipv4: bool,
    pub ipv6: bool,
    pub udp: bool,
}

impl Wanted {
    fn family(self, family: u8) -> bool {
        (family == AF_INET && self.ipv4) || (family == AF_INET6 && self.ipv6)
    }

    fn protocol(self, number: Option<u8>) -> Option<Protocol> {
        Protocol::from_number(number?).filter(|protocol| match protocol {
            Protocol::Tcp => true,
            Protocol::Udp => self.udp,
        })
    }
}

/// The flow of a message, `None` if it is not wanted.
pub(super) fn flow(payload: &[u8], wanted: Wanted) -> Result<Option<Flow>, Malformed> {
    let Some((generic, attributes)) = payload.split_first_chunk::<GENERIC>() else {
        return Err(Malformed::Short(GENERIC - payload.len()));
    };
    if !wanted.family(generic[0]) {
        return Ok(None);
    }
    let (mut original, mut reply) = (None, RawTuple::default());
    let (mut id, mut zone, mut status, mut timeout, mut state) = (None, None, 0, None, None);
    let mut protocol = None;
    for attribute in Attributes(attributes) {
        let (kind, value) = attribute?;
        match kind {
            CTA_TUPLE_ORIG => {
                let tuple = RawTuple::parse(value)?;
                protocol = wanted.protocol(tuple.protocol);
                if protocol.is_none() {
                    return Ok(None);
                }
                zone = zone.or(tuple.zone);
                original = Some(tuple);
            }
            CTA_TUPLE_REPLY => reply = RawTuple::parse(value)?,
            CTA_STATUS => status = number(kind, value)?,
            CTA_PROTOINFO => state = tcp_state(value)?.or(state),
            CTA_TIMEOUT => timeout = Some(number(kind, value)?),
            CTA_ID => id = Some(number(kind, value)?),
            CTA_ZONE => zone = Some(short(kind, value)?),
            _ => {}
        }
    }
    Ok(Some(Flow {
        id: id.ok_or(Malformed::Missing("id"))?,
        zone: zone.unwrap_or(0),
        protocol: protocol.ok_or(Malformed::Missing("protocol"))?,
        original: original
            .ok_or(Malformed::Missing("original tuple"))?
            .complete()?,
        reply: reply.complete()?,
        state,
        status: Status(status),
        timeout,
    }))
}

fn tcp_state(bytes: &[u8]) -> Result<Option<TcpState>, Malformed> {
    for attribute in Attributes(bytes) {
        let (CTA_PROTOINFO_TCP, tcp) = attribute? else {
            continue;
        };
        for attribute in Attributes(tcp) {
            if let (kind @ CTA_PROTOINFO_TCP_STATE, value) = attribute? {
                let [number] = exactly(kind, value)?;
                return Ok(Some(TcpState::from_number(number)));
            }
        }
    }
    Ok(None)
}

/// How full the kernel's table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Flows of all protocols and families, those being set up included.
    pub entries: u32,
    /// Beyond it the kernel drops packets of new connections (`nf_conntrack_max`). `None` before
    /// Linux 5.10.
    pub max_entries: Option<u32>,
}

pub(super) fn usage(payload: &[u8]) -> Result<Usage, Malformed> {
    let attributes = payload.get(GENERIC..).ok_or(Malformed::Short(GENERIC))?;
    let (mut entries, mut max_entries) = (None, None);
    for attribute in Attributes(attributes) {
        match attribute? {
            (kind @ CTA_STATS_GLOBAL_ENTRIES, value) => entries = Some(number(kind, value)?),
            (kind @ CTA_STATS_GLOBAL_MAX_ENTRIES, value) => {
                max_entries = Some(number(kind, value)?)
            }
            _ => {}
        }
    }
    Ok(Usage {
        entries: entries.ok_or(Malformed::Missing("count of entries"))?,
        max_entries,
    })
}

/// A request of ctnetlink without attributes. `None` asks about all families.
pub(super) fn request(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: Option<Family>,
) -> [u8; HEADER + GENERIC] {
    const LENGTH: usize = HEADER + GENERIC;
    let mut bytes = [0; LENGTH];
    bytes[..4].copy_from_slice(&(LENGTH as u32).to_ne_bytes());
    bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
    bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    bytes[HEADER] = match family {
        None => 0,
        Some(Family::Ipv4) => AF_INET,
        Some(Family::Ipv6) => AF_INET6,
    };
    bytes
}

/// A request for the flows whose original destination is this address. The kernel leaves the others out from 5.8
/// on; an older one does not know the filter and sends all.
pub(super) fn request_to(sequence: u32, destination: Ipv4Addr) -> Vec<u8> {
    // Nested attributes, each with its header: the tuple's address, and which part of the tuple to compare.
    let address = attribute(CTA_IP_V4_DST, &destination.octets());
    let tuple = attribute(
        CTA_TUPLE_ORIG | NESTED,
        &attribute(CTA_TUPLE_IP | NESTED, &address),
    );
    let compared = attribute(
        CTA_FILTER_ORIG_FLAGS,
        &CTA_FILTER_F_CTA_IP_DST.to_ne_bytes(),
    );
    let nothing = attribute(CTA_FILTER_REPLY_FLAGS, &0u32.to_ne_bytes());
    let filter = attribute(CTA_FILTER | NESTED, &[compared, nothing].concat());
    let head = request(CT_GET, NLM_F_DUMP, sequence, Some(Family::Ipv4));
    let mut bytes = [&head[..], &tuple, &filter].concat();
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// All that are made here are a few bytes long, and multiples of 4.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (ATTRIBUTE + value.len()) as u16;
    [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat()
}

#[cfg(test)]
mod tests;
