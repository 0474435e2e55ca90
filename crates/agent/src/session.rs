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

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    frame::{Decoder, FLAG_ACK_NOW, FLAG_SEQUENCED, Frame, HEADER_LEN, Kind, MAX_PAYLOAD},
    message,
};

/// Data bytes of one stream and direction that may be under way or unread.
pub const STREAM_WINDOW: u32 = 256 << 10;
/// Data bytes of one frame; smaller than allowed, so that streams take turns often.
pub const DATA_CHUNK: usize = 16 << 10;
/// Bytes written and not acknowledged, over all streams.
const FLIGHT_BYTES: usize = 1 << 20;
/// Data bytes of one stream that wait for their turn.
const QUEUE_BYTES: usize = 64 << 10;
/// Control messages of one stream that wait for their turn.
const QUEUE_MESSAGES: usize = 1024;
/// The control stream of the guest as a whole.
pub const MAIN_STREAM: u32 = 0;

const HELLO_AGAIN: Duration = Duration::from_secs(1);
const HELLO_AGAIN_MAX: Duration = Duration::from_secs(8);
const ACK_WITHIN: Duration = Duration::from_millis(20);
const ACK_AFTER_BYTES: usize = 128 << 10;
const PROBE_AFTER: Duration = Duration::from_secs(1);
const PROBE_AFTER_MAX: Duration = Duration::from_secs(8);
/// A frame that stops growing for this long was cut by a disconnect.
const PARTIAL_FOR: Duration = Duration::from_millis(250);

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
    peer: Option<u64>,
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

#[derive(Debug)]
struct Sending {
    next_seq: u64,
    flight: VecDeque<Item>,
    flight_bytes: usize,
    /// Items of `flight` already written on this connection.
    cursor: usize,
    probe: bool,
    probe_at: Option<Instant>,
    probe_wait: Duration,
}

impl Default for Sending {
    fn default() -> Self {
        Self {
            next_seq: 1,
            flight: VecDeque::new(),
            flight_bytes: 0,
            cursor: 0,
            probe: false,
            probe_at: None,
            probe_wait: PROBE_AFTER,
        }
    }
}

impl Sending {
    fn last_written(&self) -> u64 {
        self.next_seq - 1 - (self.flight.len() - self.cursor) as u64
    }
}

#[derive(Debug, Default)]
struct Receiving {
    last: u64,
    unacked_bytes: usize,
    ack_now: bool,
    ack_at: Option<Instant>,
    /// The value of `last` for which a gap was reported already.
    gap_reported: Option<u64>,
}

#[derive(Debug, Default)]
struct HelloTimer {
    /// Send one; with `Some(true)` an answer is wanted.
    due: Option<bool>,
    again_at: Option<Instant>,
    wait: Duration,
}

#[derive(Debug, Clone)]
struct Item {
    stream: u32,
    kind: Kind,
    payload: Bytes,
    queued_at: Instant,
}

#[derive(Debug, Default)]
struct Stream {
    queue: VecDeque<Item>,
    queued_data: usize,
    queued_messages: usize,
    /// Data bytes the peer lets us send.
    credit: u32,
    /// Data bytes we let the peer send.
    room: u32,
    /// Consumed and not yet given back as credit.
    consumed: u32,
    /// Nothing more comes from or goes to the user; leaves when the queue is empty.
    closing: bool,
}

impl Stream {
    fn open() -> Self {
        Self {
            credit: STREAM_WINDOW,
            room: STREAM_WINDOW,
            ..Self::default()
        }
    }
}

