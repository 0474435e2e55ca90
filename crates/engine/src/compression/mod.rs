//! Memory that sleeps is compressed in the background, where somebody wants it: for less disk, never for a slower
//! standby nor a wrong restore.
//!
//! ```text
//!             delay, turn                 stage file, checked          raw file goes        recorded
//!   planned ───────────────> compressing ─────────────────> artefact ────────────────> ... ──────────> compressed
//!      │ pending: halted it is *skipped*   │ active: halted it is *canceled*  └──────── only forward ────────┘
//!      └── whoever needs the files halts the job and waits until it is gone: then the raw file is as it was
//! ```
//! In a folder (of an instance or of a stored snapshot) the raw file is the truth as long as it is there; without
//! it the artefact is ([`files`]). A job belongs to one owner, who alone decides what became of it: the driver
//! of a sleeping instance ([`sleeping`]), or a snapshot's own task ([`stored`]). A plan is part of what they
//! record, so it survives the server, with its deadline.
pub mod counters;
pub mod files;
mod job;
pub mod plan;
pub mod policy;
mod sleeping;
pub mod stored;
mod unpack;

use std::sync::Arc;

use tokio::sync::Semaphore;

pub use job::Job;
pub use sleeping::found;
pub use unpack::{codec_error, unpack, verify};

use counters::Counters;
use policy::SnapshotConfig;
use stored::StoredJobs;

/// What all jobs of a server share.
pub struct Compressions {
    pub config: SnapshotConfig,
    pub counters: Arc<Counters>,
    pub stored: StoredJobs,
    /// Those that compress at the same time.
    turns: Arc<Semaphore>,
}

impl Compressions {
    pub fn new(config: SnapshotConfig) -> Compressions {
        Compressions {
            config,
            counters: Arc::default(),
            stored: StoredJobs::default(),
            turns: Arc::new(Semaphore::new(config.max_concurrent_compressions.max(1))),
        }
    }
}
