//! A save or a load that does not come to its end.
use std::{process::Command, time::Duration};

use doze_vmm::{Hypervisor, Machine, MachineStatus, VmmError, qemu};

use crate::fixture::{Bench, PATIENCE, tcg, wait_status};

on_both_boards! {
    a_save_given_up_leaves_a_usable_machine
    a_server_that_ends_during_a_save_leaves_a_usable_machine
    a_process_that_ends_during_a_save_or_a_load_is_an_error
}

fn signal(machine: &dyn Machine, name: &str) {
    let pid = machine.process().pid.to_string();
    let sent = Command::new("kill").args([name, &pid]).status().unwrap();
    assert!(sent.success());
}

/// It runs, and can be saved and taken up again.
async fn assert_usable(bench: &Bench, machine: Box<dyn Machine>, name: &str) -> Box<dyn Machine> {
    machine.resume().await.unwrap();
    assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
    bench.assert_counts_on().await;
    machine.pause().await.unwrap();
    let folder = bench.new_folder(name);
    machine.save(&folder).await.unwrap();
    machine.kill().await.unwrap();
    let (machine, _channel) = bench.load(&folder).await;
    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    machine.pause().await.unwrap();
    machine
}

/// From before the first command to after the last.
const MOMENTS_US: [u64; 9] = [0, 200, 600, 1_000, 2_000, 4_000, 6_000, 9_000, 15_000];

async fn a_save_given_up_leaves_a_usable_machine(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let mut machine = bench.boot().await;
    machine.pause().await.unwrap();
    let mut given_up = 0;
    for (round, moment) in MOMENTS_US.into_iter().enumerate() {
        let folder = bench.new_folder(&format!("given-up-{round}"));
        let save = tokio::time::timeout(Duration::from_micros(moment), machine.save(&folder));
        given_up += usize::from(save.await.is_err());
        machine.resume().await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
        machine.pause().await.unwrap();
    }
    println!("{given_up} of {} saves were given up", MOMENTS_US.len());
    assert!(given_up > 0);
    // A process that does not answer while the caller waits.
    signal(&*machine, "-STOP");
    let folder = bench.new_folder("no-answer");
    let save = tokio::time::timeout(Duration::from_millis(200), machine.save(&folder));
    assert!(save.await.is_err());
    signal(&*machine, "-CONT");
    machine = assert_usable(&bench, machine, "good").await;
    machine.kill().await.unwrap();
}

async fn a_server_that_ends_during_a_save_leaves_a_usable_machine(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let mut machine = bench.boot().await;
    for (round, moment) in MOMENTS_US.into_iter().enumerate() {
        machine.pause().await.unwrap();
        let folder = bench.new_folder(&format!("ended-{round}"));
        let save = tokio::time::timeout(Duration::from_micros(moment), machine.save(&folder));
        let _ = save.await;
        let id = machine.process().clone();
        // The connection ends with it.
        drop(machine);
        let fresh = qemu::monitor(kind, tcg());
        let attached = fresh.attach(&bench.machine, &id).await.unwrap();
        machine = attached.expect("it lives");
        assert_eq!(*machine.watch().borrow(), MachineStatus::Paused);
        machine.resume().await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
    }
    machine.pause().await.unwrap();
    machine = assert_usable(&bench, machine, "good").await;
    machine.kill().await.unwrap();
}

async fn a_process_that_ends_during_a_save_or_a_load_is_an_error(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    let save = machine.save(&folder);
    let end = async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        signal(&*machine, "-KILL");
    };
    let (saved, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(save, end) })
        .await
        .unwrap();
    // On a quick machine it was over.
    if let Err(e) = saved {
        println!("{e}");
        assert!(matches!(e, VmmError::Exited { .. }), "{e:?}");
    }
    wait_status(&*machine, MachineStatus::Gone).await;

    let mut bench = Bench::new(kind, tcg()).await;
    bench.machine.memory_bytes = 128 << 20;
    let machine = bench.boot().await;
    machine.pause().await.unwrap();
    // Stands still, so that it certainly is not over.
    signal(&*machine, "-STOP");
    let folder = bench.new_folder("killed");
    let save = machine.save(&folder);
    let end = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        signal(&*machine, "-KILL");
    };
    let (saved, ()) = tokio::join!(save, end);
    let e = saved.unwrap_err();
    assert!(
        matches!(e, VmmError::Exited { during: "save", .. }),
        "{e:?}"
    );
    assert_eq!(*machine.watch().borrow(), MachineStatus::Gone);
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);

    let waiting = bench.monitor.spawn_to_load(&bench.machine).await.unwrap();
    signal(&*waiting, "-STOP");
    std::fs::write(folder.join("state"), vec![0; 1 << 20]).unwrap();
    let load = waiting.load(&folder);
    let end = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        signal(&*waiting, "-KILL");
    };
    let (loaded, ()) = tokio::join!(load, end);
    let e = loaded.unwrap_err();
    assert!(
        matches!(e, VmmError::Exited { during: "load", .. }),
        "{e:?}"
    );
}
