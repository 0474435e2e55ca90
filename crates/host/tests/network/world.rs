//! A network namespace of its own for each test, and guests whose wire the test holds.
use std::{net::Ipv4Addr, os::fd::OwnedFd, process::Command};

use doze_host::net::{Network, NetworkConfig, TapConfig, open_tap};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde_json::Value;

use crate::frames::{self, Frame};

const INSIDE: &str = "DOZE_TEST_OUTER_NAMESPACE";
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// Only how long a test waits before it fails; no test asserts a time.
const PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};
const RETRANSMIT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
const RETRANSMISSIONS: u32 = 100;
/// `struct virtio_net_hdr` without mergeable buffers.
const VNET_HEADER: usize = 10;

/// Runs the body of the test `name` inside a new network namespace, which ends with it and takes
/// along whatever the test made: the test binary starts itself again under unshare(1).
pub fn inside<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    let here = std::fs::read_link("/proc/self/ns/net").unwrap();
    let here = here.to_str().unwrap();
    if let Ok(outer) = std::env::var(INSIDE) {
        assert_ne!(outer, here, "still in the host's network namespace");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(body());
    }
    assert!(
        std::path::Path::new("/dev/net/tun").exists(),
        "this test needs /dev/net/tun (load the module tun); it is not skipped without it"
    );
    let output = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, here)
        .output()
        .expect("this test needs the program unshare (package util-linux)");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} inside a network namespace of its own: {}; it needs root (CAP_SYS_ADMIN, \
         CAP_NET_ADMIN), and is not skipped without\n{text}",
        output.status
    );
}

pub fn config() -> NetworkConfig {
    NetworkConfig {
        bridge: "doze0".into(),
        subnet: "10.77.0.0/16".parse().unwrap(),
        gateway: GATEWAY,
        table: "doze".into(),
        guest_to_host: false,
    }
}

/// The `n`-th guest: its TAP is `dz-n`, its addresses end in `n`.
pub fn tap(n: u8) -> TapConfig {
    TapConfig {
        tap: format!("dz-{n}"),
        alias: format!("instance-{n}"),
        mac: format!("02:00:0a:4d:01:{n:02x}"),
        ip: Ipv4Addr::new(10, 77, 1, n),
        owner: None,
    }
}

pub async fn network() -> Network {
    Network::ensure(config()).await.unwrap()
}

/// A network with two guests that have spoken to their gateway.
pub async fn with_two_guests() -> (Network, Guest, Guest) {
    let network = network().await;
    let mut guests = Vec::new();
    for n in [2, 3] {
        network.ensure_tap(&tap(n)).await.unwrap();
        let mut guest = Guest::new(n);
        guest.find_router(GATEWAY);
        guests.push(guest);
    }
    let b = guests.pop().unwrap();
    (network, guests.pop().unwrap(), b)
}

/// The far end of a wire: a guest's network card, or a machine outside.
pub struct Guest {
    wire: OwnedFd,
    pub mac: [u8; 6],
    pub ip: Ipv4Addr,
    /// Known after [`Guest::find_router`].
    pub gateway_mac: [u8; 6],
    next_echo: u16,
}

impl Guest {
    pub fn new(n: u8) -> Self {
        Self::on(&tap(n).tap, [2, 0, 0x0a, 0x4d, 1, n], tap(n).ip)
    }

    pub fn on(link: &str, mac: [u8; 6], ip: Ipv4Addr) -> Self {
        let wire = open_tap(link).unwrap();
        rustix::io::ioctl_fionbio(&wire, true).unwrap();
        Self {
            wire,
            mac,
            ip,
            gateway_mac: [0; 6],
            next_echo: 1,
        }
    }

    pub fn send(&self, frame: &[u8]) {
        self.try_send(frame).unwrap();
    }

    /// `EIO` when the TAP is down.
    pub fn try_send(&self, frame: &[u8]) -> Result<(), Errno> {
        let bytes = [&[0; VNET_HEADER][..], frame].concat();
        assert_eq!(rustix::io::write(&self.wire, &bytes)?, bytes.len());
        Ok(())
    }

    /// To the gateway's MAC, as a router wants it.
    pub fn send_ip(&self, packet: &[u8]) {
        self.send(&frames::ethernet(
            self.gateway_mac,
            self.mac,
            frames::IPV4,
            packet,
        ));
    }

