//! Compression of memory between the wire and the engine.
use doze_api::{
    StandbyCompression, StandbyCompressionState, StandbyInstanceRequest,
    policy::{CompressionAlgorithm, SnapshotCompressionConfig, SnapshotPolicy as WirePolicy},
};
use doze_engine::{
    Algorithm, Codec, Compression, InstanceView, MemoryCompression, Progress, SnapshotPolicy,
    StandbyOptions,
};

use super::{
    fields::{self, Checked},
    instance::timestamp,
};
use crate::http::errors::ApiError;

/// `field`: where it stands in the request.
pub(crate) fn compression(field: &str, wanted: &SnapshotCompressionConfig) -> Checked<Compression> {
    if !wanted.enabled {
        return Ok(Compression::Off);
    }
    let algorithm = match wanted.algorithm {
        Some(CompressionAlgorithm::Zstd) | None => Algorithm::Zstd,
        Some(CompressionAlgorithm::Lz4) => Algorithm::Lz4,
    };
    let codec = Codec::new(algorithm, wanted.level.map(i64::from)).map_err(|_| {
        let (least, most, default) = algorithm.levels();
        fields::invalid(
            "invalid_field",
            &format!("{field}.level"),
            wanted.level.unwrap_or_default(),
            &format!("{least} to {most} with {algorithm}, {default} when left out"),
        )
    })?;
    Ok(Compression::On(codec))
}

/// A policy on a create request. All that is wrong with it comes at once.
pub(crate) fn policy(policy: &WirePolicy) -> Result<SnapshotPolicy, Vec<ApiError>> {
    let mut complaints = Vec::new();
    let mut keep = super::create::Collector(&mut complaints);
    let compression = keep.checked(
        policy
            .compression
            .as_ref()
            .map(|wanted| self::compression("snapshot_policy.compression", wanted))
            .transpose(),
    );
    let delay = keep.checked(
        policy
            .standby_compression_delay
            .as_deref()
            .map(|text| fields::duration("snapshot_policy.standby_compression_delay", text))
            .transpose(),
    );
    match (compression, delay) {
        (Some(compression), Some(standby_compression_delay)) => Ok(SnapshotPolicy {
            compression,
            standby_compression_delay,
        }),
        _ => Err(complaints),
    }
}

/// The body of a standby.
pub(crate) fn standby(request: &StandbyInstanceRequest) -> Checked<StandbyOptions> {
    let compression_delay = request
        .compression_delay
        .as_deref()
        .map(|text| fields::duration("compression_delay", text))
        .transpose()?;
    let compression = request
        .compression
        .as_ref()
        .map(|wanted| self::compression("compression", wanted))
        .transpose()?;
    Ok(StandbyOptions {
        compression,
        compression_delay,
    })
}

/// As instances show their policy.
pub(crate) fn shown_policy(policy: &SnapshotPolicy) -> WirePolicy {
    WirePolicy {
        compression: policy.compression.map(|wanted| match wanted {
            Compression::Off => SnapshotCompressionConfig::default(),
            Compression::On(codec) => shown(codec),
        }),
        standby_compression_delay: policy
            .standby_compression_delay
            .map(super::auto_standby::go),
    }
}

pub(crate) fn shown(codec: Codec) -> SnapshotCompressionConfig {
    SnapshotCompressionConfig {
        enabled: true,
        algorithm: Some(match codec.algorithm() {
            Algorithm::Zstd => CompressionAlgorithm::Zstd,
            Algorithm::Lz4 => CompressionAlgorithm::Lz4,
        }),
        level: Some(codec.level().into()),
    }
}

/// What becomes of the memory of an instance that sleeps.
pub(crate) fn of_instance(view: &InstanceView) -> Option<StandbyCompression> {
    if view.state() != doze_lifecycle::State::Standby {
        return None;
    }
    let compression = view.compression.as_ref()?;
    let state = match &compression.progress {
        Progress::Planned if view.is_compressing() => StandbyCompressionState::Compressing,
        Progress::Planned => StandbyCompressionState::Pending,
        Progress::Compressed { .. } => StandbyCompressionState::Compressed,
        Progress::Failed { .. } => StandbyCompressionState::Error,
    };
    Some(StandbyCompression {
        state,
        compression: shown(compression.codec),
        due_at: timestamp(compression.due_us),
        error: error(compression),
        compressed_size_bytes: compressed_size(compression),
        uncompressed_size_bytes: view.spec.memory_bytes,
    })
}

