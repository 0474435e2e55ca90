//! Streams: what waits for its turn, and how much either side may send.
use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;

use super::{DATA_CHUNK, MAIN_STREAM, STREAM_WINDOW, SendError, Session};
use crate::frame::{Kind, MAX_PAYLOAD};

/// Data bytes of one stream that wait for their turn.
const QUEUE_BYTES: usize = 64 << 10;
/// Control messages of one stream that wait for their turn.
pub(super) const QUEUE_MESSAGES: usize = 1024;

#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) stream: u32,
    pub(super) kind: Kind,
    pub(super) payload: Bytes,
    pub(super) queued_at: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) queue: VecDeque<Item>,
    pub(super) queued_data: usize,
    pub(super) queued_messages: usize,
    /// Data bytes the peer lets us send.
    pub(super) credit: u32,
    /// Data bytes we let the peer send.
    pub(super) room: u32,
    /// Consumed and not yet given back as credit.
    pub(super) consumed: u32,
    /// Nothing more comes from or goes to the user; leaves when the queue is empty.
    pub(super) closing: bool,
}

impl Stream {
    pub(super) fn open() -> Self {
        Self {
            credit: STREAM_WINDOW,
            room: STREAM_WINDOW,
            ..Self::default()
        }
    }
}

impl Session {
    /// Both ends open a stream under the same number; a number is never used again within an epoch.
    pub fn open(&mut self, stream: u32) {
        self.streams.entry(stream).or_insert_with(Stream::open);
    }

    /// What is queued still goes out; what arrives is dropped.
    pub fn close(&mut self, stream: u32) {
        if stream == MAIN_STREAM {
            return;
        }
        if let Some(state) = self.streams.get_mut(&stream) {
            state.closing = true;
            if state.queue.is_empty() {
                self.streams.remove(&stream);
            }
        }
    }

    pub(super) fn usable(&mut self, stream: u32) -> Option<&mut Stream> {
        self.streams.get_mut(&stream).filter(|s| !s.closing)
    }

    /// Queues a control message.
    pub fn send_control(
        &mut self,
        stream: u32,
        payload: Bytes,
        now: Instant,
    ) -> Result<(), SendError> {
        if payload.len() > MAX_PAYLOAD {
            return Err(SendError::TooLarge(payload.len()));
        }
        let state = self.usable(stream).ok_or(SendError::Closed)?;
        if state.queued_messages >= QUEUE_MESSAGES {
            return Err(SendError::Full);
        }
        state.queued_messages += 1;
        state.queue.push_back(Item {
            stream,
            kind: Kind::CONTROL,
            payload,
            queued_at: now,
        });
        Ok(())
    }

    /// Bytes of data [`Session::send_data`] takes now; `None` when the stream is closed.
    pub fn capacity(&self, stream: u32) -> Option<usize> {
        let state = self.streams.get(&stream).filter(|s| !s.closing)?;
        Some((state.credit as usize).min(QUEUE_BYTES.saturating_sub(state.queued_data)))
    }

    /// Queues as much of `data` as there is room for, and leaves the rest in it.
    pub fn send_data(
        &mut self,
        stream: u32,
        data: &mut Bytes,
        now: Instant,
    ) -> Result<(), SendError> {
        let room = self.capacity(stream).ok_or(SendError::Closed)?;
        let state = self.usable(stream).ok_or(SendError::Closed)?;
        let mut part = data.split_to(room.min(data.len()));
        state.credit -= part.len() as u32;
        state.queued_data += part.len();
        while !part.is_empty() {
            let payload = part.split_to(part.len().min(DATA_CHUNK));
            state.queue.push_back(Item {
                stream,
                kind: Kind::DATA,
                payload,
                queued_at: now,
            });
        }
        Ok(())
    }

    /// The user took `bytes` of received data; the peer may send as many more.
    pub fn consumed(&mut self, stream: u32, bytes: usize, now: Instant) {
        let Some(state) = self.usable(stream) else {
            return;
        };
        state.consumed = state
            .consumed
            .saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if state.consumed >= STREAM_WINDOW / 2 {
            let grant = std::mem::take(&mut state.consumed);
            state.room = state.room.saturating_add(grant);
            let payload = Bytes::copy_from_slice(&grant.to_le_bytes());
            state.queue.push_front(Item {
                stream,
                kind: Kind::CREDIT,
                payload,
                queued_at: now,
            });
        }
    }
}
