//! A guest that wakes from a snapshot: its session goes on in the middle of a word, and sees no connection
//! end; the host's session is a new one on a new connection.
//!
//! ```text
//!   old host ──────────╳ cut            ╭── new host: Hello, Hello, ...
//!   guest    <─ bytes of the old host ──┴── bytes of the new one
//!   guest    ── (lost with the old socket) ──── rest of its words ──> new host
//! ```
use prop::sample::Index;

use super::*;

/// Wakes `pair`'s guest with another host. What the ends had said last is cut: of the old host's bytes
/// the guest has only the first `reached`, of the guest's own the first `lost` are gone (both of all there are).
fn wake(
    pair: &mut Pair,
    reached: impl FnOnce(usize) -> usize,
    lost: impl FnOnce(usize) -> usize,
    hellos: usize,
) {
    let now = pair.now;
    let mut wire = BytesMut::new();
    pair.ends[HOST].transmit(now, &mut wire, 1 << 20);
    let reached = reached(wire.len());
    pair.ends[GUEST].receive(&wire[..reached], now);
    while let Some(event) = pair.ends[GUEST].event() {
        pair.seen[GUEST].push(event);
    }
    let mut tail = BytesMut::new();
    pair.ends[GUEST].transmit(now, &mut tail, 1 << 20);
    let lost = lost(tail.len());

    pair.seen[HOST].clear();
    pair.ends[HOST] = Session::new(Role::Host, 33);
    pair.ends[HOST].link_up(now);
    // The host repeats itself while the guest's CPUs stand still.
    let mut said = BytesMut::new();
    for _ in 0..hellos {
        pair.ends[HOST].transmit(pair.now, &mut said, 1 << 20);
        pair.now = pair.ends[HOST].deadline().expect("the next Hello");
        pair.ends[HOST].on_deadline(pair.now);
    }
    pair.ends[HOST].transmit(pair.now, &mut said, 1 << 20);
    pair.ends[HOST].receive(&tail[lost..], pair.now);
    pair.ends[GUEST].receive(&said, pair.now);
    while let Some(event) = pair.ends[GUEST].event() {
        pair.seen[GUEST].push(event);
    }
}

/// Exchanges bytes until nobody has more to say, without letting time pass.
fn talk(pair: &mut Pair) {
    while pair.step(HOST, &Fate::Deliver) | pair.step(GUEST, &Fate::Deliver) {}
}

/// Time passes on both sides, in the steps in which something happens.
fn pass_to(pair: &mut Pair, end: Instant) {
    while let Some(next) = pair
        .ends
        .iter()
        .filter_map(Session::deadline)
        .min()
        .filter(|at| *at <= end)
    {
        pair.pass(next.saturating_duration_since(pair.now));
        talk(pair);
    }
    pair.pass(end.saturating_duration_since(pair.now));
    talk(pair);
}

