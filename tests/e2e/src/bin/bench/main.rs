//! Prints, as Markdown, how long a create takes to `Running`, how long standby, restore, snapshots and forks take, and what
//! 1,000 stopped instances cost the server, beside machine model and core count. Run it on an otherwise idle machine:
//! `cargo run --release -p doze-e2e --bin bench`.
//!
//! `bench copies` measures snapshots and forks alone. `bench codec-inputs FOLDER` measures nothing: it makes the files that the memory codec is measured with.
use std::{
    env,
    ffi::OsStr,
    fs,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use doze_e2e::{
    Api, World,
    preflight::Tools,
    sandbox::{self, Sandbox},
    server::{Server, ServerOptions},
    world::WorldOptions,
};
use serde_json::json;

mod auto_standby;
mod codec_inputs;
mod compression;
mod copies;
mod standby;

const BOOTS: usize = 10;
const COPIED: &str = "copied (no reflink)";
const SEEDED: usize = 1_000;
const READS: usize = 500;

fn main() -> ExitCode {
    sandbox::enter(|sandbox| {
        let arguments: Vec<_> = env::args_os().skip(1).collect();
        let outcome = match arguments.as_slice() {
            [] => bench(sandbox),
            [what] if what == "copies" => copies_alone(sandbox),
            [what, folder] if what == "codec-inputs" => codec_inputs(sandbox, Path::new(folder)),
            other => Err(anyhow!(
                "{other:?}; known are no argument, copies, and codec-inputs FOLDER"
            )),
        };
        match outcome {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("bench: {e:#}");
                ExitCode::FAILURE
            }
        }
    })
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(2)
        .build()
        .context("runtime")
}

fn codec_inputs(sandbox: Sandbox, folder: &Path) -> Result<()> {
    let tools = Arc::new(Tools::find()?);
    runtime()?.block_on(async {
        let options = WorldOptions::default();
        let world = World::new(tools, Arc::new(sandbox), "codec", &options)?;
        let made = codec_inputs::make(&world, folder).await;
        world.tear_down().await?;
        made
    })
}

fn copies_alone(sandbox: Sandbox) -> Result<()> {
    let tools = Arc::new(Tools::find()?);
    runtime()?.block_on(async {
        print_machine()?;
        let sandbox = Arc::new(sandbox);
        let world = World::new(
            tools.clone(),
            sandbox.clone(),
            "bench",
            &WorldOptions::default(),
        )?;
        copies::copies(&world, COPIED).await?;
        world.tear_down().await?;
        copies_shared(tools, sandbox).await
    })
}

async fn copies_shared(tools: Arc<Tools>, sandbox: Arc<Sandbox>) -> Result<()> {
    let world = World::new(tools, sandbox, "bench-reflink", &WorldOptions::default())?;
    copies::share_blocks(&world)?;
    copies::copies(&world, "XFS with reflink").await?;
    world.tear_down().await
}

fn bench(sandbox: Sandbox) -> Result<()> {
    let tools = Arc::new(Tools::find()?);
    runtime()?.block_on(async {
        print_machine()?;
        println!("| request to `Running`, 256 MiB | median | p90 | worst |\n|---|---|---|---|");
        let sandbox = Arc::new(sandbox);
        let options = WorldOptions::default();
        let world = World::new(tools.clone(), sandbox.clone(), "bench", &options)?;
        for hypervisor in ["qemu-microvm", "qemu"] {
            boots(&world, hypervisor).await?;
        }
        standby::cycles(&world).await?;
        copies::copies(&world, COPIED).await?;
        auto_standby::cycles(&world).await?;
        compression::restores(&world).await?;
        world.tear_down().await?;
        copies_shared(tools, sandbox).await?;
        println!("\n| with {SEEDED} stopped instances | measured | aim |\n|---|---|---|");
        let server = world.another_server(&ServerOptions::default())?;
        stopped_instances(&server).await
    })
}

