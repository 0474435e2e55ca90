//! Device events of the kernel, so that nothing has to ask again and again whether a device is there.
use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind,
        netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
        recv, socket_with,
    },
};
use tokio::io::{Interest, unix::AsyncFd};

/// The group the kernel sends to.
const KERNEL_GROUP: u32 = 1;

/// A subscription to uevents (NETLINK_KOBJECT_UEVENT, netlink(7)).
#[derive(Debug)]
pub struct Uevents {
    socket: AsyncFd<OwnedFd>,
}

impl Uevents {
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            flags,
            Some(KOBJECT_UEVENT),
        )?;
        bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self {
            socket: crate::sys::watch_fd(socket, Interest::READABLE)?,
        })
    }

    /// Waits until something happened to some device, and forgets what it was: callers look
    /// for what they want, so that lost events cost nothing.
    pub async fn changed(&mut self) -> io::Result<()> {
        let mut any = false;
        loop {
            let mut buf = [0u8; 1];
            match recv(self.socket.get_ref(), &mut buf[..], RecvFlags::TRUNC) {
                // An overflow means that there were more events than room.
                Ok(_) | Err(Errno::NOBUFS) => any = true,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if any => return Ok(()),
                Err(Errno::AGAIN) => self.socket.readable().await?.clear_ready(),
                Err(e) => return Err(e.into()),
            }
        }
    }
}
