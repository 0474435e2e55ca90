//! Stored snapshots that move to another host, as one stream (`doze_snapshot::stream`).
//!
//! ```text
//!   snapshots/A/ ──export──> snapshot.json, state.*, overlay.raw, memory, kernel, initramfs
//!                                                      │ checked, believed in nothing
//!                            captures/X/ <──import─────┘
//!                                │ kernel, initramfs ──> boot/ (named after their content)
//!                                └─rename──> snapshots/B/ ──row in the store──> it exists
//! ```
//! The image does not travel, it is an import of its own; what does is which one it is, and which bytes its root file
//! system has, because the guest remembers some of them. `snapshot.json` comes first, so that what this
//! host cannot use is refused before its memory was sent.
use std::path::Path;

use doze_lifecycle::State;
use doze_snapshot::{
    manifest::Manifest,
    stream::{StreamError, StreamFault},
};
use doze_vmm::{Accel, MachineDescription};
use serde::{Deserialize, Serialize};

use super::Snapshot;
use crate::{
    EngineError,
    instance::{MEMORY, OVERLAY, chain},
    ops::standby::disk_error,
};

mod checks;
mod export;
mod import;
mod memory;

/// Version of the description this program writes, and the newest it reads.
const VERSION: u32 = 1;
/// The description's name in the stream.
const DESCRIPTION: &str = "snapshot.json";
/// Bytes of it that are read at most; those of a manifest, and more than a request for an instance can hold.
const MAX_DESCRIPTION: usize = 4 << 20;
const KERNEL: &str = "kernel";
const INITRAMFS: &str = "initramfs";
/// Before the names of device state.
const STATE: &str = "state.";
/// Bytes of a kernel or an initramfs at most.
const MAX_BOOT_FILE: u64 = 1 << 30;
/// Bytes of device state at most, all files together, and how many.
const MAX_STATE: u64 = 1 << 30;
const MAX_STATE_FILES: usize = 16;

/// What is told of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Description {
    version: u32,
    /// The doze that exported it.
    doze: String,
    snapshot: Snapshot,
    /// SHA-256 of the image's root file system, `sha256:<64 hex>`.
    rootfs: String,
    /// With memory.
    guest: Option<Guest>,
}

/// What memory needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Guest {
    manifest: Manifest<MachineDescription>,
    /// SHA-256, hexadecimal.
    kernel: String,
    initramfs: String,
    host: Host,
}

/// What a guest sees of its host's CPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Host {
    /// Kilohertz. Under TCG the guest reads the host's counter as it is, and was told this frequency.
    tsc_khz: u64,
    /// Under KVM the guest was given all of the host's CPU.
    cpu_flags: Option<std::collections::BTreeSet<String>>,
}

impl Host {
    /// Blocking: measures.
    fn here(accel: Accel) -> std::io::Result<Host> {
        Ok(Host {
            tsc_khz: doze_host::tsc::khz(),
            cpu_flags: match accel {
                Accel::Tcg => None,
                Accel::Kvm => Some(doze_host::virt::cpu_flags()?),
            },
        })
    }
}

/// A file of the stream besides the description: its name there, and what it must have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    name: String,
    /// Bytes, exactly; `None`: at most [`MAX_BOOT_FILE`].
    size: Option<u64>,
    /// Where it lies inside the snapshot's folder, or the copy's.
    path: String,
}

impl Description {
    /// Small files first.
    fn parts(&self) -> Vec<Part> {
        let part = |name: String, size, path: String| Part { name, size, path };
        let mut parts = Vec::new();
        if let Some(guest) = &self.guest {
            for file in &guest.manifest.files {
                let path = format!("{}/{}", crate::instance::SNAPSHOT, file.name);
                parts.push(part(format!("{STATE}{}", file.name), Some(file.size), path));
            }
            for name in [KERNEL, INITRAMFS] {
                parts.push(part(name.into(), None, name.into()));
            }
        }
        let overlay = self.snapshot.spec.overlay_bytes;
        parts.push(part(OVERLAY.into(), Some(overlay), OVERLAY.into()));
        if let Some(guest) = &self.guest {
            let size = guest.manifest.memory.size;
            parts.push(part(MEMORY.into(), Some(size), MEMORY.into()));
        }
        parts
    }
}

/// Whether memory was captured in this state.
fn has_memory(state: State) -> Option<bool> {
    match state {
        State::Running | State::Standby => Some(true),
        State::Stopped => Some(false),
        State::Created | State::Initializing | State::Paused | State::Shutdown => None,
    }
}

fn stream_error(error: StreamError) -> EngineError {
    match error {
        // Whoever brought or took it has gone, or is too slow.
        StreamError::Read { .. } => EngineError::BrokenStream {
            reason: chain(&error),
        },
        StreamError::Write { .. } => EngineError::Interrupted {
            by: "whoever read the stream",
        },
        StreamError::Broken {
            fault: StreamFault::Version { .. },
            ..
        } => EngineError::NotImportable {
            reason: error.to_string(),
        },
        StreamError::Broken { .. } => EngineError::BrokenStream {
            reason: error.to_string(),
        },
        StreamError::Source { name, source, .. } => {
            disk_error(&format!("reading a snapshot's {name}"), &source)
        }
        StreamError::Encoder { source } => EngineError::Internal {
            context: "a snapshot's stream".into(),
            reason: source.to_string(),
        },
    }
}

/// What a snapshot holds must be as large as it was.
fn same_size(path: &Path, found: u64, expected: u64) -> Result<(), EngineError> {
    match found == expected {
        true => Ok(()),
        false => Err(EngineError::Snapshot {
            reason: format!(
                "{} has {found} bytes, not the {expected} it should have",
                path.display()
            ),
        }),
    }
}

fn refuse(reason: impl Into<String>) -> EngineError {
    EngineError::NotImportable {
        reason: reason.into(),
    }
}
