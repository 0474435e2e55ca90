//! QEMU: `qemu` (board q35) and `qemu-microvm`.
//!
//! | module | owns |
//! |---|---|
//! | `probe` | which binary, what it can do |
//! | `args` | description -> command line |
//! | `qmp` | the monitor protocol |
//! | `migration` | device state out and in |
//! | `state_file` | the file it is kept in |
//! | `compatible` | which version loads what another saved |
//! | `spawn` | starting a process, and leaving nothing behind when that fails |
//! | `machine` | the live process |
//! | `log` | last words for error messages |
use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use doze_host::process::{ProcessHandle, ProcessId, find_marked};

use crate::{Accel, Hypervisor, Machine, MachineDescription, Monitor, Probe, VmmError};

mod args;
mod compatible;
mod log;
mod machine;
mod migration;
mod probe;
mod qmp;
mod spawn;
mod state_file;

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

impl Qemu {
    async fn launch(
        &self,
        machine: &MachineDescription,
        origin: args::Origin,
    ) -> Result<Box<dyn Machine>, VmmError> {
        args::check(self.kind, machine)?;
        let binary = self.prober.binary()?;
        let machine = spawn::spawn(binary, machine, self.run_as.as_deref(), origin).await?;
        Ok(Box::new(machine))
    }
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
        self.launch(machine, args::Origin::Boot).await
    }

    async fn spawn_to_load(
        &self,
        machine: &MachineDescription,
    ) -> Result<Box<dyn Machine>, VmmError> {
        self.launch(machine, args::Origin::Saved).await
    }

    async fn check_loads(
        &self,
        machine: &MachineDescription,
        saved_version: &str,
    ) -> Result<(), VmmError> {
        args::check(self.kind, machine)?;
        let (here, machines) = self.prober.versions().await?;
        compatible::check(
            self.kind,
            &machine.machine_type,
            saved_version,
            &here,
            &machines,
        )
    }

    async fn find(&self, id: &str) -> Result<Vec<ProcessId>, VmmError> {
        let mark = mark(id);
        machine::blocking(move || {
            find_marked(&mark).map_err(|source| VmmError::Io {
                context: format!("cannot look for VMM processes marked {mark:?}"),
                source,
            })
        })
        .await
    }

    async fn kill(&self, process: &ProcessId) -> Result<(), VmmError> {
        match open(process)? {
            Some(handle) => machine::end(&handle).await,
            None => Ok(()),
        }
    }

    async fn attach(
        &self,
        machine: &MachineDescription,
        process: &ProcessId,
    ) -> Result<Option<Box<dyn Machine>>, VmmError> {
        let Some(handle) = open(process)? else {
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

fn open(process: &ProcessId) -> Result<Option<ProcessHandle>, VmmError> {
    ProcessHandle::open(process).map_err(|source| VmmError::Io {
        context: format!("cannot look for the VMM process {}", process.pid),
        source,
    })
}
