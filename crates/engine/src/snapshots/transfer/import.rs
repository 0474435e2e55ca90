//! In: read into a folder that nobody knows, checked, and only then a snapshot.
use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use doze_host::files;
use doze_snapshot::{
    manifest::{self, Manifest},
    stream::{FileHeader, StreamReader},
};
use doze_vmm::{
    MachineDescription,
    boot::{self, BootPart, Verified},
};

use super::{
    DESCRIPTION, Description, Guest, Host, INITRAMFS, KERNEL, MAX_BOOT_FILE, MAX_DESCRIPTION, Part,
    checks, refuse, stream_error,
};
use crate::{
    Engine, EngineError, MemoryCompression, Snapshot,
    compression::{policy, stored},
    context::{Context, DiskRoom, blocking, boot_error, io_error, wire_name},
    copies::{self, Durable, Home},
    engine::new_id,
    instance::{SNAPSHOT, chain, store_error},
    kill::KillPoint,
    now,
    ops::standby::{ROOM, disk_error, manifest_error},
};

/// Disk that is promised at once while a stream comes in.
const STEP: u64 = 64 << 20;

/// A whole snapshot in a folder that nobody knows.
struct Arrived {
    snapshot: Snapshot,
    /// Still in the folder.
    boot: Vec<Verified>,
}

impl Engine {
    /// Makes a stored snapshot of an exported one. `reader` is used on threads of the blocking kind; its error ends the
    /// import. `name` replaces the one it had. Goes on to its end when the caller hangs up, and leaves nothing when it
    /// fails.
    ///
    /// # Errors
    /// [`EngineError::BrokenStream`] for what is no whole stream, [`EngineError::NotImportable`] for what this host
    /// cannot use, with the reason; [`EngineError::SnapshotNameTaken`], [`EngineError::Capacity`].
    pub async fn import_snapshot(
        &self,
        reader: impl Read + Send + 'static,
        name: Option<String>,
    ) -> Result<Arc<Snapshot>, EngineError> {
        self.check_open()?;
        let engine = self.clone();
        self.to_the_end("importing a snapshot", async move {
            let dir = engine.shared.ctx.captures_dir().join(new_id());
            let imported = match engine.receive(&dir, reader, name).await {
                Ok(arrived) => {
                    engine.shared.ctx.kill.reach(KillPoint::ImportReceived);
                    engine.keep(&dir, arrived).await
                }
                Err(error) => Err(error),
            };
            if imported.is_err() {
                engine.remove_copy(dir).await;
            }
            imported
        })
        .await
    }

    async fn receive(
        &self,
        dir: &Path,
        reader: impl Read + Send + 'static,
        name: Option<String>,
    ) -> Result<Arrived, EngineError> {
        let ctx = self.shared.ctx.clone();
        let (stream, mut told) = blocking("reading a snapshot's description", move || {
            let mut stream = StreamReader::new(reader).map_err(stream_error)?;
            let first = stream.next_file().map_err(stream_error)?;
            let Some(header) = first.filter(|file| file.name == DESCRIPTION) else {
                return Err(EngineError::BrokenStream {
                    reason: format!("it does not begin with {DESCRIPTION}"),
                });
            };
            let text = stream
                .small(&header, MAX_DESCRIPTION)
                .map_err(stream_error)?;
            Ok((stream, checks::read(&text)?))
        })
        .await??;
        if let Some(name) = name {
            told.snapshot.name = Some(name);
        }
        checks::description(&told, &ctx.config.limits)?;
        checks::forget_times(&mut told.snapshot, &now());
        self.check_free(&told.snapshot)?;
        told.snapshot.id = new_id();
        self.check_host(&mut told).await?;
        let dir = dir.to_owned();
        blocking("importing a snapshot", move || {
            take(&ctx, &dir, stream, told)
        })
        .await?
    }

