//! The way out: a wire to a machine outside, and what passes there.
use std::net::Ipv4Addr;

use crate::{
    frames::{self, Frame},
    world::*,
};

const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// A link of the host's to another network, whose other machine we are.
fn far_machine() -> Guest {
    let mac = [2, 0, 0, 0, 0, 0xfa];
    let mut far = Guest::on("out0", mac, FAR);
    run("ip addr add 192.0.2.1/24 dev out0");
    run("ip link set out0 up");
    run("ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:fa dev out0 nud permanent");
    run("ip route add default via 192.0.2.2");
    far.find_router(HOST);
    far
}

#[test]
fn guests_go_out_under_the_hosts_address_and_answers_come_back() {
    inside(
        "outside::guests_go_out_under_the_hosts_address_and_answers_come_back",
        async || {
            let (_network, a, _b) = with_two_guests().await;
            let far = far_machine();
            a.send_ip(&frames::ipv4(a.ip, FAR, frames::ICMP, &frames::echo(8, 77)));
            let asked = |frame: &Frame| frame.echo().filter(|echo| echo.1 == FAR);
            let ((from, _, kind, id), _) = far.wait_for("the guest's echo", asked);
            assert_eq!((from, kind), (HOST, 8), "not masqueraded");
            far.send_ip(&frames::ipv4(FAR, HOST, frames::ICMP, &frames::echo(0, id)));
            a.wait_for("the answer", |frame| {
                (frame.echo()? == (FAR, a.ip, 0, 77)).then_some(())
            });
        },
    );
}

#[test]
fn nobody_outside_opens_a_connection_to_a_guest() {
    inside(
        "outside::nobody_outside_opens_a_connection_to_a_guest",
        async || {
            let (_network, mut a, _b) = with_two_guests().await;
            let far = far_machine();
            let before = dropped("inet", "forward");
            far.send_ip(&frames::udp_packet(FAR, a.ip, 53, b"hello"));
            assert_eq!(dropped("inet", "forward"), before + 1);
            let seen = a.ping_gateway();
            assert!(
                seen.iter()
                    .all(|frame| frame.ipv4().is_none_or(|ip| ip.0 != FAR)),
                "{seen:?}"
            );

            run("nft flush chain inet doze forward");
            far.send_ip(&frames::udp_packet(FAR, a.ip, 53, b"hello"));
            a.wait_for("the packet", |frame| (frame.ipv4()?.0 == FAR).then_some(()));
        },
    );
}

#[test]
fn link_local_addresses_are_not_forwarded() {
    inside(
        "outside::link_local_addresses_are_not_forwarded",
        async || {
            let (_network, a, _b) = with_two_guests().await;
            let far = far_machine();
            let metadata = Ipv4Addr::new(169, 254, 169, 254);
            a.send_ip(&frames::udp_packet(a.ip, metadata, 80, b"credentials"));
            a.send_ip(&frames::udp_packet(a.ip, FAR, 80, b"allowed"));
            let to = |frame: &Frame| {
                frame
                    .ipv4()
                    .filter(|ip| ip.2 != frames::ICMP)
                    .map(|ip| ip.1)
            };
            let (first, _) = far.wait_for("a packet of the guest's", to);
            assert_eq!(first, FAR);
        },
    );
}

#[test]
fn the_host_reaches_its_guests() {
    inside("outside::the_host_reaches_its_guests", async || {
        let (_network, a, _b) = with_two_guests().await;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"from the host", (a.ip, 7)).unwrap();
        let (from, _) = a.wait_for("the host's packet", |frame| {
            let (from, to, _, payload) = frame.ipv4()?;
            (to == a.ip && payload.ends_with(b"from the host")).then_some(from)
        });
        assert_eq!(from, GATEWAY);
        // The answer is let in because the host asked.
        let port = socket.local_addr().unwrap().port();
        let answer = frames::udp(7, port, b"from the guest");
        a.send_ip(&frames::ipv4(a.ip, GATEWAY, 17, &answer));
        socket
            .set_read_timeout(Some(std::time::Duration::from_secs(20)))
            .unwrap();
        let mut buffer = [0; 64];
        let (length, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"from the guest");
    });
}
