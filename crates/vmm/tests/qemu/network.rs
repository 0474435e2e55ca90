//! A machine on a TAP, in a network namespace of its own.
use std::process::Command;

use doze_vmm::{Hypervisor, Nic};

use crate::fixture::{Bench, inside_namespace, tcg};

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().unwrap();
    assert!(status.success(), "ip {args}");
}

/// A TAP has one while somebody holds it open.
fn has_carrier(tap: &str) -> bool {
    let shown = Command::new("ip").args(["link", "show", tap]).output();
    String::from_utf8_lossy(&shown.unwrap().stdout).contains("LOWER_UP")
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
    assert!(has_carrier("dozetap0"));
    // A saved machine takes up the same TAP.
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    machine.save(&folder).await.unwrap();
    machine.kill().await.unwrap();
    let (machine, _channel) = bench.load(&folder).await;
    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    assert!(has_carrier("dozetap0"));
    machine.kill().await.unwrap();
    // Persistent: it stays for the next run.
    ip("link show dozetap0");
    ip("link del dozetap0");
}

#[tokio::test]
async fn q35_guest_has_its_nic() {
    if inside_namespace("-n", "network::q35_guest_has_its_nic") {
        guest_has_its_nic(Hypervisor::Qemu).await;
    }
}

#[tokio::test]
async fn microvm_guest_has_its_nic() {
    if inside_namespace("-n", "network::microvm_guest_has_its_nic") {
        guest_has_its_nic(Hypervisor::QemuMicrovm).await;
    }
}
