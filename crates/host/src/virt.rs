//! Whether hardware virtualisation is really usable.
//!
//! A bare `/dev/kvm` node proves nothing: containers and cloud guests carry one that cannot run a
//! guest. So two things are asked, and the answer names the one that is missing.
use std::{collections::BTreeSet, fs::OpenOptions, io, path::Path};

const CPUINFO: &str = "/proc/cpuinfo";
const KVM: &str = "/dev/kvm";

/// `Ok` when the CPU has the flag `vmx` (Intel) or `svm` (AMD) *and* `/dev/kvm` opens for reading
/// and writing; otherwise the reason, fit to be shown to an operator.
pub fn kvm_usable() -> Result<(), String> {
    let cpuinfo =
        std::fs::read_to_string(CPUINFO).map_err(|e| format!("cannot read {CPUINFO}: {e}"))?;
    usable(&cpuinfo, Path::new(KVM))
}

fn usable(cpuinfo: &str, device: &Path) -> Result<(), String> {
    if !has_virtualisation_flag(cpuinfo) {
        return Err(
            "the CPU shows neither the flag vmx nor svm in /proc/cpuinfo: enable virtualisation in \
             the firmware, or nested virtualisation on the outer host"
                .to_owned(),
        );
    }
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(format!(
            "{} does not exist: load the module kvm_intel or kvm_amd",
            device.display()
        )),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "{} cannot be opened for reading and writing: {e}; run as root or as a member of the group kvm",
            device.display()
        )),
        Err(e) => Err(format!(
            "{} cannot be opened for reading and writing: {e}",
            device.display()
        )),
    }
}

/// What this CPU can do, in the kernel's words (`/proc/cpuinfo`, `flags`): a guest that was given the host's CPU
/// goes on only where all of it is there.
///
/// # Errors
/// Of `/proc/cpuinfo`.
pub fn cpu_flags() -> io::Result<BTreeSet<String>> {
    let cpuinfo = std::fs::read_to_string(CPUINFO)?;
    Ok(flags(&cpuinfo).map(str::to_owned).collect())
}

/// The `flags` line lists words; `vmx flags` is another line with other contents.
fn flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .flat_map(|(_, flags)| flags.split_ascii_whitespace())
}

fn has_virtualisation_flag(cpuinfo: &str) -> bool {
    flags(cpuinfo).any(|flag| flag == "vmx" || flag == "svm")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    const INTEL: &str = "processor\t: 0\nflags\t\t: fpu vme vmx sse\nvmx flags\t: ept\n";

    #[test]
    fn the_flag_is_a_whole_word_of_the_flags_line() {
        assert!(has_virtualisation_flag(INTEL));
        assert!(has_virtualisation_flag("flags : a svm b\n"));
        assert!(!has_virtualisation_flag("flags : svm_lock vmxnet\n"));
        assert!(!has_virtualisation_flag(
            "vmx flags : vmx\nmodel name : svm\n"
        ));
        assert!(!has_virtualisation_flag(""));
    }

    #[test]
    fn each_reason_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("kvm");
        assert!(
            usable("flags : fpu\n", &device)
                .unwrap_err()
                .contains("vmx")
        );
        assert!(
            usable(INTEL, &device)
                .unwrap_err()
                .contains("does not exist")
        );
        // A folder cannot be opened for writing, whoever asks.
        assert!(
            usable(INTEL, dir.path())
                .unwrap_err()
                .contains("cannot be opened")
        );
        std::fs::write(&device, "").unwrap();
        usable(INTEL, &device).unwrap();
    }
}
