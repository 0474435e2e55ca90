//! The engine's public face: finds the driver, sends the command, hands out views.
use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use doze_agent::{
    client::{AgentClient, AgentError, ExecSession},
    message::ExecRequest,
};
use doze_host::net::NetworkConfig;
use doze_image::ImageStore;
use doze_lifecycle::{Admission, Command, Operation, Record, State, admission::admit};
use doze_vmm::{Hypervisor, Monitor, Probe, qemu};
use futures::{StreamExt, stream};
use tokio::sync::{mpsc, oneshot};

use crate::{
    CompressionMetrics, CreateRequest, EngineConfig, EngineError, InstanceView, LogSource,
    SnapshotFilter, StandbyOptions, StartOverrides, WaitOutcome,
    auto_standby::Controller,
    compression::stored,
    context::{Context, Opened, blocking, image_error, io_error},
    driver::{self, Message, Reply},
    instance::{APP_LOG, Instance, OPERATIONS_LOG, VMM_LOG, store_error},
    life_sign, logs,
    metrics::MetricsView,
    now, recovery,
    registry::{Entry, Registry},
    snapshots::schedule::{self, Schedules},
    store::{AddressPool, Contents, Document, Store, StoredInstance},
};

/// Commands that may wait in one driver's mailbox.
const MAILBOX: usize = 64;
/// Instances whose recovery runs at the same time.
const RECOVERIES: usize = 8;
/// How long a guest that was ready before may take to be connected again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// A unix socket's path holds at most this many bytes (`unix(7)`: sun_path, with its NUL).
const MAX_SOCKET_PATH: usize = 107;

pub(crate) struct Shared {
    pub ctx: Arc<Context>,
    pub registry: Registry,
    closing: AtomicBool,
    heart: Arc<life_sign::Heart>,
    /// Read: a create between looking its image up and being in the registry. Write: content goes.
    pub image_gate: Arc<tokio::sync::RwLock<()>>,
    pub schedules: Arc<Schedules>,
    pub auto_standby: Arc<Controller>,
}

impl Shared {
    /// Takes an instance that is gone off the list.
    fn forget(&self, id: &str) {
        self.ctx.metrics.forgotten(&now(), || {
            self.registry.remove(id).map(|entry| entry.view())
        });
    }
}

/// Machine monitors by kind.
pub type Monitors = std::collections::BTreeMap<Hypervisor, Arc<dyn Monitor>>;

/// Handle to the engine; clones share it.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
}

impl Engine {
    /// Opens the store, reconciles every record with what is really there, and reattaches running
    /// machines. Returns when all records are consistent.
    pub async fn open(config: EngineConfig) -> Result<Self, EngineError> {
        let monitors = [Hypervisor::Qemu, Hypervisor::QemuMicrovm]
            .into_iter()
            .map(|kind| (kind, qemu::monitor(kind, config.qemu.clone())))
            .collect();
        Engine::open_with(config, monitors).await
    }

    /// The same with these machine monitors.
    pub async fn open_with(config: EngineConfig, monitors: Monitors) -> Result<Self, EngineError> {
        check_data_dir(&config.data_dir)?;
        let dir = config.data_dir.clone();
        let (store, contents, images, memory, last_beat) =
            blocking("opening the data folder", move || {
                doze_host::files::create_private_dir(&dir).map_err(io_error("data_dir"))?;
                let (store, contents) = Store::open(&dir.join("doze.db")).map_err(store_error)?;
                let images = ImageStore::open(&dir.join("images")).map_err(image_error)?;
                let memory = total_memory().map_err(io_error("reading /proc/meminfo"))?;
                let last_beat = life_sign::last_beat(&dir);
                Ok::<_, EngineError>((store, contents, images, memory, last_beat))
            })
            .await??;
        let Contents {
            instances: stored,
            snapshots,
            schedules,
        } = contents;
        let known: HashSet<String> = stored.iter().map(|i| i.id.clone()).collect();
        let rolling_back: HashSet<String> = stored
            .iter()
            .filter(|i| i.document.record.operation() == Some(Operation::Rollback))
            .map(|i| i.id.clone())
            .collect();
        let kept: HashSet<String> = snapshots.iter().map(|s| s.id.clone()).collect();
        let ctx = Arc::new(Context::new(
            config,
            monitors,
            Opened {
                store,
                images,
                total_memory: memory,
                last_beat,
                snapshots,
            },
        ));
        ctx.reflinks().await?;
        recovery::sweep(&ctx, &known, &rolling_back, kept).await?;
        let auto_standby = Arc::new(Controller::open(ctx.clone()).await);
        let heart = life_sign::Heart::start(&ctx.config.data_dir);
        let engine = Engine {
            shared: Arc::new(Shared {
                ctx,
                registry: Registry::default(),
                closing: AtomicBool::new(false),
                heart,
                image_gate: Arc::default(),
                schedules: Arc::new(Schedules::new(schedules)),
                auto_standby,
            }),
        };
        engine.recover(stored).await;
        for snapshot in engine.list_snapshots(&SnapshotFilter::default()) {
            stored::plan(&engine.shared.ctx, &snapshot.id);
        }
        engine.collect_images().await;
        engine.warm_up();
        tokio::spawn(schedule::keep(Arc::downgrade(&engine.shared)));
        Ok(engine)
    }

