//! What tests and benches need of a server besides its API.
use crate::Config;

/// With `DOZE_TEST_CUT_CONNTRACK` set to a duration, SIGUSR2 makes the server deaf to connections for so long:
/// no test can make the kernel close that socket.
pub(crate) fn cut_conntrack_on_signal(engine: doze_engine::Engine) -> anyhow::Result<()> {
    let Some(text) = std::env::var_os("DOZE_TEST_CUT_CONNTRACK") else {
        return Ok(());
    };
    let duration = doze_lifecycle::duration::parse(&text.to_string_lossy())?;
    let duration = duration.to_std().unwrap_or_default();
    let kind = tokio::signal::unix::SignalKind::user_defined2();
    let mut signals = tokio::signal::unix::signal(kind)?;
    tokio::spawn(async move {
        while signals.recv().await.is_some() {
            engine.cut_conntrack(duration);
        }
    });
    Ok(())
}

/// Names of the points at which `DOZE_KILL_AT` can end the server.
pub fn kill_points() -> impl Iterator<Item = &'static str> {
    doze_engine::KillPoint::ALL.iter().map(|point| point.name())
}

/// Adds `count` stopped instances to the configuration's store. The server must not run.
///
/// # Errors
/// A sentence for the operator: the folder is in use, or the store refuses.
pub async fn seed_stopped(config: &Config, count: usize) -> anyhow::Result<()> {
    doze_host::files::create_private_dir(&config.data_dir)?;
    let _lock = crate::lock::DataLock::acquire(&config.data_dir)?;
    let engine = config.engine(crate::GUEST, Vec::new());
    let pool = engine.network.map(|network| doze_engine::AddressPool {
        subnet: network.subnet,
        gateway: network.gateway,
    });
    doze_engine::seed_stopped(&config.data_dir, pool, count)
        .await
        .map_err(|error| anyhow::anyhow!("seed {}: {error}", config.data_dir.display()))
}
