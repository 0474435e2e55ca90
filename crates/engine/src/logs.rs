//! Log files of an instance: reading their end, following them, keeping them small.
//!
//! Files are cut by taking whole blocks off their *front* (`FALLOC_FL_COLLAPSE_RANGE`), because the VMM keeps
//! appending to them: nothing it writes is lost and no descriptor has to be reopened.
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use doze_agent::{config::EXIT_MARKER, message::ProgramExit};
use doze_host::watch::FileWatch;
use rustix::fs::FallocateFlags;
use tokio::sync::mpsc;

use crate::{
    context::blocking,
    instance::{APP_LOG, OPERATIONS_LOG, VMM_LOG},
};

/// Longer lines come in pieces of this size, so that a guest that never ends a line costs no memory.
const MAX_LINE: usize = 64 << 10;
/// How much of a log's end is searched for this run's exit marker.
const MARKER_WINDOW: u64 = 256 << 10;
const RUN_MARKER: &str = "doze: boot ";

/// Separates this run from earlier ones in the VMM's log.
pub fn mark_run(vmm_log: &Path, boot: u64) -> io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(vmm_log)?;
    writeln!(file, "{RUN_MARKER}{boot}")
}

/// The program's exit as init wrote it on the serial console in the last run; the fallback for a
/// channel that nobody listened to.
pub async fn exit_marker(vmm_log: &Path) -> Option<ProgramExit> {
    let path = vmm_log.to_owned();
    let text = blocking("reading the exit marker", move || {
        tail_bytes(&path, MARKER_WINDOW)
    })
    .await;
    let text = match text {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => {
            tracing::warn!(%error, path = %vmm_log.display(), "reading the exit marker");
            return None;
        }
        Err(error) => {
            tracing::warn!(%error, "reading the exit marker");
            return None;
        }
    };
    parse_marker(&String::from_utf8_lossy(&text))
}

fn parse_marker(text: &str) -> Option<ProgramExit> {
    let this_run = text.rfind(RUN_MARKER).map_or(text, |start| &text[start..]);
    let line = this_run
        .lines()
        .rev()
        .find_map(|line| line.split_once(EXIT_MARKER))?
        .1;
    serde_json::from_str(line.trim()).ok()
}

fn tail_bytes(path: &Path, window: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(window)))?;
    let mut bytes = Vec::new();
    file.take(window).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Cuts every log of an instance that has grown beyond `limit` bytes to its newest half.
pub async fn trim(dir: &Path, limit: u64) {
    let paths = [APP_LOG, VMM_LOG, OPERATIONS_LOG].map(|name| dir.join(name));
    let outcome = blocking("trimming logs", move || {
        for path in paths {
            if let Err(error) = trim_one(&path, limit) {
                tracing::warn!(%error, path = %path.display(), "trimming a log");
            }
        }
    })
    .await;
    if let Err(error) = outcome {
        tracing::warn!(%error, "trimming logs");
    }
}

fn trim_one(path: &Path, limit: u64) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let file = match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
    {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let metadata = file.metadata()?;
    if metadata.len() <= limit {
        return Ok(());
    }
    let block = metadata.blksize().max(1);
    let cut = (metadata.len() - limit / 2) / block * block;
    if cut == 0 {
        return Ok(());
    }
    match rustix::fs::fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, cut) {
        Ok(()) => Ok(()),
        // Not every file system can; freeing the blocks keeps the disk small at least.
        Err(_) => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, 0, cut).map_err(io::Error::from)
        }
    }
}

