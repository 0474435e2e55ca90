//! A virtio-serial port as a byte stream.
//!
//! Such a port reads as ended whenever the host's side is not connected, and may come back later, so
//! it needs edge-triggered readiness of its own: an inner epoll whose own file descriptor
//! the runtime watches. (The runtime takes a hang-up for final and would spin.)
//!
//! ```text
//!   port ──edge──> inner epoll ──readable──> runtime
//! ```
//!
//! Every attempt to read or write comes before a wait, so an edge that the other direction used up costs
//! nothing. Source: Linux drivers/char/virtio_console.c (port_fops_read, port_fops_poll).
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::{
    event::{
        PollFd, PollFlags, Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
        poll,
    },
    fs::{Mode, OFlags},
    io::Errno,
};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use crate::init::uevent::Uevents;

const CLASS: &str = "/sys/class/virtio-ports";

/// An open port.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
    edges: AsyncFd<OwnedFd>,
}

impl Port {
    /// The port of that name, waiting up to `within` for it to appear.
    pub async fn named(name: &str, within: Duration) -> io::Result<Rc<Self>> {
        // Listening begins before looking, or an appearance in between would be missed.
        let mut events = Uevents::open()?;
        let found = async {
            loop {
                if let Some(device) = lookup(Path::new(CLASS), name) {
                    return Self::open(&device).map(Rc::new);
                }
                events.changed().await?;
            }
        };
        match tokio::time::timeout(within, found).await {
            Ok(port) => port,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("no virtio-serial port named {name} within {within:?}"),
            )),
        }
    }

    fn open(device: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = rustix::fs::open(device, flags, Mode::empty())?;
        let inner = epoll::create(CreateFlags::CLOEXEC)?;
        let interest = EventFlags::IN | EventFlags::OUT | EventFlags::HUP | EventFlags::ET;
        epoll::add(&inner, &fd, EventData::new_u64(0), interest)?;
        Ok(Self {
            fd,
            edges: crate::sys::watch_fd(inner, Interest::READABLE)?,
        })
    }

    /// Waits until the host's side is connected.
    pub async fn connected(&self) -> io::Result<()> {
        while self.hung_up()? {
            let mut ready = self.edges.readable().await?;
            self.take_edges()?;
            ready.clear_ready();
        }
        Ok(())
    }

    fn hung_up(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        poll(
            &mut fds,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )?;
        Ok(fds[0].revents().contains(PollFlags::HUP))
    }

    fn take_edges(&self) -> io::Result<()> {
        let mut events = Vec::with_capacity(4);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        epoll::wait(
            self.edges.get_ref(),
            rustix::buffer::spare_capacity(&mut events),
            Some(&now),
        )?;
        Ok(())
    }

    /// Ready when something changed since the last call that found nothing to do.
    fn poll_edge(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut ready = ready!(self.edges.poll_read_ready(cx))?;
        self.take_edges()?;
        ready.clear_ready();
        Poll::Ready(Ok(()))
    }
}

/// Device file of the port called `name`.
fn lookup(class: &Path, name: &str) -> Option<PathBuf> {
    let mut entries = fs::read_dir(class).ok()?.flatten();
    let port = entries
        .find(|e| fs::read_to_string(e.path().join("name")).is_ok_and(|n| n.trim_end() == name))?;
    Some(Path::new("/dev").join(port.file_name()))
}

/// One direction or both of a port. Reader and writer must be polled by the same task, as
/// [`doze_agent::endpoint::Endpoint::drive`] does.
#[derive(Debug, Clone)]
pub struct PortStream(pub Rc<Port>);

impl AsyncRead for PortStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.0.fd, buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::AGAIN) => ready!(self.0.poll_edge(cx))?,
                Err(Errno::INTR) => {}
                Err(e) => return Poll::Ready(Err(e.into())),
            }
        }
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.0.fd, buf) {
                Err(Errno::AGAIN) => ready!(self.0.poll_edge(cx))?,
                Err(Errno::INTR) => {}
                done => return Poll::Ready(done.map_err(Into::into)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
