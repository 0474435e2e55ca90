//! Processes with an identity: pid + start time + boot id, never a pid alone.
//!
//! A server that is killed and started again finds numbers in its records. The number may by now
//! belong to a stranger, so nothing is ever signalled by pid: the identity is checked once, on a
//! pidfd that is already open, and from then on the pidfd names the process.
//!
//! ```text
//!  record --(pid, start, boot)--> pidfd_open(pid) --> start time equal? --> ProcessHandle
//!                                   |                   | no                 |- exited(): readable = gone
//!                                   | no such pid       |                    '- kill(): pidfd_send_signal
//!                                   '------ None <------'
//! ```
//!
//! A pidfd is readable as soon as the whole process has ended, reaped or not (pidfd_open(2)): a
//! zombie is gone, a process whose first thread alone has ended is not.
use std::{
    ffi::OsString,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
    },
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::clock::boot_id;

mod spawn;
mod stat;
#[cfg(test)]
mod tests;

pub use spawn::spawn_detached;
use stat::{Stat, is_gone};

/// The variable that carries [`Detached::mark`].
const MARK_VARIABLE: &str = "DOZE_MARK";

/// An exec takes about a millisecond, longer from a slow disk: in all two seconds of patience.
const EXEC_LOOKS: u32 = 1000;
const EXEC_PAUSE: Duration = Duration::from_millis(2);

/// Names one process for ever: a reused pid has another start time, another boot another id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks after boot.
    pub start_ticks: u64,
    pub boot_id: String,
}

/// A process to start that outlives us: own session, no inherited descriptors but those given,
/// stdin from /dev/null.
#[derive(Debug, Clone)]
pub struct Detached {
    /// An absolute path, or a bare name to be looked up in `PATH`.
    pub program: PathBuf,
    /// Paths among them must be absolute: the process runs in `/`.
    pub args: Vec<OsString>,
    /// stdout and stderr are appended here (created 0600).
    pub log: PathBuf,
    /// Put into the environment as `DOZE_MARK` so that [`find_marked`] finds an orphan.
    pub mark: String,
}

/// A pidfd: signals and waiting that cannot hit a stranger.
#[derive(Debug)]
pub struct ProcessHandle {
    id: ProcessId,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Opens the live process with this identity; `None` when it is gone (a zombie counts as gone,
    /// and is reaped if it is our child).
    ///
    /// # Errors
    /// When /proc or the boot id cannot be read, or no descriptor is left: then nothing is known
    /// about the process, in particular not that it is gone.
    pub fn open(id: &ProcessId) -> io::Result<Option<Self>> {
        if id.boot_id != boot_id()? {
            return Ok(None);
        }
        Ok(Self::open_pid(id.pid, &id.boot_id)?.filter(|found| found.id == *id))
    }

    /// The live process that has this pid now. The pidfd comes first: a start time read later and
    /// found equal to an older record's can only be that of the process the pidfd refers to.
    fn open_pid(pid: i32, boot_id: &str) -> io::Result<Option<Self>> {
        // Zero and negative numbers mean groups elsewhere; `from_raw` panics on them.
        let Some(number) = (pid > 0).then(|| Pid::from_raw(pid)).flatten() else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // ESRCH: no such process. EINVAL, later ENOENT: the number is a thread's by now.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let Some(stat) = Stat::read(pid)? else {
            return Ok(None);
        };
        let found = Self {
            id: ProcessId {
                pid,
                start_ticks: stat.start_ticks,
                boot_id: boot_id.to_owned(),
            },
            pidfd,
        };
        if found.has_ended()? {
            found.reap()?;
            return Ok(None);
        }
        Ok(Some(found))
    }

    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Resolves when the process is gone; reaps it when it is our child. Cancel-safe, and may be
    /// awaited by several at once.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    ///
    /// # Errors
    /// When no descriptor is left or the reactor refuses one.
    pub async fn exited(&self) -> io::Result<()> {
        // A descriptor of its own for each waiter: the reactor takes one registration for each.
        let pidfd = watch(self.pidfd.try_clone()?)?;
        loop {
            let mut ready = pidfd.readable().await?;
            if self.has_ended()? {
                return self.reap();
            }
            ready.clear_ready();
        }
    }

