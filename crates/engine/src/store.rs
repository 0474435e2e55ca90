//! The durable store: embedded SQLite, WAL, synchronous=FULL, one writer thread.
//!
//! ```text
//!   driver ──Job──> channel ──> writer thread: as many jobs as are waiting, one transaction ──> replies
//! ```
//!
//! A job that returned is on disk. An address and the instance that holds it commit together. The file
//! can be looked at with `sqlite3` while the server runs.
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
};

use doze_host::net::Subnet;
use doze_lifecycle::Record;
use doze_vmm::MachineDescription;
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    InstanceSpec, MemoryCompression, NetworkClaim, Schedule, Snapshot,
    kill::{CommitStep, KillSwitch},
};

mod copies;

use copies::{Change, read_documents};

/// What makes each version of the schema (SQLite's `user_version`) out of the one before it, the first out
/// of an empty file.
const SCHEMAS: [&str; 3] = [SCHEMA_1, copies::SCHEMA, memories::SCHEMA];
/// Jobs of one transaction at most, so that the first of them does not wait for ever.
const MAX_GROUP: usize = 64;

const SCHEMA_1: &str = "
CREATE TABLE instances (
  id            TEXT PRIMARY KEY,
  name          TEXT NOT NULL UNIQUE,
  created_at_us INTEGER NOT NULL,
  document      TEXT NOT NULL
) STRICT;
CREATE TABLE addresses (
  ip          TEXT PRIMARY KEY,
  mac         TEXT NOT NULL UNIQUE,
  tap         TEXT NOT NULL UNIQUE,
  instance_id TEXT NOT NULL UNIQUE REFERENCES instances(id) ON DELETE CASCADE
) STRICT;
CREATE TABLE cursors (
  name  TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT;
";

/// What the store keeps of one instance besides its name and address.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    pub spec: InstanceSpec,
    pub record: Record,
    /// Exact description of the machine of the current or last run.
    pub machine: Option<MachineDescription>,
    /// Its memory is a copy of another instance's, and its guest has not been told yet who it is.
    #[serde(default)]
    pub inherited: bool,
    /// What a rollback in flight brings it back to.
    #[serde(default)]
    pub rollback: Option<Box<PendingRollback>>,
    /// How its memory is kept while it sleeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<MemoryCompression>,
}

/// What an instance becomes when its rollback is committed, kept until it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PendingRollback {
    pub snapshot_id: String,
    pub spec: InstanceSpec,
    /// The record that the memory was captured with; without, only the disk comes back.
    pub memory_of: Option<Box<Record>>,
    /// The memory was a fork's that had not been told yet who it is.
    pub inherited: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct StoredInstance {
    pub id: String,
    pub name: String,
    pub created_at_us: i64,
    pub claim: Option<NetworkClaim>,
    pub document: Document,
}

/// Everything a store holds.
#[derive(Debug, Default)]
pub struct Contents {
    pub instances: Vec<StoredInstance>,
    pub snapshots: Vec<Snapshot>,
    pub schedules: Vec<Schedule>,
}

/// Where addresses come from.
#[derive(Debug, Clone, Copy)]
pub struct AddressPool {
    pub subnet: Subnet,
    pub gateway: Ipv4Addr,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("name {name:?} is taken by {holder}")]
    NameTaken { name: String, holder: String },
    #[error("snapshot name {name:?} is taken by {holder}")]
    SnapshotNameTaken { name: String, holder: String },
    #[error("every address of {subnet} is taken")]
    NoAddress { subnet: String },
    #[error("instance {0} is not in the store")]
    Missing(String),
    #[error("store {path}: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("store: {0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error("store: {0}")]
    Encoding(#[from] serde_json::Error),
    #[error("the store's writer has ended")]
    Closed,
    /// Only in tests, which play a store that fails.
    #[error("store: {0}")]
    Refused(String),
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Job {
    Insert {
        instance: Box<StoredInstance>,
        pool: Option<AddressPool>,
        reply: Reply<Option<NetworkClaim>>,
    },
    Update {
        id: String,
        document: Box<Document>,
        reply: Reply<()>,
    },
    Write {
        change: Change,
        reply: Reply<()>,
    },
    Remember {
        id: String,
        memory: String,
        reply: Reply<()>,
    },
    Memories {
        reply: Reply<Vec<(String, String)>>,
    },
}

/// Handle to the writer thread; the thread ends, and the file is closed, when it is dropped.
pub struct Store {
    jobs: Option<mpsc::Sender<Job>>,
    writer: Option<JoinHandle<()>>,
    kill: KillSwitch,
}

impl Store {
    /// Opens or creates the file (0600), migrates it, and reads everything.
    pub fn open(path: &Path) -> Result<(Store, Contents), StoreError> {
        create_private(path)?;
        let mut connection = Connection::open(path)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "foreign_keys", "ON")?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        migrate(&mut connection, path)?;
        let contents = Contents {
            instances: read_all(&connection, path)?,
            snapshots: read_documents(
                &connection,
                path,
                "SELECT document FROM snapshots ORDER BY created_at_us, id",
            )?,
            schedules: read_documents(&connection, path, "SELECT document FROM schedules")?,
        };
        let (jobs, queue) = mpsc::channel();
        let writer = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || write_loop(connection, &queue))
            .map_err(|e| StoreError::Unreadable {
                path: path.into(),
                reason: e.to_string(),
            })?;
        Ok((
            Store {
                jobs: Some(jobs),
                writer: Some(writer),
                kill: KillSwitch::default(),
            },
            contents,
        ))
    }

    /// Tells `kill` of every commit from now on.
    pub fn watched(mut self, kill: KillSwitch) -> Store {
        self.kill = kill;
        self
    }

    /// Adds an instance and, with a pool, gives it an address, in one transaction.
    pub async fn insert(
        &self,
        instance: StoredInstance,
        pool: Option<AddressPool>,
    ) -> Result<Option<NetworkClaim>, StoreError> {
        self.run(|reply| Job::Insert {
            instance: Box::new(instance),
            pool,
            reply,
        })
        .await
    }

    pub async fn update(&self, id: &str, document: Document) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.run(|reply| Job::Update {
            id,
            document: Box::new(document),
            reply,
        })
        .await
    }

    /// Removes the instance and gives its address back; absent is fine.
    pub async fn remove(&self, id: &str) -> Result<(), StoreError> {
        self.write(Change::RemoveInstance(id.to_owned())).await
    }

    async fn run<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, StoreError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        let step = |step| self.kill.commit(step).map_err(StoreError::Refused);
        step(CommitStep::Before)?;
        jobs.send(job(reply)).map_err(|_| StoreError::Closed)?;
        let done = answer.await.map_err(|_| StoreError::Closed)??;
        step(CommitStep::After)?;
        Ok(done)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the store's writer panicked");
        }
    }
}

