//! What becomes of memory that sleeps, seen from outside: what the API says, what lies in the folder, and the
//! server's account of its jobs ([`Account`]), which must balance at any moment.
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{Api, World};

/// Between two looks at what nobody announces.
const LOOK: Duration = Duration::from_millis(10);

/// Waits until the compression of a sleeping instance is in one of these states; what the API says of it then.
pub async fn reaches(api: &Api, id: &str, states: &[&str], seconds: u64) -> Result<Value> {
    let path = format!("/instances/{id}");
    let instance = poll(api, &path, "/standby_compression/state", states, seconds).await?;
    Ok(instance["standby_compression"].clone())
}

/// The same of a stored snapshot; the snapshot.
pub async fn snapshot_reaches(api: &Api, id: &str, states: &[&str], seconds: u64) -> Result<Value> {
    let path = format!("/snapshots/{id}");
    poll(api, &path, "/compression_state", states, seconds).await
}

async fn poll(api: &Api, path: &str, field: &str, states: &[&str], seconds: u64) -> Result<Value> {
    let mut last = Value::Null;
    let search = async {
        loop {
            last = api.get(path).await?.expect(200)?;
            let state = last
                .pointer(field)
                .and_then(Value::as_str)
                .unwrap_or_default();
            if states.contains(&state) {
                return Ok(());
            }
            // What failed stays so.
            ensure!(state != "error", "{path}: it failed: {last}");
            tokio::time::sleep(LOOK).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(seconds), search).await {
        Ok(found) => found.map(|()| last),
        Err(_) => bail!("{path}: not {states:?} after {seconds} s: {last}"),
    }
}

/// The forms in which memory lies in a folder, and what half-made ones there are; sorted names.
pub fn forms(dir: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name == "memory" || name.starts_with("memory.") || name.starts_with(".memory.") {
            found.push(name);
        }
    }
    found.sort();
    Ok(found)
}

/// What a plain `zstd -t` or `lz4 -t` says of an artefact.
pub fn plain_tool_reads(artefact: &Path) -> Result<()> {
    let tool = match artefact.extension().and_then(|e| e.to_str()) {
        Some("zst") => "zstd",
        Some("lz4") => "lz4",
        _ => bail!("{} is no artefact", artefact.display()),
    };
    let output = std::process::Command::new(tool)
        .args(["-q", "-t"])
        .arg(artefact)
        .output()
        .with_context(|| tool.to_owned())?;
    ensure!(
        output.status.success(),
        "{tool} -t {}: {}",
        artefact.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// One label set's numbers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Jobs {
    pub planned: u64,
    pub pending: u64,
    pub active: u64,
    /// By result; all four are there.
    pub ended: BTreeMap<String, u64>,
    /// How many took how long, by result.
    durations: BTreeMap<String, u64>,
    waits: u64,
    ratios: u64,
    /// In and out.
    pub bytes: BTreeMap<String, u64>,
}

/// What `GET /metrics` says of compressions, found consistent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Account {
    /// By algorithm, level, hypervisor and source, as one text.
    pub jobs: BTreeMap<String, Jobs>,
    /// By source and operation.
    pub preemptions: BTreeMap<(String, String), u64>,
    /// By path.
    pub preparations: BTreeMap<String, u64>,
}

/// Reads the account and checks it: for the end of every case about compression.
pub async fn balanced(api: &Api) -> Result<Account> {
    let text = api.get("/metrics").await?.text;
    Account::read(&text).with_context(|| {
        let ours = text.lines().filter(|line| line.contains("compression"));
        ours.collect::<Vec<_>>().join("\n")
    })
}

