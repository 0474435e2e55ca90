//! Incoming: handshakes, order, delivery.
use std::time::{Duration, Instant};

use bytes::Buf;

use super::{
    Event, Hello, MAIN_STREAM, Role, STREAM_WINDOW, Session, sending::Sending, streams::Stream,
};
use crate::{
    frame::{FLAG_ACK_NOW, FLAG_SEQUENCED, Frame, Kind},
    message,
};

const ACK_WITHIN: Duration = Duration::from_millis(20);
const ACK_AFTER_BYTES: usize = 128 << 10;

#[derive(Debug, Default)]
pub(super) struct Receiving {
    pub(super) last: u64,
    pub(super) unacked_bytes: usize,
    pub(super) ack_now: bool,
    pub(super) ack_at: Option<Instant>,
    /// The value of `last` for which a gap was reported already.
    pub(super) gap_reported: Option<u64>,
}

impl Session {
    /// Takes bytes from the connection. Events are fetched with [`Session::event`].
    pub fn receive(&mut self, mut bytes: &[u8], now: Instant) {
        if !bytes.is_empty() {
            self.received_at = Some(now);
        }
        while let Some(frame) = self.decoder.decode(&mut bytes) {
            self.take(frame, now);
        }
    }

    pub(super) fn take(&mut self, frame: Frame, now: Instant) {
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

    pub(super) fn take_hello(&mut self, hello: &Hello, now: Instant) {
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
        self.peer_protocol = Some(hello.protocol);
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

    pub(super) fn start_over(&mut self, peer: u64) {
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

    pub(super) fn take_sequenced(&mut self, frame: Frame, now: Instant) {
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

    pub(super) fn deliver(&mut self, frame: Frame) {
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
}
