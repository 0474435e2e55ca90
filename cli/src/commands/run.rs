//! `doze run`: from an image to a running program, in one of three ways.
//!
//! ```text
//!   -d         create ── wait for Running ── print the id
//!   (plain)    create ── follow the log until the program ends ── pass its exit status on
//!   -i / -t    create, its program a shell that only waits ── exec the image's program on this
//!              terminal ── it ends: stop (or delete) the instance ── pass its exit status on
//! ```
//!
//! The API runs a program without an input and gives a terminal only to exec; hence the third way.
use std::collections::BTreeMap;

use doze_api::{
    CreateInstanceRequest, CreateNetwork, Hypervisor, Instance, InstanceState,
    client::LogsQuery,
    policy::{SnapshotCompressionConfig, SnapshotPolicy},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{common, compression, logs};
use crate::{
    attach,
    connection::{self, Server},
    failure::{Failure, INTERRUPTED, NO_PROGRAM},
    names, output,
};

/// Make an instance from an image and run it
///
/// Without -d, the program's output is shown until it ends, and its exit status is passed through
/// (125 when there is none, because doze itself failed). Ctrl-C stops the instance.
///
/// With -i or -t, the image's entrypoint with COMMAND runs joined to this terminal, inside an
/// instance whose own program only waits (the image needs /bin/sh and sleep for that). When it ends,
/// the instance is stopped, or deleted with --rm. To join a service that goes on running, use
/// `doze run -d` and then `doze exec -it`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the instance; made up when absent
    #[arg(long)]
    name: Option<String>,
    /// Print the id as soon as it runs, and leave it running
    #[arg(short, long, conflicts_with_all = ["interactive", "tty", "rm"])]
    detach: bool,
    /// Send standard input to the program
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// Delete the instance when its program has ended
    #[arg(long)]
    rm: bool,
    /// Environment variable; KEY alone passes on the value it has here
    #[arg(short, long = "env", value_name = "KEY[=VALUE]", value_parser = common::env_pair)]
    env: Vec<(String, String)>,
    /// Memory, for example 512MB
    #[arg(short, long, alias = "size", value_name = "SIZE")]
    memory: Option<String>,
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT")]
    cpus: Option<i64>,
    /// Size of the writable disk, for example 2GB
    #[arg(long, alias = "overlay-size", value_name = "SIZE")]
    overlay: Option<String>,
    /// Machine monitor, for example qemu or qemu-microvm
    #[arg(long, value_name = "MONITOR")]
    hypervisor: Option<Hypervisor>,
    /// Tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Replace the image's entrypoint (and drop its command)
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// Leave the instance without a network
    #[arg(long)]
    no_network: bool,
    /// Compress its memory whenever it sleeps and in its snapshots: zstd or lz4, with a level if need be (zstd:3);
    /// none: keep it as it is. Without it, the server decides
    #[arg(long, value_name = compression::FORM, value_parser = compression::wanted)]
    compress: Option<SnapshotCompressionConfig>,
    /// Let it sleep so long before its memory is compressed, for example 5m
    #[arg(long, value_name = "DURATION")]
    compress_delay: Option<String>,
    /// Print JSON (with -d)
    #[arg(long, requires = "detach")]
    json: bool,
    /// Image, for example redis or redis:7
    image: String,
    /// Replaces the image's command
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "COMMAND"
    )]
    command: Vec<String>,
}

/// Waits, does nothing, and ends when asked to. Every signal an image may name as its stop signal.
const WAITING: &str =
    "trap 'exit 0' TERM INT QUIT HUP USR1 USR2; while :; do sleep 86400 & wait $!; done";