/// Waits until nothing is planned any more, the account balanced at every look.
pub async fn quiet(api: &Api, seconds: u64) -> Result<Account> {
    let mut last = Account::default();
    let search = async {
        loop {
            last = balanced(api).await?;
            if last.jobs.values().all(|j| j.pending + j.active == 0) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(seconds), search).await {
        Ok(found) => found.map(|()| last),
        Err(_) => bail!("jobs are left after {seconds} s: {last:?}"),
    }
}

impl Account {
    /// Sum over all label sets that have this text.
    pub fn sum(&self, having: &str, of: impl Fn(&Jobs) -> u64) -> u64 {
        let having = self
            .jobs
            .iter()
            .filter(|(labels, _)| labels.contains(having));
        having.map(|(_, jobs)| of(jobs)).sum()
    }

    fn read(text: &str) -> Result<Account> {
        let mut account = Account::default();
        for line in text.lines() {
            if line.starts_with("doze_snapshot_compression_")
                || line.starts_with("doze_snapshot_restore_memory_prepare_")
            {
                account.sample(line).with_context(|| line.to_owned())?;
            }
        }
        for (labels, jobs) in &account.jobs {
            jobs.check().with_context(|| labels.clone())?;
        }
        // An instance's driver counts both at once.
        let canceled = account.sum("source=standby", |jobs| jobs.ended["canceled"]);
        let standby = account
            .preemptions
            .iter()
            .filter(|((source, _), _)| source == "standby");
        let preempted: u64 = standby.map(|(_, count)| count).sum();
        ensure!(
            canceled == preempted,
            "{canceled} jobs of sleeping instances canceled, {preempted} pre-empted: {account:?}"
        );
        Ok(account)
    }

    fn sample(&mut self, line: &str) -> Result<()> {
        let (series, value) = line.rsplit_once(' ').context("no value")?;
        let (name, labels) = series.split_once('{').context("no labels")?;
        let mut labels = parse_labels(labels.strip_suffix('}').context("labels")?)?;
        let number: f64 = value.parse()?;
        ensure!(number.is_finite() && number >= 0.0, "an odd value");
        if name.ends_with("_sum") || name.ends_with("_bucket") {
            return Ok(());
        }
        let count: u64 = value.parse()?;
        let mut take = |key: &str| labels.remove(key).with_context(|| format!("no {key}"));
        if name == "doze_snapshot_compression_preemptions_total" {
            let key = (take("source")?, take("operation")?);
            // By all its labels.
            *self.preemptions.entry(key).or_default() += count;
            return Ok(());
        }
        if name == "doze_snapshot_restore_memory_prepare_duration_seconds_count" {
            *self.preparations.entry(take("path")?).or_default() += count;
            return Ok(());
        }
        let (algorithm, level) = (take("algorithm")?, take("level")?);
        let (hypervisor, source) = (take("hypervisor")?, take("source")?);
        let levels = match algorithm.as_str() {
            "zstd" => 1..=19,
            "lz4" => 0..=9,
            _ => bail!("no algorithm"),
        };
        ensure!(
            levels.contains(&level.parse::<u8>()?)
                && matches!(hypervisor.as_str(), "qemu" | "qemu-microvm")
                && matches!(source.as_str(), "standby" | "snapshot"),
            "odd labels"
        );
        let set =
            format!("algorithm={algorithm},level={level},hypervisor={hypervisor},source={source}");
        let jobs = self.jobs.entry(set).or_default();
        let mut put = |map: fn(&mut Jobs) -> &mut BTreeMap<String, u64>, key: &str| {
            let key = labels.remove(key).with_context(|| format!("no {key}"))?;
            ensure!(map(jobs).insert(key, count).is_none(), "twice");
            Ok(())
        };
        match name.trim_start_matches("doze_snapshot_compression_") {
            "planned_total" => jobs.planned = count,
            "pending" => jobs.pending = count,
            "active" => jobs.active = count,
            "wait_duration_seconds_count" => jobs.waits = count,
            "ratio_count" => jobs.ratios = count,
            "jobs_total" => put(|jobs| &mut jobs.ended, "result")?,
            "duration_seconds_count" => put(|jobs| &mut jobs.durations, "result")?,
            "bytes_total" => put(|jobs| &mut jobs.bytes, "direction")?,
            _ => bail!("an unknown metric"),
        }
        ensure!(labels.is_empty(), "more labels: {labels:?}");
        Ok(())
    }
}

impl Jobs {
    fn check(&self) -> Result<()> {
        let results: Vec<&str> = self.ended.keys().map(String::as_str).collect();
        ensure!(
            results == ["canceled", "failed", "skipped", "success"],
            "results {results:?}"
        );
        ensure!(self.bytes.len() == 2, "bytes {:?}", self.bytes);
        let sum = self.ended.values().sum::<u64>() + self.active + self.pending;
        ensure!(
            self.planned == sum,
            "planned {} is not the sum of all others, {sum}: {self:?}",
            self.planned
        );
        let took = |result: &str| self.durations.get(result).copied().unwrap_or_default();
        // Whatever waited to its end began, and whatever began works or has ended.
        ensure!(
            self.waits == self.active + self.durations.values().sum::<u64>(),
            "begun and ended differ: {self:?}"
        );
        ensure!(
            took("canceled") == self.ended["canceled"] && took("skipped") == 0,
            "only what began is canceled, and only what did not is skipped: {self:?}"
        );
        ensure!(
            took("success") <= self.ended["success"] && took("failed") <= self.ended["failed"],
            "more took their time than ended: {self:?}"
        );
        ensure!(self.ratios <= self.ended["success"], "{self:?}");
        Ok(())
    }
}

fn parse_labels(text: &str) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').context("a label")?;
        labels.insert(key.to_owned(), value.trim_matches('"').to_owned());
    }
    Ok(labels)
}

