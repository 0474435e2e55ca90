//! How memory is to be compressed, as people write it: `zstd`, `zstd:3`, `lz4`, `lz4:9`, `none`.
use doze_api::policy::{CompressionAlgorithm, SnapshotCompressionConfig};

/// What an argument's help says.
pub const FORM: &str = "ALGORITHM[:LEVEL]";

/// For clap. Which levels there are the server knows, and says so.
pub fn wanted(text: &str) -> Result<SnapshotCompressionConfig, String> {
    let (algorithm, level) = match text.split_once(':') {
        Some((algorithm, level)) => (algorithm, Some(level)),
        None => (text, None),
    };
    let algorithm = match (algorithm, level) {
        ("none", None) => return Ok(SnapshotCompressionConfig::default()),
        ("zstd", _) => CompressionAlgorithm::Zstd,
        ("lz4", _) => CompressionAlgorithm::Lz4,
        _ => {
            return Err(format!(
                "{text:?} is none; allowed: zstd or lz4 with or without a level (zstd:3), or none"
            ));
        }
    };
    let level = level.map(|level| {
        level
            .parse()
            .map_err(|_| format!("the level {level:?} is not a whole number"))
    });
    Ok(SnapshotCompressionConfig {
        enabled: true,
        algorithm: Some(algorithm),
        level: level.transpose()?,
    })
}

/// The same form back.
pub fn shown(config: &SnapshotCompressionConfig) -> String {
    let algorithm = match (config.enabled, config.algorithm) {
        (false, _) => return "none".to_owned(),
        (true, Some(CompressionAlgorithm::Lz4)) => "lz4",
        (true, Some(CompressionAlgorithm::Zstd) | None) => "zstd",
    };
    match config.level {
        Some(level) => format!("{algorithm}:{level}"),
        None => algorithm.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_is_written_is_shown_again() {
        for text in ["none", "zstd", "zstd:19", "lz4", "lz4:0", "zstd:-4"] {
            assert_eq!(shown(&wanted(text).unwrap()), text);
        }
        for text in [
            "",
            "gzip",
            "none:1",
            "zstd:",
            "zstd:fast",
            "ZSTD",
            "lz4:1:2",
        ] {
            assert!(!wanted(text).unwrap_err().is_empty(), "{text}");
        }
    }
}
