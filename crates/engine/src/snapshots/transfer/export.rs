//! Out: a stored snapshot is read as it lies; it cannot be deleted meanwhile.
use std::{fs::File, io::Write, path::Path, sync::Arc};

use doze_snapshot::{
    manifest::{self, Manifest},
    stream::StreamWriter,
};
use doze_vmm::{MachineDescription, boot};

use super::{
    DESCRIPTION, Description, Guest, Host, INITRAMFS, KERNEL, VERSION,
    memory::{self, StoredMemory},
    same_size, stream_error,
};
use crate::{
    Engine, EngineError, Snapshot, SnapshotKind,
    compression::stored,
    context::{blocking, boot_error, io_error},
    instance::{MEMORY, SNAPSHOT},
    ops::standby::{disk_error, manifest_error},
};

impl Engine {
    /// Writes a stored snapshot with everything that another host needs, the image excepted. `writer` is used on a
    /// thread of its own and may block; nothing is written before everything about the snapshot is known to be in
    /// order. Its error ends the export: [`EngineError::Interrupted`].
    ///
    /// The snapshot cannot be deleted until it is through.
    pub async fn export_snapshot(
        &self,
        key: &str,
        writer: impl Write + Send + 'static,
    ) -> Result<(), EngineError> {
        self.check_open()?;
        let ctx = &self.shared.ctx;
        let entry = ctx.snapshots.find(key)?;
        let access = stored::access(ctx, &entry, "export").await;
        // It may have been deleted meanwhile.
        let snapshot = self.get_snapshot(&entry.snapshot.id)?;
        let image = ctx.image_by_digest(&snapshot.spec.image_digest).await?;
        let dir = ctx.snapshot_dir(&snapshot.id);
        blocking("exporting a snapshot", move || {
            let _access = access;
            let (description, sleeping) = describe(&dir, &snapshot, image.rootfs_digest)?;
            let parts = open(&dir, &description, sleeping)?;
            write(&description, &parts, writer)
        })
        .await?
    }
}

/// Also the machine, which says where kernel and initramfs lie, and the memory.
fn describe(
    dir: &Path,
    snapshot: &Arc<Snapshot>,
    rootfs: String,
) -> Result<(Description, Option<Sleeping>), EngineError> {
    let (guest, sleeping) = match snapshot.kind {
        SnapshotKind::Stopped => (None, None),
        SnapshotKind::Standby => {
            // What is altered must not be spread.
            let mut manifest: Manifest<MachineDescription> =
                manifest::read(&dir.join(SNAPSHOT)).map_err(manifest_error)?;
            let memory = StoredMemory::open(dir, &manifest.memory)?;
            manifest.memory = memory::as_told(&manifest.memory);
            let machine = manifest.machine.clone();
            let guest = Guest {
                kernel: boot::digest(&machine.kernel).map_err(boot_error)?,
                initramfs: boot::digest(&machine.initramfs).map_err(boot_error)?,
                host: Host::here(machine.accel).map_err(io_error("asking the CPU"))?,
                manifest,
            };
            (Some(guest), Some(Sleeping { machine, memory }))
        }
    };
    let description = Description {
        version: VERSION,
        doze: env!("CARGO_PKG_VERSION").to_owned(),
        snapshot: Snapshot {
            // Memory travels raw.
            compression: None,
            ..(**snapshot).clone()
        },
        rootfs,
        guest,
    };
    Ok((description, sleeping))
}

/// What is not described, or not as it is stored.
struct Sleeping {
    machine: MachineDescription,
    memory: StoredMemory,
}

/// What a part of the stream is read from.
enum Opened {
    File { file: File, size: u64 },
    Memory { memory: StoredMemory, size: u64 },
}

/// Everything is open before the first byte is written: what is missing is told as an error, not as half a stream.
fn open(
    dir: &Path,
    description: &Description,
    sleeping: Option<Sleeping>,
) -> Result<Vec<(String, Opened)>, EngineError> {
    let (machine, mut memory) = match sleeping {
        Some(Sleeping { machine, memory }) => (Some(machine), Some(memory)),
        None => (None, None),
    };
    let mut parts = Vec::new();
    for part in description.parts() {
        let taken = match part.name.as_str() {
            MEMORY => memory.take().zip(part.size),
            _ => None,
        };
        let opened = match taken {
            Some((memory, size)) => Opened::Memory { memory, size },
            None => {
                let path = match (part.name.as_str(), &machine) {
                    (KERNEL, Some(machine)) => machine.kernel.clone(),
                    (INITRAMFS, Some(machine)) => machine.initramfs.clone(),
                    _ => dir.join(&part.path),
                };
                open_file(&path, part.size)?
            }
        };
        parts.push((part.name, opened));
    }
    Ok(parts)
}

fn open_file(path: &Path, expected: Option<u64>) -> Result<Opened, EngineError> {
    let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
    let (size, file) =
        opened.map_err(|e| disk_error(&format!("opening {}", path.display()), &e))?;
    if let Some(expected) = expected {
        same_size(path, size, expected)?;
    }
    Ok(Opened::File { file, size })
}

fn write(
    description: &Description,
    parts: &[(String, Opened)],
    writer: impl Write,
) -> Result<(), EngineError> {
    let text = serde_json::to_vec(description).map_err(|e| EngineError::Internal {
        context: "describing a snapshot".into(),
        reason: e.to_string(),
    })?;
    let tell = || {
        let mut stream = StreamWriter::new(writer)?;
        stream.bytes(DESCRIPTION, &text)?;
        for (name, part) in parts {
            match part {
                Opened::File { file, size } => stream.file(name, file, *size)?,
                Opened::Memory { memory, size } => memory.tell(&mut stream, *size)?,
            }
        }
        stream.finish().map(drop)
    };
    tell().map_err(stream_error)
}
