//! A netlink socket to netfilter, on the reactor. Nothing blocks.
use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, bind,
        netlink::{NETFILTER, SocketAddrNetlink},
        recvfrom, sendto, socket_with,
        sockopt::{
            set_socket_recv_buffer_size, set_socket_recv_buffer_size_force, socket_recv_buffer_size,
        },
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{ConntrackError, wire::Malformed};

/// A dump's datagrams hold 32 KiB at most (`netlink_dump`), events some hundred bytes.
pub(super) const DATAGRAM: usize = 64 * 1024;

/// What one attempt to receive gave.
pub(super) enum Received {
    /// So many bytes, from the kernel.
    Datagram(usize),
    /// Nothing is queued.
    Empty,
    /// Messages were dropped since the last receive (`ENOBUFS`, netlink(7)).
    Overrun,
}

#[derive(Debug)]
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
}

impl Socket {
    /// `groups` is the mask of multicast groups; joining one needs `CAP_NET_ADMIN`. The buffer's
    /// size goes beyond `net.core.rmem_max` where the process may (`SO_RCVBUFFORCE`).
    pub fn open(groups: u32, receive_buffer: Option<usize>) -> Result<Self, ConntrackError> {
        let fail = |doing| move |errno| ConntrackError::from_errno(doing, errno);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(NETFILTER),
        )
        .map_err(fail("opening a netlink socket to netfilter"))?;
        if let Some(size) = receive_buffer {
            set_socket_recv_buffer_size_force(&fd, size)
                .or_else(|_| set_socket_recv_buffer_size(&fd, size))
                .map_err(fail("setting the size of the netlink socket's buffer"))?;
        }
        // Before the membership: no event may come before the buffer has its size.
        bind(&fd, &SocketAddrNetlink::new(0, groups))
            .map_err(fail("subscribing to events of connection tracking"))?;
        Ok(Self {
            fd: register(fd).map_err(|e| ConntrackError::Kernel {
                doing: "registering a netlink socket with the reactor",
                errno: Errno::from_io_error(&e).unwrap_or(Errno::IO),
            })?,
        })
    }

    /// To the kernel; a request of ours always fits.
    pub fn send(&self, request: &[u8], doing: &'static str) -> Result<(), ConntrackError> {
        let kernel = SocketAddrNetlink::new(0, 0);
        sendto(&self.fd, request, SendFlags::empty(), &kernel)
            .map(drop)
            .map_err(|errno| ConntrackError::from_errno(doing, errno))
    }

    /// Does not wait. What others than the kernel send is dropped.
    pub fn try_receive(&self, buffer: &mut [u8]) -> Result<Received, ReceiveError> {
        loop {
            match recvfrom(&self.fd, &mut *buffer, RecvFlags::TRUNC) {
                Ok((_, _, from)) if !is_kernel(from.as_ref()) => {}
                Ok((kept, length, _)) if length > kept => {
                    return Err(ReceiveError::Malformed(Malformed::Cut(length)));
                }
                Ok((kept, ..)) => return Ok(Received::Datagram(kept)),
                Err(Errno::AGAIN) => return Ok(Received::Empty),
                Err(Errno::NOBUFS) => return Ok(Received::Overrun),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(ReceiveError::Errno(errno)),
            }
        }
    }

    /// Waits until a receive has something to say. Cancelling loses nothing.
    pub async fn receive(&self, buffer: &mut [u8]) -> Result<Received, ReceiveError> {
        loop {
            match self.try_receive(buffer)? {
                Received::Empty => {}
                other => return Ok(other),
            }
            let interest = Interest::READABLE | Interest::ERROR;
            let mut ready = (self.fd.ready(interest).await).map_err(ReceiveError::from_io)?;
            // Only an empty queue may clear the readiness: the reactor reports edges.
            match self.try_receive(buffer)? {
                Received::Empty => ready.clear_ready(),
                other => return Ok(other),
            }
        }
    }

    /// Bytes, as the kernel counts them: twice what was asked for (socket(7)).
    pub fn receive_buffer(&self) -> Result<usize, ConntrackError> {
        socket_recv_buffer_size(&self.fd).map_err(|errno| {
            ConntrackError::from_errno("reading the size of the netlink socket's buffer", errno)
        })
    }
}

/// Why a receive failed.
#[derive(Debug, Clone, Copy)]
pub(super) enum ReceiveError {
    Errno(Errno),
    Malformed(Malformed),
}

impl ReceiveError {
    fn from_io(error: io::Error) -> Self {
        Self::Errno(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    pub fn during(self, doing: &'static str) -> ConntrackError {
        match self {
            Self::Errno(errno) => ConntrackError::Kernel { doing, errno },
            Self::Malformed(malformed) => malformed.into(),
        }
    }
}

fn is_kernel(from: Option<&SocketAddrAny>) -> bool {
    from.and_then(|from| SocketAddrNetlink::try_from(from.clone()).ok())
        .is_some_and(|from| from.pid() == 0)
}

#[allow(unsafe_code, reason = "registering a descriptor with the reactor")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its one descriptor open until it is dropped, and it is dropped with
    // the AsyncFd that owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE | Interest::ERROR) }?)
}
