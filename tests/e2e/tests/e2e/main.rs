//! End-to-end cases. Each file holds the cases of one subject; this one says which run where.
//!
//! Groups run two at a time, and one more of those that mostly wait, each on a server of its own; a group's cases share that server and run
//! one after another. Filter by name: `cargo test -p doze-e2e -- qemu-microvm::exec`.
use std::{process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result};
use doze_e2e::{
    Case, Group, Sample, World, harness,
    preflight::Tools,
    sandbox::{self, Sandbox},
    world::WorldOptions,
};

mod auto_standby;
mod bad_input;
mod billing;
mod cli;
mod compression;
mod copies;
mod crash;
mod crash_compression;
mod crash_copies;
mod crash_standby;
mod exec;
mod hosts;
mod lifecycle;
mod logs;
mod lookup;
mod network;
mod restart;
mod sdk;
mod standby;
mod standby_disk;
mod standby_faults;
mod stateful;

fn main() -> ExitCode {
    sandbox::enter(|sandbox| match run(sandbox) {
        Ok(code) => code,
        Err(e) => {
            println!(
                "{e:#}\n\ntest result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out"
            );
            ExitCode::FAILURE
        }
    })
}

fn run(sandbox: Sandbox) -> Result<ExitCode> {
    let tools = Arc::new(Tools::find()?);
    let sandbox = Arc::new(sandbox);
    let points = crash::kill_points(&tools)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Cases block theirs now and then; one for each group at a time, and one that is free.
        .worker_threads(4)
        .build()?;
    let make = move |name: &str, options: &WorldOptions| {
        World::new(tools.clone(), sandbox.clone(), name, options)
    };
    Ok(runtime.block_on(harness::run(groups(&points).context("groups")?, make)))
}

fn groups(points: &[String]) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    // The longest groups first, so that the two workers end at about the same time.
    groups.extend(crash::groups(points)?);
    let sample = Sample::from_env()?;
    groups.extend(crash_standby::groups(points, &sample)?);
    groups.extend(crash_copies::groups(points, &sample)?);
    groups.extend(crash_compression::groups(points, &sample)?);
    groups.extend(standby_disk::groups(&sample));
    groups.extend(standby_faults::groups(&sample));
    groups.extend(copies::groups());
    groups.extend(compression::groups(&sample));
    groups.extend(auto_standby::groups(&sample));
    groups.push(Group::on("qemu-microvm", "-sdk", sdk::cases()));
    for hypervisor in ["qemu", "qemu-microvm"] {
        groups.push(Group::on(hypervisor, "", shared_cases()));
        groups.push(Group::on(hypervisor, "-standby", standby::cases()));
        groups.push(Group::on(hypervisor, "-restart", restart::cases()));
        groups.push(Group::on(hypervisor, "-billing", billing::cases()).calm());
    }
    groups.push(Group::on("qemu-microvm", "-bad-input", bad_input::cases()));
    groups.push(Group::on("qemu-microvm", "-hosts", hosts::cases()));
    groups.push(Group::on("qemu-microvm", "-cli", cli::cases()));
    Ok(groups)
}

/// What is true of every backend.
fn shared_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(lifecycle::cases());
    cases.extend(exec::cases());
    cases.extend(logs::cases());
    cases.extend(lookup::cases());
    cases.extend(network::cases());
    cases.extend(stateful::cases());
    cases
}
