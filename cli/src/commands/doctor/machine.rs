//! Processor, machine monitor, the programs that make disks, and what guests boot.
use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
};

use super::{Finding, Subject, find, probe};

/// Offset and value of the boot protocol's signature in a bzImage
/// (Linux, Documentation/arch/x86/boot.rst).
const HEADER_OFFSET: u64 = 0x202;
const HEADER_MAGIC: &[u8; 4] = b"HdrS";
const ELF_MAGIC: &[u8; 4] = b"\x7fELF";

pub fn check(subject: &Subject) -> Vec<Finding> {
    let mut findings = vec![virtualisation(), qemu(subject.qemu.as_deref())];
    findings.extend(
        [("mkfs.erofs", "erofs-utils"), ("mke2fs", "e2fsprogs")]
            .map(|(name, package)| program(name, package)),
    );
    findings.push(kernel(&subject.kernel));
    if let Some(modules) = &subject.modules {
        findings.push(module_tree(modules));
    }
    findings
}

fn virtualisation() -> Finding {
    match doze_host::virt::kvm_usable() {
        Ok(()) => Finding::ok("virtualisation", "KVM is usable"),
        Err(reason) => Finding::warn(
            "virtualisation",
            "no usable KVM: guests run under TCG, several times slower",
            reason,
        ),
    }
}

fn qemu(configured: Option<&Path>) -> Finding {
    const CHECK: &str = "qemu";
    const PROGRAM: &str = "qemu-system-x86_64";
    let path = match configured {
        Some(path) => path.to_path_buf(),
        None => match find(PROGRAM) {
            Some(path) => path,
            None => {
                return Finding::fail(
                    CHECK,
                    format!("{PROGRAM} is not in PATH"),
                    "apt-get install qemu-system-x86",
                );
            }
        },
    };
    let program = path.to_string_lossy();
    let mend = "apt-get install qemu-system-x86, or set hypervisor.qemu_path";
    let (version, boards) = match (
        probe(&program, &["--version"]),
        probe(&program, &["-machine", "help"]),
    ) {
        (Ok(version), Ok(boards)) => (version, boards),
        (Err(reason), _) | (_, Err(reason)) => return Finding::fail(CHECK, reason, mend),
    };
    let version = version.lines().next().unwrap_or_default().to_owned();
    let has = |board: &str| {
        boards
            .lines()
            .any(|line| line.split_whitespace().next() == Some(board))
    };
    let missing: Vec<_> = ["q35", "microvm"]
        .into_iter()
        .filter(|board| !has(board))
        .collect();
    if missing.is_empty() {
        Finding::ok(CHECK, version)
    } else {
        Finding::fail(
            CHECK,
            format!("{version} lacks the machine type {}", missing.join(" and ")),
            mend,
        )
    }
}

fn program(name: &'static str, package: &str) -> Finding {
    match find(name) {
        Some(path) => Finding::ok(name, path.display().to_string()),
        None => Finding::fail(
            name,
            format!("{name} is not in PATH"),
            format!("apt-get install {package}"),
        ),
    }
}

fn kernel(path: &Path) -> Finding {
    const CHECK: &str = "kernel";
    let mend = "set kernel.image to a bzImage or vmlinux, for example of Debian's linux-image-cloud-amd64 (`make setup` fetches one into .cache/kernel)";
    match is_kernel(path) {
        Ok(true) => Finding::ok(CHECK, path.display().to_string()),
        Ok(false) => Finding::fail(
            CHECK,
            format!("{} is neither a bzImage nor an ELF file", path.display()),
            mend,
        ),
        Err(error) => Finding::fail(CHECK, format!("{}: {error}", path.display()), mend),
    }
}

fn is_kernel(path: &Path) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let mut word = [0; 4];
    file.read_exact(&mut word)?;
    if &word == ELF_MAGIC {
        return Ok(true);
    }
    file.seek(SeekFrom::Start(HEADER_OFFSET))?;
    file.read_exact(&mut word)?;
    Ok(&word == HEADER_MAGIC)
}

fn module_tree(path: &Path) -> Finding {
    const CHECK: &str = "modules";
    if path.join("kernel/drivers").is_dir() {
        Finding::ok(CHECK, path.display().to_string())
    } else {
        Finding::fail(
            CHECK,
            format!(
                "{} is not a kernel's module tree (it has no kernel/drivers)",
                path.display()
            ),
            "set kernel.modules to lib/modules/VERSION of that very kernel, or to \"none\" when all it needs is built in",
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::{super::Level, *};

    #[test]
    fn kernels_are_told_from_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("k");
        let mut image = vec![0; 0x300];
        std::fs::write(&file, &image).unwrap();
        assert_eq!(kernel(&file).level, Level::Fail);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(&file, &image).unwrap();
        assert_eq!(kernel(&file).level, Level::Ok);
        std::fs::write(&file, b"\x7fELF rest").unwrap();
        assert_eq!(kernel(&file).level, Level::Ok);
        std::fs::write(&file, b"MZ").unwrap();
        assert_eq!(kernel(&file).level, Level::Fail);
        assert_eq!(kernel(&dir.path().join("none")).level, Level::Fail);
    }

    #[test]
    fn a_module_tree_has_drivers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(module_tree(dir.path()).level, Level::Fail);
        std::fs::create_dir_all(dir.path().join("kernel/drivers")).unwrap();
        assert_eq!(module_tree(dir.path()).level, Level::Ok);
    }

    #[test]
    fn a_qemu_that_is_not_there_is_to_mend() {
        let finding = qemu(Some(Path::new("/nonexistent/qemu")));
        assert_eq!(finding.level, Level::Fail);
        assert!(finding.mend.unwrap().contains("qemu_path"));
    }

    #[test]
    fn a_qemu_without_the_boards_is_to_mend() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let fake = dir.path().join("qemu");
        std::fs::write(
            &fake,
            "#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU 1' || echo 'q35  Standard'\n",
        )
        .unwrap();
        std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
        let finding = qemu(Some(&fake));
        assert!(
            finding.found.contains("lacks the machine type microvm"),
            "{finding:?}"
        );
    }
}
