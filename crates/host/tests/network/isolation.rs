//! Who may speak to whom, and as whom.
use crate::{
    frames::{self, Frame},
    world::*,
};

/// An IPv4 packet that is recognised wherever it turns up.
const MARK: &[u8] = b"the packet that must not arrive";

fn is_marked(frame: &Frame) -> bool {
    frame.0.windows(MARK.len()).any(|bytes| bytes == MARK)
}

#[test]
fn a_guest_speaks_to_its_gateway_and_conntrack_sees_it() {
    inside(
        "isolation::a_guest_speaks_to_its_gateway_and_conntrack_sees_it",
        async || {
            let (_network, mut a, _b) = with_two_guests().await;
            a.ping_gateway();
            let flows = run("conntrack -L -p icmp");
            assert!(
                flows.contains(&format!("src={} dst={GATEWAY}", a.ip)),
                "{flows}"
            );
        },
    );
}

#[test]
fn guests_do_not_reach_each_other() {
    inside("isolation::guests_do_not_reach_each_other", async || {
        let (_network, mut a, b) = with_two_guests().await;
        b.drain();
        let packet = frames::udp_packet(a.ip, b.ip, 9, MARK);
        let direct = frames::ethernet(b.mac, a.mac, frames::IPV4, &packet);
        let broadcast = frames::ethernet(frames::BROADCAST, a.mac, frames::IPV4, &packet);
        let who_has = frames::arp_request(a.mac, a.ip, b.ip);

        a.send(&direct);
        a.send(&broadcast);
        a.send(&who_has);
        a.send_ip(&packet);
        a.ping_gateway();
        let seen = b.drain();
        assert!(!seen.iter().any(is_marked), "{seen:?}");
        assert!(
            !seen.iter().any(|frame| frame.source() == a.mac),
            "{seen:?}"
        );

        // Without the rules the routed packet does arrive, and what is bridged still does not.
        run("nft flush chain inet doze forward");
        a.send(&direct);
        a.send(&broadcast);
        a.send_ip(&packet);
        let routed =
            |frame: &Frame| (is_marked(frame) && frame.source() == a.gateway_mac).then_some(());
        let ((), others) = b.wait_for("the routed packet", routed);
        assert!(!others.iter().any(is_marked), "{others:?}");
        // Without the port's isolation that arrives too.
        run("bridge link set dev dz-2 isolated off");
        a.send(&direct);
        let bridged = |frame: &Frame| (is_marked(frame) && frame.source() == a.mac).then_some(());
        b.wait_for("the direct frame", bridged);
    });
}

