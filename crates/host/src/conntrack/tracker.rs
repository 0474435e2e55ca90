//! The task that keeps the truth, and those who read it.
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{
    ConntrackError,
    flow::{Family, Flow},
    observer::{Dump, Event, Events, Lost, Observer},
    table::{Outcome, Table},
};

/// After a failed dump, doubled from the first to the last.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(10);

/// Limits of a [`Tracker`].
#[derive(Debug, Clone, Copy)]
pub struct TrackerOptions {
    /// Flows that are kept, about 80 bytes each (IPv4). With more, reading fails with
    /// [`NotInSync::TooManyFlows`] until a dump fits again.
    pub max_flows: usize,
}

impl Default for TrackerOptions {
    fn default() -> Self {
        Self { max_flows: 1 << 20 }
    }
}

/// Why the known flows are not the truth now. Whoever decides takes the instance for busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotInSync {
    #[error("the table of connections is being read; wait for it")]
    Resyncing,
    #[error("changes of connections are not heard: {0}")]
    Disconnected(ConntrackError),
    #[error("the table of connections could not be read: {0}")]
    DumpFailed(ConntrackError),
    #[error(
        "there are more than {0} connections; raise the limit, or lower net.netfilter.nf_conntrack_max"
    )]
    TooManyFlows(usize),
    #[error("the connection tracker has been stopped; start another one")]
    Stopped,
}

/// What has happened since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub new: u64,
    pub update: u64,
    pub destroy: u64,
    /// Events about flows that the options do not select.
    pub ignored: u64,
    /// Overflows of the socket's buffer.
    pub overflows: u64,
    /// Messages that could not be read.
    pub malformed: u64,
    pub disconnects: u64,
    /// Dumps merged, the first one included.
    pub resyncs: u64,
    pub failed_resyncs: u64,
    /// From asking for the dump to its merge.
    pub last_resync: Duration,
    pub longest_resync: Duration,
    /// Flows known now.
    pub flows: u64,
}

struct State {
    table: Table,
    counters: Counters,
    watchers: HashMap<IpAddr, watch::Sender<u64>>,
    health: watch::Sender<Result<(), NotInSync>>,
}

impl State {
    fn touch(&self, destination: IpAddr) {
        if let Some(watcher) = self.watchers.get(&destination) {
            watcher.send_modify(|version| *version = version.wrapping_add(1));
        }
    }

    /// Everybody looks again, and watchers that nobody holds go.
    fn touch_all(&mut self) {
        self.watchers.retain(|_, watcher| {
            watcher.send_modify(|version| *version = version.wrapping_add(1));
            !watcher.is_closed()
        });
    }

    fn set_health(&mut self, health: Result<(), NotInSync>) {
        let changed = self.health.send_if_modified(|known| {
            let changed = *known != health;
            *known = health;
            changed
        });
        if changed {
            self.touch_all();
        }
    }
}

type Shared = Arc<Mutex<State>>;

/// No code panics while it holds the lock, and each change leaves the state valid.
fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Command {
    Resync(oneshot::Sender<Result<(), ConntrackError>>),
    Cut(Duration),
}

