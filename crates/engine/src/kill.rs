//! Named points at which the server can be told to die, so that tests can prove what a restart finds.
//!
//! `DOZE_KILL_AT=<name>` makes the process send itself SIGKILL the first time it gets there: no
//! destructor, no flush, as a power cut would leave it. The list is an enum, so a point cannot exist
//! without being listed, and a test that walks [`KillPoint::ALL`] cannot miss one.

macro_rules! kill_points {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum KillPoint { $($(#[$doc])* $variant),+ }
        impl KillPoint {
            pub const ALL: &'static [KillPoint] = &[$(KillPoint::$variant),+];
            pub const fn name(self) -> &'static str {
                match self { $(KillPoint::$variant => $name),+ }
            }
        }
    };
}

kill_points! {
    /// The new instance is in the store; nothing else exists.
    CreateRecorded = "create.recorded",
    /// Its folder and disks exist.
    CreateFilesMade = "create.files_made",
    /// A start is recorded; nothing was touched.
    StartAdmitted = "start.admitted",
    /// The new run's configuration is written.
    StartFilesReset = "start.files_reset",
    /// The TAP exists.
    LaunchTapMade = "launch.tap_made",
    /// A VMM process exists that no record names.
    LaunchSpawned = "launch.spawned",
    /// The record names the VMM; its CPUs never ran.
    LaunchMachineRecorded = "launch.machine_recorded",
    /// The CPUs run; the record does not say so.
    LaunchResumed = "launch.resumed",
    /// The record says that the CPUs run; nobody was answered.
    LaunchCpusRecorded = "launch.cpus_recorded",
    /// A start from Standby gave the memory up; its files are still there.
    StartMemoryDiscarded = "start.memory_discarded",
    /// A standby is recorded; nothing was touched.
    StandbyAdmitted = "standby.admitted",
    /// The stage folder is there and memory was written back; the guest runs.
    StandbyFlushed = "standby.flushed",
    /// The CPUs stand still; the record does not say so.
    StandbyPaused = "standby.paused",
    /// The record says Paused; device state is in the stage folder, nothing of it durable.
    StandbySaved = "standby.saved",
    /// Memory, device state and manifest are durable; the mark is missing.
    StandbySealed = "standby.sealed",
    /// The mark is durable; the record does not say so.
    StandbyMarked = "standby.marked",
    /// The record says committed; the VMM is there.
    StandbyCommitted = "standby.committed",
    /// The VMM is gone; the record still names it.
    StandbyMachineKilled = "standby.machine_killed",
    /// The record says Standby; nobody was answered.
    StandbyRecorded = "standby.recorded",
    /// A standby was given up and the guest runs again; the record does not say so.
    StandbyResumed = "standby.resumed",
    /// A restore is recorded; nothing was touched.
    RestoreAdmitted = "restore.admitted",
    /// The snapshot is found good.
    RestoreVerified = "restore.verified",
    /// A VMM waits that no record names.
    RestoreSpawned = "restore.spawned",
    /// Compressed memory was decompressed; both forms are there.
    RestoreDecompressed = "restore.decompressed",
    /// It holds the guest's state; its CPUs have not run.
    RestoreLoaded = "restore.loaded",
    /// What the raw memory was decompressed from is gone; the mark is there.
    RestoreArtefactDropped = "restore.artefact_dropped",
    /// The mark is gone; the CPUs have not run.
    RestoreConsumed = "restore.consumed",
    /// The CPUs run; the record does not say so.
    RestoreResumed = "restore.resumed",
    /// The record says that the CPUs run; the guest has not answered.
    RestoreRecorded = "restore.recorded",
    /// The guest's answer is recorded; nobody was answered.
    RestoreAnswered = "restore.answered",
    /// A failed restore's VMM is gone; the record still says restore.
    RestoreUndone = "restore.undone",
    /// A snapshot of a running guest is recorded; nothing was touched.
    SnapshotAdmitted = "snapshot.admitted",
    /// The guest stands still for its copy; the record does not say so.
    SnapshotPaused = "snapshot.paused",
    /// The copy's files are there, nothing of it durable; the guest stands still.
    SnapshotCopied = "snapshot.copied",
    /// The guest runs again; the record does not say so.
    SnapshotResumed = "snapshot.resumed",
    /// The record says so; the copy is not durable yet.
    SnapshotContinued = "snapshot.continued",
    /// A stored snapshot's folder has its place; no row names it.
    SnapshotPlaced = "snapshot.placed",
    /// Its row is there; nobody was answered.
    SnapshotRecorded = "snapshot.recorded",
    /// All files of an imported snapshot are there, checked and durable; none has its place.
    ImportReceived = "import.received",
    /// An imported snapshot's folder has its place; no row names it.
    ImportPlaced = "import.placed",
    /// Its row is there; nobody was answered.
    ImportRecorded = "import.recorded",
    /// A deleted snapshot's row is gone; its folder is there.
    SnapshotRowRemoved = "snapshot.row_removed",
    /// Its folder is gone; nobody was answered.
    SnapshotFilesRemoved = "snapshot.files_removed",
    /// A fork's copy is made; no record names it.
    ForkCopied = "fork.copied",
    /// The fork is in the store; its files have no place yet.
    ForkRecorded = "fork.recorded",
    /// Its files are its own; it neither rests nor runs.
    ForkFilesMade = "fork.files_made",
    /// It is what was asked for; nobody was answered.
    ForkDone = "fork.done",
    /// A rollback is recorded; nothing was touched.
    RollbackAdmitted = "rollback.admitted",
    /// The snapshot's copy is there and durable, but not committed.
    RollbackStaged = "rollback.staged",
    /// It is committed; the machine, if any, is there.
    RollbackMarked = "rollback.marked",
    /// The machine is gone; the record may still name it.
    RollbackMachineKilled = "rollback.machine_killed",
    /// The files are the snapshot's; the record does not say so.
    RollbackSwapped = "rollback.swapped",
    /// The record says so; nobody was answered.
    RollbackRecorded = "rollback.recorded",
    /// A rollback was given up and its files are gone; the record still says rollback.
    RollbackUndone = "rollback.undone",
    /// Compressed memory has its name beside the raw one.
    CompressionMade = "compression.made",
    /// The raw memory is gone; nothing says so.
    CompressionRawRemoved = "compression.raw_removed",
    /// It is recorded how the memory is kept.
    CompressionRecorded = "compression.recorded",
    /// A stop is recorded; the guest knows nothing.
    StopAdmitted = "stop.admitted",
    /// The guest was asked to end.
    StopGuestAsked = "stop.guest_asked",
    /// The record says that the guest powered off; its VMM is there.
    StopPowerOffRecorded = "stop.power_off_recorded",
    /// The VMM is gone; the record still names it.
    StopMachineKilled = "stop.machine_killed",
    /// The record says Stopped; nobody was answered.
    StopMachineGoneRecorded = "stop.machine_gone_recorded",
    /// A delete is recorded; everything is still there.
    DeleteAdmitted = "delete.admitted",
    /// The VMM is gone; the record still names it.
    DeleteMachineKilled = "delete.machine_killed",
    /// The TAP is gone.
    DeleteTapRemoved = "delete.tap_removed",
    /// The folder is gone.
    DeleteFilesRemoved = "delete.files_removed",
    /// The row is gone; nobody was answered.
    DeleteRecordRemoved = "delete.record_removed",
}

/// Which point, if any, this process is to die at.
#[derive(Clone, Default)]
pub struct KillSwitch {
    armed: Option<String>,
    watcher: Option<Watcher>,
    commits: Option<CommitWatcher>,
}

/// Told of every point that is reached.
type Watcher = std::sync::Arc<dyn Fn(KillPoint) + Send + Sync>;

/// Told of every commit to the store, before and after.
type CommitWatcher = std::sync::Arc<dyn Fn(CommitStep) -> Result<(), String> + Send + Sync>;

/// Where a commit to the store stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitStep {
    /// Nothing of it was handed to the store.
    Before,
    /// It is durable; nobody was told.
    After,
}

