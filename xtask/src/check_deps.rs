//! Keeps the arrows between our crates pointing one way.
//!
//! ```text
//!   cli ──> daemon ──> engine ──> lifecycle
//!    │         │          ├─────> vmm ────┐
//!    └──> api <┘          ├─────> image ──┼──> host <── snapshot <── cli, engine
//!                         └─────> agent   │
//!   guest ──> agent                     (host, agent, lifecycle, api: nothing of ours)
//! ```
//!
//! Cargo already refuses cycles; this refuses the edges that are possible and wrong, such as a wire
//! type in the engine or a file system call in `lifecycle`. The table below is the rule: a new edge
//! is a line in it, and so a decision somebody reads.
use std::{collections::BTreeSet, process::Command};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

/// What each of our crates may depend on among our crates, for any kind of dependency.
const ALLOWED: &[(&str, &[&str])] = &[
    ("doze-lifecycle", &[]),
    ("doze-host", &[]),
    ("doze-agent", &[]),
    ("doze-api", &[]),
    ("doze-vmm", &["doze-host"]),
    ("doze-image", &["doze-host"]),
    ("doze-snapshot", &["doze-host"]),
    (
        "doze-engine",
        &[
            "doze-lifecycle",
            "doze-host",
            "doze-vmm",
            "doze-image",
            "doze-snapshot",
            "doze-agent",
        ],
    ),
    // The daemon assembles: it hands configuration down and converts both ways between engine and wire.
    (
        "doze-daemon",
        &[
            "doze-engine",
            "doze-api",
            "doze-lifecycle",
            "doze-host",
            "doze-vmm",
            "doze-image",
            "doze-agent",
        ],
    ),
    // `serve` and the configuration come from the daemon, `doctor` asks the host's own probes,
    // `snapshot-tool` works on files without a server, and durations on the command line are read by
    // the pure crate that reads them everywhere.
    (
        "doze",
        &[
            "doze-daemon",
            "doze-api",
            "doze-host",
            "doze-lifecycle",
            "doze-snapshot",
        ],
    ),
    ("doze-guest", &["doze-agent"]),
    // The cases speak REST and know nothing of the inside; the tools need nothing of it.
    ("doze-e2e", &[]),
    ("xtask", &[]),
];

/// Crates whose foreign dependencies are part of their promise.
const PURE: &[(&str, &[&str])] = &[
    // A function of its arguments: no runtime, no file, no clock can get in without a line here.
    ("doze-lifecycle", &["serde", "serde_json", "thiserror"]),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `null` for a normal dependency, else `dev` or `build`.
    kind: Option<String>,
    /// Set for a dependency inside the workspace.
    path: Option<String>,
}

/// Asks cargo for the workspace's manifests and checks them. Prints what it looked at.
pub fn run() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked"])
        .output()
        .context("run cargo metadata")?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let metadata: Metadata =
        serde_json::from_slice(&output.stdout).context("read cargo's metadata")?;
    let (edges, violations) = check(&metadata.packages);
    for violation in &violations {
        eprintln!("check-deps: {violation}");
    }
    if !violations.is_empty() {
        bail!(
            "{} forbidden; the rule is the table in xtask/src/check_deps.rs",
            violations.len()
        );
    }
    println!(
        "check-deps: {} crates, {edges} edges between them, all allowed",
        metadata.packages.len()
    );
    Ok(())
}

/// Counts the edges inside the workspace and describes the forbidden ones.
fn check(packages: &[Package]) -> (usize, Vec<String>) {
    let mut edges = 0;
    let mut violations = Vec::new();
    for package in packages {
        let Some(allowed) = entry(ALLOWED, &package.name) else {
            violations.push(format!(
                "{} is not in the table: say what it may depend on",
                package.name
            ));
            continue;
        };
        let pure = entry(PURE, &package.name);
        // A crate named for two kinds is still one edge.
        let mut seen = BTreeSet::new();
        for dependency in &package.dependencies {
            if dependency.path.is_some() {
                edges += usize::from(seen.insert(&dependency.name));
                if !allowed.contains(&dependency.name.as_str()) {
                    violations.push(format!(
                        "{} -> {} is not allowed",
                        package.name, dependency.name
                    ));
                }
            } else if dependency.kind.is_none()
                && pure.is_some_and(|list| !list.contains(&dependency.name.as_str()))
            {
                violations.push(format!(
                    "{} is pure and must not use {}",
                    package.name, dependency.name
                ));
            }
        }
    }
    (edges, violations)
}

fn entry(table: &'static [(&str, &[&str])], name: &str) -> Option<&'static [&'static str]> {
    table
        .iter()
        .find(|(crate_name, _)| *crate_name == name)
        .map(|(_, list)| *list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, dependencies: &[(&str, bool, Option<&str>)]) -> Package {
        Package {
            name: name.to_owned(),
            dependencies: dependencies
                .iter()
                .map(|(name, ours, kind)| Dependency {
                    name: (*name).to_owned(),
                    kind: kind.map(str::to_owned),
                    path: ours.then(|| "/somewhere".to_owned()),
                })
                .collect(),
        }
    }

    #[test]
    fn the_planned_edges_pass() {
        let packages = [
            package(
                "doze-engine",
                &[("doze-lifecycle", true, None), ("tokio", false, None)],
            ),
            package(
                "doze-lifecycle",
                &[("serde", false, None), ("proptest", false, Some("dev"))],
            ),
        ];
        assert_eq!(check(&packages), (1, Vec::new()));
    }

    #[test]
    fn an_arrow_upwards_is_named() {
        let packages = [package("doze-engine", &[("doze-api", true, None)])];
        let (_, violations) = check(&packages);
        assert_eq!(violations, ["doze-engine -> doze-api is not allowed"]);
    }

    #[test]
    fn a_test_only_edge_counts_too() {
        let packages = [package("doze-host", &[("doze-engine", true, Some("dev"))])];
        assert_eq!(check(&packages).1.len(), 1);
    }

    #[test]
    fn the_pure_crate_gets_no_runtime() {
        let packages = [package("doze-lifecycle", &[("tokio", false, None)])];
        assert_eq!(
            check(&packages).1,
            ["doze-lifecycle is pure and must not use tokio"]
        );
    }

    #[test]
    fn an_unknown_crate_must_be_decided_on() {
        assert_eq!(check(&[package("doze-new", &[])]).1.len(), 1);
    }
}
