#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

#[path = "../../../tests/conntrack/encode.rs"]
#[allow(dead_code, reason = "shared with tests that use more of it")]
mod encode;
use encode::{Connection, Says};

const ALL: Wanted = Wanted {
    ipv4: true,
    ipv6: true,
    udp: true,
};
const TCP4: Wanted = Wanted {
    ipv4: true,
    ipv6: false,
    udp: false,
};

fn only(bytes: &[u8]) -> Message<'_> {
    let mut messages = Messages(bytes);
    let message = messages.next().unwrap().unwrap();
    assert!(messages.next().is_none());
    message
}

fn connection() -> Connection {
    let [client, server] = [Ipv4Addr::new(192, 0, 2, 9), Ipv4Addr::new(10, 77, 0, 2)];
    Connection::tcp(client, 40_000, server, 80)
}

fn says() -> Says {
    Says {
        state: Some(3),
        timeout: Some(432_000),
        status: Some(0x18e),
        id: Some(0xdead_beef),
        zone: None,
    }
}

/// What Linux 6.18 sent for a connection of 10.9.0.1 to port 7 of 10.9.0.2 (x86-64).
#[cfg(target_endian = "little")]
const RECORDED: &str = concat!(
    "c4000000000100060000000000000000020000003400018014000180080001000a090001080002000a090002",
    "1c000280050001000600000006000200e689000006000300000700003400028014000180080001000a090002",
    "080002000a0900011c0002800500010006000000060002000007000006000300e689000008000c00cb6c0672",
    "08000300000000080800070000000078300004802c0001800500010001000000050002000a00000005000300",
    "0000000006000400030000000600050000000000",
);

#[test]
fn new_and_update_differ_by_the_headers_flags_only() {
    let new = encode::about(CT_NEW, 0x600, &connection(), says());
    let update = encode::about(CT_NEW, 0, &connection(), says());
    let destroy = encode::about(CT_DELETE, 0, &connection(), says());
    assert_eq!(only(&new).event(), Kind::New);
    assert_eq!(only(&update).event(), Kind::Update);
    assert_eq!(only(&destroy).event(), Kind::Destroy);
    assert_eq!(only(&new).payload, only(&update).payload);
    let other = encode::message(CT_GET, 0, 2, &[]);
    assert_eq!(only(&other).event(), Kind::Other);
}

#[cfg(target_endian = "little")]
#[test]
fn a_message_the_kernel_sent_is_understood() {
    let bytes: Vec<u8> = (0..RECORDED.len() / 2)
        .map(|at| u8::from_str_radix(&RECORDED[2 * at..2 * at + 2], 16).unwrap())
        .collect();
    let message = only(&bytes);
    assert_eq!(message.event(), Kind::New);
    let flow = flow(message.payload, TCP4).unwrap().unwrap();
    assert_eq!(flow.original.destination, Ipv4Addr::new(10, 9, 0, 2));
    assert_eq!(flow.original.source, Ipv4Addr::new(10, 9, 0, 1));
    assert_eq!(flow.original.destination_port, 7);
    assert_eq!(flow.reply.source, flow.original.destination);
    assert_eq!(flow.reply.destination_port, flow.original.source_port);
    assert_eq!(flow.state, Some(TcpState::SynSent));
    assert!(flow.status.contains(Status::CONFIRMED));
    assert!(!flow.status.contains(Status::SEEN_REPLY));
    assert_eq!(flow.timeout, Some(120));
}

#[test]
fn what_is_not_wanted_is_no_error_even_without_ports() {
    let mut udp = connection();
    udp.protocol = 17;
    let bytes = encode::about(CT_NEW, 0, &udp, says());
    assert_eq!(flow(only(&bytes).payload, TCP4), Ok(None));
    assert!(flow(only(&bytes).payload, ALL).unwrap().is_some());
    // ICMP has no ports.
    let icmp = encode::nested(1, &[encode::nested(2, &[encode::attribute(1, &[1])])]);
    let bytes = encode::message(CT_NEW, 0, 2, &[icmp]);
    assert_eq!(flow(only(&bytes).payload, ALL), Ok(None));
    let bytes = encode::message(CT_NEW, 0, 10, &[]);
    assert_eq!(flow(only(&bytes).payload, TCP4), Ok(None));
}

