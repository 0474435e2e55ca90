//! What lets a long job stay out of the way of everything else: low CPU and idle I/O priority for
//! single threads, given back the moment somebody waits for the job, and writing out in steps, so
//! that no single call keeps a thread in the kernel for the length of a whole file.
//!
//! Linux schedules threads, not processes: `sched_setscheduler` and `ioprio_set` take the number of a
//! thread (sched(7), `ioprio_set(2)`), which also lets *another* thread give the priority back. That
//! is the point: a starved thread cannot help itself.
use std::{fs::File, io, os::fd::AsRawFd, sync::OnceLock, thread};

use rustix::process::{Pid, getpriority_process, setpriority_process};

// linux/ioprio.h; libc has no names for these.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: libc::c_int = 13;
const IOPRIO_CLASS_IDLE: libc::c_int = 3;

/// Nice value of a thread that somebody waits for: sooner than whoever has the ordinary 0, but one that works on
/// without end still gets a tenth of a core.
const HURRIED: i32 = -10;

/// A thread whose priority was lowered. Give it back before the thread ends: after that the number may
/// belong to another thread.
#[derive(Debug)]
pub struct Lowered {
    thread: libc::pid_t,
    /// The scheduling policy before, when it was changed.
    policy: Option<libc::c_int>,
    /// The nice value before.
    nice: i32,
    /// The I/O priority before.
    io: libc::c_int,
}

/// Lowers the calling thread: I/O class idle, and CPU policy `SCHED_IDLE` where this process may also
/// leave that policy again (it takes `CAP_SYS_NICE` or a fitting `RLIMIT_NICE`; sched(7)). Where it may
/// not, the CPU priority stays: a job that nobody can hurry up would hold up whoever waits for it.
///
/// # Errors
/// What the system calls say; the thread is then as it was.
pub fn lower_current_thread() -> io::Result<Lowered> {
    lower_thread(current_thread())
}

/// The number of the calling thread, for [`lower_thread`].
pub fn current_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// As [`lower_current_thread`], for another thread of this process, which must not end meanwhile.
///
/// # Errors
/// What the system calls say; the thread is then as it was.
pub fn lower_thread(thread: i32) -> io::Result<Lowered> {
    let before = io_priority(thread)?;
    let nice = getpriority_process(Pid::from_raw(thread))?;
    set_io_priority(thread, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT)?;
    let mut lowered = Lowered {
        thread,
        policy: None,
        nice,
        io: before,
    };
    let changed = policy(thread).and_then(|before| {
        // A real-time thread was made one by somebody who knows why.
        if matches!(before, libc::SCHED_OTHER | libc::SCHED_BATCH) && may_leave_idle() {
            set_policy(thread, libc::SCHED_IDLE)?;
            lowered.policy = Some(before);
        }
        Ok(())
    });
    match changed {
        Ok(()) => Ok(lowered),
        Err(error) => {
            lowered.give_back()?;
            Err(error)
        }
    }
}

impl Lowered {
    /// The priority from before, from any thread of this process. Harmless when repeated.
    ///
    /// # Errors
    /// What the system calls say; both are tried in any case.
    pub fn give_back(&self) -> io::Result<()> {
        let cpu = match self.policy {
            Some(before) => set_policy(self.thread, before).and(self.renice(self.nice)),
            None => Ok(()),
        };
        set_io_priority(self.thread, self.io).and(cpu)
    }

    /// As [`Self::give_back`], and more than that where this process may give more (`CAP_SYS_NICE`), for a thread
    /// that somebody waits for and that is about to leave. `give_back` still follows, from the thread itself.
    ///
    /// # Errors
    /// As for `give_back`.
    pub fn hurry(&self) -> io::Result<()> {
        self.give_back()?;
        if self.policy.is_some() && self.nice > HURRIED {
            match self.renice(HURRIED) {
                // Then the ordinary priority has to do.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                other => return other,
            }
        }
        Ok(())
    }

    /// `setpriority(2)` takes the number of a thread, too.
    fn renice(&self, nice: i32) -> io::Result<()> {
        Ok(setpriority_process(Pid::from_raw(self.thread), nice)?)
    }
}

