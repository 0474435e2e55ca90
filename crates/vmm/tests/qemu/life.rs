//! A machine from its start to its end.
use std::{os::unix::fs::MetadataExt, time::Instant};

use doze_host::process::{ProcessHandle, find_marked};
use doze_vmm::{Hypervisor, MachineStatus, VmmError, qemu};

use tokio::io::AsyncWriteExt;

use crate::fixture::{Bench, PATIENCE, read_byte, report, tcg, wait_status};

on_both_boards! {
    boots_pauses_resumes_and_powers_off
    sees_its_devices_and_keeps_its_memory_sparse
    a_reboot_and_a_panic_end_the_run
    memory_the_guest_freed_goes_back_to_the_host
    a_killed_process_is_noticed
    is_found_again_after_the_server_went_away
    runs_with_four_cpus_as_an_unprivileged_user
}

async fn boots_pauses_resumes_and_powers_off(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let begun = Instant::now();
    let machine = bench.spawn().await;
    report("exec to prelaunch", begun);
    assert_eq!(*machine.watch().borrow(), MachineStatus::Prelaunch);
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Prelaunch);
    assert_eq!(
        find_marked(&qemu::mark(&bench.machine.id)).unwrap(),
        [machine.process().clone()]
    );

    let resumed = Instant::now();
    machine.resume().await.unwrap();
    assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
    bench.wait_log("test: init").await;
    report("resume to init", resumed);
    bench.wait_log("test: ready").await;
    report("resume to modules loaded", resumed);
    report("exec to modules loaded", begun);

    machine.pause().await.unwrap();
    assert_eq!(*machine.watch().borrow(), MachineStatus::Paused);
    // Pausing twice is fine, and the CPUs really stand still: a running guest ticks ten times a second.
    machine.pause().await.unwrap();
    let ticks = bench.ticks();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert_eq!(bench.ticks(), ticks);
    machine.resume().await.unwrap();
    bench
        .wait("more ticks", |bench| bench.ticks() > ticks + 2)
        .await;

    bench.command(b'p').await;
    wait_status(&*machine, MachineStatus::Shutdown).await;
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Shutdown);
    assert!(
        ProcessHandle::open(machine.process()).unwrap().is_some(),
        "the process waits to be killed"
    );
    let refused = machine.resume().await.unwrap_err();
    assert!(
        matches!(
            refused,
            VmmError::Refused {
                command: "cont",
                ..
            }
        ),
        "{refused}"
    );
    let refused = machine.pause().await.unwrap_err();
    assert!(
        matches!(
            refused,
            VmmError::Refused {
                command: "stop",
                ..
            }
        ),
        "{refused}"
    );

    machine.kill().await.unwrap();
    assert_eq!(*machine.watch().borrow(), MachineStatus::Gone);
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Gone);
    assert!(ProcessHandle::open(machine.process()).unwrap().is_none());
    machine.kill().await.unwrap();
    let late = machine.resume().await.unwrap_err();
    assert!(
        matches!(late, VmmError::Exited { during: "cont", .. }),
        "{late}"
    );
}

async fn sees_its_devices_and_keeps_its_memory_sparse(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    std::fs::write(&bench.machine.app_log, "from an earlier run\n").unwrap();
    let machine = bench.boot().await;
    let log = bench.log();
    assert!(!log.contains("refused"), "a module did not load:\n{log}");
    // 4 MiB are 8192 sectors.
    for line in [
        "test: disk serial=doze-rootfs ro=1 size=8192",
        "test: disk serial=doze-overlay ro=0 size=8192",
        "test: ports app=1 control=1",
    ] {
        assert!(log.contains(line), "{line:?} is not in the log:\n{log}");
    }
    bench
        .wait("the program's output", |bench| {
            std::fs::read_to_string(&bench.machine.app_log).unwrap()
                == "from an earlier run\nhello from the program\n"
        })
        .await;

    let mut control = bench.command(b'e').await;
    assert_eq!(read_byte(&mut control).await, b'E');

    let memory = std::fs::metadata(&bench.machine.memory.path).unwrap();
    assert_eq!(memory.size(), 256 << 20);
    assert_eq!(memory.mode() & 0o777, 0o600);
    let allocated = memory.blocks() * 512;
    println!(
        "memory allocated after boot: {} MiB of 256",
        allocated >> 20
    );
    // Guest RAM really is in this file, and only what was touched.
    assert!((16 << 20..200 << 20).contains(&allocated), "{allocated}");
    let needle = b"test: tick";
    let content = std::fs::read(&bench.machine.memory.path).unwrap();
    assert!(content.windows(needle.len()).any(|window| window == needle));
    machine.kill().await.unwrap();
}