    /// Whether it can lie beside what is here already.
    fn check_free(&self, snapshot: &Snapshot) -> Result<(), EngineError> {
        // Its source, if it lives here, can be brought back to it, and what has no network cannot be given one then.
        let source = self.shared.registry.find(&snapshot.source_id).ok();
        let source = source.map(|entry| entry.view());
        if let Some(source) = source.filter(|source| source.id == snapshot.source_id)
            && source.spec.network_enabled != snapshot.spec.network_enabled
        {
            return Err(refuse(format!(
                "it is of {}, and one of the two has a network",
                source.name
            )));
        }
        let Some(name) = &snapshot.name else {
            return Ok(());
        };
        // Before all of it is sent for nothing; the store has the last word.
        match self.shared.ctx.snapshots.holder(&snapshot.source_id, name) {
            Some(holder) => Err(EngineError::SnapshotNameTaken {
                name: name.clone(),
                holder,
            }),
            None => Ok(()),
        }
    }

    /// Makes the machine one of this host, and asks whether it can go on here.
    async fn check_host(&self, told: &mut Description) -> Result<(), EngineError> {
        let ctx = &self.shared.ctx;
        let spec = &told.snapshot.spec;
        let Ok(monitor) = ctx.monitor(spec.hypervisor) else {
            return Err(refuse(format!(
                "it needs hypervisor {}, which this doze has not",
                wire_name(spec.hypervisor)
            )));
        };
        let rootfs = self.image_of(told).await?;
        let Some(guest) = &mut told.guest else {
            return Ok(());
        };
        let accel = guest.manifest.machine.accel;
        let here = blocking("asking the CPU", move || Host::here(accel))
            .await?
            .map_err(io_error("asking the CPU"))?;
        checks::host(guest, &monitor.probe().await, &here)?;
        adopt_machine(ctx, &told.snapshot.id, guest, rootfs);
        monitor
            .check_loads(&guest.manifest.machine, &guest.manifest.monitor_version)
            .await
            .map_err(|error| refuse(chain(&error)))
    }

    /// Where the root file system of its image lies here.
    async fn image_of(&self, told: &Description) -> Result<PathBuf, EngineError> {
        let spec = &told.snapshot.spec;
        let image = match self.shared.ctx.image_by_digest(&spec.image_digest).await {
            Ok(image) => image,
            Err(EngineError::ImageNotFound { .. }) => {
                return Err(refuse(format!(
                    "its image {} ({}) is not on this host; import it first (doze image import NAME PATH)",
                    spec.image, spec.image_digest
                )));
            }
            Err(error) => return Err(error),
        };
        if image.platform != spec.platform {
            return Err(refuse(format!(
                "it is of platform {:?}, its image here of {:?}",
                spec.platform, image.platform
            )));
        }
        if told.guest.is_some() && image.rootfs_digest != told.rootfs {
            return Err(refuse(format!(
                "the root file system of its image {} has other bytes here ({} instead of {}), and its guest remembers those; make both with the same mkfs.erofs",
                spec.image, image.rootfs_digest, told.rootfs
            )));
        }
        Ok(image.rootfs)
    }