/// A guest with room for [`crate::Witness::plant_mixed`] in its memory.
pub fn roomy(world: &World, stem: &str) -> Value {
    let mut request = world.tiny(stem);
    request["size"] = "512MB".into();
    request
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const OF: &str = r#"algorithm="lz4",level="0",hypervisor="qemu",source="standby""#;

    fn text(change: (&str, &str)) -> String {
        let jobs = |name: &str, more: &str, value: &str| {
            format!("doze_snapshot_compression_{name}{{{OF}{more}}} {value}\n")
        };
        let ended =
            |result: &str, value: &str| jobs("jobs_total", &format!(",result=\"{result}\""), value);
        let whole = [
            "doze_instances{state=\"running\"} -1\n".to_owned(),
            jobs("planned_total", "", "7"),
            jobs("pending", "", "1"),
            jobs("active", "", "1"),
            ended("success", "2"),
            ended("failed", "1"),
            ended("canceled", "1"),
            ended("skipped", "1"),
            jobs("bytes_total", ",direction=\"in\"", "300"),
            jobs("bytes_total", ",direction=\"out\"", "100"),
            jobs("duration_seconds_count", ",result=\"success\"", "2"),
            jobs("duration_seconds_count", ",result=\"canceled\"", "1"),
            jobs("wait_duration_seconds_count", "", "4"),
            jobs("ratio_sum", "", "6.5"),
            jobs("ratio_count", "", "2"),
            "doze_snapshot_compression_preemptions_total{operation=\"restore\",source=\"standby\"} 1\n"
                .to_owned(),
        ];
        let text = whole.concat();
        assert!(text.contains(change.0), "{change:?}");
        text.replacen(change.0, change.1, 1)
    }

    #[test]
    fn an_account_that_balances_is_read() {
        let account = Account::read(&text(("", ""))).unwrap();
        assert_eq!(account.sum("standby", |jobs| jobs.planned), 7);
        assert_eq!(account.sum("snapshot", |jobs| jobs.planned), 0);
        assert_eq!(account.preemptions.len(), 1);
    }

    #[test]
    fn one_that_does_not_is_refused() {
        for change in [
            ("} 7\n", "} 8\n"),
            ("result=\"skipped\"} 1", "result=\"skipped\"} 0"),
            ("result=\"skipped\"} 1", "result=\"skipped\"} -1"),
            ("result=\"skipped\"", "result=\"vanished\""),
            ("_ratio_sum{", "_riddle_sum2{"),
            ("6.5\n", "NaN\n"),
            ("6.5\n", "-6.5\n"),
            (
                "operation=\"restore\",source=\"standby\"} 1",
                "operation=\"restore\",source=\"standby\"} 2",
            ),
            ("wait_duration_seconds_count", "wait_duration_years_count"),
            ("level=\"0\"", "level=\"10\""),
            ("\"lz4\"", "\"brotli\""),
            ("direction=\"out\"", "direction=\"in\""),
        ] {
            let read = Account::read(&text(change));
            assert!(read.is_err(), "{change:?}: {read:?}");
        }
    }
}
