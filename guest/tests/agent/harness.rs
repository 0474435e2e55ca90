//! An agent on this host, and pipes that misbehave.
use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use doze_agent::{
    client::{AgentClient, ExecEvent, ExecSession},
    message::{ExecRequest, Identity, ProgramExit},
};
use doze_guest::{
    agent::{Agent, ExecDefaults, Kernel, Request},
    children::Children,
    spawn::{DEFAULT_PATH, Env},
    users::User,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::LocalSet,
};

/// Long enough on a busy machine; only a hang takes it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What the agent's own thread does for a test.
pub type Setup = Box<dyn FnOnce(&Agent) + Send>;

/// What the agent did to the kernel of its machine, which in a test is everybody's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mended {
    Clock(Duration),
    Entropy(Vec<u8>),
    Reseeded,
    Identity(Identity),
}

/// What the machine was called before it took an identity.
pub const FORMER_HOSTNAME: &str = "source";

/// A kernel that writes down what was asked of it, and fails at reseeding when told so.
#[derive(Clone, Default)]
pub struct Recorder {
    pub mended: Arc<Mutex<Vec<Mended>>>,
    pub broken: bool,
}

impl Recorder {
    fn did(&self, what: Mended) -> io::Result<()> {
        self.mended.lock().unwrap().push(what);
        Ok(())
    }
}

impl Kernel for Recorder {
    fn set_realtime(&self, since_1970: Duration) -> io::Result<()> {
        self.did(Mended::Clock(since_1970))
    }

    fn add_entropy(&self, bytes: &[u8]) -> io::Result<()> {
        self.did(Mended::Entropy(bytes.to_vec()))
    }

    fn reseed(&self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.did(Mended::Reseeded)
    }

    fn take_identity(&self, identity: &Identity) -> Result<String, String> {
        if self.broken {
            return Err("no device has the address".into());
        }
        self.did(Mended::Identity(identity.clone()))
            .map_err(|e| e.to_string())?;
        Ok(FORMER_HOSTNAME.into())
    }
}

/// A running agent that listens on a socket, as QEMU would.
pub struct Guest {
    pub requests: mpsc::UnboundedReceiver<Request>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

static EPOCH: AtomicU64 = AtomicU64::new(1);

impl Guest {
    pub fn start(socket: &Path, setup: Setup) -> Self {
        Self::on(Recorder::default(), socket, setup)
    }

    pub fn on(kernel: Recorder, socket: &Path, setup: Setup) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (sender, requests) = mpsc::unbounded_channel();
        let (listening, is_listening) = std::sync::mpsc::channel();
        let socket = socket.to_owned();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            LocalSet::new().block_on(&runtime, async move {
                std::fs::remove_file(&socket).ok();
                let listener = UnixListener::bind(&socket).unwrap();
                let children = Children::new(false).unwrap();
                let (agent, mut from_agent) = Agent::new(
                    EPOCH.fetch_add(1, Ordering::Relaxed),
                    children,
                    Box::new(kernel),
                );
                setup(&agent);
                listening.send(()).unwrap();
                let serve = async {
                    loop {
                        let (stream, _) = listener.accept().await.unwrap();
                        let (reader, writer) = stream.into_split();
                        agent.serve(reader, writer).await.ok();
                    }
                };
                let forward = async {
                    while let Some(request) = from_agent.recv().await {
                        sender.send(request).ok();
                    }
                };
                tokio::select! {
                    () = serve => {}
                    () = async { forward.await; std::future::pending().await } => {}
                    _ = stopped => {}
                }
            });
        });
        is_listening.recv().unwrap();
        Self {
            requests,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// An agent that takes commands, run by the user of this test.
    pub fn with_exec(socket: &Path) -> Self {
        Self::with_exec_on(Recorder::default(), socket)
    }

    pub fn with_exec_on(kernel: Recorder, socket: &Path) -> Self {
        Self::on(
            kernel,
            socket,
            Box::new(|agent| {
                agent.program_started(Instant::now());
                agent.ready(defaults());
            }),
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.take().unwrap().send(()).ok();
        let joined = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            joined.unwrap();
        }
    }
}

pub fn defaults() -> ExecDefaults {
    let mut env = Env::default();
    env.set("PATH", DEFAULT_PATH);
    env.set("FROM_IMAGE", "yes");
    // Whoever runs this test.
    let me = std::fs::metadata("/proc/self").unwrap();
    ExecDefaults {
        env,
        user: User {
            uid: me.uid(),
            gid: me.gid(),
            groups: Vec::new(),
            home: "/".into(),
        },
        cwd: "/".into(),
    }
}

