//! Byte sizes as people write them. Units are binary: `1KB` = `1K` = `1KiB` = 1024 bytes.
use parse_size::Config;

/// The text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{input:?} is not a size ({reason}); allowed: a number with an optional binary unit, for example 1GB, 512MB or 1073741824"
)]
pub struct SizeError {
    pub input: String,
    pub reason: String,
}

/// Bytes in `text`: a number (fractions allowed) with an optional unit up to `EB`. A bare number is
/// bytes; `1GB`, `1G` and `1GiB` are all 1024^3.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| SizeError {
            input: text.to_owned(),
            reason: error.to_string(),
        })
}

/// The shortest exact form: the largest unit that divides `bytes`, so that [`parse_size`] gives the
/// same number back (`1GB`, `1536MB`, `1000`).
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 6] = [
        (60, "EB"),
        (50, "PB"),
        (40, "TB"),
        (30, "GB"),
        (20, "MB"),
        (10, "KB"),
    ];
    if bytes == 0 {
        return "0".to_owned();
    }
    UNITS
        .into_iter()
        .find(|(shift, _)| bytes.trailing_zeros() >= *shift)
        .map_or_else(
            || bytes.to_string(),
            |(shift, unit)| format!("{}{unit}", bytes >> shift),
        )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("1B", 1),
            ("1KB", 1 << 10),
            ("512MB", 512 << 20),
            ("1G", 1 << 30),
            ("1GB", 1 << 30),
            ("1GiB", 1 << 30),
            ("1gb", 1 << 30),
            ("1.5GB", 3 << 29),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        for text in [
            "",
            "GB",
            "-1",
            "1XB",
            "1 G B",
            "ten",
            "1GB/s",
            "99999999999EB",
        ] {
            let error = parse_size(text).unwrap_err();
            assert_eq!(error.input, text);
            assert!(error.to_string().contains("512MB"), "{error}");
        }
    }

    #[test]
    fn printed_in_the_largest_exact_unit() {
        for (bytes, text) in [
            (0, "0"),
            (1000, "1000"),
            (1 << 10, "1KB"),
            (3 << 29, "1536MB"),
            (10 << 30, "10GB"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
    }

    proptest! {
        #[test]
        fn printing_round_trips(bytes: u64, shift in 0u32..64) {
            let bytes = bytes >> shift << shift;
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,40}") {
            let _ = parse_size(&text);
        }
    }
}
