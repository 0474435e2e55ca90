//! The file that holds a saved machine's device state. All blocking.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use doze_host::files::free_space;
use sha2::{Digest, Sha256};

use super::migration::MAX_STATE;
use crate::{SavedFile, VmmError};

const NAME: &str = "state";

/// Writes `state` into `folder`, mode 0600, not fsynced. After an error nothing of it is left.
pub(super) fn write(folder: &Path, state: &[u8]) -> Result<SavedFile, VmmError> {
    let path = folder.join(NAME);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| explain("create", &path, folder, state, e))?;
    if let Err(e) = file.write_all(state) {
        let removed = fs::remove_file(&path);
        // Measured after the file is gone: what was written of it counts as free.
        drop(file);
        let error = explain("write", &path, folder, state, e);
        return Err(match removed {
            Ok(()) => error,
            Err(source) => VmmError::Io {
                context: format!("{error}; and cannot remove {}", path.display()),
                source,
            },
        });
    }
    Ok(SavedFile {
        name: NAME.to_owned(),
        size: state.len() as u64,
        sha256: hex::encode(Sha256::digest(state)),
    })
}

fn explain(step: &str, path: &Path, folder: &Path, state: &[u8], source: io::Error) -> VmmError {
    if doze_host::files::is_full(&source)
        && let Ok(available) = free_space(folder)
    {
        return VmmError::NoSpace {
            what: format!("the device state {}", path.display()),
            needed: state.len() as u64,
            available,
        };
    }
    VmmError::Io {
        context: format!("cannot {step} the device state {}", path.display()),
        source,
    }
}

/// What [`write`] wrote.
pub(super) fn read(folder: &Path) -> Result<Vec<u8>, VmmError> {
    let path = folder.join(NAME);
    let failed = |source| VmmError::Io {
        context: format!("cannot read the device state {}", path.display()),
        source,
    };
    let mut state = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_STATE + 1).read_to_end(&mut state))
        .map_err(failed)?;
    if state.len() as u64 > MAX_STATE {
        let text = format!("it has more than {MAX_STATE} bytes, no saved machine has that many");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_written_is_private_described_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let saved = write(dir.path(), b"abc").unwrap();
        // FIPS 180-4's example.
        let sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(
            (saved.name.as_str(), saved.size, saved.sha256.as_str()),
            ("state", 3, sha256)
        );
        let meta = fs::metadata(dir.path().join("state")).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o600);
        assert_eq!(read(dir.path()).unwrap(), b"abc");
        // Never over an older one.
        let e = write(dir.path(), b"new").unwrap_err();
        assert!(e.to_string().contains("cannot create"), "{e}");
        assert_eq!(read(dir.path()).unwrap(), b"abc");
    }

    #[test]
    fn an_absent_or_oversized_state_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let e = read(dir.path()).unwrap_err();
        assert!(e.to_string().contains("/state"), "{e}");
        let file = File::create(dir.path().join("state")).unwrap();
        file.set_len(MAX_STATE + 1).unwrap();
        let VmmError::Io { source, .. } = read(dir.path()).unwrap_err() else {
            panic!("another error")
        };
        assert_eq!(source.kind(), io::ErrorKind::InvalidData);
    }
}
