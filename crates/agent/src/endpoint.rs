//! A [`Session`] that several tasks share while one of them moves its bytes.
//!
//! ```text
//!   users: send / write / consumed ──lock──> Session <──lock── drive(reader, writer): one connection
//!             ^                                 │                   │
//!             └──────── `changed` <─────────────┴───── events ──────┴──> handler
//! ```
//!
//! The lock is never held across an await.
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::Notify,
};

use crate::session::{Event, Role, SendError, Session};

const READ_BYTES: usize = 64 << 10;
const WRITE_BYTES: usize = 64 << 10;

/// Shared handle to one end of the channel.
#[derive(Clone, Debug)]
pub struct Endpoint {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    session: Mutex<Session>,
    /// For [`Endpoint::drive`]: there is something to send.
    work: Notify,
    /// For users: room or acknowledgement may have come.
    changed: Notify,
}

impl Endpoint {
    pub fn new(role: Role, epoch: u64) -> Self {
        let session = Mutex::new(Session::new(role, epoch));
        Self {
            inner: Arc::new(Inner {
                session,
                work: Notify::new(),
                changed: Notify::new(),
            }),
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        // A panic inside the session leaves at worst a broken channel, which reconnecting mends.
        self.inner
            .session
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn established(&self) -> bool {
        self.session().established()
    }

    /// Somebody answered once, so that what is sent now will arrive or be dropped for a newer peer.
    pub fn has_peer(&self) -> bool {
        self.session().peer().is_some()
    }

    /// The version the peer announced, once one answered.
    pub fn peer_protocol(&self) -> Option<u32> {
        self.session().peer_protocol()
    }

    /// Announces another version than this code's own from the next handshake on.
    #[cfg(all(test, feature = "host"))]
    pub(crate) fn announce(&self, protocol: u32) {
        self.session().announce(protocol);
    }

    pub fn open(&self, stream: u32) {
        self.session().open(stream);
    }

    pub fn close(&self, stream: u32) {
        self.session().close(stream);
        self.inner.changed.notify_waiters();
    }

    /// Queues a control message.
    pub fn send(&self, stream: u32, message: &impl Serialize) -> Result<(), SendError> {
        // Our messages are plain structs; serde_json refuses only maps with odd keys.
        let payload = serde_json::to_vec(message).map_err(|_| SendError::TooLarge(0))?;
        self.session()
            .send_control(stream, payload.into(), Instant::now())?;
        self.inner.work.notify_one();
        Ok(())
    }

    /// Queues data, waiting for room as often as needed. An error when the stream closes meanwhile.
    pub async fn write(&self, stream: u32, mut data: Bytes) -> Result<(), SendError> {
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            self.session()
                .send_data(stream, &mut data, Instant::now())?;
            self.inner.work.notify_one();
            if data.is_empty() {
                return Ok(());
            }
            changed.await;
        }
    }

    /// Gives the peer room for as many bytes more.
    pub fn consumed(&self, stream: u32, bytes: usize) {
        self.session().consumed(stream, bytes, Instant::now());
        self.inner.work.notify_one();
    }

    /// Waits for a peer that acknowledged everything queued so far.
    pub async fn flushed(&self) {
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.session().idle() {
                return;
            }
            changed.await;
        }
    }

    /// Serves one connection until it ends: `Ok` when the peer closed it. Dropping the future ends the
    /// connection too.
    pub async fn drive<R, W>(
        &self,
        mut reader: R,
        mut writer: W,
        mut handler: impl FnMut(Event),
    ) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        self.session().link_up(Instant::now());
        let _down = LinkDown(self);
        let mut input = vec![0; READ_BYTES];
        let mut out = BytesMut::new();
        loop {
            let deadline = {
                let mut session = self.session();
                session.transmit(Instant::now(), &mut out, WRITE_BYTES);
                session.deadline()
            };
            self.inner.changed.notify_waiters();
            tokio::select! {
                read = reader.read(&mut input) => {
                    let n = read?;
                    if n == 0 {
                        return Ok(());
                    }
                    self.session().receive(&input[..n], Instant::now());
                    self.hand_out(&mut handler);
                }
                written = writer.write(&out), if !out.is_empty() => {
                    let n = written?;
                    if n == 0 {
                        return Err(io::ErrorKind::WriteZero.into());
                    }
                    out.advance(n);
                }
                () = self.inner.work.notified() => {}
                () = until(deadline) => {
                    self.session().on_deadline(Instant::now());
                    self.hand_out(&mut handler);
                }
            }
        }
    }

    /// The handler runs without the lock, so it may use this endpoint.
    fn hand_out(&self, handler: &mut impl FnMut(Event)) {
        loop {
            let event = self.session().event();
            match event {
                Some(event) => handler(event),
                None => return,
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

struct LinkDown<'a>(&'a Endpoint);

impl Drop for LinkDown<'_> {
    fn drop(&mut self) {
        self.0.session().link_down();
    }
}
