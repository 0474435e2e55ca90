//! What the memory codec is measured with: the memory of a real guest that sleeps, and a dense file.
use std::{
    collections::VecDeque,
    ffi::OsStr,
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{World, exec};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

const MIB: usize = 1 << 20;
/// In the guest: files of this host and, of eight parts one, what nothing compresses.
const MIXED: usize = 224 * MIB;
const NOISE: usize = 32 * MIB;
const DENSE: usize = 1024 * MIB;
const PORT: u16 = 9000;

/// Writes `memory` and `dense` into `folder`, which exists.
pub async fn make(world: &World, folder: &Path) -> Result<()> {
    let mut host = HostFiles::new();
    let mixed = host.take(MIXED)?;
    guest_memory(world, &mixed, &folder.join("memory")).await?;
    drop(mixed);
    // From the first file on again: what the guest holds and what is dense are measured apart.
    let mut host = HostFiles::new();
    let mut dense = File::create_new(folder.join("dense"))?;
    for _ in 0..DENSE / MIB {
        dense.write_all(&host.take(MIB)?)?;
    }
    dense.sync_all().context("dense")
}

/// A guest of 2 GiB with this in its memory, put to standby.
async fn guest_memory(world: &World, mixed: &[u8], to: &Path) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("packed");
    request["size"] = json!("2GB");
    let id = world.boot(request).await?;
    let script = format!(
        "mount -o remount,size=1G /dev/shm && (nc -l -p {PORT} > /dev/shm/mixed </dev/null; \
         touch /dev/shm/all) >/dev/null 2>&1 &"
    );
    exec::sh(api, &id, &script).await?;
    let instance = api.instance(&id).await?;
    let ip = instance["network"]["ip"].as_str().context("ip")?;
    let mut stream = connect(&format!("{ip}:{PORT}")).await?;
    stream.write_all(mixed).await?;
    stream.shutdown().await?;
    let noise = NOISE / MIB;
    let script = format!(
        "while ! test -e /dev/shm/all; do sleep 0.1; done; \
         dd if=/dev/urandom of=/dev/shm/noise bs=1M count={noise} 2>/dev/null && sha256sum < /dev/shm/mixed"
    );
    let found = exec::sh(api, &id, &script).await?;
    let sum = hex::encode(Sha256::digest(mixed));
    ensure!(found.starts_with(&sum), "the guest has {found}, not {sum}");
    api.post_empty(&format!("/instances/{id}/standby"))
        .await?
        .expect(200)?;
    // Holes as holes; of a sleeper nobody writes it.
    let memory = world
        .server
        .data_dir
        .join("instances")
        .join(&id)
        .join("memory");
    let copied = Command::new("cp")
        .args([
            OsStr::new("--sparse=auto"),
            memory.as_os_str(),
            to.as_os_str(),
        ])
        .status()
        .context("cp")?;
    ensure!(copied.success(), "cp: {copied}");
    File::open(to)?.sync_all()?;
    api.remove(&id).await
}

/// As soon as the guest's `nc` listens.
async fn connect(address: &str) -> Result<TcpStream> {
    let attempts = async {
        loop {
            if let Ok(stream) = TcpStream::connect(address).await {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), attempts)
        .await
        .with_context(|| format!("nobody listens on {address}"))
}

/// Content of this machine's programs, libraries and texts, one file after the other, in an order that stays.
struct HostFiles {
    folders: VecDeque<PathBuf>,
    files: VecDeque<PathBuf>,
    rest: Vec<u8>,
}

impl HostFiles {
    fn new() -> Self {
        let roots = [
            "/usr/lib",
            "/usr/share",
            "/usr/bin",
            "/usr/include",
            "/usr/local",
        ];
        Self {
            folders: roots.into_iter().map(PathBuf::from).collect(),
            files: VecDeque::new(),
            rest: Vec::new(),
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.rest.len() < length {
            if let Some(path) = self.files.pop_front() {
                let file = File::open(&path).with_context(|| path.display().to_string())?;
                // Of the largest a part: mixed means that none is most of it.
                file.take(16 << 20)
                    .read_to_end(&mut self.rest)
                    .with_context(|| path.display().to_string())?;
                continue;
            }
            let folder = self
                .folders
                .pop_front()
                .context("this machine has too few files below /usr for 1 GiB of them")?;
            if folder.exists() {
                self.list(&folder)
                    .with_context(|| folder.display().to_string())?;
            }
        }
        let after = self.rest.split_off(length);
        Ok(std::mem::replace(&mut self.rest, after))
    }

    fn list(&mut self, folder: &Path) -> Result<()> {
        let mut entries = fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
        entries.sort_by_key(fs::DirEntry::path);
        for entry in entries {
            let kind = entry.file_type()?;
            if kind.is_dir() {
                self.folders.push_back(entry.path());
            } else if kind.is_file() {
                self.files.push_back(entry.path());
            }
        }
        Ok(())
    }
}
