//! Snapshot schedules, from the wire to the engine and back.
use std::time::Duration;

use doze_api::{SetSnapshotScheduleRequest, SnapshotSchedule, SnapshotScheduleRetention};
use doze_engine::{Schedule, ScheduleRequest};
use doze_lifecycle::duration::GoDuration;

use super::{
    create::Collector,
    fields::{self, Checked},
    instance::timestamp,
};
use crate::http::errors::ApiError;

const MIN_INTERVAL: Duration = Duration::from_secs(60);
/// The rest of a snapshot's name is for the moment it was taken.
const MAX_PREFIX: usize = 47;

/// Checks every field and reports all that is wrong with them.
pub(crate) fn request(request: SetSnapshotScheduleRequest) -> Checked<ScheduleRequest> {
    let mut complaints = Vec::new();
    let mut keep = Collector(&mut complaints);
    let interval = keep.checked(interval(&request.interval));
    let max_count = keep.checked(max_count(request.retention.max_count));
    let max_age = keep.checked(max_age(request.retention.max_age.as_deref()));
    if let (Some(None), Some(None)) = (max_count, max_age) {
        let keeps: Checked<()> = Err(fields::invalid(
            "invalid_field",
            "retention",
            "keeping all snapshots for ever",
            "max_count of 1 and more, max_age above zero, or both",
        ));
        keep.checked(keeps);
    }
    let name_prefix = request.name_prefix.filter(|prefix| !prefix.is_empty());
    keep.checked(name_prefix.as_deref().map_or(Ok(()), |prefix| {
        fields::label("name_prefix", prefix, MAX_PREFIX)
    }));
    let metadata = request.metadata.unwrap_or_default();
    complaints.extend(fields::tags_in("metadata", &metadata));
    match (ApiError::all(complaints), interval) {
        (None, Some(interval)) => Ok(ScheduleRequest {
            interval_us: micros(interval),
            max_count: max_count.flatten(),
            max_age_us: max_age.flatten().map(micros),
            metadata,
            name_prefix,
        }),
        (Some(error), _) => Err(error),
        (None, None) => Err(ApiError::internal("an interval went missing")),
    }
}

fn interval(text: &str) -> Checked<Duration> {
    let interval = fields::duration("interval", text)?;
    match interval >= MIN_INTERVAL {
        true => Ok(interval),
        false => Err(fields::invalid(
            "invalid_field",
            "interval",
            format!("{text:?}"),
            "1m and more",
        )),
    }
}

/// 0 is the contract's word for "does not count".
fn max_count(count: Option<i64>) -> Checked<Option<u32>> {
    let Some(count) = count else {
        return Ok(None);
    };
    u32::try_from(count)
        .map(|count| Some(count).filter(|count| *count > 0))
        .map_err(|_| {
            fields::invalid(
                "invalid_field",
                "retention.max_count",
                count,
                &format!("0 to {}", u32::MAX),
            )
        })
}

fn max_age(text: Option<&str>) -> Checked<Option<Duration>> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let age = fields::duration("retention.max_age", text)?;
    Ok(Some(age).filter(|age| !age.is_zero()))
}

/// Rounded up, so that what is above zero stays so.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX)
}

fn text(micros: u64) -> String {
    GoDuration::from_std(Duration::from_micros(micros)).to_string()
}