fn create_private(path: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map(drop)
        .map_err(|e| StoreError::Unreadable {
            path: path.into(),
            reason: e.to_string(),
        })
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let newest = i64::try_from(SCHEMAS.len()).unwrap_or(i64::MAX);
    if version > newest {
        return Err(StoreError::Unreadable {
            path: path.into(),
            reason: format!("its schema {version} is newer than this program's {newest}"),
        });
    }
    for (made, schema) in (1..).zip(SCHEMAS) {
        if version < made {
            let transaction = connection.transaction()?;
            transaction.execute_batch(schema)?;
            transaction.pragma_update(None, "user_version", made)?;
            transaction.commit()?;
        }
    }
    Ok(())
}

fn read_all(connection: &Connection, path: &Path) -> Result<Vec<StoredInstance>, StoreError> {
    let mut query = connection.prepare(
        "SELECT i.id, i.name, i.created_at_us, i.document, a.ip, a.mac, a.tap
         FROM instances i LEFT JOIN addresses a ON a.instance_id = i.id ORDER BY i.created_at_us, i.id",
    )?;
    let rows = query.query_map([], |row| {
        let address: (Option<String>, Option<String>, Option<String>) =
            (row.get(4)?, row.get(5)?, row.get(6)?);
        Ok((
            row.get(0)?,
            row.get(1)?,
            row.get(2)?,
            row.get::<_, String>(3)?,
            address,
        ))
    })?;
    let mut all = Vec::new();
    for row in rows {
        let (id, name, created_at_us, document, address): (String, String, i64, String, _) = row?;
        let unreadable = |reason: String| StoreError::Unreadable {
            path: path.into(),
            reason,
        };
        let document: Document = serde_json::from_str(&document)
            .map_err(|e| unreadable(format!("instance {id}: {e}")))?;
        document
            .record
            .check_version()
            .map_err(|e| unreadable(format!("instance {id}: {e}")))?;
        let claim = match address {
            (Some(ip), Some(mac), Some(tap)) => {
                let ip = ip
                    .parse()
                    .map_err(|e| unreadable(format!("address {ip:?}: {e}")))?;
                Some(NetworkClaim { ip, mac, tap })
            }
            _ => None,
        };
        all.push(StoredInstance {
            id,
            name,
            created_at_us,
            claim,
            document,
        });
    }
    Ok(all)
}

/// An answer that is sent only once the transaction is on disk.
type Deferred = Box<dyn FnOnce(Result<(), &rusqlite::Error>)>;

fn write_loop(mut connection: Connection, queue: &mpsc::Receiver<Job>) {
    while let Ok(first) = queue.recv() {
        let mut group = vec![first];
        while group.len() < MAX_GROUP
            && let Ok(next) = queue.try_recv()
        {
            group.push(next);
        }
        write_group(&mut connection, group);
    }
}

fn write_group(connection: &mut Connection, group: Vec<Job>) {
    let mut answers: Vec<Deferred> = Vec::new();
    let outcome = (|| {
        let mut transaction = connection.transaction()?;
        for job in group {
            answers.push(run_job(&mut transaction, job)?);
        }
        transaction.commit()
    })();
    for answer in answers {
        answer(outcome.as_ref().copied());
    }
    if let Err(error) = outcome {
        tracing::error!(%error, "store transaction failed");
    }
}

