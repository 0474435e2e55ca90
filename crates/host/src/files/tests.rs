#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn atomic_write_replaces_content_and_mode_and_leaves_no_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    write_atomic(&path, b"one", 0o600).unwrap();
    write_atomic(&path, b"two", 0o666).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"two");
    assert_eq!(mode(&path), 0o666, "the umask must not apply");
    assert_eq!(names(dir.path()), ["record"]);
}

#[test]
fn atomic_write_replaces_a_link_not_its_target() {
    let dir = tempfile::tempdir().unwrap();
    let (target, link) = (dir.path().join("target"), dir.path().join("link"));
    fs::write(&target, "untouched").unwrap();
    symlink(&target, &link).unwrap();
    write_atomic(&link, b"new", 0o600).unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"untouched");
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

#[test]
fn failed_atomic_write_keeps_the_old_and_leaves_no_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folder");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("inside"), "old").unwrap();
    let error = write_atomic(&path, b"new", 0o600).unwrap_err();
    assert!(error.to_string().contains("folder"), "{error}");
    assert_eq!(names(dir.path()), ["folder"]);
    assert_eq!(fs::read(path.join("inside")).unwrap(), b"old");

    let error = write_atomic(&dir.path().join("absent/x"), b"", 0o600).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
}

#[test]
fn longest_name_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n".repeat(255));
    write_atomic(&path, b"x", 0o600).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"x");
}

#[test]
fn concurrent_writers_never_mix() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    write_atomic(&path, &[b'a'; 4096], 0o600).unwrap();
    std::thread::scope(|scope| {
        for letter in [b'a', b'b', b'c'] {
            let path = &path;
            scope.spawn(move || {
                for _ in 0..10 {
                    write_atomic(path, &[letter; 4096], 0o600).unwrap();
                    let seen = fs::read(path).unwrap();
                    assert!(seen.len() == 4096 && seen.iter().all(|b| *b == seen[0]));
                }
            });
        }
    });
    assert_eq!(names(dir.path()), ["record"]);
}

#[test]
fn stage_names_are_recognised() {
    let dir = tempfile::tempdir().unwrap();
    let (stage, _file) = Stage::create(dir.path(), OsStr::new("record")).unwrap();
    assert!(is_stage_name(stage.path.file_name().unwrap()));
    assert!(!is_stage_name(OsStr::new("record")));
    assert!(!is_stage_name(OsStr::new("x.stage")));
}

#[test]
fn private_dir_makes_parents_and_accepts_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/c");
    create_private_dir(&path).unwrap();
    create_private_dir(&path).unwrap();
    for folder in ["a", "a/b", "a/b/c"] {
        assert_eq!(mode(&dir.path().join(folder)), 0o700);
    }
}

#[test]
fn private_dir_refuses_what_is_not_private() {
    let dir = tempfile::tempdir().unwrap();
    let open = dir.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o750)).unwrap();
    let error = create_private_dir(&open).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("0750") && error.to_string().contains("chmod"));

    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(
        create_private_dir(&file).unwrap_err().kind(),
        io::ErrorKind::NotADirectory
    );
    assert!(create_private_dir(&file.join("below")).is_err());
    create_private_dir(Path::new("/")).unwrap_err();
}

#[test]
fn sparse_file_has_size_but_no_blocks_and_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    create_sparse(&path, 1 << 30).unwrap();
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (1 << 30, 0));
    assert_eq!(mode(&path), 0o600);
    fs::write(&path, "data").unwrap();
    let error = create_sparse(&path, 1).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn impossible_size_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let error = create_sparse(&dir.path().join("disk"), u64::MAX).unwrap_err();
    assert!(
        error.to_string().contains("18446744073709551615"),
        "{error}"
    );
    assert!(names(dir.path()).is_empty());
}

#[test]
fn remove_tree_stays_inside_and_accepts_absence() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("kept"), "").unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("x/y")).unwrap();
    fs::write(tree.join("x/y/file"), "").unwrap();
    symlink(&outside, tree.join("x/link")).unwrap();
    remove_tree(&tree).unwrap();
    remove_tree(&tree).unwrap();
    remove_tree(&tree.join("x/y")).unwrap();

    let link = dir.path().join("link");
    symlink(&outside, &link).unwrap();
    remove_tree(&link).unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    remove_tree(&file).unwrap();
    assert_eq!(names(dir.path()), ["outside"]);
    assert_eq!(names(&outside), ["kept"]);
}

#[test]
fn remove_tree_refuses_paths_that_cannot_be_ours() {
    for path in ["/", "..", "", "/tmp/.."] {
        let error = remove_tree(Path::new(path)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
    }
}

#[test]
fn reflink_answer_agrees_with_cp_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let answer = supports_reflink(dir.path()).unwrap();
    assert!(names(dir.path()).is_empty());
    fs::write(dir.path().join("a"), [1; 4096]).unwrap();
    let cp = std::process::Command::new("cp")
        .args(["--reflink=always", "a", "b"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(answer, cp.status.success());
    assert!(supports_reflink(&dir.path().join("absent")).is_err());
}

#[test]
fn free_space_is_what_df_says() {
    let dir = tempfile::tempdir().unwrap();
    let ours = free_space(dir.path()).unwrap();
    let df = std::process::Command::new("df")
        .args(["--output=avail", "-B1"])
        .arg(dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8(df.stdout).unwrap();
    let theirs: u64 = text.lines().nth(1).unwrap().trim().parse().unwrap();
    // Others write meanwhile; the unit must agree.
    assert!(ours.abs_diff(theirs) < theirs / 2 + 1, "{ours} {theirs}");
    assert!(free_space(&dir.path().join("absent")).is_err());
}

#[test]
fn allocation_counts_blocks_once_and_follows_no_link() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    let empty = allocated_bytes(&tree).unwrap();
    create_sparse(&tree.join("sparse"), 1 << 30).unwrap();
    let outside = dir.path().join("outside");
    fs::write(&outside, vec![1; 1 << 20]).unwrap();
    symlink(&outside, tree.join("link")).unwrap();
    let sparse = allocated_bytes(&tree).unwrap();
    assert!(sparse < empty + (1 << 16), "{sparse}");

    let file = File::create(tree.join("sub/data")).unwrap();
    (&file).write_all(&vec![1; 1 << 20]).unwrap();
    file.sync_all().unwrap();
    fs::hard_link(tree.join("sub/data"), tree.join("again")).unwrap();
    let full = allocated_bytes(&tree).unwrap();
    assert!(
        (1 << 20..(1 << 20) + (1 << 16)).contains(&(full - sparse)),
        "{full}"
    );
    assert!(allocated_bytes(&dir.path().join("absent")).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn what_is_written_is_read_back(
        first in proptest::collection::vec(any::<u8>(), 0..20_000),
        second in proptest::collection::vec(any::<u8>(), 0..20_000),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        write_atomic(&path, &first, 0o600).unwrap();
        write_atomic(&path, &second, 0o640).unwrap();
        prop_assert_eq!(fs::read(&path).unwrap(), second);
        prop_assert_eq!(mode(&path), 0o640);
    }
}
