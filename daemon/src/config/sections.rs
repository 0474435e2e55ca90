//! The keys: name, type, default, and what must hold between them.
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use doze_engine::{Algorithm, Codec, Compression, ExecPolicy, SnapshotConfig};
use doze_host::net::Subnet;
use doze_vmm::{Accel, Hypervisor, MemoryBacking};
use tracing_subscriber::EnvFilter;

use super::{
    Auth, AutoStandby, Config, HypervisorConfig, Images, Kernel, Limits, Log, LogFormat, Memory,
    Network, Secret, Standby,
    reader::Reader,
    value::{Read, Value},
};

const MB: u64 = 1 << 20;
const GB: u64 = 1 << 30;

/// Reads everything; a key with a mistake gets its default, the mistake stays with the reader.
pub(super) fn read(reader: &mut Reader) -> Config {
    let data_dir = reader.or("data_dir", PathBuf::from("/var/lib/doze"), absolute_path);
    let config = Config {
        listen: reader.or(
            "listen",
            SocketAddr::from((Ipv4Addr::LOCALHOST, 4973)),
            socket_address,
        ),
        shutdown_grace: reader.or("shutdown_grace", Duration::from_secs(30), Value::duration),
        auth: Auth {
            jwt_secret: reader.optional("auth.jwt_secret", secret),
        },
        hypervisor: hypervisor(reader),
        kernel: kernel(reader, &data_dir),
        network: network(reader),
        images: Images {
            max_import_bytes: reader.or("images.max_import_bytes", 16 * GB, Value::size),
        },
        limits: limits(reader),
        standby: Standby {
            exec_sessions: reader.or("standby.exec_sessions", ExecPolicy::End, |value| {
                value.choice(&[("end", ExecPolicy::End), ("refuse", ExecPolicy::Refuse)])
            }),
        },
        auto_standby: AutoStandby {
            max_concurrent: reader.or("auto_standby.max_concurrent", 16, Value::count),
            reconcile_interval: reader.or(
                "auto_standby.reconcile_interval",
                Duration::from_secs(300),
                Value::duration,
            ),
        },
        snapshot: SnapshotConfig {
            compression_default: compression_default(reader),
            max_concurrent_compressions: reader.or(
                "snapshot.max_concurrent_compressions",
                2,
                Value::count,
            ),
        },
        memory: Memory {
            backing: reader.or("memory.backing", MemoryBacking::Shared, |value| {
                value.choice(&[("shared", MemoryBacking::Shared)])
            }),
        },
        log: Log {
            format: reader.or("log.format", LogFormat::Text, |value| {
                value.choice(&[("text", LogFormat::Text), ("json", LogFormat::Json)])
            }),
            level: reader.or("log.level", "info".to_owned(), log_level),
        },
        data_dir,
        kill_at: None,
        unknown_variables: Vec::new(),
    };
    check(reader, &config);
    config
}

/// What is off is off, whatever else it says; `None`: the server wants nothing.
fn compression_default(reader: &mut Reader) -> Option<Compression> {
    let enabled = reader.optional("snapshot.compression_default.enabled", Value::boolean);
    let algorithm = reader.optional("snapshot.compression_default.algorithm", |value| {
        Ok(value.clone())
    });
    let level = reader.optional("snapshot.compression_default.level", |value| {
        Ok(value.clone())
    });
    if enabled.is_none() && (algorithm.is_some() || level.is_some()) {
        let key = "snapshot.compression_default.enabled";
        reader.error(
            key,
            "it is missing; set it to true, or remove the section".into(),
        );
        return None;
    }
    if enabled != Some(true) {
        return enabled.map(|_| Compression::Off);
    }
    let algorithm = match algorithm.as_ref().map(compression_algorithm) {
        None => Algorithm::Zstd,
        Some(Ok(algorithm)) => algorithm,
        Some(Err(reason)) => {
            reader.error("snapshot.compression_default.algorithm", reason);
            return None;
        }
    };
    let level = level.as_ref().map(Value::integer).transpose();
    let codec =
        level.and_then(|level| Codec::new(algorithm, level).map_err(|error| error.to_string()));
    match codec {
        Ok(codec) => Some(Compression::On(codec)),
        Err(reason) => {
            reader.error("snapshot.compression_default.level", reason);
            None
        }
    }
}

