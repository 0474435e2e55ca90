//! What falling asleep by itself costs: how late, and how long the guest stands still for the looks.
use std::time::Duration;

use anyhow::{Context as _, Result};
use doze_e2e::{World, phases::parse_time};
use serde_json::json;

use crate::{millis, quantile};

const CYCLES: usize = 20;
const IDLE: &str = "500ms";

/// Prints one table.
pub async fn cycles(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("dozer");
    request["auto_standby"] = json!({"enabled": true, "idle_timeout": "1h"});
    let id = world.boot(request).await?;
    let (mut late, mut looks, mut stood) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..CYCLES {
        let policy = json!({"auto_standby": {"enabled": true, "idle_timeout": IDLE}});
        let path = format!("/instances/{id}");
        let patched = api.send(http::Method::PATCH, &path, Some(&policy)).await?;
        patched.expect(200)?;
        let status = api
            .get(&format!("{path}/auto-standby/status"))
            .await?
            .expect(200)?;
        api.wait(&id, "Standby", 60).await?;
        let phases = api.get(&format!("{path}/phases")).await?.expect(200)?;
        let changes = phases["transitions"].as_array().context("transitions")?;
        let paused = changes.iter().rev().find(|change| change["to"] == "paused");
        let paused = paused
            .and_then(|change| change["at"].as_str())
            .context("paused")?;
        // When it was due already as it was asked, the moment of asking.
        let due = status["next_standby_at"].as_str().context("due")?;
        let after = parse_time(paused)? - parse_time(due)?;
        late.push(Duration::from_millis(u64::try_from(after).unwrap_or(0)));
        let log = api.log_lines(&id, "?source=hypeman&tail=20").await?;
        let line = log.iter().rev().find(|line| line.contains("standby took"));
        let line = line.context("no standby in its log")?;
        let lap = |name: &str| lap(line, name);
        looks.push(lap("looked again")?.saturating_sub(lap("durable")?));
        stood.push(lap("asleep")?.saturating_sub(lap("paused")?));
        api.post_empty(&format!("{path}/restore"))
            .await?
            .expect(200)?;
        api.wait(&id, "Running", 60).await?;
    }
    api.remove(&id).await?;
    println!("\n| auto-standby, {CYCLES} cycles | median / p90 / worst |\n|---|---|");
    for (what, mut all) in [
        ("end of the idle time to pause", late),
        ("the last look, after the mark", looks),
        ("pause to asleep", stood),
    ] {
        all.sort();
        let of = |part: f64| quantile(&all, part).map(millis);
        println!("| {what} | {} / {} / {} |", of(0.5)?, of(0.9)?, of(1.0)?);
    }
    Ok(())
}

/// Milliseconds since the operation began at which this was done.
fn lap(line: &str, name: &str) -> Result<Duration> {
    let (_, rest) = line
        .split_once(&format!(" {name} "))
        .context("no such lap")?;
    let text = rest.split(' ').next().unwrap_or_default();
    let millis: f64 = text.parse().with_context(|| line.to_owned())?;
    Ok(Duration::from_secs_f64(millis / 1e3))
}
