//! From the program's start to the power-off.
use std::time::Duration;

use doze_agent::{
    config::{CONTROL_PORT, GuestConfig},
    message::ProgramExit,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::{sync::mpsc, time::timeout};

use super::{
    BootError, console,
    identity::Me,
    mounts,
    program::{self, Plan, Program},
};
use crate::{
    agent::{Agent, Request, ThisKernel},
    children::Children,
    port::{Port, PortStream},
    sys::{Target, kill},
};

/// Without the control port nobody can command this guest, but its program runs.
const CONTROL_PORT_WITHIN: Duration = Duration::from_secs(30);
/// What the last words of program and agent may take to reach the host.
const LAST_WORDS_WITHIN: Duration = Duration::from_secs(1);
/// A boot error is all there is to tell, so the host gets time to connect.
const BOOT_ERROR_WITHIN: Duration = Duration::from_secs(5);
/// How long processes other than the program have to end by themselves.
const OTHERS_WITHIN: Duration = Duration::from_secs(2);
/// How long killed processes may take to be gone (one may be stuck in the kernel).
const KILLED_WITHIN: Duration = Duration::from_secs(2);
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(65_536),
    maximum: Some(1_048_576),
};

/// Returns when the machine may be switched off.
pub(super) async fn live(booted: Result<GuestConfig, BootError>, root: Option<&mounts::Root>) {
    let children = match Children::new(true) {
        Ok(children) => children,
        Err(error) => return console::say(format_args!("cannot watch processes: {error}")),
    };
    let kernel = ThisKernel(booted.as_ref().ok().map(Me::of));
    let (agent, requests) = Agent::new(epoch(), children.clone(), Box::new(kernel));
    tokio::task::spawn_local(serve(agent.clone()));
    let planned = booted.and_then(|config| Ok((Plan::new(&config)?, config.skip_guest_agent)));
    let ran = match planned {
        Ok((plan, skip_agent)) => Ok(run(&plan, skip_agent, &agent, &children, requests).await),
        Err(error) => Err(error),
    };
    let within = match ran {
        Ok(exit) => {
            console::exit_marker(&exit);
            agent.program_exited(exit);
            LAST_WORDS_WITHIN
        }
        Err(error) => {
            console::say(format_args!("boot error: {error}"));
            agent.boot_error(error.to_string());
            BOOT_ERROR_WITHIN
        }
    };
    finish(&agent, &children, root, within).await;
}

/// Runs the program to its end.
async fn run(
    plan: &Plan,
    skip_agent: bool,
    agent: &Agent,
    children: &Children,
    mut requests: mpsc::UnboundedReceiver<Request>,
) -> ProgramExit {
    if let Err(error) = setrlimit(Resource::Nofile, OPEN_FILES) {
        console::debug(format_args!("limit of open files stays: {error}"));
    }
    let mut program = match program::start(plan, children) {
        Ok(program) => program,
        Err(error) => return error.exit(),
    };
    console::debug("program started");
    agent.program_started(program.started_at);
    if !skip_agent {
        agent.ready(plan.exec_defaults());
    }
    let exit = await_end(plan, &mut program, &mut requests).await;
    program.log.drain(LAST_WORDS_WITHIN).await;
    exit
}

async fn await_end(
    plan: &Plan,
    program: &mut Program,
    requests: &mut mpsc::UnboundedReceiver<Request>,
) -> ProgramExit {
    let pid = program.pid.as_raw_nonzero().get();
    let mut deadline = None;
    loop {
        tokio::select! {
            ended = &mut program.ended => {
                return match ended {
                    Ok(ended) => program::describe(program.pid, ended),
                    // The table of children holds the sender until the end.
                    Err(_) => ProgramExit { code: 255, message: "the program's end was not observed".into() },
                };
            }
            Some(Request::Shutdown { grace }) = requests.recv() => {
                console::debug(format_args!("shutdown with {grace:?} of grace"));
                // A process that ended this moment cannot be signalled, and need not be.
                kill(Target::Process(pid), plan.stop_signal).ok();
                let at = tokio::time::Instant::now().checked_add(grace);
                deadline = match (deadline, at) {
                    (Some(old), Some(new)) => Some(std::cmp::min(old, new)),
                    (old, new) => old.or(new),
                };
            }
            () = async {
                match deadline {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            } => {
                deadline = None;
                kill(Target::Group(pid), libc::SIGKILL).ok();
            }
        }
    }
}

/// Ends everybody else, gets the last words out, leaves the disk clean.
async fn finish(agent: &Agent, children: &Children, root: Option<&mounts::Root>, within: Duration) {
    let others = async {
        kill(Target::Everybody, libc::SIGTERM).ok();
        kill(Target::Everybody, libc::SIGCONT).ok();
        if timeout(OTHERS_WITHIN, children.alone()).await.is_err() {
            kill(Target::Everybody, libc::SIGKILL).ok();
            if timeout(KILLED_WITHIN, children.alone()).await.is_err() {
                console::say("a process cannot be killed; powering off all the same");
            }
        }
    };
    let told = timeout(within, agent.flushed());
    let ((), told) = tokio::join!(others, told);
    console::debug(match told {
        Ok(()) => "the host knows",
        Err(_) => "no host to tell",
    });
    if let Some(root) = root {
        root.close();
    }
    console::debug("powering off");
}

/// Serves the control port whenever the host is connected.
async fn serve(agent: Agent) {
    let port = match Port::named(CONTROL_PORT, CONTROL_PORT_WITHIN).await {
        Ok(port) => port,
        Err(error) => return console::say(format_args!("no control channel: {error}")),
    };
    console::debug("control port open");
    loop {
        if let Err(error) = port.connected().await {
            return console::say(format_args!("control channel: {error}"));
        }
        let stream = PortStream(port.clone());
        if let Err(error) = agent.serve(stream.clone(), stream).await {
            console::say(format_args!("control channel: {error}"));
            // An error that stays would make this loop spin.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Random per boot: the kernel's own boot id.
fn epoch() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&digits, 16).unwrap_or_else(|_| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        now.tv_nsec.cast_unsigned() ^ now.tv_sec.cast_unsigned().rotate_left(32)
    })
}
