//! What became of compressions since this server started. At any moment `planned` is the sum of all the other
//! counts of jobs: each step of a job moves one from here to there under one lock.
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use doze_snapshot::Algorithm;
use doze_vmm::Hypervisor;

use crate::context::lock;

/// Whose memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A sleeping instance's.
    Standby,
    /// A stored snapshot's.
    Snapshot,
}

impl Source {
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::Standby => "standby",
            Source::Snapshot => "snapshot",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Labels {
    pub algorithm: Algorithm,
    pub level: u8,
    pub hypervisor: Hypervisor,
    pub source: Source,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum JobResult {
    Success,
    Failed,
    /// Halted while it compressed.
    Canceled,
    /// Halted before it began.
    Skipped,
}

impl JobResult {
    pub const ALL: [JobResult; 4] = [
        JobResult::Success,
        JobResult::Failed,
        JobResult::Canceled,
        JobResult::Skipped,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            JobResult::Success => "success",
            JobResult::Failed => "failed",
            JobResult::Canceled => "canceled",
            JobResult::Skipped => "skipped",
        }
    }
}

/// How a restore came to its raw memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Preparation {
    /// It was there.
    Raw,
    Decompress,
}

impl Preparation {
    pub const fn as_str(self) -> &'static str {
        match self {
            Preparation::Raw => "raw",
            Preparation::Decompress => "decompress",
        }
    }
}

/// Counts of values up to bounds, as Prometheus has them.
#[derive(Debug, Clone)]
pub struct Histogram {
    pub bounds: &'static [f64],
    /// One more than there are bounds; not cumulative.
    pub counts: Vec<u64>,
    pub sum: f64,
}

