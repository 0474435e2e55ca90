//! What goes into netlink messages, paths below /proc/sys and nft's input: checked here once, and
//! from then on carried by types that cannot hold anything else.
use std::{fmt, net::Ipv4Addr};

use super::{NetError, NetworkConfig, TapConfig};

/// IFNAMSIZ without the closing zero (netdevice(7)).
const NAME_MAX: usize = 15;
/// IFALIASZ without the closing zero (linux/if.h).
const ALIAS_MAX: usize = 255;
/// Between a bridge and an instance in the alias of a TAP that is no port of the bridge. A bridge's name has none.
const DETACHED: char = '/';

/// A link's name: 1 to 15 characters of `[a-z0-9-]`, not starting with `-`.
///
/// `all`, `default` and `lo` are refused: /proc/sys knows the first two as "every link".
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct LinkName(String);

impl LinkName {
    pub(super) fn new(field: &str, name: &str) -> Result<Self, NetError> {
        let characters = name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let reserved = ["all", "default", "lo"].contains(&name);
        if name.is_empty()
            || name.len() > NAME_MAX
            || !characters
            || reserved
            || name.starts_with('-')
        {
            let allowed = "1 to 15 characters of a-z, 0-9 and -, not starting with -, \
                           and none of all, default, lo";
            return Err(invalid(field, name, allowed));
        }
        Ok(Self(name.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name of our table: 1 to 31 characters of `[A-Za-z0-9_-]`, starting with a letter; a subset of what
/// nft(8) takes as an identifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TableName(String);

impl TableName {
    fn new(name: &str) -> Result<Self, NetError> {
        let characters = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if name.len() > 31 || !characters || !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            let allowed = "1 to 31 letters, digits, '_' and '-', starting with a letter";
            return Err(invalid("network.table", name, allowed));
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An Ethernet address; shown as `02:00:0a:4d:00:02`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl Mac {
    /// The address of one station: neither a group's nor all zeros.
    fn station(text: &str) -> Result<Self, NetError> {
        let refuse = || {
            let allowed = "six bytes in hexadecimal with colons, of one station (first byte even), \
                           not all zero, for example 02:00:0a:4d:00:02";
            invalid("mac", text, allowed)
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(refuse)?;
            // `from_str_radix` also takes a sign.
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(refuse());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| refuse())?;
        }
        if parts.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(refuse());
        }
        Ok(Self(bytes))
    }

    /// The address of a bridge, the same after every boot: a guest restored then still has its
    /// gateway's address in its neighbour table. Locally administered; FNV-1a of the name.
    fn of_bridge(name: &LinkName) -> Self {
        let hash = name.0.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
        });
        let [a, b, c, d] = hash.to_be_bytes();
        Self([0x02, 0xd0, a, b, c, d])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A checked [`NetworkConfig`].
#[derive(Debug, Clone)]
pub(super) struct Base {
    pub(super) bridge: LinkName,
    pub(super) bridge_mac: Mac,
    pub(super) table: TableName,
    pub(super) subnet: super::Subnet,
    pub(super) gateway: Ipv4Addr,
    pub(super) guest_to_host: bool,
}

impl Base {
    pub(super) fn new(config: &NetworkConfig) -> Result<Self, NetError> {
        let bridge = LinkName::new("network.bridge", &config.bridge)?;
        config.subnet.check().map_err(|e| NetError::Failed {
            context: "network.subnet".into(),
            message: e.to_string(),
        })?;
        if !config.subnet.is_host(config.gateway) {
            let allowed = format!(
                "a host of {}, for example {}",
                config.subnet,
                config.subnet.host(1).unwrap_or(config.gateway)
            );
            return Err(invalid("network.gateway", config.gateway, &allowed));
        }
        Ok(Self {
            bridge_mac: Mac::of_bridge(&bridge),
            bridge,
            table: TableName::new(&config.table)?,
            subnet: config.subnet,
            gateway: config.gateway,
            guest_to_host: config.guest_to_host,
        })
    }
}

impl Base {
    /// Whether the alias is one that we give to a TAP that is kept from our bridge.
    pub(super) fn is_detached(&self, alias: &str) -> bool {
        self.detached(alias).is_some()
    }

    /// The instance that an alias of ours names, whether the TAP is on the bridge or kept from it.
    pub(super) fn instance_of<'a>(&self, alias: &'a str) -> &'a str {
        self.detached(alias).unwrap_or(alias)
    }

    fn detached<'a>(&self, alias: &'a str) -> Option<&'a str> {
        alias
            .strip_prefix(self.bridge.as_str())?
            .strip_prefix(DETACHED)
    }
}

/// Whether the alias is that of a TAP that is kept from some doze server's bridge.
pub(super) fn is_detached_from_any(alias: &str) -> bool {
    alias
        .split_once(DETACHED)
        .is_some_and(|(bridge, _)| LinkName::new("bridge", bridge).is_ok())
}

/// A checked [`TapConfig`].
#[derive(Debug, Clone)]
pub(super) struct Port {
    pub(super) tap: LinkName,
    /// On the bridge.
    pub(super) alias: String,
    /// As long as it is kept from the bridge.
    pub(super) detached_alias: String,
    pub(super) mac: Mac,
    pub(super) ip: Ipv4Addr,
    pub(super) owner: Option<u32>,
}

