//! `doze snapshot-tool` on the memory of a real guest: through both algorithms and back, by us and by the
//! formats' own tools, and into the guest again.
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World, exec};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::Command;

use super::{folder, restore, standby};
use crate::cli::{Output, doze};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        a_memory_goes_through_the_tool,
        the_tool_leaves_nothing_behind
    ]
}

/// 24 MiB that do not compress, because no chunk holds two of the parts, and 24 MiB of text.
const FILL: &str = "head -c 4194304 /dev/urandom > /dev/shm/part && \
                    cat $(yes /dev/shm/part | head -n 6) > /dev/shm/noise && rm /dev/shm/part && \
                    yes 'a line of text that repeats' | head -c 25165824 > /dev/shm/text";
const SUM: &str = "cat /dev/shm/noise /dev/shm/text | sha256sum";

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}

async fn tool(world: &World, args: &[&str]) -> Result<Output> {
    let args: Vec<_> = ["snapshot-tool"].iter().chain(args).copied().collect();
    doze(world, &args).await
}

async fn json(world: &World, args: &[&str]) -> Result<Value> {
    let args: Vec<_> = args.iter().chain(&["--json"]).copied().collect();
    let said = tool(world, &args).await?.ok()?;
    serde_json::from_str(&said).with_context(|| said)
}

async fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .await
        .with_context(|| program.to_owned())?;
    ensure!(output.status.success(), "{program} {args:?}: {output:?}");
    Ok(())
}

async fn a_memory_goes_through_the_tool(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("packed").await?;
    exec::sh(api, &id, FILL).await?;
    let sum = exec::sh(api, &id, SUM).await?;
    let memory = folder(world, &id).join("memory");
    let work = world.server.dir.join(world.unique("tool"));
    fs::create_dir(&work)?;
    let (packed, back, theirs) = (work.join("packed"), work.join("back"), work.join("theirs"));
    for (algorithm, level, found) in [
        ("zstd", None, 1),
        ("lz4", None, 0),
        // Users write it as they like.
        ("ZSTD", Some("6"), 6),
    ] {
        standby(world, &id).await?;
        let before = fs::metadata(&memory)?;
        let mut args = vec!["compress", "--algorithm", algorithm];
        args.extend(level.map(|level| ["--level", level]).into_iter().flatten());
        args.extend([text(&memory)?, "-o", text(&packed)?]);
        let made = json(world, &args).await?;
        let size = fs::metadata(&packed)?.len();
        ensure!(
            made["algorithm"] == algorithm.to_lowercase()
                && made["level"] == found
                && made["raw_size"] == before.len()
                && made["compressed_size"] == size
                && made["frames"] == before.len().div_ceil(1 << 20)
                // The noise is all there, the text is not, and most of the guest is empty.
                && (24 << 20..100 << 20).contains(&size)
                && made["zero_chunks"].as_u64() > Some(0),
            "{made}"
        );
        let said = json(world, &["inspect", text(&packed)?]).await?;
        ensure!(said["compressed_size"] == size && said["ratio"] == made["ratio"]);
        let said = tool(world, &["verify", text(&packed)?]).await?.ok()?;
        ensure!(said.starts_with("intact: "), "{said}");

        // Plain tools give the same file back.
        let mut args = vec!["-d", "-q", "-f", text(&packed)?];
        if made["algorithm"] == "zstd" {
            args.push("-o");
        }
        args.push(text(&theirs)?);
        let plain = made["algorithm"].as_str().context("algorithm")?;
        run(plain, &args).await?;
        run("cmp", &[text(&memory)?, text(&theirs)?]).await?;

        // Ours too, with no more of it on the disk than before, and the guest does not notice.
        let args = ["decompress", text(&packed)?, "-o", text(&back)?];
        json(world, &args).await?;
        run("cmp", &[text(&memory)?, text(&back)?]).await?;
        let after = fs::metadata(&back)?;
        ensure!(
            after.blocks() <= before.blocks() + 128,
            "{} blocks became {}",
            before.blocks(),
            after.blocks()
        );
        fs::rename(&back, &memory)?;
        restore(world, &id).await?;
        ensure!(exec::sh(api, &id, SUM).await? == sum, "the guest's data");
        fs::remove_file(&packed)?;
        fs::remove_file(&theirs)?;
    }
    api.remove(&id).await
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

async fn the_tool_leaves_nothing_behind(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = world.boot_tiny("damaged").await?;
    exec::sh(api, &id, FILL).await?;
    standby(world, &id).await?;
    let memory = folder(world, &id).join("memory");
    let work = world.server.dir.join(world.unique("tool"));
    fs::create_dir(&work)?;
    let (packed, back) = (work.join("packed"), work.join("back"));
    let compress = |level| -> Result<_> {
        let args = ["compress", "--algorithm", "zstd", "--level", level];
        Ok([&args[..], &[text(&memory)?, "-o", text(&packed)?]].concat())
    };
    let refused = |output: Output, words: &[&str]| {
        let said = format!("{}: {:?} {:?}", output.code, output.out, output.err);
        ensure!(output.code == 1 && output.out.is_empty(), "{said}");
        ensure!(output.err.trim_end().lines().count() == 1, "{said}");
        for word in words {
            ensure!(output.err.contains(word), "no {word:?}: {said}");
        }
        Ok(())
    };
    refused(tool(world, &compress("20")?).await?, &["20", "1", "19"])?;
    ensure!(names(&work)?.is_empty());

    // Interrupted in the middle of a level that takes its time.
    let mut child = Command::new(&world.tools.doze)
        .arg("snapshot-tool")
        .args(compress("19")?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let begun = async {
        while names(&work)?.is_empty() {
            ensure!(child.try_wait()?.is_none(), "it ended before it began");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = pid.and_then(Pid::from_raw).context("its pid")?;
        kill_process(pid, Signal::INT).context("interrupt it")
    };
    begun.await?;
    let ended = child.wait_with_output().await?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(
        ended.status.code() == Some(130) && said.contains("nothing was left behind"),
        "{ended:?}"
    );
    ensure!(names(&work)?.is_empty(), "{:?}", names(&work)?);

    // What is there is not written over.
    tool(world, &compress("1")?).await?.ok()?;
    refused(tool(world, &compress("1")?).await?, &["packed", "exists"])?;
    // A damaged one is refused with the place, by whoever reads it.
    let file = File::options().read(true).write(true).open(&packed)?;
    let middle = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[byte[0] ^ 0x10], middle)?;
    drop(file);
    for args in [
        &["verify", text(&packed)?][..],
        &["decompress", text(&packed)?, "-o", text(&back)?],
    ] {
        refused(tool(world, args).await?, &["chunk ", "at byte "])?;
    }
    ensure!(names(&work)? == ["packed"], "{:?}", names(&work)?);
    restore(world, &id).await?;
    api.remove(&id).await
}