/// Names that were made up may be taken; three tries make a fourth unlikely to be needed.
const NAME_TRIES: usize = 3;

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options).map_err(Failure::no_program)?;
    let attached = args.interactive || args.tty;
    // Asked before anything is made: an image that is not there is the likeliest mistake.
    let program = if attached {
        program(&server, &args).await.map_err(Failure::no_program)?
    } else {
        Vec::new()
    };
    let mut ends = Ends::listen()
        .map_err(|e| Failure::new(format!("cannot wait for signals: {e}")).no_program())?;
    let instance = create(&server, request(&args, attached), args.name.is_none())
        .await
        .map_err(Failure::no_program)?;
    if args.detach {
        return detached(&server, &instance, args.json, args.name.is_none()).await;
    }
    let outcome = tokio::select! {
        outcome = joined(&server, &instance, &args, program) => outcome,
        status = ends.next(), if !args.tty => interrupted(&server, &instance, status, &mut ends).await,
    };
    if args.rm {
        remove(&server, &instance).await;
    }
    outcome
}

/// The ways a person says "enough".
struct Ends {
    interrupt: Signal,
    terminate: Signal,
}

impl Ends {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Exit status that belongs to the signal.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => 128 + 15,
        }
    }
}

fn request(args: &Args, attached: bool) -> CreateInstanceRequest {
    let some_map = |map: BTreeMap<_, _>| (!map.is_empty()).then_some(map);
    let (entrypoint, cmd) = if attached {
        let shell = ["/bin/sh", "-c", WAITING].map(str::to_owned).to_vec();
        (Some(shell), Some(Vec::new()))
    } else {
        let cmd =
            (!args.command.is_empty() || args.entrypoint.is_some()).then(|| args.command.clone());
        (args.entrypoint.clone().map(|program| vec![program]), cmd)
    };
    CreateInstanceRequest {
        name: args
            .name
            .clone()
            .unwrap_or_else(|| names::generate(&mut rand::rng())),
        image: args.image.clone(),
        hypervisor: args.hypervisor,
        vcpus: args.cpus,
        size: args.memory.clone(),
        overlay_size: args.overlay.clone(),
        env: some_map(common::map(args.env.clone())),
        entrypoint,
        cmd,
        tags: some_map(common::map(args.tags.clone())),
        network: args.no_network.then(|| CreateNetwork {
            enabled: Some(false),
            ..CreateNetwork::default()
        }),
        snapshot_policy: (args.compress.is_some() || args.compress_delay.is_some()).then(|| {
            SnapshotPolicy {
                compression: args.compress.clone(),
                standby_compression_delay: args.compress_delay.clone(),
            }
        }),
        ..CreateInstanceRequest::default()
    }
}

/// What the image would run, with the overrides of the command line.
async fn program(server: &Server, args: &Args) -> Result<Vec<String>, Failure> {
    let image = server
        .client
        .get_image(&args.image)
        .await
        .map_err(|e| match e.status() {
            Some(404) => Failure::new(format!(
                "image {:?} is not on this host; import it first (doze image import NAME PATH)",
                args.image
            )),
            _ => server.explain(&e),
        })?;
    let mut program = match &args.entrypoint {
        Some(program) => vec![program.clone()],
        None => image.entrypoint.unwrap_or_default(),
    };
    if !args.command.is_empty() {
        program.extend(args.command.iter().cloned());
    } else if args.entrypoint.is_none() {
        program.extend(image.cmd.unwrap_or_default());
    }
    if program.is_empty() {
        return Err(Failure::new(format!(
            "image {:?} names no program to run; add one to the command line",
            args.image
        )));
    }
    Ok(program)
}

async fn create(
    server: &Server,
    mut request: CreateInstanceRequest,
    made_up: bool,
) -> Result<Instance, Failure> {
    let mut tries = 1;
    loop {
        match server.client.create_instance(&request).await {
            Ok(instance) => return Ok(instance),
            Err(e)
                if made_up
                    && tries < NAME_TRIES
                    && matches!(e.code(), Some("name_conflict" | "already_exists")) =>
            {
                request.name = names::generate(&mut rand::rng());
                tries += 1;
            }
            Err(e) => return Err(server.explain(&e)),
        }
    }
}