fn print_machine() -> Result<()> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let value = |key: &str| {
        let line = cpuinfo.lines().find(|l| l.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = value("model name").unwrap_or_else(|| "unknown".into());
    let cores = std::thread::available_parallelism()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!(
        "{model}, {cores} cores, Linux {}, guests under TCG\n",
        kernel.trim()
    );
    Ok(())
}

async fn boots(world: &World, hypervisor: &str) -> Result<()> {
    let api = world.api().await?;
    let mut took = Vec::new();
    // One more than counted: the first also makes what all boots share.
    for round in 0..=BOOTS {
        let mut request = world.tiny("boot");
        request["hypervisor"] = json!(hypervisor);
        let started = Instant::now();
        let id = world.boot(request).await?;
        if round > 0 {
            took.push(started.elapsed());
        }
        api.remove(&id).await?;
    }
    took.sort();
    println!(
        "| {hypervisor}, {BOOTS} runs | {} | {} | {} |",
        seconds(quantile(&took, 0.5)?),
        seconds(quantile(&took, 0.9)?),
        seconds(quantile(&took, 1.0)?)
    );
    Ok(())
}

async fn stopped_instances(server: &Server) -> Result<()> {
    let count = SEEDED.to_string();
    let args = ["debug", "seed-stopped", &count, "--config"].map(OsStr::new);
    server
        .doze(args.into_iter().chain([server.config.as_os_str()]))
        .await?;
    let started = Instant::now();
    server.start().await?;
    let start_up = started.elapsed();
    let outcome = async {
        let api = server.api().await?;
        let instances = api.instances().await?;
        ensure!(
            instances.len() == SEEDED,
            "{} instances were seeded",
            instances.len()
        );
        // Fifty visits before the idle measurement: what a server in use keeps, it has then.
        let rss_at_start = rss_mib(server.pid().await?)?;
        let list = timed(READS / 5, || read(&api, "/instances".into())).await?;
        let mut next = instances.iter().cycle();
        let get = timed(READS, || {
            let id = next
                .next()
                .and_then(|i| i["id"].as_str())
                .unwrap_or_default();
            read(&api, format!("/instances/{id}"))
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let rss = rss_mib(server.pid().await?)?;
        println!("| start-up to ready | {} | 1 s |", seconds(start_up));
        println!(
            "| list, p50 / p99 of {} | {} / {} | p99 20 ms |",
            list.len(),
            millis(quantile(&list, 0.5)?),
            millis(quantile(&list, 0.99)?)
        );
        println!(
            "| get, p50 / p99 of {} | {} / {} | p99 2 ms |",
            get.len(),
            millis(quantile(&get, 0.5)?),
            millis(quantile(&get, 0.99)?)
        );
        println!(
            "| RSS after start / idle after these reads | {rss_at_start:.1} / {rss:.1} MiB | 50 MiB |"
        );
        anyhow::Ok(())
    };
    let outcome = outcome.await;
    server.stop().await?;
    outcome
}

/// One read as a client sees it, body included.
async fn read(api: &Api, path: String) -> Result<()> {
    api.fetch(&path).await
}

async fn timed<F: Future<Output = Result<()>>>(
    rounds: usize,
    mut work: impl FnMut() -> F,
) -> Result<Vec<Duration>> {
    let mut took = Vec::with_capacity(rounds);
    for round in 0..rounds + 10 {
        let started = Instant::now();
        work().await?;
        // The first ten warm connection and caches.
        if round >= 10 {
            took.push(started.elapsed());
        }
    }
    took.sort();
    Ok(took)
}

/// Nearest-rank quantile of sorted values.
fn quantile(sorted: &[Duration], q: f64) -> Result<Duration> {
    let rank = (q * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied().context("no measurements")
}

/// Resident set, from /proc/PID/status.
fn rss_mib(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmRSS:"))
        .context("VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib / 1024.0)
}

fn seconds(d: Duration) -> String {
    format!("{:.2} s", d.as_secs_f64())
}

fn millis(d: Duration) -> String {
    format!("{:.2} ms", d.as_secs_f64() * 1e3)
}
