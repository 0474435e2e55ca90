//! Damaged artefacts are refused, with the place.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod common;

use std::{fs, os::unix::fs::FileExt, path::Path};

use common::*;
use doze_snapshot::{
    Algorithm, Artefact as Open, Cancel, DecompressOptions, Error, Fault, verify_file,
};
fn verify(path: &Path) -> Result<(), Error> {
    let options = DecompressOptions {
        threads: std::num::NonZeroUsize::new(1),
        background: false,
    };
    verify_file(path, options, &Cancel::new(), &mut |_| {}).map(drop)
}

#[test]
fn a_flipped_bit_is_found_and_its_chunk_named() {
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let made = artefact(algorithm);
        let good = fs::read(&made.packed).unwrap();
        let open = Open::open(&made.packed).unwrap();
        let entries = open.table().entries.clone();
        let data_end = entries
            .last()
            .map(|e| e.offset + u64::from(e.compressed))
            .unwrap() as usize;
        let flip = |at: usize, bit: u8| {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            read_all(&bad)
        };
        // All of the end, whose every byte counts, and a sample of the frames.
        for at in data_end..good.len() {
            let error = flip(at, (at % 8) as u8).expect_err("a flipped end");
            assert!(matches!(error, Error::Format { .. }), "{at}: {error}");
        }
        for (chunk, entry) in entries.iter().enumerate().step_by(5) {
            for place in [0, 4, entry.compressed / 2, entry.compressed - 1] {
                let at = entry.offset as usize + place as usize;
                // A bit of a zstd literal may only ever be found by the checksum.
                match flip(at, 3).expect_err("a flipped frame") {
                    Error::Chunk {
                        chunk: named,
                        offset,
                        ..
                    } => {
                        assert_eq!((named, offset), (chunk as u64, entry.offset));
                    }
                    other => panic!("{other}"),
                }
            }
        }
        // The same on disk, through the parallel paths, and nothing is left behind.
        let entry = entries[30];
        let file = fs::OpenOptions::new()
            .write(true)
            .open(&made.packed)
            .unwrap();
        let at = entry.offset + u64::from(entry.compressed / 2);
        file.write_all_at(&[good[at as usize] ^ 1], at).unwrap();
        let back = made.folder.path().join("back");
        for error in [
            verify(&made.packed).unwrap_err(),
            decompress(&made.packed, &back).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("chunk 30"), "{text}");
            assert!(
                text.contains(&format!("at byte {}", entry.offset)),
                "{text}"
            );
        }
        assert_eq!(names(made.folder.path()), ["memory", "packed"]);
    }
}

#[test]
fn a_cut_off_file_is_refused_at_every_length() {
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let made = artefact(algorithm);
        let good = fs::read(&made.packed).unwrap();
        for length in (0..good.len())
            .step_by(997)
            .chain(good.len() - 200..good.len())
        {
            let error = read_all(&good[..length]).unwrap_err();
            assert!(matches!(error, Error::Format { .. }), "{length}: {error}");
        }
        // A piece cut out of the middle, the end intact: the sizes no longer add up.
        let mut bad = good.clone();
        bad.drain(1000..2000);
        assert!(matches!(read_all(&bad), Err(Error::Format { .. })));
        assert!(read_all(&good).unwrap() == made.content);
    }
}

#[test]
fn foreign_files_are_not_ours() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("file");
    for content in [&b""[..], b"short", &[0; 4096], &[0xff; 4096]] {
        fs::write(&path, content).unwrap();
        let error = verify(&path).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Format {
                    fault: Fault::NoSeekTable,
                    ..
                }
            ),
            "{error}"
        );
    }
    assert!(matches!(verify(folder.path()), Err(Error::NotAFile { .. })));
    assert!(matches!(
        verify(&folder.path().join("none")),
        Err(Error::Io { .. })
    ));
}
