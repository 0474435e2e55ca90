//! Name servers for guests when none are configured: the host's own, as far as guests reach them.
use std::{fs, net::Ipv4Addr};

/// `nameserver` lines of resolv.conf(5). A loopback address is a resolver on the host itself, which
/// a guest cannot reach.
pub(crate) fn parse(resolv_conf: &str) -> Vec<Ipv4Addr> {
    resolv_conf
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .collect()
}

/// The host's. systemd-resolved keeps the real ones beside the stub that resolv.conf names.
pub(crate) fn of_host() -> Vec<Ipv4Addr> {
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
        .into_iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .map(|text| parse(&text))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_guests_can_reach() {
        let text = "# x\nsearch lan\nnameserver 127.0.0.53\n nameserver\t10.0.0.2 \nnameserver fe80::1\nnameserver 9.9.9.9\noptions edns0\n";
        assert_eq!(
            parse(text),
            [Ipv4Addr::new(10, 0, 0, 2), Ipv4Addr::new(9, 9, 9, 9)]
        );
        assert!(parse("").is_empty());
    }
}
