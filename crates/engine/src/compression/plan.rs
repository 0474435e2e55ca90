//! What is recorded of a compression, with the instance or the snapshot whose memory it is about.
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use doze_snapshot::{Codec, Inspection};
use serde::{Deserialize, Serialize};

/// Compression of one memory: wanted, done or failed. What is not wanted is not recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryCompression {
    pub codec: Codec,
    /// Not before; microseconds since the Unix epoch. Stays when the job is halted and planned again.
    pub due_us: i64,
    pub progress: Progress,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// To be done; the raw file is there.
    Planned,
    /// Only the artefact is there. Sizes in bytes.
    Compressed { raw: u64, compressed: u64 },
    /// The raw file is kept, and nothing is tried again.
    Failed { reason: String },
}

impl MemoryCompression {
    pub fn planned(codec: Codec, now_us: i64, delay: Duration) -> MemoryCompression {
        let delay = i64::try_from(delay.as_micros()).unwrap_or(i64::MAX);
        MemoryCompression {
            codec,
            due_us: now_us.saturating_add(delay),
            progress: Progress::Planned,
        }
    }

    /// What an artefact says about itself.
    pub fn found(artefact: &Inspection, codec: Codec, now_us: i64) -> MemoryCompression {
        MemoryCompression {
            codec,
            due_us: now_us,
            progress: Progress::Compressed {
                raw: artefact.raw_size,
                compressed: artefact.compressed_size,
            },
        }
    }

    pub fn is_planned(&self) -> bool {
        self.progress == Progress::Planned
    }
}

/// Whether a job has got beyond waiting; shared with readers, who look when they want to know.
#[derive(Debug, Clone, Default)]
pub struct Running(Arc<AtomicBool>);

impl Running {
    pub(super) fn begin(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn is_running(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
