//! The background task: keeps a connection and hands out what arrives.
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::net::UnixStream;

use super::{GuestView, MAIN_STREAM, Shared, exec::Item, lock, restored::Reply};
use crate::{
    message::{PROTOCOL, ToGuest, ToHost, version_text},
    session::Event,
};

const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_millis(500);

/// Connects, serves, connects again, until cancelled.
pub(super) async fn run(shared: Arc<Shared>, socket: PathBuf) {
    let cancel = shared.cancel.clone();
    tokio::select! {
        () = cancel.cancelled() => {}
        () = keep_connected(&shared, &socket) => {}
    }
    unlinked(&shared);
    end_all(&shared);
}

/// Whether there had been a handshake.
fn unlinked(shared: &Shared) -> bool {
    let mut connected = false;
    shared.view.send_if_modified(|v| {
        connected = std::mem::replace(&mut v.connected, false);
        std::mem::replace(&mut v.linked, false) || connected
    });
    connected
}

async fn keep_connected(shared: &Shared, socket: &Path) {
    let mut retry = RETRY_FIRST;
    loop {
        let problem = match UnixStream::connect(socket).await {
            Ok(stream) => {
                shared.view.send_modify(|v| v.linked = true);
                let (reader, writer) = stream.into_split();
                let ended = shared
                    .endpoint
                    .drive(reader, writer, |event| dispatch(shared, event))
                    .await;
                // A connection that served its purpose deserves a prompt new one; one that closes at once is
                // not to be hammered.
                if unlinked(shared) {
                    retry = RETRY_FIRST;
                }
                match ended {
                    Ok(()) => "the connection was closed by the machine monitor".to_owned(),
                    Err(error) => format!("the connection broke: {error}"),
                }
            }
            Err(error) => format!("{}: {error}", socket.display()),
        };
        tracing::debug!(socket = %socket.display(), problem, "no control channel");
        *lock(&shared.problem) = problem;
        // A socket gives no sign that it will soon accept, so asking again is all one can do.
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(RETRY_MAX);
    }
}

fn dispatch(shared: &Shared, event: Event) {
    match event {
        Event::Established { peer, fresh } => established(shared, peer, fresh),
        Event::Incompatible { protocol } => {
            let (theirs, ours) = (version_text(protocol), version_text(PROTOCOL));
            *lock(&shared.problem) = format!(
                "the guest speaks protocol {theirs}, this server {ours}; start the instance anew"
            );
            tracing::warn!(theirs, ours, "guest agent speaks another protocol version");
        }
        Event::Control {
            stream,
            payload,
            waited,
        } => match serde_json::from_slice(&payload) {
            Ok(message) => control(shared, stream, message, waited),
            Err(error) => {
                tracing::warn!(stream, %error, "message from the guest is not understood")
            }
        },
        Event::Data { stream, payload } => data(shared, stream, payload),
        Event::Overrun { stream } => {
            fail(shared, stream, "the guest sent more than it was allowed to");
        }
    }
}

fn established(shared: &Shared, peer: u64, fresh: bool) {
    if fresh {
        fail_all(shared, "the guest restarted");
        shared.view.send_replace(GuestView {
            linked: true,
            connected: true,
            guest_epoch: Some(peer),
            ..GuestView::default()
        });
    } else {
        shared.view.send_modify(|v| v.connected = true);
    }
}

