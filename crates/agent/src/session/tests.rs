#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use bytes::BytesMut;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::frame::{Frame, Kind};

mod restore;

/// What a pipe does with the bytes of one transmission.
#[derive(Debug, Clone)]
enum Fate {
    Deliver,
    Drop,
    CutAt(prop::sample::Index),
    Flip(prop::sample::Index),
    Garbage(Vec<u8>),
    /// Both ends see the connection end and begin.
    Reconnect,
    /// Only the host notices, and the tail of what was under way is lost.
    HostReconnects(prop::sample::Index),
    Wait(u16),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        8 => Just(Fate::Deliver),
        1 => Just(Fate::Drop),
        1 => any::<prop::sample::Index>().prop_map(Fate::CutAt),
        1 => any::<prop::sample::Index>().prop_map(Fate::Flip),
        1 => vec(any::<u8>(), 1..100).prop_map(Fate::Garbage),
        1 => Just(Fate::Reconnect),
        1 => any::<prop::sample::Index>().prop_map(Fate::HostReconnects),
        2 => (0u16..3000).prop_map(Fate::Wait),
    ]
}

struct Pair {
    now: Instant,
    ends: [Session; 2],
    seen: [Vec<Event>; 2],
}

const HOST: usize = 0;
const GUEST: usize = 1;

impl Pair {
    fn new() -> Self {
        let now = Instant::now();
        let mut ends = [Session::new(Role::Host, 11), Session::new(Role::Guest, 22)];
        ends.iter_mut().for_each(|e| e.link_up(now));
        Self {
            now,
            ends,
            seen: [Vec::new(), Vec::new()],
        }
    }

    fn connected() -> Self {
        let mut pair = Self::new();
        pair.settle();
        assert!(pair.ends.iter().all(Session::established));
        pair
    }

    /// One end writes once; the bytes meet their fate. Whether any were written.
    fn step(&mut self, from: usize, fate: &Fate) -> bool {
        let mut wire = BytesMut::new();
        self.ends[from].transmit(self.now, &mut wire, 40_000);
        let some = !wire.is_empty();
        let mut wire = wire.to_vec();
        match fate {
            Fate::Deliver => {}
            Fate::Drop => wire.clear(),
            Fate::CutAt(at) if some => wire.truncate(at.index(wire.len())),
            Fate::Flip(at) if some => {
                let at = at.index(wire.len());
                wire[at] ^= 0x55;
            }
            Fate::CutAt(_) | Fate::Flip(_) => {}
            Fate::Garbage(bytes) => wire.extend_from_slice(bytes),
            Fate::Reconnect => {
                wire.clear();
                self.ends.iter_mut().for_each(|e| e.link_up(self.now));
            }
            Fate::HostReconnects(at) => {
                if some {
                    wire.truncate(at.index(wire.len()));
                }
                self.ends[HOST].link_up(self.now);
            }
            Fate::Wait(ms) => self.pass(Duration::from_millis(u64::from(*ms))),
        }
        let to = 1 - from;
        self.ends[to].receive(&wire, self.now);
        while let Some(event) = self.ends[to].event() {
            if matches!(event, Event::Established { fresh: true, .. }) {
                (1..4).for_each(|stream| self.ends[to].open(stream));
            }
            self.seen[to].push(event);
        }
        some
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        for end in &mut self.ends {
            if end.deadline().is_some_and(|at| at <= self.now) {
                end.on_deadline(self.now);
            }
        }
    }

    /// Undisturbed until nothing more is said without a long silence.
    fn settle(&mut self) {
        for _ in 0..60 {
            while self.step(HOST, &Fate::Deliver) | self.step(GUEST, &Fate::Deliver) {}
            self.pass(Duration::from_millis(500));
        }
    }

    fn controls(&self, at: usize, stream: u32) -> Vec<Bytes> {
        let mine = |e: &Event| match e {
            Event::Control {
                stream: s, payload, ..
            }
            | Event::Data { stream: s, payload }
                if *s == stream =>
            {
                Some(payload.clone())
            }
            _ => None,
        };
        self.seen[at].iter().filter_map(mine).collect()
    }
}

