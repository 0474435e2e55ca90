//! Two network namespaces with a wire between them: the client's is the host's, and is tracked.
use std::{
    collections::BTreeSet,
    future::Future,
    io::{BufRead, BufReader},
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    process::{Child, ChildStdin, Command, Stdio},
    time::Duration,
};

use doze_host::conntrack::{Event, Events, Flow, Observer, Options, TcpState};
use rustix::net::{
    AddressFamily, SendFlags, SocketType,
    netlink::{NETFILTER, SocketAddrNetlink},
    recv, sendto, socket,
};

use crate::encode::{self, Connection};

const INSIDE: &str = "DOZE_TEST_OUTER_NAMESPACE";
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub const PORT: u16 = 7777;
/// Only how long a test waits before it fails; no test asserts a time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the body of the test `name` inside a new network namespace, which ends with it and takes
/// along whatever the test made: the test binary starts itself again under unshare(1).
pub fn inside<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    let here = std::fs::read_link("/proc/self/ns/net").unwrap();
    let here = here.to_str().unwrap();
    if let Ok(outer) = std::env::var(INSIDE) {
        assert_ne!(outer, here, "still in the host's network namespace");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        return runtime.block_on(async { patient(name, body()).await });
    }
    let output = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, here)
        .output()
        .expect("this test needs the program unshare (package util-linux)");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} inside a network namespace of its own: {}; it needs root (CAP_SYS_ADMIN, \
         CAP_NET_ADMIN), and is not skipped without\n{text}",
        output.status
    );
}

pub async fn patient<T>(what: &str, waiting: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, waiting).await;
    waited.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain: {what}"))
}

pub fn run(command: &str) {
    let status = Command::new("sh").args(["-ec", command]).status().unwrap();
    assert!(status.success(), "{command}: {status}");
}

/// Makes the kernel track the connections of this namespace.
pub fn track() {
    run("ip link set lo up && nft 'add table inet t; \
         add chain inet t c { type filter hook prerouting priority 0; }; \
         add rule inet t c ct state new counter'");
}

/// A namespace behind a veth pair, as a guest is behind its TAP. It ends with the process in it.
pub struct Guest {
    holder: Child,
    /// Its end ends the holder.
    _stdin: ChildStdin,
}

impl Guest {
    pub fn start() -> Self {
        track();
        let mut holder = Command::new("unshare")
            .args([
                "--net",
                "--",
                "sh",
                "-ec",
                "echo ready; read -r end || true",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = holder.stdin.take().unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(holder.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let pid = holder.id();
        run(&format!(
            "ip link add doze-a type veth peer name doze-b netns {pid}
             ip addr add {HOST}/24 dev doze-a && ip link set doze-a up
             nsenter --net=/proc/{pid}/ns/net sh -ec \
             'ip link set lo up; ip addr add {GUEST}/24 dev doze-b; ip link set doze-b up'"
        ));
        Self {
            holder,
            _stdin: stdin,
        }
    }

    /// Runs in a thread of the guest's namespace, so its sockets are the guest's.
    pub fn enter<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/proc/{}/ns/net", self.holder.id());
        let namespace = std::fs::File::open(path).unwrap();
        let thread = std::thread::spawn(move || {
            use std::os::fd::AsFd;
            let network = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(network)).unwrap();
            body()
        });
        thread.join().unwrap()
    }

    pub fn listen(&self) -> std::net::TcpListener {
        self.enter(|| std::net::TcpListener::bind((GUEST, PORT)).unwrap())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

pub async fn observer() -> Observer {
    Observer::open(Options::default()).await.unwrap()
}

/// The next event about a connection to this port.
pub async fn next(events: &mut Events, port: u16) -> Event {
    let wanted = async {
        loop {
            let event = events.next().await;
            match &event {
                Event::New(flow) | Event::Update(flow) | Event::Destroy(flow)
                    if flow.original.destination_port != port => {}
                _ => return event,
            }
        }
    };
    patient("an event", wanted).await
}

/// Changes the kernel's table without packets.
pub struct Injector(OwnedFd);

impl Injector {
    pub fn new() -> Self {
        Self(socket(AddressFamily::NETLINK, SocketType::RAW, Some(NETFILTER)).unwrap())
    }

    pub fn send(&self, messages: &[u8]) {
        let kernel = SocketAddrNetlink::new(0, 0);
        let sent = sendto(&self.0, messages, SendFlags::empty(), &kernel).unwrap();
        assert_eq!(sent, messages.len());
        let mut buffer = [0; 4096];
        // Only errors are answered.
        let answer = recv(&self.0, &mut buffer, rustix::net::RecvFlags::DONTWAIT);
        assert!(answer.is_err(), "the kernel refused: {buffer:02x?}");
    }

    pub fn create(&self, connections: impl IntoIterator<Item = Connection>, state: u8) {
        let connections: Vec<_> = connections.into_iter().collect();
        for some in connections.chunks(64) {
            let messages = some.iter().map(|c| encode::create(c, state, 600));
            self.send(&messages.collect::<Vec<_>>().concat());
        }
    }

    pub fn delete(&self, connections: impl IntoIterator<Item = Connection>) {
        for connection in connections {
            self.send(&encode::delete(&connection));
        }
    }
}

/// The `n`-th made-up connection to the guest.
pub fn made_up(n: u32) -> Connection {
    let client = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + n / 50_000);
    Connection::tcp(client, u16::try_from(n % 50_000).unwrap() + 1, GUEST, 80)
}

/// What must be equal; the timeout runs.
pub type Facts = (SocketAddr, SocketAddr, u32, u32, Option<TcpState>);

pub fn facts(flows: &[Flow]) -> BTreeSet<Facts> {
    let fact = |flow: &Flow| {
        let tuple = flow.original;
        let source = SocketAddr::new(tuple.source, tuple.source_port);
        let destination = SocketAddr::new(tuple.destination, tuple.destination_port);
        (source, destination, flow.id, flow.status.0, flow.state)
    };
    flows.iter().map(fact).collect()
}
