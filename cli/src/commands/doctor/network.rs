//! Bridge, TAP, packet filter and connection tracking, tried inside a network namespace that is gone
//! when the program that tried them ends: the host's own network is not touched.
use std::fs::OpenOptions;

use super::{Finding, find, probe_with_input};

const TUN: &str = "/dev/net/tun";
/// Uses what our own table uses: NAT needs its module, `ct` needs connection tracking.
const RULES: &str = "
table inet doze_doctor {
    chain forward { type filter hook forward priority 0; ct state established accept; }
    chain postrouting { type nat hook postrouting priority 100; masquerade; }
}
";

pub fn check() -> Vec<Finding> {
    vec![tun(), bridge(), rules()]
}

fn tun() -> Finding {
    match OpenOptions::new().read(true).write(true).open(TUN) {
        Ok(_) => Finding::ok("tap", format!("{TUN} can be opened")),
        Err(error) => Finding::fail(
            "tap",
            format!("{TUN}: {error}"),
            "run as root; modprobe tun; give a container the device /dev/net/tun",
        ),
    }
}

fn bridge() -> Finding {
    if find("ip").is_none() {
        return Finding::warn(
            "bridge",
            "not tried: ip is not in PATH",
            "apt-get install iproute2",
        );
    }
    match inside_namespace(&["ip", "link", "add", "doze-doctor", "type", "bridge"], "") {
        Ok(()) => Finding::ok("bridge", "a bridge can be made"),
        Err(reason) => Finding::fail(
            "bridge",
            reason,
            "run as root (CAP_NET_ADMIN); modprobe bridge",
        ),
    }
}

fn rules() -> Finding {
    const CHECK: &str = "nftables";
    if find("nft").is_none() {
        return Finding::fail(CHECK, "nft is not in PATH", "apt-get install nftables");
    }
    match inside_namespace(&["nft", "-f", "-"], RULES) {
        Ok(()) => Finding::ok(CHECK, "NAT and connection tracking work"),
        Err(reason) => Finding::fail(
            CHECK,
            reason,
            "run as root (CAP_NET_ADMIN); modprobe nf_tables nf_nat nf_conntrack",
        ),
    }
}

fn inside_namespace(command: &[&str], input: &str) -> Result<(), String> {
    let args: Vec<_> = ["--net", "--"].iter().chain(command).copied().collect();
    probe_with_input("unshare", &args, input).map(drop)
}
