//! From files to running CPUs; the common part of create and start.
//!
//! ```text
//!   TAP ─> VMM spawned ─> recorded ─> CPUs resumed ─> recorded   (commit point)
//! ```
//! A crash before "recorded" leaves a VMM that only its mark names; recovery finds it by that.
use doze_agent::{
    config::{self, GuestConfig, GuestNetwork},
    message::Identity,
};
use doze_host::{files, net::TapConfig};
use doze_image::ImageConfig;
use doze_lifecycle::Fact;
use doze_snapshot::manifest;
use doze_vmm::{Disk, MachineDescription, MemoryImage, Nic, qemu};

use super::{Cancel, check, standby::manifest_error};
use crate::{
    EngineError, InstanceSpec,
    context::{blocking, io_error, net_error},
    instance::{
        APP_LOG, CONFIG, Instance, Live, MEMORY, OVERLAY, RUN_DIR, SNAPSHOT, VMM_LOG, process_ref,
        vmm_error,
    },
    kill::KillPoint,
};

/// Boots the instance. On error the machine, if any, is gone again and the record says so, or
/// [`end_failed`] has to be tried again.
pub async fn run(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    let outcome = boot(instance, cancel).await;
    if outcome.is_err()
        && let Err(error) = instance
            .end_machine(KillPoint::StopMachineKilled, None)
            .await
    {
        // Tried again before the operation is given up; the caller is told why it failed at all.
        instance.note(&format!("ending the machine failed: {error}"));
    }
    outcome
}

/// Everything that can refuse a boot before it touches a file.
pub async fn check_host(instance: &Instance) -> Result<(), EngineError> {
    instance
        .ctx
        .reserve_memory(&instance.id, instance.spec.memory_bytes)?;
    describe(instance, &instance.spec).await?;
    make_tap(instance).await
}

/// Ends what a failed launch could not end. Only then may its operation be given up: a VMM that no record
/// names would stay for ever.
pub async fn end_failed(instance: &mut Instance) -> Result<(), EngineError> {
    if instance.live.is_none() && instance.record.machine().is_none() {
        return Ok(());
    }
    instance
        .end_machine(KillPoint::StopMachineKilled, None)
        .await
}

async fn boot(instance: &mut Instance, cancel: &Cancel) -> Result<(), EngineError> {
    // A guest that boots reads who it is.
    instance.inherited = false;
    instance
        .ctx
        .reserve_memory(&instance.id, instance.spec.memory_bytes)?;
    make_tap(instance).await?;
    instance.reach(KillPoint::LaunchTapMade);
    check(cancel)?;

    let description = describe(instance, &instance.spec).await?;
    reset_run_files(instance).await?;
    crate::logs::mark_run(&description.vmm_log, instance.record.boots() + 1)
        .map_err(io_error("writing the VMM log"))?;
    let monitor = instance.ctx.monitor(description.hypervisor)?.clone();
    let machine = monitor.spawn(&description).await.map_err(vmm_error)?;
    instance.reach(KillPoint::LaunchSpawned);
    instance.description = Some(description);
    let spawned = Fact::MachineSpawned(process_ref(machine.process()));
    // From here on `end_machine` finds it.
    instance.live = Some(Live::new(machine, false));
    instance.commit(spawned).await?;
    instance.reach(KillPoint::LaunchMachineRecorded);
    check(cancel)?;

    if let Some(live) = &instance.live {
        live.machine.resume().await.map_err(vmm_error)?;
    }
    instance.reach(KillPoint::LaunchResumed);
    let agent = !instance.spec.skip_guest_agent;
    instance.commit(Fact::CpusStarted { agent }).await?;
    instance.reach(KillPoint::LaunchCpusRecorded);
    Ok(())
}

/// On the bridge, unless its guest still has the addresses of another one.
pub async fn make_tap(instance: &Instance) -> Result<(), EngineError> {
    tap(instance, instance.inherited).await
}

/// A sleeper has its TAP on the bridge: there is nobody behind it.
pub async fn make_sleepers_tap(instance: &Instance) -> Result<(), EngineError> {
    tap(instance, false).await
}

async fn tap(instance: &Instance, detached: bool) -> Result<(), EngineError> {
    let Some(claim) = &instance.claim else {
        return Ok(());
    };
    let network = instance
        .ctx
        .network()
        .await?
        .ok_or_else(|| EngineError::DependencyMissing {
            what: "the server's network is switched off, but this instance has an address".into(),
            mend: "set [network] enabled = true".into(),
        })?;
    let tap = tap_config(instance, claim);
    let made = match detached {
        true => network.ensure_tap_detached(&tap).await,
        false => network.ensure_tap(&tap).await,
    };
    made.map_err(net_error)
}