/// A folder with a socket in it, an agent behind it and a client in front.
pub struct Pair {
    pub client: AgentClient,
    _guest: Guest,
    pub folder: TempDir,
}

impl Pair {
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let guest = Guest::with_exec(&folder.path().join("s"));
        let client = AgentClient::connect(folder.path().join("s"));
        connected(&client).await;
        Self {
            client,
            _guest: guest,
            folder,
        }
    }

    pub async fn sh(&self, script: &str) -> ExecSession {
        self.client.exec(shell(script)).await.unwrap()
    }
}

pub async fn connected(client: &AgentClient) {
    patient(client.view().wait_for(|v| v.connected))
        .await
        .unwrap();
}

pub fn shell(script: &str) -> ExecRequest {
    ExecRequest {
        command: vec!["sh".into(), "-c".into(), script.into()],
        ..ExecRequest::default()
    }
}

pub async fn patient<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work)
        .await
        .expect("it hangs")
}

/// Everything a session says, to its end.
pub async fn finish(session: &mut ExecSession) -> (Vec<u8>, ProgramExit) {
    let mut output = Vec::new();
    patient(async {
        loop {
            match session.next().await {
                Some(ExecEvent::Output(bytes)) => output.extend_from_slice(&bytes),
                Some(ExecEvent::Exit(exit)) => return (output, exit),
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&output)),
            }
        }
    })
    .await
}

/// Reads output until it contains `text`.
pub async fn until(session: &mut ExecSession, text: &str) -> String {
    let mut output = String::new();
    patient(async {
        while !output.contains(text) {
            match session.next().await {
                Some(ExecEvent::Output(bytes)) => output.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} after {output:?}"),
            }
        }
        output
    })
    .await
}

pub fn exit(code: i32, message: &str) -> ProgramExit {
    ProgramExit {
        code,
        message: message.into(),
    }
}

/// Waits until a process is gone (a zombie counts as gone).
pub async fn gone(pid: &str) {
    let stat = format!("/proc/{}/stat", pid.trim());
    patient(async {
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// A relay that breaks every connection after some bytes and loses what it holds at that moment.
pub fn cutting_relay(front: PathBuf, back: PathBuf, seed: u64) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(front).unwrap();
    tokio::spawn(async move {
        let mut random = seed | 1;
        let mut next = move |below: u64| {
            // xorshift64: repeatable, and nothing more is needed.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        loop {
            let (ours, _) = listener.accept().await.unwrap();
            let theirs = UnixStream::connect(&back).await.unwrap();
            let (client_in, client_out) = ours.into_split();
            let (guest_in, guest_out) = theirs.into_split();
            // Dropping both ends is what a disconnect looks like.
            tokio::select! {
                () = relay(client_in, guest_out, 200 + next(60_000)) => {}
                () = relay(guest_in, client_out, 2_000 + next(400_000)) => {}
            }
        }
    })
}

/// Passes bytes on, up to `budget`; the last ones read are lost, cut anywhere.
async fn relay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut budget: u64) {
    let mut buf = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buf).await {
        let pass = n.min(usize::try_from(budget).unwrap());
        if to.write_all(&buf[..pass]).await.is_err() || pass < n {
            return;
        }
        budget -= pass as u64;
    }
}

/// A relay as a guest sees standbys and restores: its side stays connected while hosts come and go. Each of
/// them reaches the guest with no more than its budget of bytes, and hears no more than that; the rest is lost.
pub fn restoring_relay(
    front: PathBuf,
    back: PathBuf,
    budgets: Vec<u64>,
) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(front).unwrap();
    tokio::spawn(async move {
        let mut guest = UnixStream::connect(&back).await.unwrap();
        for budget in budgets {
            let (mut host, _) = listener.accept().await.unwrap();
            let (mut from_host, mut to_host) = host.split();
            let (mut from_guest, mut to_guest) = guest.split();
            // The host goes first; what the guest says then waits for the next one.
            tokio::select! {
                () = lossy(&mut from_host, &mut to_guest, budget) => {}
                () = lossy(&mut from_guest, &mut to_host, budget) => {}
            }
        }
    })
}

/// Passes bytes on up to `budget`, then reads on and drops them.
async fn lossy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    mut budget: u64,
) {
    let mut buf = vec![0; 16 << 10];
    while let Ok(n @ 1..) = from.read(&mut buf).await {
        let pass = n.min(usize::try_from(budget).unwrap_or(usize::MAX));
        if to.write_all(&buf[..pass]).await.is_err() {
            return;
        }
        budget -= pass as u64;
    }
}

pub fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}
