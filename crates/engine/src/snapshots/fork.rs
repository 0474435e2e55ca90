//! New instances from instances and from stored snapshots.
use std::{path::PathBuf, sync::Arc};

use doze_lifecycle::{Cause, Command, Record, State};
use tokio::sync::oneshot;

use super::{
    ForkRequest, Revival, SnapshotKind, TargetState,
    store::{check_target, target_of},
};
use crate::{
    Engine, EngineError, InstanceSpec, InstanceView,
    compression::stored,
    context::blocking,
    copies::{self, Durable},
    driver::Message,
    engine::{driver_failed, new_id},
    instance::{Instance, store_error},
    kill::KillPoint,
    now,
    ops::{Cancel, capture::copy_error, fork::Plan, restore},
    store::{Document, StoredInstance},
};

/// A copy that is to become an instance.
struct Offspring {
    dir: PathBuf,
    name: String,
    spec: InstanceSpec,
    /// The record its memory was captured with; without, it has a disk only.
    memory_of: Option<Record>,
    target: TargetState,
}

impl Engine {
    /// A new instance from an instance, which is left as it is: a running one is paused for device state and clone
    /// only. Goes on to its end when the caller hangs up.
    pub async fn fork(
        &self,
        key: &str,
        request: ForkRequest,
    ) -> Result<Arc<InstanceView>, EngineError> {
        let entry = self.open_entry(key)?;
        let engine = self.clone();
        self.to_the_end("fork", async move {
            engine.check_name(&request.name)?;
            engine.check_count()?;
            let source = entry.view();
            if let Some(target) = request.target {
                check_target(target, source.state() != State::Stopped)?;
            }
            check_memory(&source.spec, source.state(), request.target)?;
            let command = Command::Fork {
                from_running: request.from_running,
            };
            // The fork makes durable what it needs.
            let captured = engine
                .capture(&entry, command, Cause::User, Durable::Disk)
                .await?;
            let target = request.target.unwrap_or(target_of(captured.state));
            // It may have changed its state since it was asked.
            let checked = check_target(target, captured.has_memory())
                .and_then(|()| check_memory(&captured.spec, captured.state, Some(target)));
            if let Err(error) = checked {
                engine.remove_copy(captured.dir).await;
                return Err(error);
            }
            let memory = captured.has_memory() && target != TargetState::Stopped;
            let offspring = Offspring {
                dir: captured.dir,
                name: request.name,
                spec: (*captured.spec).clone(),
                memory_of: memory.then(|| (*captured.record).clone()),
                target,
            };
            engine.bear(offspring).await
        })
        .await
    }

    /// A new instance from a stored snapshot, which is left as it is.
    pub async fn fork_snapshot(
        &self,
        snapshot: &str,
        name: String,
        revival: Revival,
    ) -> Result<Arc<InstanceView>, EngineError> {
        self.check_open()?;
        let entry = self.shared.ctx.snapshots.find(snapshot)?;
        let engine = self.clone();
        self.to_the_end("fork", async move {
            engine.check_name(&name)?;
            engine.check_count()?;
            // What cannot be changes nothing, not even a compression.
            engine.check_revival(&entry.snapshot, revival)?;
            let access = stored::access(&engine.shared.ctx, &entry, "fork").await;
            // It may have been deleted meanwhile.
            let stored = engine.get_snapshot(&entry.snapshot.id)?;
            let target = engine.check_revival(&stored, revival)?;
            let memory = stored.kind == SnapshotKind::Standby && target != TargetState::Stopped;
            let state = match memory {
                true => State::Standby,
                false => State::Stopped,
            };
            check_memory(&stored.spec, state, Some(target))?;
            let dir = engine.copy_stored(&stored.id, memory).await?;
            drop(access);
            let offspring = Offspring {
                dir,
                name,
                spec: InstanceSpec {
                    hypervisor: revival.hypervisor.unwrap_or(stored.spec.hypervisor),
                    ..stored.spec.clone()
                },
                memory_of: memory.then(|| stored.record.clone()),
                target,
            };
            engine.bear(offspring).await
        })
        .await
    }

