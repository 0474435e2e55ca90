//! The memory of a sleeping instance: its driver owns the job and decides what becomes of it.
use super::{
    files,
    job::{Ended, Job, Order, Outcome},
    plan::{MemoryCompression, Progress},
    policy::{self, StandbyOptions},
};
use crate::{
    EngineError,
    compression::counters::{JobResult, Labels, Source},
    context::{blocking, io_error},
    instance::{Instance, store_error},
    kill::KillPoint,
    now,
};
use doze_lifecycle::State;
use doze_snapshot::{Codec, Inspection};

impl Instance {
    /// What is to become of its memory when it sleeps.
    pub fn plan_compression(&self, options: StandbyOptions) -> Option<MemoryCompression> {
        let (policy, config) = (self.spec.snapshot_policy, self.ctx.compression.config);
        let codec = policy::effective(options.compression, policy, config)?;
        let delay = policy::delay(options, policy);
        Some(MemoryCompression::planned(codec, now().wall_us, delay))
    }

    /// The same of memory that came from elsewhere to sleep here. It may have come compressed.
    pub async fn plan_compression_of_copy(
        &self,
        dir: std::path::PathBuf,
    ) -> Result<Option<MemoryCompression>, EngineError> {
        let found = blocking("looking for memory", move || found(&dir)).await??;
        Ok(found.or_else(|| self.plan_compression(StandbyOptions::default())))
    }

    /// Whoever needs the files, or ends the sleep, comes first: when this returns nobody else is at work in them. A
    /// plan stays a plan.
    pub async fn halt_compression(&mut self, by: &'static str) {
        let Some(job) = self.compression_job.take() else {
            return;
        };
        job.control().halt();
        let Ended { outcome, ticket } = job.end().await;
        let begun = ticket.as_ref().is_some_and(|ticket| ticket.has_begun());
        let result = match begun {
            true => JobResult::Canceled,
            false => JobResult::Skipped,
        };
        match outcome {
            Outcome::Skipped | Outcome::Canceled => {}
            // It was faster, but nobody has heard of it: the raw file is there and costs nothing to read.
            Outcome::Made(_) => {
                let dir = self.dir();
                let dropped = blocking("", move || files::drop_artefacts(&dir)).await;
                // Left, it counts nothing as long as the raw file is there.
                if let Err(error) = dropped.and_then(|d| d.map_err(io_error("removing it"))) {
                    self.note(&format!("an artefact that nobody wants is left: {error}"));
                }
            }
            Outcome::Found(artefact) => {
                self.adopt(&artefact).await;
                if let Some(ticket) = ticket {
                    ticket.succeeded(artefact.raw_size, artefact.compressed_size);
                }
                return;
            }
            // By itself, just before.
            Outcome::Failed(reason) => {
                return self.compression_failed(reason, ticket).await;
            }
        }
        if begun {
            self.note(&format!("compression of its memory halted by {by}"));
        }
        if let Some(ticket) = ticket {
            ticket.ended(result, Some(by));
        }
        self.publish();
    }

    /// At rest: a plan that nobody works at is begun. Cheap when there is none.
    pub fn follow_up(&mut self) {
        let asleep = self.record.state() == State::Standby && self.record.operation().is_none();
        let plan = self.compression.as_ref().filter(|c| c.is_planned());
        let (true, None, Some(plan)) = (asleep, &self.compression_job, plan) else {
            return;
        };
        let order = Order {
            dir: self.dir(),
            codec: plan.codec,
            due_us: plan.due_us,
            labels: Labels {
                algorithm: plan.codec.algorithm(),
                level: plan.codec.level(),
                hypervisor: self.spec.hypervisor,
                source: Source::Standby,
            },
            owner: format!("instance {}", self.id),
        };
        self.compression_job = Some(Job::start(&self.ctx, order));
        self.publish();
    }

    /// The job has ended by itself.
    pub async fn compression_ended(&mut self) {
        let Some(job) = self.compression_job.take_if(|job| job.is_done()) else {
            return;
        };
        let Ended { outcome, ticket } = job.end().await;
        match outcome {
            Outcome::Made(artefact) => {
                self.reach(KillPoint::CompressionMade);
                let dir = self.dir();
                let dropped = blocking("removing raw memory", move || files::drop_raw(&dir)).await;
                if let Err(error) = dropped.and_then(|d| d.map_err(io_error("removing raw memory")))
                {
                    // It is there, and counts.
                    return self.compression_failed(error.to_string(), ticket).await;
                }
                self.reach(KillPoint::CompressionRawRemoved);
                self.adopt(&artefact).await;
                self.reach(KillPoint::CompressionRecorded);
                if let Some(ticket) = ticket {
                    ticket.succeeded(artefact.raw_size, artefact.compressed_size);
                }
            }
            Outcome::Found(artefact) => {
                self.adopt(&artefact).await;
                if let Some(ticket) = ticket {
                    ticket.succeeded(artefact.raw_size, artefact.compressed_size);
                }
            }
            Outcome::Failed(reason) => self.compression_failed(reason, ticket).await,
            // Only whoever halts it makes it end so, and takes it before.
            Outcome::Skipped | Outcome::Canceled => {}
        }
    }

    async fn compression_failed(
        &mut self,
        reason: String,
        ticket: Option<super::counters::Ticket>,
    ) {
        self.note(&format!("compressing its memory failed: {reason}"));
        self.record_compression(Progress::Failed { reason }).await;
        if let Some(ticket) = ticket {
            ticket.ended(JobResult::Failed, None);
        }
    }

    /// Its memory is an artefact from now on.
    async fn adopt(&mut self, artefact: &Inspection) {
        let (raw, compressed) = (artefact.raw_size, artefact.compressed_size);
        self.note(&format!(
            "its memory is compressed ({} {}): {raw} to {compressed} bytes",
            artefact.algorithm, artefact.level
        ));
        let progress = Progress::Compressed { raw, compressed };
        self.record_compression(progress).await;
    }

    /// The files say what is true; a record that could not be told finds out at the next start.
    async fn record_compression(&mut self, progress: Progress) {
        let Some(compression) = &mut self.compression else {
            return;
        };
        compression.progress = progress;
        let document = self.document((*self.spec).clone(), (*self.record).clone());
        let written = self.ctx.store.update(&self.id, document).await;
        if let Err(error) = written.map_err(store_error) {
            self.note(&format!("recording how its memory is kept: {error}"));
        }
        self.publish();
    }
}

/// What a memory that lies compressed in `dir` says about itself; `None`: it is raw.
pub fn found(dir: &std::path::Path) -> Result<Option<MemoryCompression>, EngineError> {
    let packed = files::packed(dir).map_err(io_error("looking for memory"))?;
    let Some(artefact) = packed else {
        return Ok(None);
    };
    let found = doze_snapshot::inspect_file(&artefact).map_err(super::unpack::codec_error)?;
    let codec = Codec::new(found.algorithm, Some(found.level.into()))
        .map_err(super::unpack::codec_error)?;
    Ok(Some(MemoryCompression::found(&found, codec, now().wall_us)))
}