/// Sends the last `tail` lines (`None`: all) and, with `follow`, new ones as they are written. Ends when
/// the receiver is dropped, when the folder is removed, or at the end without `follow`.
///
/// # Errors
/// Those of [`FileWatch::new`] when following.
pub fn stream(
    path: PathBuf,
    tail: Option<usize>,
    follow: bool,
) -> io::Result<mpsc::Receiver<String>> {
    // The watch comes before the first read, so nothing falls between them.
    let watch = match follow.then(|| FileWatch::new(&path)).transpose() {
        // An instance without a folder never ran: nothing is there and nothing will come.
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        watch => watch?,
    };
    let (sender, receiver) = mpsc::channel(256);
    tokio::spawn(async move {
        if let Err(error) = pump(&path, tail, watch, &sender).await {
            tracing::warn!(%error, path = %path.display(), "streaming a log");
        }
    });
    Ok(receiver)
}

async fn pump(
    path: &Path,
    tail: Option<usize>,
    watch: Option<FileWatch>,
    sender: &mpsc::Sender<String>,
) -> io::Result<()> {
    let mut reader = LineReader::new(path.to_owned());
    reader = match tail {
        Some(lines) => run_blocking(move || reader.seek_to_tail(lines)).await?,
        None => reader,
    };
    loop {
        let (next, lines) = run_blocking(move || reader.read_lines()).await?;
        reader = next;
        let idle = lines.is_empty();
        for line in lines {
            if sender.send(line).await.is_err() {
                return Ok(());
            }
        }
        if reader.removed {
            return Ok(());
        }
        if !idle {
            continue;
        }
        let Some(watch) = &watch else {
            if let Some(rest) = reader.take_partial() {
                // A receiver that went away does not want the rest.
                let _ = sender.send(rest).await;
            }
            return Ok(());
        };
        tokio::select! {
            () = sender.closed() => return Ok(()),
            more = watch.changed() => if !more? { return Ok(()) },
        }
    }
}

async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// Reads a growing file line by line. A file that is not there yet is empty.
struct LineReader {
    path: PathBuf,
    position: u64,
    partial: Vec<u8>,
    /// It was there and is not any more: the instance was deleted.
    removed: bool,
}

impl LineReader {
    fn new(path: PathBuf) -> LineReader {
        LineReader {
            path,
            position: 0,
            partial: Vec::new(),
            removed: false,
        }
    }

