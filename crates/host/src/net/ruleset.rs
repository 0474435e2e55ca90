//! The text of our nftables table, made of checked values alone (nft(8)).
//!
//! ```text
//!             family bridge                       family inet
//!  guest ---> prerouting ---- vmap by TAP ----+
//!                                             |
//!    guest-<tap>: its own MAC and IP? no -> drop
//!                                             | yes
//!                     to the bridge itself <--+--> another port: dropped by `isolated`
//!                                |
//!                   local address|other address
//!                          input | forward ----> postrouting
//!              replies, echo of  | not back to the bridge,    masquerade what leaves
//!              the gateway; else | outwards, replies inwards  the subnet
//!              nothing           |
//! ```
//!
//! Each text is one transaction: the kernel goes from the old rules to the new ones in one step.
//! The base replaces rules chain by chain and leaves the map and the guests' chains alone, so a
//! server that starts again with guests running neither opens nor cuts them for a moment.
//!
//! The anti-spoofing rules bind a TAP, a MAC and an IP together: keyed on MAC and IP alone, one guest could speak
//! as another by taking both. They see what a guest *sends*, which always comes in by its own TAP. What is
//! sent *to* a guest is decided by address, so it makes no difference which port its MAC's forwarding
//! entry points to.
use std::fmt::Write;

use super::names::{Base, LinkName, Port, TableName};

/// Bridge, forwarding and masquerading for everybody.
pub(super) fn base(base: &Base) -> String {
    let Base {
        bridge,
        table: t,
        subnet,
        gateway,
        ..
    } = base;
    let to_host = if base.guest_to_host {
        format!("add rule inet {t} input iifname \"{bridge}\" ip saddr {subnet} accept\n")
    } else {
        String::new()
    };
    // 169.254.0.0/16 is never forwarded (RFC 3927, 2.7): cloud hosts keep their credentials there.
    format!(
        "\
add table inet {t}
add chain inet {t} forward {{ type filter hook forward priority 0; policy accept; }}
add chain inet {t} input {{ type filter hook input priority 0; policy accept; }}
add chain inet {t} postrouting {{ type nat hook postrouting priority 100; policy accept; }}
flush chain inet {t} forward
flush chain inet {t} input
flush chain inet {t} postrouting
add rule inet {t} forward iifname \"{bridge}\" oifname \"{bridge}\" counter drop
add rule inet {t} forward iifname \"{bridge}\" ct state invalid counter drop
add rule inet {t} forward iifname \"{bridge}\" ip saddr != {subnet} counter drop
add rule inet {t} forward iifname \"{bridge}\" ip daddr 169.254.0.0/16 counter drop
add rule inet {t} forward iifname \"{bridge}\" meta nfproto ipv6 counter drop
add rule inet {t} forward iifname \"{bridge}\" accept
add rule inet {t} forward oifname \"{bridge}\" ct state established,related accept
add rule inet {t} forward oifname \"{bridge}\" counter drop
add rule inet {t} input iifname \"{bridge}\" ct state established,related accept
add rule inet {t} input iifname \"{bridge}\" ip daddr {gateway} icmp type echo-request accept
{to_host}\
add rule inet {t} input iifname \"{bridge}\" counter drop
add rule inet {t} postrouting ip saddr {subnet} ip daddr != {subnet} oifname != \"{bridge}\" masquerade
{ports}\
add chain bridge {t} prerouting {{ type filter hook prerouting priority -300; policy accept; }}
flush chain bridge {t} prerouting
add rule bridge {t} prerouting iifname vmap @ports
",
        ports = ports(t)
    )
}

/// Fails when the chain that makes the kernel track connections is not there; changes nothing.
pub(super) fn look(base: &Base) -> String {
    format!("list chain inet {} forward\n", base.table)
}

/// A guest may send IPv4 from its own MAC and IP, and ARP that says the same; nothing else.
///
/// IPv6 is not handed out, so it is among the rest. Given again with another MAC or IP the new ones apply.
pub(super) fn add_port(base: &Base, port: &Port) -> String {
    let (t, chain) = (&base.table, chain(&port.tap));
    let Port { tap, mac, ip, .. } = port;
    let mut text = ports(t);
    let _ = write!(
        text,
        "\
add chain bridge {t} {chain}
flush chain bridge {t} {chain}
add rule bridge {t} {chain} ether saddr {mac} ip saddr {ip} accept
add rule bridge {t} {chain} ether saddr {mac} arp saddr ether {mac} arp saddr ip {ip} accept
add rule bridge {t} {chain} counter drop
add element bridge {t} ports {{ \"{tap}\" : jump {chain} }}
"
    );
    text
}

/// Everything [`add_port`] made; absent is fine, because what is deleted is added first (nft has no
/// `destroy` before 1.0.7).
pub(super) fn delete_port(base: &Base, tap: &LinkName) -> String {
    let (t, chain) = (&base.table, chain(tap));
    let mut text = ports(t);
    let _ = write!(
        text,
        "\
add chain bridge {t} {chain}
flush chain bridge {t} {chain}
add element bridge {t} ports {{ \"{tap}\" : jump {chain} }}
delete element bridge {t} ports {{ \"{tap}\" : jump {chain} }}
delete chain bridge {t} {chain}
"
    );
    text
}

fn ports(t: &TableName) -> String {
    format!(
        "\
add table bridge {t}
add map bridge {t} ports {{ type ifname : verdict; }}
"
    )
}

/// The prefix keeps a TAP's name from being a word of nft's language.
fn chain(tap: &LinkName) -> String {
    format!("guest-{tap}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;
    use crate::net::{NetworkConfig, TapConfig};

    fn checked(guest_to_host: bool) -> Base {
        Base::new(&NetworkConfig {
            bridge: "doze0".into(),
            subnet: "10.77.0.0/16".parse().unwrap(),
            gateway: "10.77.0.1".parse().unwrap(),
            table: "doze".into(),
            guest_to_host,
        })
        .unwrap()
    }

    /// What would open or cut running guests must not be in the base.
    #[test]
    fn the_base_never_touches_ports_or_whole_tables() {
        let text = base(&checked(false));
        assert!(
            !text.contains("delete") && !text.contains("flush table"),
            "{text}"
        );
        assert!(
            !text.contains("flush ruleset") && !text.contains("flush map"),
            "{text}"
        );
        assert!(!text.contains("guest-"), "{text}");
    }

    #[test]
    fn only_our_table_is_named() {
        let base_ = checked(true);
        let port = Port::new(
            &TapConfig {
                tap: "dz-1".into(),
                alias: "i".into(),
                mac: "02:00:0a:4d:00:02".into(),
                ip: "10.77.0.2".parse().unwrap(),
                owner: None,
            },
            &base_,
        )
        .unwrap();
        let all = [
            base(&base_),
            add_port(&base_, &port),
            delete_port(&base_, &port.tap),
        ];
        for line in all.iter().flat_map(|text| text.lines()) {
            let words: Vec<&str> = line.split(' ').collect();
            assert!(
                matches!(words[2], "inet" | "bridge") && words[3] == "doze",
                "{line}"
            );
        }
    }

    #[test]
    fn guests_reach_the_host_only_when_allowed() {
        let rule = "add rule inet doze input iifname \"doze0\" ip saddr 10.77.0.0/16 accept\n";
        assert!(!base(&checked(false)).contains(rule));
        assert!(base(&checked(true)).contains(rule));
    }
}
