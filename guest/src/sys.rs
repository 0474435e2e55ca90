//! The few calls no safe wrapper offers.
#![allow(
    unsafe_code,
    reason = "kernel calls without a safe wrapper; each block says why it is sound"
)]
use std::{
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::Command,
};

use tokio::io::{Interest, unix::AsyncFd};

/// Whom a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Process(i32),
    Group(i32),
    /// Every process but this one (PID 1 only).
    Everybody,
}

/// kill(2) with any signal number, real-time ones included.
pub(crate) fn kill(target: Target, signal: i32) -> io::Result<()> {
    let pid = match target {
        Target::Process(pid) if pid > 0 => pid,
        Target::Group(pid) if pid > 1 => -pid,
        Target::Everybody if std::process::id() == 1 => -1,
        // 0, 1 and negative numbers mean something else to kill(2), never what was asked for here.
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    // SAFETY: kill takes two integers and touches no memory of ours.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs `setup` in the child between fork and exec.
///
/// `setup` must only make system calls: no allocation, no locks.
pub(crate) fn before_exec(
    command: &mut Command,
    setup: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: this program has one thread, so the child inherits no lock held by another one, and
    // the callers' closures only make system calls on memory made before the fork.
    unsafe {
        command.pre_exec(setup);
    }
}

/// Has the runtime watch a file descriptor.
pub(crate) fn watch_fd(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open file from here until it is dropped, and AsyncFd
    // deregisters before it drops what it owns.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}
