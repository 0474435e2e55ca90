//! What one group's cases share: a server of its own, images, and a guest that many cases may visit.
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::{
    Api, image,
    preflight::Tools,
    procs::{self, Footprint},
    sandbox::Sandbox,
    server::{Server, ServerOptions, tail},
};

static NEXT_SERVER: AtomicU8 = AtomicU8::new(1);

/// What differs between groups.
#[derive(Debug, Clone, Default)]
pub struct WorldOptions {
    /// Hypervisor of the group's instances; empty: `qemu-microvm`.
    pub hypervisor: String,
    pub server: ServerOptions,
}

/// Everything a case can use.
pub struct World {
    pub tools: Arc<Tools>,
    pub sandbox: Arc<Sandbox>,
    /// Group's name.
    pub name: String,
    /// `qemu` or `qemu-microvm`.
    pub hypervisor: String,
    pub server: Server,
    started: OnceCell<Api>,
    demo: OnceCell<()>,
    pet: OnceCell<String>,
    counter: AtomicU32,
}

impl World {
    pub fn new(
        tools: Arc<Tools>,
        sandbox: Arc<Sandbox>,
        name: &str,
        options: &WorldOptions,
    ) -> Result<Self> {
        let index = NEXT_SERVER.fetch_add(1, Ordering::Relaxed);
        let dir = sandbox.home.join(index.to_string());
        let hypervisor = if options.hypervisor.is_empty() {
            "qemu-microvm"
        } else {
            &options.hypervisor
        };
        let server_options = ServerOptions {
            default_hypervisor: hypervisor.to_owned(),
            ..options.server.clone()
        };
        let server = Server::configure(&tools, dir, index, &server_options)?;
        Ok(Self {
            tools,
            sandbox,
            name: name.to_owned(),
            hypervisor: hypervisor.to_owned(),
            server,
            started: OnceCell::new(),
            demo: OnceCell::new(),
            pet: OnceCell::new(),
            counter: AtomicU32::new(1),
        })
    }

    /// A second server of this world's kind, with its own data folder, bridge and subnet; not started.
    pub fn another_server(&self, options: &ServerOptions) -> Result<Server> {
        let index = NEXT_SERVER.fetch_add(1, Ordering::Relaxed);
        Server::configure(
            &self.tools,
            self.sandbox.home.join(index.to_string()),
            index,
            options,
        )
    }

    /// The running server's API, with the tiny images imported. Starts it on first use.
    pub async fn api(&self) -> Result<&Api> {
        let api = self
            .started
            .get_or_try_init(|| async {
                self.server.start().await?;
                import_tiny(&self.tools, &self.server).await?;
                self.server.api().await
            })
            .await?;
        // A case that failed half way may have left it down; the next ones are not to blame.
        if !self.server.running().await {
            self.server.start().await?;
        }
        Ok(api)
    }

    /// The API, with the demo image (redis) imported as `demo`.
    pub async fn api_with_demo(&self) -> Result<&Api> {
        let api = self.api().await?;
        self.demo
            .get_or_try_init(|| async {
                self.server
                    .import("demo", &self.tools.demo_image)
                    .await
                    .context("import the demo image")
                    .map(drop)
            })
            .await?;
        Ok(api)
    }

    /// A name no other instance of this world has.
    pub fn unique(&self, stem: &str) -> String {
        format!("{stem}-{}", self.counter.fetch_add(1, Ordering::Relaxed))
    }

    /// A create request for a tiny guest on this world's hypervisor.
    pub fn tiny(&self, stem: &str) -> Value {
        json!({
            "name": self.unique(stem), "image": "tiny", "hypervisor": self.hypervisor,
            "size": "256MB", "overlay_size": "64MB", "vcpus": 1
        })
    }

    /// As [`World::tiny`], running this instead of the image's command.
    pub fn tiny_running(&self, stem: &str, cmd: &[&str]) -> Value {
        let mut request = self.tiny(stem);
        request["cmd"] = json!(cmd);
        request
    }

    /// Creates and waits until Running; the id.
    pub async fn boot(&self, request: Value) -> Result<String> {
        let api = self.api().await?;
        let instance = api.create(request).await?;
        let id = instance["id"].as_str().context("id")?.to_owned();
        api.wait(&id, "Running", 90).await?;
        Ok(id)
    }

    /// Boots a tiny guest.
    pub async fn boot_tiny(&self, stem: &str) -> Result<String> {
        self.boot(self.tiny(stem)).await
    }

    /// A Running tiny guest that cases may look at and run commands in, but must leave Running.
    pub async fn pet(&self) -> Result<&str> {
        self.pet
            .get_or_try_init(|| self.boot_tiny("pet"))
            .await
            .map(String::as_str)
    }

    /// What the host holds for this world's server.
    pub fn footprint(&self) -> Result<Footprint> {
        Footprint::take(&self.server.data_dir, &self.server.bridge)
    }

    /// Deletes every instance over the API, then looks whether anything of them is left; stops the server.
    pub async fn tear_down(&self) -> Result<()> {
        let outcome = self.delete_everything().await;
        self.server.stop().await?;
        outcome?;
        let left = procs::vmms(&self.server.data_dir)?;
        ensure!(
            left.is_empty(),
            "VMMs live on after everything was deleted: {left:?}"
        );
        let taps = procs::taps(&self.server.bridge)?;
        ensure!(
            taps.is_empty(),
            "TAPs are left after everything was deleted: {taps:?}"
        );
        let folders = instance_folders(&self.server.data_dir)?;
        ensure!(
            folders.is_empty(),
            "folders are left after everything was deleted: {folders:?}"
        );
        Ok(())
    }

    async fn delete_everything(&self) -> Result<()> {
        let Some(api) = self.started.get() else {
            return Ok(());
        };
        for instance in api.instances().await? {
            api.remove(instance["id"].as_str().context("id")?).await?;
        }
        let left = api.instances().await?;
        ensure!(
            left.is_empty(),
            "instances are listed after everything was deleted: {left:?}"
        );
        Ok(())
    }

    /// What helps to understand a failure: the server's log and every instance's logs.
    pub async fn diagnose(&self) -> String {
        let mut text = self.server.log_tail();
        text.push('\n');
        for log in log_files(&self.server.data_dir.join("instances"), 3) {
            let _infallible = writeln!(text, "--- {} (end)\n{}", log.display(), tail(&log, 15));
        }
        text
    }
}

/// Imports the tiny images into a running server.
pub async fn import_tiny(tools: &Tools, server: &Server) -> Result<()> {
    for spec in image::tiny_images() {
        let layout = server.dir.join(format!("layout-{}", spec.name));
        image::write_layout(
            &layout,
            &image::busybox_files(&tools.busybox)?,
            std::slice::from_ref(&spec),
        )?;
        server
            .import(spec.name, &layout)
            .await
            .with_context(|| format!("import {}", spec.name))?;
    }
    Ok(())
}

/// Names of the folders that hold instances.
pub fn instance_folders(data_dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    match fs::read_dir(data_dir.join("instances")) {
        Ok(entries) => {
            for entry in entries {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    names.sort();
    Ok(names)
}

fn log_files(dir: &Path, depth: u8) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(dir) else {
        return found;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() && depth > 0 {
            found.extend(log_files(&path, depth - 1));
        } else if path.extension().is_some_and(|e| e == "log") {
            found.push(path);
        }
    }
    found
}
