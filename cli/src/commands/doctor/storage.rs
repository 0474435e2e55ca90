//! The server's folder: whose it is, how much room it has, what its file system can do.
use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use super::{Finding, Subject};
use crate::output;

/// Below this not even one image and its instance fit.
const TOO_LITTLE: u64 = 1 << 30;
/// Below this it fills up soon.
const LITTLE: u64 = 10 << 30;

pub fn check(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![folder(&subject.data_dir)];
    if let Some(existing) = subject.data_dir.ancestors().find(|path| path.is_dir()) {
        findings.push(space(existing));
        findings.push(reflink(existing));
    }
    findings
}

fn folder(path: &Path) -> Finding {
    const CHECK: &str = "data_dir";
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Finding::ok(
                CHECK,
                format!("{} will be made by the first `doze serve`", path.display()),
            );
        }
        Err(error) => {
            return Finding::fail(
                CHECK,
                format!("{}: {error}", path.display()),
                "run this as the server's user",
            );
        }
    };
    let mode = meta.permissions().mode() & 0o777;
    let user = rustix::process::geteuid().as_raw();
    if !meta.is_dir() {
        Finding::fail(
            CHECK,
            format!("{} is not a folder", path.display()),
            "set data_dir to a folder of its own",
        )
    } else if mode & 0o077 != 0 {
        Finding::fail(
            CHECK,
            format!(
                "{} has mode {mode:04o}: others can look into guests' memory and disks",
                path.display()
            ),
            format!("chmod 0700 {}", path.display()),
        )
    } else if meta.uid() != user {
        Finding::warn(
            CHECK,
            format!(
                "{} belongs to user {}, and this runs as {user}",
                path.display(),
                meta.uid()
            ),
            "run this as the server's user",
        )
    } else {
        Finding::ok(CHECK, format!("{} (mode {mode:04o})", path.display()))
    }
}

fn space(path: &Path) -> Finding {
    const CHECK: &str = "disk";
    match doze_host::files::free_space(path) {
        Ok(free) => {
            let found = format!("{} free at {}", output::bytes(free), path.display());
            let mend = "make room, or set data_dir to a larger disk";
            match free {
                ..TOO_LITTLE => Finding::fail(CHECK, found, mend),
                TOO_LITTLE..LITTLE => Finding::warn(CHECK, found, mend),
                LITTLE.. => Finding::ok(CHECK, found),
            }
        }
        Err(error) => Finding::warn(
            CHECK,
            format!("{}: {error}", path.display()),
            "run this as the server's user",
        ),
    }
}

fn reflink(path: &Path) -> Finding {
    const CHECK: &str = "reflink";
    match doze_host::files::supports_reflink(path) {
        Ok(true) => Finding::ok(CHECK, "files can be cloned without copying"),
        Ok(false) => Finding::warn(
            CHECK,
            format!(
                "the file system of {} cannot clone files; copies take time and room",
                path.display()
            ),
            "put data_dir on XFS (mkfs.xfs -m reflink=1) or Btrfs",
        ),
        Err(error) => Finding::warn(
            CHECK,
            format!("not tried: {error}"),
            "run this as the server's user",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::{super::Level, *};

    #[test]
    fn a_folder_others_can_read_is_to_mend() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let finding = folder(dir.path());
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.mend.unwrap().starts_with("chmod 0700 "));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(folder(dir.path()).level, Level::Ok);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_fine_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(folder(&dir.path().join("new")).level, Level::Ok);
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(folder(&file).level, Level::Fail);
    }

    #[test]
    fn room_is_measured_where_the_folder_will_be() {
        let dir = tempfile::tempdir().unwrap();
        let subject = Subject {
            data_dir: dir.path().join("a/b/c"),
            qemu: None,
            kernel: "/k".into(),
            modules: None,
            network: false,
        };
        let checks: Vec<_> = check(&subject)
            .into_iter()
            .map(|finding| finding.check)
            .collect();
        assert_eq!(checks, ["data_dir", "disk", "reflink"]);
    }
}