    /// Clones a stored snapshot's files into a folder of their own.
    async fn copy_stored(&self, id: &str, memory: bool) -> Result<PathBuf, EngineError> {
        let ctx = &self.shared.ctx;
        let (from, to) = (ctx.snapshot_dir(id), ctx.captures_dir().join(new_id()));
        let measured = from.clone();
        let needed = match ctx.reflinks().await? {
            true => 0,
            false => blocking("measuring a snapshot", move || {
                copies::bytes_to_copy(&measured, memory)
            })
            .await?
            .map_err(crate::context::io_error("measuring a snapshot"))?,
        };
        let _room = ctx.reserve_disk(&from, needed + crate::ops::standby::ROOM)?;
        let target = to.clone();
        let copied = blocking("copying a snapshot", move || {
            copies::clone_rest(&from, &target, memory, &|| false)
        })
        .await?;
        if let Err(error) = copied {
            self.remove_copy(to).await;
            return Err(copy_error(&Cancel::new(), &error));
        }
        Ok(to)
    }

    fn check_name(&self, name: &str) -> Result<(), EngineError> {
        // Before anybody is paused for nothing; the store has the last word.
        match self.shared.registry.find(name) {
            Ok(holder) if holder.view().name == name => Err(EngineError::NameTaken {
                name: name.to_owned(),
                holder: holder.view().id.clone(),
            }),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Gives the copy a record, an address and a driver, which makes an instance of it.
    async fn bear(&self, offspring: Offspring) -> Result<Arc<InstanceView>, EngineError> {
        let dir = offspring.dir.clone();
        self.shared.ctx.kill.reach(KillPoint::ForkCopied);
        // From here until it is in the registry nobody can remove its image.
        let gate = self.shared.image_gate.clone().read_owned().await;
        let (instance, first, answer) = match self.record_fork(offspring).await {
            Ok(recorded) => recorded,
            Err(error) => {
                self.remove_copy(dir).await;
                return Err(error);
            }
        };
        let (instance, published) = instance;
        self.drive(instance, published, Some(first));
        drop(gate);
        let answer = answer.await.map_err(|_| driver_failed());
        // What a failed fork did not move is left.
        if !matches!(answer, Ok(Ok(_))) {
            self.remove_copy(dir).await;
        }
        answer?
    }

    async fn record_fork(&self, offspring: Offspring) -> Result<Recorded, EngineError> {
        self.check_open()?;
        self.check_count()?;
        self.shared
            .ctx
            .image_by_digest(&offspring.spec.image_digest)
            .await?;
        let pool = self.address_pool(offspring.spec.network_enabled)?;
        let at = now();
        let record = Record::forking(offspring.memory_of.as_ref(), at.clone());
        let document = Document {
            spec: offspring.spec,
            record,
            machine: None,
            inherited: offspring.memory_of.is_some(),
            rollback: None,
            compression: None,
        };
        let mut stored = StoredInstance {
            id: new_id(),
            name: offspring.name,
            created_at_us: at.wall_us,
            claim: None,
            document,
        };
        let ctx = &self.shared.ctx;
        stored.claim = match ctx.store.insert(stored.clone(), pool).await {
            Ok(claim) => claim,
            Err(error) => {
                // Its row may be there all the same, and would hold the name until the next start.
                if let Err(error) = ctx.store.remove(&stored.id).await {
                    tracing::warn!(%error, "a fork that was refused may be there");
                }
                return Err(store_error(error));
            }
        };
        let (reply, answer) = oneshot::channel();
        let plan = Plan {
            dir: offspring.dir,
            target: offspring.target,
        };
        let first = Message::Fork { plan, reply };
        Ok((Instance::new(ctx.clone(), stored), first, answer))
    }
}

type Recorded = (
    (
        Instance,
        tokio::sync::watch::Receiver<crate::instance::Published>,
    ),
    Message,
    oneshot::Receiver<Result<Arc<InstanceView>, EngineError>>,
);

/// A copy with memory needs an agent to become somebody else, unless it has no address.
fn check_memory(
    spec: &InstanceSpec,
    state: State,
    target: Option<TargetState>,
) -> Result<(), EngineError> {
    let memory = state != State::Stopped && target != Some(TargetState::Stopped);
    match memory && spec.skip_guest_agent && spec.network_enabled {
        true => Err(restore::no_agent(state)),
        false => Ok(()),
    }
}
