//! One run of the server, from the first check to the last drained request.
//!
//! Order matters. The lock comes before anything in the data folder is touched; the socket is bound
//! before the engine is opened, so that a taken port costs nothing; requests are taken only when
//! every record agrees with the host. At the end it is the other way round, and instances keep
//! running.
use std::{
    future::Future,
    io::{self, IsTerminal},
    net::SocketAddr,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use doze_engine::Engine;
use sd_notify::NotifyState;
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    time::{Instant, timeout_at},
};
use tracing_subscriber::EnvFilter;

use crate::{
    GUEST,
    config::{Config, Log, LogFormat},
    dns,
    http::{self, AppState},
    lock::DataLock,
    secret::{self, Verifier},
};

/// Runs until SIGTERM or SIGINT. Errors are complete sentences for the operator.
pub async fn serve(config: Config) -> Result<()> {
    init_log(&config.log);
    // Before anything else: a signal during start-up must not kill us half way.
    let stop = stop_signal()?;
    for warning in config.warnings() {
        tracing::warn!("{warning}");
    }
    run(config, stop).await
}

/// The same with a stop of the caller's choice.
async fn run(config: Config, stop: impl Future<Output = &'static str>) -> Result<()> {
    let folder = config.data_dir.clone();
    let (lock, secret) = {
        let config = config.clone();
        tokio::task::spawn_blocking(move || prepare(&config))
            .await
            .context("prepare the data folder")??
    };
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listen on {} (key listen)", config.listen))?;
    let address = listener
        .local_addr()
        .context("ask for the listening address")?;

    let host_dns = match config.network.dns {
        Some(_) => Vec::new(),
        None => host_dns(config.network.enabled).await,
    };
    let engine = Engine::open(config.engine(GUEST, host_dns))
        .await
        .map_err(|error| {
            anyhow::anyhow!("open {}: {}", folder.display(), http::errors::chain(&error))
        })?;
    crate::debug::cut_conntrack_on_signal(engine.clone())?;
    let state = AppState::new(http::Parts {
        engine: engine.clone(),
        verifier: Verifier::new(&secret),
        uploads: config.uploads_dir(),
        max_import_bytes: config.images.max_import_bytes,
    })?;

    tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), data_dir = %folder.display(), "listening");
    notify(&[NotifyState::Ready]);
    let watchdog = tokio::spawn(watchdog(sd_notify::watchdog_enabled()));

    drain(&config, state, listener, stop).await?;

    tracing::info!("the last requests are done; running instances keep running");
    engine.shutdown(config.shutdown_grace).await;
    watchdog.abort();
    drop(lock);
    tracing::info!("stopped");
    Ok(())
}

/// Serves until told to stop, then for at most the grace period.
async fn drain(
    config: &Config,
    state: AppState,
    listener: TcpListener,
    stop: impl Future<Output = &'static str>,
) -> Result<()> {
    let stopping = state.stopping().clone();
    let sessions = state.sessions().clone();
    let accept = stopping.clone();
    let server = axum::serve(
        Connections(listener),
        http::router(state).into_make_service(),
    )
    .with_graceful_shutdown(async move { accept.cancelled().await });
    let mut server = tokio::spawn(server.into_future());

    tokio::select! {
        reason = stop => {
            tracing::info!(reason, grace_s = config.shutdown_grace.as_secs(), "stopping");
            notify(&[NotifyState::Stopping]);
        }
        ended = &mut server => {
            ended.context("serve")?.context("serve")?;
            anyhow::bail!("the HTTP server ended by itself");
        }
    }
    stopping.cancel();
    sessions.close();
    let deadline = Instant::now() + config.shutdown_grace;
    match timeout_at(deadline, &mut server).await {
        Ok(ended) => ended.context("serve")?.context("serve")?,
        Err(_) => {
            tracing::warn!("requests still run after shutdown_grace; they are cut off");
            server.abort();
        }
    }
    if timeout_at(deadline, sessions.wait()).await.is_err() {
        tracing::warn!(
            sessions = sessions.len(),
            "sessions still run after shutdown_grace; they are cut off"
        );
    }
    Ok(())
}

/// The blocking part of the start: folder, lock, secret, leftovers.
fn prepare(config: &Config) -> Result<(DataLock, crate::config::Secret)> {
    let folder = &config.data_dir;
    doze_host::files::create_private_dir(folder).with_context(|| {
        format!(
            "the data folder {} (key data_dir) must be ours alone, mode 0700",
            folder.display()
        )
    })?;
    let lock = DataLock::acquire(folder)?;
    let secret = secret::existing_or_new(config)?;
    empty_folder(&config.uploads_dir())?;
    Ok((lock, secret))
}

