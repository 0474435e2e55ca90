//! A machine that is saved, and one that goes on where it was.
use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use doze_vmm::{Hypervisor, Machine, MachineStatus, VmmError, qemu::QemuConfig};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use crate::fixture::{Bench, PATIENCE, inside_namespace, read_byte, report, tcg};

on_both_boards! {
    goes_on_where_it_was
    goes_on_where_it_was_as_an_unprivileged_user
    a_saved_machine_can_be_resumed_and_saved_again
    a_bad_state_is_refused_and_memory_stays_untouched
    a_memory_file_that_does_not_fit_is_refused
    memory_freed_after_a_load_goes_back_to_the_host
    the_channel_changes_nothing_while_the_machine_does_not_run
    a_channel_connected_late_works
    other_versions_are_refused
    takes_little_time_whatever_the_memory
}

async fn goes_on_where_it_was(kind: Hypervisor) {
    cycles(kind, tcg()).await;
}

async fn goes_on_where_it_was_as_an_unprivileged_user(kind: Hypervisor) {
    let config = QemuConfig {
        run_as: Some("nobody".into()),
        ..tcg()
    };
    cycles(kind, config).await;
}

async fn cycles(kind: Hypervisor, config: QemuConfig) {
    let bench = Bench::new(kind, config).await;
    let mut machine = bench.boot().await;
    let mut channel = bench.ask(b'm').await;
    for round in 0..3 {
        machine.pause().await.unwrap();
        let folder = bench.new_folder(&format!("saved-{round}"));
        let saved = machine.save(&folder).await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Paused);
        let [file] = saved.as_slice() else {
            panic!("one file: {saved:?}")
        };
        let content = fs::read(folder.join(&file.name)).unwrap();
        assert_eq!(file.size, content.len() as u64);
        assert_eq!(file.sha256, hex::encode(Sha256::digest(&content)));
        machine.kill().await.unwrap();
        let (memory, log) = (bench.memory_hash(), bench.log());

        // As often as one likes, until it is resumed.
        let (tried, _channel) = bench.load(&folder).await;
        assert_eq!(tried.status().await.unwrap(), MachineStatus::Paused);
        tried.kill().await.unwrap();
        assert_eq!(bench.memory_hash(), memory);

        (machine, channel) = bench.load(&folder).await;
        assert_eq!(bench.memory_hash(), memory);
        assert_eq!(bench.log(), log, "it did not run");
        machine.resume().await.unwrap();
        assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
        channel.write_all(b"v").await.unwrap();
        assert_eq!(read_byte(&mut channel).await, b'E', "the pattern in memory");
        bench.assert_counts_on().await;
    }
    assert_eq!(bench.log().matches("test: init").count(), 1);
    channel.write_all(b"p").await.unwrap();
    crate::fixture::wait_status(&*machine, MachineStatus::Shutdown).await;
    machine.kill().await.unwrap();
}

async fn a_saved_machine_can_be_resumed_and_saved_again(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let running = machine
        .save(&bench.new_folder("running"))
        .await
        .unwrap_err();
    assert!(running.to_string().contains("running"), "{running}");
    let _channel = bench.ask(b'm').await;
    machine.pause().await.unwrap();
    machine.save(&bench.new_folder("first")).await.unwrap();
    let twice = machine.save(&bench.new_folder("twice")).await.unwrap_err();
    assert!(twice.to_string().contains("has not run since"), "{twice}");
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);

    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    machine.pause().await.unwrap();
    let second = bench.new_folder("second");
    machine.save(&second).await.unwrap();
    machine.kill().await.unwrap();
    let (machine, mut channel) = bench.load(&second).await;
    machine.resume().await.unwrap();
    channel.write_all(b"v").await.unwrap();
    assert_eq!(read_byte(&mut channel).await, b'E');
    bench.assert_counts_on().await;
    let twice = machine.load(&second).await.unwrap_err();
    assert!(twice.to_string().contains("does not wait"), "{twice}");
    machine.kill().await.unwrap();
}

async fn a_bad_state_is_refused_and_memory_stays_untouched(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    machine.save(&folder).await.unwrap();
    machine.kill().await.unwrap();
    let memory = bench.memory_hash();
    let good = fs::read(folder.join("state")).unwrap();
    let bad = bench.new_folder("bad");
    let altered = |at: usize| {
        let mut state = good.clone();
        state[at] ^= 0xff;
        state
    };
    let cases = [
        ("empty", Vec::new()),
        ("cut after the magic", good[..8].to_vec()),
        ("cut in the middle", good[..good.len() / 2].to_vec()),
        ("without its last byte", good[..good.len() - 1].to_vec()),
        ("another magic", altered(0)),
        ("another machine type", altered(16)),
        ("zeros", vec![0; 100_000]),
    ];
    for (what, state) in cases {
        fs::write(bad.join("state"), &state).unwrap();
        let machine = bench.monitor.spawn_to_load(&bench.machine).await.unwrap();
        let _channel = bench.connect().await;
        let begun = Instant::now();
        match machine.load(&bad).await {
            // The description of the devices at the end is for people, QEMU 7.2 does not look for it.
            Ok(()) => assert_eq!(what, "without its last byte"),
            Err(e) => {
                println!("{what}: {e}");
                assert!(
                    matches!(
                        e,
                        VmmError::Exited { during: "load", .. } | VmmError::Refused { .. }
                    ),
                    "{what}: {e:?}"
                );
            }
        }
        report(what, begun);
        machine.kill().await.unwrap();
        assert_eq!(bench.memory_hash(), memory, "{what}");
    }
    fs::remove_file(bad.join("state")).unwrap();
    let machine = bench.monitor.spawn_to_load(&bench.machine).await.unwrap();
    let absent = machine.load(&bad).await.unwrap_err();
    assert!(absent.to_string().contains("bad/state"), "{absent}");
    machine.kill().await.unwrap();

    let (machine, _channel) = bench.load(&folder).await;
    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    machine.kill().await.unwrap();
}

