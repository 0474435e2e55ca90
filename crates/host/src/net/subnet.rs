//! IPv4 networks in CIDR form (RFC 4632).
use std::{fmt, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

/// The prefixes a server's network may have: two hosts at least, the gateway and one guest.
pub const PREFIXES: std::ops::RangeInclusive<u8> = 8..=30;

/// An IPv4 network in CIDR form, for example `10.77.0.0/16`.
///
/// Parsing gives valid ones only; one put together from fields or from the store is checked by
/// [`Subnet::check`]. The methods answer for any content, without panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    pub network: Ipv4Addr,
    pub prefix: u8,
}

/// Why a text or a pair of fields is no [`Subnet`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    #[error("{0:?} is not an IPv4 network; write ADDRESS/PREFIX, for example 10.77.0.0/16")]
    Form(String),
    #[error("the prefix of {network}/{prefix} is not allowed; allowed: {} to {}", PREFIXES.start(), PREFIXES.end())]
    Prefix { network: Ipv4Addr, prefix: u8 },
    #[error("{network}/{prefix} has bits set beyond its prefix; write {mend}")]
    HostBits {
        network: Ipv4Addr,
        prefix: u8,
        mend: Subnet,
    },
}

impl Subnet {
    /// # Errors
    /// A prefix outside 8 to 30, or bits of the network beyond it.
    pub fn check(&self) -> Result<(), SubnetError> {
        let Self { network, prefix } = *self;
        if !PREFIXES.contains(&prefix) {
            return Err(SubnetError::Prefix { network, prefix });
        }
        let first = Ipv4Addr::from(u32::from(network) & self.mask());
        if first != network {
            let mend = Self {
                network: first,
                prefix,
            };
            return Err(SubnetError::HostBits {
                network,
                prefix,
                mend,
            });
        }
        Ok(())
    }

    fn mask(&self) -> u32 {
        u32::MAX
            .checked_shl(32 - u32::from(self.prefix.min(32)))
            .unwrap_or(0)
    }

    /// Whether the address lies in the network, its first (network) and last (broadcast) included.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = self.mask();
        u32::from(address) & mask == u32::from(self.network) & mask
    }

    /// Whether a host may have the address: in the network, neither its first nor its last.
    pub fn is_host(&self, address: Ipv4Addr) -> bool {
        self.contains(address) && address != self.network && address != self.broadcast()
    }

    /// The last address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) | !self.mask())
    }

    /// How many hosts fit.
    pub fn host_count(&self) -> u32 {
        (!self.mask()).saturating_sub(1)
    }

    /// The `n`-th host, from 1 to [`host_count`](Self::host_count).
    pub fn host(&self, n: u32) -> Option<Ipv4Addr> {
        if n == 0 || n > self.host_count() {
            return None;
        }
        u32::from(self.network).checked_add(n).map(Ipv4Addr::from)
    }

    /// All hosts in order.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        (1..=self.host_count()).map_while(move |n| self.host(n))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || SubnetError::Form(text.to_owned());
        let (network, prefix) = text.split_once('/').ok_or_else(form)?;
        // `u8::from_str` also takes a sign and leading zeros.
        let plain = prefix.bytes().all(|b| b.is_ascii_digit()) && !prefix.starts_with('0');
        let subnet = Self {
            network: network.parse().map_err(|_| form())?,
            prefix: prefix.parse().ok().filter(|_| plain).ok_or_else(form)?,
        };
        subnet.check().map(|()| subnet)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn refusals_say_how_to_mend() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "10.0.0.0/x",
            "::/8",
        ] {
            assert_eq!(text.parse::<Subnet>(), Err(SubnetError::Form(text.into())));
        }
        for text in ["0.0.0.0/7", "10.0.0.0/31", "10.0.0.0/32", "10.0.0.0/33"] {
            let error = text.parse::<Subnet>().unwrap_err();
            assert!(error.to_string().contains("8 to 30"), "{error}");
        }
        let error = "10.77.0.1/16".parse::<Subnet>().unwrap_err();
        assert!(error.to_string().ends_with("write 10.77.0.0/16"), "{error}");
    }

    #[test]
    fn edges_of_the_smallest_and_the_largest() {
        let small = subnet("192.0.2.4/30");
        assert_eq!(small.host_count(), 2);
        assert_eq!(
            small.hosts().collect::<Vec<_>>(),
            [[192, 0, 2, 5], [192, 0, 2, 6]].map(Ipv4Addr::from)
        );
        assert_eq!((small.host(0), small.host(3)), (None, None));
        assert!(small.contains(small.network) && !small.is_host(small.network));
        assert!(!small.is_host(small.broadcast()) && !small.contains(Ipv4Addr::new(192, 0, 2, 8)));
        let large = subnet("10.0.0.0/8");
        assert_eq!(
            large.host(large.host_count()),
            Some(Ipv4Addr::new(10, 255, 255, 254))
        );
    }

    proptest! {
        #[test]
        fn text_and_value_agree(address in any::<u32>(), prefix in PREFIXES) {
            let mask = u32::MAX << (32 - prefix);
            let subnet = Subnet { network: Ipv4Addr::from(address & mask), prefix };
            prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
            prop_assert!(subnet.contains(Ipv4Addr::from(address)));
        }

        #[test]
        fn nothing_panics(network in any::<u32>(), prefix in any::<u8>(), n in any::<u32>(), text in ".{0,24}") {
            let subnet = Subnet { network: Ipv4Addr::from(network), prefix };
            let _ = (subnet.check(), subnet.host(n), subnet.host_count(), subnet.broadcast());
            prop_assert_eq!(subnet.hosts().next(), subnet.host(1));
            let _ = text.parse::<Subnet>();
        }

        #[test]
        fn every_host_is_one(address in any::<u32>(), prefix in PREFIXES, n in any::<u32>()) {
            let subnet = Subnet { network: Ipv4Addr::from(address & (u32::MAX << (32 - prefix))), prefix };
            match subnet.host(n) {
                Some(host) => prop_assert!(subnet.is_host(host)),
                None => prop_assert!(n == 0 || n > subnet.host_count()),
            }
        }
    }
}
