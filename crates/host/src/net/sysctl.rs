//! Settings below /proc/sys/net. They belong to the network namespace of whoever opens them.
use std::{fs, io};

use super::{NetError, names::LinkName, privilege};

/// Routing between links. Written only when it is off: the kernel resets other settings of all
/// links when it changes (ip-sysctl.rst, `ip_forward`).
pub(super) fn enable_forwarding() -> Result<(), NetError> {
    set("/proc/sys/net/ipv4/ip_forward", "1")
}

/// No IPv6 on the host's side: a link-local address would be a way to the host that needs no
/// address from us. Must come before the link goes up.
pub(super) fn disable_ipv6(link: &LinkName) -> Result<(), NetError> {
    if !fs::exists("/proc/sys/net/ipv6").unwrap_or(true) {
        return Ok(());
    }
    set(&format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1")
}

/// The bridge shows guests its own address and nothing of the host's other ones.
pub(super) fn harden_bridge(link: &LinkName) -> Result<(), NetError> {
    let settings = [
        // Answer ARP for addresses of this link only, and ask with them only.
        ("arp_ignore", "1"),
        ("arp_announce", "2"),
        // A source must be one that is routed back to the bridge.
        ("rp_filter", "1"),
        ("accept_redirects", "0"),
        ("send_redirects", "0"),
        ("accept_source_route", "0"),
        ("route_localnet", "0"),
    ];
    settings
        .iter()
        .try_for_each(|(key, value)| set(&format!("/proc/sys/net/ipv4/conf/{link}/{key}"), value))
}

fn set(path: &str, value: &str) -> Result<(), NetError> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::PermissionDenied => privilege(&format!("write {path}")),
        io::ErrorKind::ReadOnlyFilesystem => NetError::Missing {
            what: format!("{path} is read-only, and {value} has to be written there"),
            mend: "mount /proc/sys read-write (in a container: run it privileged)".into(),
        },
        _ => NetError::Failed {
            context: format!("setting {path} to {value}"),
            message: e.to_string(),
        },
    };
    if fs::read_to_string(path).map_err(failed)?.trim() == value {
        return Ok(());
    }
    fs::write(path, value).map_err(failed)
}
