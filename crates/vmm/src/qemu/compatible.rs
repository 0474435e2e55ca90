//! Which QEMU loads what another saved. Pure: both versions are given.
//!
//! | board | loads what was saved by | why |
//! |---|---|---|
//! | microvm | the same version | its machine type has no versions, its devices change with every release |
//! | q35 | the same or an older version, while it offers the machine type | versioned machine types exist for that; nothing promises the way back |
//!
//! A pre-release (`10.1.0-rc2`) is only compatible with itself.
use std::cmp::Ordering;

use super::probe::numbers;
use crate::{Hypervisor, VmmError};

const SAME_VERSION: &str = "the board microvm is loaded by the very version that saved it, because its machine type has no versions; install that one";
const NOT_OLDER: &str =
    "q35 is loaded by the version that saved it or a newer one; install one of these";
const PRE_RELEASE: &str = "a pre-release and others do not load each other's; install the same one";
const NO_MACHINE_TYPE: &str =
    "it does not offer this machine type any more; install a version that does";
const UNKNOWN: &str = "one of the versions is not understood, so nothing is known about them";

/// # Errors
/// [`VmmError::Incompatible`] with both versions and the rule.
pub(super) fn check(
    kind: Hypervisor,
    machine_type: &str,
    saved: &str,
    here: &str,
    machines: &[String],
) -> Result<(), VmmError> {
    let Some(rule) = broken_rule(kind, machine_type, saved, here, machines) else {
        return Ok(());
    };
    Err(VmmError::Incompatible {
        hypervisor: "QEMU",
        machine_type: machine_type.to_owned(),
        saved: saved.to_owned(),
        here: here.to_owned(),
        rule,
    })
}

fn broken_rule(
    kind: Hypervisor,
    machine_type: &str,
    saved: &str,
    here: &str,
    machines: &[String],
) -> Option<&'static str> {
    if kind == Hypervisor::QemuMicrovm {
        return (saved != here).then_some(SAME_VERSION);
    }
    if !machines.iter().any(|offered| offered == machine_type) {
        return Some(NO_MACHINE_TYPE);
    }
    if saved == here {
        return None;
    }
    let (Some(saved_numbers), Some(here_numbers)) = (numbers(saved), numbers(here)) else {
        return Some(UNKNOWN);
    };
    if is_older(&here_numbers, &saved_numbers) {
        return Some(NOT_OLDER);
    }
    (!is_release(saved) || !is_release(here)).then_some(PRE_RELEASE)
}

/// 7.2 is 7.2.0.
fn is_older(one: &[u32], other: &[u32]) -> bool {
    let part = |version: &[u32], i: usize| version.get(i).copied().unwrap_or(0);
    (0..one.len().max(other.len()))
        .map(|i| part(one, i).cmp(&part(other, i)))
        .find(|order| order.is_ne())
        == Some(Ordering::Less)
}

fn is_release(version: &str) -> bool {
    version.bytes().all(|b| b.is_ascii_digit() || b == b'.')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    fn loads(kind: Hypervisor, saved: &str, here: &str) -> Result<(), VmmError> {
        let machines = ["microvm", "pc-q35-7.2", "pc-q35-7.1"].map(str::to_owned);
        let machine_type = match kind {
            Hypervisor::QemuMicrovm => "microvm",
            _ => "pc-q35-7.2",
        };
        check(kind, machine_type, saved, here, &machines)
    }

    #[test]
    fn a_microvm_wants_the_very_version() {
        loads(Hypervisor::QemuMicrovm, "7.2.22", "7.2.22").unwrap();
        for (saved, here) in [("7.2.22", "7.2.21"), ("7.2.22", "7.2.23"), ("7.2", "10.0")] {
            let e = loads(Hypervisor::QemuMicrovm, saved, here).unwrap_err();
            assert!(matches!(e, VmmError::Incompatible { .. }), "{e:?}");
            let text = e.to_string();
            for words in [saved, here, "machine type microvm", "very version"] {
                assert!(text.contains(words), "{words:?} is not in {text:?}");
            }
        }
    }

    #[test]
    fn q35_takes_the_same_or_an_older_one() {
        for (saved, here) in [
            ("7.2.22", "7.2.22"),
            ("7.2.22", "7.2.23"),
            ("7.2.22", "10.0.0"),
            ("9.2", "10.0"),
            ("7.2", "7.2.0"),
            ("7.2.0", "7.2"),
            ("10.1.0-rc2", "10.1.0-rc2"),
        ] {
            loads(Hypervisor::Qemu, saved, here).unwrap();
        }
        for (saved, here, rule) in [
            ("7.2.22", "7.2.21", NOT_OLDER),
            ("10.0.0", "9.2.4", NOT_OLDER),
            ("7.2.1", "7.2", NOT_OLDER),
            ("10.1.0", "10.1.0-rc2", PRE_RELEASE),
            ("10.1.0-rc2", "10.1.0", PRE_RELEASE),
            ("10.1.0-rc2", "10.1.0-rc3", PRE_RELEASE),
            ("ten", "10.1.0", UNKNOWN),
            ("", "10.1.0", UNKNOWN),
        ] {
            let VmmError::Incompatible { rule: found, .. } =
                loads(Hypervisor::Qemu, saved, here).unwrap_err()
            else {
                panic!("another error")
            };
            assert_eq!(found, rule, "{saved} by {here}");
        }
    }

    #[test]
    fn q35_wants_its_machine_type() {
        let machines = ["pc-q35-9.0".to_owned()];
        let e = check(Hypervisor::Qemu, "pc-q35-2.12", "7.2.0", "9.0.0", &machines).unwrap_err();
        let text = e.to_string();
        for words in ["7.2.0", "9.0.0", "pc-q35-2.12", "does not offer"] {
            assert!(text.contains(words), "{words:?} is not in {text:?}");
        }
    }
}
