//! The guest's network by raw rtnetlink(7): loopback up, and address and default route of the
//! device with the configured MAC. Later, for a copy of another guest, other ones.
use std::{fs, io, net::Ipv4Addr, os::fd::OwnedFd, path::Path};

use doze_agent::config::GuestNetwork;
use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
        netlink::SocketAddrNetlink, recv, send, socket_with,
    },
};

use super::BootError;

const CLASS: &str = "/sys/class/net";
const HEADER_LEN: usize = 16;
/// linux/rtnetlink.h
const RTNH_F_ONLINK: u32 = 4;

/// Brings loopback up and, if there is one, the configured device.
pub(super) fn configure(network: Option<&GuestNetwork>) -> Result<(), BootError> {
    let mut link = Netlink::open().map_err(|e| BootError::io("network: rtnetlink", e))?;
    let step = |what: &str, done: io::Result<()>| {
        done.map_err(|e| BootError::io(format!("network: {what}"), e))
    };
    step("bringing lo up", link.up(1))?;
    let Some(network) = network else {
        return Ok(());
    };
    let index = find(Path::new(CLASS), &network.mac).ok_or_else(|| BootError::NoNetworkDevice {
        mac: network.mac.clone(),
    })?;
    step(
        "setting the address",
        link.add_address(index, network.address, network.prefix),
    )?;
    step("bringing the device up", link.up(index))?;
    step(
        "setting the default route",
        link.add_default_route(index, network.gateway),
    )
}

/// Gives the device that has `former`'s MAC (or the new one, when this was begun before) the addresses of `now`
/// and no others. What else was set up on it, such as routes, is lost.
pub(super) fn readdress(former: &GuestNetwork, now: &GuestNetwork) -> Result<(), BootError> {
    let step = |what: &str, done: io::Result<()>| {
        done.map_err(|e| BootError::io(format!("network: {what}"), e))
    };
    let class = Path::new(CLASS);
    let no_device = || BootError::NoNetworkDevice {
        mac: former.mac.clone(),
    };
    let index = find(class, &former.mac)
        .or_else(|| find(class, &now.mac))
        .ok_or_else(no_device)?;
    let mac = now.mac_bytes().ok_or_else(no_device)?;
    let mut link = Netlink::open().map_err(|e| BootError::io("network: rtnetlink", e))?;
    // Down from the first change to the last: nothing leaves with a mixture, neighbours and IPv6 begin anew.
    step("taking the device down", link.down(index))?;
    step("setting the device's address", link.set_mac(index, mac))?;
    step("removing former addresses", link.flush(index))?;
    step(
        "setting the address",
        link.add_address(index, now.address, now.prefix),
    )?;
    step("bringing the device up", link.up(index))?;
    step(
        "setting the default route",
        link.add_default_route(index, now.gateway),
    )
}

/// Index of the device with this MAC.
fn find(class: &Path, mac: &str) -> Option<u32> {
    let mut entries = fs::read_dir(class).ok()?.flatten();
    let device = entries.find(|e| {
        fs::read_to_string(e.path().join("address"))
            .is_ok_and(|a| a.trim_end().eq_ignore_ascii_case(mac))
    })?;
    fs::read_to_string(device.path().join("ifindex"))
        .ok()?
        .trim_end()
        .parse()
        .ok()
}