fn text(n: usize) -> Bytes {
    Bytes::from(format!("message {n}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever the pipe does, everything said arrives once and in order, on every stream, both ways.
    #[test]
    fn every_message_arrives_exactly_once_in_order(
        fates in vec((any::<bool>(), fate(), 0u32..4), 1..150),
    ) {
        let mut pair = Pair::connected();
        let mut said = [[0usize; 4]; 2];
        for (n, (host, fate, stream)) in fates.iter().enumerate() {
            let from = if *host { HOST } else { GUEST };
            let now = pair.now;
            let s = *stream as usize;
            if n % 3 == 0 && *stream != 0 {
                let mut data = text(said[from][s]);
                let len = data.len();
                pair.ends[from].send_data(*stream, &mut data, now).unwrap();
                prop_assert!(data.is_empty(), "{len} bytes found no room");
            } else {
                pair.ends[from].send_control(*stream, text(said[from][s]), now).unwrap();
            }
            said[from][s] += 1;
            pair.step(from, fate);
        }
        pair.settle();
        for from in [HOST, GUEST] {
            prop_assert!(pair.ends[from].idle());
            for stream in 0..4u32 {
                let expected: Vec<_> = (0..said[from][stream as usize]).map(text).collect();
                prop_assert_eq!(pair.controls(1 - from, stream), expected);
            }
        }
    }

    /// A peer that says anything at all neither panics us nor makes us hold more than the windows.
    #[test]
    fn a_hostile_peer_is_harmless(frames in vec(
        (0u8..8, any::<u16>(), any::<bool>(), 0u32..5, 0u64..20, any::<u64>(), vec(any::<u8>(), 0..300)), 0..80,
    )) {
        let mut pair = Pair::connected();
        let tag = pair.ends[HOST].tag;
        for (kind, flags, tagged, stream, seq, ack, payload) in frames {
            let mut wire = BytesMut::new();
            Frame {
                kind: Kind(kind), flags, link: if tagged { tag } else { 1 }, stream, seq, ack,
                waited_us: ack, payload: payload.into(),
            }.encode(&mut wire);
            let now = pair.now;
            pair.ends[HOST].receive(&wire, now);
            let mut out = BytesMut::new();
            pair.ends[HOST].transmit(now, &mut out, 1 << 20);
            prop_assert!(pair.ends[HOST].streams.len() <= 4);
        }
    }
}

#[test]
fn an_unread_stream_stops_alone() {
    let mut pair = Pair::connected();
    let now = pair.now;
    for stream in 1..3 {
        pair.ends.iter_mut().for_each(|e| e.open(stream));
    }
    let mut sent = 0;
    for _ in 0..20 {
        let mut data = Bytes::from(vec![1u8; 32 << 10]);
        pair.ends[GUEST].send_data(1, &mut data, now).unwrap();
        sent += (32 << 10) - data.len();
        pair.settle();
    }
    assert_eq!(sent, STREAM_WINDOW as usize);
    let mut other = Bytes::from_static(b"hello");
    pair.ends[GUEST].send_data(2, &mut other, now).unwrap();
    pair.ends[GUEST]
        .send_control(MAIN_STREAM, text(1), now)
        .unwrap();
    pair.settle();
    assert_eq!(pair.controls(HOST, 2), ["hello"]);
    assert_eq!(pair.controls(HOST, MAIN_STREAM), [text(1)]);

    let now = pair.now;
    pair.ends[HOST].consumed(1, sent, now);
    pair.settle();
    assert_ne!(pair.ends[GUEST].capacity(1), Some(0));
}

#[test]
fn more_than_the_window_closes_the_stream() {
    let mut pair = Pair::connected();
    pair.ends.iter_mut().for_each(|e| e.open(1));
    pair.ends[GUEST].streams.get_mut(&1).unwrap().credit = u32::MAX;
    for _ in 0..6 {
        let now = pair.now;
        let mut data = Bytes::from(vec![1u8; 64 << 10]);
        pair.ends[GUEST].send_data(1, &mut data, now).unwrap();
        pair.settle();
    }
    assert!(pair.seen[HOST].contains(&Event::Overrun { stream: 1 }));
    let received: usize = pair.controls(HOST, 1).iter().map(Bytes::len).sum();
    assert!(received <= STREAM_WINDOW as usize);
}

#[test]
fn streams_take_turns() {
    let mut pair = Pair::connected();
    let now = pair.now;
    for stream in 1..4 {
        pair.ends[GUEST].open(stream);
        let mut data = Bytes::from(vec![stream as u8; 48 << 10]);
        pair.ends[GUEST].send_data(stream, &mut data, now).unwrap();
    }
    let mut out = BytesMut::new();
    pair.ends[GUEST].transmit(now, &mut out, 1 << 20);
    let mut decoder = Decoder::default();
    let mut wire = &out[..];
    let order: Vec<_> = std::iter::from_fn(|| decoder.decode(&mut wire))
        .map(|f| f.stream)
        .collect();
    assert_eq!(order, [1, 2, 3, 1, 2, 3, 1, 2, 3]);
}

#[test]
fn a_new_host_begins_anew_and_hears_nothing_old() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.ends[GUEST].open(1);
    pair.ends[GUEST].send_control(1, text(1), now).unwrap();
    // The old server vanishes before it heard that; the guest's bytes reach the new one.
    let mut stale = BytesMut::new();
    pair.ends[GUEST].transmit(now, &mut stale, 1 << 20);
    pair.ends[HOST] = Session::new(Role::Host, 33);
    pair.ends[HOST].link_up(now);
    pair.ends[HOST].receive(&stale, now);
    pair.seen[HOST].clear();
    pair.settle();
    assert_eq!(
        pair.seen[HOST],
        [Event::Established {
            peer: 22,
            fresh: true
        }]
    );
    assert_eq!(
        pair.seen[GUEST].last(),
        Some(&Event::Established {
            peer: 33,
            fresh: true
        })
    );
    let now = pair.now;
    assert_eq!(
        pair.ends[GUEST].send_control(1, text(2), now),
        Ok(()),
        "reopened by the test's step"
    );
}

#[test]
fn a_new_guest_drops_what_was_meant_for_the_old_one() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.ends[HOST]
        .send_control(MAIN_STREAM, text(1), now)
        .unwrap();
    pair.ends[GUEST] = Session::new(Role::Guest, 44);
    pair.ends[HOST].link_up(now);
    pair.ends[GUEST].link_up(now);
    pair.seen = [Vec::new(), Vec::new()];
    pair.settle();
    assert_eq!(
        pair.seen[HOST],
        [Event::Established {
            peer: 44,
            fresh: true
        }]
    );
    assert!(pair.controls(GUEST, MAIN_STREAM).is_empty());
    let now = pair.now;
    pair.ends[HOST]
        .send_control(MAIN_STREAM, text(2), now)
        .unwrap();
    pair.settle();
    assert_eq!(pair.controls(GUEST, MAIN_STREAM), [text(2)]);
}

