//! Boot files from a real distribution kernel: `make setup` fetches one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Instant,
};

use doze_vmm::boot::{BootError, KernelSource, prepare};
use sha2::{Digest, Sha256};

const INIT: &[u8] = b"\x7fELF an init";

fn source(init: &'static [u8]) -> KernelSource {
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.cache/kernel");
    let given = |variable: &str, default: &str| {
        let path = std::env::var_os(variable).map_or_else(|| fetched.join(default), PathBuf::from);
        assert!(
            path.exists(),
            "{} does not exist: run `make setup`, or set {variable}",
            path.display()
        );
        path
    };
    KernelSource {
        image: given("DOZE_TEST_KERNEL", "boot/vmlinuz"),
        modules: Some(given("DOZE_TEST_MODULES", "modules")),
        init,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn identity(path: &Path) -> (u64, i64, i64) {
    let meta = fs::metadata(path).unwrap();
    (meta.ino(), meta.ctime(), meta.ctime_nsec())
}

#[test]
fn a_distribution_kernel_becomes_content_addressed_boot_files() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("boot");
    let begun = Instant::now();
    let files = prepare(&source(INIT), &cache).unwrap();
    println!("made in {:?}", begun.elapsed());
    for path in [&files.kernel, &files.initramfs] {
        let content = fs::read(path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            name.ends_with(&hex::encode(Sha256::digest(&content))),
            "{name}"
        );
        assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o400);
    }
    let kernel = fs::read(&files.kernel).unwrap();
    assert!(kernel.starts_with(b"\x7fELF") && kernel.len() > 20 << 20);
    let archive = fs::read(&files.initramfs).unwrap();
    let position = |name: &str| {
        let needle = format!("-{name}.ko\0").into_bytes();
        archive
            .windows(needle.len())
            .position(|window| window == needle)
    };
    // Debian's cloud kernel has all of these as modules.
    for (first, then) in [
        ("virtio_ring", "virtio_mmio"),
        ("virtio", "virtio_mmio"),
        ("virtio", "virtio_pci"),
        ("virtio_pci_modern_dev", "virtio_pci"),
        ("net_failover", "virtio_net"),
        ("libcrc32c", "erofs"),
        ("vsock", "vmw_vsock_virtio_transport"),
    ] {
        assert!(
            position(first).is_some() && position(first) < position(then),
            "{first} before {then}"
        );
    }
    assert!(position("virtio-rng").is_some() && position("overlay").is_some());
    assert_eq!(
        names(&cache).len(),
        3,
        "two files and their index: {:?}",
        names(&cache)
    );
}

#[test]
fn the_second_call_finds_what_the_first_made_and_sees_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("boot");
    // A kernel of our own to touch; the modules stay out of it.
    let mut mine = source(INIT);
    let image = dir.path().join("vmlinuz");
    fs::copy(&mine.image, &image).unwrap();
    mine.image = image.clone();
    mine.modules = None;
    let files = prepare(&mine, &cache).unwrap();
    let made = identity(&files.kernel);
    let index = names(&cache)
        .into_iter()
        .find(|name| name.starts_with("index"))
        .unwrap();
    let indexed = identity(&cache.join(&index));

    let begun = Instant::now();
    assert_eq!(prepare(&mine, &cache).unwrap(), files);
    println!("found in {:?}", begun.elapsed());
    assert_eq!(
        identity(&cache.join(&index)),
        indexed,
        "the index was written again"
    );

    // A file cut short from outside is made again.
    fs::remove_file(&files.initramfs).unwrap();
    fs::write(&files.initramfs, "short").unwrap();
    assert_eq!(prepare(&mine, &cache).unwrap(), files);
    assert!(fs::metadata(&files.initramfs).unwrap().len() > 100);
    assert_eq!(
        identity(&files.kernel),
        made,
        "a whole file was written again"
    );

    // A broken index is no obstacle.
    fs::write(cache.join(&index), "{").unwrap();
    assert_eq!(prepare(&mine, &cache).unwrap(), files);

    // Another init makes another archive beside the old one, the kernel stays.
    let mut other = mine.clone();
    other.init = b"\x7fELF another init";
    let others = prepare(&other, &cache).unwrap();
    assert_eq!(others.kernel, files.kernel);
    assert_ne!(others.initramfs, files.initramfs);
    assert!(files.initramfs.exists());

    // A changed image is read again.
    fs::write(&image, "no kernel any more").unwrap();
    let e = prepare(&mine, &cache).unwrap_err();
    assert!(
        matches!(&e, BootError::Kernel { path, .. } if *path == image),
        "{e}"
    );
}

#[test]
fn many_at_once_agree() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("boot");
    let mut source = source(INIT);
    source.modules = None;
    let made: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| prepare(&source, &cache)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect()
    });
    assert!(made.iter().all(|files| *files == made[0]));
    assert_eq!(names(&cache).len(), 3, "{:?}", names(&cache));
}

#[test]
fn a_missing_kernel_or_tree_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut absent = source(INIT);
    absent.image = "/nonexistent/vmlinuz".into();
    let e = prepare(&absent, dir.path().join("a").as_path()).unwrap_err();
    assert!(
        e.to_string().contains("/nonexistent/vmlinuz") && e.to_string().contains("[kernel] image"),
        "{e}"
    );
    let mut absent = source(INIT);
    absent.modules = Some(dir.path().join("nothing"));
    let e = prepare(&absent, dir.path().join("b").as_path()).unwrap_err();
    assert!(
        matches!(e, BootError::Modules { .. }) && e.to_string().contains("modules.builtin"),
        "{e}"
    );
    assert_eq!(names(&dir.path().join("b")), [""; 0]);
}
