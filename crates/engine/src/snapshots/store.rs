//! Stored snapshots: taken, looked at, removed, gone back to.
use std::sync::Arc;

use doze_host::files;
use doze_lifecycle::{Cause, Command, State};
use tracing::Instrument as _;

use super::{Revival, Snapshot, SnapshotFilter, SnapshotKind, SnapshotRequest, TargetState};
use crate::{
    Engine, EngineError, InstanceSpec, InstanceView, MemoryCompression,
    compression::{self, policy, stored},
    context::{blocking, io_error, lock},
    copies::{self, Durable},
    driver::Message,
    engine::{ask, new_id},
    instance::store_error,
    kill::KillPoint,
    now,
    ops::{
        capture::{self, Captured, Outcome},
        rollback,
    },
    registry::Entry,
    store::PendingRollback,
};

impl Engine {
    /// Keeps a copy of this moment: of a running or sleeping instance with its memory, of a stopped one its disk.
    /// A running guest is paused for device state and clone only. Answers when the copy is durable, and goes on to
    /// its end when the caller hangs up.
    pub async fn create_snapshot(
        &self,
        key: &str,
        request: SnapshotRequest,
    ) -> Result<Arc<Snapshot>, EngineError> {
        let entry = self.open_entry(key)?;
        self.snapshot_as(entry, request, Cause::User).await
    }

    pub(crate) async fn snapshot_as(
        &self,
        entry: Entry,
        request: SnapshotRequest,
        cause: Cause,
    ) -> Result<Arc<Snapshot>, EngineError> {
        let engine = self.clone();
        let span = tracing::info_span!(
            "operation", instance = %entry.view().id, operation = "snapshot", cause = cause.as_str()
        );
        let work = async move { engine.take_snapshot(&entry, request, cause).await };
        self.to_the_end("snapshot", work.instrument(span)).await
    }

    async fn take_snapshot(
        &self,
        entry: &Entry,
        request: SnapshotRequest,
        cause: Cause,
    ) -> Result<Arc<Snapshot>, EngineError> {
        let ctx = &self.shared.ctx;
        let source = entry.view();
        if let Some(name) = &request.name
            && let Some(holder) = ctx.snapshots.holder(&source.id, name)
        {
            // Before the guest is paused for nothing; the store has the last word.
            return Err(EngineError::SnapshotNameTaken {
                name: name.clone(),
                holder,
            });
        }
        // While it is copied nobody can remove its image.
        let _gate = self.shared.image_gate.clone().read_owned().await;
        let stopped = request.kind == SnapshotKind::Stopped;
        let captured = self
            .capture(entry, Command::Snapshot { stopped }, cause, Durable::All)
            .await?;
        let created_at_us = now().wall_us;
        let id = new_id();
        let (from, to) = (captured.dir.clone(), ctx.snapshot_dir(&id));
        let has_memory = captured.has_memory();
        let placed = blocking("placing a snapshot", move || {
            copies::place(&from, &to)
                .and_then(|()| copies::size(&to))
                .map_err(io_error("placing a snapshot"))
                .and_then(|size| {
                    let found = match has_memory {
                        true => compression::found(&to)?,
                        false => None,
                    };
                    Ok((size, found))
                })
        })
        .await?;
        let (size_bytes, found) = match placed {
            Ok(placed) => placed,
            Err(error) => {
                self.remove_copy(captured.dir).await;
                self.remove_copy(ctx.snapshot_dir(&id)).await;
                return Err(error);
            }
        };
        ctx.kill.reach(KillPoint::SnapshotPlaced);
        let wanted = policy::effective(
            request.compression,
            captured.spec.snapshot_policy,
            ctx.compression.config,
        )
        .filter(|_| has_memory);
        let planned = wanted.map(|codec| {
            MemoryCompression::planned(codec, created_at_us, std::time::Duration::ZERO)
        });
        // What was compressed already stays as it is.
        let compression = found.or(planned);
        let snapshot = Snapshot {
            id,
            name: request.name,
            kind: request.kind,
            source_id: source.id.clone(),
            source_name: source.name.clone(),
            created_at_us,
            tags: request.tags,
            scheduled: cause == Cause::Schedule,
            size_bytes,
            memory_bytes: match captured.has_memory() {
                true => captured.spec.memory_bytes,
                false => 0,
            },
            spec: (*captured.spec).clone(),
            record: (*captured.record).clone(),
            inherited: captured.inherited,
            compression,
        };
        if let Err(error) = ctx.store.add_snapshot(snapshot.clone()).await {
            // Its row may be there all the same, and must not outlive its files.
            match ctx.store.remove_snapshot(&snapshot.id).await {
                Ok(()) => self.remove_copy(ctx.snapshot_dir(&snapshot.id)).await,
                Err(error) => tracing::warn!(%error, "a snapshot that was refused may be there"),
            }
            return Err(store_error(error));
        }
        let snapshot = Arc::new(snapshot);
        ctx.snapshots.add(snapshot.clone());
        // A snapshot never waits.
        stored::plan(ctx, &snapshot.id);
        ctx.kill.reach(KillPoint::SnapshotRecorded);
        tracing::info!(snapshot = %snapshot.id, instance = %source.id, bytes = size_bytes, "snapshot taken");
        Ok(snapshot)
    }

