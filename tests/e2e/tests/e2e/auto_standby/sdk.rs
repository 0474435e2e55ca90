//! Every status and reason that can be produced, through the published SDKs. What they check is in
//! `tests/sdk`; what their API cannot bring about is done here for them.
use std::{path::Path, process::Stdio};

use doze_e2e::procs::{self, Held};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    process::Command,
};

use super::*;
use crate::crash_standby::only_vmm;

/// Pairs of status and reason: all but `has_vgpu` and `missing_ip`, which no instance here can have.
const PAIRS: &str = "10 pairs of status and reason";
const SEEING: [(&str, &str); 2] = [
    ("DOZE_AUTO_STANDBY__MAX_CONCURRENT", "1"),
    ("DOZE_TEST_CUT_CONNTRACK", "4s"),
];

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![python_knows_every_status, typescript_knows_every_status]
}

async fn python_knows_every_status(world: &World) -> Result<()> {
    run(world, &world.tools.python, "python/auto_standby.py").await
}

async fn typescript_knows_every_status(world: &World) -> Result<()> {
    run(world, Path::new("node"), "typescript/auto_standby.mjs").await
}

async fn run(world: &World, interpreter: &Path, script: &str) -> Result<()> {
    let api = world.api().await?;
    world.server.stop().await?;
    world.server.start_with(&SEEING).await?;
    let mut child = Command::new(interpreter)
        .arg(world.tools.workspace.join("tests/sdk").join(script))
        .env("DOZE_URL", world.server.base_url())
        .env("DOZE_TOKEN", api.token.as_deref().context("token")?)
        .env("DOZE_SDK_NODE_DIR", &world.tools.node_dir)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("{}", interpreter.display()))?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let mut stderr = child.stderr.take().context("stderr")?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let (mut last, mut complaints) = (String::new(), String::new());
    let conversation = async {
        let mut held = None;
        while let Some(line) = lines.next_line().await? {
            match line.strip_prefix('@') {
                Some(wish) => {
                    grant(world, wish, &mut held).await.context(line.clone())?;
                    stdin.write_all(b"done\n").await?;
                }
                None => println!("    {line}"),
            }
            last = line;
        }
        anyhow::Ok(())
    };
    let (talked, read) = tokio::join!(conversation, stderr.read_to_string(&mut complaints));
    read?;
    let status = child.wait().await?;
    world.server.stop().await?;
    world.server.start().await?;
    ensure!(status.success(), "{status}, after {last:?}\n{complaints}");
    talked?;
    ensure!(last.contains(PAIRS), "it ended with {last:?}");
    Ok(())
}

async fn grant(world: &World, wish: &str, held: &mut Option<Held>) -> Result<()> {
    match wish.split_once(' ').unwrap_or((wish, "")) {
        ("freeze", id) => *held = Some(Held::new(only_vmm(world, id)?)?),
        ("thaw", "") => held.take().context("nothing is frozen")?.release()?,
        ("deaf", "") => procs::signal_usr2(world.server.pid().await?)?,
        ("blind", "") => {
            world.server.stop().await?;
            let blind = [("DOZE_NETWORK__ENABLED", "false")];
            world.server.start_with(&blind).await?;
        }
        ("see", "") => {
            world.server.stop().await?;
            world.server.start_with(&SEEING).await?;
        }
        _ => bail!("nobody knows how"),
    }
    Ok(())
}
