//! Starting a machine, one step after the other; whatever fails takes back the steps before it.
//!
//! ```text
//!   stale sockets away ─> memory file ─> process ─> connected, status prelaunch ─> QemuMachine
//!                             |             |                |
//!                          remove       kill, reap      remove sockets          on failure
//! ```
use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use doze_host::process::{Detached, ProcessHandle, spawn_detached};

use super::{
    args, log,
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
) -> Result<QemuMachine, VmmError> {
    if let Some(nic) = &machine.nic {
        require_link(&nic.tap)?;
    }
    remove_sockets(machine)?;
    let log_start = log::length(&machine.vmm_log)
        .map_err(|e| io_error("cannot inspect the log", &machine.vmm_log, e))?;
    create_memory(&machine.memory.path, machine.memory_bytes)?;
    let started = spawn_detached(&Detached {
        program: binary.clone(),
        args: args::build(machine, run_as),
        log: machine.vmm_log.clone(),
        mark: mark(&machine.id),
    });
    let process = match started {
        Ok(process) => Arc::new(process),
        Err(e) => return Err(undo(machine, None, cannot_start(&binary, e)).await),
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
    Err(undo(machine, Some(&process), failure).await)
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

/// Sparse, mode 0600. Not fsynced: without a snapshot its content is worth nothing.
fn create_memory(path: &Path, size: u64) -> Result<(), VmmError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| io_error("cannot create the memory file", path, e))?;
    let existing = file
        .metadata()
        .map_err(|e| io_error("cannot inspect the memory file", path, e))?
        .len();
    if existing != 0 {
        return Err(VmmError::Unsupported(format!(
            "memory file {} has {existing} bytes, it must be empty or absent; it may be a saved machine's",
            path.display()
        )));
    }
    let Err(source) = file.set_len(size) else {
        return Ok(());
    };
    let mut context = format!(
        "cannot give the memory file {} {size} bytes",
        path.display()
    );
    if let Err(e) = remove(path) {
        context.push_str(&format!("; and cleaning up failed: {e}"));
    }
    Err(VmmError::Io { context, source })
}

/// Takes everything back. A failure to do so is kept beside its cause.
async fn undo(
    machine: &MachineDescription,
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
    if let Err(e) = remove(&machine.memory.path) {
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
