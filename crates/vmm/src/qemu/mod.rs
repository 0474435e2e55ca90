//! QEMU: `qemu` (board q35) and `qemu-microvm`.
//!
//! | module | owns |
//! |---|---|
//! | `probe` | which binary, what it can do |
//! | `args` | description -> command line |
//! | `qmp` | the monitor protocol |
//! | `spawn` | starting a process, and leaving nothing behind when that fails |
//! | `machine` | the live process |
//! | `log` | last words for error messages |
use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use doze_host::process::{ProcessHandle, ProcessId};

use crate::{Accel, Hypervisor, Machine, MachineDescription, Monitor, Probe, VmmError};

mod args;
mod log;
mod machine;
mod probe;
mod qmp;
mod spawn;

/// Name of the virtio-serial port that carries the control channel. The guest's agent looks for this name: it
/// is the agent protocol's `CONTROL_PORT`, repeated because a monitor does not depend on the agent.
pub const CONTROL_PORT: &str = "doze.agent.0";

/// Name of the virtio-serial port that the program's output goes to, the agent's `APP_LOG_PORT`.
pub const APP_LOG_PORT: &str = "doze.app.0";

/// For a VMM of an earlier server to answer. It answers at once, unless another client is connected.
const ATTACH_DEADLINE: Duration = Duration::from_secs(10);

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

/// The monitor for [`Hypervisor::Qemu`] or [`Hypervisor::QemuMicrovm`]. For another kind every
/// call answers [`VmmError::Unsupported`] or says what is missing.
pub fn monitor(kind: Hypervisor, config: QemuConfig) -> Arc<dyn Monitor> {
    Arc::new(Qemu {
        kind,
        run_as: config.run_as.clone(),
        prober: probe::Prober::new(kind, config),
    })
}

/// What every VMM process of this instance carries in its environment: the argument for
/// `doze_host::process::find_marked`.
pub fn mark(id: &str) -> String {
    format!("doze:{id}")
}

/// The kernel command line that suits this board, without the operator's extra words.
///
/// All of it only skips what a machine of ours does not have; nothing weakens the guest. On the microvm
/// under TCG it holds the frequency of the time-stamp counter, which that board has nothing to
/// measure against and which is the host's; the first call spends 20 ms to measure it.
pub fn base_cmdline(kind: Hypervisor, accel: Accel) -> String {
    let mut words = vec![
        "console=ttyS0",
        "quiet",
        // A reboot is a triple fault, and that ends the run (`-action`). So does a panic, at the latest
        // by rebooting at once.
        "reboot=t",
        "panic=-1",
        "nowatchdog",
        "cryptomgr.notests",
        "8250.nr_uarts=1",
        "audit=0",
        "i8042.noaux",
        "i8042.nokbd",
        "noreplace-smp",
    ];
    if accel == Accel::Tcg {
        words.extend(["tsc=reliable", "no_timer_check"]);
    }
    let mut cmdline = words.join(" ");
    if kind == Hypervisor::QemuMicrovm {
        cmdline.push_str(" pci=off");
        if accel == Accel::Tcg {
            cmdline.push_str(&format!(" tsc_early_khz={}", doze_host::tsc::khz()));
        }
    }
    cmdline
}

struct Qemu {
    kind: Hypervisor,
    run_as: Option<String>,
    prober: probe::Prober,
}

#[async_trait]
impl Monitor for Qemu {
    fn hypervisor(&self) -> Hypervisor {
        self.kind
    }

    async fn probe(&self) -> Probe {
        self.prober.probe().await
    }

    async fn machine_type(&self) -> Result<String, VmmError> {
        self.prober.machine_type().await
    }

    async fn spawn(&self, machine: &MachineDescription) -> Result<Box<dyn Machine>, VmmError> {
        args::check(self.kind, machine)?;
        let binary = self.prober.binary()?;
        let machine = spawn::spawn(binary, machine, self.run_as.as_deref()).await?;
        Ok(Box::new(machine))
    }

    async fn attach(
        &self,
        machine: &MachineDescription,
        process: &ProcessId,
    ) -> Result<Option<Box<dyn Machine>>, VmmError> {
        let found = ProcessHandle::open(process).map_err(|source| VmmError::Io {
            context: format!("cannot look for the VMM process {}", process.pid),
            source,
        })?;
        let Some(handle) = found else {
            return Ok(None);
        };
        let taken = machine::take_up(
            Arc::new(handle),
            spawn::places(machine),
            0,
            ATTACH_DEADLINE,
            "attach",
        );
        Ok(taken
            .await?
            .map(|machine| Box::new(machine) as Box<dyn Machine>))
    }
}
