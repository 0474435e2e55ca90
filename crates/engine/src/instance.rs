//! What a driver owns of its instance, and the one way to change it: `commit`.
use std::{path::PathBuf, sync::Arc};

use doze_agent::client::AgentClient;
use doze_lifecycle::{Cause, Exit, Fact, ProcessRef, Record, Stamp};
use doze_vmm::{Machine, MachineDescription, MachineStatus};
use tokio::sync::watch;

use crate::{
    EngineError, InstanceSpec, InstanceView, NetworkClaim,
    context::{Context, io_error},
    kill::KillPoint,
    now,
    store::{Document, PendingRollback, StoredInstance},
};

/// What readers get.
#[derive(Clone)]
pub struct Published {
    pub view: Arc<InstanceView>,
    /// The guest's channel while there is a machine.
    pub agent: Option<AgentClient>,
}

/// A live VMM and the ways to hear from it and its guest.
pub struct Live {
    pub machine: Arc<dyn Machine>,
    pub status: watch::Receiver<MachineStatus>,
    pub agent: AgentClient,
    pub guest: watch::Receiver<doze_agent::client::GuestView>,
    /// Since when we listen: what the guest said before, it says again first.
    pub since: tokio::time::Instant,
    /// When we learnt that the program ended.
    pub exited: Option<tokio::time::Instant>,
    /// An earlier server started it; its channel is being built up again.
    pub reattached: bool,
    /// What a restored guest was asked and may not have answered yet.
    pub proof: Option<crate::proof::Proof>,
}

impl Live {
    pub fn new(machine: Box<dyn Machine>, reattached: bool) -> Live {
        let machine: Arc<dyn Machine> = Arc::from(machine);
        let agent = AgentClient::connect(machine.agent_socket().to_owned());
        Live {
            status: machine.watch(),
            guest: agent.view(),
            machine,
            agent,
            since: tokio::time::Instant::now(),
            exited: None,
            reattached,
            proof: None,
        }
    }
}

/// One instance, owned by its driver; operations borrow it exclusively.
pub struct Instance {
    pub ctx: Arc<Context>,
    pub id: String,
    pub name: String,
    pub created_at_us: i64,
    pub spec: Arc<InstanceSpec>,
    pub claim: Option<NetworkClaim>,
    pub record: Arc<Record>,
    /// Exact description of the machine of the current or last run.
    pub description: Option<MachineDescription>,
    pub live: Option<Live>,
    /// Its memory is a copy of another instance's, and its guest has not been told yet who it is.
    pub inherited: bool,
    /// What a rollback in flight brings it back to.
    pub rollback: Option<Box<PendingRollback>>,
    /// On whose behalf the operation that runs changes things; `None`: at rest, the guest acts for itself.
    pub on_behalf: Option<Cause>,
    published: watch::Sender<Published>,
}

impl Instance {
    pub fn new(
        ctx: Arc<Context>,
        stored: StoredInstance,
    ) -> (Instance, watch::Receiver<Published>) {
        let spec = Arc::new(stored.document.spec);
        let record = Arc::new(stored.document.record);
        let view = Arc::new(InstanceView {
            id: stored.id.clone(),
            name: stored.name.clone(),
            created_at_us: stored.created_at_us,
            spec: spec.clone(),
            network: stored.claim.clone(),
            record: record.clone(),
            unknown: None,
        });
        let (published, reader) = watch::channel(Published { view, agent: None });
        let instance = Instance {
            ctx,
            id: stored.id,
            name: stored.name,
            created_at_us: stored.created_at_us,
            spec,
            claim: stored.claim,
            record,
            description: stored.document.machine,
            live: None,
            inherited: stored.document.inherited,
            rollback: stored.document.rollback,
            on_behalf: None,
            published,
        };
        (instance, reader)
    }

    pub fn dir(&self) -> PathBuf {
        self.ctx.instance_dir(&self.id)
    }

    pub fn reach(&self, point: KillPoint) {
        self.ctx.kill.reach(point);
    }

