//! What is in the image: which files of the packages, and what is added to them.
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{elf, output, packages, tree::Tree};

/// redis runs as this user and group, so that switching users is exercised.
const REDIS: u64 = 999;
/// `redis-server` is a link to the first.
const PROGRAMS: [&str; 3] = ["redis-check-rdb", "redis-cli", "redis-benchmark"];
/// All of Debian's merged folders: packages may still use the old names.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
/// Where the loader looks, in a package tree without merged folders.
const LIBRARY_FOLDERS: [&str; 6] = [
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib/aarch64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "lib",
    "usr/lib",
];

const BASE_PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                           nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const BASE_GROUP: &str = "root:x:0:\nnogroup:x:65534:\n";

/// The layers, lowest first.
pub fn layers(unpacked: &Path) -> Result<Vec<Tree>> {
    Ok(vec![base(unpacked)?, redis(unpacked)?])
}

fn base(unpacked: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    for name in MERGED {
        tree.folder(&format!("usr/{name}"), 0o755, 0);
        tree.symlink(name, &format!("usr/{name}"));
    }
    for name in ["dev", "etc", "home", "mnt", "proc", "run", "sys", "var"] {
        tree.folder(name, 0o755, 0);
    }
    tree.folder("root", 0o700, 0);
    tree.folder("tmp", 0o1777, 0);
    tree.folder("var/tmp", 0o1777, 0);
    tree.symlink("var/run", "/run");

    let busybox = unpacked.join("bin/busybox");
    let content = read(&busybox)?;
    let needs = elf::needs(&content).context("bin/busybox")?;
    ensure!(
        needs == elf::Needs::default(),
        "busybox is not static: it needs {needs:?}"
    );
    tree.file("usr/bin/busybox", 0o755, content);
    for applet in output(Command::new(&busybox).arg("--list"))?.lines() {
        let path = format!("usr/bin/{applet}");
        if !tree.contains(&path) {
            tree.symlink(&path, "busybox");
        }
    }
    copyright(unpacked, |name| name == "busybox-static", &mut tree)?;

    tree.file("etc/passwd", 0o644, BASE_PASSWD);
    tree.file("etc/group", 0o644, BASE_GROUP);
    tree.file(
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files dns\n",
    );
    tree.file("etc/hosts", 0o644, "127.0.0.1 localhost\n::1 localhost\n");
    tree.file(
        "etc/os-release",
        0o644,
        "ID=doze-demo\nNAME=\"doze demo\"\nID_LIKE=debian\n",
    );
    Ok(tree)
}

fn redis(unpacked: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    let programs = PROGRAMS.map(|name| unpacked.join("usr/bin").join(name));
    for (name, path) in PROGRAMS.iter().zip(&programs) {
        tree.file(&format!("usr/bin/{name}"), 0o755, read(path)?);
    }
    tree.symlink("usr/bin/redis-server", "redis-check-rdb");
    for library in needed(unpacked, &programs)? {
        let content = read(&unpacked.join(&library))?;
        tree.file(&merged(&library), 0o755, content);
    }
    copyright(unpacked, |name| name != "busybox-static", &mut tree)?;
    // This layer's own version of files the first one has.
    let user = format!("redis:x:{REDIS}:{REDIS}:redis:/data:/bin/sh\n");
    tree.file("etc/passwd", 0o644, format!("{BASE_PASSWD}{user}"));
    tree.file(
        "etc/group",
        0o644,
        format!("{BASE_GROUP}redis:x:{REDIS}:\n"),
    );
    tree.folder("data", 0o755, REDIS);
    Ok(tree)
}

/// Paths, inside the packages, of the loader and of all libraries that the programs and those
/// libraries need.
fn needed(unpacked: &Path, programs: &[PathBuf]) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    let mut pending = programs.to_vec();
    while let Some(path) = pending.pop() {
        let needs = elf::needs(&read(&path)?).with_context(|| path.display().to_string())?;
        let loader = needs.interpreter.iter().map(|loader| {
            let inside = loader.trim_start_matches('/').to_owned();
            unpacked
                .join(&inside)
                .exists()
                .then_some(inside)
                .with_context(|| format!("no package has {loader}"))
        });
        let libraries = needs.libraries.iter().map(|name| {
            let mut places = LIBRARY_FOLDERS
                .iter()
                .map(|folder| format!("{folder}/{name}"));
            places
                .find(|place| unpacked.join(place).exists())
                .with_context(|| format!("{} needs {name}, which no package has", path.display()))
        });
        for library in loader.chain(libraries) {
            let library = library?;
            if found.insert(library.clone()) {
                pending.push(unpacked.join(library));
            }
        }
    }
    Ok(found)
}

/// Where a path of a package is once `/bin`, `/lib` and the like are links into `/usr`.
fn merged(path: &str) -> String {
    match path.split('/').next() {
        Some(first) if MERGED.contains(&first) => format!("usr/{path}"),
        _ => path.to_owned(),
    }
}

/// Licences travel with the files: those of the packages in this layer.
fn copyright(unpacked: &Path, wanted: impl Fn(&str) -> bool, tree: &mut Tree) -> Result<()> {
    let folder = unpacked.join("usr/share/doc");
    for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let path = format!("usr/share/doc/{name}/copyright");
        // Some packages share another's folder by a link.
        if wanted(&name) && unpacked.join(&path).exists() {
            tree.file(&path, 0o644, read(&unpacked.join(&path))?);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

/// Unpacks the layers and runs redis inside, when we may: the image must at least start.
pub fn check(layers: &[Tree], folder: &Path) -> Result<()> {
    if !packages::is_root()? {
        println!("demo image: not tried out, which needs root (chroot)");
        return Ok(());
    }
    packages::remove(folder)?;
    let tried = try_out(layers, folder);
    let removed = packages::remove(folder);
    println!("demo image: {}", tried?);
    removed
}

fn try_out(layers: &[Tree], folder: &Path) -> Result<String> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    for layer in layers {
        let tar = layer.to_tar()?;
        let mut archive = tar::Archive::new(tar.as_slice());
        archive.set_overwrite(true);
        archive.unpack(folder)?;
    }
    let mut command = Command::new("chroot");
    command.arg(folder);
    let version = output(command.args(["/usr/bin/redis-server", "--version"]))?;
    let mut command = Command::new("chroot");
    command.arg(folder);
    let shell = output(command.args(["/bin/sh", "-c", "id -u redis"]))?;
    if shell.trim() != REDIS.to_string() {
        bail!("the shell inside says user redis is {shell:?}");
    }
    Ok(version.trim().to_owned())
}
