//! Outgoing: numbering in turn, writing, writing again, forgetting what was acknowledged.
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};

use super::{
    Hello, MAIN_STREAM, Session,
    streams::{Item, Stream},
};
use crate::frame::{FLAG_ACK_NOW, FLAG_SEQUENCED, Frame, HEADER_LEN, Kind};

/// Bytes written and not acknowledged, over all streams.
const FLIGHT_BYTES: usize = 1 << 20;
pub(super) const PROBE_AFTER: Duration = Duration::from_secs(1);
pub(super) const PROBE_AFTER_MAX: Duration = Duration::from_secs(8);

#[derive(Debug)]
pub(super) struct Sending {
    pub(super) next_seq: u64,
    pub(super) flight: VecDeque<Item>,
    pub(super) flight_bytes: usize,
    /// Items of `flight` already written on this connection.
    pub(super) cursor: usize,
    pub(super) probe: bool,
    pub(super) probe_at: Option<Instant>,
    pub(super) probe_wait: Duration,
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
    pub(super) fn last_written(&self) -> u64 {
        self.next_seq - 1 - (self.flight.len() - self.cursor) as u64
    }
}

impl Session {
    /// Appends frames to `out` until it holds `budget` bytes or nothing may be sent now.
    pub fn transmit(&mut self, now: Instant, out: &mut BytesMut, budget: usize) {
        // A peer that sends but does not read makes us wait too, never hold more.
        if !self.up || out.len() >= budget {
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
    pub(super) fn number_next(&mut self) -> bool {
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

    pub(super) fn write_next(&mut self, now: Instant, out: &mut BytesMut) {
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

    pub(super) fn write_ack(&mut self, out: &mut BytesMut) {
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

    pub(super) fn write_hello(&mut self, reply: bool, out: &mut BytesMut) {
        let hello = Hello {
            protocol: self.protocol,
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

    pub(super) fn acknowledged_received(&mut self) {
        self.receiving.ack_now = false;
        self.receiving.ack_at = None;
        self.receiving.unacked_bytes = 0;
    }

    /// Everything in flight is to be written again.
    pub(super) fn rewind(&mut self) {
        self.sending.cursor = 0;
        self.sending.probe = false;
        self.sending.probe_at = None;
        self.sending.probe_wait = PROBE_AFTER;
    }

    pub(super) fn drop_acknowledged(&mut self, ack: u64, now: Instant) {
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
}
