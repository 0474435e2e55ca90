#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::Path,
    process::{Command, Stdio},
};

use super::*;

/// A mark that no other test and no other run uses.
fn mark(name: &str) -> String {
    format!("test-{}-{name}", std::process::id())
}

fn shell(dir: &Path, name: &str, script: &str) -> Detached {
    Detached {
        program: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        log: dir.join("log"),
        mark: mark(name),
    }
}

/// Runs the script to its end and gives what it wrote.
async fn output(dir: &Path, name: &str, script: &str) -> String {
    let handle = spawn_detached(&shell(dir, name, script)).unwrap();
    handle.exited().await.unwrap();
    fs::read_to_string(dir.join("log")).unwrap()
}

#[tokio::test]
async fn a_process_is_found_killed_reaped_and_then_gone() {
    let dir = tempfile::tempdir().unwrap();
    let what = shell(dir.path(), "life", "exec sleep 1000");
    let handle = spawn_detached(&what).unwrap();
    let id = handle.id().clone();
    assert_eq!(find_marked(&what.mark).unwrap(), std::slice::from_ref(&id));
    assert!(
        find_marked(&what.mark[..what.mark.len() - 1])
            .unwrap()
            .is_empty()
    );
    assert!(ProcessHandle::open(&id).unwrap().is_some());
    assert!(usage(&id).unwrap().unwrap().vms_bytes > 0);

    handle.kill().unwrap();
    // Both waiters, and one that is given up, must not disturb each other.
    let cancelled = handle.exited();
    drop(cancelled);
    let (a, b) = tokio::join!(handle.exited(), handle.exited());
    a.unwrap();
    b.unwrap();
    assert!(
        !Path::new(&format!("/proc/{}", id.pid)).exists(),
        "not reaped"
    );
    assert!(ProcessHandle::open(&id).unwrap().is_none());
    assert!(find_marked(&what.mark).unwrap().is_empty());
    assert_eq!(usage(&id).unwrap(), None);
    handle.kill().unwrap();
    handle.exited().await.unwrap();
}

#[tokio::test]
async fn a_zombie_counts_as_gone_and_open_reaps_it() {
    let dir = tempfile::tempdir().unwrap();
    let what = shell(dir.path(), "zombie", "exit 0");
    let handle = spawn_detached(&what).unwrap();
    let id = handle.id().clone();
    // Wait for its end without reaping it.
    let watch = watch(handle.pidfd.try_clone().unwrap()).unwrap();
    let _ready = watch.readable().await.unwrap();
    assert_eq!(Stat::read(id.pid).unwrap().unwrap().state, 'Z');
    assert!(find_marked(&what.mark).unwrap().is_empty());
    assert_eq!(usage(&id).unwrap(), None);
    assert!(ProcessHandle::open(&id).unwrap().is_none());
    assert_eq!(Stat::read(id.pid).unwrap(), None, "not reaped");
    handle.kill().unwrap();
    handle.exited().await.unwrap();
}

#[tokio::test]
async fn another_identity_with_the_same_pid_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let handle = spawn_detached(&shell(dir.path(), "other", "exec sleep 1000")).unwrap();
    let id = handle.id().clone();
    let later = ProcessId {
        start_ticks: id.start_ticks + 1,
        ..id.clone()
    };
    let boot = ProcessId {
        boot_id: "00000000-0000-0000-0000-000000000000".into(),
        ..id.clone()
    };
    for wrong in [later, boot] {
        assert!(ProcessHandle::open(&wrong).unwrap().is_none());
        assert_eq!(usage(&wrong).unwrap(), None);
    }
    for pid in [0, -1, i32::MAX, i32::MIN] {
        assert!(
            ProcessHandle::open(&ProcessId { pid, ..id.clone() })
                .unwrap()
                .is_none()
        );
    }
    handle.kill().unwrap();
    handle.exited().await.unwrap();
}

#[tokio::test]
async fn a_thread_is_not_a_process() {
    let (tell, told) = std::sync::mpsc::channel();
    let (_hold, held) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        tell.send(rustix::thread::gettid().as_raw_pid()).unwrap();
        let _ = held.recv();
    });
    let pid = told.recv().unwrap();
    let start_ticks = Stat::read(pid).unwrap().unwrap().start_ticks;
    let id = ProcessId {
        pid,
        start_ticks,
        boot_id: boot_id().unwrap(),
    };
    assert!(ProcessHandle::open(&id).unwrap().is_none());
}

#[tokio::test]
async fn a_process_of_another_parent_is_awaited_too() {
    let dir = tempfile::tempdir().unwrap();
    // The shell starts a grandchild and ends: the grandchild goes to init.
    let text = output(
        dir.path(),
        "orphan",
        "sleep 1000 </dev/null >/dev/null 2>&1 & echo $!",
    )
    .await;
    let pid: i32 = text.trim().parse().unwrap();
    let found = find_marked(&mark("orphan")).unwrap();
    assert_eq!(found.iter().map(|id| id.pid).collect::<Vec<_>>(), [pid]);
    let handle = ProcessHandle::open(&found[0]).unwrap().unwrap();
    handle.kill().unwrap();
    handle.exited().await.unwrap();
    assert!(ProcessHandle::open(&found[0]).unwrap().is_none());
}

