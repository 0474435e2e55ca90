//! Who wants what compressed, and who has the last word: the request, the instance, the server.
use std::time::Duration;

use doze_snapshot::Codec;
use serde::{Deserialize, Serialize};

use super::plan::MemoryCompression;

/// What somebody wants. To want none is an answer, too: it switches off what a lower level wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Off,
    On(Codec),
}

/// How snapshots of an instance are made, as its owner wants it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPolicy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Of a standby only; `None`: at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub standby_compression_delay: Option<Duration>,
}

/// The server's part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotConfig {
    pub compression_default: Option<Compression>,
    /// Jobs that compress at the same time at most; the others wait their turn.
    pub max_concurrent_compressions: usize,
}

impl Default for SnapshotConfig {
    fn default() -> SnapshotConfig {
        SnapshotConfig {
            compression_default: None,
            max_concurrent_compressions: 1,
        }
    }
}

/// How a request to fall asleep wants the memory kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StandbyOptions {
    pub compression: Option<Compression>,
    pub compression_delay: Option<Duration>,
}

impl StandbyOptions {
    /// Whether it wants something that an instance which sleeps already, with this plan, cannot obey. What has no
    /// effect wants nothing: no compression where none is planned, a delay of one that is not wanted or done.
    pub fn wants_something(&self, plan: Option<&MemoryCompression>) -> bool {
        match (self.compression, self.compression_delay) {
            (Some(Compression::On(_)), _) => true,
            (Some(Compression::Off), _) => plan.is_some(),
            (None, Some(_)) => plan.is_some_and(MemoryCompression::is_planned),
            (None, None) => false,
        }
    }
}

/// The first level that says something decides.
pub fn effective(
    request: Option<Compression>,
    instance: Option<SnapshotPolicy>,
    server: SnapshotConfig,
) -> Option<Codec> {
    let instance = instance.and_then(|policy| policy.compression);
    match request.or(instance).or(server.compression_default)? {
        Compression::Off => None,
        Compression::On(codec) => Some(codec),
    }
}

/// How long a standby's compression waits.
pub fn delay(options: StandbyOptions, instance: Option<SnapshotPolicy>) -> Duration {
    let instance = instance.and_then(|policy| policy.standby_compression_delay);
    options.compression_delay.or(instance).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use doze_snapshot::Algorithm;

    use super::*;

    fn on(level: i64) -> Compression {
        Compression::On(Codec::new(Algorithm::Zstd, Some(level)).unwrap())
    }

    /// Every combination of what three levels can say.
    #[test]
    fn the_highest_level_that_says_something_decides() {
        let says = |level| [None, Some(Compression::Off), Some(on(level))];
        for request in says(1) {
            for instance in says(2) {
                for server in says(3) {
                    let policy = SnapshotPolicy {
                        compression: instance,
                        standby_compression_delay: None,
                    };
                    let config = SnapshotConfig {
                        compression_default: server,
                        ..SnapshotConfig::default()
                    };
                    let expected = match (request, instance, server) {
                        (Some(Compression::On(codec)), _, _)
                        | (None, Some(Compression::On(codec)), _)
                        | (None, None, Some(Compression::On(codec))) => Some(codec),
                        (Some(Compression::Off), _, _)
                        | (None, Some(Compression::Off), _)
                        | (None, None, Some(Compression::Off) | None) => None,
                    };
                    assert_eq!(effective(request, Some(policy), config), expected);
                }
            }
        }
        assert_eq!(effective(None, None, SnapshotConfig::default()), None);
    }

    #[test]
    fn a_sleeper_obeys_only_what_changes_nothing() {
        let codec = Codec::new(Algorithm::Zstd, None).unwrap();
        let planned = MemoryCompression::planned(codec, 0, Duration::ZERO);
        let done = MemoryCompression {
            progress: crate::compression::plan::Progress::Compressed {
                raw: 2,
                compressed: 1,
            },
            ..planned.clone()
        };
        let late = Some(Duration::from_secs(1));
        for (compression, compression_delay, [nothing, pending, compressed]) in [
            (None, None, [false, false, false]),
            (None, late, [false, true, false]),
            (Some(Compression::Off), None, [false, true, true]),
            (Some(Compression::Off), late, [false, true, true]),
            (Some(on(1)), None, [true, true, true]),
        ] {
            let options = StandbyOptions {
                compression,
                compression_delay,
            };
            assert_eq!(options.wants_something(None), nothing);
            assert_eq!(options.wants_something(Some(&planned)), pending);
            assert_eq!(options.wants_something(Some(&done)), compressed);
        }
    }

    #[test]
    fn the_requests_delay_wins_also_when_it_is_none() {
        let policy = Some(SnapshotPolicy {
            compression: None,
            standby_compression_delay: Some(Duration::from_secs(5)),
        });
        let asked = |delay| StandbyOptions {
            compression: None,
            compression_delay: delay,
        };
        assert_eq!(delay(asked(Some(Duration::ZERO)), policy), Duration::ZERO);
        assert_eq!(delay(asked(None), policy), Duration::from_secs(5));
        assert_eq!(delay(asked(None), None), Duration::ZERO);
    }
}