/// Why it failed, if it did.
pub(crate) fn error(compression: &MemoryCompression) -> Option<String> {
    match &compression.progress {
        Progress::Failed { reason } => Some(reason.clone()),
        Progress::Planned | Progress::Compressed { .. } => None,
    }
}

/// Bytes, once it is done.
pub(crate) fn compressed_size(compression: &MemoryCompression) -> Option<u64> {
    match compression.progress {
        Progress::Compressed { compressed, .. } => Some(compressed),
        Progress::Planned | Progress::Failed { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn read(body: Value) -> Checked<StandbyOptions> {
        standby(&serde_json::from_value(body).unwrap())
    }

    #[test]
    fn algorithm_and_level_have_defaults() {
        for (body, algorithm, level) in [
            (json!({"enabled": true}), Algorithm::Zstd, 1),
            (
                json!({"enabled": true, "algorithm": "lz4"}),
                Algorithm::Lz4,
                0,
            ),
            (json!({"enabled": true, "level": 19}), Algorithm::Zstd, 19),
            (
                json!({"enabled": true, "algorithm": "lz4", "level": 9}),
                Algorithm::Lz4,
                9,
            ),
        ] {
            let options = read(json!({"compression": body})).unwrap();
            let codec = Codec::new(algorithm, Some(level)).unwrap();
            assert_eq!(options.compression, Some(Compression::On(codec)));
        }
    }

    #[test]
    fn what_is_off_is_off_whatever_else_it_says() {
        for body in [
            json!({"enabled": false}),
            json!({"enabled": false, "algorithm": "brotli", "level": 77}),
            json!({"enabled": false, "level": "many"}),
        ] {
            let options = read(json!({"compression": body})).unwrap();
            assert_eq!(options.compression, Some(Compression::Off));
            assert!(!options.wants_something(None));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, field) in [
            (
                json!({"compression": {"enabled": true, "level": 0}}),
                "compression.level: 0 ",
            ),
            (
                json!({"compression": {"enabled": true, "level": 20}}),
                "compression.level: 20 ",
            ),
            (
                json!({"compression": {"enabled": true, "algorithm": "lz4", "level": 10}}),
                "compression.level: 10 ",
            ),
            (json!({"compression_delay": "-1s"}), "compression_delay: "),
            (json!({"compression_delay": "5"}), "compression_delay: "),
        ] {
            let error = read(body).unwrap_err();
            assert_eq!(error.status, 400);
            assert!(error.body.message.contains(field), "{}", error.body.message);
        }
        for body in [
            json!({"compression": {}}),
            json!({"compression": {"enabled": true, "algorithm": "brotli"}}),
            json!({"compression": {"enabled": true, "level": 2.5}}),
            json!({"compression": {"enabled": true, "levle": 2}}),
        ] {
            serde_json::from_value::<StandbyInstanceRequest>(body).unwrap_err();
        }
    }

    #[test]
    fn a_policy_is_checked_as_a_whole_and_shown_in_its_one_form() {
        let wire = |body| serde_json::from_value::<WirePolicy>(body).unwrap();
        let bad = wire(json!({
            "compression": {"enabled": true, "level": 33}, "standby_compression_delay": "soon",
        }));
        assert_eq!(policy(&bad).unwrap_err().len(), 2);
        let good = wire(json!({
            "compression": {"enabled": true}, "standby_compression_delay": "90s",
        }));
        assert_eq!(
            serde_json::to_value(shown_policy(&policy(&good).unwrap())).unwrap(),
            json!({
                "compression": {"enabled": true, "algorithm": "zstd", "level": 1},
                "standby_compression_delay": "1m30s",
            })
        );
        let off = wire(json!({"compression": {"enabled": false, "algorithm": "lz4"}}));
        assert_eq!(
            serde_json::to_value(shown_policy(&policy(&off).unwrap())).unwrap(),
            json!({"compression": {"enabled": false}})
        );
    }
}
