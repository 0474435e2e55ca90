//! Moving what a process writes to where it is wanted, without ever making the process wait for
//! more than its reader, and without hanging on descendants that keep the stream open.
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use bytes::Bytes;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

const CHUNK: usize = 32 << 10;
/// What is read at most after the process ended; more than a pipe or terminal buffers.
const LAST_WORDS: usize = 1 << 20;

/// A pipe: our non-blocking read end, the process's write end.
pub fn output_pipe() -> io::Result<(Source, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Source::new(reader)?, writer))
}

pub fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?)
}

/// Read end of a pipe, or a terminal's master side, read when it is ready.
#[derive(Debug)]
pub struct Source {
    fd: AsyncFd<OwnedFd>,
}

enum Got {
    Bytes(usize),
    Nothing,
    End,
}

impl Source {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self {
            fd: crate::sys::watch_fd(fd, tokio::io::Interest::READABLE)?,
        })
    }

    fn try_read(&self, buf: &mut [u8]) -> Got {
        loop {
            match rustix::io::read(self.fd.get_ref(), &mut *buf) {
                Ok(0) => return Got::End,
                Ok(n) => return Got::Bytes(n),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Got::Nothing,
                // A terminal whose other side is closed says EIO; anything else ends it as well.
                Err(_) => return Got::End,
            }
        }
    }

    /// 0 at the end.
    async fn read(&self, buf: &mut [u8]) -> usize {
        loop {
            match self.try_read(buf) {
                Got::Bytes(n) => return n,
                Got::End => return 0,
                Got::Nothing => {}
            }
            // Cleared before the next attempt, so what arrives from now on is noticed by one or the other.
            match self.fd.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return 0,
            }
        }
    }

    /// Feeds `sink` until the stream ends or, once `ended` is cancelled, until nothing more is there
    /// at once. A sink that returns `false` wants no more.
    pub async fn forward(
        &self,
        ended: &CancellationToken,
        mut sink: impl AsyncFnMut(Bytes) -> bool,
    ) {
        let mut buf = vec![0; CHUNK];
        loop {
            let n = tokio::select! {
                biased;
                n = self.read(&mut buf) => n,
                () = ended.cancelled() => break,
            };
            if n == 0 || !sink(Bytes::copy_from_slice(&buf[..n])).await {
                return;
            }
            if ended.is_cancelled() {
                break;
            }
        }
        let mut left = LAST_WORDS;
        while left > 0 {
            let Got::Bytes(n) = self.try_read(&mut buf) else {
                return;
            };
            left = left.saturating_sub(n);
            if !sink(Bytes::copy_from_slice(&buf[..n])).await {
                return;
            }
        }
    }
}