    /// Records a fact of this moment durably, then shows it.
    pub async fn commit(&mut self, fact: Fact) -> Result<(), EngineError> {
        self.commit_at(fact, &now()).await
    }

    /// Records a fact of an earlier moment. On error nothing has changed, neither on disk nor for readers.
    pub async fn commit_at(&mut self, fact: Fact, at: &Stamp) -> Result<(), EngineError> {
        self.commit_all(&[(fact, at.clone())]).await
    }

    /// Records several facts, one after the other, in one write.
    pub async fn commit_all(&mut self, facts: &[(Fact, Stamp)]) -> Result<(), EngineError> {
        let mut next = (*self.record).clone();
        for (fact, at) in facts {
            next = next
                .apply(fact, at, self.on_behalf)
                .map_err(|e| EngineError::Internal {
                    context: format!("recording {} of {}", fact.name(), self.id),
                    reason: e.to_string(),
                })?;
        }
        let before = self.record.state();
        let document = self.document((*self.spec).clone(), next.clone());
        self.ctx
            .store
            .update(&self.id, document)
            .await
            .map_err(store_error)?;
        let ctx = self.ctx.clone();
        let before_ledger = self.record.clone();
        ctx.metrics
            .booked(before_ledger.ledger(), next.ledger(), || {
                self.record = Arc::new(next.clone());
                self.publish();
            });
        let after = self.record.state();
        if before != after {
            let names: Vec<_> = facts.iter().map(|(fact, _)| fact.name()).collect();
            self.note(&format!("{before} -> {after} ({})", names.join(", ")));
        }
        Ok(())
    }

    /// All that the store keeps of it, with this specification and record.
    pub fn document(&self, spec: InstanceSpec, record: Record) -> Document {
        Document {
            spec,
            record,
            machine: self.description.clone(),
            inherited: self.inherited,
            rollback: self.rollback.clone(),
        }
    }

    /// Shows readers what stands now.
    pub fn publish(&self) {
        let view = Arc::new(InstanceView {
            id: self.id.clone(),
            name: self.name.clone(),
            created_at_us: self.created_at_us,
            spec: self.spec.clone(),
            network: self.claim.clone(),
            record: self.record.clone(),
            unknown: None,
        });
        let agent = self.live.as_ref().map(|live| live.agent.clone());
        self.published.send_replace(Published { view, agent });
    }

    /// What readers see now.
    pub fn view(&self) -> Arc<InstanceView> {
        self.published.borrow().view.clone()
    }

    /// Appends a line to the instance's operations log. It explains; it decides nothing, so a failure to
    /// write it is only reported.
    pub fn note(&self, line: &str) {
        use std::{io::Write, os::unix::fs::OpenOptionsExt};
        tracing::info!(instance = %self.id, name = %self.name, "{line}");
        let stamp = time::OffsetDateTime::now_utc()
            .format(&time::format_description::well_known::Rfc3339)
            .unwrap_or_default();
        let path = self.dir().join(OPERATIONS_LOG);
        let written = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{stamp} {line}"));
        match written {
            Ok(()) => {}
            // Before its folder is made and after it is removed there is no place to write.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(%error, path = %path.display(), "operations log"),
        }
    }

    /// Kills the VMM if there is one, whether or not we hold it, reaps it, and forgets its handles. The
    /// record is not touched.
    pub async fn kill_machine(&mut self) -> Result<(), EngineError> {
        match self.live.as_ref() {
            Some(live) => live.machine.kill().await.map_err(vmm_error)?,
            None => crate::recovery::kill_marked(self, None).await?,
        }
        if let Some(live) = self.live.take() {
            match self.record.has_snapshot() {
                true => live.agent.close_with(FELL_ASLEEP).await,
                false => live.agent.close().await,
            }
        }
        let run = self.dir().join(RUN_DIR);
        crate::context::blocking("removing sockets", move || {
            doze_host::files::remove_tree(&run)
        })
        .await?
        .map_err(io_error("removing the machine's sockets"))?;
        self.ctx.release_memory(&self.id);
        Ok(())
    }

