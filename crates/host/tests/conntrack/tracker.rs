//! The tracker's truth against the kernel's.
use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use doze_host::conntrack::{
    Family, NotInSync, Observer, Options, TcpState, Tracker, TrackerOptions,
};
use tokio::{net::TcpStream, sync::watch};

use crate::world::*;

/// Without any signal for so long nothing more will come, and the test fails.
const QUIET: Duration = Duration::from_secs(20);

async fn tracker(receive_buffer: usize) -> (Observer, Tracker) {
    let options = Options {
        receive_buffer,
        ..Options::default()
    };
    let observer = Observer::open(options).await.unwrap();
    let tracker = Tracker::start(observer, TrackerOptions::default()).unwrap();
    patient("the first dump", tracker.in_sync()).await.unwrap();
    (observer, tracker)
}

/// Waits, by the tracker's own signal, until it knows what a dump says.
async fn agrees(observer: &Observer, tracker: &Tracker, watch: &mut watch::Receiver<u64>) {
    loop {
        watch.borrow_and_update();
        let truth = facts(&observer.dump(Family::Ipv4).await.unwrap());
        let known = tracker.flows_to(GUEST.into()).map(|flows| facts(&flows));
        if known.as_ref() == Ok(&truth) {
            return;
        }
        if tokio::time::timeout(QUIET, watch.changed()).await.is_err() {
            let known = known.unwrap();
            let over: Vec<_> = known.difference(&truth).take(3).collect();
            let missing: Vec<_> = truth.difference(&known).take(3).collect();
            let counters = tracker.counters();
            panic!("known and not there: {over:?}; there and not known: {missing:?}; {counters:?}");
        }
    }
}

#[test]
fn it_knows_what_was_there_and_what_comes_and_tells_who_watches() {
    inside(
        "tracker::it_knows_what_was_there_and_what_comes_and_tells_who_watches",
        async || {
            let guest = Guest::start();
            let _listener = guest.listen();
            let _early = TcpStream::connect((GUEST, PORT)).await.unwrap();
            let (observer, tracker) = tracker(1 << 20).await;
            assert_eq!(tracker.flows_to(GUEST.into()).unwrap().len(), 1);
            let mut watch = tracker.watch(GUEST.into());
            let others = tracker.watch(Ipv4Addr::new(10, 77, 0, 9).into());
            let _late = TcpStream::connect((GUEST, PORT)).await.unwrap();
            patient("a signal", watch.changed()).await.unwrap();
            agrees(&observer, &tracker, &mut watch).await;
            let flows = tracker.flows_to(GUEST.into()).unwrap();
            assert_eq!(flows.len(), 2);
            assert!(
                flows
                    .iter()
                    .all(|flow| flow.state == Some(TcpState::Established))
            );
            assert!(
                !others.has_changed().unwrap(),
                "signalled about another address"
            );
            assert_eq!(tracker.flows_to(HOST.into()), Ok(vec![]));
            let counters = tracker.counters();
            assert_eq!((counters.new, counters.resyncs, counters.flows), (1, 1, 2));
            tracker.stop().await;
        },
    );
}

#[test]
fn a_flood_beyond_the_buffer_is_recovered_from() {
    inside(
        "tracker::a_flood_beyond_the_buffer_is_recovered_from",
        async || {
            track();
            let (observer, tracker) = tracker(4096).await;
            let mut watch = tracker.watch(GUEST.into());
            let flood = tokio::task::spawn_blocking(|| {
                let injector = Injector::new();
                for round in 0..10 {
                    let these = round * 2000..(round + 1) * 2000;
                    injector.create(these.clone().map(made_up), 3);
                    // Changes of state and ends, whose loss would show.
                    injector.delete(these.clone().step_by(3).map(made_up));
                    injector.create(these.step_by(3).map(made_up), 7);
                }
            });
            patient("the flood", flood).await.unwrap();
            agrees(&observer, &tracker, &mut watch).await;
            let counters = tracker.counters();
            assert!(counters.overflows > 0, "{counters:?}");
            assert!(counters.resyncs > 1, "{counters:?}");
            assert_eq!(counters.flows, 20_000);
        },
    );
}

#[test]
fn changes_during_dumps_are_not_lost() {
    inside("tracker::changes_during_dumps_are_not_lost", async || {
        track();
        let (observer, tracker) = tracker(64 << 20).await;
        // After the subscription: the ends of older flows may be silent.
        Injector::new().create((0..20_000).map(made_up), 3);
        let mut watch = tracker.watch(GUEST.into());
        let changes = tokio::task::spawn_blocking(|| {
            let injector = Injector::new();
            for n in 0..10_000 {
                injector.delete([made_up(n * 2)]);
                if n % 2 == 0 {
                    injector.create([made_up(n * 2)], 7);
                }
            }
        });
        while !changes.is_finished() {
            patient("a dump", tracker.resync()).await.unwrap();
        }
        patient("the changes", changes).await.unwrap();
        agrees(&observer, &tracker, &mut watch).await;
        let counters = tracker.counters();
        assert_eq!((counters.flows, counters.overflows), (15_000, 0));
        assert!(counters.resyncs > 1);
    });
}

