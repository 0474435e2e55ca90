//! What the host really has: VMM processes, TAP devices, files. Read from the kernel and the disk,
//! never from the server, so that the two accounts can be compared.
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A live VMM process of one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vmm {
    pub pid: i32,
    /// Instance id, from the marker in its environment.
    pub instance: String,
}

/// Live processes marked `DOZE_MARK=doze:ID` whose command line names our data folder. A zombie has
/// neither environment nor command line and so is not among them.
pub fn vmms(data_dir: &Path) -> Result<Vec<Vmm>> {
    let needle = data_dir.to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        // Processes come and go while we look; one that is gone is not ours to report.
        let (Ok(environ), Ok(cmdline)) = (
            fs::read(entry.path().join("environ")),
            fs::read(entry.path().join("cmdline")),
        ) else {
            continue;
        };
        let mark = environ
            .split(|b| *b == 0)
            .find_map(|v| v.strip_prefix(b"DOZE_MARK=doze:"));
        let Some(mark) = mark else { continue };
        if String::from_utf8_lossy(&cmdline).contains(&needle) {
            found.push(Vmm {
                pid,
                instance: String::from_utf8_lossy(mark).into_owned(),
            });
        }
    }
    found.sort_by_key(|v| v.pid);
    Ok(found)
}

/// SIGKILL by pid; gone already is fine.
pub fn kill(pid: i32) -> Result<()> {
    signal(pid, Signal::KILL)
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    let Some(pid) = Pid::from_raw(pid) else {
        bail!("{pid} is not a pid")
    };
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("{signal:?} to {}", pid.as_raw_nonzero())),
    }
}

/// SIGUSR2, which a server takes for the loss of what it hears of connections, when told so.
pub fn signal_usr2(pid: u32) -> Result<()> {
    signal(i32::try_from(pid)?, Signal::USR2)
}

/// A process that stands still (SIGSTOP) until released, at the latest when this is dropped.
#[derive(Debug)]
pub struct Held(i32);

impl Held {
    pub fn new(pid: i32) -> Result<Self> {
        signal(pid, Signal::STOP)?;
        Ok(Self(pid))
    }

    pub fn release(self) -> Result<()> {
        signal(self.0, Signal::CONT)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _gone_already_is_fine = signal(self.0, Signal::CONT);
    }
}

/// A TAP device: its name and its alias (the instance id).
pub type Tap = (String, String);

/// TAPs attached to this bridge.
pub fn taps(bridge: &str) -> Result<BTreeSet<Tap>> {
    let mut found = BTreeSet::new();
    let ports = match fs::read_dir(format!("/sys/class/net/{bridge}/brif")) {
        Ok(ports) => ports,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(e).with_context(|| format!("ports of {bridge}")),
    };
    for port in ports {
        let name = port?.file_name().to_string_lossy().into_owned();
        let alias =
            fs::read_to_string(format!("/sys/class/net/{name}/ifalias")).unwrap_or_default();
        found.insert((name, alias.trim().to_owned()));
    }
    Ok(found)
}

/// Every TAP of our network namespace, on a bridge or not.
pub fn all_taps() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for link in fs::read_dir("/sys/class/net").context("/sys/class/net")? {
        let link = link?;
        if link.path().join("tun_flags").exists() {
            found.insert(link.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(found)
}

/// The ruleset of our network namespace as text.
pub fn ruleset() -> Result<String> {
    let output = std::process::Command::new("nft")
        .args(["list", "ruleset"])
        .output()
        .context("nft")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Everything a server holds on its host besides its own process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    /// Paths below the data folder, without the store's own write-ahead files.
    pub files: BTreeSet<PathBuf>,
    pub taps: BTreeSet<Tap>,
    /// Instance ids of live VMMs, one entry per process.
    pub vmms: Vec<String>,
}

impl Footprint {
    pub fn take(data_dir: &Path, bridge: &str) -> Result<Self> {
        let mut files = BTreeSet::new();
        walk(data_dir, data_dir, &mut files)?;
        let vmms = vmms(data_dir)?.into_iter().map(|v| v.instance).collect();
        Ok(Self {
            files,
            taps: taps(bridge)?,
            vmms,
        })
    }

    /// What is here but was not in `before`, one line each; empty when nothing was left behind.
    pub fn new_since(&self, before: &Self) -> Vec<String> {
        let mut new: Vec<String> = self
            .files
            .difference(&before.files)
            .map(|p| format!("file {}", p.display()))
            .collect();
        new.extend(
            self.taps
                .difference(&before.taps)
                .map(|(name, id)| format!("tap {name} of {id}")),
        );
        new.extend(
            self.vmms
                .iter()
                .filter(|v| !before.vmms.contains(v))
                .map(|v| format!("VMM of {v}")),
        );
        new
    }
}

fn walk(root: &Path, dir: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // Removed while we look.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("{}", dir.display())),
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with("-wal") || name.ends_with("-shm") || name.ends_with("-journal") {
            continue;
        }
        files.insert(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(root, &path, files)?;
        }
    }
    Ok(())
}
