//! The guest's end of the control channel: reports what happened, runs commands for the host.
//!
//! ```text
//!   init ──started, exited, boot error──> Status ──on every new host──> Endpoint ──> host
//!   host ──Exec──> one task per session (exec.rs)        host ──Shutdown──> requests ──> init
//!   host ──Restored──> Kernel: clock, entropy, identity (restored.rs)
//! ```
use std::{
    cell::RefCell,
    collections::HashMap,
    io,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use doze_agent::{
    endpoint::Endpoint,
    message::{MAX_EXECS, ProgramExit, ToGuest, ToHost},
    session::{Event, MAIN_STREAM, Role},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};

use crate::{children::Children, spawn::Env, users::User};

mod exec;
mod restored;

pub use restored::{Kernel, ThisKernel};

/// What commands of the host run as, unless they say otherwise: the program's own circumstances.
#[derive(Debug, Clone)]
pub struct ExecDefaults {
    pub env: Env,
    pub user: User,
    pub cwd: PathBuf,
}

/// What the host asks of init.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    Shutdown { grace: Duration },
}

/// The agent; clones share it.
#[derive(Clone)]
pub struct Agent {
    inner: Rc<Inner>,
}

struct Inner {
    endpoint: Endpoint,
    children: Rc<Children>,
    /// `None`: exec is refused, and the agent never reports itself ready.
    exec: RefCell<Option<ExecDefaults>>,
    sessions: RefCell<HashMap<u32, exec::Handle>>,
    status: RefCell<Status>,
    requests: mpsc::UnboundedSender<Request>,
    kernel: Box<dyn Kernel>,
}

/// What a host that connects is told.
#[derive(Default)]
struct Status {
    program_started: Option<Instant>,
    agent_ready: Option<Instant>,
    program_exit: Option<ProgramExit>,
    boot_error: Option<String>,
}

impl Agent {
    /// `epoch` is random per boot; `kernel` is whose clock and entropy a restore mends. Requests for init
    /// come out of the receiver.
    pub fn new(
        epoch: u64,
        children: Rc<Children>,
        kernel: Box<dyn Kernel>,
    ) -> (Self, mpsc::UnboundedReceiver<Request>) {
        let (requests, receiver) = mpsc::unbounded_channel();
        let inner = Rc::new(Inner {
            endpoint: Endpoint::new(Role::Guest, epoch),
            children,
            exec: RefCell::default(),
            sessions: RefCell::default(),
            status: RefCell::default(),
            requests,
            kernel,
        });
        (Self { inner }, receiver)
    }

    /// Serves one connection until it ends; call it again for the next one.
    pub async fn serve<R, W>(&self, reader: R, writer: W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        self.inner
            .endpoint
            .drive(reader, writer, |event| self.inner.clone().handle(event))
            .await
    }

    /// Commands are accepted from now on.
    pub fn ready(&self, defaults: ExecDefaults) {
        *self.inner.exec.borrow_mut() = Some(defaults);
        self.report(|s| s.agent_ready = Some(Instant::now()));
    }

    pub fn program_started(&self, at: Instant) {
        self.report(|s| s.program_started = Some(at));
    }

    pub fn program_exited(&self, exit: ProgramExit) {
        self.report(|s| s.program_exit = Some(exit));
    }

    pub fn boot_error(&self, text: String) {
        self.report(|s| s.boot_error = Some(text));
    }

    /// Waits until a host acknowledged everything reported so far.
    pub async fn flushed(&self) {
        self.inner.endpoint.flushed().await;
    }

    /// Each report repeats the earlier ones, whose ages only become better; nothing reported before
    /// a host was there is lost, as the handshake reports again.
    fn report(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.inner.status.borrow_mut());
        if self.inner.endpoint.has_peer() {
            self.inner.tell_status();
        }
    }
}

impl Inner {
    fn handle(self: Rc<Self>, event: Event) {
        match event {
            Event::Established { fresh, .. } => {
                if fresh {
                    // Another server: the one that asked for these commands is gone.
                    self.sessions.borrow_mut().clear();
                }
                self.tell_status();
            }
            // It gets our Hello and reports the disagreement; there is nobody to tell here.
            Event::Incompatible { .. } => {}
            Event::Control {
                stream,
                payload,
                waited,
            } => match serde_json::from_slice(&payload) {
                Ok(message) => self.message(stream, message, waited),
                Err(e) => self.tell(
                    stream,
                    &ToHost::Unsupported {
                        text: format!("message not understood: {e}"),
                    },
                ),
            },
            Event::Data { stream, payload } => {
                if let Some(session) = self.sessions.borrow().get(&stream) {
                    session.input(exec::Input::Data(payload));
                }
            }
            Event::Overrun { stream } => {
                self.sessions.borrow_mut().remove(&stream);
            }
        }
    }

