//! What comes out is what went in, by us and by the formats' own tools.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod common;

use std::{fs, fs::File, os::unix::fs::FileExt};

use common::*;
use doze_snapshot::{
    Algorithm, Artefact as Open, Cancel, ChunkSize, Codec, CompressOptions, DecompressOptions,
    Error, Phase, compress_file, inspect_file, verify_file,
};
use proptest::prelude::*;

#[test]
fn every_level_gives_the_file_back_to_us_and_to_the_tools() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let content = memory(&path("memory"));
    for (algorithm, level) in all_levels() {
        let (packed, back, tool) = (path("packed"), path("back"), path("tool"));
        let report = compress(&path("memory"), &packed, options(algorithm, level)).unwrap();
        let found = &report.artefact;
        assert_eq!(
            (found.algorithm, i64::from(found.level)),
            (algorithm, level)
        );
        assert_eq!(
            (found.raw_size, found.chunk_size),
            (content.len() as u64, SMALL)
        );
        assert_eq!(found.compressed_size, fs::metadata(&packed).unwrap().len());
        let zeros = content
            .chunks(SMALL as usize)
            .filter(|chunk| chunk.iter().all(|byte| *byte == 0))
            .count();
        assert_eq!(
            (found.frames, u64::from(found.zero_chunks)),
            (49, zeros as u64)
        );
        assert_eq!(&inspect_file(&packed).unwrap(), found);

        assert_eq!(decompress(&packed, &back).unwrap().artefact, *found);
        assert!(
            fs::read(&back).unwrap() == content,
            "{algorithm} {level}: ours differs"
        );
        tool_decompress(algorithm, &packed, &tool);
        assert!(
            fs::read(&tool).unwrap() == content,
            "{algorithm} {level}: the tool's differs"
        );
        for path in [packed, back, tool] {
            fs::remove_file(path).unwrap();
        }
        assert_eq!(names(folder.path()), ["memory"]);
    }
}

#[test]
fn sizes_at_the_edges_of_a_chunk() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        for size in [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL] {
            for zeros in [false, true] {
                let content = if zeros {
                    vec![0; size as usize]
                } else {
                    mixed(size, size as usize)
                };
                fs::write(path("raw"), &content).unwrap();
                compress(&path("raw"), &path("packed"), options(algorithm, 1)).unwrap();
                decompress(&path("packed"), &path("back")).unwrap();
                tool_decompress(algorithm, &path("packed"), &path("tool"));
                for name in ["back", "tool"] {
                    assert!(
                        fs::read(path(name)).unwrap() == content,
                        "{algorithm} {size} {name}"
                    );
                }
                for name in ["raw", "packed", "back", "tool"] {
                    fs::remove_file(path(name)).unwrap();
                }
            }
        }
    }
}

#[test]
fn every_chunk_size_and_the_real_tools_streams() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let content = memory(&path("memory"));
    for log2 in [16, 18, 20, 22] {
        for (algorithm, level) in [
            (Algorithm::Zstd, 1),
            (Algorithm::Lz4, 0),
            (Algorithm::Lz4, 9),
        ] {
            let options = CompressOptions {
                chunk_size: ChunkSize::new(1 << log2).unwrap(),
                ..CompressOptions::new(Codec::new(algorithm, Some(level)).unwrap())
            };
            compress(&path("memory"), &path("packed"), options).unwrap();
            tool_decompress(algorithm, &path("packed"), &path("tool"));
            assert!(fs::read(path("tool")).unwrap() == content);
            fs::remove_file(path("packed")).unwrap();
        }
    }
}

