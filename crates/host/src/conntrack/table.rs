//! The known flows, compact, ordered by original destination, and the rules by which a dump and
//! the events that race with it become one truth. Pure.
//!
//! ```text
//!  subscribed ──────────────────────────────────────────────> events, in the kernel's order
//!        begin_resync ── dumped flows, each from some moment ── finish_resync
//! ```
//!
//! Everything that happens after `begin_resync` is heard, so for a flow that an event speaks of, the
//! last event is the truth: if the dump saw something newer, an event about that is still to come. A
//! dumped flow therefore never replaces what an event of the same resync said, nor brings back what one
//! ended. What neither the dump nor an event has named by the end is gone.
use std::{
    collections::{BTreeMap, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::{
    flow::{Flow, Protocol, Status, TcpState, Tuple},
    observer::Event,
};

/// Ends of flows remembered during one resync; beyond it ended flows may come back until the next.
const MAX_TOMBSTONES: usize = 1 << 17;

/// An address in its own size: half of the table's memory would otherwise be padding.
trait Address: Copy + Ord + std::hash::Hash + Into<IpAddr> {
    const LOWEST: Self;
    const HIGHEST: Self;
    fn from_ip(address: IpAddr) -> Option<Self>;
}

impl Address for Ipv4Addr {
    const LOWEST: Self = Self::UNSPECIFIED;
    const HIGHEST: Self = Self::BROADCAST;

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }
}

impl Address for Ipv6Addr {
    const LOWEST: Self = Self::UNSPECIFIED;
    const HIGHEST: Self = Self::from_bits(u128::MAX);

    fn from_ip(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        }
    }
}

/// What the kernel tells flows apart by; the destination first, so that its flows are one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key<A> {
    destination: A,
    destination_port: u16,
    source_port: u16,
    source: A,
    zone: u16,
    protocol: Protocol,
}

/// What an event of the current resync has said of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Nothing,
    /// That it lives, with its status, but no state.
    Alive,
    State,
}

#[derive(Debug, Clone, Copy)]
struct Entry<A> {
    id: u32,
    status: Status,
    /// [`NO_TIMEOUT`] where no message said.
    timeout: u32,
    epoch: u32,
    reply_source: A,
    reply_destination: A,
    reply_ports: (u16, u16),
    state: Option<TcpState>,
    heard: Heard,
}

const NO_TIMEOUT: u32 = u32::MAX;

fn split<A: Address>(flow: &Flow) -> Option<(Key<A>, Entry<A>)> {
    let Flow {
        original, reply, ..
    } = flow;
    let key = Key {
        destination: A::from_ip(original.destination)?,
        destination_port: original.destination_port,
        source_port: original.source_port,
        source: A::from_ip(original.source)?,
        zone: flow.zone,
        protocol: flow.protocol,
    };
    let entry = Entry {
        id: flow.id,
        status: flow.status,
        timeout: flow.timeout.unwrap_or(NO_TIMEOUT),
        epoch: 0,
        reply_source: A::from_ip(reply.source)?,
        reply_destination: A::from_ip(reply.destination)?,
        reply_ports: (reply.source_port, reply.destination_port),
        state: flow.state,
        heard: Heard::Nothing,
    };
    Some((key, entry))
}

fn join<A: Address>(key: &Key<A>, entry: &Entry<A>) -> Flow {
    Flow {
        id: entry.id,
        zone: key.zone,
        protocol: key.protocol,
        original: Tuple {
            source: key.source.into(),
            source_port: key.source_port,
            destination: key.destination.into(),
            destination_port: key.destination_port,
        },
        reply: Tuple {
            source: entry.reply_source.into(),
            source_port: entry.reply_ports.0,
            destination: entry.reply_destination.into(),
            destination_port: entry.reply_ports.1,
        },
        state: entry.state,
        status: entry.status,
        timeout: (entry.timeout != NO_TIMEOUT).then_some(entry.timeout),
    }
}

/// The flows of one family.
#[derive(Debug)]
struct Half<A> {
    flows: BTreeMap<Key<A>, Entry<A>>,
    /// Flows ended since the resync began. With the id: several may have come and gone with one tuple.
    ended: HashSet<(Key<A>, u32)>,
}

impl<A: Address> Half<A> {
    fn new() -> Self {
        Self {
            flows: BTreeMap::new(),
            ended: HashSet::new(),
        }
    }

    fn heard(&mut self, key: Key<A>, mut entry: Entry<A>, epoch: u32) {
        self.ended.remove(&(key, entry.id));
        entry.epoch = epoch;
        entry.heard = match entry.state {
            Some(_) => Heard::State,
            None => Heard::Alive,
        };
        if let Some(known) = self.flows.get(&key).filter(|known| known.id == entry.id) {
            if entry.state.is_none() {
                entry.state = known.state;
                // A state heard earlier in this resync is still the last one heard.
                if known.epoch == epoch && known.heard == Heard::State {
                    entry.heard = Heard::State;
                }
            }
            if entry.timeout == NO_TIMEOUT {
                entry.timeout = known.timeout;
            }
        }
        self.flows.insert(key, entry);
    }

    /// Whether the flow was known.
    fn ended(&mut self, key: Key<A>, id: u32, resyncing: bool) -> bool {
        if resyncing {
            self.ended.insert((key, id));
        }
        match self.flows.get(&key) {
            // The end of an earlier flow with the same tuple: the kernel may send it late.
            Some(known) if known.id != id => false,
            Some(_) => self.flows.remove(&key).is_some(),
            None => false,
        }
    }

