//! A running command as its caller sees it.
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, atomic::Ordering},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use super::{ANSWER_WITHIN, AgentError, ExecRequest, ProgramExit, Shared, ToGuest, link, lock};

/// What a running command sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// stdout and stderr merged, at most 64 KiB a piece.
    Output(Bytes),
    Exit(ProgramExit),
    /// The session cannot go on (guest gone, standby, server shutting down); final.
    Failed(String),
}

/// What arrived for one session and was not yet taken. Bounded by the stream's credit.
#[derive(Default)]
pub(super) struct Inbox {
    items: Mutex<Items>,
    arrived: Notify,
}

#[derive(Default)]
struct Items {
    queue: VecDeque<Item>,
    /// Nothing comes after what is queued.
    ended: bool,
    started: bool,
}

pub(super) enum Item {
    Started,
    Refused(String),
    Output(BytesMut),
    Exit(ProgramExit),
    Failed(String),
}

/// Smaller pieces are joined up to this size, so that a guest that sends single bytes does not make the
/// queue's own bookkeeping grow.
const JOIN_UP_TO: usize = 32 << 10;

impl Inbox {
    /// Returns whether the session ended with this. What comes out of order is ignored, so that a
    /// guest cannot make the queue grow with anything but credited data.
    pub(super) fn push(&self, item: Item) -> bool {
        let mut items = lock(&self.items);
        if items.ended {
            return false;
        }
        match &item {
            Item::Started if std::mem::replace(&mut items.started, true) => return false,
            Item::Output(bytes) => {
                if let Some(Item::Output(last)) = items.queue.back_mut()
                    && last.len() + bytes.len() <= JOIN_UP_TO
                {
                    last.extend_from_slice(bytes);
                    return false;
                }
            }
            Item::Started => {}
            Item::Refused(_) | Item::Exit(_) | Item::Failed(_) => items.ended = true,
        }
        items.queue.push_back(item);
        let ended = items.ended;
        drop(items);
        // One reader at a time: `next` takes the session mutably.
        self.arrived.notify_one();
        ended
    }

    fn ended(&self) -> bool {
        lock(&self.items).ended
    }

    async fn take(&self) -> Option<Item> {
        loop {
            {
                let mut items = lock(&self.items);
                if let Some(item) = items.queue.pop_front() {
                    return Some(item);
                }
                if items.ended {
                    return None;
                }
            }
            self.arrived.notified().await;
        }
    }
}

/// A command in the guest. Dropping it kills the command's process group.
pub struct ExecSession {
    input: ExecInput,
    /// An event that arrived before anybody asked for it.
    first: Option<ExecEvent>,
}

impl ExecSession {
    pub(super) async fn begin(
        shared: Arc<Shared>,
        request: ExecRequest,
    ) -> Result<Self, AgentError> {
        let stream = shared.next_stream.fetch_add(1, Ordering::Relaxed);
        let inbox = Arc::new(Inbox::default());
        shared.endpoint.open(stream);
        lock(&shared.streams).insert(stream, inbox.clone());
        shared.recount();
        // From here on dropping it cleans up, wherever the caller stops waiting.
        let mut session = Self {
            input: ExecInput {
                shared: shared.clone(),
                stream,
                inbox,
            },
            first: None,
        };
        shared.endpoint.send(stream, &ToGuest::Exec { request })?;
        if shared.cancel.is_cancelled() {
            // Too late to be among those the channel's end ended.
            link::end_all(&shared);
        }
        let answer = tokio::time::timeout(ANSWER_WITHIN, session.input.inbox.take()).await;
        match answer {
            Err(_) => Err(AgentError::Timeout(ANSWER_WITHIN)),
            Ok(Some(Item::Refused(text))) => Err(AgentError::Refused(text)),
            // It may run, so the end is told as the command's: nobody is to try again by itself.
            Ok(Some(Item::Failed(why))) if shared.closed.get().is_some() => {
                session.first = Some(ExecEvent::Failed(why));
                Ok(session)
            }
            Ok(Some(Item::Failed(_)) | None) => Err(AgentError::Lost),
            Ok(Some(Item::Started)) => Ok(session),
            Ok(Some(Item::Exit(exit))) => {
                session.first = Some(ExecEvent::Exit(exit));
                Ok(session)
            }
            Ok(Some(Item::Output(bytes))) => {
                session.first = session.output(bytes.freeze());
                Ok(session)
            }
        }
    }

    fn output(&self, bytes: Bytes) -> Option<ExecEvent> {
        self.input
            .shared
            .endpoint
            .consumed(self.input.stream, bytes.len());
        Some(ExecEvent::Output(bytes))
    }

    /// Next event; `None` after `Exit` or `Failed`. Flow-controlled: not reading stops the command's output.
    pub async fn next(&mut self) -> Option<ExecEvent> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            match self.input.inbox.take().await? {
                Item::Started => {}
                Item::Output(bytes) => return self.output(bytes.freeze()),
                Item::Exit(exit) => return Some(ExecEvent::Exit(exit)),
                Item::Refused(text) | Item::Failed(text) => return Some(ExecEvent::Failed(text)),
            }
        }
    }

    /// A cloneable sender half for input, so that reading and writing can go on at once.
    pub fn input(&self) -> ExecInput {
        self.input.clone()
    }
}

impl Drop for ExecSession {
    fn drop(&mut self) {
        let ExecInput {
            shared,
            stream,
            inbox,
        } = &self.input;
        lock(&shared.streams).remove(stream);
        shared.recount();
        if !inbox.push(Item::Failed("the session was dropped".into())) {
            return; // It had ended by itself.
        }
        if let Err(error) = shared.endpoint.send(*stream, &ToGuest::Kill) {
            // Closed: another guest or no guest; nothing runs there any more.
            tracing::debug!(stream, %error, "command not killed");
        }
        shared.endpoint.close(*stream);
    }
}

/// Sender half of a session. Outliving the session is harmless: calls then fail.
#[derive(Clone)]
pub struct ExecInput {
    shared: Arc<Shared>,
    stream: u32,
    inbox: Arc<Inbox>,
}

impl ExecInput {
    /// Waits for room (flow control). An error after the command ended.
    pub async fn write(&self, data: Bytes) -> Result<(), AgentError> {
        self.alive()?;
        self.shared
            .endpoint
            .write(self.stream, data)
            .await
            .or_else(|e| self.explain(e))
    }

    /// End of input (EOF on stdin; ^D on a tty).
    pub async fn close(&self) -> Result<(), AgentError> {
        self.send(&ToGuest::StdinClose)
    }

    pub async fn resize(&self, rows: u16, cols: u16) -> Result<(), AgentError> {
        self.send(&ToGuest::Resize { rows, cols })
    }

    fn send(&self, message: &ToGuest) -> Result<(), AgentError> {
        self.alive()?;
        self.shared
            .endpoint
            .send(self.stream, message)
            .or_else(|e| self.explain(e))
    }

    fn alive(&self) -> Result<(), AgentError> {
        if let Some(why) = self.shared.closed.get() {
            return Err(AgentError::Unavailable(why.clone()));
        }
        if self.inbox.ended() {
            return Err(AgentError::Refused("the command has ended".into()));
        }
        Ok(())
    }

    fn explain(&self, error: crate::session::SendError) -> Result<(), AgentError> {
        self.alive()?;
        Err(error.into())
    }
}