impl Session {
    /// `epoch` is random, of this server run or this boot.
    pub fn new(role: Role, epoch: u64) -> Self {
        let mut session = Self {
            role,
            epoch,
            peer: None,
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

    /// There is a peer, and it acknowledged everything said to it.
    pub fn idle(&self) -> bool {
        self.peer.is_some()
            && self.sending.flight.is_empty()
            && self.streams.values().all(|s| s.queue.is_empty())
    }

    pub fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    // Streams ------------------------------------------------------------------------------------

    /// Both ends open a stream under the same number; a number is never used again within an epoch.
    pub fn open(&mut self, stream: u32) {
        self.streams.entry(stream).or_insert_with(Stream::open);
    }

    /// What is queued still goes out; what arrives is dropped.
    pub fn close(&mut self, stream: u32) {
        if stream == MAIN_STREAM {
            return;
        }
        if let Some(state) = self.streams.get_mut(&stream) {
            state.closing = true;
            if state.queue.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    fn usable(&mut self, stream: u32) -> Option<&mut Stream> {
        self.streams.get_mut(&stream).filter(|s| !s.closing)
    }

    /// Queues a control message.
    pub fn send_control(
        &mut self,
        stream: u32,
        payload: Bytes,
        now: Instant,
    ) -> Result<(), SendError> {
        if payload.len() > MAX_PAYLOAD {
            return Err(SendError::TooLarge(payload.len()));
        }
        let state = self.usable(stream).ok_or(SendError::Closed)?;
        if state.queued_messages >= QUEUE_MESSAGES {
            return Err(SendError::Full);
        }
        state.queued_messages += 1;
        state.queue.push_back(Item {
            stream,
            kind: Kind::CONTROL,
            payload,
            queued_at: now,
        });
        Ok(())
    }

    /// Bytes of data [`Session::send_data`] takes now; `None` when the stream is closed.
    pub fn capacity(&self, stream: u32) -> Option<usize> {
        let state = self.streams.get(&stream).filter(|s| !s.closing)?;
        Some((state.credit as usize).min(QUEUE_BYTES.saturating_sub(state.queued_data)))
    }

    /// Queues as much of `data` as there is room for, and leaves the rest in it.
    pub fn send_data(
        &mut self,
        stream: u32,
        data: &mut Bytes,
        now: Instant,
    ) -> Result<(), SendError> {
        let room = self.capacity(stream).ok_or(SendError::Closed)?;
        let state = self.usable(stream).ok_or(SendError::Closed)?;
        let mut part = data.split_to(room.min(data.len()));
        state.credit -= part.len() as u32;
        state.queued_data += part.len();
        while !part.is_empty() {
            let payload = part.split_to(part.len().min(DATA_CHUNK));
            state.queue.push_back(Item {
                stream,
                kind: Kind::DATA,
                payload,
                queued_at: now,
            });
        }
        Ok(())
    }

    /// The user took `bytes` of received data; the peer may send as many more.
    pub fn consumed(&mut self, stream: u32, bytes: usize, now: Instant) {
        let Some(state) = self.usable(stream) else {
            return;
        };
        state.consumed = state
            .consumed
            .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if state.consumed >= STREAM_WINDOW / 2 {
            let grant = std::mem::take(&mut state.consumed);
            state.room = state.room.saturating_add(grant);
            let payload = Bytes::copy_from_slice(&grant.to_le_bytes());
            state.queue.push_front(Item {
                stream,
                kind: Kind::CREDIT,
                payload,
                queued_at: now,
            });
        }
    }

    // Sending ------------------------------------------------------------------------------------

    /// Appends frames to `out` until it holds `budget` bytes or nothing may be sent now.
    pub fn transmit(&mut self, now: Instant, out: &mut BytesMut, budget: usize) {
        if !self.up {
            return;
        }
        if let Some(reply) = self.hello.due.take() {
            self.write_hello(reply, out);
        }
        if !self.established {
            return;
        }
        while out.len() < budget {
            if self.sending.cursor == self.sending.flight.len() && !self.number_next() {
                break;
            }
            self.write_next(now, out);
        }
        // Any frame acknowledges; one of its own is needed only if nothing else went out.
        if self.receiving.ack_now || self.sending.probe {
            self.write_ack(out);
        }
    }

    /// Takes one queued item into the flight, streams in turn, the main stream first.
    fn number_next(&mut self) -> bool {
        if self.sending.flight_bytes >= FLIGHT_BYTES {
            return false;
        }
        let waiting = |(id, s): (&u32, &Stream)| (!s.queue.is_empty()).then_some(*id);
        let main = self.streams.get_key_value(&MAIN_STREAM).and_then(waiting);
        let next = main
            .or_else(|| {
                self.streams
                    .range(self.turn.saturating_add(1)..)
                    .find_map(waiting)
            })
            .or_else(|| self.streams.iter().find_map(waiting));
        let Some((id, state)) = next.and_then(|id| Some((id, self.streams.get_mut(&id)?))) else {
            return false;
        };
        let Some(item) = state.queue.pop_front() else {
            return false;
        };
        match item.kind {
            Kind::DATA => state.queued_data -= item.payload.len(),
            Kind::CONTROL => state.queued_messages -= 1,
            _ => {}
        }
        if state.closing && state.queue.is_empty() {
            self.streams.remove(&id);
        }
        if id != MAIN_STREAM {
            self.turn = id;
        }
        self.sending.next_seq += 1;
        self.sending.flight_bytes += HEADER_LEN + item.payload.len();
        self.sending.flight.push_back(item);
        true
    }

    fn write_next(&mut self, now: Instant, out: &mut BytesMut) {
        let seq = self.sending.last_written() + 1;
        let Some(item) = self.sending.flight.get(self.sending.cursor) else {
            return;
        };
        let waited = now.saturating_duration_since(item.queued_at).as_micros();
        Frame {
            kind: item.kind,
            flags: FLAG_SEQUENCED,
            link: self.tag,
            stream: item.stream,
            seq,
            ack: self.receiving.last,
            waited_us: u64::try_from(waited).unwrap_or(u64::MAX),
            payload: item.payload.clone(),
        }
        .encode(out);
        self.sending.cursor += 1;
        self.sending
            .probe_at
            .get_or_insert(now + self.sending.probe_wait);
        self.acknowledged_received();
    }

    fn write_ack(&mut self, out: &mut BytesMut) {
        let flags = if self.sending.probe { FLAG_ACK_NOW } else { 0 };
        self.sending.probe = false;
        self.acknowledged_received();
        Frame {
            kind: Kind::ACK,
            flags,
            link: self.tag,
            stream: MAIN_STREAM,
            seq: self.sending.last_written(),
            ack: self.receiving.last,
            waited_us: 0,
            payload: Bytes::new(),
        }
        .encode(out);
    }

    fn write_hello(&mut self, reply: bool, out: &mut BytesMut) {
        let hello = Hello {
            protocol: message::PROTOCOL,
            epoch: self.epoch,
            peer_epoch: self.peer,
            received: self.receiving.last,
            reply,
        };
        // A struct of numbers always becomes JSON; an empty payload would merely be ignored.
        let payload = serde_json::to_vec(&hello).unwrap_or_default().into();
        Frame {
            kind: Kind::HELLO,
            flags: 0,
            link: 0,
            stream: MAIN_STREAM,
            seq: 0,
            ack: 0,
            waited_us: 0,
            payload,
        }
        .encode(out);
    }

    fn acknowledged_received(&mut self) {
        self.receiving.ack_now = false;
        self.receiving.ack_at = None;
        self.receiving.unacked_bytes = 0;
    }

    /// Everything in flight is to be written again.
    fn rewind(&mut self) {
        self.sending.cursor = 0;
        self.sending.probe = false;
        self.sending.probe_at = None;
        self.sending.probe_wait = PROBE_AFTER;
    }

    fn drop_acknowledged(&mut self, ack: u64, now: Instant) {
        let sending = &mut self.sending;
        let first = sending.next_seq - sending.flight.len() as u64;
        if ack < first || ack > sending.last_written() {
            return;
        }
        for item in sending.flight.drain(..=(ack - first) as usize) {
            sending.flight_bytes -= HEADER_LEN + item.payload.len();
            sending.cursor -= 1;
        }
        sending.probe_wait = PROBE_AFTER;
        sending.probe_at = (sending.cursor > 0).then(|| now + PROBE_AFTER);
    }

    // Receiving ----------------------------------------------------------------------------------

    /// Takes bytes from the connection. Events are fetched with [`Session::event`].
    pub fn receive(&mut self, mut bytes: &[u8], now: Instant) {
        self.received_at = Some(now);
        while let Some(frame) = self.decoder.decode(&mut bytes) {
            self.take(frame, now);
        }
    }

    fn take(&mut self, frame: Frame, now: Instant) {
        if frame.kind == Kind::HELLO {
            // A payload that is no Hello has a good checksum: a peer we cannot understand. Its
            // version is all one could report, so there is nothing to do but wait for another.
            if let Ok(hello) = serde_json::from_slice(&frame.payload) {
                self.take_hello(&hello, now);
            }
            return;
        }
        if !self.established || frame.link != self.tag {
            return;
        }
        self.drop_acknowledged(frame.ack, now);
        if frame.flags & FLAG_SEQUENCED != 0 {
            self.take_sequenced(frame, now);
        } else if frame.seq > self.receiving.last {
            // The peer says it wrote more than came: lost, and worth saying again each time.
            self.hello.due.get_or_insert(false);
        } else if frame.flags & FLAG_ACK_NOW != 0 {
            self.receiving.ack_now = true;
        }
    }

    fn take_hello(&mut self, hello: &Hello, now: Instant) {
        if !message::speaks(hello.protocol) {
            self.established = false;
            // The answer is how the other end learns what we speak.
            self.hello.due = self.hello.due.or(hello.reply.then_some(false));
            self.events.push_back(Event::Incompatible {
                protocol: hello.protocol,
            });
            return;
        }
        let knows_me = hello.peer_epoch == Some(self.epoch);
        if self.role == Role::Host && !knows_me {
            // Left over from what the guest said to an earlier server.
            return;
        }
        let fresh = self.peer != Some(hello.epoch);
        if fresh {
            self.start_over(hello.epoch);
        } else if knows_me {
            // Not limited to what this connection wrote: the peer may know more from the last one.
            self.sending.cursor = self.sending.flight.len();
            self.drop_acknowledged(hello.received, now);
        }
        self.rewind();
        if hello.reply {
            self.hello.due = Some(false);
        }
        self.hello.again_at = None;
        let was = std::mem::replace(&mut self.established, true);
        if fresh || !was {
            self.events.push_back(Event::Established {
                peer: hello.epoch,
                fresh,
            });
        }
    }

    fn start_over(&mut self, peer: u64) {
        self.peer = Some(peer);
        let (host, guest) = match self.role {
            Role::Host => (self.epoch, peer),
            Role::Guest => (peer, self.epoch),
        };
        let mut crc = crc32fast::Hasher::new();
        crc.update(&host.to_le_bytes());
        crc.update(&guest.to_le_bytes());
        self.tag = crc.finalize();
        self.sending = Sending::default();
        self.receiving = Receiving::default();
        self.streams.clear();
        self.streams.insert(MAIN_STREAM, Stream::open());
    }

    fn take_sequenced(&mut self, frame: Frame, now: Instant) {
        if frame.seq <= self.receiving.last {
            // Sent again although it came: our acknowledgement was lost.
            self.receiving.ack_now = true;
            return;
        }
        if frame.seq != self.receiving.last + 1 {
            if self.receiving.gap_reported != Some(self.receiving.last) {
                self.receiving.gap_reported = Some(self.receiving.last);
                self.hello.due.get_or_insert(false);
            }
            return;
        }
        self.receiving.last = frame.seq;
        self.receiving.gap_reported = None;
        self.receiving.unacked_bytes += frame.payload.len();
        self.receiving.ack_at.get_or_insert(now + ACK_WITHIN);
        if frame.kind == Kind::CONTROL || self.receiving.unacked_bytes >= ACK_AFTER_BYTES {
            self.receiving.ack_now = true;
        }
        self.deliver(frame);
    }

    fn deliver(&mut self, frame: Frame) {
        let stream = frame.stream;
        match frame.kind {
            // A stream's first message opens it at the guest, so control goes to the user always.
            Kind::CONTROL => self.events.push_back(Event::Control {
                stream,
                payload: frame.payload,
                waited: Duration::from_micros(frame.waited_us),
            }),
            Kind::DATA => {
                let Some(state) = self.usable(stream) else {
                    return;
                };
                match state.room.checked_sub(frame.payload.len() as u32) {
                    Some(room) => {
                        state.room = room;
                        self.events.push_back(Event::Data {
                            stream,
                            payload: frame.payload,
                        });
                    }
                    None => {
                        self.close(stream);
                        self.events.push_back(Event::Overrun { stream });
                    }
                }
            }
            Kind::CREDIT => {
                if let (Some(state), 4..) = (self.usable(stream), frame.payload.len()) {
                    let grant = (&frame.payload[..]).get_u32_le();
                    state.credit = state.credit.saturating_add(grant).min(STREAM_WINDOW);
                }
            }
            // Counted, acknowledged and ignored: a newer peer's.
            _ => {}
        }
    }

    // Time ---------------------------------------------------------------------------------------

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
        if self.decoder.partial() && past(self.received_at.map(|at| at + PARTIAL_FOR)) {
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
