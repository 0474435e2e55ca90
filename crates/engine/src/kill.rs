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
#[derive(Debug, Clone, Default)]
pub struct KillSwitch {
    armed: Option<String>,
}

impl KillSwitch {
    /// # Errors
    /// The value when it names no point.
    pub fn from_env(value: Option<String>) -> Result<KillSwitch, String> {
        match value {
            Some(name) if !KillPoint::ALL.iter().any(|point| point.name() == name) => Err(name),
            armed => Ok(KillSwitch { armed }),
        }
    }

    /// Dies here when armed for this point.
    pub fn reach(&self, point: KillPoint) {
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