    /// Prepares kernel and initramfs before the first create asks for them.
    fn warm_up(&self) {
        let ctx = self.shared.ctx.clone();
        tokio::spawn(async move {
            // The same error meets the first create, which says what to do.
            if let Err(error) = ctx.boot_files().await {
                tracing::warn!(%error, "instances cannot boot");
            }
        });
    }

    /// A record that cannot be made true keeps its instance visible and the server up; the reason is in
    /// the log and asking again (start, stop, delete) tries again.
    async fn recover(&self, stored: Vec<StoredInstance>) {
        let waiting: Vec<_> = stored
            .into_iter()
            .filter_map(|stored| {
                let (instance, published) = Instance::new(self.shared.ctx.clone(), stored);
                let needed = recovery::is_needed(&instance);
                let entry = self.drive(instance, published, None);
                needed.then_some(entry)
            })
            .collect();
        stream::iter(waiting)
            .for_each_concurrent(RECOVERIES, |entry| async move {
                let id = entry.view().id.clone();
                let outcome = ask(&entry, |reply| Message::Recover { reply }).await;
                if let Err(error) = outcome {
                    tracing::error!(instance = %id, %error, "recovery failed");
                }
            })
            .await;
    }

    pub(crate) fn drive(
        &self,
        instance: Instance,
        published: tokio::sync::watch::Receiver<crate::instance::Published>,
        first: Option<Message>,
    ) -> Entry {
        let (mailbox, messages) = mpsc::channel(MAILBOX);
        // Before anybody can find the instance: whoever comes then finds its create in flight.
        if let Some(Err(error)) = first.map(|first| mailbox.try_send(first)) {
            tracing::error!(%error, "an empty mailbox took no message");
        }
        let entry = Entry {
            mailbox,
            published: published.clone(),
        };
        let view = entry.view();
        self.shared.registry.add(&view, entry.clone());
        self.shared.auto_standby.watch(&entry);
        let (shared, id) = (self.shared.clone(), view.id.clone());
        let forget = move || shared.forget(&id);
        let task = tokio::spawn(driver::run(instance, published, messages, forget));
        let (shared, id) = (self.shared.clone(), view.id.clone());
        tokio::spawn(async move {
            if let Err(error) = task.await {
                tracing::error!(instance = %id, %error, "a driver failed; the server must be restarted");
                return;
            }
            // A retired driver's instance is still there; the server is about to end.
            if !shared.closing.load(Ordering::Acquire) {
                shared.forget(&id);
            }
        });
        entry
    }

