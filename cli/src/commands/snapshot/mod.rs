//! `doze snapshot ...`: moments of an instance that are kept.
use doze_api::{Snapshot, client::SnapshotListFilter};

use crate::{
    connection::{self, Server},
    failure::Failure,
};

mod create;
mod export;
mod fork;
mod import;
mod inspect;
mod ls;
mod restore;
mod rm;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Keep a moment of an instance: memory and disk, or the disk of a stopped one
    Create(create::Args),
    /// List snapshots
    Ls(ls::Args),
    /// Show everything about snapshots
    Inspect(inspect::Args),
    /// Bring an instance back to one of its snapshots
    Restore(restore::Args),
    /// Make a new instance from a snapshot
    Fork(fork::Args),
    /// Write a snapshot into a file, for another host
    Export(export::Args),
    /// Take a snapshot that another host exported; its image must be here
    Import(import::Args),
    /// Delete snapshots; what was made from them stays
    Rm(rm::Args),
}

pub async fn run(command: Command, options: &connection::Options) -> Result<u8, Failure> {
    match command {
        Command::Create(args) => create::run(args, options).await,
        Command::Ls(args) => ls::run(args, options).await,
        Command::Inspect(args) => inspect::run(args, options).await,
        Command::Restore(args) => restore::run(args, options).await,
        Command::Fork(args) => fork::run(args, options).await,
        Command::Export(args) => export::run(args, options).await,
        Command::Import(args) => import::run(args, options).await,
        Command::Rm(args) => rm::run(args, options).await,
    }
}

/// The snapshot that `key` means: its name, its id, or the beginning of its id. A name is unique only among the
/// snapshots of one instance; `source` is that instance's id, where the command says which.
async fn find(server: &Server, key: &str, source: Option<&str>) -> Result<Snapshot, Failure> {
    let filter = SnapshotListFilter {
        name: Some(key.to_owned()),
        source_instance_id: source.map(str::to_owned),
        ..SnapshotListFilter::default()
    };
    let named = server
        .client
        .list_snapshots(&filter)
        .await
        .map_err(|e| server.explain(&e))?;
    if let Some(found) = only(key, named)? {
        return Ok(found);
    }
    server
        .client
        .get_snapshot(key)
        .await
        .map_err(|error| match error.status() {
            Some(404) => Failure::new(format!(
                "snapshot {key:?} does not exist; `doze snapshot ls` lists what there is"
            )),
            _ => server.explain(&error),
        })
}

/// `None` without any; several are told apart by their sources.
fn only(key: &str, mut named: Vec<Snapshot>) -> Result<Option<Snapshot>, Failure> {
    if named.len() <= 1 {
        return Ok(named.pop());
    }
    let each: Vec<_> = named
        .iter()
        .map(|snapshot| format!("{} (of {})", snapshot.id, snapshot.source_instance_name))
        .collect();
    Err(Failure::new(format!(
        "several snapshots are called {key:?}: {}; give the id",
        each.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    /// A snapshot as a server with nothing to add to the contract describes it.
    pub(super) fn snapshot(id: &str, name: Option<&str>, source: &str) -> Snapshot {
        serde_json::from_value(serde_json::json!({
            "id": id, "name": name, "kind": "Standby", "created_at": "2026-01-01T00:00:00Z",
            "source_instance_id": format!("{source}-id"), "source_instance_name": source,
            "source_hypervisor": "qemu", "size_bytes": 3 << 20,
        }))
        .unwrap()
    }

    #[test]
    fn a_name_that_several_instances_use_needs_the_id() {
        assert_eq!(only("x", vec![]).unwrap(), None);
        let one = snapshot("a", Some("x"), "web");
        assert_eq!(only("x", vec![one.clone()]).unwrap(), Some(one.clone()));
        let text = only("x", vec![one, snapshot("b", Some("x"), "db")])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("a (of web), b (of db); give the id"),
            "{text}"
        );
    }
}