#[test]
fn holes_stay_holes() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let file = File::create_new(path("memory")).unwrap();
    file.set_len(1 << 30).unwrap();
    for at in [0, 100 << 20, (1 << 30) - 4096] {
        file.write_all_at(&mixed(at, 4096), at).unwrap();
    }
    // Written, and nothing but zeros: a hole afterwards.
    file.write_all_at(&vec![0; 2 << 20], 200 << 20).unwrap();
    file.sync_all().unwrap();
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let options = CompressOptions::new(Codec::new(algorithm, None).unwrap());
        let found = compress(&path("memory"), &path("packed"), options)
            .unwrap()
            .artefact;
        assert_eq!((found.frames, found.zero_chunks), (1024, 1021));
        decompress(&path("packed"), &path("back")).unwrap();
        assert_eq!(fs::metadata(path("back")).unwrap().len(), 1 << 30);
        // Three pages, and what the file system needs to find them.
        assert!(
            allocated(&path("back")) <= 64 << 10,
            "{}",
            allocated(&path("back"))
        );
        assert!(allocated(&path("back")) < allocated(&path("memory")) - (2 << 20) + (64 << 10));
        fs::remove_file(path("packed")).unwrap();
        fs::remove_file(path("back")).unwrap();
    }
}

#[test]
fn chunks_are_read_in_any_order() {
    for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
        let made = artefact(algorithm);
        let open = Open::open(&made.packed).unwrap();
        let mut reader = open.reader().unwrap();
        let chunks: Vec<_> = made.content.chunks(SMALL as usize).collect();
        for index in (0..chunks.len()).rev().chain([3, 3, 0]) {
            let got = reader.read(index as u64).unwrap();
            match got {
                Some(raw) => assert!(raw == chunks[index]),
                None => assert!(chunks[index].iter().all(|byte| *byte == 0)),
            }
        }
        let beyond = reader.read(chunks.len() as u64).unwrap_err();
        assert!(matches!(beyond, Error::Chunk { chunk: 49, .. }), "{beyond}");
    }
}

#[test]
fn progress_ends_at_the_end_and_background_work_is_the_same_work() {
    let made = artefact(Algorithm::Zstd);
    let again = made.folder.path().join("again");
    let options = CompressOptions {
        background: true,
        ..options(Algorithm::Zstd, 1)
    };
    let mut seen = Vec::new();
    compress_file(
        &made.raw,
        &again,
        options,
        &Cancel::new(),
        &mut |progress| {
            seen.push((progress.phase, progress.done, progress.total));
        },
    )
    .unwrap();
    assert!(fs::read(&again).unwrap() == fs::read(&made.packed).unwrap());
    let size = made.content.len() as u64;
    let packed = fs::metadata(&again).unwrap().len();
    for end in [
        (Phase::Convert, size, size),
        (Phase::Sync, packed, packed),
        (Phase::Verify, size, size),
    ] {
        assert!(seen.contains(&end), "{end:?}");
    }
    let options = DecompressOptions {
        background: true,
        ..DecompressOptions::default()
    };
    verify_file(&again, options, &Cancel::new(), &mut |_| {}).unwrap();
}

#[derive(Debug, Clone)]
enum Piece {
    Hole(usize),
    Zeros(usize),
    Data(u64, usize),
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let length = prop_oneof![1_usize..300, Just(4096), 1_usize..200_000];
    let piece = prop_oneof![
        length.clone().prop_map(Piece::Hole),
        length.clone().prop_map(Piece::Zeros),
        (any::<u64>(), length).prop_map(|(seed, length)| Piece::Data(seed, length)),
    ];
    prop::collection::vec(piece, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sparse_file_comes_back(pieces in pieces(), zstd in any::<bool>()) {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name);
        let file = File::create_new(path("raw")).unwrap();
        let mut content = Vec::new();
        for piece in &pieces {
            let bytes = match piece {
                Piece::Hole(length) | Piece::Zeros(length) => vec![0; *length],
                Piece::Data(seed, length) => mixed(*seed, *length),
            };
            if !matches!(piece, Piece::Hole(_)) {
                file.write_all_at(&bytes, content.len() as u64).unwrap();
            }
            content.extend_from_slice(&bytes);
        }
        file.set_len(content.len() as u64).unwrap();
        file.sync_all().unwrap();
        let algorithm = if zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
        compress(&path("raw"), &path("packed"), options(algorithm, 1)).unwrap();
        decompress(&path("packed"), &path("back")).unwrap();
        tool_decompress(algorithm, &path("packed"), &path("tool"));
        prop_assert!(fs::read(path("back")).unwrap() == content);
        prop_assert!(fs::read(path("tool")).unwrap() == content);
        prop_assert!(allocated(&path("back")) <= allocated(&path("raw")) + 8192);
    }
}