async fn detached(
    server: &Server,
    instance: &Instance,
    json: bool,
    made_up: bool,
) -> Result<u8, Failure> {
    let instance = common::settled(server, &instance.id)
        .await
        .map_err(Failure::no_program)?;
    // What it printed before it failed is still there to be looked at, so it stays.
    common::started(&instance).map_err(|failure| match failure {
        Failure::Message { status: 1, text } => Failure::Message {
            status: NO_PROGRAM,
            text,
        },
        other => other,
    })?;
    if json {
        output::json(&instance)?
    } else {
        output::line(&instance.id)?;
        if made_up {
            output::remark(&format!("its name is {}", instance.name));
        }
    }
    Ok(0)
}

async fn joined(
    server: &Server,
    instance: &Instance,
    args: &Args,
    program: Vec<String>,
) -> Result<u8, Failure> {
    if !args.interactive && !args.tty {
        return followed(server, instance).await.map_err(keep_status);
    }
    let ready = common::settled(server, &instance.id)
        .await
        .map_err(Failure::no_program)?;
    if ready.state != InstanceState::Running {
        return Err(not_ready(&ready));
    }
    let request = attach::Request {
        command: program,
        interactive: args.interactive,
        tty: args.tty,
        wait_for_agent: 30,
        ..attach::Request::default()
    };
    let outcome = attach::run(server, &instance.id, request).await;
    if !args.rm {
        stop(server, instance).await;
    }
    outcome
}

/// A program's own 126 and 127 stay; everything else that failed here was not the program.
fn keep_status(failure: Failure) -> Failure {
    match failure {
        Failure::Message { status: 1, text } => Failure::Message {
            status: NO_PROGRAM,
            text,
        },
        other => other,
    }
}

fn not_ready(instance: &Instance) -> Failure {
    let text = match instance.exit_code {
        Some(code) => format!(
            "-i and -t need /bin/sh and sleep in the image, and starting them ended with: {}; use `doze run` without them",
            common::ending(instance, code)
        ),
        None => format!(
            "{} is {} instead of Running{}; `doze logs --source vmm {}` shows its boot",
            instance.name,
            instance.state,
            common::why(instance),
            instance.name
        ),
    };
    Failure::new(text).no_program()
}

/// Shows the log until the program has ended, then what of it has not come yet.
async fn followed(server: &Server, instance: &Instance) -> Result<u8, Failure> {
    let id = instance.id.as_str();
    let explain = |e| server.explain(&e);
    let all = |follow| LogsQuery {
        tail: Some(logs::ALL),
        follow,
        ..LogsQuery::default()
    };
    let mut lines = server.client.logs(id, &all(true)).await.map_err(explain)?;
    let mut shown = 0;
    let ended = stopped(server, id);
    tokio::pin!(ended);
    let instance = loop {
        tokio::select! {
            line = lines.next() => match line {
                Some(line) => {
                    output::line(&line.map_err(explain)?)?;
                    shown += 1;
                }
                // The instance was deleted under us, or the server is going down; the wait tells.
                None => break ended.await?,
            },
            instance = &mut ended => break instance?,
        }
    };
    drop(lines);
    let server = &server.renewed()?;
    let explain = |e| server.explain(&e);
    // The stream has no mark for "that was all", so the rest comes from a second look.
    let mut rest = server.client.logs(id, &all(false)).await.map_err(explain)?;
    let mut skipped = 0;
    while let Some(line) = rest.next().await {
        let line = line.map_err(explain)?;
        if skipped < shown {
            skipped += 1;
        } else {
            output::line(&line)?;
        }
    }
    match instance.exit_code {
        Some(code) => {
            if instance
                .exit_message
                .as_deref()
                .is_some_and(|message| !message.is_empty())
                && code >= 126
            {
                output::remark(&format!(
                    "{}: {}",
                    instance.name,
                    common::ending(&instance, code)
                ));
            }
            Ok(u8::try_from(code).unwrap_or(u8::MAX))
        }
        None => Err(Failure::new(format!(
            "{} is {} and its program left no exit code{}",
            instance.name,
            instance.state,
            common::why(&instance)
        ))),
    }
}

