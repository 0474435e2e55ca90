//! Any bytes as a frame behind a table that is right: 1 byte that chooses algorithm and raw size, then the
//! frame. What is accepted must be what the frame's checksum says.
#![no_main]
mod budget;

use std::path::Path;

use doze_snapshot::{
    Algorithm, Artefact, ChunkSize, Codec,
    format::{TableWriter, checksum},
};
use libfuzzer_sys::fuzz_target;

const CHUNK: u64 = 64 << 10;
static ZEROS: [u8; CHUNK as usize] = [0; CHUNK as usize];

fuzz_target!(|bytes: &[u8]| {
    let Some((&choice, frame)) = bytes.split_first() else {
        return;
    };
    let Some(end) = frame.last_chunk().map(|end| u32::from_le_bytes(*end)) else {
        return;
    };
    let algorithm = if choice & 1 == 0 {
        Algorithm::Zstd
    } else {
        Algorithm::Lz4
    };
    let raw_size = match choice >> 1 & 3 {
        0 => CHUNK,
        1 => 1000,
        2 => 1,
        _ => 0,
    };
    let codec = Codec::new(algorithm, None).expect("the default exists");
    let chunk_size = ChunkSize::new(CHUNK).expect("64 KiB is a chunk size");
    let mut table = TableWriter::new(codec, chunk_size, raw_size);
    table.push(frame.len() as u32, end, false);
    let file = [frame, &table.finish()].concat();
    budget::within(file.len(), CHUNK, || {
        let Ok(artefact) = Artefact::new(&file[..], Path::new("fuzz")) else {
            return;
        };
        let mut reader = artefact.reader().expect("memory for a decoder");
        match reader.read(0) {
            Ok(Some(raw)) => assert_eq!(checksum(algorithm, raw), end),
            Ok(None) => assert_eq!(checksum(algorithm, &ZEROS[..raw_size as usize]), end),
            Err(_) => {}
        }
    });
});
