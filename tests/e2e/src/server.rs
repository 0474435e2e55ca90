//! One `doze serve`: its configuration, its process, its command line.
use std::{
    ffi::OsStr,
    fs,
    net::TcpListener,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::Mutex,
};

use crate::{Api, preflight::Tools, sandbox};

/// A start includes reconciling all records; beyond this it hangs.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// What differs between servers.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub default_hypervisor: String,
    pub kernel: Option<PathBuf>,
    pub qemu: Option<PathBuf>,
    /// TOML appended to the `[network]` table.
    pub network_extra: String,
    /// TOML appended to the `[limits]` table.
    pub limits: String,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            default_hypervisor: "qemu-microvm".into(),
            kernel: None,
            qemu: None,
            network_extra: String::new(),
            limits: String::new(),
        }
    }
}

/// A configured server, running or not.
#[derive(Debug)]
pub struct Server {
    doze: PathBuf,
    /// Holds everything of this server.
    pub dir: PathBuf,
    pub data_dir: PathBuf,
    pub config: PathBuf,
    pub bridge: String,
    /// The first three octets of the gateway and the first guests; the subnet is `10.N.0.0/16`.
    pub subnet: String,
    pub log: PathBuf,
    base_url: String,
    child: Mutex<Option<Child>>,
    /// Kept open for as long as the server may have something to say to its service manager.
    notify: Mutex<Option<tokio::net::UnixDatagram>>,
}

