//! A machine that is loaded twice: whether its two guests can tell that they are two.
use std::{fs, path::Path};

use doze_vmm::{Hypervisor, MachineStatus, new_generation};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fixture::{Bench, PATIENCE, tcg};

/// The UUID's sixteen bytes as ACPI has them: the first three groups little-endian.
fn bytes_of(generation: &str) -> Vec<u8> {
    let mut bytes = hex::decode(generation.replace('-', "")).unwrap();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// Whether the guest's memory holds it. Aligned as the table says (Virtual Machine Generation ID, Microsoft).
fn is_in_memory(memory: &Path, generation: &str) -> bool {
    let wanted = bytes_of(generation);
    let memory = fs::read(memory).unwrap();
    memory
        .chunks_exact(8)
        .zip(memory[8..].chunks_exact(8))
        .any(|(a, b)| a == &wanted[..8] && b == &wanted[8..])
}

/// Loads what was saved as another generation, and gives the first random UUID that its guest reads.
async fn first_uuid(bench: &Bench, saved: &Path) -> String {
    let (machine, mut channel) = bench.load(saved).await;
    // The first thing it finds when it runs.
    channel.write_all(b"u").await.unwrap();
    machine.resume().await.unwrap();
    let mut uuid = [0; 36];
    let read = tokio::time::timeout(PATIENCE, channel.read_exact(&mut uuid));
    read.await.unwrap().unwrap();
    machine.pause().await.unwrap();
    machine.kill().await.unwrap();
    String::from_utf8(uuid.to_vec()).unwrap()
}

/// The guest's memory is put back in between, as clones of it would be.
async fn two_of_one(kind: Hypervisor) -> (Bench, [String; 2]) {
    let mut bench = Bench::new(kind, tcg()).await;
    let first = new_generation().unwrap();
    bench.machine.generation = Some(first.clone());
    let machine = bench.boot().await;
    machine.pause().await.unwrap();
    assert_eq!(machine.status().await.unwrap(), MachineStatus::Paused);
    let saved = bench.new_folder("saved");
    machine.save(&saved).await.unwrap();
    machine.kill().await.unwrap();
    let (memory, kept) = (
        bench.machine.memory.path.clone(),
        bench.folder.path().join("kept"),
    );
    assert_eq!(is_in_memory(&memory, &first), kind == Hypervisor::Qemu);
    fs::copy(&memory, &kept).unwrap();
    let mut uuids = Vec::new();
    for _ in 0..2 {
        fs::copy(&kept, &memory).unwrap();
        bench.machine.renew_generation().unwrap();
        uuids.push(first_uuid(&bench, &saved).await);
        let now = bench.machine.generation.clone().unwrap();
        assert_eq!(is_in_memory(&memory, &now), kind == Hypervisor::Qemu);
        assert!(!is_in_memory(&memory, &first) || kind != Hypervisor::Qemu);
    }
    let uuids = uuids.try_into().unwrap();
    println!("{kind:?}: {uuids:?}");
    (bench, uuids)
}

/// What the guest makes of it depends on its kernel: Debian's cloud kernel 6.1 is built without the driver, its
/// general one has it.
#[tokio::test]
async fn q35_tells_its_guest_that_it_is_another_one() {
    let (bench, uuids) = two_of_one(Hypervisor::Qemu).await;
    if bench.log().contains("test: generation driver=1") {
        assert_ne!(uuids[0], uuids[1], "the kernel did not reseed");
    }
}

/// If this fails, the microvm has learnt to tell its guest: give it the device.
#[tokio::test]
async fn microvm_cannot_tell_its_guest() {
    let (bench, _) = two_of_one(Hypervisor::QemuMicrovm).await;
    assert!(bench.log().contains("test: generation driver="));
}
