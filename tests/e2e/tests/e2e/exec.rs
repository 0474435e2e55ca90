//! Commands in a guest.
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use doze_e2e::{
    Case, World,
    exec::{self, Event, Exec},
};
use serde_json::json;
use sha2::{Digest as _, Sha256};

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        exec_exit_codes,
        exec_merges_output,
        exec_command_not_found,
        exec_env_and_cwd,
        exec_stdin,
        exec_tty_and_resize,
        exec_timeout,
        exec_waits_for_agent,
        exec_large_output,
        exec_two_at_once,
        exec_hang_up_kills_the_command,
        exec_refusals,
    ]
}

async fn exec_exit_codes(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    for code in [0, 1, 3, 42, 255] {
        let outcome = exec::run(api, id, &["sh", "-c", &format!("exit {code}")]).await?;
        ensure!(
            outcome.code == code,
            "exit {code} came back as {}",
            outcome.code
        );
    }
    let killed = exec::run(api, id, &["sh", "-c", "kill -9 $$"]).await?;
    ensure!(killed.code == 137, "SIGKILL came back as {}", killed.code);
    let terminated = exec::run(api, id, &["sh", "-c", "kill -15 $$"]).await?;
    ensure!(
        terminated.code == 143,
        "SIGTERM came back as {}",
        terminated.code
    );
    Ok(())
}

async fn exec_merges_output(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let outcome = exec::run(
        api,
        id,
        &["sh", "-c", "echo out; echo err >&2; printf last"],
    )
    .await?;
    ensure!(outcome.text() == "out\nerr\nlast", "{:?}", outcome.text());
    // Bytes that are no text arrive as they are.
    let outcome = exec::run(api, id, &["printf", "\\377\\000\\n\\001"]).await?;
    ensure!(outcome.output == b"\xff\0\n\x01", "{:?}", outcome.output);
    Ok(())
}

async fn exec_command_not_found(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let outcome = exec::run(api, id, &["no-such-command"]).await?;
    ensure!(outcome.code == 127, "{outcome:?}");
    let outcome = exec::run(api, id, &["/srv/not-executable"]).await?;
    ensure!(outcome.code == 126, "{outcome:?}");
    Ok(())
}

async fn exec_env_and_cwd(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let request = json!({
        "command": ["sh", "-c", "echo \"$A|$FROM_IMAGE|$PATH|$PWD\""], "tty": false,
        "env": {"A": "two words", "FROM_IMAGE": "over"}, "cwd": "/srv"
    });
    let outcome = exec::run_with(api, id, &request).await?;
    ensure!(
        outcome.ok()? == "two words|over|/bin|/srv",
        "{}",
        outcome.text()
    );
    let absent = exec::run_with(
        api,
        id,
        &json!({"command": ["true"], "tty": false, "cwd": "/no/such/dir"}),
    )
    .await;
    ensure!(
        !absent.is_ok_and(|o| o.code == 0),
        "a command ran in a folder that does not exist"
    );
    Ok(())
}

async fn exec_stdin(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    // There is no end-of-input frame: the command must know when it has enough.
    let mut session = Exec::open(
        api,
        id,
        &json!({"command": ["sh", "-c", "read a; read b; echo \"<$b,$a>\""], "tty": false}),
    )
    .await?;
    session.stdin(b"first\nsec").await?;
    session.stdin(b"ond\n").await?;
    ensure!(session.finish().await?.ok()? == "<second,first>");
    // More than any buffer on the way holds.
    let data: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let want = hex::encode(Sha256::digest(&data));
    let command = json!(["sh", "-c", format!("head -c {} | sha256sum", data.len())]);
    let mut session = Exec::open(api, id, &json!({"command": command, "tty": false})).await?;
    for piece in data.chunks(64 * 1024) {
        session.stdin(piece).await?;
    }
    let got = tokio::time::timeout(Duration::from_secs(60), session.finish())
        .await
        .context("stdin hangs")??
        .ok()?;
    ensure!(
        got.starts_with(&want),
        "the guest received other bytes: {got}, sent {want}"
    );
    Ok(())
}

async fn exec_tty_and_resize(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let request = json!({"command": ["sh", "-c", "tty; stty size; read x; stty size; echo bye"], "tty": true, "rows": 31, "cols": 101});
    let mut session = Exec::open(api, id, &request).await?;
    let first = session.until(|t| t.contains("31 101\r\n")).await?;
    ensure!(
        first.contains("/dev/pts/") || first.contains("/dev/console"),
        "no terminal: {first:?}"
    );
    session.resize(17, 66).await?;
    session.stdin(b"go\r").await?;
    let outcome = session.finish().await?;
    ensure!(
        outcome.code == 0 && outcome.text().contains("17 66\r\n") && outcome.text().contains("bye"),
        "{:?}",
        outcome.text()
    );
    // ^C is the terminal's business: it reaches the foreground process as SIGINT.
    let mut session = Exec::open(
        api,
        id,
        &json!({"command": ["sh", "-c", "echo up; sleep 1000"], "tty": true}),
    )
    .await?;
    session.until(|t| t.contains("up")).await?;
    session.stdin(b"\x03").await?;
    let outcome = tokio::time::timeout(Duration::from_secs(20), session.finish())
        .await
        .context("^C does nothing")??;
    ensure!(outcome.code == 130, "^C came back as {}", outcome.code);
    let plain = exec::run(
        api,
        id,
        &["sh", "-c", "test -t 0 || test -t 1 || echo no terminal"],
    )
    .await?;
    ensure!(plain.ok()? == "no terminal");
    Ok(())
}

