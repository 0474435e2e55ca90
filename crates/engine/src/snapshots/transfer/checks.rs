//! Whether this host can use what a description says. Nothing that it says is taken on trust: each value that is
//! used later is either compared with one of ours, or bounded, or replaced.
use std::collections::HashSet;

use doze_agent::config;
use doze_host::conntrack::policy::{Policy, PolicyInput};
use doze_image::Reference;
use doze_lifecycle::Stamp;
use doze_snapshot::manifest::{MANIFEST, MANIFEST_VERSION};
use doze_vmm::{MachineDescription, Probe};
use serde::Deserialize;

use super::{
    Description, Guest, Host, MAX_STATE, MAX_STATE_FILES, VERSION, has_memory, memory::as_told,
    refuse,
};
use crate::{EngineError, InstanceSpec, Limits, Snapshot, SnapshotKind, context::wire_name};

const MAX_TAGS: usize = 50;
const MAX_TAG: usize = 1024;
/// Clocks of two hosts that were measured, not read, differ by some millionths.
const TSC_TOLERANCE: u64 = 1000;

#[derive(Deserialize)]
struct Version {
    version: u32,
    doze: String,
}

pub(super) fn read(text: &[u8]) -> Result<Description, EngineError> {
    let broken = |e: serde_json::Error| EngineError::BrokenStream {
        reason: format!("its description: {e}"),
    };
    let version: Version = serde_json::from_slice(text).map_err(broken)?;
    if version.version > VERSION {
        return Err(refuse(format!(
            "its description has version {}, written by doze {:?}; this doze {} reads up to {VERSION}",
            version.version,
            version.doze,
            env!("CARGO_PKG_VERSION")
        )));
    }
    serde_json::from_slice(text).map_err(broken)
}

/// What can be said without looking at the host.
pub(super) fn description(told: &Description, limits: &Limits) -> Result<(), EngineError> {
    snapshot(&told.snapshot)?;
    let spec = &told.snapshot.spec;
    within(
        "vcpus",
        spec.vcpus.into(),
        1,
        limits.max_vcpus_per_instance.into(),
        "limits.max_vcpus_per_instance",
    )?;
    size(
        "memory",
        spec.memory_bytes,
        limits.max_memory_per_instance,
        "limits.max_memory_per_instance",
    )?;
    size(
        "overlay",
        spec.overlay_bytes,
        limits.max_overlay,
        "limits.max_overlay",
    )?;
    let memory = has_memory(told.snapshot.record.state());
    match (told.snapshot.kind, memory, &told.guest) {
        (SnapshotKind::Stopped, Some(false), None) => Ok(()),
        (SnapshotKind::Standby, Some(true), Some(told_guest)) => guest(told, told_guest),
        _ => Err(broken("kind, record and memory do not belong together")),
    }
}

/// Its record is made anew of what can be checked, and it was not taken later than now. What its source spent in which
/// phase is the other host's account, and nothing here is billed from it.
pub(super) fn forget_times(snapshot: &mut Snapshot, now: &Stamp) {
    let agent = !snapshot.spec.skip_guest_agent;
    snapshot.record = snapshot.record.from_outside(agent, now);
    snapshot.created_at_us = snapshot.created_at_us.clamp(0, now.wall_us.max(0));
}

fn snapshot(told: &Snapshot) -> Result<(), EngineError> {
    told.record
        .check_version()
        .map_err(|reason| refuse(format!("its record: {reason}")))?;
    let id = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if !(1..=64).contains(&told.source_id.len()) || !told.source_id.bytes().all(id) {
        return Err(broken(&format!("source_id {:?}", told.source_id)));
    }
    for name in [Some(&told.source_name), told.name.as_ref()]
        .into_iter()
        .flatten()
    {
        self::name(name)?;
    }
    let long = |text: &String| text.len() > MAX_TAG || text.chars().any(char::is_control);
    let tags = [&told.tags, &told.spec.tags];
    if tags.iter().any(|tags| tags.len() > MAX_TAGS)
        || tags
            .iter()
            .flat_map(|tags| tags.iter())
            .any(|(k, v)| long(k) || long(v))
    {
        return Err(broken("tags"));
    }
    if told.spec.image.parse::<Reference>().is_err() {
        return Err(broken(&format!("image {:?}", told.spec.image)));
    }
    program(&told.spec)
}

/// What a request for an instance would have to be, too.
fn program(spec: &InstanceSpec) -> Result<(), EngineError> {
    let words = [&spec.entrypoint, &spec.cmd]
        .into_iter()
        .flatten()
        .flatten();
    let variables = spec.env.iter().flat_map(|(name, value)| [name, value]);
    if words.chain(variables).any(|word| word.contains('\0'))
        || spec
            .env
            .keys()
            .any(|name| name.is_empty() || name.contains('='))
    {
        return Err(broken("command or environment"));
    }
    if let Some(Policy::Enabled(policy)) = &spec.auto_standby {
        let cidrs = policy.ignore_source_cidrs.iter();
        let again = PolicyInput {
            enabled: true,
            idle_timeout: Some(policy.idle_timeout),
            ignore_source_cidrs: cidrs.map(ToString::to_string).collect(),
            ignore_destination_ports: policy.ignore_destination_ports.clone(),
            max_flow_idle: policy.max_flow_idle,
        };
        if again.normalise().as_ref() != Ok(&Policy::Enabled(policy.clone())) {
            return Err(broken("auto_standby"));
        }
    }
    Ok(())
}

