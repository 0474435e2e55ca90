//! Servers whose host lacks something, or whose limits are small. Each case configures its own.
use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Case, World, exec,
    procs::Footprint,
    server::{Server, ServerOptions},
    world::import_tiny,
};
use serde_json::json;
use tokio::net::TcpListener;

pub fn cases() -> Vec<Case> {
    doze_e2e::cases![
        kernel_missing,
        qemu_missing,
        capacity_limits,
        guest_to_host_allowed,
        configuration_errors,
        token_is_private,
    ]
}

/// The error first, then the end of this server's log.
fn with_log<T>(outcome: Result<T>, server: &Server) -> Result<T> {
    outcome.map_err(|e| anyhow::anyhow!("{e:#}\n{}", server.log_tail()))
}

/// A create that must fail with `dependency_missing` naming the path, and leave nothing.
async fn missing(world: &World, options: ServerOptions, path: &str) -> Result<()> {
    let server = world.another_server(&options)?;
    server
        .start()
        .await
        .context("a server that lacks something must still start")?;
    let outcome = async {
        import_tiny(&world.tools, &server).await?;
        let api = server.api().await?;
        let before = Footprint::take(&server.data_dir, &server.bridge)?;
        for _ in 0..2 {
            let reply = api.post("/instances", world.tiny("never")).await?;
            reply.refused(reply.status, "dependency_missing", &[path])?;
            ensure!(
                reply.status >= 500,
                "{} is the client's fault?",
                reply.status
            );
        }
        ensure!(
            api.instances().await?.is_empty(),
            "a failed create left its record"
        );
        let after = Footprint::take(&server.data_dir, &server.bridge)?;
        ensure!(
            after.taps.is_empty() && after.vmms.is_empty(),
            "{:?}",
            after.new_since(&before)
        );
        let left: Vec<_> = after
            .new_since(&before)
            .into_iter()
            .filter(|l| l.contains("instances/"))
            .collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        let capabilities = api.get("/capabilities").await?.expect(200)?;
        Ok(capabilities)
    };
    let outcome = with_log(outcome.await, &server);
    server.stop().await?;
    let capabilities = outcome?;
    if options.qemu.is_some() {
        ensure!(
            capabilities["default_runtime"]["available"] == false,
            "claims what it cannot do: {capabilities}"
        );
    }
    Ok(())
}

async fn kernel_missing(world: &World) -> Result<()> {
    let options = ServerOptions {
        kernel: Some(PathBuf::from("/no/such/vmlinuz")),
        ..ServerOptions::default()
    };
    missing(world, options, "/no/such/vmlinuz").await
}

async fn qemu_missing(world: &World) -> Result<()> {
    let options = ServerOptions {
        qemu: Some(PathBuf::from("/no/such/qemu")),
        ..ServerOptions::default()
    };
    missing(world, options, "/no/such/qemu").await
}

async fn capacity_limits(world: &World) -> Result<()> {
    let limits = "default_memory = \"256MB\"\ndefault_overlay = \"64MB\"\nmax_instances = 2\nmax_vcpus_per_instance = 2\nmax_memory_per_instance = \"512MB\"\nmax_total_memory = \"640MB\"\nmax_overlay = \"1GB\"";
    let options = ServerOptions {
        limits: limits.into(),
        ..ServerOptions::default()
    };
    let server = world.another_server(&options)?;
    server.start().await?;
    let outcome = with_log(limits_hold(world, &server).await, &server);
    server.stop().await?;
    outcome
}

