//! What a user may say about automatic standby, brought into one form. Pure.
use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A network in CIDR form (RFC 4632, RFC 4291) without bits beyond its prefix. IPv4-mapped IPv6
/// networks are IPv4 networks. Ordered by family, address, prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// Why a text is no [`Cidr`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CidrError {
    #[error("{0:?} is not a network; write ADDRESS/PREFIX, for example 10.0.0.0/8 or fd00::/8")]
    Form(String),
    #[error("{address} alone is not a network; write {address}/{full} for this one address")]
    NoPrefix { address: IpAddr, full: u8 },
    #[error("the prefix of {address}/{prefix} is not allowed; allowed: 0 to {most}")]
    Prefix {
        address: IpAddr,
        prefix: u32,
        most: u8,
    },
}

impl Cidr {
    /// The network that holds the address: bits beyond the prefix are cleared.
    ///
    /// # Errors
    /// A prefix beyond 32 (IPv4) or 128 (IPv6).
    pub fn new(address: IpAddr, prefix: u8) -> Result<Self, CidrError> {
        let most = full(address);
        if prefix > most {
            return Err(CidrError::Prefix {
                address,
                prefix: prefix.into(),
                most,
            });
        }
        // ::ffff:0:0/96 is where IPv4 begins; a wider network is more than IPv4.
        Ok(match (address.to_canonical(), address) {
            (IpAddr::V4(v4), IpAddr::V6(_)) if prefix >= 96 => Self::masked(v4.into(), prefix - 96),
            _ => Self::masked(address, prefix),
        })
    }

    fn masked(address: IpAddr, prefix: u8) -> Self {
        let address = match address {
            IpAddr::V4(a) => Ipv4Addr::from_bits(a.to_bits() & mask32(prefix)).into(),
            IpAddr::V6(a) => Ipv6Addr::from_bits(a.to_bits() & mask128(prefix)).into(),
        };
        Self { address, prefix }
    }

    /// IPv4-mapped addresses are IPv4 addresses.
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(net), IpAddr::V4(a)) => a.to_bits() & mask32(self.prefix) == net.to_bits(),
            (IpAddr::V6(net), IpAddr::V6(a)) => a.to_bits() & mask128(self.prefix) == net.to_bits(),
            // A network wider than all of IPv4-mapped space, ::/0 among them, holds IPv4 as well.
            (IpAddr::V6(net), IpAddr::V4(a)) => {
                a.to_ipv6_mapped().to_bits() & mask128(self.prefix) == net.to_bits()
            }
            (IpAddr::V4(_), IpAddr::V6(_)) => false,
        }
    }

    pub fn address(&self) -> IpAddr {
        self.address
    }

    pub fn prefix(&self) -> u8 {
        self.prefix
    }
}

fn full(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn mask32(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

fn mask128(prefix: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let form = || CidrError::Form(text.to_owned());
        let Some((address, prefix)) = text.split_once('/') else {
            let address: IpAddr = text.parse().map_err(|_| form())?;
            let full = full(address);
            return Err(CidrError::NoPrefix { address, full });
        };
        let address: IpAddr = address.parse().map_err(|_| form())?;
        // No sign and no leading zero: "08" is octal to somebody.
        let plain = prefix.bytes().all(|b| b.is_ascii_digit())
            && (prefix == "0" || !prefix.starts_with('0'));
        let prefix: u32 = plain
            .then(|| prefix.parse().ok())
            .flatten()
            .ok_or_else(form)?;
        let most = full(address);
        let narrow = u8::try_from(prefix).map_err(|_| CidrError::Prefix {
            address,
            prefix,
            most,
        })?;
        Self::new(address, narrow)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

/// A policy as a user wrote it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicyInput {
    pub enabled: bool,
    pub idle_timeout: Option<Duration>,
    pub ignore_source_cidrs: Vec<String>,
    pub ignore_destination_ports: Vec<u16>,
    pub max_flow_idle: Option<Duration>,
}

/// A valid policy in its one form: networks and ports sorted, each once. Disabled, it says nothing
/// else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    #[default]
    Disabled,
    Enabled(EnabledPolicy),
}

/// What an enabled policy says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnabledPolicy {
    /// More than 0.
    pub idle_timeout: Duration,
    pub ignore_source_cidrs: Vec<Cidr>,
    pub ignore_destination_ports: Vec<u16>,
    /// More than 0.
    pub max_flow_idle: Option<Duration>,
}

/// What is wrong with a policy, one error per field or element.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error(
        "auto_standby.idle_timeout is required when enabled; write a duration, for example \"5m\""
    )]
    NoIdleTimeout,
    #[error("auto_standby.{0} must be more than 0; write a duration, for example \"5m\"")]
    NotPositive(&'static str),
    #[error("auto_standby.ignore_source_cidrs[{index}]: {source}")]
    Cidr { index: usize, source: CidrError },
    #[error("auto_standby.ignore_destination_ports[{0}] is 0; allowed: 1 to 65535")]
    PortZero(usize),
}

impl PolicyInput {
    /// The policy in its one form. The rest of a disabled policy is dropped unread.
    ///
    /// # Errors
    /// All that is wrong, at once.
    pub fn normalise(self) -> Result<Policy, Vec<PolicyError>> {
        if !self.enabled {
            return Ok(Policy::Disabled);
        }
        let mut errors = Vec::new();
        let mut cidrs = BTreeSet::new();
        for (index, text) in self.ignore_source_cidrs.iter().enumerate() {
            match text.parse() {
                Ok(cidr) => drop(cidrs.insert(cidr)),
                Err(source) => errors.push(PolicyError::Cidr { index, source }),
            }
        }
        let zero = |(index, port): (usize, &u16)| (*port == 0).then_some(index);
        let ports = self.ignore_destination_ports;
        errors.extend(
            ports
                .iter()
                .enumerate()
                .filter_map(zero)
                .map(PolicyError::PortZero),
        );
        if self.max_flow_idle.is_some_and(|limit| limit.is_zero()) {
            errors.push(PolicyError::NotPositive("max_flow_idle"));
        }
        match self.idle_timeout {
            None => errors.push(PolicyError::NoIdleTimeout),
            Some(timeout) if timeout.is_zero() => {
                errors.push(PolicyError::NotPositive("idle_timeout"));
            }
            Some(idle_timeout) if errors.is_empty() => {
                return Ok(Policy::Enabled(EnabledPolicy {
                    idle_timeout,
                    ignore_source_cidrs: cidrs.into_iter().collect(),
                    ignore_destination_ports: BTreeSet::from_iter(ports).into_iter().collect(),
                    max_flow_idle: self.max_flow_idle,
                }));
            }
            Some(_) => {}
        }
        Err(errors)
    }
}

#[cfg(test)]
mod tests;
