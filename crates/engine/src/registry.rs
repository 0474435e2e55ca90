//! Who is there: ids, names, and the mailbox and view of every driver.
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, RwLock},
};

use tokio::sync::{mpsc, watch};

use crate::{EngineError, InstanceView, driver::Message, instance::Published};

/// The way to one driver.
#[derive(Clone)]
pub struct Entry {
    pub mailbox: mpsc::Sender<Message>,
    pub published: watch::Receiver<Published>,
}

impl Entry {
    pub fn view(&self) -> Arc<InstanceView> {
        self.published.borrow().view.clone()
    }
}

#[derive(Default)]
struct Tables {
    by_id: BTreeMap<String, Entry>,
    by_name: HashMap<String, String>,
}

/// Ids and names known to this server. Never held across an await.
#[derive(Default)]
pub struct Registry {
    tables: RwLock<Tables>,
}

impl Registry {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Tables> {
        self.tables
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Tables> {
        self.tables
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn add(&self, view: &InstanceView, entry: Entry) {
        let mut tables = self.write();
        tables.by_name.insert(view.name.clone(), view.id.clone());
        tables.by_id.insert(view.id.clone(), entry);
    }

    /// What was removed; `None` when it was not there.
    pub fn remove(&self, id: &str) -> Option<Entry> {
        let mut tables = self.write();
        let entry = tables.by_id.remove(id)?;
        let name = entry.view().name.clone();
        // The name may belong to a successor already.
        if tables.by_name.get(&name).is_some_and(|holder| holder == id) {
            tables.by_name.remove(&name);
        }
        Some(entry)
    }

    pub fn len(&self) -> usize {
        self.read().by_id.len()
    }

    pub fn all(&self) -> Vec<Entry> {
        self.read().by_id.values().cloned().collect()
    }

    /// By id, exact name, or unique id prefix, in this order.
    pub fn find(&self, key: &str) -> Result<Entry, EngineError> {
        let tables = self.read();
        if let Some(entry) = tables.by_id.get(key) {
            return Ok(entry.clone());
        }
        if let Some(entry) = tables.by_name.get(key).and_then(|id| tables.by_id.get(id)) {
            return Ok(entry.clone());
        }
        let not_found = || EngineError::NotFound {
            what: "instance",
            id: key.to_owned(),
        };
        if key.is_empty() {
            return Err(not_found());
        }
        let mut matches = tables
            .by_id
            .range(key.to_owned()..)
            .take_while(|(id, _)| id.starts_with(key));
        let Some((first, entry)) = matches.next() else {
            return Err(not_found());
        };
        let others: Vec<String> = matches.take(4).map(|(id, _)| id.clone()).collect();
        if others.is_empty() {
            return Ok(entry.clone());
        }
        let matches = std::iter::once(first.clone()).chain(others).collect();
        Err(EngineError::Ambiguous {
            prefix: key.to_owned(),
            matches,
        })
    }
}