struct Netlink {
    socket: OwnedFd,
    seq: u32,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        // Protocol 0 of this family is NETLINK_ROUTE.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, seq: 0 })
    }

    fn up(&mut self, index: u32) -> io::Result<()> {
        self.request(libc::RTM_NEWLINK, 0, &link(index, true))
    }

    fn down(&mut self, index: u32) -> io::Result<()> {
        self.request(libc::RTM_NEWLINK, 0, &link(index, false))
    }

    fn set_mac(&mut self, index: u32, mac: [u8; 6]) -> io::Result<()> {
        let mut body = link(index, false);
        attribute(&mut body, libc::IFLA_ADDRESS, &mac);
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    /// Removes all IPv4 addresses.
    fn flush(&mut self, index: u32) -> io::Result<()> {
        for (address, prefix) in self.addresses(index)? {
            let mut body = address_message(index, prefix);
            attribute(&mut body, libc::IFA_LOCAL, &address.octets());
            match self.request(libc::RTM_DELADDR, 0, &body) {
                // It went with the one before, whose secondary it was.
                Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn addresses(&mut self, index: u32) -> io::Result<Vec<(Ipv4Addr, u8)>> {
        self.ask(
            libc::RTM_GETADDR,
            libc::NLM_F_DUMP,
            &address_message(index, 0),
        )?;
        let mut found = Vec::new();
        while !self.receive(|answer| found_addresses(answer, index, &mut found))? {}
        Ok(found)
    }

    fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mut body = address_message(index, prefix);
        attribute(&mut body, libc::IFA_LOCAL, &address.octets());
        attribute(&mut body, libc::IFA_ADDRESS, &address.octets());
        if prefix < 31 {
            let host_bits = u32::MAX >> prefix;
            let broadcast = Ipv4Addr::from(u32::from(address) | host_bits);
            attribute(&mut body, libc::IFA_BROADCAST, &broadcast.octets());
        }
        self.request(
            libc::RTM_NEWADDR,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            &body,
        )
    }

    fn add_default_route(&mut self, index: u32, gateway: Ipv4Addr) -> io::Result<()> {
        // struct rtmsg: family, destination and source length, tos, table, protocol, scope, type, flags.
        let mut body = vec![
            libc::AF_INET as u8,
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        // A gateway outside the own prefix (a /32 address) is reached on the device all the same.
        body.extend_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        attribute(&mut body, libc::RTA_GATEWAY, &gateway.octets());
        attribute(&mut body, libc::RTA_OIF, &index.to_ne_bytes());
        // Ours is the default, whatever a program set up meanwhile.
        self.request(
            libc::RTM_NEWROUTE,
            libc::NLM_F_CREATE | libc::NLM_F_REPLACE,
            &body,
        )
    }

    /// Sends one request and waits for its acknowledgement.
    fn request(&mut self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        self.ask(kind, libc::NLM_F_ACK | flags, body)?;
        self.receive(acknowledged)
    }

    fn ask(&mut self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        self.seq += 1;
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        // struct nlmsghdr: length, type, flags, sequence, port.
        let mut message = Vec::with_capacity(HEADER_LEN + body.len());
        message.extend_from_slice(&((HEADER_LEN + body.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.seq.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(body);
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(())
    }

    fn receive<T>(&self, read: impl FnOnce(&[u8]) -> io::Result<T>) -> io::Result<T> {
        // What the kernel puts into one answer at most (rtnetlink's dumps).
        let mut buf = [0u8; 32 << 10];
        loop {
            match recv(&self.socket, &mut buf[..], RecvFlags::empty()) {
                Ok((len, _)) => return read(buf.get(..len).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "short answer from rtnetlink")
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let four = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>);
    four.map(|b| u32::from_ne_bytes(*b)).ok_or_else(short)
}

fn half(bytes: &[u8], at: usize) -> io::Result<u16> {
    let two = bytes.get(at..).and_then(<[u8]>::first_chunk::<2>);
    two.map(|b| u16::from_ne_bytes(*b)).ok_or_else(short)
}

/// struct nlmsgerr follows the header: a negative error number, 0 for success.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    match word(answer, HEADER_LEN)?.cast_signed() {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

/// Reads one part of a listing; says whether it was the last one.
fn found_addresses(
    mut answer: &[u8],
    index: u32,
    found: &mut Vec<(Ipv4Addr, u8)>,
) -> io::Result<bool> {
    while !answer.is_empty() {
        let len = word(answer, 0)? as usize;
        let message = answer.get(..len).filter(|_| len >= HEADER_LEN);
        let message = message.ok_or_else(short)?;
        match i32::from(half(message, 4)?) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => return acknowledged(message).map(|()| true),
            kind if kind == i32::from(libc::RTM_NEWADDR) => {
                let body = &message[HEADER_LEN..];
                if word(body, 4)? == index && body[0] == libc::AF_INET as u8 {
                    found.extend(local_address(body)?.map(|address| (address, body[1])));
                }
            }
            _ => {}
        }
        let next = len.next_multiple_of(4).min(answer.len());
        answer = &answer[next..];
    }
    Ok(false)
}

/// The attribute IFA_LOCAL behind a struct ifaddrmsg.
fn local_address(body: &[u8]) -> io::Result<Option<Ipv4Addr>> {
    let mut rest = body.get(8..).ok_or_else(short)?;
    while !rest.is_empty() {
        let len = usize::from(half(rest, 0)?);
        let value = rest.get(4..len).ok_or_else(short)?;
        if half(rest, 2)? == libc::IFA_LOCAL {
            return Ok(Some(word(value, 0)?.to_ne_bytes().into()));
        }
        rest = &rest[len.next_multiple_of(4).min(rest.len())..];
    }
    Ok(None)
}

/// struct ifinfomsg: family, pad, type, index, flags, change.
fn link(index: u32, up: bool) -> Vec<u8> {
    let flag = libc::IFF_UP as u32;
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&(if up { flag } else { 0 }).to_ne_bytes());
    body.extend_from_slice(&flag.to_ne_bytes());
    body
}

/// struct ifaddrmsg: family, prefix length, flags, scope, index.
fn address_message(index: u32, prefix: u8) -> Vec<u8> {
    let mut body = vec![libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE];
    body.extend_from_slice(&index.to_ne_bytes());
    body
}

/// struct rtattr: length, type, value, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests;
