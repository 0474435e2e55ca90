//! What makes a snapshot: a folder whose manifest names every file with its size and checksum.
//!
//! ```text
//!   <place>.stage/    files, fsynced; then the manifest, fsynced; then the folder, fsynced
//!        │ rename, fsync of the parent                      [`publish`]
//!   <place>/          the validity mark: a snapshot exists while a folder has this name
//!        │ rename, fsync of the parent                      [`consume`], just before the guest goes on
//!   <place>.consumed/ kept until its guest has proved itself [`reinstate`] gives the mark back
//! ```
//!
//! A reader never meets half a snapshot: before the rename there is none, after it everything it names is
//! on the disk. The manifest is one line of header and JSON:
//!
//! ```text
//!   doze-manifest 1 sha256:<64 hexadecimal digits of all that follows this line>
//!   { "version": 1, ... }
//! ```
use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use doze_host::files;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

/// Name of the manifest inside the folder.
pub const MANIFEST: &str = "manifest.json";
/// Version of the form this program writes; older ones are read.
pub const MANIFEST_VERSION: u32 = 1;

/// Bytes of a manifest that are read at most.
const MAX_MANIFEST: u64 = 4 << 20;
/// Files a manifest names at most.
const MAX_FILES: usize = 1024;
/// Bytes of one named file at most: device state, not memory.
const MAX_FILE: u64 = 1 << 30;
const HEADER: &str = "doze-manifest 1 sha256:";

/// One snapshot. `M` is the machine's complete description, which a restore needs unchanged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest<M> {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Random; tells two snapshots of one instance apart.
    pub id: String,
    /// Wall clock, microseconds since the Unix epoch.
    pub created_at_us: i64,
    /// Version of the machine monitor that saved it.
    pub monitor_version: String,
    pub machine: M,
    pub memory: Memory,
    /// Every file of the folder except the manifest.
    pub files: Vec<FileEntry>,
}

