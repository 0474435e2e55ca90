//! One end of the control channel, without any I/O: bytes and time go in, bytes and events come out.
//!
//! ```text
//!   send ──> queue per stream ──round robin──> in flight (numbered, kept until acknowledged) ──> transmit
//!                                                  ^ cursor goes back on every Hello
//!   receive ──> Decoder ──> Hello / Ack            │
//!                     └───> in order? ──yes──> Event        no ──> drop; a gap answers with Hello
//! ```
//!
//! **Hello** is the only repair there is. It says: my epoch, the epoch I know of you, and the
//! highest number I received in order. Whoever gets one forgets what that acknowledges and sends the rest
//! again; sending it twice does no harm. The host sends it at every connection and until it is
//! answered; either end sends it when it sees a gap.
//!
//! **Restore**: a guest that wakes from a snapshot saw no connection end, and meets a new host epoch in the
//! middle of what the old host said. That costs it [`PARTIAL_FOR`] at most: what the new host said meanwhile
//! is found behind the cut frame.
//!
//! **Epochs** are random per server run and per guest boot. An epoch not seen before starts both
//! directions from number 1 and drops every stream. All other frames carry a tag made of both
//! epochs and are dropped when it differs, so nothing said to an earlier peer is taken for new.
//!
//! **Credit**: each direction of a stream begins with [`STREAM_WINDOW`] bytes and gets more as the
//! receiver's user consumes. So an unread stream stops alone, and memory stays bounded against a
//! peer that ignores the rules.
//!
//! Loss inside a living connection is found without guessing: an Ack frame names the highest
//! number written before it, and the stream keeps order. The sender asks for one when nothing was acknowledged
//! for a while.
use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use self::{
    receiving::Receiving,
    sending::{PROBE_AFTER_MAX, Sending},
    streams::{QUEUE_MESSAGES, Stream},
};
use crate::{
    frame::{Decoder, MAX_PAYLOAD},
    message,
};

mod receiving;
mod sending;
mod streams;

/// Data bytes of one stream and direction that may be under way or unread.
pub const STREAM_WINDOW: u32 = 256 << 10;
/// Data bytes of one frame; smaller than allowed, so that streams take turns often.
pub const DATA_CHUNK: usize = 16 << 10;
/// The control stream of the guest as a whole.
pub const MAIN_STREAM: u32 = 0;

/// A frame that stops growing for this long was cut by a disconnect.
const PARTIAL_FOR: Duration = Duration::from_millis(250);
/// Longer than [`PARTIAL_FOR`]: behind a cut frame every further Hello makes that frame grow, so that sooner
/// ones would put off the moment at which it is given up and the first one is found.
const HELLO_AGAIN: Duration = Duration::from_millis(300);
const HELLO_AGAIN_MAX: Duration = Duration::from_secs(8);

/// Which end this is. The host knows when a connection begins, so it speaks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Host,
    Guest,
}

/// The handshake's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u32,
    pub epoch: u64,
    /// The epoch the sender knows of its peer.
    pub peer_epoch: Option<u64>,
    /// Highest number received in order from that peer epoch.
    pub received: u64,
    /// An answer is wanted.
    pub reply: bool,
}

/// What happened, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A handshake completed. `fresh`: the peer is another one than before (or the first), and every
    /// stream opened so far is gone.
    Established {
        peer: u64,
        fresh: bool,
    },
    /// The peer's major version is unknown here; nothing else will come from it.
    Incompatible {
        protocol: u32,
    },
    Control {
        stream: u32,
        payload: Bytes,
        waited: Duration,
    },
    Data {
        stream: u32,
        payload: Bytes,
    },
    /// The peer sent more than it was allowed to; the stream was closed.
    Overrun {
        stream: u32,
    },
}

/// Why something could not be queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    #[error("the stream is closed")]
    Closed,
    #[error("{0} bytes do not fit one control message of {max} bytes", max = MAX_PAYLOAD)]
    TooLarge(usize),
    #[error("{QUEUE_MESSAGES} messages are waiting already")]
    Full,
}