async fn a_reboot_and_a_panic_end_the_run(kind: Hypervisor) {
    for (letter, expected) in [
        (b'r', MachineStatus::Shutdown),
        (b'c', MachineStatus::Failed),
    ] {
        let bench = Bench::new(kind, tcg()).await;
        let machine = bench.boot().await;
        bench.command(letter).await;
        wait_status(&*machine, expected).await;
        assert_eq!(bench.log().matches("test: init").count(), 1);
        machine.kill().await.unwrap();
    }
}

async fn memory_the_guest_freed_goes_back_to_the_host(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let allocated = || {
        std::fs::metadata(&bench.machine.memory.path)
            .unwrap()
            .blocks()
            * 512
    };
    let mut control = bench.command(b'm').await;
    assert_eq!(read_byte(&mut control).await, b'E');
    let filled = allocated();
    control.write_all(b"f").await.unwrap();
    assert_eq!(read_byte(&mut control).await, b'E');
    // The guest reports every two seconds, and only whole free blocks of 2 MiB (page_reporting_order), so that
    // not all of the 64 MiB come back. A hole in a file raises no event.
    let mut look = tokio::time::interval(std::time::Duration::from_millis(100));
    let returned = tokio::time::timeout(PATIENCE, async {
        while allocated() + (32 << 20) > filled {
            look.tick().await;
        }
    });
    assert!(
        returned.await.is_ok(),
        "{} MiB then, {} now",
        filled >> 20,
        allocated() >> 20
    );
    println!(
        "memory: {} MiB filled, {} MiB after the guest freed 64",
        filled >> 20,
        allocated() >> 20
    );
    machine.kill().await.unwrap();
}

async fn a_killed_process_is_noticed(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.spawn().await;
    let process = ProcessHandle::open(machine.process()).unwrap().unwrap();
    process.kill().unwrap();
    wait_status(&*machine, MachineStatus::Gone).await;
    let after = machine.pause().await.unwrap_err();
    assert!(
        matches!(after, VmmError::Exited { during: "stop", .. }),
        "{after}"
    );
}

async fn is_found_again_after_the_server_went_away(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let first = bench.boot().await;
    let id = first.process().clone();
    let socket = first.agent_socket().to_owned();
    // The connection ends with the machine, its process goes on.
    drop(first);

    let fresh = qemu::monitor(kind, tcg());
    let second = fresh
        .attach(&bench.machine, &id)
        .await
        .unwrap()
        .expect("it lives");
    assert_eq!(second.process(), &id);
    assert_eq!(second.agent_socket(), socket);
    assert_eq!(*second.watch().borrow(), MachineStatus::Running);
    second.pause().await.unwrap();
    assert_eq!(second.status().await.unwrap(), MachineStatus::Paused);
    drop(second);

    // Paused stays paused, whoever comes.
    let third = fresh
        .attach(&bench.machine, &id)
        .await
        .unwrap()
        .expect("it lives");
    assert_eq!(*third.watch().borrow(), MachineStatus::Paused);
    let mut stranger = id.clone();
    stranger.start_ticks += 1;
    assert!(
        fresh
            .attach(&bench.machine, &stranger)
            .await
            .unwrap()
            .is_none()
    );
    // While one client is connected the next gets no greeting.
    let busy = fresh.attach(&bench.machine, &id).await.err().unwrap();
    assert!(
        matches!(
            busy,
            VmmError::Timeout {
                command: "attach",
                ..
            }
        ),
        "{busy}"
    );
    third.resume().await.unwrap();
    third.kill().await.unwrap();
    assert!(fresh.attach(&bench.machine, &id).await.unwrap().is_none());
}

async fn runs_with_four_cpus_as_an_unprivileged_user(kind: Hypervisor) {
    let mut config = tcg();
    config.run_as = Some("nobody".into());
    let mut bench = Bench::new(kind, config).await;
    bench.machine.vcpus = 4;
    let machine = bench.boot().await;
    let pid = machine.process().pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(field("Uid:"), "65534 65534 65534 65534");
    assert_eq!(field("Gid:"), "65534 65534 65534 65534");
    assert_eq!(field("CapPrm:"), "0000000000000000");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    // Still ours to find, to command and to kill.
    assert_eq!(
        find_marked(&qemu::mark(&bench.machine.id)).unwrap(),
        [machine.process().clone()]
    );
    let ticks = bench.ticks();
    let ticking = bench.wait("ticks", |bench| bench.ticks() > ticks + 1);
    tokio::time::timeout(PATIENCE, ticking).await.unwrap();
    machine.pause().await.unwrap();
    machine.kill().await.unwrap();
}
