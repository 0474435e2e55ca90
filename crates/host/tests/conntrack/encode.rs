//! ctnetlink messages as a sender writes them, apart from the parser they test. Shared by unit
//! tests, the tests with a real kernel, and the measurement.
use std::net::{IpAddr, Ipv4Addr};

/// `NLM_F_REQUEST | NLM_F_EXCL | NLM_F_CREATE`.
pub const CREATE: u16 = 0x601;
pub const CT_NEW: u16 = 0x100;
pub const CT_DELETE: u16 = 0x102;

/// One connection to a server.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    pub client: IpAddr,
    pub client_port: u16,
    pub server: IpAddr,
    pub server_port: u16,
    /// 6 is TCP.
    pub protocol: u8,
}

impl Connection {
    pub fn tcp(client: Ipv4Addr, client_port: u16, server: Ipv4Addr, server_port: u16) -> Self {
        Self {
            client: client.into(),
            client_port,
            server: server.into(),
            server_port,
            protocol: 6,
        }
    }

    fn family(&self) -> u8 {
        if self.client.is_ipv4() { 2 } else { 10 }
    }
}

pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// `NLA_F_NESTED`.
pub fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

pub fn message(kind: u16, flags: u16, family: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
    let body = attributes.concat();
    let length = u32::try_from(20 + body.len()).unwrap();
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    bytes.extend([0; 8]);
    bytes.extend([family, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

pub fn tuple(kind: u16, c: &Connection, reverse: bool) -> Vec<u8> {
    let mut ends = [(c.client, c.client_port), (c.server, c.server_port)];
    if reverse {
        ends.reverse();
    }
    let address = |at: u16, ip: IpAddr| match ip {
        IpAddr::V4(ip) => attribute(1 + at, &ip.octets()),
        IpAddr::V6(ip) => attribute(3 + at, &ip.octets()),
    };
    let addresses = [address(0, ends[0].0), address(1, ends[1].0)];
    let ports = [
        attribute(1, &[c.protocol]),
        attribute(2, &ends[0].1.to_be_bytes()),
        attribute(3, &ends[1].1.to_be_bytes()),
    ];
    nested(kind, &[nested(1, &addresses), nested(2, &ports)])
}

/// What a message about a connection says besides its tuples. `Some` is sent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Says {
    pub state: Option<u8>,
    pub timeout: Option<u32>,
    pub status: Option<u32>,
    pub id: Option<u32>,
    pub zone: Option<u16>,
}

pub fn about(kind: u16, flags: u16, connection: &Connection, says: Says) -> Vec<u8> {
    let mut parts = vec![tuple(1, connection, false), tuple(2, connection, true)];
    let word = |kind: u16, value: u32| attribute(kind, &value.to_be_bytes());
    parts.extend(says.status.map(|status| word(3, status)));
    parts.extend(
        says.state
            .map(|state| nested(4, &[nested(1, &[attribute(1, &[state])])])),
    );
    parts.extend(says.timeout.map(|timeout| word(7, timeout)));
    parts.extend(says.id.map(|id| word(12, id)));
    parts.extend(says.zone.map(|zone| attribute(18, &zone.to_be_bytes())));
    message(kind, flags, connection.family(), &parts)
}

/// Makes the kernel track the connection, as if its packets had passed.
pub fn create(connection: &Connection, state: u8, timeout: u32) -> Vec<u8> {
    let says = Says {
        state: Some(state),
        timeout: Some(timeout),
        ..Says::default()
    };
    about(CT_NEW, CREATE, connection, says)
}

/// Makes the kernel forget it.
pub fn delete(connection: &Connection) -> Vec<u8> {
    message(
        CT_DELETE,
        1,
        connection.family(),
        &[tuple(1, connection, false)],
    )
}
