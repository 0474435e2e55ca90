//! The codec beside the tools, in one run, as Markdown: `codec FOLDER [RUNS]`, where FOLDER holds two files,
//! `memory` (a real guest's, sparse) and `dense`. `make bench` makes them, and calls this.
//!
//! Every contender takes its turn in each of RUNS rounds (default 5) after one that is not counted; given are
//! medians. Inputs are in the page cache, and nobody begins before the disk has what the last one wrote. Nor
//! without free memory that was in use a moment ago: in a virtual machine with free page reporting the host takes
//! back what is free for two seconds, and whoever writes next pays for its return, up to a second per GiB. The
//! tools neither sync nor check what they wrote: our conversion alone is the same work as theirs, and what the
//! aims are about; the whole call, with fsync, read-back and checksums, stands beside it. A tool's time
//! includes the start of its process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a bench stops at the first surprise"
)]
use std::{
    env,
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use doze_snapshot::{
    Algorithm, Cancel, ChunkSize, Codec, CompressOptions, DecompressOptions, Error, Report,
    compress_file, decompress_file,
};

const MIB: f64 = (1 << 20) as f64;
const CANCELS: u32 = 100;
/// More than any result.
const FREE_MIB: usize = 1280;
/// Rounds of the table of chunk sizes, at most.
const CHUNK_RUNS: usize = 3;

fn main() {
    let mut arguments = env::args_os().skip(1);
    let folder = PathBuf::from(arguments.next().expect("usage: codec FOLDER [RUNS]"));
    let runs = arguments.next().map_or(5, |runs| {
        let runs = runs.to_str().and_then(|runs| runs.parse().ok());
        runs.filter(|runs| *runs > 0)
            .expect("RUNS is a number from 1 on")
    });
    let inputs = ["memory", "dense"].map(|name| Input::new(&folder, name));
    println!(
        "\nzstd 1, lz4 0 and their tools' -1; medians of {runs}:\n\n| in, codec, direction | doze | with fsync and check | tool | | times as fast | aim | |\n\
         |---|---|---|---|---|---|---|---|"
    );
    let mut sizes = Vec::new();
    for input in &inputs {
        for algorithm in [Algorithm::Zstd, Algorithm::Lz4] {
            sizes.push(compare(input, algorithm, runs));
        }
    }
    println!("\n| size, MiB | doze | tool | difference | aim | |\n|---|---|---|---|---|---|");
    for size in sizes {
        println!("{size}");
    }
    println!("\n| zstd 1, chunks of | in | MiB | compress | decompress |\n|---|---|---|---|---|");
    for log2 in [16, 18, 20, 22] {
        for input in &inputs {
            chunk_size(
                input,
                ChunkSize::new(1 << log2).unwrap(),
                runs.min(CHUNK_RUNS),
            );
        }
    }
    println!(
        "\n| `cancel()` to the return of the call, {CANCELS} rounds | median | p99 | worst | aim | |\n\
         |---|---|---|---|---|---|"
    );
    let [_, dense] = &inputs;
    cancels(dense);
    println!(
        "\npeak resident memory of this process: {} MiB",
        peak_kib() / 1024
    );
}

struct Input {
    name: &'static str,
    path: PathBuf,
    packed: PathBuf,
    back: PathBuf,
}

impl Input {
    /// Reads it once, so that it is in the page cache, and says what it is.
    fn new(folder: &Path, name: &'static str) -> Self {
        let path = folder.join(name);
        let mut file = File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut buffer = vec![0; 1 << 20];
        let (mut size, mut data) = (0, 0);
        loop {
            // Of a regular file comes all that there is, so pages stay pages.
            let length = file.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            size += length;
            for page in buffer[..length].chunks(4096) {
                if page.iter().any(|byte| *byte != 0) {
                    data += page.len();
                }
            }
        }
        println!(
            "- {name}: {:.0} MiB, {:.0} MiB of it in pages that are not zero ({:.1} %)",
            size as f64 / MIB,
            data as f64 / MIB,
            data as f64 * 100.0 / size as f64
        );
        Self {
            name,
            packed: path.with_extension("packed"),
            back: path.with_extension("back"),
            path,
        }
    }

    /// Nothing of the last run in the way, neither names nor dirty pages, and free memory at hand.
    fn ready(&self, names: &[&Path]) {
        self.clear(names);
        let path = self.path.with_extension("free");
        let mut file = File::create(&path).unwrap();
        let block = vec![1; 1 << 20];
        for _ in 0..FREE_MIB {
            file.write_all(&block).unwrap();
        }
        drop(file);
        fs::remove_file(&path).unwrap();
    }

    fn clear(&self, names: &[&Path]) {
        for old in names {
            if old.exists() {
                fs::remove_file(old).unwrap();
            }
        }
        rustix::fs::sync();
    }

    /// Compresses and decompresses: both reports, and whether everything came back is the codec's own check.
    fn ours(&self, options: CompressOptions) -> [Report; 2] {
        let quiet = &mut |_| {};
        self.ready(&[&self.packed, &self.back]);
        let packing =
            compress_file(&self.path, &self.packed, options, &Cancel::new(), quiet).unwrap();
        self.ready(&[]);
        let options = DecompressOptions::default();
        let unpacking =
            decompress_file(&self.packed, &self.back, options, &Cancel::new(), quiet).unwrap();
        self.clear(&[&self.packed, &self.back]);
        [packing, unpacking]
    }

    /// A tool compresses: how long and how large.
    fn tool_packs(&self, algorithm: Algorithm, flags: &[&str]) -> (Duration, u64) {
        self.ready(&[&self.packed]);
        let took = tool(algorithm, flags, &self.path, &self.packed);
        (took, fs::metadata(&self.packed).unwrap().len())
    }

    /// And decompresses what was compressed last.
    fn tool_unpacks(&self, algorithm: Algorithm) -> Duration {
        self.ready(&[&self.back]);
        let took = tool(algorithm, &["-d"], &self.packed, &self.back);
        self.clear(&[&self.packed, &self.back]);
        took
    }
}

fn tool(algorithm: Algorithm, flags: &[&str], from: &Path, to: &Path) -> Duration {
    let name = algorithm.to_string();
    let output = match algorithm {
        Algorithm::Zstd => &["-o"][..],
        Algorithm::Lz4 => &[],
    };
    let started = Instant::now();
    let status = Command::new(&name)
        .args(["-q", "-f"])
        .args(flags)
        .arg(from)
        .args(output)
        .arg(to)
        .stdin(Stdio::null())
        .status()
        .unwrap_or_else(|error| {
            panic!("cannot run {name}: {error}; install it with: apt-get install {name}")
        });
    assert!(status.success(), "{name}: {status}");
    started.elapsed()
}

/// The middle one, or the later of the two in the middle.
fn median(mut all: Vec<Duration>) -> f64 {
    all.sort();
    all[all.len() / 2].as_secs_f64()
}

fn whole(report: &Report) -> Duration {
    let timings = report.timings;
    timings.convert + timings.sync + timings.verify
}

/// What is aimed at: so many times as fast as the tool.
fn aim(input: &Input, algorithm: Algorithm, direction: &str, flags: &str) -> Option<f64> {
    let sparse = input.name == "memory";
    match (sparse, algorithm, direction, flags) {
        (true, Algorithm::Zstd, "compress", "-1") => Some(3.0),
        (true, Algorithm::Zstd, "compress", _) => Some(1.5),
        (true, _, "decompress", _) => Some(3.0),
        (false, Algorithm::Zstd, "compress", "-1 -T2") => Some(1.0),
        (false, Algorithm::Zstd, "decompress", _) => Some(1.5),
        _ => None,
    }
}

fn verdict(aim: Option<f64>, met: impl FnOnce(f64) -> bool) -> &'static str {
    match aim {
        None => "reported",
        Some(aim) if met(aim) => "met",
        Some(_) => "**missed**",
    }
}

