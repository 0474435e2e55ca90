//! The memory of a stored snapshot, however it is stored there. In a stream it is always the raw image: what another
//! host makes of it is that host's business.
use std::{fs::File, io, io::Write, path::Path};

use doze_snapshot::{
    Artefact,
    manifest::{Memory, MemoryCodec},
    stream::{BLOCK, Source, StreamError, StreamWriter},
};

use crate::{
    EngineError,
    compression::{codec_error, files as memory_files},
    instance::MEMORY,
    ops::standby::disk_error,
};

/// An open memory image. Every form has its variant here, and nothing else of an export depends on it.
pub(super) enum StoredMemory {
    Raw(File),
    Compressed(Artefact<File>),
}

impl StoredMemory {
    /// Opens the memory of the snapshot in `dir`.
    ///
    /// # Errors
    /// [`EngineError::Snapshot`] when it is not what the manifest says.
    pub(super) fn open(dir: &Path, told: &Memory) -> Result<StoredMemory, EngineError> {
        let opening = |path: &Path| format!("opening {}", path.display());
        let packed = memory_files::packed(dir).map_err(|e| disk_error(&opening(dir), &e))?;
        match packed {
            Some(path) => {
                let artefact = Artefact::open(&path).map_err(codec_error)?;
                super::same_size(&path, artefact.table().raw_size, told.size)?;
                Ok(StoredMemory::Compressed(artefact))
            }
            None => {
                let path = dir.join(MEMORY);
                let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
                let (size, file) = opened.map_err(|e| disk_error(&opening(&path), &e))?;
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
            StoredMemory::Compressed(artefact) => {
                let chunk = artefact.table().chunk_size.bytes();
                let reader = artefact.reader().map_err(|error| StreamError::Source {
                    name: MEMORY.into(),
                    offset: 0,
                    source: io::Error::other(error),
                })?;
                stream.source(MEMORY, size, &mut Chunks { reader, chunk })
            }
        }
    }
}

/// An artefact, read in the blocks of a stream.
struct Chunks<'a> {
    reader: doze_snapshot::ChunkReader<'a, File>,
    /// Raw bytes of a chunk; need not be a block.
    chunk: u64,
}

impl Source for Chunks<'_> {
    fn read(&mut self, offset: u64, block: &mut [u8]) -> io::Result<bool> {
        let mut data = false;
        let mut filled = 0;
        while filled < block.len() {
            let at = offset + filled as u64;
            // Chunks are 4 MiB at most.
            let skip = (at % self.chunk) as usize;
            let part = (self.chunk as usize - skip).min(block.len() - filled);
            let target = &mut block[filled..filled + part];
            match self
                .reader
                .read(at / self.chunk)
                .map_err(io::Error::other)?
            {
                None => target.fill(0),
                Some(raw) => {
                    let source = raw.get(skip..skip + part);
                    target.copy_from_slice(source.ok_or(io::ErrorKind::UnexpectedEof)?);
                    data = true;
                }
            }
            filled += part;
        }
        Ok(data)
    }

    /// A chunk of zeros costs almost nothing.
    fn next_data(&mut self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset + BLOCK as u64))
    }
}

/// How a stream describes memory that is stored like this.
pub(super) fn as_told(stored: &Memory) -> Memory {
    Memory {
        size: stored.size,
        codec: MemoryCodec::Raw,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use doze_snapshot::{
        Algorithm, ChunkSize, Codec, CompressOptions, compress_file, stream::StreamReader,
    };

    use super::*;

    const MIB: usize = 1 << 20;

    /// Data, zeros, and an end that fills neither chunk nor block.
    fn memory() -> Vec<u8> {
        let mut raw = vec![0; 5 * MIB + 12288];
        for (at, byte) in raw.iter_mut().enumerate() {
            let hole = MIB + 4096..4 * MIB;
            if !hole.contains(&at) {
                *byte = (at % 251) as u8;
            }
        }
        raw
    }

    #[test]
    fn compressed_memory_is_told_as_it_was() {
        let raw = memory();
        let told = Memory {
            size: raw.len() as u64,
            codec: MemoryCodec::Raw,
        };
        for chunk in [1 << 16, 1 << 20, 1 << 22] {
            let dir = tempfile::tempdir().unwrap();
            let source = dir.path().join("source");
            std::fs::write(&source, &raw).unwrap();
            let options = CompressOptions {
                chunk_size: ChunkSize::new(chunk).unwrap(),
                ..CompressOptions::new(Codec::new(Algorithm::Zstd, None).unwrap())
            };
            let target = dir.path().join("memory.zst");
            let cancel = doze_snapshot::Cancel::new();
            compress_file(&source, &target, options, &cancel, &mut |_| {}).unwrap();
            let memory = StoredMemory::open(dir.path(), &told).unwrap();
            let mut stream = StreamWriter::new(Vec::new()).unwrap();
            memory.tell(&mut stream, told.size).unwrap();
            let bytes = stream.finish().unwrap();
            let mut stream = StreamReader::new(bytes.as_slice()).unwrap();
            let header = stream.next_file().unwrap().unwrap();
            assert_eq!((header.name.as_str(), header.size), (MEMORY, told.size));
            let mut back = vec![0; raw.len()];
            while let Some(block) = stream.next_block().unwrap() {
                let at = usize::try_from(block.offset).unwrap();
                back[at..at + block.bytes.len()].copy_from_slice(block.bytes);
            }
            assert!(back == raw, "chunks of {chunk}");
            let other = Memory {
                size: told.size + 1,
                codec: MemoryCodec::Raw,
            };
            assert!(StoredMemory::open(dir.path(), &other).is_err());
        }
    }
}
