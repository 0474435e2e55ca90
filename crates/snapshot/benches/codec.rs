//! The codec beside the tools, in one run: `cargo bench -p doze-snapshot`.
//!
//! Two inputs, made from files of this machine: a sparse one like a guest's memory (2 GiB, 256 MiB of it
//! data, in pieces between holes) and a dense one (1 GiB). `DOZE_BENCH_DIR` says where (default: the
//! system's folder for temporary files), `DOZE_BENCH_SCALE` divides the sizes. Page cache warm: every
//! input is read once before. The tools write with their defaults and do not sync; our conversion is
//! given alone, which is the same work, and with sync and read-back, which the tools do not do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench stops at the first surprise"
)]
use std::{
    collections::VecDeque,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{FileExt, MetadataExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use doze_snapshot::{
    Algorithm, Cancel, ChunkSize, Codec, CompressOptions, DecompressOptions, Error, Phase,
    compress_file, decompress_file,
};

const MIB: u64 = 1 << 20;

fn main() {
    let folder = tempfile::Builder::new()
        .prefix("doze-bench")
        .tempdir_in(
            std::env::var_os("DOZE_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from),
        )
        .unwrap();
    let scale = std::env::var("DOZE_BENCH_SCALE").map_or(1, |scale| scale.parse().unwrap());
    let mut food = Food::new();
    let sparse = folder.path().join("sparse");
    let dense = folder.path().join("dense");
    make_sparse(&sparse, 2048 * MIB / scale, 256 * MIB / scale, &mut food);
    make_dense(&dense, 1024 * MIB / scale, &mut food);
    println!(
        "| input | codec | who | compress s | with sync and check s | size MiB | decompress s | with sync and check s |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (name, input) in [("sparse", &sparse), ("dense", &dense)] {
        warm(input);
        for (algorithm, level) in [(Algorithm::Zstd, 1), (Algorithm::Lz4, 0)] {
            let codec = Codec::new(algorithm, Some(level)).unwrap();
            ours(name, input, CompressOptions::new(codec), "doze");
            let tool = algorithm.to_string();
            let flag = format!("-{}", level.max(1));
            tools(name, input, algorithm, &[&flag], &format!("{tool} {flag}"));
            if algorithm == Algorithm::Zstd {
                tools(
                    name,
                    input,
                    algorithm,
                    &[&flag, "-T2"],
                    &format!("{tool} {flag} -T2"),
                );
            }
        }
        for log2 in [16, 18, 22] {
            let chunk_size = ChunkSize::new(1 << log2).unwrap();
            let codec = Codec::new(Algorithm::Zstd, Some(1)).unwrap();
            let options = CompressOptions {
                chunk_size,
                ..CompressOptions::new(codec)
            };
            ours(
                name,
                input,
                options,
                &format!("doze, chunks of {} KiB", chunk_size.bytes() >> 10),
            );
        }
    }
    for background in [false, true] {
        cancel_latency(&dense, background, if scale == 1 { 60 } else { 10 });
    }
}

/// Content of this machine's programs, libraries and texts, one file after the other, never the same twice.
struct Food {
    folders: VecDeque<PathBuf>,
    files: VecDeque<PathBuf>,
    rest: Vec<u8>,
}

impl Food {
    fn new() -> Self {
        let roots = [
            "/usr/lib",
            "/usr/share",
            "/usr/bin",
            "/usr/include",
            "/usr/local",
        ];
        Self {
            folders: roots.into_iter().map(PathBuf::from).collect(),
            files: VecDeque::new(),
            rest: Vec::new(),
        }
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        while self.rest.len() < length {
            if let Some(file) = self.files.pop_front() {
                let mut content = Vec::new();
                if let Ok(file) = File::open(&file) {
                    file.take(16 * MIB).read_to_end(&mut content).unwrap();
                }
                self.rest.append(&mut content);
                continue;
            }
            let folder = self
                .folders
                .pop_front()
                .expect("this machine has too few files");
            let Ok(entries) = fs::read_dir(folder) else {
                continue;
            };
            let mut entries: Vec<_> = entries.map(|entry| entry.unwrap()).collect();
            entries.sort_by_key(fs::DirEntry::path);
            for entry in entries {
                match entry.file_type().unwrap() {
                    kind if kind.is_dir() => self.folders.push_back(entry.path()),
                    kind if kind.is_file() => self.files.push_back(entry.path()),
                    _ => {}
                }
            }
        }
        let after = self.rest.split_off(length);
        std::mem::replace(&mut self.rest, after)
    }
}

/// Pieces of 16 KiB to 2 MiB with holes between, as a kernel leaves memory.
fn make_sparse(path: &Path, size: u64, data: u64, food: &mut Food) {
    let file = File::create_new(path).unwrap();
    file.set_len(size).unwrap();
    let pieces = [4_u64, 512, 16, 128, 5, 64, 300, 33].map(|pages| pages * 4096);
    let share = size / data;
    let (mut at, mut written) = (0, 0);
    for piece in pieces.into_iter().cycle() {
        if written >= data || at + piece > size {
            break;
        }
        file.write_all_at(&food.take(piece as usize), at).unwrap();
        written += piece;
        at += piece * share;
    }
    file.sync_all().unwrap();
}

fn make_dense(path: &Path, size: u64, food: &mut Food) {
    let file = File::create_new(path).unwrap();
    for at in (0..size).step_by(MIB as usize) {
        file.write_all_at(&food.take(MIB as usize), at).unwrap();
    }
    file.sync_all().unwrap();
}

fn warm(path: &Path) {
    let mut file = File::open(path).unwrap();
    std::io::copy(&mut file, &mut std::io::sink()).unwrap();
}

/// Best of three.
fn best(mut run: impl FnMut() -> Vec<Duration>) -> Vec<f64> {
    let runs: Vec<_> = (0..3).map(|_| run()).collect();
    (0..runs[0].len())
        .map(|i| runs.iter().map(|run| run[i]).min().unwrap().as_secs_f64())
        .collect()
}

fn ours(name: &str, input: &Path, options: CompressOptions, who: &str) {
    let (packed, back) = (input.with_extension("packed"), input.with_extension("back"));
    let mut size = 0;
    let times = best(|| {
        for old in [&packed, &back] {
            remove(old);
        }
        let quiet = &mut |_| {};
        let packing = compress_file(input, &packed, options, &Cancel::new(), quiet).unwrap();
        size = packing.artefact.compressed_size;
        let options = DecompressOptions::default();
        let unpacking = decompress_file(&packed, &back, options, &Cancel::new(), quiet).unwrap();
        [packing.timings, unpacking.timings]
            .into_iter()
            .flat_map(|t| [t.convert, t.convert + t.sync + t.verify])
            .collect()
    });
    println!(
        "| {name} | {} {} | {who} | {:.2} | {:.2} | {:.1} | {:.2} | {:.2} |",
        options.codec.algorithm(),
        options.codec.level(),
        times[0],
        times[1],
        size as f64 / MIB as f64,
        times[2],
        times[3],
    );
    for old in [&packed, &back] {
        remove(old);
    }
}

fn remove(path: &Path) {
    if path.exists() {
        fs::remove_file(path).unwrap();
    }
}

fn tools(name: &str, input: &Path, algorithm: Algorithm, flags: &[&str], who: &str) {
    let (packed, back) = (input.with_extension("packed"), input.with_extension("back"));
    let tool = algorithm.to_string();
    let run = |flags: &[&str], from: &Path, to: &Path| {
        let output = if algorithm == Algorithm::Zstd {
            &["-o"][..]
        } else {
            &[]
        };
        let started = Instant::now();
        let status = Command::new(&tool)
            .args(["-q", "-f"])
            .args(flags)
            .arg(from)
            .args(output)
            .arg(to)
            .stdin(Stdio::null())
            .status()
            .unwrap_or_else(|error| {
                panic!("cannot run {tool}: {error}; install it with: apt-get install {tool}")
            });
        assert!(status.success(), "{tool}: {status}");
        started.elapsed()
    };
    let times = best(|| {
        for old in [&packed, &back] {
            remove(old);
        }
        vec![run(flags, input, &packed), run(&["-d"], &packed, &back)]
    });
    let size = fs::metadata(&packed).unwrap().size();
    println!(
        "| {name} | {algorithm} {} | `{who}` | {:.2} | - | {:.1} | {:.2} | - |",
        flags[0].trim_start_matches('-'),
        times[0],
        size as f64 / MIB as f64,
        times[1],
    );
    for old in [&packed, &back] {
        remove(old);
    }
}

/// From `cancel()` to the return of the call, all threads joined and the stage file gone.
fn cancel_latency(input: &Path, background: bool, rounds: u32) {
    let target = input.with_extension("cancelled");
    let options = CompressOptions {
        background,
        ..CompressOptions::new(Codec::new(Algorithm::Zstd, Some(19)).unwrap())
    };
    let mut latencies: Vec<_> = (0..rounds)
        .map(|round| {
            let cancel = Cancel::new();
            let (send, receive) = mpsc::channel();
            thread::scope(|scope| {
                let job = scope.spawn(|| {
                    let outcome =
                        compress_file(input, &target, options, &cancel, &mut |progress| {
                            if progress.phase == Phase::Convert {
                                let _heard_once = send.send(());
                            }
                        });
                    (outcome, Instant::now())
                });
                receive.recv().unwrap();
                // Anywhere inside a chunk, which takes a few hundred milliseconds.
                thread::sleep(Duration::from_millis(u64::from(round * 7 % 100)));
                let asked = Instant::now();
                cancel.cancel();
                let (outcome, returned) = job.join().unwrap();
                assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
                returned - asked
            })
        })
        .collect();
    latencies.sort();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share).round() as usize];
    println!(
        "cancel at zstd 19, background {background}, {rounds} rounds: median {:.1} ms, p99 {:.1} ms",
        at(0.5).as_secs_f64() * 1e3,
        at(0.99).as_secs_f64() * 1e3,
    );
}
