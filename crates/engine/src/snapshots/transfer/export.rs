//! Out: a stored snapshot is read as it lies; it cannot be deleted meanwhile.
use std::{fs::File, io::Write, path::Path, sync::Arc};

use doze_snapshot::{
    manifest::{self, Manifest},
    stream::StreamWriter,
};
use doze_vmm::{MachineDescription, boot};

use super::{DESCRIPTION, Description, Guest, Host, INITRAMFS, KERNEL, VERSION, stream_error};
use crate::{
    Engine, EngineError, Snapshot, SnapshotKind,
    context::{blocking, boot_error, io_error},
    instance::SNAPSHOT,
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
        let gate = entry.gate.clone().read_owned().await;
        // It may have been deleted meanwhile.
        let snapshot = self.get_snapshot(&entry.snapshot.id)?;
        let image = ctx.image_by_digest(&snapshot.spec.image_digest).await?;
        let dir = ctx.snapshot_dir(&snapshot.id);
        blocking("exporting a snapshot", move || {
            let _gate = gate;
            let (description, boot) = describe(&dir, &snapshot, image.rootfs_digest)?;
            write(&dir, &description, &boot, writer)
        })
        .await?
    }
}

/// Also the machine, which says where kernel and initramfs lie.
fn describe(
    dir: &Path,
    snapshot: &Arc<Snapshot>,
    rootfs: String,
) -> Result<(Description, Option<MachineDescription>), EngineError> {
    let mut machine = None;
    let guest = match snapshot.kind {
        SnapshotKind::Stopped => None,
        SnapshotKind::Standby => {
            // What is altered must not be spread.
            let manifest: Manifest<MachineDescription> =
                manifest::read(&dir.join(SNAPSHOT)).map_err(manifest_error)?;
            let described = machine.insert(manifest.machine.clone());
            Some(Guest {
                kernel: boot::digest(&described.kernel).map_err(boot_error)?,
                initramfs: boot::digest(&described.initramfs).map_err(boot_error)?,
                host: Host::here(described.accel).map_err(io_error("asking the CPU"))?,
                manifest,
            })
        }
    };
    let description = Description {
        version: VERSION,
        doze: env!("CARGO_PKG_VERSION").to_owned(),
        snapshot: (**snapshot).clone(),
        rootfs,
        guest,
    };
    Ok((description, machine))
}

fn write(
    dir: &Path,
    description: &Description,
    machine: &Option<MachineDescription>,
    writer: impl Write,
) -> Result<(), EngineError> {
    let mut files = Vec::new();
    for part in description.parts() {
        let path = match (part.name.as_str(), machine) {
            (KERNEL, Some(machine)) => machine.kernel.clone(),
            (INITRAMFS, Some(machine)) => machine.initramfs.clone(),
            _ => dir.join(&part.path),
        };
        let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (size, file) =
            opened.map_err(|e| disk_error(&format!("opening {}", path.display()), &e))?;
        if part.size.is_some_and(|expected| expected != size) {
            return Err(EngineError::Snapshot {
                reason: format!(
                    "{} has {size} bytes, not the {} it should have",
                    path.display(),
                    part.size.unwrap_or_default()
                ),
            });
        }
        files.push((part.name, file, size));
    }
    let text = serde_json::to_vec_pretty(description).map_err(|e| EngineError::Internal {
        context: "describing a snapshot".into(),
        reason: e.to_string(),
    })?;
    let tell = || {
        let mut stream = StreamWriter::new(writer)?;
        stream.bytes(DESCRIPTION, &text)?;
        for (name, file, size) in &files {
            stream.file(name, file, *size)?;
        }
        stream.finish().map(drop)
    };
    tell().map_err(stream_error)
}