/// Who a guest is from now on that woke with another one's memory; `None` when its memory is its own.
pub fn new_identity(instance: &Instance) -> Option<Identity> {
    instance.inherited.then(|| Identity {
        hostname: instance.name.clone(),
        machine_id: config::machine_id(&instance.id),
        network: guest_network(instance),
    })
}

pub fn tap_config(instance: &Instance, claim: &crate::NetworkClaim) -> TapConfig {
    TapConfig {
        tap: claim.tap.clone(),
        alias: instance.id.clone(),
        mac: claim.mac.clone(),
        ip: claim.ip,
        owner: None,
    }
}

/// Memory, snapshot and sockets of an earlier run are worthless and in the way.
async fn reset_run_files(instance: &Instance) -> Result<(), EngineError> {
    remove_memory(instance).await?;
    let run = instance.dir().join(RUN_DIR);
    blocking("clearing the last run", move || {
        files::remove_tree(&run)?;
        files::create_private_dir(&run)
    })
    .await?
    .map_err(io_error("clearing what the last run left"))
}

/// What only a guest that runs or sleeps needs.
pub async fn remove_memory(instance: &Instance) -> Result<(), EngineError> {
    let dir = instance.dir();
    blocking("removing memory", move || {
        // The mark goes first: there must never be one without its memory.
        manifest::remove(&dir.join(SNAPSHOT)).map_err(manifest_error)?;
        crate::compression::files::remove_all(&dir).map_err(io_error("removing memory"))
    })
    .await?
}

/// The machine that an instance of this specification would boot on, or why it cannot here.
pub async fn describe(
    instance: &Instance,
    spec: &InstanceSpec,
) -> Result<MachineDescription, EngineError> {
    let dir = instance.dir();
    let image = instance.ctx.image_by_digest(&spec.image_digest).await?;
    let boot = instance.ctx.boot_files().await?;
    let monitor = instance.ctx.monitor(spec.hypervisor)?;
    let probe = monitor.probe().await;
    if let Some(missing) = probe.missing {
        return Err(EngineError::DependencyMissing {
            what: format!(
                "hypervisor {} cannot run here",
                crate::context::wire_name(spec.hypervisor)
            ),
            mend: missing,
        });
    }
    let mut cmdline = qemu::base_cmdline(spec.hypervisor, probe.accel);
    if !instance.ctx.config.kernel_extra_cmdline.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&instance.ctx.config.kernel_extra_cmdline);
    }
    let disk = |serial: &str, path, read_only| Disk {
        serial: serial.into(),
        path,
        read_only,
    };
    Ok(MachineDescription {
        hypervisor: spec.hypervisor,
        machine_type: monitor.machine_type().await.map_err(vmm_error)?,
        accel: probe.accel,
        id: instance.id.clone(),
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        memory: MemoryImage {
            path: dir.join(MEMORY),
            backing: instance.ctx.config.memory,
        },
        kernel: boot.kernel,
        initramfs: boot.initramfs,
        cmdline,
        disks: vec![
            disk(config::ROOTFS_SERIAL, image.rootfs, true),
            disk(config::OVERLAY_SERIAL, dir.join(OVERLAY), false),
            disk(config::CONFIG_SERIAL, dir.join(CONFIG), true),
        ],
        nic: instance.claim.as_ref().map(|c| Nic {
            tap: c.tap.clone(),
            mac: c.mac.clone(),
        }),
        run_dir: dir.join(RUN_DIR),
        vmm_log: dir.join(VMM_LOG),
        app_log: dir.join(APP_LOG),
        generation: Some(
            doze_vmm::new_generation()
                .map_err(crate::context::io_error("making a machine's generation"))?,
        ),
    })
}

/// Writes the config disk for the next boot.
pub async fn write_config(instance: &Instance) -> Result<(), EngineError> {
    let image = instance
        .ctx
        .image_by_digest(&instance.spec.image_digest)
        .await?;
    let guest = guest_config(instance, &image.config)?;
    let disk = config::encode(&guest).map_err(|e| EngineError::InvalidField {
        code: "invalid_field",
        field: "env, entrypoint, cmd".into(),
        value: e.to_string(),
        allowed: format!("at most {} bytes together", config::MAX_JSON),
    })?;
    let path = instance.dir().join(CONFIG);
    blocking("writing the config disk", move || {
        files::write_atomic(&path, &disk, 0o600)
    })
    .await?
    .map_err(io_error("writing the config disk"))
}

