//! An image on this machine as one stream of bytes: a file as it is, a directory as a tar made on the
//! way (nothing is written to disk).
use std::{fs, io, os::fd::OwnedFd, path::Path, thread::JoinHandle};

use crate::failure::Failure;

/// What is sent, and how long it is when that is known beforehand.
#[derive(Debug)]
pub struct Upload {
    pub stream: tokio::fs::File,
    pub length: Option<u64>,
    pub packer: Packer,
}

/// The thread that makes a directory's tar, if there is one.
#[derive(Debug)]
pub struct Packer(Option<JoinHandle<io::Result<()>>>);

impl Packer {
    /// Why the stream was not whole; `None` when it was, or when its reader did not want all of it.
    /// To be asked after the stream was dropped: then the thread is at its end.
    pub fn failure(self) -> Option<io::Error> {
        let outcome = self
            .0?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the tar writer panicked")));
        outcome
            .err()
            .filter(|error| error.kind() != io::ErrorKind::BrokenPipe)
    }
}

/// Refuses, before anything is sent, what cannot be an image.
pub fn open(path: &Path) -> Result<Upload, Failure> {
    let cannot = |e: io::Error| Failure::new(format!("cannot read {}: {e}", path.display()));
    let meta = fs::metadata(path).map_err(cannot)?;
    if !meta.is_dir() {
        let file = fs::File::open(path).map_err(cannot)?;
        return Ok(Upload {
            stream: file.into(),
            length: meta.is_file().then_some(meta.len()),
            packer: Packer(None),
        });
    }
    if !path.join("index.json").is_file() {
        return Err(Failure::new(format!(
            "{} is not an OCI layout: it has no index.json; a layout is what `skopeo copy ... oci:DIR` writes",
            path.display()
        )));
    }
    // Written by a thread, which gets an error when the reader goes away.
    let (reader, writer) = io::pipe().map_err(cannot)?;
    let dir = path.to_path_buf();
    let packer = std::thread::Builder::new()
        .name("tar".to_owned())
        .spawn(move || pack(&dir, writer))
        .map_err(cannot)?;
    Ok(Upload {
        stream: fs::File::from(OwnedFd::from(reader)).into(),
        length: None,
        packer: Packer(Some(packer)),
    })
}

fn pack(dir: &Path, writer: io::PipeWriter) -> io::Result<()> {
    let mut tar = tar::Builder::new(io::BufWriter::with_capacity(256 << 10, writer));
    // A link inside a layout (blobs shared between layouts) stands for its content.
    tar.follow_symlinks(true);
    tar.append_dir_all(".", dir)?;
    io::Write::flush(&mut tar.into_inner()?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::path::PathBuf;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_directory_arrives_as_a_tar_of_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("index.json"), "{}").unwrap();
        // More than a pipe holds, so that writer and reader must really run at once.
        fs::write(dir.path().join("blobs/sha256/ab"), vec![7; 300_000]).unwrap();
        let mut upload = open(dir.path()).unwrap();
        let mut bytes = Vec::new();
        upload.stream.read_to_end(&mut bytes).await.unwrap();
        assert!(upload.packer.failure().is_none());
        let mut archive = tar::Archive::new(&bytes[..]);
        let mut files: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.header().entry_type().is_file())
            .map(|entry| (entry.path().unwrap().into_owned(), entry.size()))
            .collect();
        files.sort();
        assert_eq!(
            files,
            [
                (PathBuf::from("blobs/sha256/ab"), 300_000),
                (PathBuf::from("index.json"), 2)
            ]
        );
    }

    #[tokio::test]
    async fn a_file_is_sent_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), b"abc").unwrap();
        let mut upload = open(file.path()).unwrap();
        assert_eq!(upload.length, Some(3));
        let mut bytes = Vec::new();
        upload.stream.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, b"abc");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_is_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("index.json"), "{}").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("blobs")).unwrap();
        let mut upload = open(dir.path()).unwrap();
        let mut bytes = Vec::new();
        upload.stream.read_to_end(&mut bytes).await.unwrap();
        assert!(upload.packer.failure().is_some());
    }

    #[tokio::test]
    async fn a_reader_that_leaves_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("index.json"), vec![b' '; 1 << 20]).unwrap();
        let Upload { stream, packer, .. } = open(dir.path()).unwrap();
        drop(stream);
        assert!(packer.failure().is_none());
    }

    #[test]
    fn what_is_no_layout_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(
            open(dir.path())
                .unwrap_err()
                .to_string()
                .contains("index.json")
        );
        let missing = open(&dir.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none: No such file"), "{missing}");
    }
}
