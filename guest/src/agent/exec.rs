//! One command of the host: its streams, its time limit, its end.
//!
//! ```text
//!   input (data, close) ──> stdin or terminal          output ──> stream, with the peer's credit
//!   timeout ──SIGKILL to the group──┐
//!   process ends <──────────────────┘ ──> drain what is there ──> ExecExited
//!   handle dropped (host gone, Kill) ──> SIGKILL to the group, nothing more is said
//! ```
use std::{io, os::fd::OwnedFd, path::PathBuf, rc::Rc, time::Duration};

use bytes::Bytes;
use doze_agent::message::{ExecRequest, ProgramExit, ToHost};
use rustix::{
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::Pid,
    pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::{mpsc, oneshot},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{ExecDefaults, Inner};
use crate::{
    output::{Source, output_pipe, set_nonblocking},
    signals::Ended,
    spawn::{Launch, StartError, Streams, spawn},
    sys::{Target, kill, watch_fd},
};

/// `^D`, what a terminal takes for the end of input.
const END_OF_TRANSMISSION: &[u8] = &[4];

pub(super) enum Input {
    Data(Bytes),
    Close,
}

/// The host's grip on a session; dropping it ends the session.
pub(super) struct Handle {
    input: mpsc::UnboundedSender<Input>,
    terminal: Option<Rc<OwnedFd>>,
    _abandon: DropGuard,
}

impl Handle {
    /// Bounded by the stream's credit. A session that takes no more input ignores it.
    pub(super) fn input(&self, input: Input) {
        self.input.send(input).ok();
    }

    pub(super) fn resize(&self, rows: u16, cols: u16) {
        if let Some(terminal) = &self.terminal {
            // Fails only once the terminal is closed, when its size matters to nobody.
            resize(terminal, rows, cols).ok();
        }
    }
}

fn resize(terminal: &OwnedFd, rows: u16, cols: u16) -> io::Result<()> {
    Ok(tcsetwinsize(
        terminal,
        Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?)
}

/// Both sides of a command's streams.
struct Plumbing {
    theirs: Streams,
    output: Source,
    input: AsyncFd<OwnedFd>,
    terminal: Option<Rc<OwnedFd>>,
}

fn pipes() -> io::Result<Plumbing> {
    let (stdin, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    set_nonblocking(&writer)?;
    let (output, theirs) = output_pipe()?;
    Ok(Plumbing {
        theirs: Streams::Pipes {
            stdin: Some(stdin),
            output: theirs,
        },
        output,
        input: watch_fd(writer, Interest::WRITABLE)?,
        terminal: None,
    })
}

fn terminal(request: &ExecRequest) -> io::Result<Plumbing> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    resize(
        &master,
        request.rows.unwrap_or(24),
        request.cols.unwrap_or(80),
    )?;
    Ok(Plumbing {
        theirs: Streams::Terminal(slave),
        output: Source::new(master.try_clone()?)?,
        input: watch_fd(master.try_clone()?, Interest::WRITABLE)?,
        terminal: Some(Rc::new(master)),
    })
}

/// Starts a command and the task that looks after it. The error is for the host to read.
pub(super) fn begin(
    agent: &Rc<Inner>,
    stream: u32,
    request: ExecRequest,
    defaults: ExecDefaults,
) -> Result<(), String> {
    let plumbing = if request.tty {
        terminal(&request)
    } else {
        pipes()
    };
    let plumbing = plumbing.map_err(|e| format!("the command's streams cannot be made: {e}"))?;
    let mut env = defaults.env;
    if request.tty {
        env.set("TERM", "xterm");
    }
    for (key, value) in &request.env {
        env.set(key, value);
    }
    let cwd = request.cwd.as_deref().map_or(defaults.cwd.clone(), |c| {
        defaults.cwd.join(PathBuf::from(c))
    });
    let started = spawn(Launch {
        argv: &request.command,
        env: &env,
        cwd: &cwd,
        user: &defaults.user,
        streams: plumbing.theirs,
    });
    let pid = match started {
        Ok(pid) => pid,
        Err(error @ (StartError::NotFound(_) | StartError::Denied(_) | StartError::Cwd { .. })) => {
            agent.tell(stream, &ToHost::ExecExited { exit: error.exit() });
            agent.endpoint.close(stream);
            return Ok(());
        }
        Err(error @ StartError::Other { .. }) => return Err(error.to_string()),
    };
    let ended = agent.children.watch(pid);
    let (sender, receiver) = mpsc::unbounded_channel();
    let abandoned = CancellationToken::new();
    let handle = Handle {
        input: sender,
        terminal: plumbing.terminal,
        _abandon: abandoned.clone().drop_guard(),
    };
    agent.sessions.borrow_mut().insert(stream, handle);
    agent.tell(stream, &ToHost::ExecStarted);
    let session = Session {
        agent: agent.clone(),
        stream,
        pid,
        ended,
        timeout: request.timeout_ms.map(Duration::from_millis),
        output: plumbing.output,
        tty: request.tty,
    };
    tokio::task::spawn_local(session.run(plumbing.input, receiver, abandoned));
    Ok(())
}

struct Session {
    agent: Rc<Inner>,
    stream: u32,
    pid: Pid,
    ended: oneshot::Receiver<Ended>,
    timeout: Option<Duration>,
    output: Source,
    tty: bool,
}

impl Session {
    async fn run(
        self,
        input: AsyncFd<OwnedFd>,
        inputs: mpsc::UnboundedReceiver<Input>,
        abandoned: CancellationToken,
    ) {
        let Self {
            agent,
            stream,
            pid,
            ended,
            timeout,
            output,
            tty,
        } = self;
        let over = CancellationToken::new();
        let group = Target::Group(pid.as_raw_nonzero().get());
        let end = async {
            let exit = wait(ended, timeout, group).await;
            over.cancel();
            exit
        };
        let output = output.forward(&over, async |bytes| {
            agent.endpoint.write(stream, bytes).await.is_ok()
        });
        let exit = tokio::select! {
            exit = async { tokio::join!(end, output).0 } => exit,
            () = abandoned.cancelled() => {
                // It may have ended this very moment.
                kill(group, libc::SIGKILL).ok();
                return;
            }
            never = feed(input, inputs, &agent, stream, tty) => match never {},
        };
        agent.tell(stream, &ToHost::ExecExited { exit });
        agent.endpoint.close(stream);
        agent.sessions.borrow_mut().remove(&stream);
    }
}

async fn wait(
    mut ended: oneshot::Receiver<Ended>,
    timeout: Option<Duration>,
    group: Target,
) -> ProgramExit {
    // The sender lives in the table of children until the end is known.
    let lost = ProgramExit {
        code: 255,
        message: "the command's end was not observed".into(),
    };
    let Some(limit) = timeout else {
        return ended.await.map_or(lost, Ended::describe);
    };
    match tokio::time::timeout(limit, &mut ended).await {
        Ok(end) => end.map_or(lost, Ended::describe),
        Err(_) => {
            kill(group, libc::SIGKILL).ok();
            // Its end was decided; whether the last moment brought another one does not matter.
            ended.await.ok();
            ProgramExit {
                code: 124,
                message: format!("timed out after {} ms", limit.as_millis()),
            }
        }
    }
}

/// Passes input on for as long as the session lives.
async fn feed(
    target: AsyncFd<OwnedFd>,
    mut inputs: mpsc::UnboundedReceiver<Input>,
    agent: &Inner,
    stream: u32,
    tty: bool,
) -> std::convert::Infallible {
    let mut target = Some(target);
    while let Some(input) = inputs.recv().await {
        match input {
            Input::Data(bytes) => {
                if let Some(fd) = &target
                    && write_all(fd, &bytes).await.is_err()
                {
                    // The command closed its input; the rest is read and dropped, as a shell's pipe would.
                    target = None;
                }
                agent.endpoint.consumed(stream, bytes.len());
            }
            Input::Close => {
                let closed = target.take();
                if let (true, Some(fd)) = (tty, closed) {
                    write_all(&fd, END_OF_TRANSMISSION).await.ok();
                }
            }
        }
    }
    std::future::pending().await
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd.get_ref(), bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => fd.writable().await?.clear_ready(),
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}
