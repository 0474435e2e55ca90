//! Processes with an identity: pid + start time + boot id, never a pid alone.
use std::{ffi::OsString, io, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// Names one process for ever: a reused pid has another start time, another boot another id.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks after boot.
    pub start_ticks: u64,
    pub boot_id: String,
}

/// A process to start that outlives us: own session, no inherited descriptors but those given,
/// stdin from /dev/null.
#[derive(Debug, Clone)]
pub struct Detached {
    pub program: PathBuf,
    pub args: Vec<OsString>,
    /// stdout and stderr are appended here (created 0600).
    pub log: PathBuf,
    /// Put into the environment as `DOZE_MARK` so that [`find_marked`] finds an orphan.
    pub mark: String,
}

/// A pidfd: signals and waiting that cannot hit a stranger.
#[derive(Debug)]
pub struct ProcessHandle {
    id: ProcessId,
}

impl ProcessHandle {
    /// Opens the live process with this identity; `None` when it is gone (a zombie counts as gone).
    pub fn open(id: &ProcessId) -> io::Result<Option<Self>> {
        let _ = id;
        unimplemented!()
    }
    pub fn id(&self) -> &ProcessId {
        &self.id
    }
    /// Resolves when the process is gone; reaps it when it is our child. Cancel-safe.
    pub async fn exited(&self) -> io::Result<()> {
        unimplemented!()
    }
    /// SIGKILL; gone already is fine.
    pub fn kill(&self) -> io::Result<()> {
        unimplemented!()
    }
}

/// Starts it. When this returns the process has exec'ed (or an error says why not).
pub fn spawn_detached(what: &Detached) -> io::Result<ProcessHandle> {
    let _ = what;
    unimplemented!()
}
/// Live processes whose environment holds `DOZE_MARK=<mark>`.
pub fn find_marked(mark: &str) -> io::Result<Vec<ProcessId>> {
    let _ = mark;
    unimplemented!()
}
/// CPU time and resident set of a live process; `None` when gone.
pub fn usage(id: &ProcessId) -> io::Result<Option<Usage>> {
    let _ = id;
    unimplemented!()
}
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Usage {
    pub cpu: Duration,
    pub rss_bytes: u64,
    pub vms_bytes: u64,
}
