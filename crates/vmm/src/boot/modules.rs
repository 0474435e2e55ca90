//! Which kernel modules a guest needs, in the order they load.
//!
//! Dependencies are read from the modules themselves (`depends=` and `softdep=pre:` in the ELF section
//! `.modinfo`, what `modinfo` prints): a distribution's package has no `modules.dep` before depmod ran on it,
//! and we never install it.
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    BootError,
    cache::{Stamp, stamp},
    cannot,
};

/// What the guest needs, and whether it can do without. A module that comes first is loaded first.
const WANTED: &[(&str, Need)] = &[
    ("virtio_mmio", Need::Must),
    ("virtio_pci", Need::Must),
    ("virtio_console", Need::Must),
    ("virtio_blk", Need::Must),
    ("erofs", Need::Must),
    ("overlay", Need::Must),
    ("ext4", Need::Must),
    ("virtio_net", Need::Must),
    // Without these two a guest runs, with less entropy at first and without giving memory back.
    ("virtio_rng", Need::May),
    ("virtio_balloon", Need::May),
    // Without it a kernel panic looks like a shutdown.
    ("pvpanic_mmio", Need::May),
    // Without it the kernel does not notice that its machine was copied.
    ("vmgenid", Need::May),
    // The control channel of monitors that have a vsock.
    ("vsock", Need::May),
    ("vmw_vsock_virtio_transport", Need::May),
];

/// A module larger than this is a mistake.
const MAX_MODULE: u64 = 64 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Must,
    May,
}

/// One module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Module {
    /// File name without suffix, as in the module tree: `virtio-rng`.
    pub name: String,
    /// The file it was read from, as it was just before.
    pub source: Stamp,
    /// Uncompressed; with its signature, if it has one.
    pub content: Vec<u8>,
}

/// The needed modules of the tree at `dir` (`lib/modules/VERSION`), dependencies first.
/// `kernel_version` is compared with what the modules were built for.
pub(super) fn resolve(dir: &Path, kernel_version: Option<&str>) -> Result<Vec<Module>, BootError> {
    let mut resolver = Resolver {
        dir,
        builtin: builtin(dir)?,
        files: index(dir)?,
        visiting: Vec::new(),
        done: BTreeSet::new(),
        loaded: Vec::new(),
    };
    for (name, need) in WANTED {
        match resolver.add(name) {
            Ok(()) => {}
            Err(Failure::Absent(missing)) if *need == Need::May => {
                tracing::warn!(
                    module = name,
                    missing,
                    "the kernel lacks an optional module"
                );
            }
            Err(Failure::Absent(missing)) => {
                let whose = if missing == *name {
                    String::new()
                } else {
                    format!(", needed by {name}")
                };
                return Err(refuse(
                    dir,
                    format!(
                        "the module {missing}{whose} is neither there nor built in; use a kernel with virtio, erofs, \
                         overlay and ext4 (Debian's linux-image-cloud-amd64 has all)"
                    ),
                ));
            }
            Err(Failure::Broken(e)) => return Err(e),
        }
    }
    if let (Some(wanted), Some(module)) = (kernel_version, resolver.loaded.first()) {
        check_version(dir, wanted, module)?;
    }
    Ok(resolver.loaded)
}

/// A module of another kernel is refused by the guest's kernel, one by one, much later.
fn check_version(dir: &Path, kernel: &str, module: &Module) -> Result<(), BootError> {
    let built_for = info(&module.content, "vermagic")
        .next()
        .and_then(|magic| magic.split(' ').next().map(str::to_owned));
    match built_for {
        Some(version) if version != kernel => Err(refuse(
            dir,
            format!("they are for Linux {version}, the kernel image is {kernel}; configure a pair"),
        )),
        _ => Ok(()),
    }
}

struct Resolver<'a> {
    dir: &'a Path,
    builtin: BTreeSet<String>,
    files: BTreeMap<String, PathBuf>,
    /// The chain of dependants, against circles.
    visiting: Vec<String>,
    done: BTreeSet<String>,
    loaded: Vec<Module>,
}

enum Failure {
    /// This module does not exist.
    Absent(String),
    Broken(BootError),
}