    /// Kills the VMM if the record names one, and records that it is gone. Memory that nobody sleeps in goes
    /// with it.
    pub async fn end_machine(
        &mut self,
        killed: KillPoint,
        failure: Option<String>,
    ) -> Result<(), EngineError> {
        self.kill_machine().await?;
        self.reach(killed);
        if !self.record.has_snapshot() {
            self.discard_memory().await;
        }
        if self.record.machine().is_some() {
            self.commit(Fact::MachineGone { failure }).await?;
        }
        Ok(())
    }

    /// Removes memory and snapshot files that are good for nothing any more. Called before the record says
    /// that the machine is gone: afterwards a crash would leave them until the next start. What cannot
    /// be removed now goes then.
    pub async fn discard_memory(&self) {
        if let Err(error) = crate::ops::launch::remove_memory(self).await {
            self.note(&format!("removing the memory of the run: {error}"));
        }
    }

    /// Books the program's exit if it is not known yet: from the channel, else from the serial
    /// console's marker, which is written before the guest powers off.
    pub async fn collect_exit(&mut self) -> Result<(), EngineError> {
        if self.record.exit().is_some() || self.record.boots() == 0 {
            return Ok(());
        }
        let told = self
            .live
            .as_ref()
            .and_then(|live| live.guest.borrow().program_exit.clone());
        let exit = match told {
            Some(exit) => Some(exit),
            None => crate::logs::exit_marker(&self.dir().join(VMM_LOG)).await,
        };
        if let Some(exit) = exit {
            let exit = Exit {
                code: exit.code,
                message: exit.message,
            };
            self.commit(Fact::ProgramExited(exit)).await?;
        }
        Ok(())
    }
}

/// What exec sessions are told that were open when their instance fell asleep.
const FELL_ASLEEP: &str = "the instance was put to standby";

pub const RUN_DIR: &str = "run";
pub const VMM_LOG: &str = "vmm.log";
pub const APP_LOG: &str = "app.log";
pub const OPERATIONS_LOG: &str = "operations.log";
pub const MEMORY: &str = "memory";
/// The snapshot's folder; having this name is its validity mark.
pub const SNAPSHOT: &str = "snapshot";
pub const OVERLAY: &str = "overlay.raw";
pub const CONFIG: &str = "config.img";

pub fn process_ref(id: &doze_host::process::ProcessId) -> ProcessRef {
    ProcessRef {
        pid: id.pid,
        start_ticks: id.start_ticks,
        boot_id: id.boot_id.clone(),
    }
}

pub fn process_id(machine: &ProcessRef) -> doze_host::process::ProcessId {
    doze_host::process::ProcessId {
        pid: machine.pid,
        start_ticks: machine.start_ticks,
        boot_id: machine.boot_id.clone(),
    }
}

pub fn vmm_error(error: doze_vmm::VmmError) -> EngineError {
    match error {
        doze_vmm::VmmError::Missing { what, mend } => EngineError::DependencyMissing { what, mend },
        doze_vmm::VmmError::NoSpace {
            what,
            needed,
            available,
        } => EngineError::Capacity {
            resource: "disk",
            wanted: format!("{needed} bytes"),
            available: format!("{available} bytes"),
            limit: what,
        },
        incompatible @ doze_vmm::VmmError::Incompatible { .. } => EngineError::Snapshot {
            reason: incompatible.to_string(),
        },
        other => EngineError::Internal {
            context: "machine monitor".into(),
            reason: chain(&other),
        },
    }
}

pub fn store_error(error: crate::store::StoreError) -> EngineError {
    use crate::store::StoreError;
    match error {
        StoreError::NameTaken { name, holder } => EngineError::NameTaken { name, holder },
        StoreError::SnapshotNameTaken { name, holder } => {
            EngineError::SnapshotNameTaken { name, holder }
        }
        StoreError::NoAddress { subnet } => EngineError::Capacity {
            resource: "addresses",
            wanted: "1".into(),
            available: "0".into(),
            limit: format!("network.subnet {subnet}"),
        },
        other => EngineError::Internal {
            context: "store".into(),
            reason: other.to_string(),
        },
    }
}

/// An error with its sources, for one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
