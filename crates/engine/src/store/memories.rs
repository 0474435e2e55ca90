//! What auto-standby remembers of an instance. Apart from its document, because not its driver but its
//! watcher writes it; gone with it.
use rusqlite::{Connection, params};
use tokio::sync::oneshot;

use super::{Job, Store, StoreError};

pub(super) const SCHEMA: &str = "
CREATE TABLE auto_standby (
  instance_id TEXT PRIMARY KEY REFERENCES instances(id) ON DELETE CASCADE,
  memory      TEXT NOT NULL
) STRICT;
";

impl Store {
    /// Keeps it for as long as the instance is there.
    pub async fn remember(&self, id: &str, memory: String) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.run(|reply| Job::Remember { id, memory, reply }).await
    }

    /// All of them, by instance.
    pub async fn memories(&self) -> Result<Vec<(String, String)>, StoreError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        // Nothing is written, so this is none of the commits that tests count.
        let sent = jobs.send(Job::Memories { reply });
        sent.map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

pub(super) fn write(db: &Connection, id: &str, memory: &str) -> Result<(), StoreError> {
    let changed = db.execute(
        "INSERT INTO auto_standby (instance_id, memory) SELECT id, ?2 FROM instances WHERE id = ?1
         ON CONFLICT (instance_id) DO UPDATE SET memory = excluded.memory",
        params![id, memory],
    )?;
    match changed {
        0 => Err(StoreError::Missing(id.to_owned())),
        _ => Ok(()),
    }
}

pub(super) fn read(db: &Connection) -> Result<Vec<(String, String)>, StoreError> {
    let mut query = db.prepare("SELECT instance_id, memory FROM auto_standby")?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}
