//! A private network namespace and folder for the whole run, and somebody outside who cleans up.
//!
//! The process that the user started stays outside as supervisor; it re-executes itself inside
//! `doze-e2e-PID` and, when that ends in any way, kills what is left in the namespaces (by pid),
//! and removes namespaces and folder. If the supervisor itself is killed, the inner process gets
//! SIGKILL too (parent-death signal) and the next run sweeps what stayed behind.
//!
//! A second namespace `doze-e2e-PID-o`, joined by a veth pair, plays the world outside this host.
use std::{
    env, fs,
    io::{self, Write as _},
    net::Ipv4Addr,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

const PREFIX: &str = "doze-e2e-";
const ENV_NETNS: &str = "DOZE_E2E_INNER_NETNS";
const ENV_HOME: &str = "DOZE_E2E_INNER_HOME";
const ENV_HELPER: &str = "DOZE_E2E_HELPER";
const WITHOUT_CONNTRACK: &str = "without-conntrack";
/// Address of this host on the link to the outside (RFC 5737 test network).
pub const HOST_SIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Address of the outside.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// What the inner process works with.
#[derive(Debug, Clone)]
pub struct Sandbox {
    /// Name of our network namespace.
    pub netns: String,
    /// Private folder, short enough for unix sockets below it.
    pub home: PathBuf,
}

impl Sandbox {
    /// Name of the namespace outside this host.
    pub fn outside(&self) -> String {
        format!("{}-o", self.netns)
    }

    /// A process outside this host that accepts one TCP connection on [`OUTSIDE`]:`port`, and
    /// writes `listening`, then the peer's address to its stdout.
    pub fn outside_listener(&self, port: u16) -> Result<tokio::process::Command> {
        self.outside_helper("listen", port)
    }

    /// As [`Sandbox::outside_listener`], but it keeps the connection until its peer closes it.
    pub fn outside_keeper(&self, port: u16) -> Result<tokio::process::Command> {
        self.outside_helper("keep", port)
    }

    fn outside_helper(&self, task: &str, port: u16) -> Result<tokio::process::Command> {
        let mut command = tokio::process::Command::new("ip");
        command
            .args(["netns", "exec", &self.outside()])
            .arg(env::current_exe().context("own executable")?)
            .env(ENV_HELPER, format!("{task} {OUTSIDE}:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        Ok(command)
    }
}

/// The same program, for which this kernel has no connection tracking over netlink.
pub fn without_conntrack(program: &Command) -> Result<tokio::process::Command> {
    let mut command = tokio::process::Command::new(env::current_exe().context("own executable")?);
    command
        .arg(program.get_program())
        .args(program.get_args())
        .env(ENV_HELPER, WITHOUT_CONNTRACK);
    Ok(command)
}

/// Runs `inner` inside the sandbox. In the outer process this never runs `inner`.
pub fn enter(inner: impl FnOnce(Sandbox) -> ExitCode) -> ExitCode {
    if let Ok(task) = env::var(ENV_HELPER) {
        return helper(&task).map_or_else(|e| fail(&e), |()| ExitCode::SUCCESS);
    }
    match (env::var(ENV_NETNS), env::var(ENV_HOME)) {
        (Ok(netns), Ok(home)) => {
            let sandbox = Sandbox {
                netns,
                home: PathBuf::from(home),
            };
            match confirm(&sandbox) {
                Ok(()) => inner(sandbox),
                Err(e) => fail(&e),
            }
        }
        _ => supervise().unwrap_or_else(|e| fail(&e)),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("e2e: {error:#}");
    ExitCode::FAILURE
}

/// We must really be in the namespace: a mistake here would let the cases work on the host's network.
fn confirm(sandbox: &Sandbox) -> Result<()> {
    use std::os::unix::fs::MetadataExt as _;
    let named = Path::new("/run/netns").join(&sandbox.netns);
    let wanted = fs::metadata(&named).with_context(|| format!("{}", named.display()))?;
    let have = fs::metadata("/proc/self/ns/net").context("/proc/self/ns/net")?;
    ensure!(
        (wanted.dev(), wanted.ino()) == (have.dev(), have.ino()),
        "not inside network namespace {}",
        sandbox.netns
    );
    Ok(())
}

fn supervise() -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the end-to-end cases make network namespaces, TAP devices and mounts: run them as root (sudo make test)"
    );
    sweep()?;
    let netns = format!("{PREFIX}{}", std::process::id());
    let home = base().join(&netns);
    let sandbox = Sandbox { netns, home };
    let outcome = build(&sandbox).and_then(|()| run_inner(&sandbox));
    let cleanup = tear_down(&sandbox);
    match (outcome, cleanup) {
        (Ok(code), Ok(())) => Ok(code),
        (Err(e), Ok(())) | (Ok(_), Err(e)) => Err(e),
        (Err(e), Err(also)) => Err(e.context(format!("and the clean-up failed: {also:#}"))),
    }
}

/// Where runs put their folders. Short on purpose: a unix socket's path holds at most 107 bytes.
fn base() -> PathBuf {
    env::var_os("DOZE_E2E_DIR").map_or_else(env::temp_dir, PathBuf::from)
}

fn build(sandbox: &Sandbox) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::create_dir_all(sandbox.home.parent().unwrap_or(Path::new("/")))?;
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&sandbox.home)
        .with_context(|| format!("create {}", sandbox.home.display()))?;
    let (ns, out) = (&sandbox.netns, &sandbox.outside());
    ip(&["netns", "add", ns])?;
    ip(&["netns", "add", out])?;
    ip(&["-n", ns, "link", "set", "lo", "up"])?;
    ip(&["-n", out, "link", "set", "lo", "up"])?;
    ip(&[
        "link", "add", "uplink", "netns", ns, "type", "veth", "peer", "name", "host", "netns", out,
    ])?;
    ip(&[
        "-n",
        ns,
        "addr",
        "add",
        &format!("{HOST_SIDE}/24"),
        "dev",
        "uplink",
    ])?;
    ip(&[
        "-n",
        out,
        "addr",
        "add",
        &format!("{OUTSIDE}/24"),
        "dev",
        "host",
    ])?;
    ip(&["-n", ns, "link", "set", "uplink", "up"])?;
    ip(&["-n", out, "link", "set", "host", "up"])
}