    pub(crate) fn check_open(&self) -> Result<(), EngineError> {
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(EngineError::ShuttingDown);
        }
        Ok(())
    }

    /// Makes and boots an instance; answers when the guest's CPUs run (state `Initializing`).
    /// Goes on to its end when the caller hangs up.
    pub async fn create(&self, request: CreateRequest) -> Result<InstanceView, EngineError> {
        let engine = self.clone();
        tokio::spawn(async move { engine.create_to_the_end(request).await })
            .await
            .map_err(|e| EngineError::Internal {
                context: "create".into(),
                reason: e.to_string(),
            })?
    }

    async fn create_to_the_end(&self, request: CreateRequest) -> Result<InstanceView, EngineError> {
        let gate = self.shared.image_gate.read().await;
        self.check_open()?;
        let name = request.name.clone();
        let spec = self.plan(request).await?;
        let ctx = &self.shared.ctx;
        let pool = self.address_pool(spec.network_enabled)?;
        let at = now();
        let document = Document {
            spec,
            record: Record::creating(at.clone()),
            machine: None,
            inherited: false,
            rollback: None,
            compression: None,
        };
        let mut stored = StoredInstance {
            id: new_id(),
            name,
            created_at_us: at.wall_us,
            claim: None,
            document,
        };
        stored.claim = ctx
            .store
            .insert(stored.clone(), pool)
            .await
            .map_err(store_error)?;
        let (instance, published) = Instance::new(ctx.clone(), stored);
        let (reply, answer) = oneshot::channel();
        self.drive(instance, published, Some(Message::Create { reply }));
        drop(gate);
        let view = answer.await.map_err(|_| driver_failed())??;
        Ok((*view).clone())
    }

    /// Where the address of an instance with or without a network comes from.
    pub(crate) fn address_pool(
        &self,
        network_enabled: bool,
    ) -> Result<Option<AddressPool>, EngineError> {
        match (&self.shared.ctx.config.network, network_enabled) {
            (Some(network), true) => Ok(Some(AddressPool {
                subnet: network.subnet,
                gateway: network.gateway,
            })),
            (Some(_), false) | (None, false) => Ok(None),
            (None, true) => Err(EngineError::InvalidField {
                code: "invalid_field",
                field: "network.enabled".into(),
                value: "true".into(),
                allowed: "false, because this server's network is switched off".into(),
            }),
        }
    }

    /// Views in order of creation.
    pub fn list(&self) -> Vec<Arc<InstanceView>> {
        let mut views: Vec<_> = self.shared.registry.all().iter().map(Entry::view).collect();
        views.sort_by(|a, b| (a.created_at_us, &a.id).cmp(&(b.created_at_us, &b.id)));
        views
    }

    /// What became of compressions since this server started.
    pub fn compression_metrics(&self) -> CompressionMetrics {
        self.shared.ctx.compression.counters.view()
    }

    /// What happened since this server started.
    pub fn metrics(&self) -> MetricsView {
        self.shared.ctx.metrics.view(|| self.list(), &now())
    }

    /// By id, exact name or unique id prefix, in this order.
    pub fn get(&self, key: &str) -> Result<Arc<InstanceView>, EngineError> {
        Ok(self.shared.registry.find(key)?.view())
    }

    /// Answers when the guest's CPUs run. With `discard_memory` a sleeping instance boots from its disk and
    /// loses its memory; without, it is refused.
    pub async fn start(
        &self,
        key: &str,
        overrides: StartOverrides,
        discard_memory: bool,
    ) -> Result<Arc<InstanceView>, EngineError> {
        self.command(key, |reply| Message::Start {
            overrides,
            discard_memory,
            reply,
        })
        .await
    }

    /// Puts the guest to sleep; answers when its snapshot is durable and its VMM is gone, and before its memory is
    /// compressed. What `options` want an instance that sleeps already cannot obey.
    pub async fn standby(
        &self,
        key: &str,
        options: StandbyOptions,
    ) -> Result<Arc<InstanceView>, EngineError> {
        self.command(key, |reply| Message::Standby {
            options,
            auto: None,
            reply,
        })
        .await
    }

    /// Wakes a sleeping guest; answers when it proved that it lives (Running), or when it runs and takes
    /// its time to answer (Initializing).
    pub async fn restore(&self, key: &str) -> Result<Arc<InstanceView>, EngineError> {
        self.command(key, |reply| Message::Restore { reply }).await
    }

    /// Asks the program to end, then the machine; answers when the VMM is gone.
    pub async fn stop(&self, key: &str) -> Result<Arc<InstanceView>, EngineError> {
        self.command(key, |reply| Message::Stop { reply }).await
    }

    /// Answers when nothing of the instance is left.
    pub async fn delete(&self, key: &str, graceful: bool) -> Result<(), EngineError> {
        self.command(key, |reply| Message::Delete { graceful, reply })
            .await
            .map(drop)
    }

    pub(crate) async fn command(
        &self,
        key: &str,
        message: impl FnOnce(Reply) -> Message,
    ) -> Result<Arc<InstanceView>, EngineError> {
        self.check_open()?;
        ask(&self.shared.registry.find(key)?, message).await
    }

    /// Answers when the state is reached, when it can no longer be reached without a new command
    /// (Stopped or Standby with nothing in flight), or after `timeout`.
    pub async fn wait(
        &self,
        key: &str,
        target: State,
        timeout: Duration,
    ) -> Result<WaitOutcome, EngineError> {
        let mut published = self.shared.registry.find(key)?.published;
        let settled = async {
            published
                .wait_for(|p| is_settled(&p.view, target))
                .await
                .map(|found| found.view.clone())
        };
        match tokio::time::timeout(timeout, settled).await {
            Ok(Ok(view)) => Ok(outcome(&view, false)),
            // The driver ended: the instance was deleted while we waited.
            Ok(Err(_)) => Err(EngineError::NotFound {
                what: "instance",
                id: key.to_owned(),
            }),
            Err(_) => Ok(outcome(&published.borrow().view, true)),
        }
    }

    /// Waits up to `wait_for_agent` for a booting guest's agent.
    pub async fn exec(
        &self,
        key: &str,
        request: ExecRequest,
        wait_for_agent: Duration,
    ) -> Result<ExecSession, EngineError> {
        self.check_open()?;
        let mut published = self.shared.registry.find(key)?.published;
        let deadline = tokio::time::Instant::now() + wait_for_agent;
        loop {
            let now = published.borrow_and_update().clone();
            let record = &now.view.record;
            match admit(record.state(), record.operation(), Command::Exec) {
                Admission::Refuse(refusal) => {
                    return Err(EngineError::InvalidState {
                        state: record.state(),
                        refusal,
                    });
                }
                Admission::Run if now.view.spec.skip_guest_agent => {
                    let reason = "the instance was created with skip_guest_agent".to_owned();
                    return Err(AgentError::Refused(reason).into());
                }
                // A restored guest first hears who and when it is.
                Admission::Run if record.agent_ready() && !record.awaits_answer() => {
                    if let Some(agent) = now.agent {
                        let until = deadline.max(tokio::time::Instant::now() + CONNECT_PATIENCE);
                        tokio::select! {
                            // Stopped meanwhile, perhaps: decided again.
                            _ = published.changed() => continue,
                            connected = is_connected(&agent, until) => {
                                connected?;
                                return agent.exec(request).await.map_err(EngineError::from);
                            }
                        }
                    }
                }
                Admission::Run
                | Admission::Wait
                | Admission::NoOp
                | Admission::Join
                | Admission::Interrupt => {}
            }
            match tokio::time::timeout_at(deadline, published.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => {
                    return Err(EngineError::NotFound {
                        what: "instance",
                        id: key.to_owned(),
                    });
                }
                Err(_) => {
                    let reason = match wait_for_agent {
                        Duration::ZERO => "it is still booting".to_owned(),
                        waited => format!("it was not ready within {waited:?}"),
                    } + "; give it more time with wait_for_agent, or wait for Running first";
                    return Err(AgentError::Unavailable(reason).into());
                }
            }
        }
    }

    /// Lines without their newline, oldest first: the last `tail` ones (`None`: all), then, with
    /// `follow`, new ones as they appear, until the instance is deleted or the receiver is dropped.
    pub async fn logs(
        &self,
        key: &str,
        source: LogSource,
        tail: Option<usize>,
        follow: bool,
    ) -> Result<mpsc::Receiver<String>, EngineError> {
        let view = self.get(key)?;
        let name = match source {
            LogSource::App => APP_LOG,
            LogSource::Vmm => VMM_LOG,
            LogSource::Operations => OPERATIONS_LOG,
        };
        let path = self.shared.ctx.instance_dir(&view.id).join(name);
        logs::stream(path, tail, follow).map_err(io_error("following the log"))
    }

    /// Every monitor this build has, sorted by name, with what the host lacks for it.
    pub async fn monitors(&self) -> Vec<(Hypervisor, Probe)> {
        let mut all = Vec::new();
        for (kind, monitor) in &self.shared.ctx.monitors {
            all.push((*kind, monitor.probe().await));
        }
        all
    }

    /// `None` when the server has no network; otherwise the error when it could not be set up.
    pub fn network(&self) -> Option<Result<NetworkConfig, String>> {
        self.shared.ctx.network_status()
    }

    pub fn default_hypervisor(&self) -> Hypervisor {
        self.shared.ctx.config.default_hypervisor
    }

    /// Refuses new commands, lets running operations finish (up to `grace`), leaves VMs running.
    pub async fn shutdown(&self, grace: Duration) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.schedules.poke();
        let retired = stream::iter(self.shared.registry.all()).for_each_concurrent(
            None,
            |entry| async move {
                let (reply, answer) = oneshot::channel();
                // A driver that is gone already has nothing to finish.
                if entry.mailbox.send(Message::Retire { reply }).await.is_ok() {
                    let _ = answer.await;
                }
            },
        );
        let stored = &self.shared.ctx.compression.stored;
        let ended = async { tokio::join!(retired, stored.end()) };
        if tokio::time::timeout(grace, ended).await.is_err() {
            tracing::warn!("operations still run; the next start finishes or undoes them");
        }
        if let Err(error) = self.shared.heart.beat() {
            tracing::warn!(%error, "writing the last heartbeat");
        }
    }
}