fn compression_algorithm(value: &Value) -> Read<Algorithm> {
    let text = value.text()?;
    match text.to_ascii_lowercase().as_str() {
        "zstd" => Ok(Algorithm::Zstd),
        "lz4" => Ok(Algorithm::Lz4),
        _ => Err(format!("{text:?} is not an algorithm; allowed: zstd, lz4")),
    }
}

fn hypervisor(reader: &mut Reader) -> HypervisorConfig {
    HypervisorConfig {
        default: reader.or("hypervisor.default", Hypervisor::QemuMicrovm, |value| {
            value.choice(&[
                ("qemu", Hypervisor::Qemu),
                ("qemu-microvm", Hypervisor::QemuMicrovm),
            ])
        }),
        accel: reader.or("hypervisor.accel", None, |value| {
            value.choice(&[
                ("auto", None),
                ("kvm", Some(Accel::Kvm)),
                ("tcg", Some(Accel::Tcg)),
            ])
        }),
        qemu_path: reader.optional("hypervisor.qemu_path", absolute_path),
        run_as: reader.optional("hypervisor.run_as", filled),
    }
}

fn kernel(reader: &mut Reader, data_dir: &Path) -> Kernel {
    let home = data_dir.join("kernel");
    Kernel {
        image: reader.or("kernel.image", home.join("vmlinuz"), absolute_path),
        modules: reader.or(
            "kernel.modules",
            Some(home.join("modules")),
            |value| match value.text()?.as_str() {
                "none" => Ok(None),
                _ => absolute_path(value).map(Some),
            },
        ),
        extra_cmdline: reader.or("kernel.extra_cmdline", String::new(), |value| {
            let text = value.text()?;
            match text.chars().any(char::is_control) {
                true => Err(format!("{text:?} holds control characters")),
                false => Ok(text),
            }
        }),
    }
}

fn network(reader: &mut Reader) -> Network {
    let enabled = reader.or("network.enabled", true, Value::boolean);
    let bridge = reader.or("network.bridge", "doze0".to_owned(), interface_name);
    let default_subnet = Subnet {
        network: Ipv4Addr::new(10, 77, 0, 0),
        prefix: 16,
    };
    let subnet = reader.or("network.subnet", default_subnet, Value::subnet);
    let first_host = Ipv4Addr::from(u32::from(subnet.network) + 1);
    Network {
        enabled,
        subnet,
        gateway: reader.or("network.gateway", first_host, Value::address),
        dns: reader.optional("network.dns", |value| {
            value
                .texts()?
                .iter()
                .map(|text| {
                    text.parse()
                        .map_err(|_| format!("{text:?} is not an IPv4 address"))
                })
                .collect()
        }),
        guest_to_host: reader.or("network.guest_to_host", false, Value::boolean),
        // Two servers in one network namespace have two bridges, so they get two tables as well.
        table: reader.or("network.table", format!("doze-{bridge}"), table_name),
        bridge,
    }
}

fn limits(reader: &mut Reader) -> Limits {
    Limits {
        max_instances: reader.or("limits.max_instances", 4096, Value::count),
        max_vcpus_per_instance: reader.or("limits.max_vcpus_per_instance", 16, Value::count),
        max_memory_per_instance: reader.or(
            "limits.max_memory_per_instance",
            64 * GB,
            whole_mebibytes,
        ),
        max_total_memory: reader.optional("limits.max_total_memory", Value::size),
        max_overlay: reader.or("limits.max_overlay", 1024 * GB, whole_mebibytes),
        default_vcpus: reader.or("limits.default_vcpus", 2, Value::count),
        default_memory: reader.or("limits.default_memory", GB, whole_mebibytes),
        default_overlay: reader.or("limits.default_overlay", 10 * GB, whole_mebibytes),
        stop_grace: reader.or(
            "limits.stop_grace",
            Duration::from_secs(10),
            Value::duration,
        ),
        boot_timeout: reader.or(
            "limits.boot_timeout",
            Duration::from_secs(120),
            Value::duration,
        ),
        max_log_bytes: reader.or("limits.max_log_bytes", 32 * MB, whole_mebibytes),
        max_concurrent_restores: reader.or("limits.max_concurrent_restores", 16, Value::count),
    }
}