pub(crate) fn schedule(schedule: Schedule) -> SnapshotSchedule {
    let request = schedule.request;
    SnapshotSchedule {
        instance_id: schedule.instance_id,
        interval: text(request.interval_us),
        retention: SnapshotScheduleRetention {
            max_count: request.max_count.map(i64::from),
            max_age: request.max_age_us.map(text),
        },
        metadata: request.metadata,
        name_prefix: request.name_prefix,
        created_at: timestamp(schedule.created_at_us),
        updated_at: timestamp(schedule.updated_at_us),
        next_run_at: timestamp(schedule.next_run_at_us),
        last_run_at: schedule.last_run_at_us.map(timestamp),
        last_snapshot_id: schedule.last_snapshot_id,
        last_error: schedule.last_error,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn convert(body: Value) -> Checked<ScheduleRequest> {
        request(serde_json::from_value(body).unwrap())
    }

    #[test]
    fn a_schedule_arrives_whole_and_reads_back_as_go_prints_it() {
        let request = convert(json!({
            "interval": "90m", "retention": {"max_count": 3, "max_age": "36h"},
            "metadata": {"by": "schedule"}, "name_prefix": "nightly",
        }))
        .unwrap();
        assert_eq!(request.interval_us, 5_400_000_000);
        assert_eq!(request.max_count, Some(3));
        let answer = serde_json::to_value(schedule(Schedule {
            instance_id: "i".to_owned(),
            request,
            created_at_us: 0,
            updated_at_us: 1_000_000,
            next_run_at_us: 2_000_000,
            last_run_at_us: None,
            last_snapshot_id: None,
            last_error: Some("no room".to_owned()),
        }))
        .unwrap();
        assert_eq!(
            answer,
            json!({
                "instance_id": "i", "interval": "1h30m0s",
                "retention": {"max_count": 3, "max_age": "36h0m0s"},
                "metadata": {"by": "schedule"}, "name_prefix": "nightly",
                "created_at": "1970-01-01T00:00:00Z", "updated_at": "1970-01-01T00:00:01Z",
                "next_run_at": "1970-01-01T00:00:02Z", "last_run_at": null,
                "last_snapshot_id": null, "last_error": "no room",
            })
        );
    }

    #[test]
    fn either_bound_of_the_retention_will_do() {
        let keep = |retention: Value| {
            let request = convert(json!({"interval": "1m", "retention": retention})).unwrap();
            (request.max_count, request.max_age_us)
        };
        assert_eq!(keep(json!({"max_count": 1})), (Some(1), None));
        assert_eq!(
            keep(json!({"max_count": 0, "max_age": "1h"})),
            (None, Some(3_600_000_000))
        );
        assert_eq!(
            keep(json!({"max_count": 2, "max_age": "0s"})),
            (Some(2), None)
        );
        // Shorter than the engine's clock ticks, but not nothing.
        assert_eq!(keep(json!({"max_age": "1ns"})), (None, Some(1)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let good = json!({"interval": "1m", "retention": {"max_count": 1}});
        for (key, value, code, field) in [
            ("interval", json!("59.9s"), "invalid_field", "interval: "),
            ("interval", json!("60"), "invalid_field", "interval: "),
            ("interval", json!("-1h"), "invalid_field", "interval: "),
            ("retention", json!({}), "invalid_field", "retention: "),
            (
                "retention",
                json!({"max_count": 0, "max_age": "0s"}),
                "invalid_field",
                "retention: ",
            ),
            (
                "retention",
                json!({"max_count": -1}),
                "invalid_field",
                "retention.max_count: -1 ",
            ),
            (
                "retention",
                json!({"max_age": "old"}),
                "invalid_field",
                "retention.max_age: ",
            ),
            (
                "name_prefix",
                json!("Nightly"),
                "invalid_name",
                "name_prefix: ",
            ),
            (
                "name_prefix",
                json!("a".repeat(48)),
                "invalid_name",
                "name_prefix: ",
            ),
            ("metadata", json!({"": "x"}), "invalid_field", "metadata: "),
        ] {
            let mut body = good.clone();
            body[key] = value;
            let error = convert(body.clone()).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.body.code.as_str()),
                (400, code),
                "{body}"
            );
            assert!(error.body.message.starts_with(field), "{body}: {error}");
        }
        let mut longest = good;
        longest["name_prefix"] = json!("a".repeat(47));
        assert!(convert(longest).is_ok());
        let error =
            convert(json!({"interval": "1s", "retention": {}, "name_prefix": "-"})).unwrap_err();
        assert_eq!(error.body.details.len(), 3, "{:?}", error.body.details);
    }
}
