//! QEMU: `qemu` (q35) and `qemu-microvm`.
use std::{path::PathBuf, sync::Arc};

use crate::{Accel, Hypervisor, Monitor};

/// Operator's choices.
#[derive(Debug, Clone, Default)]
pub struct QemuConfig {
    /// `qemu-system-x86_64` by default, looked up in PATH.
    pub binary: Option<PathBuf>,
    /// `None`: KVM when truly usable, else TCG.
    pub accel: Option<Accel>,
    /// User (name) the VMM drops to after it opened its files; `None`: stays the server's user.
    pub run_as: Option<String>,
}

/// The monitor for [`Hypervisor::Qemu`] or [`Hypervisor::QemuMicrovm`].
pub fn monitor(kind: Hypervisor, config: QemuConfig) -> Arc<dyn Monitor> {
    let _ = (kind, config);
    unimplemented!()
}

/// The kernel command line that suits this board (console, tuning of HYPERVISORS.md facts), without the
/// operator's extra words.
pub fn base_cmdline(kind: Hypervisor, accel: Accel) -> String {
    let _ = (kind, accel);
    unimplemented!()
}
