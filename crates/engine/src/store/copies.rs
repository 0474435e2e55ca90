//! Snapshots and schedules in the store, and whatever else is written without an answer.
use std::path::Path;

use rusqlite::{Connection, OptionalExtension, params};

use super::{Job, Schedule, Snapshot, Store, StoreError};

/// Neither refers to the instance it was taken of: both outlive it.
pub const SCHEMA: &str = "
CREATE TABLE snapshots (
  id            TEXT PRIMARY KEY,
  source_id     TEXT NOT NULL,
  name          TEXT,
  created_at_us INTEGER NOT NULL,
  document      TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX snapshot_names ON snapshots (source_id, name) WHERE name IS NOT NULL;
CREATE TABLE schedules (
  instance_id TEXT PRIMARY KEY,
  document    TEXT NOT NULL
) STRICT;
";

/// One change that needs nothing back.
pub enum Change {
    RemoveInstance(String),
    AddSnapshot(Box<Snapshot>),
    UpdateSnapshot(Box<Snapshot>),
    RemoveSnapshot(String),
    PutSchedule(Box<Schedule>),
    RemoveSchedule(String),
}

impl Store {
    /// # Errors
    /// [`StoreError::SnapshotNameTaken`] when its source has one of that name.
    pub async fn add_snapshot(&self, snapshot: Snapshot) -> Result<(), StoreError> {
        self.write(Change::AddSnapshot(Box::new(snapshot))).await
    }

    /// One that was removed meanwhile stays so.
    pub async fn update_snapshot(&self, snapshot: Snapshot) -> Result<(), StoreError> {
        self.write(Change::UpdateSnapshot(Box::new(snapshot))).await
    }

    /// Absent is fine.
    pub async fn remove_snapshot(&self, id: &str) -> Result<(), StoreError> {
        self.write(Change::RemoveSnapshot(id.to_owned())).await
    }

    /// Adds or replaces.
    pub async fn put_schedule(&self, schedule: Schedule) -> Result<(), StoreError> {
        self.write(Change::PutSchedule(Box::new(schedule))).await
    }

    /// Absent is fine.
    pub async fn remove_schedule(&self, instance_id: &str) -> Result<(), StoreError> {
        self.write(Change::RemoveSchedule(instance_id.to_owned()))
            .await
    }

    pub(super) async fn write(&self, change: Change) -> Result<(), StoreError> {
        self.run(|reply| Job::Write { change, reply }).await
    }
}

pub fn read_documents<T: serde::de::DeserializeOwned>(
    connection: &Connection,
    path: &Path,
    query: &str,
) -> Result<Vec<T>, StoreError> {
    let mut query = connection.prepare(query)?;
    let rows = query.query_map([], |row| row.get::<_, String>(0))?;
    rows.map(|row| {
        serde_json::from_str(&row?).map_err(|e| StoreError::Unreadable {
            path: path.into(),
            reason: e.to_string(),
        })
    })
    .collect()
}

pub fn write(db: &Connection, change: Change) -> Result<(), StoreError> {
    match change {
        Change::RemoveInstance(id) => db.execute("DELETE FROM instances WHERE id = ?1", [id])?,
        Change::AddSnapshot(snapshot) => return add_snapshot(db, &snapshot),
        Change::UpdateSnapshot(snapshot) => db.execute(
            "UPDATE snapshots SET document = ?2 WHERE id = ?1",
            params![snapshot.id, serde_json::to_string(&snapshot)?],
        )?,
        Change::RemoveSnapshot(id) => db.execute("DELETE FROM snapshots WHERE id = ?1", [id])?,
        Change::PutSchedule(schedule) => db.execute(
            "INSERT INTO schedules (instance_id, document) VALUES (?1, ?2)
             ON CONFLICT (instance_id) DO UPDATE SET document = excluded.document",
            params![schedule.instance_id, serde_json::to_string(&schedule)?],
        )?,
        Change::RemoveSchedule(id) => {
            db.execute("DELETE FROM schedules WHERE instance_id = ?1", [id])?
        }
    };
    Ok(())
}

fn add_snapshot(db: &Connection, snapshot: &Snapshot) -> Result<(), StoreError> {
    let holder: Option<String> = db
        .query_row(
            "SELECT id FROM snapshots WHERE source_id = ?1 AND name = ?2",
            params![snapshot.source_id, snapshot.name],
            |row| row.get(0),
        )
        .optional()?;
    if let (Some(holder), Some(name)) = (holder, &snapshot.name) {
        return Err(StoreError::SnapshotNameTaken {
            name: name.clone(),
            holder,
        });
    }
    db.execute(
        "INSERT INTO snapshots (id, source_id, name, created_at_us, document) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            snapshot.id,
            snapshot.source_id,
            snapshot.name,
            snapshot.created_at_us,
            serde_json::to_string(snapshot)?
        ],
    )?;
    Ok(())
}
