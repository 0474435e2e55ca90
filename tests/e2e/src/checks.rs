//! Statements about a whole server that must hold at any quiet moment, above all after a crash.
use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{Api, compression, exec, procs, server::Server, world::instance_folders};

/// The API's account, processes, TAPs and folders agree:
/// - each instance in a state with a machine has exactly one VMM, any other none;
/// - no VMM, TAP or folder without an instance;
/// - a snapshot exactly where one is claimed, none half-made, sockets only beside a VMM;
/// - a Running one answers exec.
///
/// Returns the instances. Call it when no operation is in flight.
pub async fn agree(api: &Api, server: &Server) -> Result<Vec<Value>> {
    let instances = api.instances().await?;
    let vmms = procs::vmms(&server.data_dir)?;
    let taps = procs::taps(&server.bridge)?;
    let ids: BTreeSet<&str> = instances.iter().filter_map(|i| i["id"].as_str()).collect();
    for vmm in &vmms {
        ensure!(
            ids.contains(vmm.instance.as_str()),
            "VMM {} belongs to no instance: {}",
            vmm.pid,
            vmm.instance
        );
    }
    for (tap, alias) in &taps {
        ensure!(
            ids.contains(alias.as_str()),
            "TAP {tap} belongs to no instance: {alias:?}"
        );
    }
    for folder in instance_folders(&server.data_dir)? {
        ensure!(
            ids.contains(folder.as_str()),
            "folder {folder} belongs to no instance"
        );
    }
    for instance in &instances {
        let id = instance["id"].as_str().context("id")?;
        let state = instance["state"].as_str().context("state")?;
        let own = vmms.iter().filter(|v| v.instance == id).count();
        let machine = matches!(
            state,
            "Created" | "Initializing" | "Running" | "Paused" | "Shutdown"
        );
        ensure!(
            own == usize::from(machine),
            "{id} is {state} and has {own} VMMs"
        );
        // A sleeping one keeps its TAP, and with it its address.
        if (machine || state == "Standby") && instance["network"]["enabled"] == true {
            ensure!(
                taps.iter().any(|(_, alias)| alias == id),
                "{id} is {state} and has no TAP"
            );
        }
        files(server, instance, machine)?;
        if state == "Running" {
            let echo = exec::sh(api, id, "echo alive")
                .await
                .with_context(|| format!("exec in {id}, which is Running"))?;
            ensure!(echo == "alive", "exec in {id} said {echo:?}");
        }
    }
    Ok(instances)
}

/// What the instance's folder holds fits its state.
fn files(server: &Server, instance: &Value, machine: bool) -> Result<()> {
    let id = instance["id"].as_str().context("id")?;
    let state = instance["state"].as_str().context("state")?;
    let dir = server.data_dir.join("instances").join(id);
    let there = |name: &str| dir.join(name).exists();
    ensure!(
        !there("snapshot.stage"),
        "{id} is {state} and has a half-made snapshot"
    );
    let asleep = state == "Standby";
    ensure!(
        there("snapshot") == asleep,
        "{id} is {state}; a snapshot lies in its folder: {}",
        !asleep
    );
    ensure!(
        instance["has_snapshot"] == asleep,
        "{id} is {state} and says has_snapshot: {}",
        instance["has_snapshot"]
    );
    ensure!(
        there("run") == machine,
        "{id} is {state}; sockets lie in its folder: {}",
        !machine
    );
    memory(&dir, instance, asleep)
}

/// Memory lies in the form that the API names; what is still to be compressed may be so by now.
fn memory(dir: &Path, instance: &Value, asleep: bool) -> Result<()> {
    let compression = &instance["standby_compression"];
    let forms = compression::forms(dir)?;
    let whole = |form: &&String| !form.starts_with('.');
    let right = match (asleep, compression["state"].as_str()) {
        (true, None | Some("error")) => forms == ["memory"],
        (true, Some("compressed")) => matches!(&forms[..], [one] if one.starts_with("memory.")),
        // While a job works there are half-made ones, and for a moment two whole ones.
        (true, Some(_)) => forms.iter().any(|form| whole(&form)),
        (false, None) => forms.iter().all(|form| form == "memory"),
        (false, Some(_)) => false,
    };
    ensure!(right, "memory lies as {forms:?}: {instance}");
    Ok(())
}