/// Whether a thread that entered `SCHED_IDLE` gets out again: tried once per process, on a thread that
/// is then thrown away.
fn may_leave_idle() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let probe =
            || set_policy(0, libc::SCHED_IDLE).and_then(|()| set_policy(0, libc::SCHED_OTHER));
        thread::Builder::new()
            .name("priority-probe".to_owned())
            .spawn(probe)
            .is_ok_and(|probe| matches!(probe.join(), Ok(Ok(()))))
    })
}

#[allow(unsafe_code, reason = "no safe wrapper exists")]
fn policy(thread: libc::pid_t) -> io::Result<libc::c_int> {
    // SAFETY: takes and returns plain numbers.
    match unsafe { libc::sched_getscheduler(thread) } {
        -1 => Err(io::Error::last_os_error()),
        policy => Ok(policy),
    }
}

#[allow(unsafe_code, reason = "no safe wrapper exists")]
fn set_policy(thread: libc::pid_t, policy: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: `parameters` is valid for the call, which only reads it.
    match unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[allow(unsafe_code, reason = "glibc has no wrapper for this system call")]
fn io_priority(thread: libc::pid_t) -> io::Result<libc::c_int> {
    // SAFETY: takes and returns plain numbers.
    let got = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, thread) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(got).map_err(io::Error::other)
}

#[allow(unsafe_code, reason = "glibc has no wrapper for this system call")]
fn set_io_priority(thread: libc::pid_t, priority: libc::c_int) -> io::Result<()> {
    // SAFETY: takes and returns plain numbers.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread, priority) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Starts writing the range's dirty pages to the disk and does not wait for it. No durability: only
/// fsync gives that, which this makes short.
///
/// # Errors
/// What `sync_file_range(2)` says.
pub fn start_writeback(file: &File, offset: u64, length: u64) -> io::Result<()> {
    sync_range(file, offset, length, libc::SYNC_FILE_RANGE_WRITE)
}

/// Writes the range's dirty pages to the disk and waits for them. No durability, as above: the file's
/// metadata and the disk's own cache are left to fsync.
///
/// # Errors
/// What `sync_file_range(2)` says, among them errors of the writing itself.
pub fn finish_writeback(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(file, offset, length, all)
}

#[allow(unsafe_code, reason = "no safe wrapper exists")]
fn sync_range(file: &File, offset: u64, length: u64, flags: libc::c_uint) -> io::Result<()> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    let length = i64::try_from(length).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for as long as `file` is borrowed; the rest are numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn another_thread_gives_the_priority_back() {
        let (send, receive) = mpsc::channel();
        let (release, wait) = mpsc::channel::<()>();
        let worker = thread::spawn(move || {
            let me = rustix::thread::gettid().as_raw_nonzero().get();
            let now = || {
                let nice = getpriority_process(Pid::from_raw(me)).unwrap();
                (policy(me).unwrap(), io_priority(me).unwrap(), nice)
            };
            let before = now();
            let lowered = lower_current_thread().unwrap();
            send.send((lowered, before, now())).unwrap();
            wait.recv().unwrap();
            now()
        });
        let (lowered, before, low) = receive.recv().unwrap();
        assert_eq!(low.1, IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT);
        assert_eq!(low.0 == libc::SCHED_IDLE, may_leave_idle());
        lowered.hurry().unwrap();
        let nice = getpriority_process(Pid::from_raw(lowered.thread)).unwrap();
        assert!(nice == HURRIED || nice == before.2, "{nice}");
        lowered.give_back().unwrap();
        lowered.give_back().unwrap();
        release.send(()).unwrap();
        assert_eq!(worker.join().unwrap(), before);
    }

    #[test]
    fn writing_out_takes_any_range_of_a_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        start_writeback(&file, 0, 4096).unwrap();
        finish_writeback(&file, 4096, 1 << 20).unwrap();
        assert!(finish_writeback(&file, u64::MAX, 1).is_err());
    }
}