    fn open(&self) -> io::Result<Option<File>> {
        match File::open(&self.path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Goes to where the last `lines` lines begin, reading blocks backwards from the end.
    fn seek_to_tail(mut self, lines: usize) -> io::Result<LineReader> {
        const BLOCK: u64 = 64 << 10;
        let Some(mut file) = self.open()? else {
            return Ok(self);
        };
        let length = file.metadata()?.len();
        // The newline that ends the last line does not begin another one.
        let (mut start, mut wanted) = (length, lines.saturating_add(1));
        if lines == 0 {
            self.position = length;
            return Ok(self);
        }
        let mut last_byte = true;
        while start > 0 {
            let size = BLOCK.min(start);
            start -= size;
            file.seek(SeekFrom::Start(start))?;
            let mut block = vec![0; usize::try_from(size).unwrap_or(0)];
            file.read_exact(&mut block)?;
            if last_byte {
                last_byte = false;
                if block.last() != Some(&b'\n') {
                    wanted -= 1;
                }
            }
            for (index, _) in block
                .iter()
                .enumerate()
                .rev()
                .filter(|(_, byte)| **byte == b'\n')
            {
                wanted -= 1;
                if wanted == 0 {
                    self.position = start + index as u64 + 1;
                    return Ok(self);
                }
            }
        }
        Ok(self)
    }

    /// Complete lines that are there now, about a block of them.
    fn read_lines(mut self) -> io::Result<(LineReader, Vec<String>)> {
        let Some(mut file) = self.open()? else {
            self.removed = self.position > 0;
            return Ok((self, Vec::new()));
        };
        let length = file.metadata()?.len();
        if length < self.position {
            // Its front was cut off; what we had read is gone from it.
            self.position = length;
        }
        file.seek(SeekFrom::Start(self.position))?;
        let mut block = Vec::new();
        file.take(64 << 10).read_to_end(&mut block)?;
        self.position += block.len() as u64;
        let mut lines = Vec::new();
        for byte in block {
            if byte == b'\n' {
                lines.push(line(&std::mem::take(&mut self.partial)));
            } else {
                self.partial.push(byte);
                if self.partial.len() >= MAX_LINE {
                    lines.push(self.take_piece());
                }
            }
        }
        Ok((self, lines))
    }

    /// The beginning of a line that is too long for one: all but a character that is not complete yet.
    fn take_piece(&mut self) -> String {
        let rest = match std::str::from_utf8(&self.partial) {
            Err(error) if error.error_len().is_none() => {
                self.partial.split_off(error.valid_up_to())
            }
            _ => Vec::new(),
        };
        line(&std::mem::replace(&mut self.partial, rest))
    }

    fn take_partial(&mut self) -> Option<String> {
        let partial = std::mem::take(&mut self.partial);
        (!partial.is_empty()).then(|| line(&partial))
    }
}

/// A line without its end, as text. A serial console ends lines with `\r\n`.
fn line(bytes: &[u8]) -> String {
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.log");
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    async fn collect(mut lines: mpsc::Receiver<String>) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(line) = lines.recv().await {
            all.push(line);
        }
        all
    }

    #[tokio::test]
    async fn the_last_lines_are_those_at_the_end_also_across_blocks() {
        let text: String = (0..20_000).map(|n| format!("line {n}\r\n")).collect();
        let (_dir, path) = file(text.as_bytes());
        let lines = collect(stream(path.clone(), Some(12_000), false).unwrap()).await;
        assert_eq!(lines.len(), 12_000);
        assert_eq!(lines[0], "line 8000");
        assert_eq!(lines[11_999], "line 19999");
        assert_eq!(
            collect(stream(path.clone(), Some(0), false).unwrap())
                .await
                .len(),
            0
        );
        assert_eq!(
            collect(stream(path, None, false).unwrap()).await.len(),
            20_000
        );
    }

    #[tokio::test]
    async fn a_last_line_without_end_is_a_line() {
        let (_dir, path) = file(b"one\ntwo\nthree");
        assert_eq!(
            collect(stream(path, Some(2), false).unwrap()).await,
            ["two", "three"]
        );
    }

    #[tokio::test]
    async fn following_sees_what_is_written_later_and_ends_with_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("app.log");
        let mut lines = stream(path.clone(), Some(10), true).unwrap();
        // Written only once the reader waits or not: both orders must work.
        std::fs::write(&path, "first\n").unwrap();
        assert_eq!(lines.recv().await.unwrap(), "first");
        let mut file = std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap();
        file.write_all(b"second\n").unwrap();
        assert_eq!(lines.recv().await.unwrap(), "second");
        drop(dir);
        assert_eq!(lines.recv().await, None);
    }

    #[test]
    fn trimming_takes_whole_blocks_off_the_front_and_keeps_the_end() {
        let text: String = (0..100_000).map(|n| format!("{n:09}\n")).collect();
        let (_dir, path) = file(text.as_bytes());
        trim_one(&path, 400_000).unwrap();
        let left = std::fs::read(&path).unwrap();
        assert!(left.ends_with(b"000099999\n"));
        let data = left.iter().filter(|byte| **byte != 0).count();
        assert!((100_000..=400_000).contains(&data), "{data} bytes left");
        trim_one(&path, 2_000_000).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), left);
    }

    #[test]
    fn the_exit_marker_is_the_last_of_this_run() {
        let exit = |code| format!("{EXIT_MARKER}{{\"code\":{code},\"message\":\"m\"}}\r\n");
        let text = format!(
            "{RUN_MARKER}1\n{}{RUN_MARKER}2\nkernel\n[  1.0] {}",
            exit(1),
            exit(2)
        );
        assert_eq!(parse_marker(&text).unwrap().code, 2);
        let crashed = format!("{RUN_MARKER}1\n{}{RUN_MARKER}2\nkernel panic\n", exit(1));
        assert_eq!(parse_marker(&crashed), None);
    }
}
