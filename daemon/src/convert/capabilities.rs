//! What works here, in the words of the wire.
use doze_api::{
    Capabilities, DefaultRuntime, HostInfo, ImageSupport, NetworkModel, NetworkSupport, Runtime,
    ServerInfo,
};
use doze_engine::Engine;
use doze_vmm::{Accel, Hypervisor, Probe};

use super::{fields, instance};

/// API surfaces that work. The contract calls more of them "always present"; truth wins.
const FEATURES: [&str; 4] = ["exec", "images", "instances", "logs"];

/// Asks the host about each monitor.
pub(crate) async fn capabilities(engine: &Engine) -> Capabilities {
    let runtimes: Vec<Runtime> = engine
        .monitors()
        .await
        .into_iter()
        .map(|(hypervisor, probe)| runtime(hypervisor, probe))
        .collect();
    let default = instance::hypervisor(engine.default_hypervisor()).as_str();
    let (network, network_error) = match engine.network() {
        Some(Ok(config)) => (Some(config), None),
        Some(Err(reason)) => (None, Some(reason)),
        None => (None, Some("network.enabled is false".to_owned())),
    };
    Capabilities {
        server: ServerInfo {
            api_version: doze_api::CONTRACT_VERSION.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
        host: HostInfo {
            os: std::env::consts::OS.to_owned(),
            arch: fields::host_arch().to_owned(),
        },
        default_runtime: DefaultRuntime {
            name: default.to_owned(),
            available: runtimes
                .iter()
                .any(|runtime| runtime.name == default && runtime.available),
        },
        runtimes,
        features: FEATURES.map(str::to_owned).to_vec(),
        network: NetworkSupport {
            model: NetworkModel::Bridge,
            guest_to_guest: false,
            gateway: network.as_ref().map(|config| config.gateway.to_string()),
            subnet: network
                .as_ref()
                .map(|config| format!("{}/{}", config.subnet.network, config.subnet.prefix)),
            unavailable_reason: network_error,
        },
        images: ImageSupport {
            default_platform: fields::host_platform(),
            platforms: vec![fields::host_platform()],
        },
    }
}

/// What every monitor of this build does through this API; pause is not built yet.
const RUNTIME_FEATURES: [&str; 3] = ["fork", "snapshots", "standby"];

fn runtime(hypervisor: Hypervisor, probe: Probe) -> Runtime {
    Runtime {
        name: instance::hypervisor(hypervisor).as_str().to_owned(),
        available: probe.missing.is_none(),
        features: match probe.missing {
            None => RUNTIME_FEATURES.map(str::to_owned).to_vec(),
            Some(_) => Vec::new(),
        },
        unavailable_reason: probe.missing,
        version: probe.version,
        acceleration: Some(
            match probe.accel {
                Accel::Kvm => "kvm",
                Accel::Tcg => "tcg",
            }
            .to_owned(),
        ),
    }
}
