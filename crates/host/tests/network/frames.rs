//! Ethernet frames, as a guest would put them on its wire.
use std::net::Ipv4Addr;

pub const BROADCAST: [u8; 6] = [0xff; 6];
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;
pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
const UDP: u8 = 17;

pub fn ethernet(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &kind.to_be_bytes(), payload].concat()
}

pub fn arp_request(from: [u8; 6], ip: Ipv4Addr, wanted: Ipv4Addr) -> Vec<u8> {
    ethernet(BROADCAST, from, ARP, &arp(1, from, ip, [0; 6], wanted))
}

pub fn arp_reply(from: [u8; 6], ip: Ipv4Addr, to: [u8; 6], to_ip: Ipv4Addr) -> Vec<u8> {
    ethernet(to, from, ARP, &arp(2, from, ip, to, to_ip))
}

/// RFC 826: Ethernet, IPv4, operation, sender, target.
pub fn arp(operation: u8, from: [u8; 6], ip: Ipv4Addr, to: [u8; 6], to_ip: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, operation];
    [&head[..], &from, &ip.octets(), &to, &to_ip.octets()].concat()
}

pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut head = vec![
        0x45, 0, length[0], length[1], 0, 0, 0x40, 0, 64, protocol, 0, 0,
    ];
    head.extend(from.octets());
    head.extend(to.octets());
    let sum = checksum(&head).to_be_bytes();
    head[10..12].copy_from_slice(&sum);
    [head, payload.to_vec()].concat()
}

/// An echo request (8) or reply (0) with an identifier to know it by.
pub fn echo(kind: u8, id: u16) -> Vec<u8> {
    let mut message = [
        &[kind, 0, 0, 0][..],
        &id.to_be_bytes(),
        &[0, 1],
        b"payload!",
    ]
    .concat();
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// UDP without a checksum, which IPv4 allows.
pub fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    [
        &from.to_be_bytes()[..],
        &to.to_be_bytes(),
        &length.to_be_bytes(),
        &[0, 0],
        payload,
    ]
    .concat()
}

pub fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    ipv4(from, to, UDP, &udp(4000, port, payload))
}

pub fn tcp_syn(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut segment = [
        &4000u16.to_be_bytes()[..],
        &port.to_be_bytes(),
        &[0, 0, 0, 1, 0, 0, 0, 0],
    ]
    .concat();
    segment.extend([0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP, 0, 20], &segment].concat();
    let sum = checksum(&pseudo).to_be_bytes();
    segment[16..18].copy_from_slice(&sum);
    ipv4(from, to, TCP, &segment)
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// A received frame, taken apart as far as the tests look.
#[derive(Debug, Clone)]
pub struct Frame(pub Vec<u8>);

impl Frame {
    pub fn source(&self) -> [u8; 6] {
        self.0[6..12].try_into().unwrap()
    }
    pub fn kind(&self) -> u16 {
        u16::from_be_bytes([self.0[12], self.0[13]])
    }
    pub fn payload(&self) -> &[u8] {
        &self.0[14..]
    }
    fn address(&self, at: usize) -> Ipv4Addr {
        let bytes: [u8; 4] = self.payload()[at..at + 4].try_into().unwrap();
        bytes.into()
    }
    /// Sender, target address and operation of an ARP message.
    pub fn arp(&self) -> Option<(Ipv4Addr, Ipv4Addr, u8)> {
        (self.kind() == ARP).then(|| (self.address(14), self.address(24), self.payload()[7]))
    }
    /// Source, destination, protocol and payload of an IPv4 packet.
    pub fn ipv4(&self) -> Option<(Ipv4Addr, Ipv4Addr, u8, &[u8])> {
        (self.kind() == IPV4).then(|| {
            (
                self.address(12),
                self.address(16),
                self.payload()[9],
                &self.payload()[20..],
            )
        })
    }
    /// Source, destination, type and identifier of an ICMP echo.
    pub fn echo(&self) -> Option<(Ipv4Addr, Ipv4Addr, u8, u16)> {
        let (from, to, protocol, message) = self.ipv4()?;
        (protocol == ICMP && message.len() >= 6).then(|| {
            (
                from,
                to,
                message[0],
                u16::from_be_bytes([message[4], message[5]]),
            )
        })
    }
}