/// Prints a row per tool and direction; the row about sizes comes back.
fn compare(input: &Input, algorithm: Algorithm, runs: usize) -> String {
    let options = CompressOptions::new(Codec::new(algorithm, None).unwrap());
    // All compress; with one thread is what is decompressed, and what sizes are compared with.
    let packers: &[(&str, &[&str])] = match algorithm {
        Algorithm::Zstd => &[("-1 -T2", &["-1", "-T2"]), ("-1", &["-1"])],
        Algorithm::Lz4 => &[("-1", &["-1"])],
    };
    let mut ours: [Vec<Report>; 2] = Default::default();
    let mut packing = vec![Vec::new(); packers.len()];
    let mut unpacking = Vec::new();
    let mut size = 0;
    for round in 0..=runs {
        let reports = input.ours(options);
        let mut packed = Vec::new();
        for (_, flags) in packers {
            let (took, bytes) = input.tool_packs(algorithm, flags);
            packed.push(took);
            size = bytes;
        }
        let unpacked = input.tool_unpacks(algorithm);
        if round == 0 {
            continue;
        }
        for (all, one) in ours.iter_mut().zip(reports) {
            all.push(one);
        }
        for (all, one) in packing.iter_mut().zip(packed) {
            all.push(one);
        }
        unpacking.push(unpacked);
    }
    let [packs, unpacks] = &ours;
    for ((flags, _), times) in packers.iter().zip(packing) {
        row(input, algorithm, "compress", flags, packs, times);
    }
    row(input, algorithm, "decompress", "-d", unpacks, unpacking);
    let ours = packs[0].artefact.compressed_size;
    let difference = (ours as f64 / size as f64 - 1.0) * 100.0;
    format!(
        "| {}, {algorithm} | {:.1} | {:.1} | {difference:+.2} % | 3 % | {} |",
        input.name,
        ours as f64 / MIB,
        size as f64 / MIB,
        verdict(Some(3.0), |aim| difference <= aim),
    )
}

