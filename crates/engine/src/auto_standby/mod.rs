//! Instances that nobody uses fall asleep by themselves, and never under a live client.
//!
//! ```text
//!   kernel: conntrack ──events, dumps──> Tracker ─┐ flows, "look again"
//!   agent: exec sessions ─────────────────────────┤
//!   driver: the instance's latest view ───────────┤
//!                                                 v
//!                       one [watcher] per instance: [facts] ─> [decide] (pure) ─> [status]
//!                                                 │ due: its turn among `max_concurrent`
//!                                                 v
//!                       driver <── Standby{[attempt]}: three fresh looks around the standby itself
//! ```
//! Invariants:
//! - what is not known counts as busy: an error, a socket that is down, a dump that failed;
//! - a watcher reads the latest state, never what a signal was about, so that no signal can be missed;
//! - it asks and never acts: the driver decides again when it executes, and until the commit everything can
//!   be taken back;
//! - what it remembers (since when idle, a hold) is in the store, and what a crash leaves there never lets an
//!   instance sleep earlier than it would have.
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
    time::Duration,
};

use doze_host::conntrack;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::AbortHandle,
};

mod api;
mod attempt;
mod counters;
mod decide;
mod eyes;
mod facts;
mod status;
mod watcher;

pub use attempt::Attempt;
pub use status::{AwakeBecause, Reason, Status, StatusWord, TRACKING_MODE};

use counters::{Counters, Failed};
use decide::Memory;
use eyes::Eyes;
use watcher::{Ask, Shown, Watcher};

use crate::{
    EngineError,
    context::{Context, lock},
    registry::Entry,
    store::StoreError,
};

/// `[auto_standby]`.
#[derive(Debug, Clone)]
pub struct AutoStandbyConfig {
    /// Standbys that this begins at the same time at most; the others wait their turn.
    pub max_concurrent: usize,
    /// How often the kernel's table is read although nothing happened.
    pub reconcile: Duration,
}

/// What happened since the server's start, and what is now.
#[derive(Debug, Clone, Default)]
pub struct AutoStandbyMetrics {
    /// `None` where connections cannot be observed.
    pub conntrack: Option<conntrack::Counters>,
    /// Attempts by how they ended.
    pub attempts: BTreeMap<&'static str, u64>,
    /// Errors by what failed.
    pub errors: BTreeMap<&'static str, u64>,
    /// Instances that have a policy, by the status they have now.
    pub instances: BTreeMap<&'static str, u64>,
    /// Connections that keep instances awake.
    pub connections: u64,
}

/// The way to one watcher.
#[derive(Clone)]
struct Handle {
    asks: mpsc::Sender<Ask>,
    shown: watch::Receiver<Shown>,
}

/// What all watchers share.
pub struct Controller {
    ctx: Arc<Context>,
    eyes: Option<Arc<Eyes>>,
    turns: Arc<Semaphore>,
    counters: Arc<Counters>,
    handles: Mutex<HashMap<String, Handle>>,
    /// What the last server left, until a watcher takes it.
    recalled: Mutex<HashMap<String, Memory>>,
    reconciling: Option<AbortHandle>,
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(task) = &self.reconciling {
            task.abort();
        }
    }
}

impl Controller {
    /// Begins to observe, where that is possible; without, the server goes on and says so.
    pub async fn open(ctx: Arc<Context>) -> Controller {
        let config = ctx.config.auto_standby.clone();
        let counters = Arc::new(Counters::default());
        let eyes = match ctx.config.network {
            None => None,
            Some(_) => match Eyes::open().await {
                Ok(eyes) => Some(Arc::new(eyes)),
                Err(error) => {
                    tracing::warn!(%error, "no instance falls asleep by itself");
                    None
                }
            },
        };
        let reconciling = eyes.clone().map(|eyes| {
            let (ctx, counters) = (ctx.clone(), counters.clone());
            tokio::spawn(reconcile(eyes, ctx, counters, config.reconcile)).abort_handle()
        });
        let recalled = recall(&ctx, &counters).await;
        Controller {
            turns: Arc::new(Semaphore::new(config.max_concurrent.max(1))),
            ctx,
            eyes,
            counters,
            handles: Mutex::default(),
            recalled: Mutex::new(recalled),
            reconciling,
        }
    }

