//! Forged sizes are refused without memory for what they claim. A program of its own, whose tests take
//! turns, because the allocator counts everybody's.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod common;

use std::{fs, sync::Mutex};

use common::*;
use doze_snapshot::{
    Algorithm, Artefact as Open, Cancel, DecompressOptions, Error, Fault, decompress_file,
    format::{FOOTER, MAX_FRAMES, SeekTable, TableWriter, Tail},
};
use peak_alloc::PeakAlloc;
use rand::{Rng, SeedableRng, rngs::StdRng};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

static TURN: Mutex<()> = Mutex::new(());

/// Allocator's peak while `f` runs, above what there was before.
fn peak(f: impl FnOnce()) -> usize {
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    f();
    MEMORY.peak_usage().saturating_sub(before)
}

#[test]
fn forged_sizes_get_no_memory() {
    let _turn = TURN.lock();
    let footer = |frames: u32, magic: u32| {
        let mut footer = [0; FOOTER];
        footer[..4].copy_from_slice(&frames.to_le_bytes());
        footer[4] = 0x80;
        footer[5..].copy_from_slice(&magic.to_le_bytes());
        footer
    };
    for magic in [0x8F92_EAB1, u32::from_le_bytes(*b"DLZ4")] {
        // Beyond the cap whatever the file's size; within it, but beyond the file.
        let over = Tail::parse(&footer(MAX_FRAMES as u32 + 2, magic), u64::MAX).unwrap_err();
        assert!(matches!(over, Fault::Cap { what: "chunks", .. }), "{over}");
        assert!(Tail::parse(&footer(MAX_FRAMES as u32 + 1, magic), u64::MAX).is_ok());
        for frames in [0, 1, 1000, MAX_FRAMES as u32, u32::MAX] {
            let mut bytes = vec![0; 4096];
            bytes.extend_from_slice(&footer(frames, magic));
            let used = peak(|| assert!(read_all(&bytes).is_err()));
            assert!(used < 64 << 10, "{frames} frames: {used} bytes");
        }
    }
    // The largest table there may be stays within what is declared.
    let (codec, chunk_size) = {
        let made = artefact(Algorithm::Zstd);
        let open = Open::open(&made.packed).unwrap();
        (open.table().codec, open.table().chunk_size)
    };
    let mut writer = TableWriter::new(codec, chunk_size, MAX_FRAMES * chunk_size.bytes());
    for _ in 0..MAX_FRAMES {
        writer.push(1, 0, true);
    }
    let end = writer.finish();
    let size = MAX_FRAMES + end.len() as u64;
    let footer = end.last_chunk::<FOOTER>().unwrap();
    let used = peak(|| {
        let tail = Tail::parse(footer, size).unwrap();
        let bytes = end[end.len() - tail.length..].to_vec();
        let table = SeekTable::parse(tail, &bytes, size).unwrap();
        assert_eq!(table.entries.len() as u64, MAX_FRAMES);
    });
    assert!(
        used as u64 <= doze_snapshot::format::MAX_TABLE_MEMORY,
        "{used} bytes"
    );
}

#[test]
fn forged_frames_behind_a_valid_table_are_refused() {
    let _turn = TURN.lock();
    // A frame that claims 4 GiB of content, one for a dictionary, several in a row, an old format's.
    let huge_zstd = [
        &0xFD2F_B528_u32.to_le_bytes()[..],
        &[0xE4],
        &(4_u64 << 30).to_le_bytes(),
        &[1, 0, 0],
        &[0; 4],
    ]
    .concat();
    let huge_lz4 = [
        &0x184D_2204_u32.to_le_bytes()[..],
        &[0x6C, 0x70],
        &(4_u64 << 30).to_le_bytes(),
        &[0, 0xff, 0xff, 0xff, 0x7f],
        &[0; 8],
    ]
    .concat();
    let old = [&0xFD2F_B527_u32.to_le_bytes()[..], &[0; 20]].concat();
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let made = artefact(algorithm);
        let open = Open::open(&made.packed).unwrap();
        let good = fs::read(&made.packed).unwrap();
        let first = &good[..open.table().entries[0].compressed as usize];
        let twice = [first, first].concat();
        for frame in [
            &huge_zstd[..],
            &huge_lz4,
            &old,
            &twice,
            &first[..first.len() / 2],
            b"x",
        ] {
            let checksum = frame.last_chunk().map_or(0, |end| u32::from_le_bytes(*end));
            let table = open.table();
            let mut writer = TableWriter::new(table.codec, table.chunk_size, SMALL);
            writer.push(frame.len() as u32, checksum, false);
            let bytes = [frame, &writer.finish()].concat();
            let mut outcome = None;
            let used = peak(|| outcome = Some(read_all(&bytes)));
            let error = outcome.unwrap().unwrap_err();
            let is_frame = matches!(
                error,
                Error::Chunk {
                    chunk: 0,
                    offset: 0,
                    fault: Fault::Frame(_) | Fault::Checksum { .. },
                    ..
                }
            ) || matches!(
                error,
                Error::Format {
                    fault: Fault::Cap { .. },
                    ..
                }
            );
            assert!(is_frame, "{error}");
            assert!(used < 512 << 10, "{used} bytes");
        }
    }
}

#[test]
fn work_takes_some_chunks_per_worker_however_large_the_file() {
    let _turn = TURN.lock();
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let mut noise = vec![0; 24 << 20];
    StdRng::seed_from_u64(11).fill(&mut noise[..]);
    fs::write(path("memory"), &noise).unwrap();
    drop(noise);
    // Two workers with a chunk and a frame each, four finished frames waiting for each, and the writer's own;
    // what the C libraries hold is theirs to bound, by level.
    let cap = (2 * (2 + 4) + 4) * (SMALL as usize + SMALL as usize / 16);
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let packing = peak(|| {
            compress(&path("memory"), &path("packed"), options(algorithm, 1)).unwrap();
        });
        let two = DecompressOptions {
            threads: std::num::NonZeroUsize::new(2),
            background: false,
        };
        let unpacking = peak(|| {
            let quiet = &mut |_| {};
            decompress_file(&path("packed"), &path("back"), two, &Cancel::new(), quiet).unwrap();
        });
        assert!(
            packing <= cap && unpacking <= cap,
            "{algorithm}: {packing} and {unpacking} of {cap}"
        );
        fs::remove_file(path("packed")).unwrap();
        fs::remove_file(path("back")).unwrap();
    }
}