#[test]
fn what_is_missing_is_named() {
    let mut without = says();
    without.id = None;
    let bytes = encode::about(CT_NEW, 0, &connection(), without);
    assert_eq!(
        flow(only(&bytes).payload, ALL),
        Err(Malformed::Missing("id"))
    );
    let bytes = encode::message(CT_NEW, 0, 2, &[encode::attribute(12, &[0; 3])]);
    let size = Malformed::Size {
        attribute: 12,
        found: 3,
        expected: 4,
    };
    assert_eq!(flow(only(&bytes).payload, ALL), Err(size));
}

#[test]
fn two_messages_in_one_datagram_are_both_read() {
    let one = encode::about(CT_NEW, 0, &connection(), says());
    let two = [one.clone(), one].concat();
    assert_eq!(Messages(&two).filter(|m| m.is_ok()).count(), 2);
    let cut = &two[..two.len() - 5];
    assert!(matches!(
        Messages(cut).last(),
        Some(Err(Malformed::Short(5)))
    ));
}

#[test]
fn usage_is_read() {
    let entries = encode::attribute(1, &7_u32.to_be_bytes());
    let most = encode::attribute(2, &99_u32.to_be_bytes());
    let bytes = encode::message(CT_GET_STATS, 0, 0, &[entries.clone(), most]);
    let known = usage(only(&bytes).payload).unwrap();
    assert_eq!((known.entries, known.max_entries), (7, Some(99)));
    let bytes = encode::message(CT_GET_STATS, 0, 0, &[entries]);
    assert_eq!(usage(only(&bytes).payload).unwrap().max_entries, None);
}

fn address() -> impl Strategy<Value = (IpAddr, IpAddr)> {
    prop_oneof![
        any::<(u32, u32)>().prop_map(|(a, b)| (Ipv4Addr::from(a).into(), Ipv4Addr::from(b).into())),
        any::<(u128, u128)>()
            .prop_map(|(a, b)| (Ipv6Addr::from(a).into(), Ipv6Addr::from(b).into())),
    ]
}

proptest! {
    #[test]
    fn nothing_panics_on_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for message in Messages(&bytes).flatten() {
            let _ = (message.errno(), flow(message.payload, ALL), usage(message.payload));
        }
        let payload = [&[2, 0, 0, 0][..], &bytes].concat();
        let _ = (flow(&payload, ALL), usage(&payload));
    }

    #[test]
    fn damage_to_a_message_never_panics(at in 0_usize..200, value: u8, cut in 0_usize..200) {
        let mut bytes = encode::about(CT_NEW, 0, &connection(), says());
        let length = bytes.len();
        bytes[at % length] = value;
        for message in Messages(&bytes[..length - cut % length]).flatten() {
            let _ = flow(message.payload, ALL);
        }
    }

    #[test]
    fn what_is_said_is_read(
        (client, server) in address(),
        ports: (u16, u16),
        state in prop::option::of(any::<u8>()),
        timeout: Option<u32>, status: u32, id: u32, zone: Option<u16>, udp: bool,
    ) {
        let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
        let connection = Connection {
            client, server, client_port: ports.0, server_port: ports.1, protocol: protocol.number(),
        };
        let said = Says { state, timeout, status: Some(status), id: Some(id), zone };
        let bytes = encode::about(CT_NEW, 0, &connection, said);
        let original = Tuple {
            source: client, source_port: ports.0, destination: server, destination_port: ports.1,
        };
        let reply = Tuple {
            source: server, source_port: ports.1, destination: client, destination_port: ports.0,
        };
        let expected = Flow {
            id, zone: zone.unwrap_or(0), protocol, original, reply,
            state: state.map(TcpState::from_number), status: Status(status), timeout,
        };
        prop_assert_eq!(flow(only(&bytes).payload, ALL), Ok(Some(expected)));
    }
}
