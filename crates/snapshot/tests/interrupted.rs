//! Cancelled, killed, refused: all or nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use common::*;
use doze_snapshot::{
    Algorithm, Cancel, ChunkSize, Codec, CompressOptions, DecompressOptions, Error, Phase,
    Progress, compress_file, decompress_file, verify_file,
};

const CHILD: &str = "DOZE_SNAPSHOT_TEST_CHILD";

fn threads() -> usize {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .filter(|task| {
            let comm = task.as_ref().unwrap().path().join("comm");
            fs::read_to_string(comm).is_ok_and(|name| name.starts_with("snapshot-codec"))
        })
        .count()
}

/// In its own process, so that other tests' workers are not counted.
#[test]
fn cancelled_at_level_19_leaves_nothing_at_all() {
    if std::env::var_os(CHILD).is_none() {
        return run_child("cancelled_at_level_19_leaves_nothing_at_all");
    }
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("memory");
    fs::write(&raw, mixed(5, 6 << 20)).unwrap();
    let target = folder.path().join("packed");
    for background in [false, true] {
        let options = CompressOptions {
            background,
            chunk_size: ChunkSize::new(256 << 10).unwrap(),
            ..CompressOptions::new(Codec::new(Algorithm::Zstd, Some(19)).unwrap())
        };
        let cancel = Cancel::new();
        let (send, receive) = mpsc::channel();
        thread::scope(|scope| {
            let job = scope.spawn(|| {
                compress_file(&raw, &target, options, &cancel, &mut |_| {
                    let _the_test_listens_once = send.send(());
                })
            });
            // One chunk is done: all workers are inside another.
            receive.recv().unwrap();
            cancel.cancel();
            let outcome = job.join().unwrap();
            assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
            assert_eq!(threads(), 0, "a worker outlived the call");
        });
        assert_eq!(names(folder.path()), ["memory"]);
    }
}

#[test]
fn a_cancel_in_any_phase_leaves_nothing() {
    let made = artefact(Algorithm::Lz4);
    let target = made.folder.path().join("target");
    let mut outcomes = Vec::new();
    for phase in [Phase::Convert, Phase::Sync, Phase::Verify] {
        let cancel = Cancel::new();
        let mut at = |progress: Progress| {
            if progress.phase == phase {
                cancel.cancel();
            }
        };
        let options = options(Algorithm::Lz4, 0);
        outcomes.push(compress_file(&made.raw, &target, options, &cancel, &mut at).map(drop));
        let cancel = Cancel::new();
        let mut at = |progress: Progress| {
            if progress.phase == phase {
                cancel.cancel();
            }
        };
        let options = DecompressOptions::default();
        outcomes.push(decompress_file(&made.packed, &target, options, &cancel, &mut at).map(drop));
    }
    let cancel = Cancel::new();
    cancel.cancel();
    outcomes.push(
        verify_file(
            &made.packed,
            DecompressOptions::default(),
            &cancel,
            &mut |_| {},
        )
        .map(drop),
    );
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
    }
    assert_eq!(names(made.folder.path()), ["memory", "packed"]);
}

#[test]
fn an_existing_name_is_never_touched() {
    let made = artefact(Algorithm::Zstd);
    let before = fs::read(&made.packed).unwrap();
    let again = compress(&made.raw, &made.packed, options(Algorithm::Zstd, 3));
    assert!(matches!(again, Err(Error::Exists { .. })), "{again:?}");
    let over = decompress(&made.packed, &made.raw);
    assert!(matches!(over, Err(Error::Exists { .. })), "{over:?}");
    assert!(fs::read(&made.packed).unwrap() == before);

    // One that appears while the work goes on stays as well.
    let target = made.folder.path().join("target");
    let mut appear = |_: Progress| fs::write(&target, "theirs").unwrap();
    let late = compress_file(
        &made.raw,
        &target,
        options(Algorithm::Zstd, 1),
        &Cancel::new(),
        &mut appear,
    );
    assert!(matches!(late, Err(Error::Exists { .. })), "{late:?}");
    assert_eq!(fs::read(&target).unwrap(), b"theirs");
    assert_eq!(names(made.folder.path()), ["memory", "packed", "target"]);
}

#[test]
fn a_source_that_changes_is_refused() {
    let made = artefact(Algorithm::Lz4);
    let target = made.folder.path().join("target");
    let grow = |path: &Path| fs::OpenOptions::new().append(true).open(path).unwrap();
    let mut once = Some(());
    let mut change = |_: Progress| {
        if once.take().is_some() {
            std::io::Write::write_all(&mut grow(&made.raw), b"more").unwrap();
        }
    };
    let outcome = compress_file(
        &made.raw,
        &target,
        options(Algorithm::Lz4, 0),
        &Cancel::new(),
        &mut change,
    );
    assert!(
        matches!(outcome, Err(Error::SourceChanged { .. })),
        "{outcome:?}"
    );
    assert_eq!(names(made.folder.path()), ["memory", "packed"]);
}

/// Runs one test of this program again, marked as the child.
fn run_child(test: &str) {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
}

#[test]
fn kill_9_leaves_no_artefact() {
    if let Some(folder) = std::env::var_os(CHILD) {
        let folder = Path::new(&folder);
        let options = CompressOptions {
            chunk_size: ChunkSize::new(256 << 10).unwrap(),
            ..CompressOptions::new(Codec::new(Algorithm::Zstd, Some(19)).unwrap())
        };
        let mut say = |_: Progress| println!("a chunk is written");
        let outcome = compress_file(
            &folder.join("memory"),
            &folder.join("packed"),
            options,
            &Cancel::new(),
            &mut say,
        );
        panic!("the parent did not kill this process: {outcome:?}");
    }
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("memory");
    fs::write(&raw, mixed(5, 6 << 20)).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill_9_leaves_no_artefact", "--nocapture"])
        .env(CHILD, folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let written = lines
        .map(Result::unwrap)
        .any(|line| line.contains("a chunk is written"));
    assert!(written, "the child ended early");
    child.kill().unwrap();
    child.wait().unwrap();

    let left = names(folder.path());
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(
        doze_host::files::is_stage_name(left[0].as_ref()),
        "{left:?}"
    );
    assert_eq!(left[1], "memory");
    // And the next attempt is not held up by it.
    let target = folder.path().join("packed");
    compress(
        &raw,
        &target,
        CompressOptions::new(Codec::new(Algorithm::Zstd, None).unwrap()),
    )
    .unwrap();
    verify_file(
        &target,
        DecompressOptions::default(),
        &Cancel::new(),
        &mut |_| {},
    )
    .unwrap();
}