/// The program's argument list, as `docker run` would make it: an entrypoint of the request's drops the
/// image's command.
pub fn argv(spec: &InstanceSpec, image: &ImageConfig) -> Vec<String> {
    let entrypoint = spec.entrypoint.as_ref().or(image.entrypoint.as_ref());
    let cmd = match (&spec.cmd, &spec.entrypoint) {
        (Some(cmd), _) => Some(cmd),
        (None, Some(_)) => None,
        (None, None) => image.cmd.as_ref(),
    };
    entrypoint
        .into_iter()
        .chain(cmd)
        .flatten()
        .cloned()
        .collect()
}

fn guest_config(instance: &Instance, image: &ImageConfig) -> Result<GuestConfig, EngineError> {
    let spec = &instance.spec;
    let argv = argv(spec, image);
    if argv.is_empty() {
        return Err(EngineError::InvalidField {
            code: "missing_field",
            field: "cmd".into(),
            value: "absent".into(),
            allowed: "a command, because the image has neither entrypoint nor command".into(),
        });
    }
    let named = |pair: &String| {
        pair.split_once('=')
            .is_some_and(|(key, _)| spec.env.contains_key(key))
    };
    let env = image
        .env
        .iter()
        .filter(|pair| !named(pair))
        .cloned()
        .chain(spec.env.iter().map(|(key, value)| format!("{key}={value}")))
        .collect();
    Ok(GuestConfig {
        version: 1,
        instance_id: instance.id.clone(),
        hostname: instance.name.clone(),
        argv,
        env,
        working_dir: image
            .working_dir
            .clone()
            .filter(|d| !d.is_empty())
            .unwrap_or_else(|| "/".into()),
        user: image.user.clone().unwrap_or_default(),
        stop_signal: image
            .stop_signal
            .clone()
            .unwrap_or_else(|| "SIGTERM".into()),
        network: guest_network(instance),
        skip_guest_agent: spec.skip_guest_agent,
    })
}

fn guest_network(instance: &Instance) -> Option<GuestNetwork> {
    match (&instance.claim, &instance.ctx.config.network) {
        (Some(claim), Some(network)) => Some(GuestNetwork {
            mac: claim.mac.clone(),
            address: claim.ip,
            prefix: network.subnet.prefix,
            gateway: network.gateway,
            dns: instance.ctx.config.dns.clone(),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The monitor cannot depend on the agent's crate; the guest finds its ports by these names.
    #[test]
    fn monitor_and_guest_mean_the_same_ports() {
        assert_eq!(qemu::CONTROL_PORT, config::CONTROL_PORT);
        assert_eq!(qemu::APP_LOG_PORT, config::APP_LOG_PORT);
    }

    #[test]
    fn an_entrypoint_of_the_request_drops_the_images_command() {
        let words = |text: &str| Some(text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let image = ImageConfig {
            entrypoint: words("/entry"),
            cmd: words("serve --all"),
            ..ImageConfig::default()
        };
        let spec = |entrypoint: Option<&str>, cmd: Option<&str>| {
            let mut spec: InstanceSpec = serde_json::from_value(serde_json::json!({
                "image": "i", "image_digest": "d", "platform": "p", "hypervisor": "qemu",
                "vcpus": 1, "memory_bytes": 1, "overlay_bytes": 1, "env": {}, "tags": {},
                "entrypoint": null, "cmd": null, "network_enabled": false,
                "skip_guest_agent": false
            }))
            .unwrap();
            spec.entrypoint = entrypoint.and_then(words);
            spec.cmd = cmd.and_then(words);
            spec
        };
        assert_eq!(
            argv(&spec(None, None), &image),
            ["/entry", "serve", "--all"]
        );
        assert_eq!(argv(&spec(None, Some("one")), &image), ["/entry", "one"]);
        assert_eq!(argv(&spec(Some("/bin/sh"), None), &image), ["/bin/sh"]);
        assert_eq!(
            argv(&spec(Some("/bin/sh"), Some("-c x")), &image),
            ["/bin/sh", "-c", "x"]
        );
        assert!(argv(&spec(None, None), &ImageConfig::default()).is_empty());
    }
}
