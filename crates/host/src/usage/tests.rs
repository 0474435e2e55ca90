#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{fs, os::unix::fs::FileExt};

use proptest::prelude::*;

use super::*;

#[test]
fn structures_are_as_large_as_the_kernels() {
    assert_eq!(size_of::<Header>(), 32);
    assert_eq!(size_of::<Extent>(), 56);
    // _IOWR('f', 11, struct fiemap) on x86-64 and arm64.
    assert_eq!(FS_IOC_FIEMAP, 0xc020_660b);
}

#[test]
fn a_folder_counts_what_stat_says_and_everything_once() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    let file = File::create(inner.join("sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    file.write_all_at(&vec![1; 2 << 20], 512 << 20).unwrap();
    file.sync_all().unwrap();
    fs::hard_link(inner.join("sparse"), dir.path().join("again")).unwrap();
    std::os::unix::fs::symlink("/", dir.path().join("everything")).unwrap();

    let mut usage = DiskUsage::new();
    let first = usage.add(&inner).unwrap();
    assert_eq!(first, crate::files::allocated_bytes(&inner).unwrap());
    assert!((2 << 20..3 << 20).contains(&first), "{first}");
    let rest = usage.add(dir.path()).unwrap();
    assert!(rest < 64 << 10, "{rest}");
    assert_eq!(usage.bytes(), first + rest);
    assert_eq!(usage.add(&inner.join("sparse")).unwrap(), 0);
    let absent = usage.add(&dir.path().join("absent")).unwrap_err();
    assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    assert_eq!(usage.bytes(), first + rest);
}

proptest! {
    #[test]
    fn intervals_are_a_union(ranges in prop::collection::vec((0_usize..120, 0_usize..30), 0..40)) {
        let mut intervals = Intervals::default();
        let mut bits = [false; 150];
        for (from, length) in ranges {
            let range = &mut bits[from..from + length];
            let new = range.iter().filter(|bit| !**bit).count();
            range.fill(true);
            prop_assert_eq!(intervals.add(from as u64, length as u64), new as u64);
        }
        let total: u64 = intervals.0.iter().map(|(begin, end)| end - begin).sum();
        prop_assert_eq!(total, bits.iter().filter(|bit| **bit).count() as u64);
        let ends: Vec<_> = intervals.0.values().collect();
        prop_assert!(intervals.0.keys().skip(1).zip(ends).all(|(next, end)| end < next));
    }
}
