//! What tests and benches need of a server besides its API.
use crate::Config;

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
