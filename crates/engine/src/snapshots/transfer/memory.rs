//! The memory of a stored snapshot, however it is stored there. In a stream it is always the raw image: what another
//! host makes of it is that host's business.
use std::{fs::File, io::Write, path::Path};

use doze_snapshot::{
    manifest::{Memory, MemoryCodec},
    stream::{StreamError, StreamWriter},
};

use crate::{EngineError, instance::MEMORY, ops::standby::disk_error};

/// An open memory image. Every codec has its variant here, and nothing else of an export depends on it.
pub(super) enum StoredMemory {
    Raw(File),
}

impl StoredMemory {
    /// Opens the memory of the snapshot in `dir`.
    ///
    /// # Errors
    /// [`EngineError::Snapshot`] when it is not what the manifest says.
    pub(super) fn open(dir: &Path, told: &Memory) -> Result<StoredMemory, EngineError> {
        match told.codec {
            MemoryCodec::Raw => {
                let path = dir.join(MEMORY);
                let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
                let (size, file) =
                    opened.map_err(|e| disk_error(&format!("opening {}", path.display()), &e))?;
                super::same_size(&path, size, told.size)?;
                Ok(StoredMemory::Raw(file))
            }
        }
    }

    /// Tells `size` raw bytes of it.
    pub(super) fn tell<W: Write>(
        &self,
        stream: &mut StreamWriter<W>,
        size: u64,
    ) -> Result<(), StreamError> {
        match self {
            StoredMemory::Raw(file) => stream.file(MEMORY, file, size),
        }
    }
}

/// How a stream describes memory that is stored like this.
pub(super) fn as_told(stored: &Memory) -> Memory {
    Memory {
        size: stored.size,
        codec: MemoryCodec::Raw,
    }
}
