#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::process::Command;

use super::*;

const INSIDE: &str = "DOZE_TEST_OUTER_NAMESPACE";

/// Runs the body of the test `name` in a network namespace of its own: the test binary starts itself again
/// under unshare(1).
fn inside(name: &str, body: impl FnOnce()) {
    let here = fs::read_link("/proc/self/ns/net").unwrap();
    if let Some(outer) = std::env::var_os(INSIDE) {
        assert_ne!(outer, here, "still in the host's network namespace");
        return body();
    }
    let mut unshare = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let output = unshare
        // /sys shows the devices of whose namespace mounted it.
        .args(["--net", "--mount", "--", "sh", "-ec"])
        .arg("mount -t sysfs sysfs /sys; exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, here)
        .output()
        .expect("this test needs the program unshare (package util-linux)");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} inside a network namespace of its own: {}; it needs root or user namespaces, and is not \
         skipped without\n{text}",
        output.status
    );
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("this test needs the program ip (package iproute2)");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {complaint}");
    String::from_utf8(output.stdout).unwrap()
}

fn network(n: u8) -> GuestNetwork {
    GuestNetwork {
        mac: format!("02:00:0a:4d:00:{n:02x}"),
        address: [10, 77, 0, n].into(),
        prefix: 16,
        gateway: [10, 77, 0, 1].into(),
        dns: Vec::new(),
    }
}

#[test]
fn a_device_gets_other_addresses_and_keeps_none() {
    inside(
        "init::network::tests::a_device_gets_other_addresses_and_keeps_none",
        || {
            ip("link add eth0 address 02:00:0a:4d:00:05 type veth peer name far");
            ip("link set far up");
            configure(Some(&network(5))).unwrap();
            // What a program may have added, in this network and in another one.
            ip("addr add 10.77.0.55/16 dev eth0");
            ip("addr add 192.0.2.1/24 dev eth0");
            ip("route add 198.51.100.0/24 via 10.77.0.9");
            // Also for one that was cut off, and for one that has the identity already.
            for _ in 0..2 {
                readdress(&network(5), &network(6)).unwrap();
                let (link, addresses) = (ip("link show eth0"), ip("-4 -o addr show dev eth0"));
                assert!(link.contains("02:00:0a:4d:00:06"), "{link}");
                assert!(link.contains("state UP"), "{link}");
                assert_eq!(addresses.lines().count(), 1, "{addresses}");
                assert!(addresses.contains("10.77.0.6/16"), "{addresses}");
                let routes = ip("-4 route show");
                assert!(
                    routes.contains("default via 10.77.0.1 dev eth0"),
                    "{routes}"
                );
                assert!(!routes.contains("198.51.100.0"), "{routes}");
            }
            let error = readdress(&network(7), &network(8)).unwrap_err();
            assert!(error.to_string().contains("02:00:0a:4d:00:07"), "{error}");
        },
    );
}

#[test]
fn answers_that_are_cut_off_are_errors() {
    let mut answer = vec![0; HEADER_LEN];
    answer[4..6].copy_from_slice(&libc::RTM_NEWADDR.to_ne_bytes());
    answer.extend(address_message(3, 24));
    attribute(&mut answer, libc::IFA_LOCAL, &[10, 0, 0, 7]);
    let len = answer.len() as u32;
    answer[..4].copy_from_slice(&len.to_ne_bytes());
    let read = |bytes: &[u8], index| {
        let mut found = Vec::new();
        found_addresses(bytes, index, &mut found).map(|last| (last, found))
    };
    let whole = (false, vec![([10, 0, 0, 7].into(), 24)]);
    assert_eq!(read(&answer, 3).unwrap(), whole);
    assert_eq!(read(&answer, 4).unwrap(), (false, Vec::new()));
    for cut in 1..answer.len() {
        assert!(read(&answer[..cut], 3).is_err(), "{cut}");
        let mut lies = answer[..cut].to_vec();
        lies.resize(cut.max(4), 0);
        lies[..4].copy_from_slice(&(cut as u32).to_ne_bytes());
        // Never past its end, whatever it makes of it.
        let _ = read(&lies, 3);
    }
    assert!(acknowledged(&answer[..HEADER_LEN]).is_err());
}
