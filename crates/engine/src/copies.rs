//! Copies of what an instance consists of while it rests: its overlay disk and, with memory, the memory file
//! and the folder with device state and manifest.
//!
//! ```text
//!   instances/A/ ──clone──> captures/X/ ──rename──> instances/B/        (fork)
//!                                       └─rename──> snapshots/S/        (stored)
//!   snapshots/S/ ──clone──> captures/X/, instances/A/incoming.stage/
//! ```
//! A copy is made in a folder that nobody else knows and gets its place in one rename. What is left in
//! `captures/` is nobody's and goes at start-up. The config disk is not copied: it says who the instance is. All
//! blocking.
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use doze_host::{clone, files};
use doze_snapshot::manifest::{self, Manifest, ManifestError};
use doze_vmm::{MachineDescription, Nic};

use crate::{
    NetworkClaim,
    compression::files as memory_files,
    instance::{APP_LOG, CONFIG, MEMORY, OVERLAY, RUN_DIR, SNAPSHOT, VMM_LOG},
};

/// Asked between steps and every few MiB.
pub type Cancelled<'a> = &'a dyn Fn() -> bool;

/// Clones what rests in `from` into the new folder `to`. Not synced, see [`sync`].
pub fn clone_rest(
    from: &Path,
    to: &Path,
    memory: bool,
    cancelled: Cancelled<'_>,
) -> io::Result<()> {
    files::create_private_dir(to)?;
    clone_file(from, to, OVERLAY, cancelled)?;
    if memory {
        // The form that counts, and only that.
        clone_file(from, to, memory_files::held(from)?, cancelled)?;
        let (from, to) = (from.join(SNAPSHOT), to.join(SNAPSHOT));
        files::create_private_dir(&to)?;
        for entry in fs::read_dir(&from)? {
            let name = entry?.file_name();
            clone::clone_file(&from.join(&name), &to.join(&name), cancelled)?;
        }
    }
    Ok(())
}

/// Clones one file of a folder into another one.
pub fn clone_file(from: &Path, to: &Path, name: &str, cancelled: Cancelled<'_>) -> io::Result<()> {
    clone::clone_file(&from.join(name), &to.join(name), cancelled).map(drop)
}

/// Bytes that copying costs where blocks cannot be shared.
pub fn bytes_to_copy(dir: &Path, memory: bool) -> io::Result<u64> {
    let overlay = clone::bytes_to_copy(&dir.join(OVERLAY))?;
    let memory = match memory {
        true => clone::bytes_to_copy(&dir.join(memory_files::held(dir)?))?,
        false => 0,
    };
    Ok(overlay + memory)
}

/// What has to be on the disk before a copy counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    All,
    /// The memory is about to be a running guest's and worth nothing after a crash.
    Disk,
}

/// Makes the files and names of a copy durable, its own name excepted.
pub fn sync(dir: &Path, what: Durable) -> io::Result<()> {
    let place = dir.join(SNAPSHOT);
    if what == Durable::All && place.try_exists()? {
        for entry in fs::read_dir(&place)? {
            fs::File::open(entry?.path())?.sync_all()?;
        }
        files::fsync_dir(&place)?;
        fs::File::open(dir.join(memory_files::held(dir)?))?.sync_all()?;
    }
    fs::File::open(dir.join(OVERLAY))?.sync_all()?;
    files::fsync_dir(dir)
}

/// Gives a copy its place, durably.
pub fn place(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    for parent in [from.parent(), to.parent()].into_iter().flatten() {
        files::fsync_dir(parent)?;
    }
    Ok(())
}

/// Bytes of all files of a copy, holes included.
pub fn size(dir: &Path) -> io::Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let meta = entry.metadata()?;
        total += match meta.is_dir() {
            true => size(&entry.path())?,
            false => meta.len(),
        };
    }
    Ok(total)
}

/// Where a copied machine is to live.
pub struct Home<'a> {
    pub id: &'a str,
    /// The instance's folder, although the copy may still lie elsewhere.
    pub dir: &'a Path,
    pub claim: Option<&'a NetworkClaim>,
}

/// Rewrites the manifest of the copy in `copy`, so that its machine is the one of `home`, which it returns.
pub fn rehome(copy: &Path, home: &Home<'_>) -> Result<MachineDescription, ManifestError> {
    let place = copy.join(SNAPSHOT);
    let mut manifest: Manifest<MachineDescription> = manifest::read(&place)?;
    manifest.id = crate::engine::new_id();
    move_in(&mut manifest.machine, home);
    manifest::rewrite(&place, &manifest)?;
    Ok(manifest.machine)
}

/// Makes the machine the one of `home`: its id, its files, its addresses.
pub fn move_in(machine: &mut MachineDescription, home: &Home<'_>) {
    let at = |name: &str| -> PathBuf { home.dir.join(name) };
    machine.id = home.id.to_owned();
    machine.memory.path = at(MEMORY);
    machine.run_dir = at(RUN_DIR);
    machine.vmm_log = at(VMM_LOG);
    machine.app_log = at(APP_LOG);
    machine.nic = home.claim.map(|claim| Nic {
        tap: claim.tap.clone(),
        mac: claim.mac.clone(),
    });
    for disk in &mut machine.disks {
        match disk.serial.as_str() {
            doze_agent::config::OVERLAY_SERIAL => disk.path = at(OVERLAY),
            doze_agent::config::CONFIG_SERIAL => disk.path = at(CONFIG),
            // Shared by all instances of the image.
            _ => {}
        }
    }
}
