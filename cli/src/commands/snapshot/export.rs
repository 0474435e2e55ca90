//! `doze snapshot export`: a snapshot as one file, for another host.
use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use doze_api::client::SnapshotExport;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use super::find;
use crate::{
    connection::{self, Server},
    failure::Failure,
    output,
    progress::Bytes,
    terminal,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to write it; - is standard output
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Snapshot: its name, its id or the beginning of its id
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let to_stdout = args.output == Path::new("-");
    if to_stdout && terminal::is_terminal(io::stdout()) {
        return Err(Failure::new(
            "an exported snapshot is no text for a terminal; name a file with -o FILE, or redirect standard output",
        ));
    }
    let server = connection::connect(options)?;
    let snapshot = find(&server, &args.snapshot, None).await?;
    let mut export = server
        .client
        .export_snapshot(&snapshot.id)
        .await
        .map_err(|e| server.explain(&e))?;
    if to_stdout {
        copy(&server, &mut export, tokio::io::stdout(), "standard output").await?;
        return Ok(0);
    }
    let shown = args.output.display().to_string();
    // What is no file is written to as it is: a device or a pipe cannot be replaced by one.
    if let Some(special) = special(&args.output)? {
        copy(&server, &mut export, special, &shown).await?;
        return Ok(0);
    }
    // Under its name only when it is whole.
    let part = Part::beside(&args.output)?;
    let file = tokio::fs::File::from_std(part.create()?);
    let written = copy(&server, &mut export, file, &shown).await?;
    part.keep(&args.output)?;
    output::line(&format!("{shown}  {}", output::bytes(written)))?;
    Ok(0)
}

/// The device or pipe of this name, opened; `None`: a file, or nothing yet.
fn special(path: &Path) -> Result<Option<tokio::fs::File>, Failure> {
    let cannot = |e: io::Error| Failure::new(format!("cannot write {}: {e}", path.display()));
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => Ok(None),
        Ok(_) => {
            let opened = fs::OpenOptions::new().write(true).open(path);
            opened.map(|file| Some(file.into())).map_err(cannot)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(cannot(e)),
    }
}

async fn copy(
    server: &Server,
    export: &mut SnapshotExport,
    mut to: impl AsyncWrite + Unpin,
    shown: &str,
) -> Result<u64, Failure> {
    // Also when the reader has gone: half a snapshot is a failure, other than half a list.
    let cannot = |e: io::Error| Failure::new(format!("cannot write {shown}: {e}"));
    let mut progress = Bytes::new("received", None);
    while let Some(bytes) = export.chunk().await.map_err(|e| server.explain(&e))? {
        to.write_all(&bytes).await.map_err(cannot)?;
        progress.add(bytes.len() as u64);
    }
    to.flush().await.map_err(cannot)?;
    Ok(progress.done())
}

/// A file that has not got its name yet; removed when dropped.
struct Part(PathBuf);

impl Part {
    fn beside(target: &Path) -> Result<Self, Failure> {
        let Some(name) = target.file_name() else {
            return Err(Failure::new(format!("{} is no file", target.display())));
        };
        let mut part = name.to_owned();
        part.push(format!(".{}.part", std::process::id()));
        Ok(Self(target.with_file_name(part)))
    }

    /// Ours alone: it holds a guest's memory.
    fn create(&self) -> Result<fs::File, Failure> {
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.0)
            .map_err(|e| Failure::new(format!("cannot create {}: {e}", self.0.display())))
    }

    fn keep(&self, target: &Path) -> Result<(), Failure> {
        let kept = fs::File::open(&self.0)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&self.0, target));
        kept.map_err(|e| Failure::new(format!("cannot write {}: {e}", target.display())))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Renamed, or never made: then there is nothing to remove.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn what_is_no_file_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(special(&dir.path().join("new")).unwrap().is_none());
        fs::write(dir.path().join("old"), "x").unwrap();
        assert!(special(&dir.path().join("old")).unwrap().is_none());
        assert!(special(Path::new("/dev/null")).unwrap().is_some());
        let error = special(dir.path()).unwrap_err().to_string();
        assert!(error.contains("cannot write"), "{error}");
    }

    #[test]
    fn a_file_gets_its_name_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("web.doze");
        let part = Part::beside(&target).unwrap();
        drop(part.create().unwrap());
        assert!(!target.exists());
        drop(part);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let part = Part::beside(&target).unwrap();
        drop(part.create().unwrap());
        part.keep(&target).unwrap();
        drop(part);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let mode = target.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