    fn eyes(&self) -> Option<&Arc<Eyes>> {
        self.eyes.as_ref()
    }

    fn turns(&self) -> Arc<Semaphore> {
        self.turns.clone()
    }

    fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    async fn remember(&self, id: &str, memory: &Memory) -> Result<(), StoreError> {
        let text = serde_json::to_string(memory)?;
        self.ctx.store.remember(id, text).await
    }

    /// Watches an instance until it is gone.
    pub fn watch(self: &Arc<Self>, entry: &Entry) {
        let id = entry.view().id.clone();
        let memory = lock(&self.recalled).remove(&id).unwrap_or_default();
        let (asks, inbox) = mpsc::channel(16);
        let (watcher, shown) = Watcher::new(
            id.clone(),
            self.clone(),
            entry.published.clone(),
            entry.mailbox.downgrade(),
            inbox,
            memory,
        );
        lock(&self.handles).insert(id.clone(), Handle { asks, shown });
        let controller = Arc::downgrade(self);
        tokio::spawn(async move {
            watcher.run().await;
            if let Some(controller) = controller.upgrade() {
                lock(&controller.handles).remove(&id);
            }
        });
    }

    /// What is true of the instance now.
    pub fn status(&self, entry: &Entry) -> Status {
        let view = entry.view();
        let handle = lock(&self.handles).get(&view.id).cloned();
        let shown = handle.map(|handle| handle.shown.borrow().clone());
        watcher::status(&view, self, &shown.unwrap_or_default(), &entry.published)
    }

    /// Keeps the instance awake for one idle timeout from now.
    ///
    /// # Errors
    /// [`EngineError::Asleep`] when it sleeps or cannot be kept from it any more.
    pub async fn hold(&self, entry: &Entry) -> Result<Status, EngineError> {
        let id = entry.view().id.clone();
        let gone = || EngineError::NotFound {
            what: "instance",
            id: id.clone(),
        };
        let handle = lock(&self.handles).get(&id).cloned().ok_or_else(gone)?;
        let (reply, answer) = oneshot::channel();
        let asked = handle.asks.send(Ask::Hold { reply }).await;
        asked.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    pub fn metrics(&self, entries: &[Entry]) -> AutoStandbyMetrics {
        let zero = StatusWord::ALL.map(|word| (word.as_str(), 0));
        let mut metrics = AutoStandbyMetrics {
            conntrack: self.eyes.as_ref().map(|eyes| eyes.counters()),
            attempts: self.counters.attempts(),
            errors: self.counters.errors(),
            instances: zero.into(),
            connections: 0,
        };
        for entry in entries {
            let status = self.status(entry);
            if status.configured {
                *metrics.instances.entry(status.status.as_str()).or_default() += 1;
                metrics.connections += status.active_inbound_connections;
            }
        }
        metrics
    }
}

/// What the last server knew. What cannot be read is as if it had never been: countdowns begin anew.
async fn recall(ctx: &Context, counters: &Counters) -> HashMap<String, Memory> {
    let stored = match ctx.store.memories().await {
        Ok(stored) => stored,
        Err(error) => {
            counters.failed(Failed::Recall);
            tracing::warn!(%error, "idle times of the last server could not be read");
            return HashMap::new();
        }
    };
    let mut memories = HashMap::new();
    for (id, text) in stored {
        match serde_json::from_str(&text) {
            Ok(memory) => drop(memories.insert(id, memory)),
            Err(error) => {
                counters.failed(Failed::Recall);
                tracing::warn!(instance = %id, %error, "its idle time of the last server could not be read");
            }
        }
    }
    memories
}

/// Flows age unseen, some send no event at all, and our rules may have been flushed by somebody.
async fn reconcile(eyes: Arc<Eyes>, ctx: Arc<Context>, counters: Arc<Counters>, every: Duration) {
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Err(error) = eyes.tracker().resync().await {
            counters.failed(Failed::Reconcile);
            tracing::warn!(%error, "the table of connections could not be read");
        }
        if let Ok(Some(network)) = ctx.network().await
            && let Err(error) = eyes::is_tracking(&network).await
        {
            counters.failed(Failed::Rules);
            tracing::error!(
                %error,
                "our nftables rules are gone: connections may not be tracked and guests are not isolated; \
                 no instance falls asleep by itself. Restart the server to install them again"
            );
        }
    }
}
