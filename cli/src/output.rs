//! What goes to standard output: tables, JSON, lines. Never through `println!`, which panics when the
//! reader has gone.
use std::io::{self, Write as _};

use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::failure::{self, Failure};

/// Writes `text` and a newline.
pub fn line(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(|e| failure::output(&e))
}

/// Writes a value as indented JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::new(format!("cannot write JSON: {e}")))?;
    line(&text)
}

/// Says something to the person, not to the pipe. Nobody to hear it is no error.
pub fn remark(text: &str) {
    let _nobody_listens = writeln!(io::stderr().lock(), "doze: {text}");
}

/// Replaces the line the cursor is on, on standard error; the empty text clears it.
pub fn status_line(text: &str) {
    let mut err = io::stderr().lock();
    // Carriage return, then "erase to end of line" (ECMA-48 EL).
    let _nobody_looks = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
}

/// Columns as wide as their widest cell, two spaces apart; the last one is not padded.
pub fn table<const N: usize>(headers: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = headers.map(|h| h.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let render = |cells: [&str; N]| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            text.push_str(cell);
            let padding = width.saturating_sub(cell.chars().count()) + 2;
            text.extend(std::iter::repeat_n(' ', padding));
        }
        text.trim_end().to_owned()
    };
    let mut lines = vec![render(headers)];
    lines.extend(
        rows.iter()
            .map(|row| render(row.each_ref().map(String::as_str))),
    );
    lines.join("\n")
}

/// Time since an RFC 3339 timestamp in its largest whole unit (`5s`, `3m`, `7h`, `12d`); `-` for none.
pub fn age(since: Option<&str>, now: OffsetDateTime) -> String {
    let Some(then) = since.and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok()) else {
        return "-".to_owned();
    };
    // The server's clock may be ahead of ours; "in the future" would only confuse.
    let seconds = (now - then).whole_seconds().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Bytes with one decimal, rounded down, in the largest binary unit that is at least 1.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut tenths = u128::from(count) * 10 / 1024;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if tenths < 10240 {
            break;
        }
        tenths /= 1024;
        unit = larger;
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            ["web".to_owned(), "Running".to_owned()],
            ["größer".to_owned(), String::new()],
        ];
        assert_eq!(
            table(["NAME", "STATE"], &rows),
            "NAME    STATE\nweb     Running\ngrößer"
        );
    }

    #[test]
    fn an_empty_table_is_its_header() {
        assert_eq!(table(["A", "B"], &[]), "A  B");
    }

    #[test]
    fn ages() {
        let now = OffsetDateTime::parse("2026-01-02T00:00:00Z", &Rfc3339).unwrap();
        for (since, want) in [
            ("2026-01-01T23:59:59.2Z", "0s"),
            ("2026-01-01T23:59:01Z", "59s"),
            ("2026-01-01T23:01:00Z", "59m"),
            ("2026-01-01T00:00:01Z", "23h"),
            ("2025-12-25T00:00:00Z", "8d"),
            ("2026-01-03T00:00:00Z", "0s"),
            ("yesterday", "-"),
        ] {
            assert_eq!(age(Some(since), now), want, "{since}");
        }
        assert_eq!(age(None, now), "-");
    }

    #[test]
    fn byte_counts() {
        for (count, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 20, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16383.9 PiB"),
        ] {
            assert_eq!(bytes(count), want);
        }
    }
}
