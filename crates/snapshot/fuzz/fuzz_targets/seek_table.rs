//! Any bytes as an artefact's end, once as they are and once with the checksums made right, so that the
//! checks behind them are reached too. Then every chunk is asked for.
#![no_main]
mod budget;

use std::path::Path;

use doze_snapshot::{
    Artefact, ChunkSize,
    format::{FOOTER, Tail},
};
use libfuzzer_sys::fuzz_target;
use twox_hash::XxHash64;

/// Chunks asked for at most, of the many that a table may name.
const CHUNKS: u64 = 8;
// Places in the info frame, which the format's documentation draws.
const INFO_PAYLOAD: usize = 8;
const ENTRIES_HASH: usize = INFO_PAYLOAD + 28;
const INFO_HASH: usize = INFO_PAYLOAD + 36;
const TABLE_ENTRIES: usize = 52 + 8;

fn read(bytes: &[u8]) {
    let Ok(artefact) = Artefact::new(bytes, Path::new("fuzz")) else {
        return;
    };
    let table = artefact.table();
    let end = table
        .entries
        .iter()
        .map(|entry| u64::from(entry.compressed))
        .sum::<u64>();
    assert!(end <= bytes.len() as u64);
    let raw: u64 = (0..table.entries.len() as u64)
        .map(|index| table.chunk_length(index) as u64)
        .sum();
    assert_eq!(raw, table.raw_size);
    let mut reader = artefact.reader().expect("memory for a decoder");
    for index in 0..CHUNKS {
        let _damaged_or_not = reader.read(index);
    }
}

/// The same with both hashes of the info frame as they should be.
fn mended(bytes: &[u8]) -> Option<Vec<u8>> {
    let tail = Tail::parse(bytes.last_chunk::<FOOTER>()?, bytes.len() as u64).ok()?;
    let mut bytes = bytes.to_vec();
    let start = bytes.len() - tail.length;
    let end = &mut bytes[start..];
    let entries = end.get(TABLE_ENTRIES..end.len().checked_sub(FOOTER + 12)?)?;
    let hash = XxHash64::oneshot(0, entries).to_le_bytes();
    end[ENTRIES_HASH..ENTRIES_HASH + 8].copy_from_slice(&hash);
    let hash = XxHash64::oneshot(0, &end[INFO_PAYLOAD..INFO_HASH]).to_le_bytes();
    end[INFO_HASH..INFO_HASH + 8].copy_from_slice(&hash);
    Some(bytes)
}

fuzz_target!(|bytes: &[u8]| {
    let read = |bytes: &[u8]| budget::within(bytes.len(), ChunkSize::MAX.bytes(), || read(bytes));
    read(bytes);
    if let Some(bytes) = mended(bytes) {
        read(&bytes);
    }
});
