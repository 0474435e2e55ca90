//! A command in the guest, joined to this terminal (or to pipes).
//!
//! ```text
//!   stdin ──read──┐                                   ┌──> stdout
//!   SIGWINCH ─────┼──> ExecInput ══WebSocket══ ExecOutput
//!   SIGTERM/HUP ──┘ (leave; hanging up ends the command)
//! ```
//!
//! One task owns the input half, so a resize and a key cannot overtake each other.
use std::collections::BTreeMap;

use bytes::Bytes;
use doze_api::{
    ExecStart,
    client::{ExecEvent, ExecInput, ExecOutput, ExecSession},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    signal::unix::{Signal, SignalKind, signal},
};

use crate::{
    connection::Server,
    failure::{self, Failure},
    output,
    terminal::{self, RawMode},
};

/// What to run and how to be joined to it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub command: Vec<String>,
    /// Send standard input.
    pub interactive: bool,
    pub tty: bool,
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    /// Seconds; `None`: no limit.
    pub timeout: Option<u32>,
    /// Seconds to wait for a guest that still boots.
    pub wait_for_agent: u32,
}

/// Runs it to its end and returns its exit status.
pub async fn run(server: &Server, instance: &str, request: Request) -> Result<u8, Failure> {
    let raw = request.tty && request.interactive;
    if raw && !terminal::is_terminal(std::io::stdin()) {
        return Err(Failure::new(
            "-t needs a terminal on standard input; leave it out when input is piped",
        )
        .no_program());
    }
    let (rows, cols) = match request.tty.then(terminal::size).flatten() {
        Some((rows, cols)) => (Some(rows), Some(cols)),
        None => (None, None),
    };
    let start = ExecStart {
        command: request.command,
        tty: request.tty,
        env: (!request.env.is_empty()).then_some(request.env),
        cwd: request.cwd,
        timeout: request.timeout,
        wait_for_agent: Some(request.wait_for_agent),
        rows,
        cols,
    };
    let explain = |error| server.explain(&error).no_program();
    let program = start.command.first().cloned().unwrap_or_default();
    let session = server
        .client
        .exec(instance, &start)
        .await
        .map_err(explain)?;
    let restored_on_every_way_out = if raw {
        let entered = RawMode::enter();
        Some(entered.map_err(|e| {
            Failure::new(format!("cannot switch the terminal to raw mode: {e}")).no_program()
        })?)
    } else {
        None
    };
    let (status, silent) = join(server, session, request.interactive, request.tty).await?;
    drop(restored_on_every_way_out);
    if silent && let Some(reason) = unable(status) {
        output::remark(&format!("{program}: {reason}"));
    }
    Ok(status)
}

/// What a shell would say. The exit code is all we are told, and a program may end with the same one:
/// so this is said only when nothing else was.
fn unable(status: u8) -> Option<&'static str> {
    match status {
        126 => Some("cannot be run in the guest (exit status 126)"),
        127 => Some("not found in the guest (exit status 127)"),
        _ => None,
    }
}

/// Moves both directions at once: a command that does not read its input must not keep us from
/// reading its output, or both would wait for ever. The exit code ends it, or a signal. Gives the exit
/// status, and whether there was no output at all.
async fn join(
    server: &Server,
    session: ExecSession,
    interactive: bool,
    tty: bool,
) -> Result<(u8, bool), Failure> {
    let deaf = |e| Failure::new(format!("cannot wait for signals: {e}")).no_program();
    let mut terminate = signal(SignalKind::terminate()).map_err(deaf)?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(deaf)?;
    let resized = signal(SignalKind::window_change()).map_err(deaf)?;
    tokio::select! {
        status = show(server, session.output) => status,
        failure = feed(session.input, resized, interactive, tty) => Err(failure),
        _ = terminate.recv() => Ok((128 + 15, false)),
        _ = hang_up.recv() => Ok((128 + 1, false)),
    }
}

/// Output until the exit code.
async fn show(server: &Server, mut output: ExecOutput) -> Result<(u8, bool), Failure> {
    let mut stdout = tokio::io::stdout();
    let mut silent = true;
    while let Some(event) = output.next().await {
        match event.map_err(|error| server.explain(&error).no_program())? {
            ExecEvent::Output(data) => {
                silent = false;
                stdout
                    .write_all(&data)
                    .await
                    .map_err(|e| failure::output(&e))?;
                stdout.flush().await.map_err(|e| failure::output(&e))?;
            }
            ExecEvent::Exit(code) => return Ok((u8::try_from(code).unwrap_or(u8::MAX), silent)),
        }
    }
    Err(Failure::new("the server ended the command without an exit code").no_program())
}

/// Keys and sizes, as long as the command runs. Returns only when standard input cannot be read: how
/// the command ended, the output half says.
async fn feed(mut input: ExecInput, mut resized: Signal, interactive: bool, tty: bool) -> Failure {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; 16 << 10];
    let mut reading = interactive;
    if !interactive && !tty {
        // Nothing will come: a command that reads must not wait for it.
        let _ended = input.end().await;
    }
    loop {
        tokio::select! {
            _ = resized.recv(), if tty => if let Some((rows, cols)) = terminal::size() {
                let _ended = input.resize(rows, cols).await;
            },
            read = stdin.read(&mut buffer), if reading => match read {
                Ok(0) => {
                    reading = false;
                    // A command that is gone does not need to know.
                    let _ended = input.end().await;
                }
                Ok(count) => reading = input.write(Bytes::copy_from_slice(&buffer[..count])).await.is_ok(),
                Err(error) => return Failure::new(format!("cannot read standard input: {error}")).no_program(),
            },
            // Neither branch is left: wait for the output half.
            else => std::future::pending().await,
        }
    }
}
