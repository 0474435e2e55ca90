//! The guest's network by raw rtnetlink(7): loopback up, and address and default route of the
//! device with the configured MAC.
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
        let up = libc::IFF_UP as u32;
        // struct ifinfomsg: family, pad, type, index, flags, change.
        let mut body = vec![0; 4];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&up.to_ne_bytes());
        body.extend_from_slice(&up.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, &body)
    }

    fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        let mut body = vec![libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE];
        body.extend_from_slice(&index.to_ne_bytes());
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
        self.request(
            libc::RTM_NEWROUTE,
            libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            &body,
        )
    }

    /// Sends one request and waits for its acknowledgement.
    fn request(&mut self, kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
        self.seq += 1;
        let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16;
        // struct nlmsghdr: length, type, flags, sequence, port.
        let mut message = Vec::with_capacity(HEADER_LEN + body.len());
        message.extend_from_slice(&((HEADER_LEN + body.len()) as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        message.extend_from_slice(&self.seq.to_ne_bytes());
        message.extend_from_slice(&0u32.to_ne_bytes());
        message.extend_from_slice(body);
        send(&self.socket, &message, SendFlags::empty())?;
        self.acknowledged()
    }

    fn acknowledged(&mut self) -> io::Result<()> {
        let mut buf = [0u8; 4096];
        let len = loop {
            match recv(&self.socket, &mut buf[..], RecvFlags::empty()) {
                Ok((len, _)) => break len,
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        };
        // struct nlmsgerr follows the header: a negative error number, 0 for success.
        let code = buf
            .get(HEADER_LEN..HEADER_LEN + 4)
            .filter(|_| len >= HEADER_LEN + 4);
        match code.map(|c| i32::from_ne_bytes([c[0], c[1], c[2], c[3]])) {
            Some(0) => Ok(()),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
            None => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "short answer from rtnetlink",
            )),
        }
    }
}

/// struct rtattr: length, type, value, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}