impl std::fmt::Debug for KillSwitch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KillSwitch({:?})", self.armed)
    }
}

impl KillSwitch {
    /// # Errors
    /// The value when it names no point.
    pub fn from_env(value: Option<String>) -> Result<KillSwitch, String> {
        match value {
            Some(name) if !KillPoint::ALL.iter().any(|point| point.name() == name) => Err(name),
            armed => Ok(KillSwitch {
                armed,
                ..KillSwitch::default()
            }),
        }
    }

    /// For tests inside one process: `watcher` hears of every point, and may end the driver there by
    /// panicking.
    pub fn watched(watcher: impl Fn(KillPoint) + Send + Sync + 'static) -> KillSwitch {
        KillSwitch {
            watcher: Some(std::sync::Arc::new(watcher)),
            ..KillSwitch::default()
        }
    }

    /// The same for commits to the store; an error of `watcher` is the store's refusal.
    #[must_use]
    pub fn watching_commits(
        mut self,
        watcher: impl Fn(CommitStep) -> Result<(), String> + Send + Sync + 'static,
    ) -> KillSwitch {
        self.commits = Some(std::sync::Arc::new(watcher));
        self
    }

    pub(crate) fn commit(&self, step: CommitStep) -> Result<(), String> {
        self.commits.as_ref().map_or(Ok(()), |watch| watch(step))
    }

    /// Dies here when armed for this point.
    pub fn reach(&self, point: KillPoint) {
        if let Some(watcher) = &self.watcher {
            watcher(point);
        }
        if self.armed.as_deref() == Some(point.name()) {
            tracing::warn!(point = point.name(), "dying here as DOZE_KILL_AT asks");
            // Failing to kill ourselves leaves a test without its crash, which it will notice.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
        }
    }
}
