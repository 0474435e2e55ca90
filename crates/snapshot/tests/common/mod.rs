//! Files like a guest's memory, and the tools of Debian.
#![allow(dead_code, reason = "every test program uses a part of it")]
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use doze_snapshot::{
    Algorithm, Cancel, ChunkSize, Codec, CompressOptions, DecompressOptions, Error, Report,
    compress_file, decompress_file,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
pub use tempfile::TempDir;

pub const SMALL: u64 = 64 << 10;

/// Small chunks and two workers, so that small files have several of everything.
pub fn options(algorithm: Algorithm, level: i64) -> CompressOptions {
    CompressOptions {
        chunk_size: ChunkSize::new(SMALL).unwrap(),
        threads: std::num::NonZeroUsize::new(2),
        ..CompressOptions::new(Codec::new(algorithm, Some(level)).unwrap())
    }
}

pub fn compress(from: &Path, to: &Path, options: CompressOptions) -> Result<Report, Error> {
    compress_file(from, to, options, &Cancel::new(), &mut |_| {})
}

pub fn decompress(from: &Path, to: &Path) -> Result<Report, Error> {
    let options = DecompressOptions::default();
    decompress_file(from, to, options, &Cancel::new(), &mut |_| {})
}

/// `length` bytes that compress to about a half.
pub fn mixed(seed: u64, length: usize) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut bytes = Vec::with_capacity(length + 64);
    while bytes.len() < length {
        if random.random() {
            bytes.extend_from_slice(&random.random::<[u8; 32]>());
        } else {
            bytes.extend_from_slice(b"a line that comes again and again");
        }
    }
    bytes.truncate(length);
    bytes
}

/// 3 MiB and a bit: data, a hole, zeros that were written, pages of data between holes, random bytes.
pub fn memory(path: &Path) -> Vec<u8> {
    let mut content = vec![0; 3 * 1024 * 1024 + 777];
    let file = File::create_new(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    let mut put = |offset: usize, bytes: &[u8]| {
        content[offset..offset + bytes.len()].copy_from_slice(bytes);
        file.write_all_at(bytes, offset as u64).unwrap();
    };
    put(0, &mixed(1, 300_000));
    put(1 << 20, &vec![0; 256 << 10]);
    for page in 0..20 {
        put((3 << 19) + page * 12288, &mixed(page as u64, 4096));
    }
    let mut noise = vec![0; 200_000];
    StdRng::seed_from_u64(7).fill(&mut noise[..]);
    put(2 << 20, &noise);
    put(3 << 20, &mixed(3, 777));
    content
}

pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Names in a folder; a test that fails part way must leave none.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// What the algorithm's own tool makes of an artefact.
pub fn tool_decompress(algorithm: Algorithm, from: &Path, to: &Path) {
    let tool = algorithm.to_string();
    let status = Command::new(&tool)
        .args(["-d", "-f", "-q"])
        .arg(from)
        .args(if algorithm == Algorithm::Zstd {
            &["-o"][..]
        } else {
            &[]
        })
        .arg(to)
        .stdin(Stdio::null())
        .status()
        .unwrap_or_else(|error| {
            panic!("cannot run {tool}: {error}; install it with: apt-get install {tool}")
        });
    assert!(status.success(), "{tool} -d: {status}");
}

pub fn all_levels() -> impl Iterator<Item = (Algorithm, i64)> {
    let zstd = [1, 3, 6, 13, 19].map(|level| (Algorithm::Zstd, level));
    let lz4 = [0, 1, 2, 3, 9].map(|level| (Algorithm::Lz4, level));
    zstd.into_iter().chain(lz4)
}

pub struct Artefact {
    pub folder: TempDir,
    pub raw: PathBuf,
    pub packed: PathBuf,
    pub content: Vec<u8>,
}

pub fn artefact(algorithm: Algorithm) -> Artefact {
    let folder = TempDir::new().unwrap();
    let (raw, packed) = (folder.path().join("memory"), folder.path().join("packed"));
    let content = memory(&raw);
    let level = i64::from(algorithm.levels().2);
    compress(&raw, &packed, options(algorithm, level)).unwrap();
    Artefact {
        folder,
        raw,
        packed,
        content,
    }
}

/// All content of an artefact in memory.
pub fn read_all(bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let open = doze_snapshot::Artefact::new(bytes, Path::new("artefact"))?;
    let mut reader = open.reader()?;
    let mut content = Vec::new();
    for index in 0..open.table().entries.len() as u64 {
        match reader.read(index)? {
            Some(raw) => content.extend_from_slice(raw),
            None => content.resize(content.len() + open.table().chunk_length(index), 0),
        }
    }
    Ok(content)
}