async fn a_memory_file_that_does_not_fit_is_refused(kind: Hypervisor) {
    let mut bench = Bench::new(kind, tcg()).await;
    let absent = bench.monitor.spawn_to_load(&bench.machine).await.err();
    let absent = absent.expect("there is no memory");
    assert!(matches!(absent, VmmError::Io { .. }), "{absent:?}");
    bench.assert_nothing_left();

    fs::write(&bench.machine.memory.path, b"short").unwrap();
    let short = bench.monitor.spawn_to_load(&bench.machine).await.err();
    let short = short.expect("memory is too short").to_string();
    for words in ["5 bytes", "268435456"] {
        assert!(short.contains(words), "{short}");
    }
    assert_eq!(fs::read(&bench.machine.memory.path).unwrap(), b"short");

    // A process that does not start leaves it, too.
    fs::File::create(&bench.machine.memory.path)
        .unwrap()
        .set_len(256 << 20)
        .unwrap();
    bench.machine.disks[0].path = "/nonexistent/disk".into();
    let e = bench.monitor.spawn_to_load(&bench.machine).await.err();
    let e = e.expect("a disk is missing");
    assert!(matches!(e, VmmError::Exited { .. }), "{e:?}");
    assert!(bench.machine.memory.path.exists());
    assert!(!bench.folder.path().join("qmp.sock").exists());
}

async fn memory_freed_after_a_load_goes_back_to_the_host(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let _channel = bench.ask(b'm').await;
    let filled = bench.memory_allocated();
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    machine.save(&folder).await.unwrap();
    machine.kill().await.unwrap();
    let (machine, mut channel) = bench.load(&folder).await;
    machine.resume().await.unwrap();
    channel.write_all(b"f").await.unwrap();
    assert_eq!(read_byte(&mut channel).await, b'E');
    // A hole in a file raises no event.
    let mut look = tokio::time::interval(Duration::from_millis(100));
    let returned = tokio::time::timeout(PATIENCE, async {
        while bench.memory_allocated() + (32 << 20) > filled {
            look.tick().await;
        }
    });
    assert!(returned.await.is_ok(), "{} MiB", filled >> 20);
    println!(
        "memory: {} MiB filled, {} MiB after the loaded guest freed 64",
        filled >> 20,
        bench.memory_allocated() >> 20
    );
    machine.kill().await.unwrap();
}