    fn dumped(&mut self, key: Key<A>, mut entry: Entry<A>, epoch: u32) {
        if self.ended.contains(&(key, entry.id)) {
            return;
        }
        entry.epoch = epoch;
        match self.flows.get_mut(&key) {
            Some(known) if known.epoch == epoch && known.heard == Heard::State => {}
            Some(known) if known.epoch == epoch && known.heard == Heard::Alive => {
                // An event about a later flow with this tuple knows better than the dump.
                if known.id == entry.id {
                    known.state = entry.state;
                }
            }
            Some(known) => *known = entry,
            None => drop(self.flows.insert(key, entry)),
        }
    }

    fn range(&self, destination: A) -> impl Iterator<Item = Flow> {
        let bound = |port: u16, source: A, zone: u16, protocol: Protocol| Key {
            destination,
            destination_port: port,
            source_port: port,
            source,
            zone,
            protocol,
        };
        let lowest = bound(0, A::LOWEST, 0, Protocol::Tcp);
        let highest = bound(u16::MAX, A::HIGHEST, u16::MAX, Protocol::Udp);
        self.flows
            .range(lowest..=highest)
            .map(|(key, entry)| join(key, entry))
    }
}

/// All known flows.
#[derive(Debug)]
pub(super) struct Table {
    v4: Half<Ipv4Addr>,
    v6: Half<Ipv6Addr>,
    epoch: u32,
    resyncing: bool,
    most: usize,
    full: bool,
    forgot_ends: bool,
}

/// How a resync ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The table holds what the kernel's holds.
    Truth,
    /// More flows ended meanwhile than could be remembered: some that are over may still be here,
    /// which keeps an instance awake until the next resync.
    SomeOver,
    /// The kernel has more flows than the table may hold.
    Full,
}

impl Table {
    pub fn new(most: usize) -> Self {
        Self {
            v4: Half::new(),
            v6: Half::new(),
            epoch: 0,
            resyncing: false,
            most,
            full: false,
            forgot_ends: false,
        }
    }

    pub fn len(&self) -> usize {
        self.v4.flows.len() + self.v6.flows.len()
    }

    /// Whether a flow found no room since the last resync.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The flows whose initiator meant this address.
    pub fn flows_to(&self, destination: IpAddr) -> Vec<Flow> {
        match destination.to_canonical() {
            IpAddr::V4(address) => self.v4.range(address).collect(),
            IpAddr::V6(address) => self.v6.range(address).collect(),
        }
    }

    /// Applies an event; the original destination whose flows changed by it, if any did.
    pub fn apply(&mut self, event: &Event) -> Option<IpAddr> {
        let (flow, destroyed) = match event {
            Event::New(flow) | Event::Update(flow) => (flow, false),
            Event::Destroy(flow) => (flow, true),
            Event::Lost(_) => return None,
        };
        let changed = if let Some((key, entry)) = split::<Ipv4Addr>(flow) {
            if destroyed {
                self.v4.ended(key, entry.id, self.resyncing)
            } else if self.has_room(self.v4.flows.contains_key(&key)) {
                self.v4.heard(key, entry, self.epoch);
                true
            } else {
                false
            }
        } else if let Some((key, entry)) = split::<Ipv6Addr>(flow) {
            if destroyed {
                self.v6.ended(key, entry.id, self.resyncing)
            } else if self.has_room(self.v6.flows.contains_key(&key)) {
                self.v6.heard(key, entry, self.epoch);
                true
            } else {
                false
            }
        } else {
            false
        };
        if self.v4.ended.len() + self.v6.ended.len() > MAX_TOMBSTONES {
            self.forget_ends();
            self.forgot_ends = true;
        }
        changed.then_some(flow.original.destination)
    }

    fn has_room(&mut self, known: bool) -> bool {
        let room = known || self.len() < self.most;
        self.full |= !room;
        room
    }

    fn forget_ends(&mut self) {
        self.v4.ended = HashSet::new();
        self.v6.ended = HashSet::new();
    }

    /// The dump is asked for right after this, with the subscription standing.
    pub fn begin_resync(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.resyncing = true;
        self.forgot_ends = false;
        self.full = false;
        self.forget_ends();
    }

    /// Takes over a flow of the dump.
    pub fn dumped(&mut self, flow: &Flow) {
        if let Some((key, entry)) = split::<Ipv4Addr>(flow) {
            if self.has_room(self.v4.flows.contains_key(&key)) {
                self.v4.dumped(key, entry, self.epoch);
            }
        } else if let Some((key, entry)) = split::<Ipv6Addr>(flow)
            && self.has_room(self.v6.flows.contains_key(&key))
        {
            self.v6.dumped(key, entry, self.epoch);
        }
    }

    /// The dump is complete: drops what nobody has named.
    pub fn finish_resync(&mut self) -> Outcome {
        let epoch = self.epoch;
        self.v4.flows.retain(|_, entry| entry.epoch == epoch);
        self.v6.flows.retain(|_, entry| entry.epoch == epoch);
        self.end_resync();
        match (self.full, self.forgot_ends) {
            (true, _) => Outcome::Full,
            (false, true) => Outcome::SomeOver,
            (false, false) => Outcome::Truth,
        }
    }

    /// The dump has failed: nothing is dropped.
    pub fn abandon_resync(&mut self) {
        self.end_resync();
    }

    fn end_resync(&mut self) {
        self.resyncing = false;
        self.forget_ends();
    }
}

#[cfg(test)]
mod tests;
