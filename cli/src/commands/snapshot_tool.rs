//! `doze snapshot-tool ...`: memory images as files, without a server.
use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use doze_snapshot::{
    Algorithm, Cancel, Codec, CompressOptions, DecompressOptions, Error, Inspection, Phase,
    Progress, Report, Timings,
};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    failure::{Failure, INTERRUPTED},
    output, terminal,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Compress a memory file; `zstd -d` and `lz4 -d` read the result too
    Compress(CompressArgs),
    /// Give the memory file back, holes as holes
    Decompress(DecompressArgs),
    /// Decode everything and check it
    Verify(ReadArgs),
    /// Show what a compressed memory file says about itself
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
pub struct CompressArgs {
    /// How to compress
    #[arg(long, value_enum, ignore_case = true)]
    algorithm: AlgorithmName,
    /// zstd: 1 to 19 (default 1); lz4: 0 to 9 (default 0)
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    level: Option<i64>,
    /// The memory file
    file: PathBuf,
    /// Where to write; must not exist
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    work: Work,
}

#[derive(Debug, clap::Args)]
pub struct DecompressArgs {
    /// The compressed memory file
    file: PathBuf,
    /// Where to write; must not exist
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    work: Work,
}

#[derive(Debug, clap::Args)]
pub struct ReadArgs {
    /// The compressed memory file
    file: PathBuf,
    #[command(flatten)]
    work: Work,
}

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// The compressed memory file
    file: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Work {
    /// Worker threads; default: one for each core
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Idle I/O and low CPU priority
    #[arg(long)]
    background: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AlgorithmName {
    Zstd,
    Lz4,
}

impl From<AlgorithmName> for Algorithm {
    fn from(name: AlgorithmName) -> Self {
        match name {
            AlgorithmName::Zstd => Algorithm::Zstd,
            AlgorithmName::Lz4 => Algorithm::Lz4,
        }
    }
}

impl Work {
    fn decompress_options(&self) -> DecompressOptions {
        DecompressOptions {
            threads: self.threads,
            background: self.background,
        }
    }
}

pub async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Compress(args) => compress(args).await,
        Command::Decompress(args) => decompress(args).await,
        Command::Verify(args) => verify(args).await,
        Command::Inspect(args) => inspect(args).await,
    }
}

async fn compress(args: CompressArgs) -> Result<u8, Failure> {
    let codec = Codec::new(args.algorithm.into(), args.level).map_err(|e| explain(&e))?;
    let options = CompressOptions {
        threads: args.work.threads,
        background: args.work.background,
        ..CompressOptions::new(codec)
    };
    let report = interruptible("compressing", move |cancel, progress| {
        doze_snapshot::compress_file(&args.file, &args.output, options, cancel, progress)
    })
    .await?;
    show(&report, args.work.json)
}

async fn decompress(args: DecompressArgs) -> Result<u8, Failure> {
    let options = args.work.decompress_options();
    let report = interruptible("decompressing", move |cancel, progress| {
        doze_snapshot::decompress_file(&args.file, &args.output, options, cancel, progress)
    })
    .await?;
    show(&report, args.work.json)
}

async fn verify(args: ReadArgs) -> Result<u8, Failure> {
    let options = args.work.decompress_options();
    let json = args.work.json;
    let found = interruptible("verifying", move |cancel, progress| {
        doze_snapshot::verify_file(&args.file, options, cancel, progress)
    })
    .await?;
    if json {
        output::json(&found)?;
    } else {
        output::line(&format!("intact: {}", summary(&found)))?;
    }
    Ok(0)
}

async fn inspect(args: InspectArgs) -> Result<u8, Failure> {
    let json = args.json;
    let found = interruptible("reading", move |_, _| {
        doze_snapshot::inspect_file(&args.file)
    })
    .await?;
    if json {
        output::json(&found)?;
    } else {
        output::line(&details(&found))?;
    }
    Ok(0)
}

/// Runs `job` on a thread of its own. SIGINT and SIGTERM cancel it; then this still waits for its end,
/// because only that leaves nothing half-made.
async fn interruptible<T: Send + 'static>(
    verb: &'static str,
    job: impl FnOnce(&Cancel, &mut dyn FnMut(Progress)) -> Result<T, Error> + Send + 'static,
) -> Result<T, Failure> {
    let watch = |kind| {
        signal(kind).map_err(|error| Failure::new(format!("cannot watch for signals: {error}")))
    };
    let mut interrupt = watch(SignalKind::interrupt())?;
    let mut terminate = watch(SignalKind::terminate())?;
    let cancel = Cancel::new();
    let theirs = cancel.clone();
    let mut job = tokio::task::spawn_blocking(move || {
        let mut bar = Bar::new(verb);
        let outcome = job(&theirs, &mut |progress| bar.show(progress));
        bar.clear();
        outcome
    });
    let joined = tokio::select! {
        joined = &mut job => joined,
        _ = interrupt.recv() => { cancel.cancel(); job.await }
        _ = terminate.recv() => { cancel.cancel(); job.await }
    };
    joined
        .map_err(|error| Failure::new(format!("the work ended unexpectedly: {error}")))?
        .map_err(|error| explain(&error))
}