#[test]
fn a_guest_speaks_only_as_itself() {
    inside("isolation::a_guest_speaks_only_as_itself", async || {
        let (_network, mut a, b) = with_two_guests().await;
        a.ping_gateway();
        let before = echoes_at_the_host();
        let echo = frames::echo(8, 999);
        let ping = |from| frames::ipv4(from, GATEWAY, frames::ICMP, &echo);
        let stranger = [2, 0, 0x0a, 0x4d, 9, 9];
        let ipv6 = [&[0x60, 0, 0, 0, 0, 8, 58, 64][..], &[0xfe; 32], &echo[..8]].concat();
        let spoofed = [
            (
                "another MAC",
                frames::ethernet(a.gateway_mac, stranger, frames::IPV4, &ping(a.ip)),
            ),
            (
                "another IP",
                frames::ethernet(
                    a.gateway_mac,
                    a.mac,
                    frames::IPV4,
                    &ping("10.77.9.9".parse().unwrap()),
                ),
            ),
            (
                "the gateway's IP",
                frames::ethernet(a.gateway_mac, a.mac, frames::IPV4, &ping(GATEWAY)),
            ),
            (
                "b's IP",
                frames::ethernet(a.gateway_mac, a.mac, frames::IPV4, &ping(b.ip)),
            ),
            (
                "b's MAC and IP",
                frames::ethernet(a.gateway_mac, b.mac, frames::IPV4, &ping(b.ip)),
            ),
            ("b's IP in ARP", frames::arp_request(a.mac, b.ip, GATEWAY)),
            (
                "b's MAC and IP in ARP",
                frames::arp_request(b.mac, b.ip, GATEWAY),
            ),
            (
                "b's MAC inside ARP",
                frames::ethernet(
                    frames::BROADCAST,
                    a.mac,
                    frames::ARP,
                    &frames::arp(1, b.mac, a.ip, [0; 6], GATEWAY),
                ),
            ),
            (
                "IPv6",
                frames::ethernet([0x33, 0x33, 0, 0, 0, 1], a.mac, frames::IPV6, &ipv6),
            ),
            (
                "an unknown protocol",
                frames::ethernet(frames::BROADCAST, a.mac, 0x88b5, MARK),
            ),
        ];
        for (n, (what, frame)) in (1..).zip(&spoofed) {
            a.send(frame);
            assert_eq!(dropped("bridge", "guest-dz-2"), n, "{what} was not dropped");
        }
        a.ping_gateway();
        assert_eq!(
            echoes_at_the_host(),
            before + 1,
            "a spoofed echo reached the host"
        );
        assert!(
            b.drain().iter().all(|frame| frame.echo().is_none()),
            "the host answered b"
        );
        let neighbours = run("ip neigh show dev doze0");
        assert!(
            neighbours.contains(&format!("{} lladdr 02:00:0a:4d:01:03", b.ip)),
            "{neighbours}"
        );
        let forwarding = run("bridge fdb show br doze0");
        assert!(!forwarding.contains("02:00:0a:4d:09:09"), "{forwarding}");
        assert!(
            forwarding.contains("02:00:0a:4d:01:03 dev dz-3 master doze0 static"),
            "{forwarding}"
        );

        // Without the rules the host does take it for b.
        run("nft flush chain bridge doze prerouting");
        a.send(&spoofed[3].1);
        let answer = |frame: &Frame| (frame.echo()? == (GATEWAY, b.ip, 0, 999)).then_some(());
        b.wait_for("the answer to a's spoofed echo", answer);
    });
}

#[test]
fn the_host_is_closed_to_guests_unless_configured() {
    inside(
        "isolation::the_host_is_closed_to_guests_unless_configured",
        async || {
            let (_network, mut a, _b) = with_two_guests().await;
            run("ip link add other type bridge");
            run("ip addr add 192.0.2.1/24 dev other");
            run("ip link set other up");
            let other = "192.0.2.1".parse().unwrap();
            let is_tcp =
                |frame: &Frame| frame.ipv4().filter(|ip| ip.2 == frames::TCP).map(|ip| ip.0);

            let before = dropped("inet", "input");
            a.send_ip(&frames::tcp_syn(a.ip, GATEWAY, 7000));
            a.send_ip(&frames::tcp_syn(a.ip, other, 7000));
            a.send_ip(&frames::ipv4(
                a.ip,
                other,
                frames::ICMP,
                &frames::echo(8, 998),
            ));
            // The host's other addresses do not even show in ARP.
            a.send(&frames::arp_request(a.mac, a.ip, other));
            let seen = a.ping_gateway();
            assert!(
                seen.iter()
                    .all(|f| is_tcp(f).is_none() && f.echo().is_none()),
                "{seen:?}"
            );
            assert!(
                seen.iter()
                    .all(|f| f.arp().is_none_or(|arp| arp.0 != other)),
                "{seen:?}"
            );
            assert_eq!(dropped("inet", "input"), before + 3);

            let open = doze_host::net::NetworkConfig {
                guest_to_host: true,
                ..config()
            };
            doze_host::net::Network::ensure(open).await.unwrap();
            for address in [GATEWAY, other] {
                a.send_ip(&frames::tcp_syn(a.ip, address, 7000));
                // Nobody listens, so the host's answer is a reset.
                a.wait_for("the reset", |frame| {
                    (is_tcp(frame)? == address).then_some(())
                });
            }
            // And closed again.
            network().await;
            a.send_ip(&frames::tcp_syn(a.ip, GATEWAY, 7001));
            assert!(a.ping_gateway().iter().all(|frame| is_tcp(frame).is_none()));
        },
    );
}