#[test]
fn another_major_version_is_named_and_nothing_flows() {
    let mut pair = Pair::new();
    let hello = Hello {
        protocol: 9 << 16,
        epoch: 5,
        peer_epoch: Some(11),
        received: 0,
        reply: false,
    };
    let mut wire = BytesMut::new();
    Frame {
        kind: Kind::HELLO,
        flags: 0,
        link: 0,
        stream: 0,
        seq: 0,
        ack: 0,
        waited_us: 0,
        payload: serde_json::to_vec(&hello).unwrap().into(),
    }
    .encode(&mut wire);
    let now = pair.now;
    pair.ends[HOST].receive(&wire, now);
    assert_eq!(
        pair.ends[HOST].event(),
        Some(Event::Incompatible { protocol: 9 << 16 })
    );
    assert!(!pair.ends[HOST].established());
}

#[test]
fn waiting_is_told_so_that_ages_stay_true() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.ends[GUEST]
        .send_control(MAIN_STREAM, text(1), now)
        .unwrap();
    pair.step(GUEST, &Fate::Drop);
    pair.pass(Duration::from_secs(3));
    pair.settle();
    let waited = pair.seen[HOST].iter().find_map(|e| match e {
        Event::Control { waited, .. } => Some(*waited),
        _ => None,
    });
    assert!(waited.unwrap() >= Duration::from_secs(3), "{waited:?}");
}

