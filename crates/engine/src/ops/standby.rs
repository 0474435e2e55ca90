//! Standby: the guest's memory becomes a file nobody has to hold, and its VMM goes.
//!
//! ```text
//!   admitted ─> flush (guest runs) ─> pause ─> save ─> fsync ─> manifest ─> mark ─> committed ─> VMM gone ─> Standby
//!      └──────────── a failure, a stop, a restore, a delete: the guest goes on ──┘ └── only forward ──┘
//! ```
//! The mark (`doze_snapshot::manifest::publish`) is the commit point: whoever finds it finishes the
//! standby, whoever does not lets the guest go on. At most four store commits: admitted, paused,
//! committed, asleep.
use std::{
    fs::File,
    path::{Path, PathBuf},
};

use doze_host::files;
use doze_lifecycle::{Command, Fact, Operation, Refusal, Stamp, State};
use doze_snapshot::manifest::{self, FileEntry, MANIFEST_VERSION, Manifest, Memory, MemoryCodec};
use doze_vmm::{MachineDescription, MachineStatus, SavedFile};

use super::{Cancel, Laps, check};
use crate::{
    EngineError, ExecPolicy, StandbyOptions,
    auto_standby::Attempt,
    context::{blocking, io_error},
    instance::{Instance, SNAPSHOT, vmm_error},
    kill::KillPoint,
    now,
};

/// What device state, manifest and the file system's own bookkeeping may need.
pub const ROOM: u64 = 16 << 20;

/// From Initializing or Running to Standby. On error the guest goes on, unless its machine died.
/// `auto`: nobody asked for it, and it is over as soon as somebody uses the instance.
pub async fn run(
    instance: &mut Instance,
    cancel: &Cancel,
    auto: Option<&Attempt>,
    options: StandbyOptions,
) -> Result<(), EngineError> {
    if let Some(attempt) = auto {
        attempt.first_look(instance).await?;
    }
    check_sessions(instance)?;
    let _room = instance
        .ctx
        .reserve_disk(&instance.dir(), ROOM)
        .inspect_err(|error| instance.note(&format!("standby refused: {error}")))?;
    // A mark that is found while a standby is in flight means that it is committed: an old one must be gone.
    forget_old(instance).await?;
    // Recorded with the first word of it: whoever finishes it after a crash must know.
    instance.compression = instance.plan_compression(options);
    if let Err(error) = instance.commit(Fact::Admitted(Operation::Standby)).await {
        instance.compression = None;
        return Err(error);
    }
    instance.reach(KillPoint::StandbyAdmitted);
    let mut laps = Laps::start("standby");
    match make_snapshot(instance, cancel, auto, &mut laps).await {
        Ok(()) => {
            finish(instance).await?;
            laps.lap("asleep");
            instance.note(laps.text());
            Ok(())
        }
        Err(error) => {
            // Its mark could not be taken back: a guest that ran on now would be mixed up with its old
            // state after a crash.
            if is_marked(instance).await? {
                instance.note(&format!("the snapshot stays committed although: {error}"));
                let status = status(instance).await?;
                return complete(instance, status).await;
            }
            instance.note(&format!("standby given up: {error}"));
            // Somebody who came in time is no failure.
            let welcome = auto.is_some() && matches!(error, EngineError::Interrupted { .. });
            let reason = (!welcome).then(|| error.to_string());
            if let Err(undoing) = undo(instance, reason.as_deref()).await {
                // Looked at again before the next command and by the regular check.
                instance.note(&format!("undoing the standby failed: {undoing}"));
            }
            Err(error)
        }
    }
}

/// Sessions do not survive: their ends on the host belong to this machine.
fn check_sessions(instance: &Instance) -> Result<(), EngineError> {
    let open = instance
        .live
        .as_ref()
        .map_or(0, |live| live.agent.open_sessions());
    match instance.ctx.config.standby.exec_sessions {
        ExecPolicy::Refuse if open > 0 => Err(EngineError::InvalidState {
            state: instance.record.state(),
            refusal: Refusal {
                command: Command::Standby { options: false },
                state: instance.record.state(),
                operation: None,
                advice: "it has open exec sessions; end them first, or set [standby] exec_sessions = \"end\"",
            },
        }),
        ExecPolicy::Refuse | ExecPolicy::End => Ok(()),
    }
}