impl Port {
    pub(super) fn new(tap: &TapConfig, base: &Base) -> Result<Self, NetError> {
        let name = LinkName::new("tap", &tap.tap)?;
        if name == base.bridge {
            return Err(invalid("tap", &name, "a name other than the bridge's"));
        }
        let alias = &tap.alias;
        let characters = !alias.chars().any(|c| c.is_control() || c == DETACHED);
        if alias.is_empty() || alias.len() > ALIAS_MAX - NAME_MAX - 1 || !characters {
            let allowed = "1 to 239 bytes without control characters and '/'";
            return Err(invalid("alias", alias.escape_debug(), allowed));
        }
        let mac = Mac::station(&tap.mac)?;
        if mac == base.bridge_mac {
            return Err(invalid("mac", mac, "an address other than the bridge's"));
        }
        if !base.subnet.is_host(tap.ip) || tap.ip == base.gateway {
            let allowed = format!("a host of {} other than {}", base.subnet, base.gateway);
            return Err(invalid("ip", tap.ip, &allowed));
        }
        Ok(Self {
            tap: name,
            detached_alias: format!("{}{DETACHED}{alias}", base.bridge),
            alias: alias.clone(),
            mac,
            ip: tap.ip,
            owner: tap.owner,
        })
    }
}

fn invalid(field: &str, value: impl fmt::Display, allowed: &str) -> NetError {
    NetError::Failed {
        context: field.to_owned(),
        message: format!("\"{value}\" is not allowed; allowed: {allowed}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    /// The field that is refused after a change.
    type Case<T> = (&'static str, fn(&mut T));

    fn config() -> NetworkConfig {
        NetworkConfig {
            bridge: "doze0".into(),
            subnet: "10.77.0.0/16".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 77, 0, 1),
            table: "doze".into(),
            guest_to_host: false,
        }
    }

    fn tap() -> TapConfig {
        TapConfig {
            tap: "dz-1".into(),
            alias: "instance".into(),
            mac: "02:00:0A:4d:00:02".into(),
            ip: Ipv4Addr::new(10, 77, 0, 2),
            owner: None,
        }
    }

    #[test]
    fn names_that_would_mean_something_else_are_refused() {
        for name in [
            "",
            "-x",
            "all",
            "default",
            "lo",
            "sixteen-letters-",
            "a b",
            "a/b",
            "..",
            "a.b",
            "A",
            "a\"b",
            "a*",
            "a\nb",
            "tapé",
            "a%d",
        ] {
            let error = LinkName::new("tap", name).unwrap_err().to_string();
            assert!(
                error.starts_with("tap: ") && error.contains("1 to 15"),
                "{error}"
            );
        }
        for name in ["a", "0", "doze0", "fifteen-letters"] {
            assert_eq!(LinkName::new("tap", name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn configurations_are_checked_field_by_field() {
        Base::new(&config()).unwrap();
        let cases: [Case<NetworkConfig>; 7] = [
            ("network.bridge", |c| c.bridge = "br 0".into()),
            ("network.subnet", |c| c.subnet.prefix = 31),
            ("network.subnet", |c| {
                c.subnet.network = Ipv4Addr::new(10, 77, 0, 1)
            }),
            ("network.gateway", |c| {
                c.gateway = Ipv4Addr::new(10, 78, 0, 1)
            }),
            ("network.gateway", |c| {
                c.gateway = Ipv4Addr::new(10, 77, 255, 255)
            }),
            ("network.table", |c| c.table = "0x".into()),
            ("network.table", |c| c.table = String::new()),
        ];
        for (field, change) in cases {
            let mut config = config();
            change(&mut config);
            let error = Base::new(&config).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn taps_are_checked_field_by_field() {
        let base = Base::new(&config()).unwrap();
        let port = Port::new(&tap(), &base).unwrap();
        assert_eq!(port.mac.to_string(), "02:00:0a:4d:00:02");
        let cases: [Case<TapConfig>; 12] = [
            ("tap", |t| t.tap = "doze0".into()),
            ("tap", |t| t.tap = "x;flush".into()),
            ("alias", |t| t.alias = String::new()),
            ("alias", |t| t.alias = "a\nb".into()),
            ("alias", |t| t.alias = "doze0/a".into()),
            ("mac", |t| t.mac = "02:00:0a:4d:00".into()),
            ("mac", |t| t.mac = "01:00:0a:4d:00:02".into()),
            ("mac", |t| t.mac = "00:00:00:00:00:00".into()),
            ("mac", |t| t.mac = "02:00:0a:4d:00:+2".into()),
            ("mac", |t| {
                t.mac = Mac::of_bridge(&LinkName("doze0".into())).to_string()
            }),
            ("ip", |t| t.ip = Ipv4Addr::new(10, 77, 0, 1)),
            ("ip", |t| t.ip = Ipv4Addr::new(10, 77, 0, 0)),
        ];
        for (field, change) in cases {
            let mut tap = tap();
            change(&mut tap);
            let error = Port::new(&tap, &base).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }

    #[test]
    fn a_bridge_keeps_its_address_and_two_differ() {
        let mac = |name: &str| Mac::of_bridge(&LinkName(name.into()));
        // Fixed for ever: sleeping guests remember it.
        assert_eq!(mac("doze0").to_string(), mac("doze0").to_string());
        assert_ne!(mac("doze0"), mac("doze1"));
        assert_eq!(
            mac("doze0").0[0] & 0b11,
            0b10,
            "one station, locally administered"
        );
    }

    proptest! {
        #[test]
        fn macs_survive_their_text(mut bytes in any::<[u8; 6]>()) {
            bytes[0] &= 0xfe;
            prop_assume!(bytes != [0; 6]);
            prop_assert_eq!(Mac::station(&Mac(bytes).to_string()).unwrap(), Mac(bytes));
        }

        #[test]
        fn no_name_leaves_the_alphabet(name in ".{0,20}") {
            if let Ok(name) = LinkName::new("tap", &name) {
                prop_assert!(name.as_str().bytes().all(|b| b == b'-' || b.is_ascii_alphanumeric()));
            }
        }
    }
}
