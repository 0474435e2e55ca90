//! Dumps and events as the kernel sends them.
use std::{collections::BTreeSet, net::Ipv4Addr, process::Command};

use doze_host::conntrack::{
    ConntrackError, Event, Family, Lost, Observer, Options, Protocol, Status, TcpState,
};
use tokio::{io::AsyncReadExt, net::TcpStream};

use crate::{encode::Connection, world::*};

#[test]
fn a_connection_is_seen_from_its_first_packet_to_its_last() {
    inside(
        "events::a_connection_is_seen_from_its_first_packet_to_its_last",
        async || {
            let guest = Guest::start();
            let listener = guest.listen();
            let observer = observer().await;
            let mut events = observer.events().unwrap();
            assert_eq!(observer.dump(Family::Ipv4).await.unwrap(), []);

            let mut client = TcpStream::connect((GUEST, PORT)).await.unwrap();
            let (server, _) = listener.accept().unwrap();
            let Event::New(first) = next(&mut events, PORT).await else {
                panic!("no NEW")
            };
            assert_eq!(first.original.destination, GUEST);
            assert_eq!(first.original.source, HOST);
            assert_eq!(
                first.original.source_port,
                client.local_addr().unwrap().port()
            );
            assert_eq!(first.reply.source, GUEST);
            assert_eq!(first.protocol, Protocol::Tcp);
            assert_eq!(first.state, Some(TcpState::SynSent));

            let mut state = first.state;
            let mut seen = vec![];
            while state != Some(TcpState::Established) {
                let Event::Update(flow) = next(&mut events, PORT).await else {
                    panic!("an event that is no UPDATE")
                };
                assert_eq!((flow.id, flow.original), (first.id, first.original));
                state = flow.state.or(state);
                seen.extend(flow.state);
            }
            assert_eq!(seen, [TcpState::SynReceived, TcpState::Established]);
            let dumped = observer.dump(Family::Ipv4).await.unwrap();
            assert_eq!(dumped.len(), 1, "{dumped:?}");
            assert_eq!((dumped[0].id, dumped[0].state), (first.id, state));
            assert!(dumped[0].status.contains(Status::ASSURED));
            let timeouts = observer.tcp_timeouts().unwrap();
            assert!(
                dumped[0]
                    .timeout
                    .is_some_and(|left| left <= timeouts.established)
            );

            drop(server);
            assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
            drop(client);
            while state != Some(TcpState::TimeWait) {
                let Event::Update(flow) = next(&mut events, PORT).await else {
                    panic!("an event that is no UPDATE")
                };
                state = flow.state.or(state);
            }
            let [client, server] = [first.original.source_port, PORT];
            Injector::new().delete([Connection::tcp(HOST, client, GUEST, server)]);
            let Event::Destroy(last) = next(&mut events, PORT).await else {
                panic!("no DESTROY")
            };
            assert_eq!((last.id, last.original), (first.id, first.original));
            assert_eq!(observer.dump(Family::Ipv4).await.unwrap(), []);
        },
    );
}

#[test]
fn a_client_of_a_mapped_address_is_an_ipv4_client() {
    inside(
        "events::a_client_of_a_mapped_address_is_an_ipv4_client",
        async || {
            let guest = Guest::start();
            let _listener = guest.listen();
            let mut events = observer().await.events().unwrap();
            let address = (GUEST.to_ipv6_mapped(), PORT);
            let _client = TcpStream::connect(address).await.unwrap();
            let Event::New(flow) = next(&mut events, PORT).await else {
                panic!("no NEW")
            };
            assert_eq!(
                (flow.family(), flow.original.destination),
                (Family::Ipv4, GUEST.into())
            );
        },
    );
}

#[test]
fn a_half_open_connection_is_there() {
    inside("events::a_half_open_connection_is_there", async || {
        let _guest = Guest::start();
        // The guest's address is on the wire and nobody has it: its SYNs are never answered.
        run("ip neigh replace 10.77.0.3 lladdr 02:00:00:00:00:03 dev doze-a nud permanent");
        let observer = observer().await;
        let mut events = observer.events().unwrap();
        let connecting = tokio::spawn(TcpStream::connect((Ipv4Addr::new(10, 77, 0, 3), PORT)));
        let Event::New(flow) = next(&mut events, PORT).await else {
            panic!("no NEW")
        };
        assert_eq!(flow.state, Some(TcpState::SynSent));
        let dumped = observer.dump(Family::Ipv4).await.unwrap();
        assert_eq!(dumped.len(), 1);
        assert_eq!(dumped[0].state, Some(TcpState::SynSent));
        connecting.abort();
    });
}

