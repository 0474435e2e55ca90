//! The few calls no safe wrapper offers.
#![allow(
    unsafe_code,
    reason = "kernel calls without a safe wrapper; each block says why it is sound"
)]
use std::{
    ffi::c_int,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::Command,
};

use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};
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

/// Source: Linux include/uapi/linux/random.h, random(4).
const RNDADDENTROPY: Opcode = opcode::write::<[c_int; 2]>(b'R', 0x03);
const RNDRESEEDCRNG: Opcode = opcode::none(b'R', 0x07);

/// `struct rand_pool_info` with the longest buffer used here.
#[repr(C)]
struct PoolInfo {
    entropy_bits: c_int,
    size: c_int,
    buf: [u8; ENTROPY_MAX],
}

const ENTROPY_MAX: usize = *doze_agent::message::ENTROPY_BYTES.end();

/// Mixes bytes into the kernel's entropy pool and counts each of their bits. `random` is the device.
pub(crate) fn add_entropy(random: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let mut info = PoolInfo {
        entropy_bits: 0,
        size: 0,
        buf: [0; ENTROPY_MAX],
    };
    let Some(buf) = info.buf.get_mut(..bytes.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    buf.copy_from_slice(bytes);
    // At most 64 bytes, so neither number is cut.
    info.size = bytes.len() as c_int;
    info.entropy_bits = 8 * info.size;
    // SAFETY: the kernel reads the two numbers and `size` bytes behind them, which lie within `info`, and
    // writes nothing.
    unsafe { ioctl(random, Setter::<RNDADDENTROPY, _>::new(info)) }.map_err(Into::into)
}

/// Has the kernel's generator take what is in the pool at once, instead of within a minute.
pub(crate) fn reseed(random: &OwnedFd) -> io::Result<()> {
    // SAFETY: this request has no argument and touches no memory of ours.
    unsafe { ioctl(random, NoArg::<RNDRESEEDCRNG>::new()) }.map_err(Into::into)
}