impl Resolver<'_> {
    fn add(&mut self, name: &str) -> Result<(), Failure> {
        let key = canonical(name);
        if self.builtin.contains(&key) || self.done.contains(&key) {
            return Ok(());
        }
        let Some(path) = self.files.get(&key).cloned() else {
            return Err(Failure::Absent(key));
        };
        if self.visiting.contains(&key) {
            let chain = self.visiting.join(", ");
            return Err(Failure::Broken(refuse(
                self.dir,
                format!("the modules {chain} depend on each other"),
            )));
        }
        let source = stamp(&path).map_err(|e| Failure::Broken(cannot("inspect", &path, e)))?;
        let content = read(&path).map_err(Failure::Broken)?;
        self.visiting.push(key.clone());
        let added = self.add_dependencies(&content);
        self.visiting.pop();
        added?;
        self.done.insert(key);
        self.loaded.push(Module {
            name: stem(&path).unwrap_or(name).to_owned(),
            source,
            content,
        });
        Ok(())
    }

    fn add_dependencies(&mut self, content: &[u8]) -> Result<(), Failure> {
        for dependency in list(content, "depends", |text| text.split(',').collect()) {
            self.add(&dependency)?;
        }
        for dependency in list(content, "softdep", softdep_pre) {
            // Soft: better with than without. It may also be an alias, which cannot be loaded by name.
            match self.add(&dependency) {
                Err(Failure::Absent(_)) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

fn list(content: &[u8], key: &str, split: impl Fn(&str) -> Vec<&str>) -> Vec<String> {
    info(content, key)
        .flat_map(|value| {
            split(&value)
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .filter(|name| !name.is_empty())
        .collect()
}

/// `pre: a b post: c` (modprobe.d(5)).
fn softdep_pre(text: &str) -> Vec<&str> {
    let pre = text.split("post:").next().unwrap_or("");
    let (_, names) = pre.split_once("pre:").unwrap_or(("", ""));
    names.split_whitespace().collect()
}

/// The kernel takes `-` and `_` for the same.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// `virtio-rng` of `virtio-rng.ko.zst`; `None` for what is no module.
fn stem(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let (stem, suffix) = name.split_once(".ko")?;
    matches!(suffix, "" | ".gz" | ".xz" | ".zst").then_some(stem)
}

/// Names in `modules.builtin`, one path a line.
fn builtin(dir: &Path) -> Result<BTreeSet<String>, BootError> {
    let path = dir.join("modules.builtin");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(refuse(
                dir,
                "there is no modules.builtin in it; configure the folder lib/modules/VERSION of the kernel".to_owned(),
            ));
        }
        Err(e) => return Err(cannot("read", &path, e)),
    };
    Ok(text
        .lines()
        .filter_map(|line| stem(Path::new(line)))
        .map(canonical)
        .collect())
}

/// Every module file of the tree by name. `updates/` goes before the rest, as with depmod; symbolic
/// links (`build`, `source`) are not followed.
fn index(dir: &Path) -> Result<BTreeMap<String, PathBuf>, BootError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|e| cannot("list", &folder, e))? {
            let entry = entry.map_err(|e| cannot("list", &folder, e))?;
            let kind = entry
                .file_type()
                .map_err(|e| cannot("inspect", &entry.path(), e))?;
            entries.push((entry.path(), kind));
        }
        // The same tree gives the same initramfs.
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (path, kind) in entries {
            if kind.is_dir() {
                folders.push(path);
            } else if let Some(name) = stem(&path).map(canonical) {
                let overrides = path.starts_with(dir.join("updates"));
                if overrides || !files.contains_key(&name) {
                    files.insert(name, path);
                }
            }
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>, BootError> {
    let mut file = fs::File::open(path).map_err(|e| cannot("read", path, e))?;
    let mut content = Vec::new();
    let read = match path.extension().and_then(|suffix| suffix.to_str()) {
        Some("gz") => flate2::read::GzDecoder::new(file)
            .take(MAX_MODULE + 1)
            .read_to_end(&mut content),
        Some("zst") => zstd::stream::read::Decoder::new(file)
            .and_then(|decoder| decoder.take(MAX_MODULE + 1).read_to_end(&mut content)),
        Some("xz") => {
            return Err(refuse(
                path,
                "modules compressed with xz are not supported; unpack them (unxz) or use Debian's kernel".to_owned(),
            ));
        }
        _ => file.by_ref().take(MAX_MODULE + 1).read_to_end(&mut content),
    };
    read.map_err(|e| cannot("read", path, e))?;
    if content.len() as u64 > MAX_MODULE {
        return Err(refuse(
            path,
            format!("it is larger than {MAX_MODULE} bytes"),
        ));
    }
    if !content.starts_with(b"\x7fELF\x02\x01") || section(&content, b".modinfo").is_none() {
        return Err(refuse(path, "it is not a 64-bit kernel module".to_owned()));
    }
    Ok(content)
}

/// Values of `key` in the module's information: NUL-terminated `key=value`.
fn info<'a>(content: &'a [u8], key: &'a str) -> impl Iterator<Item = String> + 'a {
    section(content, b".modinfo")
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter_map(move |entry| entry.strip_prefix(key.as_bytes())?.strip_prefix(b"="))
        .map(|value| String::from_utf8_lossy(value).into_owned())
}

/// The bytes of a section of an ELF64 file, by name (elf(5)).
fn section<'a>(elf: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let table = u64::from_le_bytes(field(elf, 0x28)?);
    let size = u64::from(u16::from_le_bytes(field(elf, 0x3a)?));
    let count = u64::from(u16::from_le_bytes(field(elf, 0x3c)?));
    let names = u64::from(u16::from_le_bytes(field(elf, 0x3e)?));
    let header = |i: u64| usize::try_from(table.checked_add(i.checked_mul(size)?)?).ok();
    let body = |at: usize| {
        let offset =
            usize::try_from(u64::from_le_bytes(field(elf, at.checked_add(0x18)?)?)).ok()?;
        let length =
            usize::try_from(u64::from_le_bytes(field(elf, at.checked_add(0x20)?)?)).ok()?;
        elf.get(offset..offset.checked_add(length)?)
    };
    let names = body(header(names)?)?;
    (0..count).find_map(|i| {
        let at = header(i)?;
        let own = names.get(u32::from_le_bytes(field(elf, at)?) as usize..)?;
        (own.strip_prefix(name)?.first() == Some(&0)).then(|| body(at))?
    })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn refuse(path: &Path, reason: String) -> BootError {
    BootError::Modules {
        path: path.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests;
