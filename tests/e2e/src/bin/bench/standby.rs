//! How long falling asleep and waking take: guests of 512 MiB and 2 GiB with 300 MiB of mixed data in use
//! that change a part of it between two cycles.
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Api, World, exec};
use serde_json::json;

use crate::{millis, quantile};

/// Cycles with a warm page cache; the first is not counted.
const CYCLES: usize = 10;
/// Cycles before which the host forgets its page cache.
const COLD: usize = 5;
/// 150 MiB that do not compress and 150 MiB of text, where no file system can share or drop them.
pub const FILL: &str = "mount -o remount,size=420M /dev/shm && \
                    dd if=/dev/urandom of=/dev/shm/noise bs=1M count=150 2>/dev/null && \
                    yes 'a line of text that repeats' | head -c 157286400 > /dev/shm/text && sync";
/// What a guest in use does between two sleeps: 20 MiB are new.
const WORK: &str = "dd if=/dev/urandom of=/dev/shm/noise bs=1M count=20 conv=notrunc 2>/dev/null";

#[derive(Default)]
struct Measured {
    laps: BTreeMap<&'static str, Vec<Duration>>,
}

impl Measured {
    fn add(&mut self, what: &'static str, took: Duration) {
        self.laps.entry(what).or_default().push(took);
    }

    fn row(&mut self, what: &'static str) -> Result<String> {
        let all = self.laps.entry(what).or_default();
        let (first, last) = (all.first().copied(), all.last().copied());
        let mut sorted = all.clone();
        sorted.sort();
        Ok(format!(
            "{} / {} / {} (first {}, last {})",
            millis(quantile(&sorted, 0.5)?),
            millis(quantile(&sorted, 0.9)?),
            millis(quantile(&sorted, 1.0)?),
            millis(first.context("no cycle")?),
            millis(last.context("no cycle")?),
        ))
    }
}

/// Prints one table per board and size.
pub async fn cycles(world: &World) -> Result<()> {
    for hypervisor in ["qemu-microvm", "qemu"] {
        for size in ["512MB", "2GB"] {
            println!(
                "\n| {hypervisor}, {size}, {CYCLES} cycles | median / p90 / worst | aim |\n|---|---|---|"
            );
            one(world, hypervisor, size).await?;
        }
    }
    Ok(())
}

async fn one(world: &World, hypervisor: &str, size: &str) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("sleeper");
    request["hypervisor"] = json!(hypervisor);
    request["size"] = json!(size);
    let id = world.boot(request).await?;
    exec::sh(api, &id, FILL).await?;
    let mut measured = Measured::default();
    let mut written = Vec::new();
    for round in 0..=CYCLES {
        exec::sh(api, &id, WORK).await?;
        let bytes = sleep(world, api, &id, round > 0, &mut measured).await?;
        if round > 0 {
            written.push(bytes);
        }
        wake(
            api,
            &id,
            (round > 0).then_some("restore, warm"),
            &mut measured,
        )
        .await?;
    }
    for _ in 0..COLD {
        sleep(world, api, &id, false, &mut measured).await?;
        fs::write("/proc/sys/vm/drop_caches", "3").context("dropping the page cache")?;
        wake(api, &id, Some("restore, cold"), &mut measured).await?;
    }
    written.sort_unstable();
    for (what, label, aim) in [
        ("saved", "pause to device state saved", "60 ms"),
        ("durable", "pause to durable", ""),
        ("standby", "standby, call to answer", ""),
        (
            "restore, warm",
            "restore, call to verified answer, warm",
            "400 ms",
        ),
        (
            "restore, cold",
            "restore, call to verified answer, cold page cache",
            "",
        ),
    ] {
        println!("| {label} | {} | {aim} |", measured.row(what)?);
    }
    let median = written.get(written.len() / 2).context("no cycle")?;
    println!(
        "| written to the disk by a standby, median | {:.1} MiB | |",
        *median as f64 / 1048576.0
    );
    api.remove(&id).await
}

/// Bytes that reached the disk between call and answer.
async fn sleep(
    world: &World,
    api: &Api,
    id: &str,
    counted: bool,
    measured: &mut Measured,
) -> Result<u64> {
    let data_dir = &world.server.data_dir;
    let before = disk_bytes(data_dir)?;
    let begun = Instant::now();
    api.post_empty(&format!("/instances/{id}/standby"))
        .await?
        .expect(200)?;
    let took = begun.elapsed();
    let bytes = disk_bytes(data_dir)?.saturating_sub(before);
    if counted {
        measured.add("standby", took);
        let laps = laps(api, id, "standby took").await?;
        let paused = laps.get("paused").context("no pause in the log")?;
        for what in ["saved", "durable"] {
            let at = laps
                .get(what)
                .with_context(|| format!("no {what} in the log"))?;
            measured.add(what, at.saturating_sub(*paused));
        }
    }
    Ok(bytes)
}

async fn wake(
    api: &Api,
    id: &str,
    counted: Option<&'static str>,
    measured: &mut Measured,
) -> Result<()> {
    let begun = Instant::now();
    let answer = api
        .post_empty(&format!("/instances/{id}/restore"))
        .await?
        .expect(200)?;
    let took = begun.elapsed();
    ensure!(
        answer["state"] == "Running",
        "restored to {}",
        answer["state"]
    );
    if let Some(what) = counted {
        measured.add(what, took);
    }
    Ok(())
}

/// The last line of the server's own account: `OPERATION took WHAT N ms, WHAT N ms`.
pub async fn laps(api: &Api, id: &str, operation: &str) -> Result<BTreeMap<String, Duration>> {
    let lines = api.log_lines(id, "?source=hypeman&tail=20").await?;
    let line = lines
        .iter()
        .rev()
        .find_map(|line| line.split_once(operation))
        .with_context(|| format!("no {operation:?} in the log"))?;
    let mut laps = BTreeMap::new();
    for part in line.1.split(',') {
        let (what, ms) = part
            .trim()
            .trim_end_matches(" ms")
            .rsplit_once(' ')
            .with_context(|| format!("{part:?} is not WHAT N ms"))?;
        laps.insert(
            what.to_owned(),
            Duration::from_secs_f64(ms.parse::<f64>()? / 1e3),
        );
    }
    Ok(laps)
}

/// Bytes written so far to the disk that holds `dir`, by whomever (field 7 of /proc/diskstats, sectors of 512 bytes).
fn disk_bytes(dir: &Path) -> Result<u64> {
    let dev = fs::metadata(dir)?.dev();
    // makedev(3): as the kernel's huge encoding.
    let (major, minor) = ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xfff00));
    let stats = fs::read_to_string("/proc/diskstats")?;
    for line in stats.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.first() == Some(&major.to_string().as_str())
            && fields.get(1) == Some(&minor.to_string().as_str())
        {
            let sectors: u64 = fields.get(9).context("sectors written")?.parse()?;
            return Ok(sectors * 512);
        }
    }
    Ok(0)
}