#[tokio::test]
async fn the_child_inherits_nothing_but_the_log() {
    let dir = tempfile::tempdir().unwrap();
    // A descriptor without close-on-exec, as a careless library would leave one.
    // A number that nothing in the child would use by itself.
    let leak = fs::File::open("/dev/null").unwrap();
    let leak = rustix::io::fcntl_dupfd_cloexec(&leak, 500).unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let text = output(
        dir.path(),
        "inherit",
        "ls -l /proc/self/fd; echo env:; /usr/bin/env; echo umask: $(umask); echo cwd: $(pwd); \
         echo sid: $(cut -d' ' -f6 /proc/$$/stat) $$; grep -E '^Sig(Blk|Ign)' /proc/self/status",
    )
    .await;
    assert!(
        !text.contains(&format!(" {} -> ", leak.as_raw_fd())),
        "{text}"
    );
    assert!(text.contains("0 -> /dev/null") && text.contains("1 -> ") && text.contains("2 -> "));
    let env: Vec<&str> = text
        .lines()
        .skip_while(|line| *line != "env:")
        .skip(1)
        .take_while(|line| !line.starts_with("umask"))
        // The shell itself adds these two.
        .filter(|line| !line.starts_with("PWD=") && !line.starts_with("_="))
        .filter(|line| !line.starts_with("SHLVL=") && !line.starts_with("OLDPWD="))
        .collect();
    assert!(
        env.iter()
            .any(|line| *line == format!("DOZE_MARK={}", mark("inherit"))),
        "{text}"
    );
    assert!(
        env.len() == 2 && env.iter().any(|line| line.starts_with("PATH=")),
        "{text}"
    );
    assert!(
        text.contains("umask: 0077") && text.contains("cwd: /\n"),
        "{text}"
    );
    let sid = text
        .lines()
        .find_map(|line| line.strip_prefix("sid: "))
        .unwrap();
    let (session, pid) = sid.split_once(' ').unwrap();
    assert_eq!(session, pid, "not the leader of its session");
    assert!(text.contains("SigBlk:\t0000000000000000"), "{text}");
    // The test harness ignores SIGPIPE, so a child that inherits would show it.
    let ignored = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t"));
    let ignored = u64::from_str_radix(ignored.unwrap(), 16).unwrap();
    // Signals 32 and 33 belong to the C library.
    assert_eq!(ignored & !(0b11 << 31), 0, "{text}");
}

#[tokio::test]
async fn the_log_is_private_and_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    output(dir.path(), "log", "echo one").await;
    let text = output(dir.path(), "log", "echo two >&2").await;
    assert_eq!(text, "one\ntwo\n");
    let mode = fs::metadata(dir.path().join("log"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o600);
}

#[test]
fn what_cannot_start_says_why_and_leaves_no_child() {
    let dir = tempfile::tempdir().unwrap();
    let good = shell(dir.path(), "bad", "exit 0");
    let absent = Detached {
        program: "/nonexistent/qemu".into(),
        ..good.clone()
    };
    let error = spawn_detached(&absent).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");

    let not_executable = Detached {
        program: "/etc/passwd".into(),
        ..good.clone()
    };
    let error = spawn_detached(&not_executable).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);

    let no_log = Detached {
        log: dir.path().join("absent/log"),
        ..good.clone()
    };
    let error = spawn_detached(&no_log).unwrap_err();
    assert!(error.to_string().contains("absent/log"), "{error}");

    for wrong in [
        Detached {
            mark: String::new(),
            ..good.clone()
        },
        Detached {
            mark: "a\0b".into(),
            ..good.clone()
        },
        Detached {
            program: "bin/sh".into(),
            ..good.clone()
        },
        Detached {
            args: vec!["a\0b".into()],
            ..good.clone()
        },
    ] {
        let error = spawn_detached(&wrong).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
    }
    assert!(find_marked(&good.mark).unwrap().is_empty());
}

#[tokio::test]
async fn the_mark_must_match_exactly() {
    let mut child = Command::new("sleep")
        .arg("1000")
        .env("DOZE_MARK", mark("exact-and-more"))
        .env("XDOZE_MARK", mark("exact"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let found = find_marked(&mark("exact")).unwrap();
    let whole = find_marked(&mark("exact-and-more")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(found.is_empty());
    assert_eq!(whole.len(), 1);
}

#[test]
fn usage_is_in_bytes_and_time() {
    let pid = i32::try_from(std::process::id()).unwrap();
    let start_ticks = Stat::read(pid).unwrap().unwrap().start_ticks;
    let id = ProcessId {
        pid,
        start_ticks,
        boot_id: boot_id().unwrap(),
    };
    let before = usage(&id).unwrap().unwrap();
    let size: u64 = 64 << 20;
    let memory = vec![1u8; size as usize];
    let mut sum = 0u64;
    let after = loop {
        sum += memory.iter().map(|b| u64::from(*b)).sum::<u64>();
        let now = usage(&id).unwrap().unwrap();
        if now.cpu > before.cpu {
            break now;
        }
    };
    assert!(sum >= size);
    // The kernel batches these counters per CPU, so they are off by some pages.
    assert!(
        after.rss_bytes > size * 9 / 10 && after.rss_bytes < size * 10,
        "{after:?}"
    );
    assert!(
        after.vms_bytes >= size && after.cpu.as_secs() < 3600,
        "{after:?}"
    );
}

#[test]
fn identity_survives_the_store() {
    let id = ProcessId {
        pid: 7,
        start_ticks: 9,
        boot_id: "b".into(),
    };
    let text = serde_json::to_string(&id).unwrap();
    assert_eq!(serde_json::from_str::<ProcessId>(&text).unwrap(), id);
}