fn run_inner(sandbox: &Sandbox) -> Result<ExitCode> {
    let mut child = Command::new("setpriv")
        .args([
            "--pdeathsig",
            "SIGKILL",
            "ip",
            "netns",
            "exec",
            &sandbox.netns,
        ])
        .arg(env::current_exe().context("own executable")?)
        .args(env::args_os().skip(1))
        .env(ENV_NETNS, &sandbox.netns)
        .env(ENV_HOME, &sandbox.home)
        .spawn()
        .context("setpriv (package util-linux)")?;
    let pid = Pid::from_child(&child);
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ])?;
    let handle = signals.handle();
    let watcher = std::thread::spawn(move || {
        // The first signal ends the inner process; clean-up follows in the main thread.
        if let Some(signal) = signals.forever().next() {
            eprintln!("e2e: got signal {signal}, ending");
            let _gone_already_is_fine = kill_process(pid, Signal::KILL);
        }
    });
    let status = child.wait().context("wait for the inner process")?;
    handle.close();
    ensure!(watcher.join().is_ok(), "the signal watcher panicked");
    if let Some(signal) = status.signal() {
        eprintln!("e2e: ended by signal {signal}");
    }
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Kills by pid what still runs inside our namespaces, then removes namespaces and folder.
fn tear_down(sandbox: &Sandbox) -> Result<()> {
    let mut problems = Vec::new();
    for ns in [sandbox.netns.clone(), sandbox.outside()] {
        if let Err(e) = remove_netns(&ns) {
            problems.push(format!("{e:#}"));
        }
    }
    if env::var_os("DOZE_E2E_KEEP").is_some() {
        eprintln!(
            "e2e: kept {} (DOZE_E2E_KEEP is set)",
            sandbox.home.display()
        );
    } else if let Err(e) = fs::remove_dir_all(&sandbox.home)
        && e.kind() != io::ErrorKind::NotFound
    {
        problems.push(format!("remove {}: {e}", sandbox.home.display()));
    }
    ensure!(problems.is_empty(), "{}", problems.join("; "));
    Ok(())
}