    fn try_receive(&self) -> Option<Frame> {
        let mut bytes = vec![0; 70_000];
        match rustix::io::read(&self.wire, &mut bytes) {
            Ok(length) => {
                assert!(length >= VNET_HEADER + 14, "a frame of {length} bytes");
                Some(Frame(bytes[VNET_HEADER..length].to_vec()))
            }
            Err(Errno::AGAIN) => None,
            Err(e) => panic!("reading the wire: {e}"),
        }
    }

    /// Everything that has arrived.
    pub fn drain(&self) -> Vec<Frame> {
        std::iter::from_fn(|| self.try_receive()).collect()
    }

    /// The first frame that answers the question; those before it, answered where they are ARP.
    pub fn wait_for<T>(&self, what: &str, wanted: impl Fn(&Frame) -> Option<T>) -> (T, Vec<Frame>) {
        let mut others = Vec::new();
        match self.wait_within(PATIENCE, &mut others, &wanted) {
            Some(found) => (found, others),
            None => panic!("{what} never came; got {others:?}"),
        }
    }

    fn wait_within<T>(
        &self,
        pause: Timespec,
        others: &mut Vec<Frame>,
        wanted: &impl Fn(&Frame) -> Option<T>,
    ) -> Option<T> {
        loop {
            while let Some(frame) = self.try_receive() {
                if let Some(found) = wanted(&frame) {
                    return Some(found);
                }
                if let Some((asker, asked, 1)) = frame.arp()
                    && asked == self.ip
                {
                    self.send(&frames::arp_reply(self.mac, self.ip, frame.source(), asker));
                }
                others.push(frame);
            }
            if poll(&mut [PollFd::new(&self.wire, PollFlags::IN)], Some(&pause)) == Ok(0) {
                return None;
            }
        }
    }

    /// Asks for the router's MAC, again and again as guests do: a link that was just opened gets its
    /// carrier a moment later, and until then frames are lost.
    pub fn find_router(&mut self, router: Ipv4Addr) {
        for _ in 0..RETRANSMISSIONS {
            self.send(&frames::arp_request(self.mac, self.ip, router));
            let answer =
                |frame: &Frame| (frame.arp()? == (router, self.ip, 2)).then(|| frame.source());
            if let Some(mac) = self.wait_within(RETRANSMIT, &mut Vec::new(), &answer) {
                self.gateway_mac = mac;
                return;
            }
        }
        panic!("{router} never answered ARP");
    }

    /// A ping of the gateway; gives what came in before the answer. Frames are handled in the order
    /// they were sent, so whatever should have followed from earlier ones has happened by then.
    pub fn ping_gateway(&mut self) -> Vec<Frame> {
        let id = self.next_echo;
        self.next_echo += 1;
        self.send_ip(&frames::ipv4(
            self.ip,
            GATEWAY,
            frames::ICMP,
            &frames::echo(8, id),
        ));
        let wanted = (GATEWAY, self.ip, 0, id);
        self.wait_for("the gateway's echo", |frame| {
            (frame.echo()? == wanted).then_some(())
        })
        .1
    }
}

/// Runs a program and gives its output.
pub fn run(command: &str) -> String {
    let mut words = command.split(' ');
    let output = Command::new(words.next().unwrap()).args(words).output();
    let output = output.unwrap_or_else(|e| panic!("{command}: {e}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command}: {} {complaint}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Like [`run`], with JSON as output; nothing at all counts as an empty list.
pub fn json(command: &str) -> Value {
    let text = run(command);
    if text.trim().is_empty() {
        return Value::Array(Vec::new());
    }
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{command}: {e}: {text}"))
}

/// The rules of the kernel, without counters and handles.
pub fn ruleset() -> String {
    run("nft --stateless list ruleset")
}

/// Packets that the last rule of a chain, the one that drops, has counted.
pub fn dropped(family: &str, chain: &str) -> u64 {
    let listing = json(&format!("nft -j list chain {family} doze {chain}"));
    let rules = listing["nftables"].as_array().unwrap();
    let last = rules
        .iter()
        .filter_map(|item| item.get("rule"))
        .next_back()
        .unwrap();
    let expressions = last["expr"].as_array().unwrap();
    assert!(
        expressions.iter().any(|e| e.get("drop").is_some()),
        "{last}"
    );
    let counter = expressions.iter().find_map(|e| e.get("counter")).unwrap();
    counter["packets"].as_u64().unwrap()
}

/// Echo requests that the host's own ICMP has seen (RFC 1213, icmpInEchos).
pub fn echoes_at_the_host() -> u64 {
    let text = std::fs::read_to_string("/proc/net/snmp").unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Icmp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split(' ').position(|name| name == "InEchos").unwrap();
    values.split(' ').nth(at).unwrap().parse().unwrap()
}
