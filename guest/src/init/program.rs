//! The instance's program: how it is started, where its output goes, why it ended.
use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use doze_agent::{
    config::{APP_LOG_PORT, GuestConfig},
    message::ProgramExit,
};
use rustix::{
    fs::{Mode, OFlags},
    process::Pid,
};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt, unix::AsyncFd},
    sync::oneshot,
};
use tokio_util::sync::CancellationToken;

use super::{BootError, console};
use crate::{
    agent::ExecDefaults,
    children::Children,
    output::{Source, output_pipe},
    port::{Port, PortStream},
    signals::{self, Ended},
    spawn::{DEFAULT_PATH, Env, Launch, StartError, Streams, spawn},
    users,
};

/// How long the log port may take to appear.
const LOG_PORT_WITHIN: Duration = Duration::from_secs(5);

/// The configuration, looked up in the image.
pub(super) struct Plan {
    argv: Vec<String>,
    defaults: ExecDefaults,
    pub stop_signal: i32,
}

impl Plan {
    pub(super) fn new(config: &GuestConfig) -> Result<Self, BootError> {
        let user = users::resolve(&config.user, Path::new("/"))?;
        let mut env = Env::parse(&config.env);
        env.set_default("PATH", DEFAULT_PATH);
        env.set_default("HOSTNAME", &config.hostname);
        env.set_default("HOME", &user.home);
        env.set_default("TERM", "xterm");
        let cwd = PathBuf::from(&config.working_dir);
        fs::create_dir_all(&cwd)
            .map_err(|e| BootError::io(format!("working directory {}", cwd.display()), e))?;
        let stop_signal = match config.stop_signal.as_str() {
            "" => libc::SIGTERM,
            name => signals::parse(name).ok_or_else(|| BootError::StopSignal(name.to_owned()))?,
        };
        Ok(Self {
            argv: config.argv.clone(),
            defaults: ExecDefaults { env, user, cwd },
            stop_signal,
        })
    }

    pub(super) fn exec_defaults(&self) -> ExecDefaults {
        self.defaults.clone()
    }
}

/// The program, running.
pub(super) struct Program {
    pub pid: Pid,
    pub started_at: Instant,
    pub ended: oneshot::Receiver<Ended>,
    pub log: Log,
}

/// Starts the program and the copying of its output.
pub(super) fn start(plan: &Plan, children: &Children) -> Result<Program, StartError> {
    let other = |source: io::Error| StartError::Other {
        command: plan.argv[0].clone(),
        source,
    };
    let (source, output) = output_pipe().map_err(other)?;
    let pid = spawn(Launch {
        argv: &plan.argv,
        env: &plan.defaults.env,
        cwd: &plan.defaults.cwd,
        user: &plan.defaults.user,
        streams: Streams::Pipes {
            stdin: None,
            output,
        },
    })?;
    let started_at = Instant::now();
    let ended = children.watch(pid);
    Ok(Program {
        pid,
        started_at,
        ended,
        log: Log::copy(source),
    })
}

/// The task that copies the program's output to the host.
pub(super) struct Log {
    ended: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Log {
    fn copy(source: Source) -> Self {
        let ended = CancellationToken::new();
        let task = tokio::task::spawn_local(copy(source, ended.clone()));
        Self { ended, task }
    }

    /// Waits until what was written so far is out. What comes later is not read any more.
    pub(super) async fn drain(self, within: Duration) {
        self.ended.cancel();
        if tokio::time::timeout(within, self.task).await.is_err() {
            console::say("the program's last output was not taken by the host in time");
        }
    }
}

async fn copy(source: Source, ended: CancellationToken) {
    let mut sink: Box<dyn AsyncWrite + Unpin> =
        match Port::named(APP_LOG_PORT, LOG_PORT_WITHIN).await {
            Ok(port) => Box::new(PortStream(port)),
            Err(error) => {
                console::debug(format_args!("program output goes to the console: {error}"));
                match Console::open() {
                    Ok(console) => Box::new(console),
                    Err(_) => Box::new(tokio::io::sink()),
                }
            }
        };
    let mut works = true;
    source
        .forward(&ended, async |bytes| {
            // A log that cannot be written must not stop the program: its output is then dropped.
            if works && let Err(error) = sink.write_all(&bytes).await {
                console::say(format_args!("program output is lost from here: {error}"));
                works = false;
            }
            true
        })
        .await;
}

/// The serial console, written when it is ready.
struct Console(AsyncFd<std::os::fd::OwnedFd>);

impl Console {
    fn open() -> io::Result<Self> {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/dev/console", flags, Mode::empty())?;
        Ok(Self(crate::sys::watch_fd(
            fd,
            tokio::io::Interest::WRITABLE,
        )?))
    }
}

impl AsyncWrite for Console {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(self.0.get_ref(), buf) {
                Err(rustix::io::Errno::AGAIN) => {
                    std::task::ready!(self.0.poll_write_ready(cx))?.clear_ready()
                }
                Err(rustix::io::Errno::INTR) => {}
                done => return std::task::Poll::Ready(done.map_err(Into::into)),
            }
        }
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::task::Poll::Ready(Ok(()))
    }
}

/// In words, with what the kernel knows: a process that it killed for memory looks like any other SIGKILL.
pub(super) fn describe(pid: Pid, ended: Ended) -> ProgramExit {
    let mut exit = ended.describe();
    if ended == Ended::Signaled(libc::SIGKILL) && killed_for_memory(pid.as_raw_nonzero().get()) {
        exit.message.push_str(" - OOM");
    }
    exit
}

/// Looks through the kernel's log (/dev/kmsg: one record per read) for the words of mm/oom_kill.c.
fn killed_for_memory(pid: i32) -> bool {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(log) = rustix::fs::open("/dev/kmsg", flags, Mode::empty()) else {
        return false;
    };
    let words = format!("ut of memory: Killed process {pid} ");
    let mut record = vec![0; 8192];
    loop {
        match rustix::io::read(&log, &mut record[..]) {
            Ok(0) => return false,
            Ok(n) if String::from_utf8_lossy(&record[..n]).contains(&words) => return true,
            // A record that was overwritten while reading is skipped by the next read.
            Ok(_) | Err(rustix::io::Errno::PIPE | rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}
