//! Starting a machine, one step after the other; whatever fails takes back the steps before it.
//!
//! ```text
//!   stale sockets away ─> memory file ─> process ─> connected, status prelaunch ─> QemuMachine
//!                             |             |                |
//!                          remove       kill, reap      remove sockets          on failure
//! ```
//!
//! A saved machine's memory file is neither made nor removed, only measured.
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use doze_host::process::{Detached, ProcessHandle, spawn_detached};

use super::{
    args::{self, Origin},
    log,
    machine::{Places, QemuMachine, end, take_up},
    mark,
};
use crate::{Machine, MachineDescription, MachineStatus, VmmError};

/// From exec to an answering monitor: 0.2 s, most of it for reading the kernel; a loaded machine takes
/// longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// Links of this process's network namespace (not of whoever mounted /sys).
const LINKS: &str = "/proc/thread-self/net/dev";

pub(super) fn places(machine: &MachineDescription) -> Places {
    Places {
        qmp_socket: args::qmp_socket(machine),
        agent_socket: args::agent_socket(machine),
        vmm_log: machine.vmm_log.clone(),
    }
}

/// Builds the machine of a checked description.
///
/// There is no await between the first effect and the existing process: who drops this future
/// leaves either nothing running or a process that carries the mark already.
pub(super) async fn spawn(
    binary: PathBuf,
    machine: &MachineDescription,
    run_as: Option<&str>,
    origin: Origin,
) -> Result<QemuMachine, VmmError> {
    if let Some(nic) = &machine.nic {
        require_link(&nic.tap)?;
    }
    remove_sockets(machine)?;
    let log_start = log::length(&machine.vmm_log)
        .map_err(|e| io_error("cannot inspect the log", &machine.vmm_log, e))?;
    prepare_memory(machine, origin)?;
    let started = spawn_detached(&Detached {
        program: binary.clone(),
        args: args::build(machine, run_as, origin),
        log: machine.vmm_log.clone(),
        mark: mark(&machine.id),
    });
    let process = match started {
        Ok(process) => Arc::new(process),
        Err(e) => return Err(undo(machine, origin, None, cannot_start(&binary, e)).await),
    };
    let taken = take_up(
        process.clone(),
        places(machine),
        log_start,
        DEADLINE,
        "spawn",
    );
    let failure = match taken.await {
        Ok(Some(machine)) => match *machine.watch().borrow() {
            MachineStatus::Prelaunch => return Ok(machine),
            other => VmmError::Refused {
                command: "query-status",
                message: format!("a new machine is {other:?}, expected is Prelaunch"),
            },
        },
        Ok(None) => VmmError::Exited {
            during: "spawn",
            log: log::tail(&machine.vmm_log, log_start),
        },
        Err(e) => e,
    };
    Err(undo(machine, origin, Some(&process), failure).await)
}

fn cannot_start(binary: &Path, source: io::Error) -> VmmError {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => VmmError::Missing {
            what: source.to_string(),
            mend: "install QEMU or set the path of an executable binary in the configuration"
                .to_owned(),
        },
        _ => io_error("cannot start", binary, source),
    }
}

/// QEMU would make a missing TAP itself, on no bridge.
fn require_link(name: &str) -> Result<(), VmmError> {
    let links =
        std::fs::read_to_string(LINKS).map_err(|e| io_error("cannot read", Path::new(LINKS), e))?;
    let found = links
        .lines()
        .filter_map(|line| line.split_once(':'))
        .any(|(link, _)| link.trim() == name);
    if found {
        return Ok(());
    }
    Err(VmmError::Missing {
        what: format!("the TAP device {name} does not exist in this network namespace"),
        mend: "start the instance again: its network is made anew".to_owned(),
    })
}

fn prepare_memory(machine: &MachineDescription, origin: Origin) -> Result<(), VmmError> {
    let done = match origin {
        Origin::Boot => machine.memory.create(machine.memory_bytes),
        Origin::Saved => machine.memory.check_size(machine.memory_bytes),
    };
    done.map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::InvalidData => {
            VmmError::Unsupported(e.to_string())
        }
        _ => VmmError::Io {
            context: "guest memory".to_owned(),
            source: e,
        },
    })
}

/// Takes everything back; a saved machine's memory is not ours to take. A failure to do so is kept beside
/// its cause.
async fn undo(
    machine: &MachineDescription,
    origin: Origin,
    process: Option<&ProcessHandle>,
    cause: VmmError,
) -> VmmError {
    let mut left = Vec::new();
    if let Some(process) = process
        && let Err(e) = end(process).await
    {
        left.push(e.to_string());
    }
    if let Err(e) = remove_sockets(machine) {
        left.push(e.to_string());
    }
    if origin == Origin::Boot
        && let Err(e) = remove(&machine.memory.path)
    {
        left.push(e.to_string());
    }
    if left.is_empty() {
        return cause;
    }
    VmmError::Io {
        context: format!("{cause}; and cleaning up failed: {}", left.join("; ")),
        source: io::Error::other("something of the machine is left"),
    }
}

fn remove_sockets(machine: &MachineDescription) -> Result<(), VmmError> {
    args::sockets(machine)
        .iter()
        .try_for_each(|path| remove(path))
}

fn remove(path: &Path) -> Result<(), VmmError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("cannot remove", path, e)),
        _ => Ok(()),
    }
}

fn io_error(what: &str, path: &Path, source: io::Error) -> VmmError {
    VmmError::Io {
        context: format!("{what} {}", path.display()),
        source,
    }
}
