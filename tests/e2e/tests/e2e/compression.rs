//! Compression of memory that sleeps, on real guests.
use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Group, Sample, Witness, World,
    compression::{balanced, forms, plain_tool_reads, reaches, roomy},
};
use serde_json::json;

use crate::{
    crash_standby::instance_dir,
    standby_faults::{BOARDS, group},
};

pub fn groups(_sample: &Sample) -> Vec<Group> {
    BOARDS
        .map(|board| group(board, "compression", doze_e2e::cases![smoke]))
        .into()
}

async fn smoke(world: &World) -> Result<()> {
    let api = world.api().await?;
    let t = std::time::Instant::now();
    let lap = |what: &str| println!("    {what} {:.1} s", t.elapsed().as_secs_f64());
    let id = world.boot(roomy(world, "mixed")).await?;
    lap("booted");
    let witness = Witness::plant_mixed(api, &id, 200).await?;
    lap("planted");
    witness.survived(api, &id).await?;
    lap("checked");
    let body = json!({"compression": {"enabled": true, "algorithm": "zstd", "level": 1}});
    let answer = api
        .post(&format!("/instances/{id}/standby"), body)
        .await?
        .expect(200)?;
    println!("    {}", answer["standby_compression"]);
    lap("asleep");
    let found = reaches(api, &id, &["compressed"], 120).await?;
    println!("    {found}");
    lap("compressed");
    let dir = instance_dir(world, &id);
    ensure!(forms(&dir)? == ["memory.zst"], "{:?}", forms(&dir)?);
    plain_tool_reads(&dir.join("memory.zst"))?;
    lap("zstd -t");
    let answer = api
        .post_empty(&format!("/instances/{id}/restore"))
        .await?
        .expect(200)?;
    ensure!(answer["standby_compression"].is_null(), "{answer}");
    lap("restored");
    witness.survived(api, &id).await?;
    lap("checked");
    println!("    {:?}", balanced(api).await?);
    api.remove(&id).await.context("remove")?;
    Ok(())
}

pub fn covers(point: &str) -> bool {
    point.starts_with("compression.")
        || matches!(point, "restore.decompressed" | "restore.artefact_dropped")
}