#[test]
fn queues_are_bounded() {
    let mut end = Session::new(Role::Guest, 1);
    let now = Instant::now();
    for n in 0..QUEUE_MESSAGES {
        end.send_control(MAIN_STREAM, text(n), now).unwrap();
    }
    assert_eq!(
        end.send_control(MAIN_STREAM, text(0), now),
        Err(SendError::Full)
    );
    assert_eq!(end.send_control(9, text(0), now), Err(SendError::Closed));
    let big = Bytes::from(vec![0; MAX_PAYLOAD + 1]);
    assert_eq!(
        end.send_control(MAIN_STREAM, big, now),
        Err(SendError::TooLarge(MAX_PAYLOAD + 1))
    );
}

/// The guest missed the disconnect and holds the beginning of a frame: the new connection's first
/// words must not be taken for its payload until that is full.
#[test]
fn a_cut_frame_does_not_swallow_the_next_handshake() {
    let mut pair = Pair::connected();
    pair.ends.iter_mut().for_each(|e| e.open(1));
    let now = pair.now;
    let mut data = Bytes::from(vec![7; DATA_CHUNK]);
    pair.ends[HOST].send_data(1, &mut data, now).unwrap();
    let mut wire = BytesMut::new();
    pair.ends[HOST].transmit(now, &mut wire, 1 << 20);
    pair.ends[GUEST].receive(&wire[..200], now);
    pair.ends[HOST].link_up(now);
    pair.step(HOST, &Fate::Deliver);
    pair.pass(PARTIAL_FOR);
    pair.step(GUEST, &Fate::Deliver);
    assert!(pair.ends[HOST].established());
    pair.settle();
    assert_eq!(pair.controls(GUEST, 1), [vec![7; DATA_CHUNK]]);
}

/// Words of an earlier guest reach the host on the new guest's connection, and what the host says to
/// the one must not be taken as said to the other.
#[test]
fn a_message_for_the_old_guest_is_not_taken_by_the_new_one() {
    let mut pair = Pair::connected();
    let now = pair.now;
    let mut stale = BytesMut::new();
    pair.ends[GUEST].write_hello(false, &mut stale);
    pair.ends[GUEST] = Session::new(Role::Guest, 44);
    pair.ends.iter_mut().for_each(|e| e.link_up(now));
    pair.ends[HOST].receive(&stale, now);
    assert!(pair.ends[HOST].established(), "the premise of this test");
    pair.ends[HOST]
        .send_control(MAIN_STREAM, text(1), now)
        .unwrap();
    pair.settle();
    let now = pair.now;
    pair.ends[HOST]
        .send_control(MAIN_STREAM, text(2), now)
        .unwrap();
    pair.settle();
    assert_eq!(pair.controls(GUEST, MAIN_STREAM), [text(2)]);
}

#[test]
fn a_peer_that_does_not_read_makes_nothing_grow() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.ends[GUEST]
        .send_control(MAIN_STREAM, text(1), now)
        .unwrap();
    let mut wire = BytesMut::new();
    pair.ends[GUEST].transmit(now, &mut wire, 1 << 20);
    let mut out = BytesMut::from(&[0; 1000][..]);
    for _ in 0..100 {
        pair.ends[HOST].receive(&wire, now);
        pair.ends[HOST].transmit(now, &mut out, 1000);
    }
    assert_eq!(out.len(), 1000, "acknowledgements of duplicates must wait");
    out.clear();
    pair.ends[HOST].transmit(now, &mut out, 1000);
    assert!(!out.is_empty(), "but not be forgotten");
}