    /// SIGKILL; gone already is fine.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn has_ended(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            match poll(&mut fds, Some(&now)) {
                Ok(count) => return Ok(count > 0),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Takes the zombie away if it is ours; another's parent, or init, does it otherwise.
    fn reap(&self) -> io::Result<()> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(_) | Err(Errno::CHILD) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

#[allow(unsafe_code, reason = "registering a descriptor with the reactor")]
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its one descriptor open until it is dropped, and it is dropped with
    // the AsyncFd that owns it.
    Ok(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?)
}

/// Live processes whose environment holds `DOZE_MARK=<mark>`, ourselves excepted.
///
/// Processes whose environment we may not read are skipped: those we start run as ourselves.
///
/// # Errors
/// When /proc cannot be listed or the boot id not read; `TimedOut` when a process hangs in exec.
pub fn find_marked(mark: &str) -> io::Result<Vec<ProcessId>> {
    let boot_id = boot_id()?;
    let wanted = format!("{MARK_VARIABLE}={mark}");
    let ourselves = i32::try_from(std::process::id()).unwrap_or(0);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid == ourselves || !carries(pid, &wanted)? {
            continue;
        }
        // The pid may have changed hands since: look again while a pidfd holds the process.
        if let Some(handle) = ProcessHandle::open_pid(pid, &boot_id)?
            && carries(pid, &wanted)?
            && !handle.has_ended()?
        {
            found.push(handle.id);
        }
    }
    Ok(found)
}

/// Whether the process has this entry in its environment. While it is in exec (also right after
/// [`spawn_detached`]) the environment reads as empty, so an empty one is believed only when the same
/// program was there before and after the look.
fn carries(pid: i32, entry: &str) -> io::Result<bool> {
    for _ in 0..EXEC_LOOKS {
        let Some(before) = Stat::read(pid)? else {
            return Ok(false);
        };
        let environ = match fs::read(format!("/proc/{pid}/environ")) {
            Ok(environ) => environ,
            Err(e) if is_gone(&e) || e.kind() == io::ErrorKind::PermissionDenied => {
                return Ok(false);
            }
            Err(e) => {
                let text = format!("cannot read /proc/{pid}/environ: {e}");
                return Err(io::Error::new(e.kind(), text));
            }
        };
        if !environ.is_empty() {
            return Ok(environ.split(|b| *b == 0).any(|e| e == entry.as_bytes()));
        }
        let Some(after) = Stat::read(pid)? else {
            return Ok(false);
        };
        if !after.is_in_exec() && after.runs_the_same_as(&before) {
            return Ok(false);
        }
        // The kernel announces the end of an exec to nobody but a tracer.
        std::thread::sleep(EXEC_PAUSE);
    }
    Err(io::Error::new(
        io::ErrorKind::TimedOut,
        format!("process {pid} does not finish exec, so it is unknown whose it is; try again"),
    ))
}

/// CPU time and resident set of a live process; `None` when gone.
pub fn usage(id: &ProcessId) -> io::Result<Option<Usage>> {
    if id.boot_id != boot_id()? || id.pid <= 0 {
        return Ok(None);
    }
    Ok(Stat::read(id.pid)?
        // A dead process has no memory left to report. `Z` and `X` of proc_pid_stat(5).
        .filter(|stat| stat.start_ticks == id.start_ticks && !matches!(stat.state, 'Z' | 'X'))
        .map(|stat| stat.usage()))
}

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    /// User and kernel mode of all its threads, also ended ones; in steps of a clock tick (10 ms).
    pub cpu: Duration,
    /// Resident set, shared mappings included. The kernel batches its counters per CPU, so a
    /// process of a few pages may show none.
    pub rss_bytes: u64,
    /// Size of the address space.
    pub vms_bytes: u64,
}