    /// Has the instance's driver copy it.
    pub(crate) async fn capture(
        &self,
        entry: &Entry,
        command: Command,
        cause: Cause,
        durable: Durable,
    ) -> Result<Captured, EngineError> {
        let outcome = Outcome::default();
        let plan = capture::Plan {
            dir: self.shared.ctx.captures_dir().join(new_id()),
            durable,
            outcome: outcome.clone(),
        };
        ask(entry, |reply| Message::Capture {
            command,
            cause,
            plan,
            reply,
        })
        .await?;
        let captured = lock(&outcome).take();
        captured.ok_or_else(|| EngineError::Internal {
            context: "copying an instance".into(),
            reason: "the copy has no result".into(),
        })
    }

    /// Removes a copy that nobody will use. What cannot be removed now goes at the next start.
    pub(crate) async fn remove_copy(&self, dir: std::path::PathBuf) {
        let shown = dir.display().to_string();
        let removed = blocking("removing a copy", move || files::remove_tree(&dir)).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, dir = shown, "removing a copy"),
            Err(error) => tracing::warn!(%error, dir = shown, "removing a copy"),
        }
    }

    /// In order of creation.
    pub fn list_snapshots(&self, filter: &SnapshotFilter) -> Vec<Arc<Snapshot>> {
        self.shared.ctx.snapshots.list(filter)
    }

    /// By id, by a name that only one snapshot has, or by unique id prefix, in this order.
    pub fn get_snapshot(&self, key: &str) -> Result<Arc<Snapshot>, EngineError> {
        Ok(self.shared.ctx.snapshots.find(key)?.snapshot)
    }

    /// Answers when nothing of it is left. Waits for those who copy from it.
    pub async fn delete_snapshot(&self, key: &str) -> Result<(), EngineError> {
        self.check_open()?;
        let entry = self.shared.ctx.snapshots.find(key)?;
        let engine = self.clone();
        self.to_the_end("deleting a snapshot", async move {
            let id = entry.snapshot.id.clone();
            let _no_job = stored::halt(&engine.shared.ctx, &id, "snapshot_delete").await;
            let _gate = entry.gate.write_owned().await;
            let ctx = &engine.shared.ctx;
            // Somebody may have been faster.
            ctx.snapshots.find(&id)?;
            ctx.store.remove_snapshot(&id).await.map_err(store_error)?;
            ctx.snapshots.remove(&id);
            ctx.kill.reach(KillPoint::SnapshotRowRemoved);
            engine.remove_copy(ctx.snapshot_dir(&id)).await;
            ctx.kill.reach(KillPoint::SnapshotFilesRemoved);
            Ok(())
        })
        .await
    }

    /// Brings an instance back to one of its snapshots, in place: its disk, and its memory unless `target` is
    /// Stopped. A guest that runs is ended, once the snapshot's content is there.
    pub async fn restore_snapshot(
        &self,
        key: &str,
        snapshot: &str,
        revival: Revival,
    ) -> Result<Arc<InstanceView>, EngineError> {
        let instance = self.open_entry(key)?;
        let entry = self.shared.ctx.snapshots.find(snapshot)?;
        let view = instance.view();
        // What cannot be changes nothing, not even a compression.
        if entry.snapshot.source_id != view.id {
            return Err(EngineError::InvalidField {
                code: "invalid_request",
                field: "snapshot_id".into(),
                value: entry.snapshot.id.clone(),
                allowed: format!(
                    "a snapshot of {}; this one is of {} ({}), fork it instead",
                    view.name, entry.snapshot.source_name, entry.snapshot.source_id
                ),
            });
        }
        let target = self.check_revival(&entry.snapshot, revival)?;
        let access = stored::access(&self.shared.ctx, &entry, "snapshot_restore").await;
        // It may have been deleted meanwhile.
        let stored = self.shared.ctx.snapshots.find(&entry.snapshot.id)?.snapshot;
        let view = instance.view();
        let memory = stored.kind == SnapshotKind::Standby && target != TargetState::Stopped;
        let plan = rollback::Plan {
            dir: self.shared.ctx.snapshot_dir(&stored.id),
            access,
            pending: PendingRollback {
                snapshot_id: stored.id.clone(),
                spec: InstanceSpec {
                    hypervisor: revival.hypervisor.unwrap_or(stored.spec.hypervisor),
                    tags: view.spec.tags.clone(),
                    auto_standby: view.spec.auto_standby.clone(),
                    snapshot_policy: view.spec.snapshot_policy,
                    ..stored.spec.clone()
                },
                memory_of: memory.then(|| Box::new(stored.record.clone())),
                inherited: memory && stored.inherited,
            },
            target,
        };
        ask(&instance, |reply| Message::Rollback {
            plan: Some(Box::new(plan)),
            reply,
        })
        .await
    }

    /// Where it ends, if it can.
    pub(super) fn check_revival(
        &self,
        snapshot: &Snapshot,
        revival: Revival,
    ) -> Result<TargetState, EngineError> {
        let has_memory = snapshot.kind == SnapshotKind::Standby;
        if let Some(hypervisor) = revival.hypervisor {
            self.shared.ctx.monitor(hypervisor)?;
            if has_memory && hypervisor != snapshot.hypervisor() {
                return Err(EngineError::InvalidField {
                    code: "invalid_field",
                    field: "target_hypervisor".into(),
                    value: crate::context::wire_name(hypervisor).into(),
                    allowed: format!(
                        "{}, because memory only fits the monitor that saved it",
                        crate::context::wire_name(snapshot.hypervisor())
                    ),
                });
            }
        }
        let default = match has_memory {
            true => TargetState::Running,
            false => TargetState::Stopped,
        };
        let target = revival.target.unwrap_or(default);
        check_target(target, has_memory)?;
        Ok(target)
    }

    pub(super) fn open_entry(&self, key: &str) -> Result<Entry, EngineError> {
        self.check_open()?;
        self.shared.registry.find(key)
    }

    /// Work that goes on when its caller hangs up.
    pub(super) async fn to_the_end<T: Send + 'static>(
        &self,
        context: &'static str,
        work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
    ) -> Result<T, EngineError> {
        tokio::spawn(work)
            .await
            .map_err(|e| EngineError::Internal {
                context: context.into(),
                reason: e.to_string(),
            })?
    }

    pub(crate) fn snapshots_of_image(&self, digest: &str) -> Vec<String> {
        let all = self.list_snapshots(&SnapshotFilter::default());
        let users = all.iter().filter(|s| s.spec.image_digest == digest);
        users.map(|s| format!("snapshot {}", s.id)).collect()
    }

    pub(crate) fn image_digests_of_snapshots(&self) -> Vec<String> {
        let all = self.list_snapshots(&SnapshotFilter::default());
        all.iter().map(|s| s.spec.image_digest.clone()).collect()
    }
}

/// A disk alone cannot sleep.
pub(super) fn check_target(target: TargetState, has_memory: bool) -> Result<(), EngineError> {
    match (target, has_memory) {
        (TargetState::Standby, false) => Err(EngineError::InvalidField {
            code: "invalid_field",
            field: "target_state".into(),
            value: "Standby".into(),
            allowed: "Stopped or Running, because there is no memory to sleep in".into(),
        }),
        (TargetState::Stopped | TargetState::Running, _) | (TargetState::Standby, true) => Ok(()),
    }
}

/// What a fork of an instance in this state has.
pub(super) fn target_of(state: State) -> TargetState {
    match state {
        State::Stopped => TargetState::Stopped,
        State::Standby => TargetState::Standby,
        State::Created | State::Initializing | State::Running => TargetState::Running,
        State::Paused | State::Shutdown => TargetState::Running,
    }
}
