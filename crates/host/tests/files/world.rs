//! A mount namespace of its own for each test, with an XFS in it.
use std::{path::Path, process::Command};

const INSIDE: &str = "DOZE_TEST_OUTER_MOUNTS";
/// What newer mkfs.xfs wants at least is 300 MiB.
const SIZE: u64 = 320 << 20;

/// Runs the body of the test `name` with the mount point of a new XFS, inside a new mount namespace, which
/// takes the mount along at its end: the test binary starts itself again under unshare(1).
pub fn inside(name: &str, body: impl FnOnce(&Path)) {
    let here = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    if let Some(outer) = std::env::var_os(INSIDE) {
        assert_ne!(outer, here, "still in the host's mount namespace");
        let dir = tempfile::tempdir().unwrap();
        let (image, mount_point) = (dir.path().join("image"), dir.path().join("xfs"));
        std::fs::File::create(&image)
            .unwrap()
            .set_len(SIZE)
            .unwrap();
        std::fs::create_dir(&mount_point).unwrap();
        run(Command::new("mkfs.xfs")
            .args(["-q", "-m", "reflink=1"])
            .arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mount_point));
        body(&mount_point);
        run(Command::new("umount").arg(&mount_point));
        return;
    }
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, here)
        .output()
        .expect("this test needs the program unshare (package util-linux)");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} inside a mount namespace of its own: {}; it needs root (CAP_SYS_ADMIN), loop devices \
         and mkfs.xfs (package xfsprogs), and is not skipped without\n{text}",
        output.status
    );
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?}: {} {complaint}",
        output.status
    );
}
