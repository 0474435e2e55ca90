#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    cell::Cell,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
};

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// Data at 1 and at 33 MiB, 3 MiB each, in a file that ends with a hole.
fn sparse(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(64 * MIB + 5).unwrap();
    file.write_all_at(&vec![0xa5; 3 << 20], MIB).unwrap();
    file.write_all_at(&vec![0x5a; 3 << 20], 33 * MIB).unwrap();
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_copy_has_content_size_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    sparse(&from);
    assert_eq!(bytes_to_copy(&from).unwrap(), 6 * MIB);
    let copied = copy_sparse(&from, &to, &never).unwrap();
    let wanted = Cloned {
        how: How::Copied,
        copied_bytes: 6 * MIB,
    };
    assert_eq!(copied, wanted);
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert_eq!(bytes_to_copy(&to).unwrap(), 6 * MIB);
    assert!(allocated(&to) < 7 * MIB, "{} bytes", allocated(&to));
    assert_eq!(
        fs::metadata(&to).unwrap().permissions().mode() & 0o777,
        0o600
    );
    sync(&to).unwrap();
}

#[test]
fn another_file_system_gets_a_sparse_copy() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir_in("/dev/shm").unwrap();
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    let (from, to) = (dir.path().join("from"), other.path().join("to"));
    assert_ne!(device(dir.path()), device(other.path()));
    sparse(&from);
    let copied = clone_file(&from, &to, &never).unwrap();
    assert_eq!((copied.how, copied.copied_bytes), (How::Copied, 6 * MIB));
    assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
    assert!(allocated(&to) < 7 * MIB, "{} bytes", allocated(&to));
}

#[test]
fn cancelled_at_any_look_it_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, vec![7; 3 * CHUNK as usize]).unwrap();
    let mut whole = 0;
    for allowed in 0.. {
        let looks = Cell::new(0);
        let cancelled = || looks.replace(looks.get() + 1) >= allowed;
        match copy_sparse(&from, &to, &cancelled) {
            Ok(_) => {
                whole = allowed;
                break;
            }
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::Interrupted),
        }
        assert!(!to.exists(), "after {allowed} looks");
    }
    assert_eq!(
        whole, 4,
        "before it begins, and before each of three chunks"
    );
}

#[test]
fn what_is_there_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    for copy in [clone_file, copy_sparse] {
        let error = copy(&from, &to, &never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&to).unwrap(), b"old");
        let error = copy(dir.path(), &dir.path().join("x"), &never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = copy(&dir.path().join("absent"), &to, &never).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn a_source_that_shrinks_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, vec![7; 3 * CHUNK as usize]).unwrap();
    let looks = Cell::new(0);
    let cut = || {
        if looks.replace(looks.get() + 1) == 2 {
            fs::OpenOptions::new()
                .write(true)
                .open(&from)
                .unwrap()
                .set_len(CHUNK + 10)
                .unwrap();
        }
        false
    };
    let error = copy_sparse(&from, &to, &cut).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
    assert!(!to.exists());
}

#[test]
fn an_empty_file_is_copied() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "").unwrap();
    assert_eq!(clone_file(&from, &to, &never).unwrap().copied_bytes, 0);
    assert_eq!(fs::metadata(&to).unwrap().len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any layout of data and holes, of any length, whoever copies the bytes.
    #[test]
    fn a_copy_is_equal_and_not_denser(
        runs in prop::collection::vec((0_u64..300_000, 0_usize..200_000, any::<u8>()), 0..12),
        tail in 0_u64..100_000,
        by_hand in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::options().read(true).write(true).create_new(true).open(&from).unwrap();
        let mut end = 0;
        for (gap, length, byte) in runs {
            source.write_all_at(&vec![byte; length], end + gap).unwrap();
            end += gap + length as u64;
        }
        source.set_len(end + tail).unwrap();
        let copied = if by_hand {
            let (guard, target) = create_guarded(&to).unwrap();
            let mut copy = Copy::new(&from, &to, &source, &target);
            copy.buffer = vec![0; BUFFER];
            let copied = copy.all(end + tail, &never).unwrap();
            guard.keep();
            copied
        } else {
            copy_sparse(&from, &to, &never).unwrap().copied_bytes
        };
        prop_assert_eq!(copied, bytes_to_copy(&from).unwrap());
        prop_assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        prop_assert!(bytes_to_copy(&to).unwrap() <= copied);
    }
}
