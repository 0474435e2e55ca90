#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::io::Write;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// An ELF64 file with the sections `.modinfo` and `.shstrtab`.
fn module(info: &[&str]) -> Vec<u8> {
    let info = info.join("\0") + "\0";
    let names = b"\0.modinfo.old\0.modinfo\0.shstrtab\0";
    let mut file = vec![0_u8; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file.extend(info.as_bytes());
    file.extend(names);
    let table = file.len() as u64;
    // A section whose name begins alike, the one wanted, and the names.
    let sections = [
        (1_u32, 64, 0),
        (14, 64, info.len()),
        (23, 64 + info.len(), names.len()),
    ];
    for (name, offset, length) in sections {
        let mut header = [0_u8; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(length as u64).to_le_bytes());
        file.extend(header);
    }
    file[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    file[0x3a] = 64;
    file[0x3c] = 3;
    file[0x3e] = 2;
    file
}

/// A tree in which all that is wanted is built in, but for what a case puts there.
fn tree(but: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
    let builtin: String = WANTED
        .iter()
        .filter(|(name, _)| !but.contains(name))
        .map(|(name, _)| format!("kernel/x/{}.ko\n", name.replace('_', "-")))
        .collect();
    fs::write(dir.path().join("modules.builtin"), builtin).unwrap();
    dir
}

fn put(dir: &TempDir, path: &str, content: &[u8]) {
    let path = dir.path().join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn names(dir: &TempDir) -> Vec<String> {
    let modules = resolve(dir.path(), Some("6.1.0")).unwrap();
    modules.into_iter().map(|module| module.name).collect()
}

fn reason(dir: &TempDir) -> String {
    resolve(dir.path(), Some("6.1.0")).unwrap_err().to_string()
}

#[test]
fn dependencies_come_first_and_once_whatever_the_spelling() {
    let dir = tree(&["virtio_blk", "erofs", "virtio_rng"]);
    put(
        &dir,
        "kernel/drivers/virtio-rng.ko",
        &module(&["depends=virtio_ring,virtio"]),
    );
    put(
        &dir,
        "kernel/drivers/virtio_blk.ko",
        &module(&["depends=virtio,virtio_ring", "vermagic=6.1.0 SMP"]),
    );
    put(
        &dir,
        "kernel/drivers/virtio.ko",
        &module(&["depends=virtio-ring", "vermagic=6.1.0 SMP"]),
    );
    put(
        &dir,
        "kernel/drivers/virtio_ring.ko",
        &module(&["depends=", "vermagic=6.1.0 SMP"]),
    );
    put(&dir, "kernel/fs/erofs.ko", &module(&["depends=libcrc32c"]));
    put(
        &dir,
        "kernel/lib/libcrc32c.ko",
        &module(&["softdep=pre: crc32c-intel crc32c post: virtio_net"]),
    );
    put(&dir, "kernel/crypto/crc32c-intel.ko", &module(&[]));
    assert_eq!(
        names(&dir),
        [
            "virtio_ring",
            "virtio",
            "virtio_blk",
            "crc32c-intel",
            "libcrc32c",
            "erofs",
            "virtio-rng"
        ]
    );
}

#[test]
fn compressed_modules_are_unpacked_and_updates_go_first() {
    let dir = tree(&["overlay", "ext4"]);
    let content = module(&["depends="]);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&content).unwrap();
    put(&dir, "kernel/fs/overlay.ko.gz", &gz.finish().unwrap());
    put(&dir, "kernel/fs/ext4.ko.xz", b"\xfd7zXZ\0");
    put(
        &dir,
        "updates/ext4.ko.zst",
        &zstd::encode_all(&content[..], 3).unwrap(),
    );
    let modules = resolve(dir.path(), None).unwrap();
    assert_eq!(names(&dir), ["overlay", "ext4"]);
    assert!(modules.iter().all(|module| module.content == content));
    fs::remove_dir_all(dir.path().join("updates")).unwrap();
    assert!(
        reason(&dir).contains("compressed with xz"),
        "{}",
        reason(&dir)
    );
}

#[test]
fn a_kernel_that_cannot_work_is_refused_and_an_optional_module_may_lack() {
    assert_eq!(
        names(&tree(&["virtio_rng", "virtio_balloon", "vsock"])),
        [""; 0]
    );

    let dir = tree(&["erofs"]);
    assert!(reason(&dir).contains("module erofs is neither there nor built in"));
    put(&dir, "kernel/erofs.ko", &module(&["depends=lost"]));
    assert!(
        reason(&dir).contains("module lost, needed by erofs"),
        "{}",
        reason(&dir)
    );
    put(&dir, "kernel/lost.ko", &module(&["depends=erofs"]));
    assert!(
        reason(&dir).contains("depend on each other"),
        "{}",
        reason(&dir)
    );
    put(&dir, "kernel/erofs.ko", &module(&["vermagic=5.10.0-x SMP"]));
    assert!(
        reason(&dir).contains("are for Linux 5.10.0-x, the kernel image is 6.1.0"),
        "{}",
        reason(&dir)
    );
    put(&dir, "kernel/erofs.ko", b"text");
    assert!(reason(&dir).contains("not a 64-bit kernel module"));

    fs::remove_file(dir.path().join("modules.builtin")).unwrap();
    assert!(reason(&dir).contains("no modules.builtin"));
}

proptest! {
    #[test]
    fn a_broken_file_does_not_panic(at in 0_usize..400, byte: u8, cut in 0_usize..400) {
        let mut file = module(&["depends=a,b", "softdep=pre: c"]);
        let at = at % file.len();
        file[at] = byte;
        let _ = info(&file[..cut.min(file.len())], "depends").count();
        let _ = info(&file, "depends").count();
    }
}
