//! One server per data folder, enforced by the kernel: an exclusive lock that vanishes with the
//! process, however it ends.
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Held for as long as it lives. The file stays; it only carries the lock.
#[derive(Debug)]
pub(crate) struct DataLock {
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{path} is used by another doze server{holder}; stop it or choose another data_dir")]
    Taken { path: PathBuf, holder: String },
    #[error("lock {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl DataLock {
    pub(crate) fn acquire(data_dir: &Path) -> Result<Self, LockError> {
        let path = data_dir.join("lock");
        let failed = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // Only a help for the message; the holder may be writing it right now.
                let known = Read::by_ref(&mut file)
                    .take(16)
                    .read_to_string(&mut pid)
                    .is_ok();
                let holder = match pid.trim() {
                    pid if known && !pid.is_empty() => format!(" (pid {pid})"),
                    _ => String::new(),
                };
                return Err(LockError::Taken {
                    path: data_dir.to_owned(),
                    holder,
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        file.set_len(0).map_err(failed)?;
        file.rewind().map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_second_is_told_who_is_first() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataLock::acquire(dir.path()).unwrap();
        let error = DataLock::acquire(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("pid {}", std::process::id())),
            "{error}"
        );
        drop(first);
        DataLock::acquire(dir.path()).unwrap();
    }
}
