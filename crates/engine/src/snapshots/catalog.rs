//! Which stored snapshots there are, and who is reading them.
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::sync::RwLock;

use super::{Snapshot, SnapshotFilter};
use crate::{EngineError, context::lock};

/// A snapshot and its gate: whoever copies from its folder reads, whoever removes it writes.
#[derive(Debug, Clone)]
pub struct Entry {
    pub snapshot: Arc<Snapshot>,
    pub gate: Arc<RwLock<()>>,
}

/// Mirrors the store's rows; changed only after them.
#[derive(Debug, Default)]
pub struct Catalog {
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Catalog {
    pub fn new(all: Vec<Snapshot>) -> Catalog {
        let catalog = Catalog::default();
        for snapshot in all {
            catalog.add(Arc::new(snapshot));
        }
        catalog
    }

    pub fn add(&self, snapshot: Arc<Snapshot>) {
        let entry = Entry {
            snapshot: snapshot.clone(),
            gate: Arc::default(),
        };
        lock(&self.entries).insert(snapshot.id.clone(), entry);
    }

    /// The same snapshot, told anew. One that is gone stays so.
    pub fn replace(&self, snapshot: Arc<Snapshot>) {
        if let Some(entry) = lock(&self.entries).get_mut(&snapshot.id) {
            entry.snapshot = snapshot;
        }
    }

    pub fn remove(&self, id: &str) {
        lock(&self.entries).remove(id);
    }

    /// In order of creation.
    pub fn list(&self, filter: &SnapshotFilter) -> Vec<Arc<Snapshot>> {
        let mut found: Vec<_> = lock(&self.entries)
            .values()
            .map(|entry| entry.snapshot.clone())
            .filter(|snapshot| filter.matches(snapshot))
            .collect();
        found.sort_by(|a, b| (a.created_at_us, &a.id).cmp(&(b.created_at_us, &b.id)));
        found
    }

    /// By id, by a name that only one has, or by unique id prefix, in this order.
    pub fn find(&self, key: &str) -> Result<Entry, EngineError> {
        let entries = lock(&self.entries);
        if let Some(entry) = entries.get(key) {
            return Ok(entry.clone());
        }
        let named = |entry: &&Entry| entry.snapshot.name.as_deref() == Some(key);
        let mut found: Vec<&Entry> = entries.values().filter(named).collect();
        if found.is_empty() && !key.is_empty() {
            let prefixed = |(id, _): &(&String, &Entry)| id.starts_with(key);
            let range = entries.range(key.to_owned()..).take_while(prefixed);
            found = range.map(|(_, entry)| entry).collect();
        }
        match found.as_slice() {
            [] => Err(not_found(key)),
            [only] => Ok((*only).clone()),
            several => Err(EngineError::Ambiguous {
                prefix: key.to_owned(),
                matches: several
                    .iter()
                    .take(5)
                    .map(|e| e.snapshot.id.clone())
                    .collect(),
            }),
        }
    }

    /// Who has this name among the snapshots of a source.
    pub fn holder(&self, source_id: &str, name: &str) -> Option<String> {
        let entries = lock(&self.entries);
        let same = |s: &Snapshot| s.source_id == source_id && s.name.as_deref() == Some(name);
        let holder = entries.values().find(|entry| same(&entry.snapshot));
        holder.map(|entry| entry.snapshot.id.clone())
    }
}

pub fn not_found(key: &str) -> EngineError {
    EngineError::NotFound {
        what: "snapshot",
        id: key.to_owned(),
    }
}

impl SnapshotFilter {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let has = |(key, value): (&String, &String)| snapshot.tags.get(key) == Some(value);
        self.kind.is_none_or(|kind| kind == snapshot.kind)
            && (self.name.is_none() || self.name == snapshot.name)
            && self
                .source_id
                .as_ref()
                .is_none_or(|id| *id == snapshot.source_id)
            && self.tags.iter().all(has)
    }
}