/// The error and what is behind it; an interrupt has the exit status of one.
fn explain(error: &Error) -> Failure {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    match error {
        Error::Cancelled => {
            Failure::new("interrupted; nothing was left behind").with_status(INTERRUPTED)
        }
        _ => Failure::new(text),
    }
}

/// One line on standard error that is written over; nothing when that is no terminal.
struct Bar {
    verb: &'static str,
    on: bool,
    /// What stands there now.
    shown: String,
}

impl Bar {
    fn new(verb: &'static str) -> Self {
        Self {
            verb,
            on: terminal::is_terminal(std::io::stderr()),
            shown: String::new(),
        }
    }

    fn show(&mut self, progress: Progress) {
        if !self.on {
            return;
        }
        let text = describe(self.verb, progress);
        if text != self.shown {
            output::status_line(&text);
            self.shown = text;
        }
    }

    fn clear(&mut self) {
        if !self.shown.is_empty() {
            output::status_line("");
            self.shown.clear();
        }
    }
}

fn describe(verb: &str, progress: Progress) -> String {
    let what = match progress.phase {
        Phase::Convert => verb,
        Phase::Sync => "writing to the disk",
        Phase::Verify => "checking",
    };
    let percent = match progress.total {
        0 => 100,
        total => u128::from(progress.done) * 100 / u128::from(total),
    };
    format!("{what} {percent} % of {}", output::bytes(progress.total))
}

fn show(report: &Report, json: bool) -> Result<u8, Failure> {
    let Report { artefact, timings } = report;
    if json {
        output::json(&report_json(artefact, timings)?)?;
    } else {
        let whole = timings.convert + timings.sync + timings.verify;
        output::line(&format!(
            "{}; {:.2} s",
            summary(artefact),
            whole.as_secs_f64()
        ))?;
    }
    Ok(0)
}

fn report_json(artefact: &Inspection, timings: &Timings) -> Result<Value, Failure> {
    let mut value = serde_json::to_value(artefact)
        .map_err(|error| Failure::new(format!("cannot write JSON: {error}")))?;
    let seconds = |time: Duration| json!(time.as_secs_f64());
    value["seconds"] = json!({
        "convert": seconds(timings.convert),
        "sync": seconds(timings.sync),
        "verify": seconds(timings.verify),
    });
    Ok(value)
}

fn summary(found: &Inspection) -> String {
    format!(
        "{} raw, {} compressed ({:.2}x, {} level {})",
        output::bytes(found.raw_size),
        output::bytes(found.compressed_size),
        found.ratio,
        found.algorithm,
        found.level
    )
}

fn details(found: &Inspection) -> String {
    let rows = [
        ("algorithm", found.algorithm.to_string()),
        ("level", found.level.to_string()),
        ("chunk size", output::bytes(found.chunk_size)),
        ("frames", found.frames.to_string()),
        ("zero chunks", found.zero_chunks.to_string()),
        (
            "raw size",
            format!(
                "{} ({} bytes)",
                output::bytes(found.raw_size),
                found.raw_size
            ),
        ),
        (
            "compressed size",
            format!(
                "{} ({} bytes)",
                output::bytes(found.compressed_size),
                found.compressed_size
            ),
        ),
        ("ratio", format!("{:.2}", found.ratio)),
    ];
    rows.map(|(name, value)| format!("{name:<17}{value}"))
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_words() {
        let progress =
            |phase, done, total| describe("compressing", Progress { phase, done, total });
        assert_eq!(
            progress(Phase::Convert, 512, 1024),
            "compressing 50 % of 1.0 KiB"
        );
        assert_eq!(
            progress(Phase::Sync, 0, 0),
            "writing to the disk 100 % of 0 B"
        );
        assert_eq!(
            progress(Phase::Verify, 1024, 1024),
            "checking 100 % of 1.0 KiB"
        );
    }

    #[test]
    fn an_interrupt_has_its_own_exit_status_and_other_errors_name_their_cause() {
        assert!(matches!(
            explain(&Error::Cancelled),
            Failure::Message {
                status: INTERRUPTED,
                ..
            }
        ));
        let path = PathBuf::from("/no/such/memory");
        let error = doze_snapshot::inspect_file(&path).expect_err("there is no such file");
        let text = explain(&error).to_string();
        assert!(
            text.starts_with("cannot open /no/such/memory: No such file"),
            "{text}"
        );
    }

    #[test]
    fn what_inspect_shows() {
        let found = Inspection {
            algorithm: Algorithm::Zstd,
            level: 19,
            chunk_size: 1 << 20,
            frames: 4,
            zero_chunks: 1,
            raw_size: 4 << 20,
            compressed_size: 1 << 20,
            ratio: 4.0,
        };
        let text = details(&found);
        assert!(
            text.starts_with("algorithm        zstd\nlevel            19\n"),
            "{text}"
        );
        assert!(text.ends_with("ratio            4.00"), "{text}");
        let json = report_json(&found, &Timings::default()).expect("plain values");
        assert_eq!(json["algorithm"], "zstd");
        assert_eq!(json["seconds"]["sync"], 0.0);
    }
}
