//! `doze schedule ...`: snapshots that take themselves.
use doze_api::{ClientError, SnapshotSchedule};

use crate::{
    connection::{self, Server},
    failure::Failure,
};

mod rm;
mod set;
mod show;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Take snapshots of an instance regularly, and delete old ones
    Set(set::Args),
    /// Show an instance's schedule
    Show(show::Args),
    /// Take no more; the snapshots there are stay
    Rm(rm::Args),
}

pub async fn run(command: Command, options: &connection::Options) -> Result<u8, Failure> {
    match command {
        Command::Set(args) => set::run(args, options).await,
        Command::Show(args) => show::run(args, options).await,
        Command::Rm(args) => rm::run(args, options).await,
    }
}

/// An instance without a schedule is no instance that is missing.
fn explain(server: &Server, name: &str, error: &ClientError) -> Failure {
    match error {
        ClientError::Api { status: 404, body } if body.message.contains("schedule") => {
            Failure::new(format!(
                "{}; `doze schedule set {name} --every 1h --keep 24` makes one",
                body.message
            ))
        }
        other => server.explain(other),
    }
}

fn describe(schedule: &SnapshotSchedule) -> String {
    let mut lines = Vec::new();
    let mut say = |key: &str, value: Option<&str>| {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            lines.push(format!("{key:<10} {value}"));
        }
    };
    say("every", Some(&schedule.interval));
    say(
        "keep",
        schedule
            .retention
            .max_count
            .map(|count| count.to_string())
            .as_deref(),
    );
    say("max age", schedule.retention.max_age.as_deref());
    say("prefix", schedule.name_prefix.as_deref());
    let tags: Vec<_> = schedule
        .metadata
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    say("tags", Some(&tags.join(", ")));
    say("next", Some(&schedule.next_run_at));
    say("last", schedule.last_run_at.as_deref());
    say("snapshot", schedule.last_snapshot_id.as_deref());
    say("failed", schedule.last_error.as_deref());
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_is_absent_takes_no_line_and_a_failure_is_seen() {
        let schedule: SnapshotSchedule = serde_json::from_value(serde_json::json!({
            "instance_id": "i", "interval": "1h0m0s", "retention": {"max_count": 3},
            "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
            "next_run_at": "2026-01-01T01:00:00Z", "last_error": "no room",
        }))
        .unwrap();
        assert_eq!(
            describe(&schedule),
            "every      1h0m0s\nkeep       3\nnext       2026-01-01T01:00:00Z\nfailed     no room"
        );
    }
}