    /// The commit. Nobody can remove its image meanwhile, or add boot files.
    async fn keep(&self, dir: &Path, arrived: Arrived) -> Result<Arc<Snapshot>, EngineError> {
        let ctx = &self.shared.ctx;
        let _image = self.shared.image_gate.clone().read_owned().await;
        // It took its time.
        self.check_open()?;
        ctx.image_by_digest(&arrived.snapshot.spec.image_digest)
            .await?;
        let _boot = ctx.boot_turn().await;
        let Arrived { mut snapshot, boot } = arrived;
        let id = snapshot.id.clone();
        let (shared, from, to) = (ctx.clone(), dir.to_owned(), ctx.snapshot_dir(&id));
        let (added, placed) = blocking("placing a snapshot", move || {
            let cache = shared.boot_dir();
            let mut added = Vec::new();
            let placed = place(&boot, &cache, &from, &to, &mut added);
            (added, placed)
        })
        .await?;
        let recorded = match placed {
            Ok(size_bytes) => {
                ctx.kill.reach(KillPoint::ImportPlaced);
                snapshot.size_bytes = size_bytes;
                self.record(&snapshot).await
            }
            Err(error) => Err((error, true)),
        };
        if let Err((error, gone)) = recorded {
            if !gone {
                return Err(error);
            }
            self.remove_copy(ctx.snapshot_dir(&id)).await;
            for path in added {
                // Nobody knows of it yet: whoever would has to wait for our turn to end.
                self.remove_copy(path).await;
            }
            return Err(error);
        }
        let snapshot = Arc::new(snapshot);
        ctx.snapshots.add(snapshot.clone());
        stored::plan(ctx, &snapshot.id);
        ctx.kill.reach(KillPoint::ImportRecorded);
        tracing::info!(snapshot = %snapshot.id, source = %snapshot.source_id, bytes = snapshot.size_bytes, "snapshot imported");
        Ok(snapshot)
    }

    /// The row. The flag of an error says that there is none.
    async fn record(&self, snapshot: &Snapshot) -> Result<(), (EngineError, bool)> {
        let store = &self.shared.ctx.store;
        let Err(error) = store.add_snapshot(snapshot.clone()).await else {
            return Ok(());
        };
        // It may be there all the same, and must not outlive its files.
        let gone = match store.remove_snapshot(&snapshot.id).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "a snapshot that was refused may be there");
                false
            }
        };
        Err((store_error(error), gone))
    }
}

/// What is left of the machine that was told is what a guest sees. Its paths are ours, and those that belong to an
/// instance are given by the fork that will have one.
fn adopt_machine(ctx: &Context, id: &str, guest: &mut Guest, rootfs: PathBuf) {
    let cache = ctx.boot_dir();
    let machine = &mut guest.manifest.machine;
    machine.kernel = BootPart::Kernel.place(&cache, &guest.kernel);
    machine.initramfs = BootPart::Initramfs.place(&cache, &guest.initramfs);
    let dir = ctx.snapshot_dir(id);
    let home = Home {
        id,
        dir: &dir,
        claim: None,
    };
    copies::move_in(machine, &home);
    for disk in &mut machine.disks {
        if disk.serial == doze_agent::config::ROOTFS_SERIAL {
            disk.path.clone_from(&rootfs);
        }
    }
}

/// Reads all files into the new folder `dir`, durably.
fn take<R: Read>(
    ctx: &Arc<Context>,
    dir: &Path,
    mut stream: StreamReader<R>,
    told: Description,
) -> Result<Arrived, EngineError> {
    let made = files::create_private_dir(dir).and_then(|()| match &told.guest {
        Some(_) => files::create_private_dir(&dir.join(SNAPSHOT)),
        None => Ok(()),
    });
    made.map_err(|e| disk_error("importing a snapshot", &e))?;
    let mut missing = told.parts();
    let mut room = Room::new(ctx, dir);
    while let Some(header) = stream.next_file().map_err(stream_error)? {
        let part = expected(&mut missing, &header)?;
        receive_file(&mut stream, &header, &dir.join(&part.path), &mut room)?;
    }
    if let Some(part) = missing.first() {
        return Err(EngineError::BrokenStream {
            reason: format!("it brings no {}", part.name),
        });
    }
    let mut boot = Vec::new();
    if let Some(guest) = &told.guest {
        boot.push(
            boot::verify(BootPart::Kernel, &dir.join(KERNEL), &guest.kernel).map_err(boot_error)?,
        );
        boot.push(
            boot::verify(BootPart::Initramfs, &dir.join(INITRAMFS), &guest.initramfs)
                .map_err(boot_error)?,
        );
        let place = dir.join(SNAPSHOT);
        manifest::rewrite(&place, &guest.manifest).map_err(manifest_error)?;
        // Compares the files with their checksums.
        manifest::read::<MachineDescription>(&place)
            .map_err(|e| match e {
                manifest::ManifestError::Invalid { reason, .. } => EngineError::BrokenStream {
                    reason: format!("its device state: {reason}"),
                },
                other => manifest_error(other),
            })
            .map(|_: Manifest<MachineDescription>| ())?;
    }
    copies::sync(dir, Durable::All).map_err(|e| disk_error("importing a snapshot", &e))?;
    let memory_bytes = told.guest.as_ref().map(|g| g.manifest.memory.size);
    let snapshot = Snapshot {
        // A schedule of its source must not remove it: somebody wanted it here.
        scheduled: false,
        // As it would be of a snapshot that is taken here.
        compression: policy::effective(
            None,
            told.snapshot.spec.snapshot_policy,
            ctx.compression.config,
        )
        .filter(|_| memory_bytes.is_some())
        .map(|codec| MemoryCompression::planned(codec, now().wall_us, std::time::Duration::ZERO)),
        memory_bytes: memory_bytes.unwrap_or_default(),
        ..told.snapshot
    };
    Ok(Arrived { snapshot, boot })
}