/// What no single key can know.
fn check(reader: &mut Reader, config: &Config) {
    let network = &config.network;
    let first = u32::from(network.subnet.network);
    let last = first | (u32::MAX >> network.subnet.prefix);
    let gateway = u32::from(network.gateway);
    if gateway <= first || gateway >= last {
        reader.error(
            "network.gateway",
            format!(
                "{} is not a host of {}/{}; allowed: {} to {}",
                network.gateway,
                network.subnet.network,
                network.subnet.prefix,
                Ipv4Addr::from(first + 1),
                Ipv4Addr::from(last - 1)
            ),
        );
    }
    let limits = &config.limits;
    if limits.default_vcpus > limits.max_vcpus_per_instance {
        reader.error(
            "limits.default_vcpus",
            format!(
                "{} is above limits.max_vcpus_per_instance ({})",
                limits.default_vcpus, limits.max_vcpus_per_instance
            ),
        );
    }
    for (key, default, limit_key, limit) in [
        (
            "limits.default_memory",
            limits.default_memory,
            "limits.max_memory_per_instance",
            limits.max_memory_per_instance,
        ),
        (
            "limits.default_overlay",
            limits.default_overlay,
            "limits.max_overlay",
            limits.max_overlay,
        ),
    ] {
        if default > limit {
            reader.error(
                key,
                format!(
                    "{} is above {limit_key} ({})",
                    doze_api::format_size(default),
                    doze_api::format_size(limit)
                ),
            );
        }
    }
}

fn absolute_path(value: &Value) -> Read<PathBuf> {
    let path = PathBuf::from(value.text()?);
    match path.is_absolute() {
        true => Ok(path),
        false => Err(format!("{} is not an absolute path", path.display())),
    }
}

fn socket_address(value: &Value) -> Read<SocketAddr> {
    let text = value.text()?;
    text.parse().map_err(|_| {
        format!("{text:?} is not an address; allowed: IP:PORT, for example 127.0.0.1:4973")
    })
}

fn filled(value: &Value) -> Read<String> {
    let text = value.text()?;
    match text.is_empty() {
        true => Err("it is empty".to_owned()),
        false => Ok(text),
    }
}

fn secret(value: &Value) -> Read<Secret> {
    // The value itself must not appear in a message.
    match value.text() {
        Ok(text) if text.is_empty() => {
            Err("it is empty; leave it out to have one generated".to_owned())
        }
        Ok(text) if text.len() < Secret::MIN_BYTES => Err(format!(
            "it has {} bytes; allowed: at least {} random bytes. hint: openssl rand -base64 48, or leave it out to have one generated",
            text.len(),
            Secret::MIN_BYTES
        )),
        Ok(text) => Ok(Secret::new(text)),
        Err(_) => Err("not a text".to_owned()),
    }
}

fn log_level(value: &Value) -> Read<String> {
    let text = filled(value)?;
    EnvFilter::try_new(&text).map_err(|error| {
        format!("{text:?} is not a filter ({error}); allowed: error, warn, info, debug, trace, or per module, for example doze_engine=debug,info")
    })?;
    Ok(text)
}

/// A link's name as the host's network accepts it (see [`doze_host::net::NetworkConfig`]).
fn interface_name(value: &Value) -> Read<String> {
    let text = value.text()?;
    let ok = (1..=15).contains(&text.len())
        && !text.starts_with('-')
        && !["all", "default", "lo"].contains(&text.as_str())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    match ok {
        true => Ok(text),
        false => Err(format!(
            "{text:?} is not a bridge's name; allowed: 1 to 15 characters of a-z, 0-9 and '-', not starting with '-', none of all, default, lo"
        )),
    }
}

/// A table's name as the host's network accepts it (see [`doze_host::net::NetworkConfig`]).
fn table_name(value: &Value) -> Read<String> {
    let text = value.text()?;
    let ok = (1..=31).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    match ok {
        true => Ok(text),
        false => Err(format!(
            "{text:?} is not a table name; allowed: up to 31 letters, digits, '_' and '-', a letter first"
        )),
    }
}

fn whole_mebibytes(value: &Value) -> Read<u64> {
    let bytes = value.size()?;
    match bytes >= MB && bytes.is_multiple_of(MB) {
        true => Ok(bytes),
        false => Err(format!("{bytes} bytes; allowed: multiples of 1MB")),
    }
}