impl Histogram {
    const SECONDS: &'static [f64] = &[
        0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
    ];
    const RATIO: &'static [f64] = &[1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0, 32.0, 64.0];

    fn new(bounds: &'static [f64]) -> Histogram {
        Histogram {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    fn add(&mut self, value: f64) {
        let slot = self.bounds.iter().position(|bound| value <= *bound);
        self.counts[slot.unwrap_or(self.bounds.len())] += 1;
        self.sum += value;
    }
}

#[derive(Debug, Clone)]
pub struct Jobs {
    pub planned: u64,
    pub pending: u64,
    pub active: u64,
    /// By how they ended; all four are there.
    pub ended: BTreeMap<JobResult, u64>,
    /// Bytes of raw memory, holes included, and of artefacts, of the successful ones.
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// Seconds that those worked which began, by result.
    pub duration: BTreeMap<JobResult, Histogram>,
    /// Seconds from plan to begin, delay included.
    pub wait: Histogram,
    /// Raw bytes by compressed ones.
    pub ratio: Histogram,
}

impl Default for Jobs {
    fn default() -> Jobs {
        Jobs {
            planned: 0,
            pending: 0,
            active: 0,
            ended: JobResult::ALL.map(|result| (result, 0)).into(),
            bytes_in: 0,
            bytes_out: 0,
            duration: BTreeMap::new(),
            wait: Histogram::new(Histogram::SECONDS),
            ratio: Histogram::new(Histogram::RATIO),
        }
    }
}

/// One look at all counters.
#[derive(Debug, Clone, Default)]
pub struct CompressionMetrics {
    pub jobs: BTreeMap<Labels, Jobs>,
    /// Jobs that were halted while they compressed, by the operation that needed the files.
    pub preemptions: BTreeMap<(Labels, &'static str), u64>,
    /// Seconds until a restore had its raw memory.
    pub preparations: BTreeMap<(Preparation, Hypervisor), Histogram>,
}

#[derive(Default)]
pub struct Counters(Mutex<CompressionMetrics>);

impl Counters {
    pub fn view(&self) -> CompressionMetrics {
        lock(&self.0).clone()
    }

    pub fn planned(self: &Arc<Self>, labels: Labels) -> Ticket {
        let ticket = Ticket {
            counters: self.clone(),
            labels,
            stage: Stage::Pending(Instant::now()),
        };
        ticket.count(|jobs| {
            jobs.planned += 1;
            jobs.pending += 1;
        });
        ticket
    }

    pub fn prepared(&self, how: Preparation, hypervisor: Hypervisor, took: Duration) {
        let mut metrics = lock(&self.0);
        let key = (how, hypervisor);
        let histogram = metrics.preparations.entry(key);
        histogram
            .or_insert_with(|| Histogram::new(Histogram::SECONDS))
            .add(took.as_secs_f64());
    }
}

enum Stage {
    Pending(Instant),
    Active(Instant),
    Ended,
}

/// One job in the counts. One that is dropped unended ended all the same.
pub struct Ticket {
    counters: Arc<Counters>,
    labels: Labels,
    stage: Stage,
}

impl Ticket {
    fn count(&self, change: impl FnOnce(&mut Jobs)) {
        change(lock(&self.counters.0).jobs.entry(self.labels).or_default());
    }

    pub fn begun(&mut self) {
        if let Stage::Pending(since) = self.stage {
            self.count(|jobs| {
                jobs.pending -= 1;
                jobs.active += 1;
                jobs.wait.add(since.elapsed().as_secs_f64());
            });
            self.stage = Stage::Active(Instant::now());
        }
    }

    pub fn has_begun(&self) -> bool {
        matches!(self.stage, Stage::Active(_))
    }

    /// Raw and compressed bytes.
    pub fn succeeded(mut self, raw: u64, compressed: u64) {
        self.end(JobResult::Success, None);
        self.count(|jobs| {
            jobs.bytes_in += raw;
            jobs.bytes_out += compressed;
            // Sizes of files are exact far beyond what memory has.
            jobs.ratio.add(raw as f64 / compressed.max(1) as f64);
        });
    }

    /// Without success. `by`: who halted it, if somebody did.
    pub fn ended(mut self, result: JobResult, by: Option<&'static str>) {
        self.end(result, by);
    }

    /// All of it at once: whoever looks finds it here or there.
    fn end(&mut self, result: JobResult, by: Option<&'static str>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        let mut metrics = lock(&self.counters.0);
        let jobs = metrics.jobs.entry(self.labels).or_default();
        match stage {
            Stage::Ended => return,
            Stage::Pending(_) => jobs.pending -= 1,
            Stage::Active(since) => {
                jobs.active -= 1;
                let histogram = jobs.duration.entry(result);
                histogram
                    .or_insert_with(|| Histogram::new(Histogram::SECONDS))
                    .add(since.elapsed().as_secs_f64());
            }
        }
        *jobs.ended.entry(result).or_default() += 1;
        // One that had not begun was in nobody's way.
        if let (JobResult::Canceled, Some(by)) = (result, by) {
            *metrics.preemptions.entry((self.labels, by)).or_default() += 1;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let result = match self.stage {
            Stage::Ended => return,
            Stage::Pending(_) => JobResult::Skipped,
            Stage::Active(_) => JobResult::Failed,
        };
        self.end(result, None);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn planned_is_the_sum_of_what_became_of_them() {
        let counters = Arc::new(Counters::default());
        let labels = Labels {
            algorithm: Algorithm::Lz4,
            level: 0,
            hypervisor: Hypervisor::Qemu,
            source: Source::Standby,
        };
        let check = |expected: [u64; 7]| {
            let view = counters.view();
            let jobs = &view.jobs[&labels];
            let ended = JobResult::ALL.map(|result| jobs.ended[&result]);
            let all = [jobs.planned, jobs.pending, jobs.active];
            assert_eq!([all.as_slice(), &ended].concat(), expected);
            let sum = jobs.pending + jobs.active + ended.iter().sum::<u64>();
            assert_eq!(jobs.planned, sum);
        };
        let mut good = counters.planned(labels);
        let mut canceled = counters.planned(labels);
        let skipped = counters.planned(labels);
        let dropped = counters.planned(labels);
        check([4, 4, 0, 0, 0, 0, 0]);
        good.begun();
        canceled.begun();
        canceled.begun();
        check([4, 2, 2, 0, 0, 0, 0]);
        good.succeeded(300, 100);
        canceled.ended(JobResult::Canceled, Some("fork"));
        skipped.ended(JobResult::Skipped, Some("restore"));
        drop(dropped);
        let mut lost = counters.planned(labels);
        lost.begun();
        drop(lost);
        check([5, 0, 0, 1, 1, 1, 2]);
        let view = counters.view();
        let jobs = &view.jobs[&labels];
        assert_eq!((jobs.bytes_in, jobs.bytes_out), (300, 100));
        assert_eq!(jobs.ratio.sum, 3.0);
        assert_eq!(jobs.wait.counts.iter().sum::<u64>(), 3);
        assert_eq!(jobs.duration.len(), 3);
        let preemptions: Vec<_> = view.preemptions.into_iter().collect();
        assert_eq!(preemptions, [((labels, "fork"), 1)]);
    }
}
