//! A machine on a TAP, in a network namespace of its own.
use std::process::Command;

use doze_vmm::{Hypervisor, Nic};

use crate::fixture::{Bench, tcg};

const INSIDE: &str = "DOZE_VMM_TEST_INSIDE_NAMESPACE";

/// Runs this test again in a namespace that ends with it; `true` when we are inside.
fn inside_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let status = Command::new("unshare")
        .arg("-n")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(
        status.success(),
        "{test} failed inside its network namespace (needs root)"
    );
    false
}

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}");
}

async fn guest_has_its_nic(kind: Hypervisor) {
    ip("tuntap add dev dozetap0 mode tap");
    ip("link set dozetap0 up");
    // Opened before the user changes.
    let mut config = tcg();
    config.run_as = Some("nobody".into());
    let mut bench = Bench::new(kind, config).await;
    bench.machine.nic = Some(Nic {
        tap: "dozetap0".into(),
        mac: "52:54:00:0a:0b:0c".into(),
    });
    let machine = bench.boot().await;
    assert!(
        bench.log().contains("test: nic address=52:54:00:0a:0b:0c"),
        "{}",
        bench.log()
    );
    let carrier = Command::new("ip")
        .args(["link", "show", "dozetap0"])
        .output()
        .unwrap();
    let carrier = String::from_utf8_lossy(&carrier.stdout).into_owned();
    assert!(carrier.contains("LOWER_UP"), "{carrier}");
    machine.kill().await.unwrap();
    // Persistent: it stays for the next run.
    ip("link show dozetap0");
    ip("link del dozetap0");
}

#[tokio::test]
async fn q35_guest_has_its_nic() {
    if inside_namespace("network::q35_guest_has_its_nic") {
        guest_has_its_nic(Hypervisor::Qemu).await;
    }
}

#[tokio::test]
async fn microvm_guest_has_its_nic() {
    if inside_namespace("network::microvm_guest_has_its_nic") {
        guest_has_its_nic(Hypervisor::QemuMicrovm).await;
    }
}