    /// `waited`: how long ago the host made the message, as far as it was its sender that held it.
    fn message(self: Rc<Self>, stream: u32, message: ToGuest, waited: Duration) {
        match message {
            ToGuest::Exec { request } => {
                self.endpoint.open(stream);
                if let Err(text) = self.clone().begin(stream, request) {
                    self.tell(stream, &ToHost::ExecRefused { text });
                    self.endpoint.close(stream);
                }
            }
            ToGuest::StdinClose => {
                if let Some(session) = self.sessions.borrow().get(&stream) {
                    session.input(exec::Input::Close);
                }
            }
            ToGuest::Resize { rows, cols } => {
                if let Some(session) = self.sessions.borrow().get(&stream) {
                    session.resize(rows, cols);
                }
            }
            ToGuest::Kill => {
                self.sessions.borrow_mut().remove(&stream);
                self.endpoint.close(stream);
            }
            ToGuest::Ping { nonce } => self.tell(MAIN_STREAM, &ToHost::Pong { nonce }),
            ToGuest::Shutdown { grace_ms } => {
                self.tell(MAIN_STREAM, &ToHost::ShuttingDown);
                let grace = Duration::from_millis(grace_ms);
                // Init listens until it powers off; afterwards the request is fulfilled anyway.
                self.requests.send(Request::Shutdown { grace }).ok();
            }
            ToGuest::Restored {
                nonce,
                wall_us,
                entropy,
                identity,
            } => {
                let done =
                    restored::mend(&*self.kernel, wall_us, waited, &entropy, identity.as_ref());
                if let (Some(former), Some(identity)) = (&done.former_hostname, &identity) {
                    self.rename(former, &identity.hostname);
                }
                let answer = ToHost::RestoredDone {
                    nonce,
                    problem: done.problem,
                    identity_applied: done.is_itself,
                };
                self.tell(MAIN_STREAM, &answer);
            }
            ToGuest::Unknown => {
                self.tell(
                    stream,
                    &ToHost::Unsupported {
                        text: "message of a newer version".into(),
                    },
                );
            }
        }
    }

    /// Commands of the host see the name that this guest has now; programs that run keep the environment they have.
    fn rename(&self, former: &str, now: &str) {
        if let Some(defaults) = self.exec.borrow_mut().as_mut()
            && defaults.env.get("HOSTNAME") == Some(former)
        {
            defaults.env.set("HOSTNAME", now);
        }
    }

    fn begin(
        self: Rc<Self>,
        stream: u32,
        request: doze_agent::message::ExecRequest,
    ) -> Result<(), String> {
        let Some(defaults) = self.exec.borrow().clone() else {
            return Err("this guest takes no commands: it was started without its agent (skip_guest_agent) \
                        or has not started its program yet"
                .into());
        };
        if stream == MAIN_STREAM || self.sessions.borrow().contains_key(&stream) {
            return Err(format!("stream {stream} is in use"));
        }
        if self.sessions.borrow().len() >= MAX_EXECS {
            return Err(format!("{MAX_EXECS} commands run already; end one first"));
        }
        exec::begin(&self, stream, request, defaults)
    }

    fn tell_status(&self) {
        let status = self.status.borrow();
        let age_us = |at: Instant| u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
        if let Some(at) = status.program_started {
            self.tell(MAIN_STREAM, &ToHost::ProgramStarted { age_us: age_us(at) });
        }
        if let Some(at) = status.agent_ready {
            self.tell(MAIN_STREAM, &ToHost::AgentReady { age_us: age_us(at) });
        }
        if let Some(text) = &status.boot_error {
            self.tell(MAIN_STREAM, &ToHost::BootError { text: text.clone() });
        }
        if let Some(exit) = &status.program_exit {
            self.tell(MAIN_STREAM, &ToHost::ProgramExited { exit: exit.clone() });
        }
    }

    /// What cannot be queued is for a stream that closed, or one of a thousand unread answers to a
    /// host that only asks: neither is worth more than dropping.
    fn tell(&self, stream: u32, message: &ToHost) {
        self.endpoint.send(stream, message).ok();
    }
}