async fn make_snapshot(
    instance: &mut Instance,
    cancel: &Cancel,
    auto: Option<&Attempt>,
    laps: &mut Laps,
) -> Result<(), EngineError> {
    let (Some(live), Some(description)) = (&instance.live, instance.description.clone()) else {
        return Err(EngineError::Internal {
            context: "standby".into(),
            reason: "its machine is out of reach; stop it, or restart the server".into(),
        });
    };
    let machine = live.machine.clone();
    let place = instance.dir().join(SNAPSHOT);
    let version = machine.version().to_owned();
    prepare_stage(&place).await?;
    flush(&description, cancel).await?;
    laps.lap("flushed");
    instance.reach(KillPoint::StandbyFlushed);
    check(cancel)?;

    machine.pause().await.map_err(vmm_error)?;
    let paused_at = now();
    laps.lap("paused");
    instance.reach(KillPoint::StandbyPaused);
    let stage = manifest::stage_of(&place);
    let mut facts = crate::observe::markers(instance);
    facts.push((Fact::CpusPaused, paused_at));
    let saving = async {
        let saved = machine.save(&stage).await;
        laps.lap("saved");
        saved
    };
    let (recorded, saved) = tokio::join!(instance.commit_all(&facts), saving);
    recorded?;
    let saved = saved.map_err(vmm_error)?;
    instance.reach(KillPoint::StandbySaved);
    still_wanted(instance, cancel, auto).await?;

    let manifest = describe(version, &description, saved);
    seal(&place, &description, manifest, cancel).await?;
    instance.reach(KillPoint::StandbySealed);
    // The last moment to change one's mind.
    check(cancel)?;
    mark(&place).await?;
    laps.lap("durable");
    instance.reach(KillPoint::StandbyMarked);
    if let Some(attempt) = auto {
        if let Err(somebody) = attempt.last_look(instance).await {
            // Nobody was told yet.
            unmark(&place).await?;
            return Err(somebody);
        }
        laps.lap("looked again");
    }
    if let Err(error) = instance.commit(Fact::SnapshotCommitted).await {
        // Nobody was told, and the guest has not run since: it goes on, but not with the mark there.
        unmark(&place).await?;
        return Err(error);
    }
    instance.reach(KillPoint::StandbyCommitted);
    Ok(())
}

/// Between pause and commit: the place to look a second time whether the guest may sleep. A
/// paused guest simply goes on when it may not.
async fn still_wanted(
    instance: &Instance,
    cancel: &Cancel,
    auto: Option<&Attempt>,
) -> Result<(), EngineError> {
    if let Some(attempt) = auto {
        attempt.look(instance).await?;
    }
    check_sessions(instance)?;
    check(cancel)
}

/// The snapshot is committed: its VMM goes, also when a crash came in between.
pub async fn finish(instance: &mut Instance) -> Result<(), EngineError> {
    instance
        .end_machine(KillPoint::StandbyMachineKilled, None)
        .await?;
    instance.reach(KillPoint::StandbyRecorded);
    Ok(())
}

/// Takes back what was done, as long as there is no mark. The guest goes on where it stood; `reason` is shown
/// as its failure.
pub async fn undo(instance: &mut Instance, reason: Option<&str>) -> Result<(), EngineError> {
    let place = instance.dir().join(SNAPSHOT);
    let stage = manifest::stage_of(&place);
    // Whoever finds the mark finishes the standby, so a guest never runs beside it.
    unmark(&place).await?;
    // Then the guest: it must not wait for files to be removed.
    let resumed = resume(instance).await;
    blocking("removing a half-made snapshot", move || {
        files::remove_tree(&stage)
    })
    .await?
    .map_err(io_error("removing a half-made snapshot"))?;
    let resumed_at = match resumed? {
        Some(at) => at,
        // The record was told of a commit whose mark is not there.
        None if instance.record.has_snapshot() => now(),
        None => return Ok(()),
    };
    instance.reach(KillPoint::StandbyResumed);
    if instance.record.operation() == Some(Operation::Standby) {
        let reason = reason.map(|reason| format!("the last standby was given up: {reason}"));
        let fact = Fact::StandbyAbandoned { reason };
        instance.commit_at(fact, &resumed_at).await?;
    }
    Ok(())
}

async fn status(instance: &Instance) -> Result<MachineStatus, EngineError> {
    match &instance.live {
        Some(live) => live.machine.status().await.map_err(vmm_error),
        None => Ok(MachineStatus::Gone),
    }
}

/// When the CPUs ran again. `None`: there is no machine any more, and whoever observes that ends the
/// standby, too.
pub async fn resume(instance: &Instance) -> Result<Option<Stamp>, EngineError> {
    use MachineStatus as S;
    let Some(live) = &instance.live else {
        return Ok(None);
    };
    match live.machine.status().await.map_err(vmm_error)? {
        S::Paused | S::Prelaunch => live.machine.resume().await.map_err(vmm_error)?,
        // A guest that powered off meanwhile is booked by whoever observes it.
        S::Running | S::Shutdown | S::Failed => {}
        S::Gone => return Ok(None),
    }
    Ok(Some(now()))
}

async fn prepare_stage(place: &Path) -> Result<(), EngineError> {
    let place = place.to_owned();
    blocking("making room for a snapshot", move || {
        files::create_private_dir(&manifest::stage_of(&place))
            .map_err(io_error("making the snapshot's folder"))
    })
    .await?
}

async fn forget_old(instance: &Instance) -> Result<(), EngineError> {
    let place = instance.dir().join(SNAPSHOT);
    let dir = instance.dir();
    blocking("removing an old snapshot", move || {
        manifest::remove(&place).map_err(manifest_error)?;
        crate::compression::files::drop_artefacts(&dir)
            .map_err(io_error("removing old compressed memory"))
    })
    .await?
}