impl Server {
    /// Writes the configuration. `index` is unique per run and chooses bridge and subnet.
    pub fn configure(
        tools: &Tools,
        dir: PathBuf,
        index: u8,
        options: &ServerOptions,
    ) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let port = free_port()?;
        let data_dir = dir.join("data");
        let bridge = format!("dze{index}");
        let subnet = format!("10.{}.0", 100 + u32::from(index));
        let config = dir.join("doze.toml");
        let kernel = options.kernel.as_ref().unwrap_or(&tools.kernel);
        let qemu = options.qemu.as_ref().unwrap_or(&tools.qemu);
        fs::write(
            &config,
            format!(
                "data_dir = {data_dir:?}\nlisten = \"127.0.0.1:{port}\"\n\n\
                 [hypervisor]\ndefault = {:?}\naccel = \"tcg\"\nqemu_path = {qemu:?}\n\n\
                 [kernel]\nimage = {kernel:?}\nmodules = {:?}\n\n\
                 [network]\nenabled = true\nbridge = {bridge:?}\nsubnet = \"{subnet}.0/16\"\n{}\n\n\
                 [limits]\n{}\n",
                options.default_hypervisor, tools.modules, options.network_extra, options.limits
            ),
        )?;
        Ok(Self {
            doze: tools.doze.clone(),
            log: dir.join("server.log"),
            dir,
            data_dir,
            config,
            bridge,
            subnet,
            base_url: format!("http://127.0.0.1:{port}"),
            child: Mutex::new(None),
            notify: Mutex::new(None),
        })
    }

    /// Names another QEMU in the configuration; the next start uses it.
    pub fn use_qemu(&self, qemu: &Path) -> Result<()> {
        let text = fs::read_to_string(&self.config)?;
        let lines = text
            .lines()
            .map(|line| match line.starts_with("qemu_path") {
                true => format!("qemu_path = {qemu:?}\n"),
                false => format!("{line}\n"),
            });
        fs::write(&self.config, lines.collect::<String>()).context("configuration")
    }

    /// The guests' gateway.
    pub fn gateway(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// Starts it and returns when it says over sd_notify that it is ready.
    pub async fn start(&self) -> Result<()> {
        self.start_with(&[]).await
    }

    /// As [`Server::start`], with additions to its environment.
    pub async fn start_with(&self, env: &[(&str, &str)]) -> Result<()> {
        self.launch(self.command(env)?).await
    }

    /// As [`Server::start`], on a kernel that has no connection tracking as far as the server can see.
    pub async fn start_without_conntrack(&self) -> Result<()> {
        let serve = self.command(&[])?;
        let mut command = sandbox::without_conntrack(serve.as_std())?;
        self.with_log(&mut command)?;
        self.launch(command).await
    }

    async fn launch(&self, mut command: Command) -> Result<()> {
        let mut slot = self.child.lock().await;
        ensure!(slot.is_none(), "the server runs already");
        let socket = self.dir.join("notify.sock");
        // A former start's socket; a new one cannot be bound over it.
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let notify = UnixDatagram::bind(&socket)?;
        notify.set_nonblocking(true)?;
        let notify = tokio::net::UnixDatagram::from_std(notify)?;
        let mut child = command
            .env("NOTIFY_SOCKET", &socket)
            .spawn()
            .context("doze serve")?;
        let ready = async {
            let mut message = [0; 4096];
            loop {
                let length = notify.recv(&mut message).await?;
                if message[..length]
                    .split(|b| *b == b'\n')
                    .any(|line| line == b"READY=1")
                {
                    return anyhow::Ok(());
                }
            }
        };
        let outcome = tokio::select! {
            ready = ready => ready,
            ended = child.wait() => Err(anyhow!("doze serve ended at once: {}", ended?)),
            () = tokio::time::sleep(START_DEADLINE) => Err(anyhow!("doze serve is not ready after {START_DEADLINE:?}")),
        };
        if let Err(e) = outcome {
            let _gone_already_is_fine = child.start_kill();
            return Err(anyhow!("{e:#}\n{}", self.log_tail()));
        }
        *slot = Some(child);
        *self.notify.lock().await = Some(notify);
        Ok(())
    }

    fn command(&self, env: &[(&str, &str)]) -> Result<Command> {
        let mut command = Command::new(&self.doze);
        command
            .args([
                OsStr::new("serve"),
                OsStr::new("--config"),
                self.config.as_os_str(),
            ])
            .envs(env.iter().copied());
        self.with_log(&mut command)?;
        Ok(command)
    }

    fn with_log(&self, command: &mut Command) -> Result<()> {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(())
    }

    /// Starts it and expects it to end by itself: its status.
    pub async fn start_must_fail(&self) -> Result<(ExitStatus, String)> {
        self.start_must_fail_with(&[]).await
    }

    /// As [`Server::start_must_fail`], with additions to its environment.
    pub async fn start_must_fail_with(&self, env: &[(&str, &str)]) -> Result<(ExitStatus, String)> {
        let mut child = self.command(env)?.spawn()?;
        match tokio::time::timeout(START_DEADLINE, child.wait()).await {
            Ok(status) => Ok((status?, self.log_tail())),
            Err(_) => {
                child.kill().await?;
                bail!("the server runs; it should have refused to start")
            }
        }
    }

    /// SIGTERM, then waits for an orderly end.
    pub async fn stop(&self) -> Result<()> {
        let mut slot = self.child.lock().await;
        let Some(mut child) = slot.take() else {
            return Ok(());
        };
        signal(&child, Signal::TERM)?;
        match tokio::time::timeout(Duration::from_secs(45), child.wait()).await {
            Ok(status) => {
                let status = status?;
                ensure!(
                    status.success(),
                    "the server ended with {status} on SIGTERM; {}",
                    self.log_tail()
                );
                Ok(())
            }
            Err(_) => {
                child.kill().await?;
                bail!("the server did not end on SIGTERM; {}", self.log_tail())
            }
        }
    }

    /// SIGKILL: the crash.
    pub async fn kill(&self) -> Result<()> {
        let mut slot = self.child.lock().await;
        if let Some(mut child) = slot.take() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Waits up to `deadline` for the server to die by itself; whether it did.
    pub async fn died(&self, deadline: Duration) -> Result<bool> {
        let mut slot = self.child.lock().await;
        let Some(child) = slot.as_mut() else {
            bail!("the server was not started")
        };
        match tokio::time::timeout(deadline, child.wait()).await {
            Ok(status) => {
                use std::os::unix::process::ExitStatusExt as _;
                let status = status?;
                ensure!(
                    status.signal() == Some(9),
                    "the server ended with {status}, not by SIGKILL; {}",
                    self.log_tail()
                );
                *slot = None;
                Ok(true)
            }
            Err(_) => Ok(false),
        }
    }

    /// Whether it was started and has not ended since.
    pub async fn running(&self) -> bool {
        let mut slot = self.child.lock().await;
        let alive = slot
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !alive {
            *slot = None;
        }
        alive
    }

    pub async fn pid(&self) -> Result<u32> {
        self.child
            .lock()
            .await
            .as_ref()
            .and_then(Child::id)
            .context("the server does not run")
    }

    /// The API with a fresh token.
    pub async fn api(&self) -> Result<Api> {
        Api::new(self.base_url.clone(), Some(self.token().await?))
    }

    pub async fn token(&self) -> Result<String> {
        let output = self
            .doze([
                OsStr::new("token"),
                OsStr::new("--config"),
                self.config.as_os_str(),
            ])
            .await?;
        Ok(output.trim().to_owned())
    }

    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    /// `doze image import NAME PATH` against this server.
    pub async fn import(&self, name: &str, path: &Path) -> Result<String> {
        let token = self.token().await?;
        self.doze_with(
            &[
                ("DOZE_URL", self.base_url.as_str()),
                ("DOZE_TOKEN", token.as_str()),
            ],
            [
                OsStr::new("image"),
                OsStr::new("import"),
                OsStr::new(name),
                path.as_os_str(),
            ],
        )
        .await
    }

    /// Runs `doze ARGS`, which must succeed; its stdout.
    pub async fn doze<'a>(&self, args: impl IntoIterator<Item = &'a OsStr>) -> Result<String> {
        self.doze_with(&[], args).await
    }

    pub async fn doze_with<'a>(
        &self,
        env: &[(&str, &str)],
        args: impl IntoIterator<Item = &'a OsStr>,
    ) -> Result<String> {
        let mut command = Command::new(&self.doze);
        command
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(Duration::from_secs(120), command.output())
            .await
            .with_context(|| format!("{:?} hangs", command.as_std()))??;
        ensure!(
            output.status.success(),
            "{:?}: {}: {}",
            command.as_std(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The end of the server's own log.
    pub fn log_tail(&self) -> String {
        format!("--- {} (end)\n{}", self.log.display(), tail(&self.log, 40))
    }
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .and_then(Pid::from_raw)
        .context("the server is gone")?;
    kill_process(pid, signal).context("signal the server")
}

/// A port nobody listens on in our namespace right now.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// The last lines of a text file.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path)
        .map(|b| String::from_utf8_lossy(&b).into_owned())
        .unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
