//! The phase ledger as readers see it, checked on every instance answer any case receives.
//!
//! - `current_phase` is the state in lower case;
//! - the durations add up to the time since `created_at`, by *our* clock;
//! - no phase's total ever shrinks, and `created_at` never changes. One exception: a phase that was
//!   live in the answer before and is over now may have ended earlier than that answer supposed,
//!   because the guest tells the age of what happened, and may tell it late.
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// How far the sum may be from our own stopwatch, milliseconds. Answers may wait this long in
/// queues while two emulated guests keep both cores busy; a wrong ledger is off by whole phases.
const TOLERANCE_MS: i128 = 1_500;

/// Remembers the last answer per instance.
#[derive(Debug, Default)]
pub struct PhaseCheck {
    last: Mutex<HashMap<String, Seen>>,
}

#[derive(Debug)]
struct Seen {
    created_at: String,
    phase: String,
    durations: BTreeMap<String, i128>,
}

/// Unix time in milliseconds by our own clock.
pub fn now_ms() -> i128 {
    OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000
}

/// RFC 3339 in UTC with `Z` to Unix milliseconds.
pub fn parse_time(text: &str) -> Result<i128> {
    ensure!(
        text.ends_with('Z'),
        "timestamp {text:?} is not in UTC with Z"
    );
    let time =
        OffsetDateTime::parse(text, &Rfc3339).with_context(|| format!("timestamp {text:?}"))?;
    Ok(time.unix_timestamp_nanos() / 1_000_000)
}

/// The durations of an instance answer, milliseconds by phase.
pub fn durations(instance: &Value) -> Result<BTreeMap<String, i128>> {
    let map = instance["phase_durations_ms"]
        .as_object()
        .context("phase_durations_ms is not an object")?;
    map.iter()
        .map(|(k, v)| {
            Ok((
                k.clone(),
                i128::from(
                    v.as_u64()
                        .with_context(|| format!("phase_durations_ms.{k} is {v}"))?,
                ),
            ))
        })
        .collect()
}

impl PhaseCheck {
    /// Checks `body` if it is an instance or a list of them. `sent_ms` is when the request went out;
    /// now is when the answer arrived. `ordered` is false when other requests were in flight, so that
    /// answers may be seen out of order.
    pub fn check(&self, body: &Value, sent_ms: i128) -> Result<()> {
        match body {
            Value::Array(items) => items.iter().try_for_each(|i| self.check(i, sent_ms)),
            Value::Object(map) if map.contains_key("state") && map.contains_key("hypervisor") => {
                self.instance(body, sent_ms)
                    .with_context(|| format!("phase fields of {body}"))
            }
            _ => Ok(()),
        }
    }

    fn instance(&self, body: &Value, sent_ms: i128) -> Result<()> {
        const PHASES: [&str; 7] = [
            "created",
            "initializing",
            "running",
            "paused",
            "shutdown",
            "stopped",
            "standby",
        ];
        let arrived_ms = now_ms();
        let id = body["id"].as_str().context("id")?;
        let state = body["state"].as_str().context("state")?;
        let phase = body["current_phase"]
            .as_str()
            .context("current_phase is missing")?;
        let since = parse_time(
            body["current_phase_since"]
                .as_str()
                .context("current_phase_since is missing")?,
        )?;
        let created_at = body["created_at"].as_str().context("created_at")?;
        let created = parse_time(created_at)?;
        let durations = durations(body)?;
        if state != "Unknown" {
            ensure!(
                phase == state.to_lowercase(),
                "current_phase {phase:?} in state {state:?}"
            );
        }
        ensure!(
            durations.keys().all(|k| PHASES.contains(&k.as_str())),
            "unknown phase in {durations:?}"
        );
        ensure!(
            durations.contains_key(phase),
            "the current phase {phase:?} has no duration"
        );
        ensure!(
            since >= created - 1,
            "current_phase_since is before created_at"
        );
        let end_of_sum = created + durations.values().sum::<i128>();
        ensure!(
            end_of_sum >= sent_ms - TOLERANCE_MS && end_of_sum <= arrived_ms + TOLERANCE_MS,
            "created_at + sum of durations is {} ms away from now",
            end_of_sum - arrived_ms
        );
        // The live phase alone cannot have lasted longer than it has been entered, so far as it was
        // entered once.
        let live = durations[phase];
        ensure!(
            live >= end_of_sum - since - 2,
            "{phase} has {live} ms but was entered {} ms ago",
            end_of_sum - since
        );
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = last.get(id) {
            ensure!(
                seen.created_at == created_at,
                "created_at changed from {}",
                seen.created_at
            );
            let seen_sum: i128 = seen.durations.values().sum();
            // Answers of concurrent requests may overtake each other; only newer ones must be larger.
            if durations.values().sum::<i128>() >= seen_sum {
                for (name, before) in &seen.durations {
                    let after = durations.get(name).copied().unwrap_or(0);
                    let ended_meanwhile = *name == seen.phase && name != phase;
                    let least = before - if ended_meanwhile { TOLERANCE_MS } else { 0 };
                    ensure!(after >= least, "{name} shrank from {before} to {after} ms");
                }
            } else {
                return Ok(());
            }
        }
        last.insert(
            id.to_owned(),
            Seen {
                created_at: created_at.to_owned(),
                phase: phase.to_owned(),
                durations,
            },
        );
        Ok(())
    }
}
