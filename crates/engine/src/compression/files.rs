//! The forms in which memory lies in a folder: `memory`, or `memory.zst` or `memory.lz4`. All blocking.
//!
//! The raw file counts as long as it is there: an artefact gets its name when it is complete, and the raw file
//! goes after that; a raw file gets its name when it is complete, and the artefact goes after that.
use std::{
    fs, io,
    path::{Path, PathBuf},
};

use doze_host::files;
use doze_snapshot::Algorithm;

use crate::instance::MEMORY;

/// The compressed forms.
const ARTEFACTS: [&str; 2] = ["memory.zst", "memory.lz4"];

pub fn artefact_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::Zstd => ARTEFACTS[0],
        Algorithm::Lz4 => ARTEFACTS[1],
    }
}

/// The file that holds the memory of `dir`: the raw one if it is there.
///
/// # Errors
/// `NotFound`, naming the raw file, when there is none.
pub fn held(dir: &Path) -> io::Result<&'static str> {
    for name in [MEMORY].into_iter().chain(ARTEFACTS) {
        if dir.join(name).try_exists()? {
            return Ok(name);
        }
    }
    let missing = format!("{} is missing", dir.join(MEMORY).display());
    Err(io::Error::new(io::ErrorKind::NotFound, missing))
}

/// The artefact, if the memory of `dir` has only that.
pub fn packed(dir: &Path) -> io::Result<Option<PathBuf>> {
    let name = held(dir)?;
    Ok((name != MEMORY).then(|| dir.join(name)))
}

/// Removes what is not the truth beside a raw file that is: artefacts and what a server that died left half done.
///
/// # Errors
/// `NotFound` without a raw file: then they are the truth. Nothing was removed.
pub fn drop_artefacts(dir: &Path) -> io::Result<()> {
    if held(dir)? != MEMORY {
        let missing = format!("{} is missing", dir.join(MEMORY).display());
        return Err(io::Error::new(io::ErrorKind::NotFound, missing));
    }
    let mut changed = drop_stages(dir)?;
    for name in ARTEFACTS {
        changed |= remove(&dir.join(name))?;
    }
    sync(dir, changed)
}

/// Removes the raw file, which an artefact replaces that is complete and durable. On error it is there. Whether it is
/// gone is durable with the next change in `dir`: until then a power cut may bring it back, complete as it was.
pub fn drop_raw(dir: &Path) -> io::Result<()> {
    let changed = remove(&dir.join(MEMORY))?;
    if let Err(error) = sync(dir, changed) {
        tracing::warn!(dir = %dir.display(), %error, "raw memory may come back after a power cut");
    }
    Ok(())
}

/// After a restore that came to nothing: only one form is left. Of two it is the raw one, unless the memory is
/// recorded as `packed`: then that was made for the restore. Of one it is that, whatever is recorded. Says whether
/// the raw one is left.
pub fn put_back(dir: &Path, packed: bool) -> io::Result<bool> {
    let raw = held(dir)? == MEMORY;
    let artefact = ARTEFACTS.iter().map(|name| dir.join(name).try_exists());
    let artefact = artefact.collect::<io::Result<Vec<_>>>()?.contains(&true);
    if raw && !(packed && artefact) {
        drop_artefacts(dir)?;
        return Ok(true);
    }
    let changed = drop_stages(dir)? | remove(&dir.join(MEMORY))?;
    sync(dir, changed)?;
    Ok(false)
}

/// Removes memory in every form; not durable by itself.
pub fn remove_all(dir: &Path) -> io::Result<()> {
    if !dir.try_exists()? {
        return Ok(());
    }
    drop_stages(dir)?;
    for name in [MEMORY].into_iter().chain(ARTEFACTS) {
        remove(&dir.join(name))?;
    }
    Ok(())
}

/// Half-made files of both directions; nobody may be at work in `dir`.
fn drop_stages(dir: &Path) -> io::Result<bool> {
    let mut changed = false;
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(".memory."));
        if ours && files::is_stage_name(&name) {
            changed |= remove(&dir.join(&name))?;
        }
    }
    Ok(changed)
}

fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn sync(dir: &Path, changed: bool) -> io::Result<()> {
    match changed {
        true => files::fsync_dir(dir),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_raw_file_counts_as_long_as_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert_eq!(held(dir).unwrap_err().kind(), io::ErrorKind::NotFound);
        for name in ["memory.lz4", "memory"] {
            fs::write(dir.join(name), b"x").unwrap();
            assert_eq!(held(dir).unwrap(), name);
        }
        assert_eq!(packed(dir).unwrap(), None);
        drop_raw(dir).unwrap();
        assert_eq!(packed(dir).unwrap(), Some(dir.join("memory.lz4")));
    }

    #[test]
    fn without_a_raw_file_the_artefact_is_not_dropped() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.zst"), b"x").unwrap();
        let error = drop_artefacts(dir.path()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(names(dir.path()), ["memory.zst"]);
    }

    #[test]
    fn after_a_restore_that_came_to_nothing_there_is_one_form() {
        for (files, packed, left) in [
            (["memory", "memory.zst"].as_slice(), true, "memory.zst"),
            (&["memory", "memory.zst"], false, "memory"),
            (&["memory"], true, "memory"),
            (&["memory", ".memory.lz4.1.1.stage"], false, "memory"),
            (&[".memory.1.1.stage", "memory.lz4"], true, "memory.lz4"),
            (&["memory.zst"], false, "memory.zst"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            for name in files {
                fs::write(dir.path().join(name), b"x").unwrap();
            }
            assert_eq!(put_back(dir.path(), packed).unwrap(), left == "memory");
            assert_eq!(names(dir.path()), [left]);
        }
    }

    #[test]
    fn only_what_is_memory_goes() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let all = [
            ".memory.12.0.stage",
            ".memory.zst.12.0.stage",
            ".overlay.raw.12.0.stage",
            "memory",
            "memory.zst",
            "overlay.raw",
        ];
        for name in all {
            fs::write(dir.join(name), b"x").unwrap();
        }
        drop_artefacts(dir).unwrap();
        assert_eq!(
            names(dir),
            [".overlay.raw.12.0.stage", "memory", "overlay.raw"]
        );
        remove_all(dir).unwrap();
        assert_eq!(names(dir), [".overlay.raw.12.0.stage", "overlay.raw"]);
        remove_all(&dir.join("nothing")).unwrap();
    }
}
