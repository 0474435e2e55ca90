//! Boot files of another host, for machines that were saved there.
use std::{
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use doze_host::files::{create_private_dir, fsync_dir};
use sha2::{Digest, Sha256};

use super::{BootError, BootPart, Verified, cache::is_whole, cannot};

/// Read at once.
const PIECE: usize = 256 << 10;

/// SHA-256 and bytes.
pub(super) fn digest(path: &Path) -> Result<(String, u64), BootError> {
    let read = || -> io::Result<(String, u64)> {
        let mut file = File::open(path)?;
        let mut piece = vec![0; PIECE];
        let mut hash = Sha256::new();
        let mut size = 0;
        loop {
            let got = file.read(&mut piece)?;
            if got == 0 {
                return Ok((hex::encode(hash.finalize()), size));
            }
            hash.update(&piece[..got]);
            size += got as u64;
        }
    };
    read().map_err(|e| cannot("read", path, e))
}

pub(super) fn verify(part: BootPart, path: &Path, sha256: &str) -> Result<Verified, BootError> {
    let (found, size) = digest(path)?;
    if found != sha256 {
        return Err(BootError::Foreign {
            part,
            expected: sha256.to_owned(),
            found,
        });
    }
    let seal = || -> io::Result<()> {
        let file = File::open(path)?;
        file.set_permissions(Permissions::from_mode(0o400))?;
        file.sync_all()
    };
    seal().map_err(|e| cannot("make durable", path, e))?;
    Ok(Verified {
        part,
        path: path.to_owned(),
        sha256: found,
        size,
    })
}

pub(super) fn adopt(file: &Verified, cache: &Path) -> Result<bool, BootError> {
    create_private_dir(cache).map_err(|e| cannot("prepare the folder", cache, e))?;
    let place = file.part.place(cache, &file.sha256);
    if is_whole(&place, file.size) {
        fs::remove_file(&file.path).map_err(|e| cannot("remove", &file.path, e))?;
        return Ok(false);
    }
    fs::rename(&file.path, &place)
        .and_then(|()| fsync_dir(cache))
        .map_err(|e| cannot("write", &place, e))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const CONTENT: &[u8] = b"a kernel";

    fn staged(dir: &Path) -> (std::path::PathBuf, String) {
        let path = dir.join("kernel");
        fs::write(&path, CONTENT).unwrap();
        (path, hex::encode(Sha256::digest(CONTENT)))
    }

    #[test]
    fn a_file_gets_the_name_of_its_content_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("boot");
        let (path, sha256) = staged(dir.path());
        let place = BootPart::Kernel.place(&cache, &sha256);
        let verified = verify(BootPart::Kernel, &path, &sha256).unwrap();
        assert!(adopt(&verified, &cache).unwrap());
        assert_eq!(fs::read(&place).unwrap(), CONTENT);
        assert_eq!(place.metadata().unwrap().mode() & 0o777, 0o400);
        let inode = place.metadata().unwrap().ino();
        // The same again: the one that is there stays, the staged one goes.
        staged(dir.path());
        let verified = verify(BootPart::Kernel, &path, &sha256).unwrap();
        assert!(!adopt(&verified, &cache).unwrap());
        assert_eq!(place.metadata().unwrap().ino(), inode);
        assert!(!path.exists());
    }

    #[test]
    fn another_content_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, sha256) = staged(dir.path());
        fs::write(&path, b"A kernel").unwrap();
        let error = verify(BootPart::Initramfs, &path, &sha256).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("initramfs") && text.contains(&sha256),
            "{text}"
        );
    }
}
