//! What is shared, and for how long.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use doze_host::{
    clone::{How, clone_file, copy_sparse, never},
    files::{allocated_bytes, supports_reflink},
    usage::DiskUsage,
};

use crate::world::inside;

const MIB: u64 = 1 << 20;

/// 8 MiB of data, synced, with a hole of 24 MiB in the middle.
fn file(path: &Path) -> File {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    file.set_len(32 * MIB).unwrap();
    file.write_all_at(&vec![1; 4 << 20], 0).unwrap();
    file.write_all_at(&vec![2; 4 << 20], 28 * MIB).unwrap();
    file.sync_all().unwrap();
    file
}

fn usage(paths: &[&Path]) -> u64 {
    let mut usage = DiskUsage::new();
    for path in paths {
        usage.add(path).unwrap();
    }
    usage.bytes()
}

#[test]
fn clones_share_their_blocks_and_count_once() {
    inside("reflink::clones_share_their_blocks_and_count_once", |xfs| {
        assert!(supports_reflink(xfs).unwrap());
        let (from, one, two) = (xfs.join("from"), xfs.join("one"), xfs.join("two"));
        file(&from);
        let alone = usage(&[&from]);
        assert_eq!(alone, allocated_bytes(&from).unwrap());
        for to in [&one, &two] {
            let cloned = clone_file(&from, to, &never).unwrap();
            assert_eq!((cloned.how, cloned.copied_bytes), (How::Reflink, 0));
            assert!(fs::read(to).unwrap() == fs::read(&from).unwrap());
        }
        assert_eq!(usage(&[&from, &one, &two]), alone);
        // Each by itself keeps them, whether or not the others are added.
        assert_eq!(usage(&[&two]), alone);

        // What is written is no longer shared, and the rest still is.
        let clone = OpenOptions::new().write(true).open(&one).unwrap();
        clone.write_all_at(&vec![3; 1 << 20], MIB).unwrap();
        clone.sync_all().unwrap();
        let all = usage(&[&from, &one, &two]);
        assert_eq!(all - alone, MIB);
        let mut sum = DiskUsage::new();
        assert_eq!(sum.add(&from).unwrap(), alone);
        assert_eq!(sum.add(&one).unwrap(), MIB);
        assert_eq!(sum.add(&two).unwrap(), 0);
        // By stat's account it would be more than thrice as much.
        let by_stat = [&from, &one, &two].map(|path| allocated_bytes(path).unwrap());
        assert!(by_stat.iter().sum::<u64>() >= 3 * alone);

        fs::remove_file(&from).unwrap();
        assert_eq!(usage(&[&one, &two]), all);
        fs::remove_file(&two).unwrap();
        assert_eq!(usage(&[&one]), alone);
    });
}

#[test]
fn many_extents_are_all_looked_at() {
    inside("reflink::many_extents_are_all_looked_at", |xfs| {
        let (from, to) = (xfs.join("from"), xfs.join("to"));
        let source = File::create(&from).unwrap();
        source.set_len(1000 * 8192).unwrap();
        for n in 0..1000 {
            source.write_all_at(&[9; 4096], n * 8192).unwrap();
        }
        source.sync_all().unwrap();
        clone_file(&from, &to, &never).unwrap();
        let (data, each) = (1000 * 4096, usage(&[&to]));
        let both = usage(&[&from, &to]);
        // Beyond the data there are the blocks that list the extents, one list per file.
        assert!(
            each >= data && both >= data && both < data + data / 10,
            "{each}, {both}"
        );
    });
}

#[test]
fn a_full_disk_leaves_no_half_copy() {
    inside("reflink::a_full_disk_leaves_no_half_copy", |xfs| {
        let outside = tempfile::tempdir().unwrap();
        let from = outside.path().join("from");
        let mut source = File::create(&from).unwrap();
        let noise: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8 + 1).collect();
        for _ in 0..340 {
            io::Write::write_all(&mut source, &noise).unwrap();
        }
        let to = xfs.join("to");
        for copy in [clone_file, copy_sparse] {
            let error = copy(&from, &to, &never).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{error}");
            assert!(!to.exists());
        }
    });
}