fn expected(missing: &mut Vec<Part>, header: &FileHeader) -> Result<Part, EngineError> {
    let broken = |reason: String| EngineError::BrokenStream { reason };
    let found = missing.iter().position(|part| part.name == header.name);
    let Some(found) = found else {
        return Err(broken(format!(
            "it brings {:?}, which belongs to no such snapshot",
            header.name
        )));
    };
    let part = missing.swap_remove(found);
    let fault = match part.size {
        Some(size) if size != header.size => Some(format!("{size} are described")),
        Some(_) => None,
        None if header.size > MAX_BOOT_FILE => Some(format!("at most {MAX_BOOT_FILE} are read")),
        None => None,
    };
    match fault {
        Some(fault) => Err(broken(format!(
            "its {} claims {} bytes, {fault}",
            part.name, header.size
        ))),
        None => Ok(part),
    }
}

fn receive_file<R: Read>(
    stream: &mut StreamReader<R>,
    header: &FileHeader,
    path: &Path,
    room: &mut Room<'_>,
) -> Result<(), EngineError> {
    let failed = |e: std::io::Error| disk_error(&format!("importing {}", header.name), &e);
    let file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.set_len(header.size).map_err(failed)?;
    while let Some(block) = stream.next_block().map_err(stream_error)? {
        room.take(block.bytes.len() as u64)?;
        block.write_to(&file).map_err(failed)?;
    }
    Ok(())
}

/// Disk that was promised to this import and is not written yet.
struct Room<'a> {
    ctx: &'a Context,
    dir: &'a Path,
    promised: Option<DiskRoom>,
    left: u64,
}

impl<'a> Room<'a> {
    fn new(ctx: &'a Context, dir: &'a Path) -> Self {
        Self {
            ctx,
            dir,
            promised: None,
            left: 0,
        }
    }

    fn take(&mut self, bytes: u64) -> Result<(), EngineError> {
        if self.left < bytes {
            // What was promised before is written.
            self.promised = None;
            self.promised = Some(self.ctx.reserve_disk(self.dir, STEP + ROOM)?);
            self.left = STEP;
        }
        self.left = self.left.saturating_sub(bytes);
        Ok(())
    }
}

/// Moves boot files and folder to their places, durably. `added`: boot files that were not there before.
fn place(
    boot: &[Verified],
    cache: &Path,
    from: &Path,
    to: &Path,
    added: &mut Vec<PathBuf>,
) -> Result<u64, EngineError> {
    for file in boot {
        if boot::adopt(file, cache).map_err(boot_error)? {
            added.push(file.place(cache));
        }
    }
    files::fsync_dir(from)
        .and_then(|()| copies::place(from, to))
        .and_then(|()| copies::size(to))
        .map_err(|e| disk_error("placing a snapshot", &e))
}