fn row(
    input: &Input,
    algorithm: Algorithm,
    direction: &str,
    flags: &str,
    ours: &[Report],
    tool: Vec<Duration>,
) {
    let convert = median(ours.iter().map(|r| r.timings.convert).collect());
    let whole = median(ours.iter().map(whole).collect());
    let tool = median(tool);
    let aim = aim(input, algorithm, direction, flags);
    println!(
        "| {}, {algorithm}, {direction} | {convert:.2} s | {whole:.2} s | `{algorithm} {flags}` | {tool:.2} s | {:.1} | {} | {} |",
        input.name,
        tool / convert,
        aim.map_or_else(String::new, |aim| format!("{aim:.1}")),
        verdict(aim, |aim| tool / convert >= aim),
    );
}

fn chunk_size(input: &Input, chunk_size: ChunkSize, runs: usize) {
    let options = CompressOptions {
        chunk_size,
        ..CompressOptions::new(Codec::new(Algorithm::Zstd, None).unwrap())
    };
    let all: Vec<_> = (0..=runs).map(|_| input.ours(options)).skip(1).collect();
    let time = |at: usize| median(all.iter().map(|r| r[at].timings.convert).collect());
    println!(
        "| {} KiB | {} | {:.1} | {:.2} s | {:.2} s |",
        chunk_size.bytes() >> 10,
        input.name,
        all[0][0].artefact.compressed_size as f64 / MIB,
        time(0),
        time(1),
    );
}

/// Where a cancel may come late: inside a chunk at the slowest levels, and where somebody else has the cores.
fn cancels(input: &Input) {
    let compress = |algorithm, level, background| {
        let codec = Codec::new(algorithm, Some(level)).unwrap();
        let options = CompressOptions {
            background,
            ..CompressOptions::new(codec)
        };
        move |cancel: &Cancel| {
            compress_file(&input.path, &input.packed, options, cancel, &mut |_| {}).map(drop)
        }
    };
    cancel_row("zstd 19", compress(Algorithm::Zstd, 19, false));
    cancel_row(
        "zstd 19, in the background",
        compress(Algorithm::Zstd, 19, true),
    );
    with_busy_cores(|| {
        cancel_row(
            "zstd 19, in the background, all cores busy with other work",
            compress(Algorithm::Zstd, 19, true),
        );
    });
    cancel_row("zstd 12", compress(Algorithm::Zstd, 12, false));
    cancel_row("zstd 1", compress(Algorithm::Zstd, 1, false));
    cancel_row("lz4 9", compress(Algorithm::Lz4, 9, false));
    input.clear(&[]);
    let options = CompressOptions::new(Codec::new(Algorithm::Zstd, None).unwrap());
    compress_file(
        &input.path,
        &input.packed,
        options,
        &Cancel::new(),
        &mut |_| {},
    )
    .unwrap();
    cancel_row("decompressing zstd 1", |cancel| {
        let options = DecompressOptions::default();
        decompress_file(&input.packed, &input.back, options, cancel, &mut |_| {}).map(drop)
    });
    input.clear(&[&input.packed]);
}

fn cancel_row(what: &str, job: impl Fn(&Cancel) -> Result<(), Error> + Sync) {
    let mut latencies: Vec<_> = (0..CANCELS)
        .map(|round| {
            let cancel = Cancel::new();
            thread::scope(|scope| {
                let job = scope.spawn(|| (job(&cancel), Instant::now()));
                // Any moment of the first chunks, each of which takes hundreds of milliseconds at zstd 19.
                thread::sleep(Duration::from_millis(u64::from(20 + round * 37 % 150)));
                let asked = Instant::now();
                cancel.cancel();
                let (outcome, returned) = job.join().unwrap();
                assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
                returned - asked
            })
        })
        .collect();
    latencies.sort();
    // Nearest rank.
    let at = |percent: usize| latencies[(latencies.len() * percent).div_ceil(100) - 1];
    let ms = |latency: Duration| latency.as_secs_f64() * 1e3;
    println!(
        "| {what} | {:.1} ms | {:.1} ms | {:.1} ms | 50 ms | {} |",
        ms(at(50)),
        ms(at(99)),
        ms(at(100)),
        verdict(Some(50.0), |aim| ms(at(99)) <= aim),
    );
}

/// One thread for each core that never rests.
fn with_busy_cores(f: impl FnOnce()) {
    let cores = thread::available_parallelism().unwrap().get();
    let enough = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        f();
        enough.store(true, Ordering::Relaxed);
    });
}

/// `VmHWM` of /proc/self/status.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.trim().parse().unwrap()
}
