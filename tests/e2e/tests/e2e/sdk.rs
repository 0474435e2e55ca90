//! The published SDKs, unmodified, on one server. What they check is in `tests/sdk`.
use std::{path::Path, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{Case, World};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![python_sdk, typescript_sdk]
        .into_iter()
        .map(|case| case.deadline(Duration::from_secs(600)))
        .collect()
}

async fn python_sdk(world: &World) -> Result<()> {
    let script = world
        .tools
        .workspace
        .join("tests/sdk/python/conformance.py");
    run(world, "python", &world.tools.python, &script).await
}

async fn typescript_sdk(world: &World) -> Result<()> {
    let script = world
        .tools
        .workspace
        .join("tests/sdk/typescript/conformance.mjs");
    run(world, "typescript", Path::new("node"), &script).await
}

/// Runs the script and passes its report on. Its last line must count at least 15 cases, so that an
/// emptied script does not pass.
async fn run(world: &World, language: &str, interpreter: &Path, script: &Path) -> Result<()> {
    let api = world.api().await?;
    // Keeps the image in use, and so its deletion refused, while the script's own instance is away.
    world.pet().await?;
    let layout = world.server.dir.join("layout-tiny-numeric");
    world
        .server
        .import(&format!("spare-{language}:1"), &layout)
        .await?;
    let mut child = Command::new(interpreter)
        .arg(script)
        .env("DOZE_URL", world.server.base_url())
        .env("DOZE_TOKEN", api.token.as_deref().context("token")?)
        .env("DOZE_SDK_NODE_DIR", &world.tools.node_dir)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{}", interpreter.display()))?;
    let mut stderr = child.stderr.take().context("stderr")?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let (mut last, mut complaints) = (String::new(), String::new());
    let report = async {
        while let Some(line) = lines.next_line().await? {
            println!("    {line}");
            last = line;
        }
        anyhow::Ok(())
    };
    let (reported, read) = tokio::join!(report, stderr.read_to_string(&mut complaints));
    reported?;
    read?;
    let status = child.wait().await?;
    ensure!(
        status.success(),
        "{language}: {status}, after {last:?}\n{complaints}"
    );
    let passed = last.split(' ').nth(1).and_then(|n| n.parse::<u32>().ok());
    ensure!(
        passed.is_some_and(|n| n >= 15),
        "{language} ended with {last:?}"
    );
    doze_e2e::compression::balanced(api).await.map(drop)
}