/// The flows of this network namespace, kept true by a task of its own. Dropping it ends the task.
#[derive(Debug)]
pub struct Tracker {
    shared: Reader,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Reader(Shared);

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Tracker {
    /// Subscribes, then reads the table in the background: [`Tracker::in_sync`] waits for it.
    ///
    /// # Errors
    /// What [`Observer::events`] meets.
    pub fn start(observer: Observer, options: TrackerOptions) -> Result<Self, ConntrackError> {
        let events = observer.events()?;
        let (health, _) = watch::channel(Err(NotInSync::Resyncing));
        let shared = Arc::new(Mutex::new(State {
            table: Table::new(options.max_flows),
            counters: Counters::default(),
            watchers: HashMap::new(),
            health,
        }));
        let (commands, inbox) = mpsc::unbounded_channel();
        let keeper = Keeper {
            observer,
            options,
            events,
            shared: shared.clone(),
            inbox,
            waiting: Vec::new(),
            resync: Resync::Due,
            retry: FIRST_RETRY,
        };
        Ok(Self {
            shared: Reader(shared),
            commands,
            task: tokio::spawn(keeper.run()),
        })
    }

    /// The flows whose original destination is this address.
    ///
    /// # Errors
    /// [`NotInSync`]: what is known may not be the truth.
    pub fn flows_to(&self, destination: IpAddr) -> Result<Vec<Flow>, NotInSync> {
        let state = lock(&self.shared.0);
        (*state.health.borrow())?;
        Ok(state.table.flows_to(destination))
    }

    /// Whether reading gives the truth now.
    ///
    /// # Errors
    /// Why not.
    pub fn health(&self) -> Result<(), NotInSync> {
        *lock(&self.shared.0).health.borrow()
    }

    /// A number that changes whenever flows to this address, or the health, may have changed. It
    /// says nothing else: read the latest state after each change.
    pub fn watch(&self, destination: IpAddr) -> watch::Receiver<u64> {
        let mut state = lock(&self.shared.0);
        state.watchers.retain(|_, watcher| !watcher.is_closed());
        let watcher = state.watchers.entry(destination.to_canonical());
        watcher.or_insert_with(|| watch::Sender::new(0)).subscribe()
    }

    /// Every change of the health.
    pub fn watch_health(&self) -> watch::Receiver<Result<(), NotInSync>> {
        lock(&self.shared.0).health.subscribe()
    }

    /// Waits until reading gives the truth.
    ///
    /// # Errors
    /// [`NotInSync::Stopped`] if it never will.
    pub async fn in_sync(&self) -> Result<(), NotInSync> {
        let mut health = self.watch_health();
        let known =
            |health: &Result<(), NotInSync>| !matches!(health, Err(e) if *e != NotInSync::Stopped);
        match health.wait_for(known).await {
            Ok(health) => *health,
            Err(_) => Err(NotInSync::Stopped),
        }
    }

    /// Merges a dump begun after this call. Between the kernel's events flows age unseen, and some
    /// send none at all ([`Observer::events`]): do this from time to time, and before acting.
    ///
    /// # Errors
    /// Why the dump failed; reading then fails as well, until one succeeds.
    pub async fn resync(&self) -> Result<(), ConntrackError> {
        let (done, answer) = oneshot::channel();
        (self.commands.send(Command::Resync(done))).map_err(|_| ConntrackError::Stopped)?;
        answer.await.unwrap_or(Err(ConntrackError::Stopped))
    }

    pub fn counters(&self) -> Counters {
        let state = lock(&self.shared.0);
        Counters {
            flows: state.table.len() as u64,
            ..state.counters
        }
    }

    /// Loses the subscription as if its socket had failed, for `retry`, for tests of what depends on it.
    #[doc(hidden)]
    pub fn cut(&self, retry: Duration) {
        // A task that has ended has no subscription to lose.
        drop(self.commands.send(Command::Cut(retry)));
    }

    /// Ends the task and waits for it.
    pub async fn stop(mut self) {
        self.task.abort();
        // The only way it ends is this abort.
        drop((&mut self.task).await);
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where the table's next dump is.
enum Resync {
    None,
    Due,
    /// After a failure.
    DueAt(tokio::time::Instant),
    Running {
        dump: Dump,
        left: Vec<Family>,
        begun: Instant,
        /// Who asked before it began, and so may have its answer.
        asked: Vec<oneshot::Sender<Result<(), ConntrackError>>>,
    },
}

enum Happened {
    Events,
    Dumped(Result<bool, ConntrackError>),
    Due,
    Asked(Command),
    Abandoned,
}

struct Keeper {
    observer: Observer,
    options: TrackerOptions,
    events: Events,
    shared: Shared,
    inbox: mpsc::UnboundedReceiver<Command>,
    waiting: Vec<oneshot::Sender<Result<(), ConntrackError>>>,
    resync: Resync,
    retry: Duration,
}

impl Keeper {
    async fn run(mut self) {
        let (mut batch, mut dumped) = (Vec::new(), Vec::new());
        loop {
            if matches!(self.resync, Resync::Due) {
                self.begin();
            }
            let happened = tokio::select! {
                // Fair: a steady stream of events must not hold back the dump that makes them truth.
                () = self.events.next_batch(&mut batch) => Happened::Events,
                more = progress(&mut self.resync, &mut dumped) => more,
                command = self.inbox.recv() => {
                    command.map_or(Happened::Abandoned, Happened::Asked)
                }
            };
            match happened {
                Happened::Events => self.apply(&mut batch),
                Happened::Dumped(more) => self.merge(&mut dumped, more),
                Happened::Due => self.resync = Resync::Due,
                Happened::Asked(command) => self.obey(command),
                Happened::Abandoned => return,
            }
            // Under a steady stream nothing above ever waits.
            tokio::task::coop::consume_budget().await;
        }
    }

    fn apply(&mut self, batch: &mut Vec<Event>) {
        let shared = self.shared.clone();
        let mut state = lock(&shared);
        state.counters.ignored = self.events.ignored();
        for event in batch.drain(..) {
            match &event {
                Event::New(_) => state.counters.new += 1,
                Event::Update(_) => state.counters.update += 1,
                Event::Destroy(_) => state.counters.destroy += 1,
                Event::Lost(lost) => {
                    self.lost(&mut state, *lost);
                    continue;
                }
            }
            if let Some(destination) = state.table.apply(&event) {
                state.touch(destination);
            }
        }
        if state.table.is_full() && !matches!(self.resync, Resync::Running { .. }) {
            state.set_health(Err(NotInSync::TooManyFlows(self.options.max_flows)));
        }
    }

    fn lost(&mut self, state: &mut State, lost: Lost) {
        let health = match lost {
            Lost::Overflow => {
                state.counters.overflows += 1;
                NotInSync::Resyncing
            }
            Lost::Malformed(_) => {
                state.counters.malformed += 1;
                NotInSync::Resyncing
            }
            Lost::Disconnected(error) => {
                state.counters.disconnects += 1;
                NotInSync::Disconnected(error)
            }
            Lost::Reconnected => NotInSync::Resyncing,
        };
        tracing::warn!(?lost, "changes of connections were missed");
        state.set_health(Err(health));
        self.interrupt(state);
        self.resync = match lost {
            // Without a subscription a dump is no truth for long.
            Lost::Disconnected(_) => Resync::None,
            Lost::Overflow | Lost::Malformed(_) | Lost::Reconnected => Resync::Due,
        };
    }

    /// Gives up a dump that can no longer become the truth; who waits for it gets the next one.
    fn interrupt(&mut self, state: &mut State) {
        if let Resync::Running { asked, .. } = std::mem::replace(&mut self.resync, Resync::None) {
            state.table.abandon_resync();
            self.waiting.extend(asked);
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Resync(done) => {
                let state = lock(&self.shared);
                let health = *state.health.borrow();
                drop(state);
                if let Err(NotInSync::Disconnected(error)) = health {
                    // Who hung up does not want the answer.
                    let _ = done.send(Err(error));
                    return;
                }
                self.waiting.push(done);
                if matches!(self.resync, Resync::None | Resync::DueAt(_)) {
                    self.resync = Resync::Due;
                }
            }
            Command::Cut(retry) => {
                let event = self.events.cut(retry);
                self.apply(&mut vec![event]);
            }
        }
    }

    fn begin(&mut self) {
        let mut left: Vec<Family> = self.observer.options().families().collect();
        left.reverse();
        let asked = std::mem::take(&mut self.waiting);
        let begun = Instant::now();
        // Before the request: an event between the two must count as heard during the resync.
        lock(&self.shared).table.begin_resync();
        let Some(first) = left.pop() else { return };
        match self.observer.start_dump(first) {
            Ok(dump) => {
                self.resync = Resync::Running {
                    dump,
                    left,
                    begun,
                    asked,
                }
            }
            Err(error) => self.fail(error, asked),
        }
    }

    fn merge(&mut self, dumped: &mut Vec<Flow>, more: Result<bool, ConntrackError>) {
        let mut state = lock(&self.shared);
        for flow in dumped.drain(..) {
            state.table.dumped(&flow);
        }
        drop(state);
        let Resync::Running { dump, left, .. } = &mut self.resync else {
            return;
        };
        let next = match (more, left.pop()) {
            (Ok(true), None) => return,
            (Ok(true), Some(family)) => return left.push(family),
            (Ok(false), Some(family)) => self.observer.start_dump(family).map(|next| *dump = next),
            (Ok(false), None) => return self.finish(),
            (Err(error), _) => Err(error),
        };
        if let Err(error) = next
            && let Resync::Running { asked, .. } = std::mem::replace(&mut self.resync, Resync::None)
        {
            self.fail(error, asked);
        }
    }

    fn finish(&mut self) {
        let Resync::Running { begun, asked, .. } =
            std::mem::replace(&mut self.resync, Resync::None)
        else {
            return;
        };
        self.retry = FIRST_RETRY;
        let mut state = lock(&self.shared);
        let outcome = state.table.finish_resync();
        let took = begun.elapsed();
        let counters = &mut state.counters;
        counters.resyncs += 1;
        counters.last_resync = took;
        counters.longest_resync = counters.longest_resync.max(took);
        let flows = state.table.len();
        tracing::debug!(flows, ?outcome, ?took, "the table of connections was read");
        state.set_health(match outcome {
            Outcome::Truth | Outcome::SomeOver => Ok(()),
            Outcome::Full => Err(NotInSync::TooManyFlows(self.options.max_flows)),
        });
        state.touch_all();
        drop(state);
        for done in asked {
            // Who hung up does not want the answer.
            let _ = done.send(Ok(()));
        }
        self.resync = match outcome {
            // Somebody asked while the dump ran, which may not have seen what they mean.
            _ if !self.waiting.is_empty() => Resync::Due,
            Outcome::Truth => Resync::None,
            Outcome::SomeOver | Outcome::Full => {
                Resync::DueAt(tokio::time::Instant::now() + LAST_RETRY)
            }
        };
    }

    fn fail(
        &mut self,
        error: ConntrackError,
        asked: Vec<oneshot::Sender<Result<(), ConntrackError>>>,
    ) {
        tracing::warn!(%error, "the table of connections could not be read");
        let mut state = lock(&self.shared);
        state.table.abandon_resync();
        state.counters.failed_resyncs += 1;
        state.set_health(Err(NotInSync::DumpFailed(error)));
        drop(state);
        for done in asked {
            // Who hung up does not want the answer.
            let _ = done.send(Err(error));
        }
        self.resync = Resync::DueAt(tokio::time::Instant::now() + self.retry);
        self.retry = (self.retry * 2).min(LAST_RETRY);
    }
}

/// However the task ends, nobody goes on reading what it knew.
impl Drop for Keeper {
    fn drop(&mut self) {
        lock(&self.shared).set_health(Err(NotInSync::Stopped));
    }
}

/// The next step of the resync, if there is one. Cancelling loses nothing.
async fn progress(resync: &mut Resync, dumped: &mut Vec<Flow>) -> Happened {
    match resync {
        Resync::None => std::future::pending().await,
        Resync::Due => Happened::Due,
        Resync::DueAt(when) => {
            tokio::time::sleep_until(*when).await;
            Happened::Due
        }
        Resync::Running { dump, .. } => Happened::Dumped(dump.next(dumped).await),
    }
}