/// Runs one job in its own savepoint: one that fails takes nothing of its group with it.
fn run_job(transaction: &mut Transaction<'_>, job: Job) -> Result<Deferred, rusqlite::Error> {
    fn deferred<T: 'static>(result: Result<T, StoreError>, reply: Reply<T>) -> Deferred {
        Box::new(move |committed| {
            // A caller that went away does not need its answer.
            let _ = reply.send(match committed {
                Ok(()) => result,
                Err(error) => Err(StoreError::Unreadable {
                    path: PathBuf::new(),
                    reason: format!("the transaction failed: {error}"),
                }),
            });
        })
    }
    let savepoint = transaction.savepoint()?;
    Ok(match job {
        Job::Insert {
            instance,
            pool,
            reply,
        } => {
            let result = insert(&savepoint, &instance, pool);
            finish(savepoint, result.is_ok())?;
            deferred(result, reply)
        }
        Job::Update {
            id,
            document,
            reply,
        } => {
            let result = update(&savepoint, &id, &document);
            finish(savepoint, result.is_ok())?;
            deferred(result, reply)
        }
        Job::Write { change, reply } => {
            let result = copies::write(&savepoint, change);
            finish(savepoint, result.is_ok())?;
            deferred(result, reply)
        }
        Job::Remember { id, memory, reply } => {
            let result = memories::write(&savepoint, &id, &memory);
            finish(savepoint, result.is_ok())?;
            deferred(result, reply)
        }
        Job::Memories { reply } => {
            let result = memories::read(&savepoint);
            finish(savepoint, result.is_ok())?;
            deferred(result, reply)
        }
    })
}

fn finish(mut savepoint: rusqlite::Savepoint<'_>, ok: bool) -> Result<(), rusqlite::Error> {
    if !ok {
        savepoint.rollback()?;
    }
    savepoint.commit()
}

fn insert(
    db: &Connection,
    instance: &StoredInstance,
    pool: Option<AddressPool>,
) -> Result<Option<NetworkClaim>, StoreError> {
    let holder: Option<String> = db
        .query_row(
            "SELECT id FROM instances WHERE name = ?1",
            [&instance.name],
            |row| row.get(0),
        )
        .optional()?;
    if let Some(holder) = holder {
        return Err(StoreError::NameTaken {
            name: instance.name.clone(),
            holder,
        });
    }
    db.execute(
        "INSERT INTO instances (id, name, created_at_us, document) VALUES (?1, ?2, ?3, ?4)",
        params![
            instance.id,
            instance.name,
            instance.created_at_us,
            serde_json::to_string(&instance.document)?
        ],
    )?;
    let Some(pool) = pool else { return Ok(None) };
    let claim = claim_address(db, pool)?;
    db.execute(
        "INSERT INTO addresses (ip, mac, tap, instance_id) VALUES (?1, ?2, ?3, ?4)",
        params![claim.ip.to_string(), claim.mac, claim.tap, instance.id],
    )?;
    Ok(Some(claim))
}

/// The next free address after the last one given out, so that a fresh instance does not inherit the
/// connections of one just deleted. MAC and TAP name follow from the address.
fn claim_address(db: &Connection, pool: AddressPool) -> Result<NetworkClaim, StoreError> {
    let hosts = (1u64 << (32 - u32::from(pool.subnet.prefix))) - 2;
    let base = u32::from(pool.subnet.network);
    let last: u64 = db
        .query_row(
            "SELECT value FROM cursors WHERE name = 'address'",
            [],
            |row| row.get::<_, i64>(0),
        )
        .optional()?
        .and_then(|v| u64::try_from(v).ok())
        .unwrap_or(0);
    let mut taken = db.prepare_cached("SELECT 1 FROM addresses WHERE ip = ?1")?;
    for step in 0..hosts {
        let index = (last + step) % hosts + 1;
        let ip = Ipv4Addr::from(base.wrapping_add(u32::try_from(index).unwrap_or(u32::MAX)));
        if ip == pool.gateway || taken.exists([ip.to_string()])? {
            continue;
        }
        db.execute(
            "INSERT INTO cursors (name, value) VALUES ('address', ?1)
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [i64::try_from(index).unwrap_or(0)],
        )?;
        let [a, b, c, d] = ip.octets();
        return Ok(NetworkClaim {
            ip,
            mac: format!("52:54:{a:02x}:{b:02x}:{c:02x}:{d:02x}"),
            tap: format!("dz{a:02x}{b:02x}{c:02x}{d:02x}"),
        });
    }
    Err(StoreError::NoAddress {
        subnet: format!("{}/{}", pool.subnet.network, pool.subnet.prefix),
    })
}

fn update(db: &Connection, id: &str, document: &Document) -> Result<(), StoreError> {
    let changed = db.execute(
        "UPDATE instances SET document = ?2 WHERE id = ?1",
        params![id, serde_json::to_string(document)?],
    )?;
    if changed == 0 {
        return Err(StoreError::Missing(id.to_owned()));
    }
    Ok(())
}

mod memories;
#[cfg(test)]
mod tests;