fn remove_netns(name: &str) -> Result<()> {
    if !Path::new("/run/netns").join(name).exists() {
        return Ok(());
    }
    // A killed process may have forked just before; a few rounds reach its children too.
    for _ in 0..5 {
        let pids = pids_in(name)?;
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            let _gone_already_is_fine = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    ip(&["netns", "del", name])
}

/// Processes inside a named network namespace, ourselves never among them.
fn pids_in(netns: &str) -> Result<Vec<Pid>> {
    let output = Command::new("ip")
        .args(["netns", "pids", netns])
        .output()
        .context("ip netns pids")?;
    ensure!(
        output.status.success(),
        "ip netns pids {netns}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let own = std::process::id();
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|l| l.trim().parse::<i32>().ok())
        .filter(|pid| u32::try_from(*pid) != Ok(own))
        .filter_map(Pid::from_raw)
        .collect())
}

/// Removes what runs whose supervisor was killed left behind.
fn sweep() -> Result<()> {
    let entries = match fs::read_dir("/run/netns") {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).context("/run/netns"),
    };
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(rest) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let pid = rest.trim_end_matches("-o");
        if pid.bytes().all(|b| b.is_ascii_digit()) && !Path::new("/proc").join(pid).exists() {
            eprintln!("e2e: removing {name}, left by a run that was killed");
            remove_netns(&name)?;
            match fs::remove_dir_all(base().join(&name)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).with_context(|| format!("remove its folder {name}"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("ip (package iproute2)")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// The helper roles this executable plays outside the host, and on the way to another program.
fn helper(task: &str) -> Result<()> {
    if task == WITHOUT_CONNTRACK {
        return hide_conntrack();
    }
    let (keep, address) = match task.split_once(' ') {
        Some(("listen", address)) => (false, address),
        Some(("keep", address)) => (true, address),
        _ => bail!("unknown helper task {task:?}"),
    };
    let listener =
        std::net::TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    println!("listening");
    io::stdout().flush()?;
    let (mut stream, peer) = listener.accept()?;
    println!("{}", peer.ip());
    io::stdout().flush()?;
    stream.write_all(b"hello from outside\n")?;
    if keep {
        io::copy(&mut stream, &mut io::sink())?;
    }
    Ok(())
}

/// Becomes the program in the arguments, with a filter (seccomp(2)) that refuses it, and whatever it starts, a
/// non-blocking netlink socket to netfilter, with the error of a kernel without nfnetlink. `nft` opens a
/// blocking one, so rules still work.
fn hide_conntrack() -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let is = |argument, operator, value: libc::c_int| {
        let value = u64::try_from(value)?;
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .map_err(anyhow::Error::from)
    };
    let nonblocking = u64::try_from(libc::SOCK_NONBLOCK)?;
    let socket = SeccompRule::new(vec![
        is(0, SeccompCmpOp::Eq, libc::AF_NETLINK)?,
        is(1, SeccompCmpOp::MaskedEq(nonblocking), libc::SOCK_NONBLOCK)?,
        is(2, SeccompCmpOp::Eq, libc::NETLINK_NETFILTER)?,
    ])?;
    let refuse = SeccompAction::Errno(u32::try_from(libc::EPROTONOSUPPORT)?);
    let filter: BpfProgram = SeccompFilter::new(
        [(libc::SYS_socket, vec![socket])].into(),
        SeccompAction::Allow,
        refuse,
        env::consts::ARCH.try_into()?,
    )?
    .try_into()?;
    seccompiler::apply_filter(&filter)?;
    let mut arguments = env::args_os().skip(1);
    let program = arguments.next().context("no program was named")?;
    let error = Command::new(&program)
        .args(arguments)
        .env_remove(ENV_HELPER)
        .exec();
    Err(error).with_context(|| program.display().to_string())
}