async fn exec_timeout(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    let request =
        json!({"command": ["sh", "-c", "echo $$; sleep 1000 & wait"], "tty": false, "timeout": 2});
    let started = Instant::now();
    let outcome = exec::run_with(api, id, &request).await?;
    ensure!(outcome.code == 124, "{outcome:?}");
    ensure!(
        started.elapsed() >= Duration::from_millis(1_500),
        "killed after {:?}",
        started.elapsed()
    );
    let pid = outcome.text().trim().to_owned();
    // Its whole process group is gone.
    exec::sh(api, id, &format!("! kill -0 -{pid} 2>/dev/null")).await?;
    Ok(())
}

async fn exec_waits_for_agent(world: &World) -> Result<()> {
    let api = world.api().await?;
    let id = api.create(world.tiny("early")).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    // No wait for Running first: that is the point.
    let outcome = exec::run_with(
        api,
        &id,
        &json!({"command": ["echo", "there"], "tty": false, "wait_for_agent": 60}),
    )
    .await?;
    ensure!(outcome.ok()? == "there");
    api.remove(&id).await
}

async fn exec_large_output(world: &World) -> Result<()> {
    const SIZE: usize = 10 << 20;
    let (api, id) = (world.api().await?, world.pet().await?);
    let line = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    let want: Vec<u8> = line.iter().copied().cycle().take(SIZE).collect();
    let text = String::from_utf8_lossy(line).trim().to_owned();
    let request =
        json!({"command": ["sh", "-c", format!("yes {text} | head -c {SIZE}")], "tty": false});
    let session = Exec::open(api, id, &request).await?;
    let outcome = tokio::time::timeout(Duration::from_secs(120), session.finish())
        .await
        .context("10 MiB take too long")??;
    ensure!(
        outcome.output.len() == SIZE,
        "{} of {SIZE} bytes arrived",
        outcome.output.len()
    );
    ensure!(
        Sha256::digest(&outcome.output) == Sha256::digest(&want),
        "other bytes arrived"
    );
    Ok(())
}

async fn exec_two_at_once(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    // Each waits for a file that the other makes: they can only end if they run at the same time.
    let meet = |mine: &str, other: &str| {
        format!("touch /tmp/{mine}; while ! test -e /tmp/{other}; do sleep 0.1; done; echo {mine}")
    };
    let (one, two) = (meet("one", "two"), meet("two", "one"));
    let (first, second) = tokio::join!(exec::sh(api, id, &one), exec::sh(api, id, &two));
    ensure!(first? == "one" && second? == "two");
    Ok(())
}

async fn exec_hang_up_kills_the_command(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    for tty in [false, true] {
        let request =
            json!({"command": ["sh", "-c", "echo pid $$; sleep 1000 & wait"], "tty": tty});
        let mut session = Exec::open(api, id, &request).await?;
        let said = session.until(|t| t.contains('\n')).await?;
        let pid: u32 = said
            .trim()
            .trim_start_matches("pid ")
            .parse()
            .with_context(|| format!("{said:?}"))?;
        exec::sh(api, id, &format!("kill -0 {pid}")).await?;
        session.hang_up();
        let gone = format!(
            "i=0; while kill -0 {pid} 2>/dev/null; do i=$((i+1)); test $i -lt 100 || exit 1; sleep 0.1; done"
        );
        exec::sh(api, id, &gone)
            .await
            .with_context(|| format!("tty {tty}: the command outlived its client"))?;
    }
    Ok(())
}

async fn exec_refusals(world: &World) -> Result<()> {
    let (api, id) = (world.api().await?, world.pet().await?);
    // A request that makes no sense never ends in an exit code.
    for request in [
        json!({"command": [], "tty": false}),
        json!({"command": ["true"], "tty": false, "no_such_field": 1}),
        json!({"command": ["true"], "tty": false, "rows": 10}),
        json!("not an object"),
    ] {
        let mut session = Exec::open(api, id, &request).await?;
        match tokio::time::timeout(Duration::from_secs(20), session.next())
            .await
            .context("no answer")??
        {
            Event::Closed(Some((_, reason))) => {
                ensure!(!reason.is_empty(), "{request}: closed without a reason")
            }
            Event::Text(text) => ensure!(
                text.contains("message") || text.contains("error"),
                "{request}: {text}"
            ),
            other => bail!("{request}: {other:?}"),
        }
    }
    let request = json!({"command": ["true"], "tty": false});
    let exec::Opened::Refused(reply) = Exec::try_open(api, "no-such-instance", &request).await?
    else {
        bail!("exec into nothing was upgraded");
    };
    reply.refused(404, "not_found", &["no-such-instance"])?;
    let exec::Opened::Refused(reply) = Exec::try_open(&api.with_token(None), id, &request).await?
    else {
        bail!("exec without a token was upgraded");
    };
    reply.refused(401, "unauthorized", &[])?;
    let stopped = world.boot_tiny("asleep").await?;
    api.post_empty(&format!("/instances/{stopped}/stop"))
        .await?
        .expect(200)?;
    let exec::Opened::Refused(reply) = Exec::try_open(api, &stopped, &request).await? else {
        bail!("exec into a Stopped instance was upgraded");
    };
    reply.refused(409, "invalid_state", &["Stopped"])?;
    api.remove(&stopped).await
}