pub(crate) async fn ask(
    entry: &Entry,
    message: impl FnOnce(Reply) -> Message,
) -> Result<Arc<InstanceView>, EngineError> {
    let (reply, answer) = oneshot::channel();
    entry
        .mailbox
        .send(message(reply))
        .await
        .map_err(|_| EngineError::NotFound {
            what: "instance",
            id: entry.view().id.clone(),
        })?;
    answer.await.map_err(|_| driver_failed())?
}

/// A driver answers everything it took, also when its instance is gone.
pub(crate) fn driver_failed() -> EngineError {
    EngineError::Internal {
        context: "the instance's driver".to_owned(),
        reason: "it ended without an answer; restart the server".to_owned(),
    }
}

/// Waits for the guest's channel: after a restart of the server it is being built up again.
async fn is_connected(agent: &AgentClient, until: tokio::time::Instant) -> Result<(), EngineError> {
    let mut guest = agent.view();
    let connected = tokio::time::timeout_at(until, guest.wait_for(|guest| guest.connected)).await;
    match connected {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(_)) | Err(_) => {
            let reason = "its channel is not connected".to_owned();
            Err(AgentError::Unavailable(reason).into())
        }
    }
}

fn is_settled(view: &InstanceView, target: State) -> bool {
    let terminal = match view.state() {
        State::Stopped | State::Standby => true,
        State::Created | State::Initializing | State::Running | State::Paused | State::Shutdown => {
            false
        }
    };
    view.state() == target || (terminal && view.record.operation().is_none())
}

fn outcome(view: &InstanceView, timed_out: bool) -> WaitOutcome {
    WaitOutcome {
        state: view.state(),
        timed_out,
        unknown: view.unknown.clone(),
    }
}

/// CUID2 with its standard length of 24 characters.
pub(crate) fn new_id() -> String {
    cuid2::create_id()
}

/// Sockets live below the data folder; a path that is too long would fail at the first boot.
fn check_data_dir(dir: &Path) -> Result<(), EngineError> {
    let longest = dir.as_os_str().len() + "/instances/".len() + 24 + "/run/agent.sock".len();
    if !dir.is_absolute() || longest > MAX_SOCKET_PATH {
        return Err(EngineError::InvalidField {
            code: "invalid_field",
            field: "data_dir".into(),
            value: dir.display().to_string(),
            allowed: "an absolute path of at most 57 bytes (unix socket paths hold 107)".into(),
        });
    }
    Ok(())
}

fn total_memory() -> std::io::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| std::io::Error::other("MemTotal is not there"))
}