/// Writes back what can be written while the guest runs, so that little is left to do while it does not.
/// Whoever interrupts does not wait for the disk.
pub async fn flush(description: &MachineDescription, cancel: &Cancel) -> Result<(), EngineError> {
    let (memory, disks) = (description.memory.clone(), writable(description));
    let work = blocking("writing memory back", move || {
        disks.iter().try_for_each(|disk| sync(disk))?;
        memory.flush()
    });
    tokio::select! {
        done = work => done?.map_err(|e| disk_error("writing memory back", &e)),
        () = cancel.cancelled() => check(cancel),
    }
}

fn writable(description: &MachineDescription) -> Vec<PathBuf> {
    let disks = description.disks.iter().filter(|disk| !disk.read_only);
    disks.map(|disk| disk.path.clone()).collect()
}

fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_data()
}

pub fn describe(
    version: String,
    description: &MachineDescription,
    saved: Vec<SavedFile>,
) -> Manifest<MachineDescription> {
    let entry = |file: SavedFile| FileEntry {
        name: file.name,
        size: file.size,
        sha256: file.sha256,
    };
    Manifest {
        version: MANIFEST_VERSION,
        id: crate::engine::new_id(),
        created_at_us: now().wall_us,
        monitor_version: version,
        machine: description.clone(),
        memory: Memory {
            size: description.memory_bytes,
            codec: MemoryCodec::Raw,
        },
        files: saved.into_iter().map(entry).collect(),
    }
}

/// Everything durable except the mark. Memory and the small files go to the disk side by side.
async fn seal(
    place: &Path,
    description: &MachineDescription,
    manifest: Manifest<MachineDescription>,
    cancel: &Cancel,
) -> Result<(), EngineError> {
    let (memory, disks) = (description.memory.clone(), writable(description));
    let place = place.to_owned();
    let memory = blocking("writing memory", move || {
        disks.iter().try_for_each(|disk| sync(disk))?;
        memory.sync()
    });
    let files = blocking("writing the snapshot's manifest", move || {
        manifest::seal(&place, &manifest)
    });
    let memory = async {
        tokio::select! {
            written = memory => written?.map_err(|e| disk_error("writing memory", &e)),
            // The disk may take its time, and a guest that is wanted back must not wait for it.
            () = cancel.cancelled() => check(cancel),
        }
    };
    // Who writes into the stage folder is waited for: it is removed next when this fails.
    let (memory, files) = tokio::join!(memory, files);
    memory?;
    files?.map_err(manifest_error)
}

async fn mark(place: &Path) -> Result<(), EngineError> {
    let path = place.to_owned();
    let marked = blocking("marking the snapshot valid", move || {
        manifest::publish(&path)
    })
    .await?;
    if let Err(error) = marked {
        // Its rename may have been seen although it is not known to be durable.
        unmark(place).await?;
        return Err(manifest_error(error));
    }
    Ok(())
}

async fn unmark(place: &Path) -> Result<(), EngineError> {
    let place = place.to_owned();
    blocking(
        "taking a snapshot's mark back",
        move || match manifest::exists(&place)? {
            true => manifest::consume(&place),
            false => Ok(()),
        },
    )
    .await?
    .map_err(manifest_error)
}

/// A full disk is the operator's to mend and says so.
pub fn disk_error(context: &str, error: &std::io::Error) -> EngineError {
    if doze_host::files::is_full(error) {
        return EngineError::Capacity {
            resource: "disk",
            wanted: format!("room for {context}"),
            available: "none is left".into(),
            limit: error.to_string(),
        };
    }
    EngineError::Internal {
        context: context.to_owned(),
        reason: error.to_string(),
    }
}

pub fn manifest_error(error: manifest::ManifestError) -> EngineError {
    use manifest::ManifestError;
    match error {
        ManifestError::Absent(_) | ManifestError::Invalid { .. } => EngineError::Snapshot {
            reason: error.to_string(),
        },
        ManifestError::Io { step, path, source } => {
            let step = format!("{step} {}", path.display());
            disk_error(&format!("cannot {step}"), &source)
        }
    }
}

/// What is left of a standby that a crash interrupted: `true` when it was committed.
pub async fn is_marked(instance: &Instance) -> Result<bool, EngineError> {
    // The disk alone knows: a record may have been told of a commit that was taken back.
    let place = instance.dir().join(SNAPSHOT);
    blocking("looking for a snapshot", move || manifest::exists(&place))
        .await?
        .map_err(manifest_error)
}

/// Finishes a standby whose mark is there although the record does not say so yet.
pub async fn complete(instance: &mut Instance, status: MachineStatus) -> Result<(), EngineError> {
    let last_seen = crate::life_sign::last_seen(instance).await?;
    match instance.record.state() {
        State::Initializing | State::Running => instance.commit(Fact::CpusPaused).await?,
        State::Paused => {}
        State::Created | State::Shutdown | State::Stopped | State::Standby => {}
    }
    if !instance.record.has_snapshot() {
        instance.commit(Fact::SnapshotCommitted).await?;
    }
    if status == MachineStatus::Gone {
        instance.kill_machine().await?;
        let fact = Fact::MachineFoundGone {
            failure: None,
            last_seen,
        };
        return instance.commit(fact).await;
    }
    finish(instance).await
}