/// What a crash left of uploads goes; we hold the lock, so nobody else is using it.
fn empty_folder(folder: &Path) -> Result<()> {
    doze_host::files::remove_tree(folder)
        .and_then(|()| doze_host::files::create_private_dir(folder))
        .with_context(|| format!("empty {}", folder.display()))
}

async fn host_dns(needed: bool) -> Vec<std::net::Ipv4Addr> {
    let servers = match needed {
        true => tokio::task::spawn_blocking(dns::of_host)
            .await
            .unwrap_or_default(),
        false => return Vec::new(),
    };
    if servers.is_empty() {
        tracing::warn!(
            "guests get no name server: the host names none that guests can reach; set network.dns"
        );
    }
    servers
}

fn init_log(log: &Log) {
    // Checked when the configuration was read.
    let filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let outcome = match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    if let Err(error) = outcome {
        // Whoever embeds us has a log of his own, which is fine.
        tracing::debug!(%error, "a log is set up already");
    }
}

/// Resolves with the name of the signal.
fn stop_signal() -> Result<impl Future<Output = &'static str>> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    })
}

/// systemd's protocol; without systemd this does nothing.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}

/// Twice per period, from the same runtime that serves requests: if that hangs, systemd sees it.
async fn watchdog(period: Option<Duration>) {
    let Some(period) = period else { return };
    let mut ticks = tokio::time::interval((period / 2).max(Duration::from_millis(1)));
    loop {
        ticks.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// The listener, with small writes sent at once: exec echoes keystrokes.
struct Connections(TcpListener);

impl axum::serve::Listener for Connections {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let (stream, address) = axum::serve::Listener::accept(&mut self.0).await;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, %address, "cannot send small writes at once");
        }
        (stream, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::{os::unix::fs::PermissionsExt, time::Duration};

    use doze_api::{Client, ClientError, CreateInstanceRequest, client::InstanceFilter};
    use tokio::sync::oneshot;

    use super::*;

    fn config(data_dir: &Path) -> Config {
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let variables = [
            ("DOZE_DATA_DIR", data_dir.display().to_string()),
            ("DOZE_LISTEN", format!("127.0.0.1:{port}")),
            ("DOZE_NETWORK__ENABLED", "false".to_owned()),
        ];
        Config::parse(None, variables.map(|(name, text)| (name.to_owned(), text))).unwrap()
    }

    async fn answering(client: &Client) {
        while client.health().await.is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_server_comes_serves_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let config = config(&data);
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(run(config.clone(), async move {
            let _ = stopped.await;
            "test"
        }));
        let url = format!("http://{}", config.listen);
        answering(&Client::new(&url, None).unwrap()).await;

        // The folder is ours alone, and a second server is told so.
        let mode = std::fs::metadata(&data).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let error = run(config.clone(), std::future::pending())
            .await
            .unwrap_err();
        assert!(
            format!("{error:#}").contains("another doze server"),
            "{error:#}"
        );

        // The generated secret makes tokens that are good.
        let refused = Client::new(&url, None)
            .unwrap()
            .capabilities()
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Some("unauthorized"));
        let token = crate::token(&config, "test", Duration::from_secs(60)).unwrap();
        let client = Client::new(&url, Some(&token)).unwrap();
        assert_eq!(
            client
                .list_instances(&InstanceFilter::default())
                .await
                .unwrap(),
            []
        );
        let request = CreateInstanceRequest {
            name: "web".to_owned(),
            image: "nosuch".to_owned(),
            ..CreateInstanceRequest::default()
        };
        let error = client.create_instance(&request).await.unwrap_err();
        assert_eq!(
            (error.status(), error.code()),
            (Some(404), Some("not_found"))
        );
        let start = doze_api::ExecStart {
            command: vec!["true".to_owned()],
            ..doze_api::ExecStart::default()
        };
        let error = client.exec("nosuch", &start).await.err().unwrap();
        assert!(
            matches!(&error, ClientError::Api { status: 404, body } if body.code == "not_found"),
            "{error:?}"
        );

        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert!(client.health().await.is_err());
        // Nothing holds the folder any more.
        DataLock::acquire(&data).unwrap();
    }

    #[tokio::test]
    async fn uploads_of_a_crashed_server_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let config = config(&data);
        std::fs::create_dir_all(config.uploads_dir()).unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::fs::write(config.uploads_dir().join("import-1.tar"), "left").unwrap();
        run(config.clone(), std::future::ready("test"))
            .await
            .unwrap();
        assert_eq!(std::fs::read_dir(config.uploads_dir()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(&dir.path().join("data"));
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        config.listen = other.local_addr().unwrap();
        let error = run(config.clone(), std::future::pending())
            .await
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains(&config.listen.to_string()) && text.contains("in use"),
            "{text}"
        );
    }
}
