//! Packs an unpacked image into the one read-only file its instances share.
//!
//! The same tree and digest give the same bytes: the file system's UUID comes from the digest, its
//! build time is fixed, and files keep their own times.
//!
//! Content is stored uncompressed: the host's page cache keeps one copy for all guests, while each
//! guest would decompress for itself. Measured on the demo image (redis, 17.5 MB of programs and
//! libraries) in a guest without hardware virtualisation: reading it all with cold caches took
//! 1.7-2.2 s uncompressed (21.0 MB file) and 2.8-3.5 s with lz4hc (12.3 MB); starting redis, no
//! difference.
use std::{
    fs::{File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{ImageError, digest::Digest};

const PROGRAM: &str = "mkfs.erofs";
/// Services often run with a PATH without these.
const ALSO_SEARCHED: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Build time of every rootfs, the largest that tools of all ages read (2106). `mkfs.erofs` clamps
/// files' times to it, so it must not be in their past; without it the current time would be stored.
const BUILD_TIME: &str = "4294967295";
const MAX_STDERR: usize = 2000;

/// Packs the folder `tree` inside `stage` into `stage/file`: synced to disk, mode 0444.
///
/// The command runs with `stage` as its working folder, so that the length of the store's own path
/// does not count against the paths inside the image.
///
/// # Errors
/// `Missing` without `mkfs.erofs` (`program` overrides the search for it), `Io` with its own words
/// when it fails.
pub(crate) fn build(
    program: Option<&Path>,
    stage: &Path,
    tree: &str,
    file: &Path,
    digest: &Digest,
) -> Result<(), ImageError> {
    let program = match program {
        Some(program) => program.to_owned(),
        None => find().ok_or_else(|| missing(PROGRAM))?,
    };
    let output = Command::new(&program)
        .arg("--quiet")
        .args(["-U", &uuid(digest)])
        .arg(file)
        .arg(tree)
        .current_dir(stage)
        .env("SOURCE_DATE_EPOCH", BUILD_TIME)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => missing(&program.display().to_string()),
            _ => ImageError::io(format!("run {}", program.display()))(source),
        })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        let words: String = words.trim().chars().take(MAX_STDERR).collect();
        return Err(ImageError::Io {
            context: format!("{} ended with {}", program.display(), output.status),
            source: io::Error::other(words),
        });
    }
    let path = stage.join(file);
    let seal = || -> io::Result<()> {
        let file = File::open(&path)?;
        file.set_permissions(Permissions::from_mode(0o444))?;
        file.sync_all()
    };
    seal().map_err(ImageError::io(format!("make {} durable", path.display())))
}

fn missing(program: &str) -> ImageError {
    ImageError::Missing {
        what: format!("{program} is not installed, and images become EROFS files"),
        mend: "apt-get install erofs-utils".into(),
    }
}

fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(ALSO_SEARCHED.map(PathBuf::from))
        .map(|folder| folder.join(PROGRAM))
        .find(|candidate| candidate.is_file())
}

/// RFC 9562 version 8 (custom), from the digest's first bytes.
fn uuid(digest: &Digest) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.bytes()[..16]);
    bytes[6] = (bytes[6] & 0x0f) | 0x80;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let text = hex::encode(bytes);
    [
        &text[..8],
        &text[8..12],
        &text[12..16],
        &text[16..20],
        &text[20..],
    ]
    .join("-")
}
