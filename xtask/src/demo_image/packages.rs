//! Debian packages: which are needed, where they are, what is in them.
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use super::output;

const WANTED: [&str; 3] = ["busybox-static", "redis-server", "redis-tools"];

/// Needed to install and configure packages on a running Debian, not by the programs in them.
const SKIPPED: [&str; 10] = [
    "adduser",
    "debconf",
    "gcc-12-base",
    "init-system-helpers",
    "libelogind0",
    "lsb-base",
    "passwd",
    "perl",
    "sysvinit-utils",
    "usrmerge",
];

/// One package as apt would fetch it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Package {
    /// `name_version_architecture.deb`, as apt writes it.
    pub file: String,
    pub sha256: String,
}

impl Package {
    fn name(&self) -> &str {
        self.file.split('_').next().unwrap_or(&self.file)
    }
}

/// The packages and their dependencies, sorted; refreshes apt's lists when they are missing.
pub fn resolve() -> Result<Vec<Package>> {
    resolve_once().or_else(|first| {
        update(&first)?;
        resolve_once()
    })
}

fn resolve_once() -> Result<Vec<Package>> {
    let no = "--no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances";
    let mut command = Command::new("apt-cache");
    command.args(["depends", "--recurse"]);
    command.args(no.split(' ')).args(WANTED).env("LC_ALL", "C");
    let names = closure(&parse_depends(&output(&mut command)?));
    let mut command = Command::new("apt-get");
    command.args(["--print-uris", "download"]).args(&names);
    let uris = output(command.env("LC_ALL", "C"))?;
    let mut packages = uris.lines().map(parse_uri).collect::<Result<Vec<_>>>()?;
    ensure!(
        packages.len() == names.len(),
        "apt knows {} of the {} packages needed",
        packages.len(),
        names.len()
    );
    packages.sort();
    Ok(packages)
}

/// `apt-get update`, when we may.
fn update(cause: &anyhow::Error) -> Result<()> {
    if !is_root()? {
        bail!("apt does not know the packages ({cause:#}); run: sudo apt-get update");
    }
    println!("demo image: refreshing apt's package lists");
    output(Command::new("apt-get").args(["-q", "update"]))?;
    Ok(())
}

pub fn is_root() -> Result<bool> {
    Ok(output(Command::new("id").arg("-u"))?.trim() == "0")
}

/// Package names flush left, below each its dependencies: `  Depends: NAME` or, for alternatives,
/// ` |Depends: NAME`. Providers of virtual packages are indented further and not used.
fn parse_depends(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut graph: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if !line.starts_with(' ') {
            current = line.trim().to_owned();
            graph.entry(current.clone()).or_default();
            continue;
        }
        let needs = [
            "  Depends: ",
            "  PreDepends: ",
            " |Depends: ",
            " |PreDepends: ",
        ];
        if let Some(name) = needs.iter().find_map(|kind| line.strip_prefix(kind)) {
            graph
                .entry(current.clone())
                .or_default()
                .push(name.trim().to_owned());
        }
    }
    graph
}

fn closure(graph: &BTreeMap<String, Vec<String>>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut pending: Vec<&str> = WANTED.to_vec();
    while let Some(name) = pending.pop() {
        // <name> is a virtual package.
        if SKIPPED.contains(&name) || name.starts_with('<') || !names.insert(name.to_owned()) {
            continue;
        }
        pending.extend(graph.get(name).into_iter().flatten().map(String::as_str));
    }
    // Only says that /usr is merged: nothing inside.
    names.remove("usr-is-merged");
    names
}

/// `'URI' FILE SIZE SHA256:HEX`.
fn parse_uri(line: &str) -> Result<Package> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, file, _, hash] = fields.as_slice() else {
        bail!("apt-get --print-uris wrote {line:?}");
    };
    let sha256 = hash
        .strip_prefix("SHA256:")
        .with_context(|| format!("apt knows no SHA-256 of {file}, only {hash}"))?;
    ensure!(!file.contains('/'), "apt names the file {file:?}");
    Ok(Package {
        file: (*file).to_owned(),
        sha256: sha256.to_owned(),
    })
}

/// Fetches what the cache does not hold yet; answers all files.
pub fn download(packages: &[Package], cache: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let cache = cache.canonicalize()?;
    let mut missing = Vec::new();
    for package in packages {
        if sha256_of(&cache.join(&package.file))?.as_ref() != Some(&package.sha256) {
            missing.push(package);
        }
    }
    if !missing.is_empty() {
        println!("demo image: downloading {} packages", missing.len());
        // As root apt drops to a user who cannot write here; the files' hashes are checked anyway.
        output(
            Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
                .args(missing.iter().map(|package| package.name()))
                .current_dir(&cache),
        )
        .context("apt-get update may help when the lists are old")?;
    }
    for package in &missing {
        let found = sha256_of(&cache.join(&package.file))?;
        ensure!(
            found.as_ref() == Some(&package.sha256),
            "{}: SHA-256 is {found:?}, apt says {}",
            package.file,
            package.sha256
        );
    }
    Ok(packages
        .iter()
        .map(|package| cache.join(&package.file))
        .collect())
}

fn sha256_of(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(content) => Ok(Some(hex::encode(Sha256::digest(content)))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
    }
}

/// All packages' files into one folder; nothing of them is run.
pub fn unpack(debs: &[PathBuf], to: &Path) -> Result<()> {
    remove(to)?;
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for deb in debs {
        output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(to))?;
    }
    Ok(())
}

pub fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Debian's name of the machine's architecture, which for ours is also OCI's (`amd64`, `arm64`).
pub fn architecture() -> Result<String> {
    let name = output(Command::new("dpkg").arg("--print-architecture"))?;
    Ok(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_closure_follows_depends_and_stops_at_what_is_skipped() {
        let text = "redis-server\n  PreDepends: init-system-helpers\n  Depends: redis-tools\n\
                    redis-tools\n  Depends: adduser\n |Depends: libb\n  Depends: <virtual>\n    libc\n\
                    \x20 Depends: libsystemd0\n    libelogind0\nadduser\n  Depends: passwd\n\
                    libb\n  Depends: redis-tools\nbusybox-static\n";
        let names: Vec<_> = closure(&parse_depends(text)).into_iter().collect();
        let expected = [
            "busybox-static",
            "libb",
            "libsystemd0",
            "redis-server",
            "redis-tools",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_uri_line_needs_a_sha256() {
        let line = "'http://host/p/b_1%3a2_amd64.deb' b_1%3a2_amd64.deb 928188 SHA256:ab";
        let package = parse_uri(line).unwrap();
        assert_eq!(
            (package.name(), package.file.as_str()),
            ("b", "b_1%3a2_amd64.deb")
        );
        assert!(parse_uri("'u' b.deb 1 MD5Sum:ab").is_err());
        assert!(parse_uri("E: no such package").is_err());
        assert!(parse_uri("'u' ../b.deb 1 SHA256:ab").is_err());
    }
}