/// The instance once it rests, however long that takes.
async fn stopped(server: &Server, id: &str) -> Result<Instance, Failure> {
    loop {
        let server = &server.renewed()?;
        let wait = server
            .client
            .wait_instance(id, InstanceState::Stopped, Some("5m"))
            .await;
        if !wait.map_err(|e| server.explain(&e))?.timed_out {
            return server
                .client
                .get_instance(id)
                .await
                .map_err(|e| server.explain(&e));
        }
    }
}

/// The first signal stops the instance, a second one leaves it to itself.
async fn interrupted(
    server: &Server,
    instance: &Instance,
    status: u8,
    ends: &mut Ends,
) -> Result<u8, Failure> {
    output::remark(&format!(
        "stopping {} (again: leave it running)",
        instance.name
    ));
    tokio::select! {
        () = stop(server, instance) => {}
        _ = ends.next() => {}
    }
    Ok(status)
}

/// What goes wrong here must not hide how the program ended.
async fn stop(server: &Server, instance: &Instance) {
    let outcome = async {
        let server = server.renewed()?;
        let stopped = server.client.stop_instance(&instance.id).await;
        stopped.map(drop).map_err(|e| server.explain(&e))
    };
    if let Err(failure) = outcome.await {
        output::remark(&format!("could not stop {}: {failure}", instance.name));
    }
}

async fn remove(server: &Server, instance: &Instance) {
    let outcome = async {
        let server = server.renewed()?;
        let deleted = server
            .client
            .delete_instance(&instance.id, Some(false))
            .await;
        deleted.map_err(|e| server.explain(&e))
    };
    if let Err(failure) = outcome.await {
        output::remark(&format!("could not delete {}: {failure}", instance.name));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Args {
        Line::try_parse_from(std::iter::once(&"run").chain(words))
            .unwrap()
            .args
    }

    #[test]
    fn options_become_the_request() {
        let args = parse(&[
            "-d",
            "--name",
            "web",
            "-e",
            "A=1",
            "-e",
            "A=2",
            "-m",
            "256MB",
            "--cpus",
            "2",
            "--overlay",
            "1GB",
            "--hypervisor",
            "qemu-microvm",
            "--tag",
            "team=x",
            "--no-network",
            "redis",
            "redis-server",
            "--port",
            "1",
        ]);
        let request = request(&args, false);
        assert_eq!(request.name, "web");
        assert_eq!(request.env.unwrap()["A"], "2");
        assert_eq!(request.size.as_deref(), Some("256MB"));
        assert_eq!(request.vcpus, Some(2));
        assert_eq!(request.hypervisor, Some(Hypervisor::QemuMicrovm));
        assert_eq!(request.network.unwrap().enabled, Some(false));
        assert_eq!(request.entrypoint, None);
        assert_eq!(request.cmd.unwrap(), ["redis-server", "--port", "1"]);
    }

    #[test]
    fn what_was_not_said_is_left_to_the_server() {
        let request = request(&parse(&["redis"]), false);
        assert_eq!(
            CreateInstanceRequest {
                name: String::new(),
                ..request
            },
            CreateInstanceRequest {
                image: "redis".to_owned(),
                ..CreateInstanceRequest::default()
            }
        );
    }

    #[test]
    fn an_entrypoint_drops_the_images_command() {
        let request = request(&parse(&["--entrypoint", "/bin/ls", "redis"]), false);
        assert_eq!(request.entrypoint.unwrap(), ["/bin/ls"]);
        assert_eq!(request.cmd, Some(Vec::new()));
    }

    #[test]
    fn attached_the_instance_only_waits() {
        let request = request(&parse(&["-it", "redis", "sh"]), true);
        assert_eq!(request.entrypoint.unwrap()[0], "/bin/sh");
        assert_eq!(request.cmd, Some(Vec::new()));
    }

    #[test]
    fn contradictions_are_refused() {
        for words in [
            &["run", "-d", "-t", "x"][..],
            &["run", "-d", "--rm", "x"],
            &["run", "--json", "x"],
            &["run"],
        ] {
            assert!(Line::try_parse_from(words).is_err(), "{words:?}");
        }
    }
}