#[test]
fn every_state_and_both_families_are_dumped_apart() {
    inside(
        "events::every_state_and_both_families_are_dumped_apart",
        async || {
            track();
            let injector = Injector::new();
            for state in 0..10_u8 {
                injector.create([made_up(state.into())], state);
            }
            let mut other = made_up(20);
            other.client = "fd00::1".parse().unwrap();
            other.server = "fd00::2".parse().unwrap();
            injector.create([other], 3);
            let mut udp = made_up(21);
            udp.protocol = 17;
            injector.send(&crate::encode::about(
                crate::encode::CT_NEW,
                crate::encode::CREATE,
                &udp,
                crate::encode::Says {
                    timeout: Some(600),
                    ..Default::default()
                },
            ));
            let observer = observer().await;
            let v4 = observer.dump(Family::Ipv4).await.unwrap();
            let states: BTreeSet<_> = v4.iter().map(|flow| flow.state.unwrap().number()).collect();
            assert_eq!((v4.len(), states), (10, (0..10).collect()));
            let v6 = observer.dump(Family::Ipv6).await.unwrap();
            assert_eq!(v6.len(), 1);
            assert_eq!(v6[0].original.destination, other.server);
            let usage = observer.usage().await.unwrap();
            assert_eq!(usage.entries, 12);
            let options = Options {
                udp: true,
                ..Options::default()
            };
            let observer = Observer::open(options).await.unwrap();
            assert_eq!(observer.dump(Family::Ipv4).await.unwrap().len(), 11);
        },
    );
}

#[test]
fn an_overflow_is_told_once_the_queue_is_empty() {
    inside(
        "events::an_overflow_is_told_once_the_queue_is_empty",
        async || {
            track();
            let options = Options {
                receive_buffer: 4096,
                ..Options::default()
            };
            let mut events = Observer::open(options).await.unwrap().events().unwrap();
            let granted = events.receive_buffer().unwrap().unwrap();
            assert!(granted < 64 * 1024, "{granted}");
            let injector = Injector::new();
            injector.create((0..5000).map(made_up), 3);
            let mut heard = 0;
            loop {
                match next(&mut events, 80).await {
                    Event::New(_) => heard += 1,
                    other => break assert_eq!(other, Event::Lost(Lost::Overflow)),
                }
            }
            assert!(heard < 5000);
            // What comes after it is heard again.
            injector.create([made_up(6000)], 3);
            let Event::New(flow) = next(&mut events, 80).await else {
                panic!("no NEW after the overflow")
            };
            assert_eq!(flow.original.source_port, made_up(6000).client_port);
        },
    );
}

#[test]
fn a_larger_buffer_than_the_limit_is_granted_to_root() {
    inside(
        "events::a_larger_buffer_than_the_limit_is_granted_to_root",
        async || {
            track();
            let events = observer().await.events().unwrap();
            let granted = events.receive_buffer().unwrap().unwrap();
            assert!(granted >= Options::default().receive_buffer, "{granted}");
        },
    );
}

/// As a user without capabilities, in a process of its own.
#[test]
fn without_the_privilege_it_says_so() {
    const UNPRIVILEGED: &str = "DOZE_TEST_UNPRIVILEGED";
    if std::env::var_os(UNPRIVILEGED).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let error = runtime
            .block_on(Observer::open(Options::default()))
            .unwrap_err();
        assert!(matches!(error, ConntrackError::Permission(_)), "{error:?}");
        return;
    }
    let output = Command::new("setpriv")
        .args([
            "--bounding-set=-all",
            "--inh-caps=-all",
            "--no-new-privs",
            "unshare",
            "--net",
        ])
        .arg("true")
        .output()
        .expect("this test needs the program setpriv (package util-linux)");
    assert!(!output.status.success(), "capabilities are still there");
    let output = Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"])
        .arg(std::env::current_exe().unwrap())
        .args([
            "events::without_the_privilege_it_says_so",
            "--exact",
            "--nocapture",
        ])
        .env(UNPRIVILEGED, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
fn a_dump_to_one_address_has_its_flows_and_no_others() {
    inside(
        "events::a_dump_to_one_address_has_its_flows_and_no_others",
        async || {
            track();
            let injector = Injector::new();
            injector.create((0..500).map(made_up), 3);
            let other = Ipv4Addr::new(10, 77, 0, 200);
            let client = Ipv4Addr::new(198, 18, 0, 1);
            injector.create(
                (1..=3).map(|port| Connection::tcp(client, port, other, 80)),
                7,
            );
            // One that it opened itself, to the other one.
            injector.create([Connection::tcp(other, 40_000, GUEST, 80)], 3);
            let observer = observer().await;
            let mut dump = observer.start_dump_to(other).unwrap();
            let mut flows = vec![];
            while dump.next(&mut flows).await.unwrap() {}
            let ports: BTreeSet<_> = flows.iter().map(|flow| flow.original.source_port).collect();
            assert_eq!(ports, BTreeSet::from([1, 2, 3]), "{} flows", flows.len());
            let all = observer.dump(Family::Ipv4).await.unwrap();
            assert_eq!(all.len(), 504);
            let wanted: Vec<_> = all
                .into_iter()
                .filter(|flow| flow.original.destination == other)
                .collect();
            assert_eq!(facts(&flows), facts(&wanted));
        },
    );
}