/// The memory image, which lies beside the folder and is not hashed: reading it whole would cost what
/// sleeping saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Bytes of the raw image.
    pub size: u64,
    /// How it is stored.
    pub codec: MemoryCodec,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryCodec {
    /// The sparse file that a machine maps.
    Raw,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// One component, relative to the folder.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("there is no snapshot: {} does not exist", .0.display())]
    Absent(PathBuf),
    /// Refused, and left as it is.
    #[error("{}: {reason}", .path.display())]
    Invalid { path: PathBuf, reason: String },
    #[error("cannot {step} {}", .path.display())]
    Io {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl ManifestError {
    fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { step, path, source }
    }

    /// A file that is not there makes the snapshot invalid; anything else is the host's trouble.
    fn unreadable(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::invalid(&path, "it is missing"),
            _ => Self::Io { step, path, source },
        }
    }

    fn invalid(path: &Path, reason: impl Into<String>) -> Self {
        Self::Invalid {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// `<place>.stage`: where the files of a snapshot that does not exist yet are written.
pub fn stage_of(place: &Path) -> PathBuf {
    beside(place, ".stage")
}

/// `<place>.consumed`: where a snapshot goes whose guest runs again.
pub fn consumed_of(place: &Path) -> PathBuf {
    beside(place, ".consumed")
}

fn beside(place: &Path, suffix: &str) -> PathBuf {
    let mut name = place.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Writes the manifest into the stage folder of `place` and makes everything in it durable. All that is
/// left to do is [`publish`].
pub fn seal<M: Serialize>(place: &Path, manifest: &Manifest<M>) -> Result<(), ManifestError> {
    let stage = stage_of(place);
    for entry in &manifest.files {
        let path = stage.join(&entry.name);
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(ManifestError::io("fsync", &path))?;
    }
    write(&stage, manifest)
}

/// Replaces the manifest of a snapshot that nobody uses, in one step and durably: for a copy that becomes
/// another instance's. The files it names must be there and unchanged.
pub fn rewrite<M: Serialize>(place: &Path, manifest: &Manifest<M>) -> Result<(), ManifestError> {
    write(place, manifest)
}

fn write<M: Serialize>(folder: &Path, manifest: &Manifest<M>) -> Result<(), ManifestError> {
    let path = folder.join(MANIFEST);
    let body = serde_json::to_string_pretty(manifest)
        .map_err(|e| ManifestError::invalid(&path, e.to_string()))?;
    let text = format!("{HEADER}{}\n{body}\n", hash(format!("{body}\n").as_bytes()));
    // Also fsyncs the folder, and with it the names of the files above.
    files::write_atomic(&path, text.as_bytes(), 0o600).map_err(ManifestError::io("write", &path))
}

/// The commit point: after this, and not before, there is a snapshot at `place`. An earlier consumed one is
/// gone.
pub fn publish(place: &Path) -> Result<(), ManifestError> {
    let stage = stage_of(place);
    rename(&stage, place)?;
    sync_parent(place)
}

/// Removes the validity mark durably. From here on the files are worth nothing, unless [`reinstate`] gives
/// it back before the guest's first instruction.
pub fn consume(place: &Path) -> Result<(), ManifestError> {
    let consumed = consumed_of(place);
    files::remove_tree(&consumed).map_err(ManifestError::io("remove", &consumed))?;
    rename(place, &consumed)?;
    sync_parent(place)
}

/// Gives a consumed snapshot its mark back: only for one whose guest has not run since.
pub fn reinstate(place: &Path) -> Result<(), ManifestError> {
    rename(&consumed_of(place), place)?;
    sync_parent(place)
}

/// Whether the mark is there.
pub fn exists(place: &Path) -> Result<bool, ManifestError> {
    place
        .try_exists()
        .map_err(ManifestError::io("look for", place))
}

/// Removes everything of a snapshot: mark, stage and what was consumed.
pub fn remove(place: &Path) -> Result<(), ManifestError> {
    // The mark first: half a folder must not have it.
    if exists(place)? {
        consume(place)?;
    }
    for path in [stage_of(place), consumed_of(place)] {
        files::remove_tree(&path).map_err(ManifestError::io("remove", &path))?;
    }
    Ok(())
}

/// Reads the manifest and checks every file it names, size and checksum.
///
/// # Errors
/// [`ManifestError::Invalid`] with the file and what disagrees. Nothing is changed.
pub fn read<M: DeserializeOwned>(place: &Path) -> Result<Manifest<M>, ManifestError> {
    if !exists(place)? {
        return Err(ManifestError::Absent(place.to_owned()));
    }
    let path = place.join(MANIFEST);
    let text = read_capped(&path, MAX_MANIFEST)?;
    let invalid = |reason: String| ManifestError::invalid(&path, reason);
    let text = String::from_utf8(text).map_err(|e| invalid(format!("not UTF-8: {e}")))?;
    let (header, body) = text
        .split_once('\n')
        .ok_or_else(|| invalid("the manifest is truncated".into()))?;
    let expected = header
        .strip_prefix(HEADER)
        .ok_or_else(|| invalid(format!("the manifest does not begin with {HEADER:?}")))?;
    let found = hash(body.as_bytes());
    if found != expected {
        return Err(invalid(format!(
            "the manifest is altered or truncated: its checksum is {found}, its header says {expected}"
        )));
    }
    let version: Version = serde_json::from_str(body).map_err(|e| invalid(e.to_string()))?;
    if version.version > MANIFEST_VERSION {
        return Err(invalid(format!(
            "the manifest's version is {}, this program reads up to {MANIFEST_VERSION}",
            version.version
        )));
    }
    let manifest: Manifest<M> = serde_json::from_str(body).map_err(|e| invalid(e.to_string()))?;
    if manifest.files.len() > MAX_FILES {
        return Err(invalid(format!(
            "it names {} files, at most {MAX_FILES} are read",
            manifest.files.len()
        )));
    }
    for entry in &manifest.files {
        check_file(place, entry)?;
    }
    Ok(manifest)
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn check_file(place: &Path, entry: &FileEntry) -> Result<(), ManifestError> {
    let path = place.join(&entry.name);
    let plain = Path::new(&entry.name)
        .file_name()
        .is_some_and(|name| name == entry.name.as_str());
    if !plain {
        return Err(ManifestError::invalid(
            &place.join(MANIFEST),
            format!(
                "it names {:?}, which is not a file of its folder",
                entry.name
            ),
        ));
    }
    let size = fs::symlink_metadata(&path)
        .map_err(ManifestError::unreadable("inspect", &path))?
        .len();
    if size != entry.size {
        return Err(ManifestError::invalid(
            &path,
            format!("it has {size} bytes, the manifest says {}", entry.size),
        ));
    }
    let found = hash(&read_capped(&path, MAX_FILE)?);
    if found != entry.sha256 {
        return Err(ManifestError::invalid(
            &path,
            format!(
                "its content is altered: the checksum is {found}, the manifest says {}",
                entry.sha256
            ),
        ));
    }
    Ok(())
}

fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>, ManifestError> {
    let file = File::open(path).map_err(ManifestError::unreadable("open", path))?;
    let mut content = Vec::new();
    file.take(cap + 1)
        .read_to_end(&mut content)
        .map_err(ManifestError::io("read", path))?;
    if content.len() as u64 > cap {
        return Err(ManifestError::invalid(
            path,
            format!("it has more than the {cap} bytes that are read"),
        ));
    }
    Ok(content)
}

fn hash(content: &[u8]) -> String {
    hex::encode(Sha256::digest(content))
}

fn rename(from: &Path, to: &Path) -> Result<(), ManifestError> {
    fs::rename(from, to).map_err(ManifestError::io("rename", from))
}

fn sync_parent(place: &Path) -> Result<(), ManifestError> {
    let parent = place.parent().unwrap_or(Path::new("."));
    files::fsync_dir(parent).map_err(ManifestError::io("fsync", parent))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn sealed(dir: &Path) -> (PathBuf, Manifest<String>) {
        let place = dir.join("snapshot");
        fs::create_dir(stage_of(&place)).unwrap();
        fs::write(stage_of(&place).join("state"), b"device state").unwrap();
        let manifest = Manifest {
            version: MANIFEST_VERSION,
            id: "one".into(),
            created_at_us: 7,
            monitor_version: "7.2.22".into(),
            machine: "a machine\nwith two lines".to_owned(),
            memory: Memory {
                size: 1 << 30,
                codec: MemoryCodec::Raw,
            },
            files: vec![FileEntry {
                name: "state".into(),
                size: 12,
                sha256: hash(b"device state"),
            }],
        };
        seal(&place, &manifest).unwrap();
        (place, manifest)
    }

    #[test]
    fn it_exists_from_publish_to_consume_and_again_after_reinstate() {
        let dir = tempfile::tempdir().unwrap();
        let (place, manifest) = sealed(dir.path());
        assert!(matches!(
            read::<String>(&place),
            Err(ManifestError::Absent(_))
        ));
        publish(&place).unwrap();
        assert_eq!(read::<String>(&place).unwrap(), manifest);
        consume(&place).unwrap();
        assert!(!exists(&place).unwrap());
        reinstate(&place).unwrap();
        assert_eq!(read::<String>(&place).unwrap(), manifest);
        consume(&place).unwrap();
        // The next generation replaces what the last one left.
        sealed(dir.path());
        publish(&place).unwrap();
        consume(&place).unwrap();
        remove(&place).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn whatever_is_altered_is_refused_by_its_name_and_left_alone() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage); 6] = [
            ("state", |p| {
                fs::write(p.join("state"), b"device").unwrap();
            }),
            ("state", |p| {
                fs::write(p.join("state"), b"DEVICE state").unwrap();
            }),
            ("state", |p| fs::remove_file(p.join("state")).unwrap()),
            (MANIFEST, |p| {
                let text = fs::read_to_string(p.join(MANIFEST)).unwrap();
                fs::write(p.join(MANIFEST), text.replace("7.2.22", "7.2.23")).unwrap();
            }),
            (MANIFEST, |p| {
                let text = fs::read(p.join(MANIFEST)).unwrap();
                fs::write(p.join(MANIFEST), &text[..text.len() / 2]).unwrap();
            }),
            (MANIFEST, |p| fs::write(p.join(MANIFEST), b"").unwrap()),
        ];
        for (name, damage) in damages {
            let dir = tempfile::tempdir().unwrap();
            let (place, _) = sealed(dir.path());
            publish(&place).unwrap();
            damage(&place);
            let error = read::<String>(&place).unwrap_err();
            assert!(matches!(error, ManifestError::Invalid { .. }), "{error}");
            assert!(error.to_string().contains(name), "{error}");
            assert!(exists(&place).unwrap());
        }
    }

    #[test]
    fn a_newer_form_and_a_path_out_of_the_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (place, mut manifest) = sealed(dir.path());
        manifest.version = 99;
        seal(&place, &manifest).unwrap();
        publish(&place).unwrap();
        let error = read::<String>(&place).unwrap_err().to_string();
        assert!(error.contains("99"), "{error}");
        consume(&place).unwrap();

        let (_, mut manifest) = sealed(dir.path());
        seal(&place, &manifest).unwrap();
        manifest.files[0].name = "../state".into();
        fs::write(dir.path().join("state"), b"device state").unwrap();
        // The name exists as a sibling of the stage, so that only the check can refuse it.
        seal(&place, &manifest).unwrap();
        publish(&place).unwrap();
        let error = read::<String>(&place).unwrap_err().to_string();
        assert!(error.contains("../state"), "{error}");
    }
}