/// The headers of frames that never come, with other bytes in between.
fn like_frames(len: usize) -> Vec<u8> {
    let mut header = BytesMut::new();
    Frame {
        kind: Kind::DATA,
        flags: 0,
        link: 0,
        stream: 1,
        seq: 0,
        ack: 0,
        waited_us: 0,
        payload: Bytes::from(vec![7; MAX_PAYLOAD]),
    }
    .encode(&mut header);
    header.truncate(1000);
    header.iter().copied().cycle().take(len).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Wherever it was cut, the handshake is there after one partial timeout, and what the old host and the
    /// guest had under way is neither heard by the new host nor taken for its words.
    #[test]
    fn a_handshake_needs_no_more_than_one_partial_timeout(
        host_data in 0usize..40_000, guest_data in 0usize..40_000,
        host_cut: Index, guest_cut: Index, hellos in 0usize..4,
    ) {
        let mut pair = Pair::connected();
        let now = pair.now;
        pair.ends.iter_mut().for_each(|e| e.open(1));
        // Each 1,000 bytes look like the beginning of a long frame: they hide each other, too.
        let mut data = Bytes::from(like_frames(host_data));
        pair.ends[HOST].send_data(1, &mut data, now).unwrap();
        pair.ends[HOST].send_control(MAIN_STREAM, text(1), now).unwrap();
        let mut data = Bytes::from(vec![8; guest_data]);
        pair.ends[GUEST].send_data(1, &mut data, now).unwrap();
        pair.ends[GUEST].send_control(MAIN_STREAM, text(2), now).unwrap();
        wake(&mut pair, |n| host_cut.index(n + 1), |n| guest_cut.index(n + 1), hellos);
        talk(&mut pair);
        let end = pair.now + PARTIAL_FOR;
        pass_to(&mut pair, end);
        prop_assert!(pair.ends[HOST].established());
        prop_assert_eq!(pair.ends[GUEST].tag, pair.ends[HOST].tag);
        prop_assert_eq!(&pair.seen[HOST], &[Event::Established { peer: 22, fresh: true }]);

        // Both directions work at once, from number 1.
        let heard = pair.controls(GUEST, MAIN_STREAM).len();
        let now = pair.now;
        pair.ends[HOST].send_control(MAIN_STREAM, text(3), now).unwrap();
        pair.ends[GUEST].send_control(MAIN_STREAM, text(4), now).unwrap();
        talk(&mut pair);
        prop_assert_eq!(&pair.controls(GUEST, MAIN_STREAM)[heard..], &[text(3)]);
        prop_assert_eq!(pair.controls(HOST, MAIN_STREAM), [text(4)]);
        prop_assert!(pair.controls(HOST, 1).is_empty());
    }
}

/// Nothing was under way: no time at all passes.
#[test]
fn without_a_cut_the_first_hello_is_answered_at_once() {
    let mut pair = Pair::connected();
    wake(&mut pair, |all| all, |_| 0, 0);
    talk(&mut pair);
    assert!(pair.ends.iter().all(Session::established));
    assert_eq!(
        pair.seen[GUEST].last(),
        Some(&Event::Established {
            peer: 33,
            fresh: true
        })
    );
}

/// Hellos that waited for the CPUs are all read in one go.
#[test]
fn many_hellos_make_one_new_host() {
    let mut pair = Pair::connected();
    pair.seen = [Vec::new(), Vec::new()];
    wake(&mut pair, |all| all, |_| 0, 6);
    pair.settle();
    let fresh = |peer| Event::Established { peer, fresh: true };
    assert_eq!(pair.seen, [vec![fresh(22)], vec![fresh(33)]]);
}

/// Streams of the old host are gone in the guest, and its credit and numbers with them.
#[test]
fn streams_of_the_old_host_are_closed_in_the_guest() {
    let mut pair = Pair::connected();
    pair.ends[GUEST].open(9);
    let now = pair.now;
    pair.ends[GUEST].send_control(9, text(1), now).unwrap();
    wake(&mut pair, |all| all, |_| 0, 0);
    assert_eq!(
        pair.ends[GUEST].send_control(9, text(2), now),
        Err(SendError::Closed)
    );
}

/// A message waits for the handshake with its time counted, here behind a cut frame.
#[test]
fn waiting_for_the_guest_is_told() {
    let mut pair = Pair::connected();
    pair.ends[HOST] = Session::new(Role::Host, 33);
    let now = pair.now;
    pair.ends[HOST].link_up(now);
    pair.settle();
    pair.seen[GUEST].clear();
    let now = pair.now;
    pair.ends[HOST]
        .send_control(MAIN_STREAM, text(5), now)
        .unwrap();
    // Lost with the connection, said again on the next.
    pair.step(HOST, &Fate::Drop);
    pair.pass(Duration::from_millis(700));
    pair.ends[HOST].link_up(pair.now);
    talk(&mut pair);
    let waited = pair.seen[GUEST].iter().find_map(|e| match e {
        Event::Control { waited, .. } => Some(*waited),
        _ => None,
    });
    assert_eq!(waited, Some(Duration::from_millis(700)));
}
