#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::{super::flow::Tuple, *};

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
const TIMEOUTS: TcpTimeouts = TcpTimeouts {
    established: 432_000,
    unacknowledged: 300,
    max_retransmissions: 300,
};

fn to(source: Ipv4Addr, destination: Ipv4Addr, port: u16) -> Flow {
    let original = Tuple {
        source: source.into(),
        source_port: 40_000,
        destination: destination.into(),
        destination_port: port,
    };
    Flow {
        id: 1,
        zone: 0,
        protocol: Protocol::Tcp,
        original,
        reply: Tuple {
            source: original.destination,
            source_port: original.destination_port,
            destination: original.source,
            destination_port: original.source_port,
        },
        state: Some(TcpState::Established),
        status: Status::CONFIRMED,
        timeout: Some(432_000),
    }
}

fn rules<'a>(cidrs: &'a [Cidr], ports: &'a [u16]) -> Rules<'a> {
    Rules {
        instance: GUEST.into(),
        ignore_source_cidrs: cidrs,
        ignore_destination_ports: ports,
        max_flow_idle: None,
    }
}

fn limited(seconds: u64) -> Rules<'static> {
    let limit = IdleLimit {
        longest: Duration::from_secs(seconds),
        timeouts: TIMEOUTS,
    };
    Rules {
        max_flow_idle: Some(limit),
        ..rules(&[], &[])
    }
}

#[test]
fn only_three_states_are_over() {
    for number in 0..=u8::MAX {
        let state = TcpState::from_number(number);
        let flow = Flow {
            state: Some(state),
            ..to(CLIENT, GUEST, 80)
        };
        let over = matches!(number, 0 | 7 | 8);
        let expected = if over {
            Verdict::Inactive(Reason::Closed(state))
        } else {
            Verdict::Active
        };
        assert_eq!(classify(&flow, &rules(&[], &[])), expected, "{state:?}");
    }
    let unsaid = Flow {
        state: None,
        ..to(CLIENT, GUEST, 80)
    };
    assert!(is_active(&unsaid, &rules(&[], &[])));
}

#[test]
fn the_guests_own_connections_do_not_count() {
    let outbound = to(GUEST, CLIENT, 443);
    assert_eq!(outbound.reply.destination, GUEST);
    let verdict = classify(&outbound, &rules(&[], &[]));
    assert_eq!(verdict, Verdict::Inactive(Reason::OtherDestination));
}

#[test]
fn ignored_sources_and_ports_do_not_count() {
    let cidrs = ["192.0.2.0/24".parse().unwrap()];
    let verdict = |flow: Flow, cidrs: &[Cidr], ports: &[u16]| classify(&flow, &rules(cidrs, ports));
    let web = to(CLIENT, GUEST, 80);
    let ignored = Verdict::Inactive(Reason::IgnoredSource);
    assert_eq!(verdict(web, &cidrs, &[]), ignored);
    let other = to(Ipv4Addr::new(192, 0, 3, 1), GUEST, 80);
    assert_eq!(verdict(other, &cidrs, &[]), Verdict::Active);
    let ignored = Verdict::Inactive(Reason::IgnoredPort);
    assert_eq!(verdict(web, &[], &[22, 80]), ignored);
    // The client's own port is not the destination's.
    assert_eq!(verdict(web, &[], &[40_000]), Verdict::Active);
}

#[test]
fn mapped_addresses_are_the_same_addresses() {
    let mut rules = rules(&[], &[]);
    rules.instance = GUEST.to_ipv6_mapped().into();
    assert!(is_active(&to(CLIENT, GUEST, 80), &rules));
}

#[test]
fn udp_does_not_count() {
    let flow = Flow {
        protocol: Protocol::Udp,
        ..to(CLIENT, GUEST, 53)
    };
    let verdict = classify(&flow, &rules(&[], &[]));
    assert_eq!(verdict, Verdict::Inactive(Reason::Protocol));
}

#[test]
fn an_entry_of_a_dead_client_ends_at_the_limit() {
    let silent = |seconds: u32| Flow {
        timeout: Some(432_000 - seconds),
        ..to(CLIENT, GUEST, 80)
    };
    assert!(is_active(&silent(3600), &limited(3600)));
    let idle = Reason::Idle(Duration::from_secs(3601));
    assert_eq!(
        classify(&silent(3601), &limited(3600)),
        Verdict::Inactive(idle)
    );
    assert!(
        is_active(&silent(3601), &rules(&[], &[])),
        "without a limit"
    );
}

#[test]
fn where_the_timeout_says_nothing_the_flow_counts() {
    let web = to(CLIENT, GUEST, 80);
    // Data that waits for its acknowledgement: the kernel gives it 300 s instead of 5 days.
    for timeout in [None, Some(0), Some(299), Some(300)] {
        assert!(
            is_active(&Flow { timeout, ..web }, &limited(60)),
            "{timeout:?}"
        );
    }
    let old = Flow {
        timeout: Some(1000),
        ..web
    };
    assert!(!is_active(&old, &limited(60)));
    for status in [
        Status::FIXED_TIMEOUT,
        Status::OFFLOAD,
        Status::HARDWARE_OFFLOAD,
    ] {
        assert!(
            is_active(&Flow { status, ..old }, &limited(60)),
            "{status:?}"
        );
    }
    for state in [TcpState::SynSent, TcpState::FinWait, TcpState::Unknown(12)] {
        let state = Some(state);
        assert!(is_active(&Flow { state, ..old }, &limited(60)), "{state:?}");
    }
    // The setting was lowered since the flow's last packet.
    let long = Flow {
        timeout: Some(500_000),
        ..web
    };
    assert!(is_active(&long, &limited(60)));
}

proptest! {
    #[test]
    fn a_rule_more_never_makes_a_flow_count(
        source: u32, port: u16, state: u8, cidr: (u32, u8), ignored: u16, timeout: Option<u32>,
        limit in 1_u64..500_000,
    ) {
        let flow = Flow {
            state: Some(TcpState::from_number(state)), timeout,
            ..to(source.into(), GUEST, port)
        };
        let cidrs = [Cidr::new(Ipv4Addr::from(cidr.0).into(), cidr.1 % 33).unwrap()];
        let ports = [ignored];
        let bare = is_active(&flow, &rules(&[], &[]));
        for more in [rules(&cidrs, &[]), rules(&[], &ports), limited(limit)] {
            prop_assert!(bare || !is_active(&flow, &more));
        }
        let by_hand = bare && !cidrs[0].contains(flow.original.source) && port != ignored;
        prop_assert_eq!(is_active(&flow, &rules(&cidrs, &ports)), by_hand);
    }
}