/// The form that instances' and snapshots' names have everywhere.
pub(super) fn name(name: &str) -> Result<(), EngineError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ok = (1..=63).contains(&name.len())
        && name.bytes().all(|b| inner(b) || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    match ok {
        true => Ok(()),
        false => Err(broken(&format!("name {name:?}"))),
    }
}

fn guest(told: &Description, guest: &Guest) -> Result<(), EngineError> {
    let (spec, manifest, machine) = (
        &told.snapshot.spec,
        &guest.manifest,
        &guest.manifest.machine,
    );
    if manifest.version > MANIFEST_VERSION {
        return Err(refuse(format!(
            "its manifest has version {}, this doze reads up to {MANIFEST_VERSION}",
            manifest.version
        )));
    }
    let same = [
        ("hypervisor", machine.hypervisor == spec.hypervisor),
        ("vcpus", machine.vcpus == spec.vcpus),
        ("memory", machine.memory_bytes == spec.memory_bytes),
        ("memory file", manifest.memory.size == spec.memory_bytes),
        ("memory", manifest.memory == as_told(&manifest.memory)),
        ("network", machine.nic.is_some() == spec.network_enabled),
    ];
    if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
        return Err(broken(&format!("machine and instance differ in {what}")));
    }
    disks(machine)?;
    state_files(guest)?;
    for (what, sha256) in [("kernel", &guest.kernel), ("initramfs", &guest.initramfs)] {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        // It becomes a file's name.
        if sha256.len() != 64 || !sha256.bytes().all(hex) {
            return Err(broken(&format!("{what} {sha256:?} is no SHA-256")));
        }
    }
    Ok(())
}

/// Exactly those that we give to machines: a path to anything else must not get near a monitor.
fn disks(machine: &MachineDescription) -> Result<(), EngineError> {
    let ours = [
        (config::ROOTFS_SERIAL, true),
        (config::OVERLAY_SERIAL, false),
        (config::CONFIG_SERIAL, true),
    ];
    let told: Vec<_> = machine
        .disks
        .iter()
        .map(|disk| (disk.serial.as_str(), disk.read_only))
        .collect();
    match told == ours {
        true => Ok(()),
        false => Err(broken(&format!("its disks are {told:?}, not {ours:?}"))),
    }
}

fn state_files(guest: &Guest) -> Result<(), EngineError> {
    let files = &guest.manifest.files;
    let plain = |name: &str| {
        (1..=48).contains(&name.len())
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && name != MANIFEST
    };
    let names: HashSet<_> = files.iter().map(|file| file.name.as_str()).collect();
    let bytes = files
        .iter()
        .try_fold(0_u64, |sum, file| sum.checked_add(file.size));
    let ok = (1..=MAX_STATE_FILES).contains(&files.len())
        && names.len() == files.len()
        && names.iter().all(|name| plain(name))
        && bytes.is_some_and(|bytes| bytes <= MAX_STATE);
    match ok {
        true => Ok(()),
        false => Err(broken("the files of its device state")),
    }
}

/// Whether the guest can go on on this host's CPU.
pub(super) fn host(guest: &Guest, probe: &Probe, here: &Host) -> Result<(), EngineError> {
    let machine = &guest.manifest.machine;
    let hypervisor = wire_name(machine.hypervisor);
    if let Some(missing) = &probe.missing {
        return Err(refuse(format!("{hypervisor} cannot run here: {missing}")));
    }
    if probe.accel != machine.accel {
        return Err(refuse(format!(
            "it ran under {:?}, and {hypervisor} runs under {:?} here",
            machine.accel, probe.accel
        )));
    }
    match (&guest.host.cpu_flags, &here.cpu_flags) {
        (Some(needed), Some(here)) => {
            let missing: Vec<_> = needed
                .difference(here)
                .map(String::as_str)
                .take(8)
                .collect();
            if !missing.is_empty() {
                return Err(refuse(format!(
                    "its guest may use what this CPU has not: {}",
                    missing.join(", ")
                )));
            }
        }
        (None, None) => {
            let (there, here) = (guest.host.tsc_khz, here.tsc_khz);
            if there.abs_diff(here) > here / TSC_TOLERANCE {
                return Err(refuse(format!(
                    "its guest's clock counts at {there} kHz, and this CPU's counter runs at {here} kHz"
                )));
            }
        }
        (Some(_), None) | (None, Some(_)) => return Err(broken("CPU and accelerator")),
    }
    Ok(())
}

fn size(what: &str, bytes: u64, most: u64, key: &str) -> Result<(), EngineError> {
    if !bytes.is_multiple_of(1 << 20) {
        return Err(broken(&format!("{what} of {bytes} bytes")));
    }
    within(what, bytes, 1 << 20, most, key)
}

fn within(what: &str, value: u64, least: u64, most: u64, key: &str) -> Result<(), EngineError> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(refuse(format!(
            "its {what} is {value}; allowed here: {least} to {most} ({key})"
        ))),
    }
}

fn broken(what: &str) -> EngineError {
    EngineError::BrokenStream {
        reason: format!("its description is not one that doze writes: {what}"),
    }
}
