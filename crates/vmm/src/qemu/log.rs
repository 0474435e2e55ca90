//! The end of a VMM's log, for error messages.
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

/// What fits into a message that somebody reads.
const MAX_BYTES: u64 = 4096;
const MAX_LINES: usize = 12;

/// Length of the log now; what is written later belongs to the process about to be started.
pub(super) fn length(path: &Path) -> io::Result<u64> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(meta.len()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(e) => Err(e),
    }
}

/// The last lines written after `start`, without control characters (a guest writes here too). Says
/// so when there are none or the log cannot be read: this is always beside another error.
pub(super) fn tail(path: &Path, start: u64) -> String {
    match read_end(path, start) {
        Ok(text) if text.is_empty() => "it wrote nothing to its log".to_owned(),
        Ok(text) => text,
        Err(e) => format!("its log {} cannot be read: {e}", path.display()),
    }
}

fn read_end(path: &Path, start: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    // A log cut since is shorter than it was.
    let start = if start > length { 0 } else { start };
    file.seek(SeekFrom::Start(start.max(length.saturating_sub(MAX_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect();
    Ok(lines[lines.len().saturating_sub(MAX_LINES)..].join("\n"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn only_the_last_lines_of_this_run_without_control_characters() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(length(&path).unwrap(), 0);
        assert!(tail(&path, 0).contains("cannot be read"));
        std::fs::write(&path, "an earlier run\n").unwrap();
        let start = length(&path).unwrap();
        assert_eq!(tail(&path, start), "it wrote nothing to its log");
        let mut text = String::from("an earlier run\n");
        for i in 0..20 {
            text.push_str(&format!("line {i}\r\n\n"));
        }
        text.push_str("\x1b[31mred\x07 \u{fffd}");
        std::fs::write(&path, &text).unwrap();
        let tail_text = tail(&path, start);
        assert_eq!(tail_text.lines().count(), MAX_LINES);
        assert!(tail_text.starts_with("line 9\n") && tail_text.ends_with("[31mred \u{fffd}"));
        // A log that was cut.
        std::fs::write(&path, "fresh").unwrap();
        assert_eq!(tail(&path, 4000), "fresh");
    }

    #[test]
    fn a_long_line_is_cut_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, format!("{}é end", "é".repeat(10_000))).unwrap();
        let text = tail(&path, 0);
        assert!(text.ends_with("é end") && text.len() as u64 <= MAX_BYTES + 3);
    }
}