/// Several turns of QEMU's main loop, in which it notices what happened to its sockets.
async fn let_it_look(machine: &dyn Machine) {
    for _ in 0..5 {
        machine.status().await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Open descriptors of the VMM.
fn descriptors(machine: &dyn Machine) -> usize {
    let folder = format!("/proc/{}/fd", machine.process().pid);
    fs::read_dir(folder).unwrap().count()
}

/// A server may die at any moment, and its connections with it: a virtio-serial that told its guest so while
/// the CPUs stand still would write into memory that was saved, and the device state would not fit it any more.
async fn the_channel_changes_nothing_while_the_machine_does_not_run(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let mut channel = bench.ask(b'm').await;
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    machine.save(&folder).await.unwrap();
    let memory = bench.memory_hash();
    channel.write_all(b"x").await.unwrap();
    let_it_look(&*machine).await;
    assert_eq!(bench.memory_hash(), memory, "written to after a save");
    let open = descriptors(&*machine);
    drop(channel);
    let_it_look(&*machine).await;
    assert_eq!(
        descriptors(&*machine),
        open - 1,
        "the VMM noticed the close"
    );
    assert_eq!(bench.memory_hash(), memory, "closed after a save");
    machine.kill().await.unwrap();

    let (machine, mut channel) = bench.load(&folder).await;
    channel.write_all(b"x").await.unwrap();
    let_it_look(&*machine).await;
    assert_eq!(bench.memory_hash(), memory, "written to after a load");
    drop(channel);
    let_it_look(&*machine).await;
    let _again = bench.connect().await;
    let_it_look(&*machine).await;
    assert_eq!(bench.memory_hash(), memory, "closed after a load");
    machine.kill().await.unwrap();

    let (machine, mut channel) = bench.load(&folder).await;
    machine.resume().await.unwrap();
    channel.write_all(b"v").await.unwrap();
    assert_eq!(read_byte(&mut channel).await, b'E');
    machine.kill().await.unwrap();
}

/// Connected when it was saved, and not when it is loaded: the guest hears of it once it runs.
async fn a_channel_connected_late_works(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let _channel = bench.ask(b'm').await;
    machine.pause().await.unwrap();
    let folder = bench.new_folder("saved");
    machine.save(&folder).await.unwrap();
    machine.kill().await.unwrap();
    let machine = bench.monitor.spawn_to_load(&bench.machine).await.unwrap();
    machine.load(&folder).await.unwrap();
    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    bench.ask(b'v').await;
    machine.kill().await.unwrap();
}

async fn other_versions_are_refused(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let here = bench.monitor.probe().await.version.unwrap();
    bench
        .monitor
        .check_loads(&bench.machine, &here)
        .await
        .unwrap();
    let e = bench.monitor.check_loads(&bench.machine, "999.0").await;
    let e = e.unwrap_err().to_string();
    assert!(e.contains("999.0") && e.contains(&here), "{e}");
    let old = bench.monitor.check_loads(&bench.machine, "7.1.9").await;
    assert_eq!(old.is_ok(), kind == Hypervisor::Qemu, "{old:?}");
    // Processes are found by their mark and ended by whoever finds them.
    let machine = bench.spawn().await;
    let found = bench.monitor.find(&bench.machine.id).await.unwrap();
    assert_eq!(found, [machine.process().clone()]);
    bench.monitor.kill(&found[0]).await.unwrap();
    assert_eq!(bench.monitor.find(&bench.machine.id).await.unwrap(), []);
    bench.monitor.kill(&found[0]).await.unwrap();
}

async fn takes_little_time_whatever_the_memory(kind: Hypervisor) {
    for mib in [512, 2048] {
        let mut bench = Bench::new(kind, tcg()).await;
        bench.machine.memory_bytes = mib << 20;
        let mut machine = bench.boot().await;
        let mut channel = bench.ask(b'M').await;
        for round in 0..5 {
            let folder = bench.new_folder(&format!("saved-{round}"));
            let asked = Instant::now();
            machine.pause().await.unwrap();
            let stopped = Instant::now();
            let saved = machine.save(&folder).await.unwrap();
            let ms = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e3;
            let done = Instant::now();
            machine.kill().await.unwrap();
            let begun = Instant::now();
            machine = bench.monitor.spawn_to_load(&bench.machine).await.unwrap();
            let spawned = Instant::now();
            channel = bench.connect().await;
            machine.load(&folder).await.unwrap();
            let loaded = Instant::now();
            machine.resume().await.unwrap();
            let resumed = Instant::now();
            println!(
                "{kind:?} {mib} MiB: stop {:.1} ms, save {:.1} ms, state {} bytes; spawn {:.1} ms, load {:.1} ms, resume {:.1} ms",
                ms(asked, stopped),
                ms(stopped, done),
                saved[0].size,
                ms(begun, spawned),
                ms(spawned, loaded),
                ms(loaded, resumed),
            );
            channel.write_all(b"e").await.unwrap();
            assert_eq!(read_byte(&mut channel).await, b'E');
        }
        channel.write_all(b"v").await.unwrap();
        assert_eq!(read_byte(&mut channel).await, b'E');
        machine.kill().await.unwrap();
    }
}

/// A file system of 16 KiB. Unmounted also when the test fails, for the bench to remove its folder.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(folder: PathBuf) -> Self {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=16k", "none"])
            .arg(&folder)
            .status();
        assert!(mounted.unwrap().success());
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0).status();
        assert!(unmounted.unwrap().success() || std::thread::panicking());
    }
}

async fn a_full_disk_is_named_and_the_machine_goes_on(kind: Hypervisor) {
    let bench = Bench::new(kind, tcg()).await;
    let machine = bench.boot().await;
    let disk = SmallDisk::mount(bench.new_folder("small"));
    let small = &disk.0;
    machine.pause().await.unwrap();
    let full = machine.save(small).await.unwrap_err();
    let VmmError::NoSpace {
        needed, available, ..
    } = &full
    else {
        panic!("{full:?}")
    };
    println!("{full}");
    assert!(
        (1..=16 << 10).contains(available) && *needed > *available,
        "{full}"
    );
    assert_eq!(fs::read_dir(small).unwrap().count(), 0, "nothing is left");
    machine.resume().await.unwrap();
    bench.assert_counts_on().await;
    machine.pause().await.unwrap();
    let saved = machine.save(&bench.new_folder("large")).await.unwrap();
    assert_eq!(saved.len(), 1);
    machine.kill().await.unwrap();
}

#[tokio::test]
async fn q35_names_a_full_disk() {
    if inside_namespace("-m", "standby::q35_names_a_full_disk") {
        a_full_disk_is_named_and_the_machine_goes_on(Hypervisor::Qemu).await;
    }
}

#[tokio::test]
async fn microvm_names_a_full_disk() {
    if inside_namespace("-m", "standby::microvm_names_a_full_disk") {
        a_full_disk_is_named_and_the_machine_goes_on(Hypervisor::QemuMicrovm).await;
    }
}
