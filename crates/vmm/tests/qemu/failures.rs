//! What goes wrong at the start, and that nothing is left of it.
use std::fs;

use doze_vmm::{Disk, Hypervisor, MachineStatus, Nic, VmmError, qemu::QemuConfig};

use crate::fixture::{Bench, tcg};

async fn refused(bench: &Bench) -> VmmError {
    bench
        .monitor
        .spawn(&bench.machine)
        .await
        .err()
        .expect("it must fail")
}

#[tokio::test]
async fn a_missing_binary_says_how_to_mend_it() {
    let mut bench = Bench::new(Hypervisor::Qemu, tcg()).await;
    let config = QemuConfig {
        binary: Some("/nonexistent/qemu".into()),
        ..tcg()
    };
    bench.monitor = doze_vmm::qemu::monitor(Hypervisor::Qemu, config);
    let e = refused(&bench).await;
    assert!(
        matches!(e, VmmError::Missing { .. }) && e.to_string().contains("apt install"),
        "{e}"
    );
    bench.assert_nothing_left();

    // An executable file that is no program.
    let config = QemuConfig {
        binary: Some("/bin/sh".into()),
        ..tcg()
    };
    bench.monitor = doze_vmm::qemu::monitor(Hypervisor::Qemu, config);
    let e = refused(&bench).await;
    assert!(
        matches!(
            e,
            VmmError::Exited {
                during: "spawn",
                ..
            }
        ),
        "{e}"
    );
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_missing_disk_is_named() {
    for kind in [Hypervisor::Qemu, Hypervisor::QemuMicrovm] {
        let bench = Bench::new(kind, tcg()).await;
        let disk = &bench.machine.disks[1].path;
        fs::remove_file(disk).unwrap();
        fs::write(&bench.machine.vmm_log, "words of an earlier run\n").unwrap();
        let e = refused(&bench).await;
        let VmmError::Exited {
            during: "spawn",
            log,
        } = &e
        else {
            panic!("{e:?}")
        };
        assert!(log.contains(disk.to_str().unwrap()), "{log}");
        assert!(!log.contains("earlier run"), "{log}");
        bench.assert_nothing_left();
        assert!(
            bench.log().starts_with("words of an earlier run\n"),
            "the log is appended to"
        );
    }
}

#[tokio::test]
async fn an_unknown_user_is_named() {
    let config = QemuConfig {
        run_as: Some("nobody-of-this-name".into()),
        ..tcg()
    };
    let bench = Bench::new(Hypervisor::QemuMicrovm, config).await;
    let e = refused(&bench).await;
    assert!(e.to_string().contains("nobody-of-this-name"), "{e}");
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_missing_tap_is_not_made_by_accident() {
    let mut bench = Bench::new(Hypervisor::QemuMicrovm, tcg()).await;
    bench.machine.nic = Some(Nic {
        tap: "doze-none0".into(),
        mac: "52:54:00:00:00:01".into(),
    });
    let e = refused(&bench).await;
    assert!(
        matches!(e, VmmError::Missing { .. }) && e.to_string().contains("doze-none0"),
        "{e}"
    );
    bench.assert_nothing_left();
}

#[tokio::test]
async fn a_description_that_cannot_be_built_is_refused_before_anything_happens() {
    let bench = Bench::new(Hypervisor::QemuMicrovm, tcg()).await;
    let mut machine = bench.machine.clone();
    for i in 0..4 {
        machine.disks.push(Disk {
            serial: format!("more-{i}"),
            path: bench.machine.disks[0].path.clone(),
            read_only: true,
        });
    }
    let e = bench.monitor.spawn(&machine).await.err().unwrap();
    assert!(
        matches!(e, VmmError::Unsupported(_)) && e.to_string().contains("virtio-mmio"),
        "{e}"
    );
    bench.assert_nothing_left();
}

#[tokio::test]
async fn stale_sockets_are_replaced_and_a_used_memory_file_is_not() {
    let bench = Bench::new(Hypervisor::Qemu, tcg()).await;
    for name in ["qmp.sock", "agent.sock"] {
        drop(std::os::unix::net::UnixListener::bind(bench.folder.path().join(name)).unwrap());
    }
    // Empty is as good as absent.
    fs::write(&bench.machine.memory.path, "").unwrap();
    let machine = bench.spawn().await;
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Prelaunch);
    machine.kill().await.unwrap();

    let e = refused(&bench).await;
    assert!(matches!(e, VmmError::Unsupported(_)), "{e}");
    assert!(e.to_string().contains("must be empty or absent"), "{e}");
    assert_eq!(
        fs::metadata(&bench.machine.memory.path).unwrap().len(),
        256 << 20
    );
}

#[tokio::test]
async fn one_overlay_does_not_serve_two_machines() {
    let first = Bench::new(Hypervisor::Qemu, tcg()).await;
    let mut second = Bench::new(Hypervisor::QemuMicrovm, tcg()).await;
    second.machine.disks = first.machine.disks.clone();
    let running = first.spawn().await;
    let e = refused(&second).await;
    assert!(
        matches!(e, VmmError::Exited { .. }) && e.to_string().contains("lock"),
        "{e}"
    );
    second.assert_nothing_left();
    // The read-only root file system is shared by as many as like.
    second.machine.disks.truncate(1);
    let beside = second.spawn().await;
    beside.kill().await.unwrap();
    running.kill().await.unwrap();
}
