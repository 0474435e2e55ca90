//! Starting a process that outlives us.
//!
//! ```text
//!  parent                        child
//!  open log, fork  ----------->  stdio onto /dev/null and the log        (std)
//!  read the CLOEXEC pipe         empty signal mask                       (std)
//!    |                           own session, default dispositions, umask 077,
//!    |                           every other descriptor marked close-on-exec
//!    |                           parent still there? -> exec
//!    |<--- end of file: exec'ed, or an error number: why not
//!  pidfd_open, start time  (the child cannot be reaped by others: its pid is still its own)
//! ```
use std::{
    ffi::{OsStr, OsString},
    fs::{File, OpenOptions},
    io,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, PidfdFlags, getpid, getppid, pidfd_open, setsid};

use super::{Detached, MARK_VARIABLE, ProcessHandle, ProcessId, stat::Stat};
use crate::clock::boot_id;

/// Where programs are looked for when our own environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The highest signal number of Linux (signal(7)).
const LAST_SIGNAL: libc::c_int = 64;

/// Starts it. When this returns the process has exec'ed (or an error says why not).
///
/// The process gets: its own session; stdin from /dev/null, stdout and stderr appended to the log;
/// no other descriptor; default signal dispositions and an empty mask; umask 077, so that sockets
/// and files it makes are private; `/` as its working folder, so that paths in `args` must be absolute; an
/// environment of `PATH` (ours, or the usual one) and `DOZE_MARK` alone. Needs Linux 5.11 (CLOSE_RANGE_CLOEXEC).
///
/// Blocking for as long as fork and exec take. Dropping the handle neither stops nor reaps the process.
///
/// # Errors
/// `InvalidInput` for an empty mark, a NUL byte, or a relative program path with a folder in it;
/// the error of opening the log; the error of exec (`NotFound`, `PermissionDenied`, ...).
pub fn spawn_detached(what: &Detached) -> io::Result<ProcessHandle> {
    check(what)?;
    // First, so that nothing can fail for its sake once the process runs.
    let boot_id = boot_id()?;
    let child = command(what)?.spawn().map_err(|e| {
        let program = what.program.display();
        io::Error::new(e.kind(), format!("cannot start {program}: {e}"))
    })?;
    adopt(child, boot_id)
}

fn check(what: &Detached) -> io::Result<()> {
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    if what.mark.is_empty() || what.mark.contains('\0') {
        return refuse(format!(
            "the mark {:?} is empty or holds a NUL byte; give the instance's id",
            what.mark
        ));
    }
    if what.program.is_relative() && what.program.components().count() > 1 {
        return refuse(format!(
            "the program {} is neither absolute nor a bare name to be looked up in PATH",
            what.program.display()
        ));
    }
    Ok(())
}

fn command(what: &Detached) -> io::Result<Command> {
    let log = open_log(what)?;
    let path = std::env::var_os("PATH")
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| OsString::from(DEFAULT_PATH));
    let mut command = Command::new(&what.program);
    command
        .args(&what.args)
        .env_clear()
        .env("PATH", path)
        .env(MARK_VARIABLE, OsStr::new(&what.mark))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    in_child(&mut command);
    Ok(command)
}

fn open_log(what: &Detached) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&what.log)
        .map_err(|e| {
            let log = what.log.display();
            io::Error::new(e.kind(), format!("cannot open the log {log}: {e}"))
        })
}

#[allow(unsafe_code, reason = "code between fork and exec")]
fn in_child(command: &mut Command) {
    let parent = getpid();
    let prepare = move || {
        setsid()?;
        reset_signals();
        // SAFETY: umask only swaps a number of the process; it cannot fail.
        unsafe { libc::umask(0o077) };
        close_others_on_exec()?;
        // A process whose parent was killed meanwhile is known to nobody; it must not start.
        if getppid() != Some(parent) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        Ok(())
    };
    // SAFETY: after fork in a program with threads only async-signal-safe calls are allowed.
    // `prepare` makes the system calls setsid, rt_sigaction, umask, close_range and getppid, which
    // take no locks and allocate nothing; errors are built from numbers, without allocation.
    unsafe { command.pre_exec(prepare) };
}

/// Ignored signals survive exec (execve(2)); std resets only SIGPIPE and the mask.
#[allow(unsafe_code, reason = "sigaction")]
fn reset_signals() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: signal(2) with SIG_DFL installs no handler of ours. SIGKILL, SIGSTOP and the two
        // that the C library keeps for its threads answer EINVAL; it sets those up itself.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Not closed but marked: std's own pipe has to report a failing exec first.
#[allow(unsafe_code, reason = "close_range has no safe wrapper")]
fn close_others_on_exec() -> io::Result<()> {
    let first: libc::c_uint = 3;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC closes nothing now, it sets a flag on
    // descriptors of this process, a copy of ours after fork.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Names the child. Without a name nobody could find or stop it, so a failure here ends it.
fn adopt(mut child: Child, boot_id: String) -> io::Result<ProcessHandle> {
    identify(&child, boot_id).map_err(|cause| {
        let kind = cause.kind();
        match child.kill().and_then(|()| child.wait()) {
            Ok(_) => io::Error::new(kind, format!("cannot identify the new process: {cause}")),
            Err(cleanup) => io::Error::new(
                kind,
                format!("cannot identify the new process {}: {cause}; and it could not be ended: {cleanup}", child.id()),
            ),
        }
    })
}

fn identify(child: &Child, boot_id: String) -> io::Result<ProcessHandle> {
    let gone = || io::Error::new(io::ErrorKind::NotFound, "it was reaped by somebody else");
    let pid = i32::try_from(child.id()).map_err(|_| gone())?;
    let pidfd = pidfd_open(Pid::from_raw(pid).ok_or_else(gone)?, PidfdFlags::empty())?;
    let stat = Stat::read(pid)?.ok_or_else(gone)?;
    Ok(ProcessHandle {
        id: ProcessId {
            pid,
            start_ticks: stat.start_ticks,
            boot_id,
        },
        pidfd,
    })
}