async fn limits_hold(world: &World, server: &Server) -> Result<()> {
    import_tiny(&world.tools, server).await?;
    let api = server.api().await?;
    let with = |field: &str, value: serde_json::Value| {
        let mut request = world.tiny("limit");
        request[field] = value;
        request
    };
    api.post("/instances", with("size", json!("513MB")))
        .await?
        .refused(400, "invalid_size", &["size", "512MB"])?;
    api.post("/instances", with("overlay_size", json!("2GB")))
        .await?
        .refused(400, "invalid_size", &["overlay_size", "1GB"])?;
    api.post("/instances", with("vcpus", json!(3)))
        .await?
        .refused(400, "invalid_field", &["vcpus", "3", "2"])?;
    let first = api.create(with("size", json!("512MB"))).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    let before = Footprint::take(&server.data_dir, &server.bridge)?;
    let reply = api.post("/instances", world.tiny("limit")).await?;
    reply.refused(reply.status, "insufficient_capacity", &["memory"])?;
    let left = Footprint::take(&server.data_dir, &server.bridge)?.new_since(&before);
    ensure!(left.is_empty(), "left behind: {left:?}");
    // A Stopped instance holds no memory, but its place in the count.
    api.post_empty(&format!("/instances/{first}/stop"))
        .await?
        .expect(200)?;
    let second = api.create(world.tiny("limit")).await?["id"]
        .as_str()
        .context("id")?
        .to_owned();
    let reply = api.post_empty(&format!("/instances/{first}/start")).await?;
    reply.refused(reply.status, "insufficient_capacity", &["memory"])?;
    ensure!(api.instance(&first).await?["state"] == "Stopped");
    let reply = api.post("/instances", world.tiny("limit")).await?;
    reply.refused(reply.status, "insufficient_capacity", &["instances"])?;
    api.remove(&first).await?;
    api.remove(&second).await
}

async fn guest_to_host_allowed(world: &World) -> Result<()> {
    let options = ServerOptions {
        network_extra: "guest_to_host = true".into(),
        ..ServerOptions::default()
    };
    let server = world.another_server(&options)?;
    server.start().await?;
    let outcome = async {
        import_tiny(&world.tools, &server).await?;
        let api = server.api().await?;
        let id = api.create(world.tiny("inward")).await?["id"]
            .as_str()
            .context("id")?
            .to_owned();
        api.wait(&id, "Running", 90).await?;
        let gateway = server.gateway();
        let listener = TcpListener::bind((gateway.as_str(), 0)).await?;
        let port = listener.local_addr()?.port();
        let accept = async {
            let accepted =
                tokio::time::timeout(std::time::Duration::from_secs(30), listener.accept()).await;
            // The connection is closed here, or the guest's nc would wait for more.
            accepted.map(|accepted| accepted.map(|(_, peer)| peer))
        };
        let command = format!("nc -w 5 {gateway} {port} </dev/null");
        let command = ["sh", "-c", &command];
        let (accepted, _) = tokio::join!(accept, exec::run(&api, &id, &command));
        let peer = accepted.context("the guest did not reach the host")??;
        let instance = api.instance(&id).await?;
        ensure!(
            instance["network"]["ip"] == peer.ip().to_string(),
            "seen as {peer}"
        );
        api.remove(&id).await
    };
    let outcome = with_log(outcome.await, &server);
    server.stop().await?;
    outcome
}

/// All mistakes at once, each with its key; unknown keys too; and nothing is made.
async fn configuration_errors(world: &World) -> Result<()> {
    let server = world.another_server(&ServerOptions::default())?;
    let good = fs::read_to_string(&server.config)?;
    let bad = good
        .replace("listen = \"127.0.0.1:", "listen = \"nowhere:")
        .replace("[limits]", "[limits]\ndefault_memory = \"plenty\"\n")
        .replace("[kernel]", "[kernel]\nno_such_key = 1\n");
    fs::write(&server.config, bad)?;
    let (status, log) = server.start_must_fail().await?;
    ensure!(!status.success());
    for word in ["listen", "default_memory", "plenty", "no_such_key"] {
        ensure!(log.contains(word), "the errors do not name {word}: {log}");
    }
    ensure!(
        !server.data_dir.exists(),
        "a server that did not start made its data folder"
    );
    Ok(())
}

async fn token_is_private(world: &World) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    world.api().await?;
    let token = world.server.token().await?;
    ensure!(token.split('.').count() == 3, "not a JWT: {token}");
    let mode = fs::metadata(&world.server.data_dir)?.permissions().mode() & 0o777;
    ensure!(mode == 0o700, "data_dir has mode {mode:o}");
    // The generated secret lies somewhere below; no file of the server is readable by others.
    let mut secret = false;
    for entry in fs::read_dir(&world.server.data_dir)? {
        let entry = entry?;
        let mode = entry.metadata()?.permissions().mode();
        if entry.file_name().to_string_lossy().contains("secret") {
            secret = true;
            ensure!(
                mode & 0o777 == 0o600,
                "{} has mode {mode:o}",
                entry.path().display()
            );
        }
    }
    ensure!(secret, "no generated secret in data_dir");
    let log = fs::read_to_string(&world.server.log)?;
    ensure!(!log.contains(&token), "the token is in the log");
    Ok(())
}