#[test]
fn losing_the_socket_is_owned_up_to_and_mended() {
    inside(
        "tracker::losing_the_socket_is_owned_up_to_and_mended",
        async || {
            track();
            let injector = Injector::new();
            let (observer, tracker) = tracker(1 << 20).await;
            let mut watch = tracker.watch(GUEST.into());
            injector.create((0..10).map(made_up), 3);
            agrees(&observer, &tracker, &mut watch).await;
            let mut health = tracker.watch_health();
            watch.borrow_and_update();
            tracker.cut(Duration::from_millis(100));
            let down =
                |health: &Result<(), NotInSync>| matches!(health, Err(NotInSync::Disconnected(_)));
            patient("the loss", health.wait_for(down)).await.unwrap();
            patient("the watcher's signal", watch.changed())
                .await
                .unwrap();
            let read = tracker.flows_to(IpAddr::from(GUEST));
            assert!(read.is_err() || tracker.counters().resyncs > 1, "{read:?}");
            // Nobody hears of these.
            injector.create((10..20).map(made_up), 3);
            injector.delete((0..5).map(made_up));
            patient("the reconnect", tracker.in_sync()).await.unwrap();
            agrees(&observer, &tracker, &mut watch).await;
            let counters = tracker.counters();
            assert_eq!((counters.disconnects, counters.flows), (1, 15));
            // And the new subscription hears.
            injector.create([made_up(30)], 3);
            agrees(&observer, &tracker, &mut watch).await;
            let after = tracker.counters().resyncs;
            assert_eq!(after, counters.resyncs, "known by a dump, not heard");
        },
    );
}

/// Whoever asks again and again meanwhile does not put the next attempt off.
#[test]
fn asking_does_not_keep_it_from_subscribing_again() {
    inside(
        "tracker::asking_does_not_keep_it_from_subscribing_again",
        async || {
            track();
            let (_, tracker) = tracker(1 << 20).await;
            let mut health = tracker.watch_health();
            tracker.cut(Duration::from_millis(500));
            let down = |h: &Result<(), NotInSync>| matches!(h, Err(NotInSync::Disconnected(_)));
            patient("the loss", health.wait_for(down)).await.unwrap();
            let asking = async {
                let mut pause = tokio::time::interval(Duration::from_millis(50));
                loop {
                    pause.tick().await;
                    if tracker.resync().await.is_ok() {
                        return;
                    }
                }
            };
            patient("the reconnect", asking).await;
            assert_eq!(tracker.health(), Ok(()));
        },
    );
}

#[test]
fn more_flows_than_allowed_are_no_truth() {
    inside(
        "tracker::more_flows_than_allowed_are_no_truth",
        async || {
            track();
            let injector = Injector::new();
            injector.create((0..10).map(made_up), 3);
            let options = TrackerOptions { max_flows: 10 };
            let tracker = Tracker::start(observer().await, options).unwrap();
            patient("the first dump", tracker.in_sync()).await.unwrap();
            let mut health = tracker.watch_health();
            injector.create([made_up(11)], 3);
            let full = |health: &Result<(), NotInSync>| *health == Err(NotInSync::TooManyFlows(10));
            patient("the limit", health.wait_for(full)).await.unwrap();
            injector.delete([made_up(0), made_up(11)]);
            patient("a dump", tracker.resync()).await.unwrap();
            assert_eq!(tracker.flows_to(GUEST.into()).unwrap().len(), 9);
        },
    );
}

/// The kernel may send no event about flows that began before anybody on the host had subscribed.
#[test]
fn a_resync_knows_the_end_of_silent_flows() {
    inside(
        "tracker::a_resync_knows_the_end_of_silent_flows",
        async || {
            track();
            let injector = Injector::new();
            injector.create((0..100).map(made_up), 3);
            let (observer, tracker) = tracker(1 << 20).await;
            injector.delete((0..50).map(made_up));
            patient("a dump", tracker.resync()).await.unwrap();
            let known = facts(&tracker.flows_to(GUEST.into()).unwrap());
            assert_eq!(known, facts(&observer.dump(Family::Ipv4).await.unwrap()));
            assert_eq!(known.len(), 50);
        },
    );
}