fn control(shared: &Shared, stream: u32, message: ToHost, waited: Duration) {
    // A later report of the same event has a better age at most: the earliest instant counts.
    let since = |age_us: u64, known: Option<Instant>| {
        let now = Instant::now();
        let age = Duration::from_micros(age_us).saturating_add(waited);
        let at = now.checked_sub(age).unwrap_or(now);
        Some(known.map_or(at, |k| k.min(at)))
    };
    match message {
        ToHost::ProgramStarted { age_us } => {
            shared
                .view
                .send_modify(|v| v.program_started = since(age_us, v.program_started));
        }
        ToHost::AgentReady { age_us } => {
            shared
                .view
                .send_modify(|v| v.agent_ready = since(age_us, v.agent_ready));
        }
        ToHost::ProgramExited { exit } => shared.view.send_modify(|v| v.program_exit = Some(exit)),
        ToHost::BootError { text } => shared.view.send_modify(|v| v.boot_error = Some(text)),
        ToHost::ExecStarted => put(shared, stream, Item::Started),
        ToHost::ExecRefused { text } => put(shared, stream, Item::Refused(text)),
        ToHost::ExecExited { exit } => put(shared, stream, Item::Exit(exit)),
        ToHost::Pong { nonce } => {
            if let Some(waiter) = lock(&shared.pings).remove(&nonce) {
                // Whoever asked may have given up: nobody to tell then.
                waiter.send(()).ok();
            }
        }
        ToHost::ShuttingDown => {
            for waiter in lock(&shared.shutdowns).drain(..) {
                waiter.send(()).ok();
            }
        }
        ToHost::RestoredDone {
            nonce,
            problem,
            identity_applied,
        } => {
            if let Some(waiter) = lock(&shared.restores).remove(&nonce) {
                let reply = Reply::Done {
                    problem,
                    identity_applied,
                };
                waiter.send(reply).ok();
            }
        }
        ToHost::Unsupported { text } => {
            tracing::warn!(stream, text, "the guest did not understand");
            unsupported(shared, stream, &text);
        }
        ToHost::Unknown => tracing::debug!(stream, "message of a newer guest ignored"),
    }
}

/// It names no message. On the main stream there is but one that a guest of this major version may not know.
fn unsupported(shared: &Shared, stream: u32, text: &str) {
    if stream == MAIN_STREAM {
        for (_, waiter) in lock(&shared.restores).drain() {
            waiter.send(Reply::Unsupported(text.to_owned())).ok();
        }
    }
}

fn data(shared: &Shared, stream: u32, payload: Bytes) {
    if stream == MAIN_STREAM {
        tracing::warn!("the guest sent data outside any session");
        return;
    }
    // Copied: a few bytes must not keep the whole buffer alive that they arrived in.
    put(shared, stream, Item::Output(BytesMut::from(&payload[..])));
}

fn put(shared: &Shared, stream: u32, item: Item) {
    let inbox = lock(&shared.streams).get(&stream).cloned();
    match inbox {
        Some(inbox) => {
            if inbox.push(item) {
                lock(&shared.streams).remove(&stream);
                shared.recount();
                shared.endpoint.close(stream);
            }
        }
        // The session was dropped here; its end there is on the way.
        None => tracing::trace!(stream, "message for a session that is gone"),
    }
}

fn fail(shared: &Shared, stream: u32, why: &str) {
    if shared.endpoint.send(stream, &ToGuest::Kill).is_err() {
        tracing::trace!(stream, "nobody to kill");
    }
    put(shared, stream, Item::Failed(why.to_owned()));
}

/// Ends every session with `why`, here and in the guest.
pub(super) fn fail_all(shared: &Shared, why: &str) {
    for stream in end_sessions(shared, why) {
        // Refused for streams of a guest that is gone.
        if shared.endpoint.send(stream, &ToGuest::Kill).is_ok() {
            tracing::debug!(stream, why, "command killed");
        }
        shared.endpoint.close(stream);
    }
}

/// Ends every session of a channel that has ended; the guest is not told.
pub(super) fn end_all(shared: &Shared) {
    let why = shared.closed.get();
    let why = why.map_or("the control channel was closed", String::as_str);
    for stream in end_sessions(shared, why) {
        // Whoever waits for room to write learns of the end.
        shared.endpoint.close(stream);
    }
}

/// The streams of the sessions that this ended.
fn end_sessions(shared: &Shared, why: &str) -> Vec<u32> {
    let streams = std::mem::take(&mut *lock(&shared.streams));
    shared.recount();
    for inbox in streams.values() {
        inbox.push(Item::Failed(why.to_owned()));
    }
    lock(&shared.pings).clear();
    lock(&shared.shutdowns).clear();
    lock(&shared.restores).clear();
    streams.into_keys().collect()
}