/// One end's state. All times come from the caller.
#[derive(Debug)]
pub struct Session {
    role: Role,
    epoch: u64,
    /// What this end announces.
    protocol: u32,
    peer: Option<u64>,
    peer_protocol: Option<u32>,
    tag: u32,
    up: bool,
    established: bool,
    decoder: Decoder,
    received_at: Option<Instant>,
    streams: BTreeMap<u32, Stream>,
    turn: u32,
    sending: Sending,
    receiving: Receiving,
    hello: HelloTimer,
    events: VecDeque<Event>,
}

#[derive(Debug, Default)]
struct HelloTimer {
    /// Send one; with `Some(true)` an answer is wanted.
    due: Option<bool>,
    again_at: Option<Instant>,
    wait: Duration,
}

impl Session {
    /// `epoch` is random, of this server run or this boot.
    pub fn new(role: Role, epoch: u64) -> Self {
        let mut session = Self {
            role,
            epoch,
            protocol: message::PROTOCOL,
            peer: None,
            peer_protocol: None,
            tag: 0,
            up: false,
            established: false,
            decoder: Decoder::default(),
            received_at: None,
            streams: BTreeMap::new(),
            turn: MAIN_STREAM,
            sending: Sending::default(),
            receiving: Receiving::default(),
            hello: HelloTimer::default(),
            events: VecDeque::new(),
        };
        session.streams.insert(MAIN_STREAM, Stream::open());
        session
    }

    /// A connection began.
    pub fn link_up(&mut self, now: Instant) {
        self.link_down();
        self.up = true;
        if self.role == Role::Host {
            self.hello = HelloTimer {
                due: Some(true),
                again_at: Some(now + HELLO_AGAIN),
                wait: HELLO_AGAIN,
            };
        }
    }

    /// The connection ended; what was not acknowledged waits for the next one.
    pub fn link_down(&mut self) {
        self.up = false;
        self.established = false;
        self.decoder.reset();
        self.received_at = None;
        self.hello = HelloTimer::default();
        self.rewind();
        self.receiving.ack_at = None;
        self.receiving.ack_now = false;
    }

    pub fn established(&self) -> bool {
        self.established
    }

    /// The peer that answered last.
    pub fn peer(&self) -> Option<u64> {
        self.peer
    }

    /// What the peer that answered last announced; see [`message::version_text`].
    pub fn peer_protocol(&self) -> Option<u32> {
        self.peer_protocol
    }

    /// Announces another version than this code's own, as an older or newer peer does.
    #[cfg(all(test, feature = "host"))]
    pub(crate) fn announce(&mut self, protocol: u32) {
        self.protocol = protocol;
    }

    /// There is a peer, and it acknowledged everything said to it.
    pub fn idle(&self) -> bool {
        self.peer.is_some()
            && self.sending.flight.is_empty()
            && self.streams.values().all(|s| s.queue.is_empty())
    }

    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Session::on_deadline`] wants to be called.
    pub fn deadline(&self) -> Option<Instant> {
        if !self.up {
            return None;
        }
        let partial = self
            .received_at
            .filter(|_| self.decoder.partial())
            .map(|at| at + PARTIAL_FOR);
        let hello = self.hello.again_at.filter(|_| !self.established);
        let ack = self.receiving.ack_at.filter(|_| self.established);
        let probe = self.sending.probe_at.filter(|_| self.established);
        [partial, hello, ack, probe].into_iter().flatten().min()
    }

    pub fn on_deadline(&mut self, now: Instant) {
        let past = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        // What looks like a further cut frame behind the first one has not grown for as long.
        while self.decoder.partial() && past(self.received_at.map(|at| at + PARTIAL_FOR)) {
            self.decoder.abandon();
            self.receive(&[], now);
        }
        if !self.established && past(self.hello.again_at) {
            self.hello.due = Some(true);
            self.hello.wait = (self.hello.wait * 2).min(HELLO_AGAIN_MAX);
            self.hello.again_at = Some(now + self.hello.wait);
        }
        if past(self.receiving.ack_at) {
            self.receiving.ack_at = None;
            self.receiving.ack_now = true;
        }
        if past(self.sending.probe_at) {
            self.sending.probe = true;
            self.sending.probe_wait = (self.sending.probe_wait * 2).min(PROBE_AFTER_MAX);
            self.sending.probe_at = Some(now + self.sending.probe_wait);
        }
    }
}

#[cfg(test)]
mod tests;
