//! `doze phases`: where an instance's time went, as a table and a bar, and what moved it.
use doze_api::InstancePhases;

use crate::{connection, failure::Failure, output};

/// Characters of a bar that stands for the whole time.
const BAR: u64 = 40;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Changes of phase to show, the newest last
    #[arg(short = 'n', long, default_value_t = 10)]
    last: usize,
    /// Instance: name, id or beginning of an id
    name: String,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let phases = server
        .client
        .instance_phases(&args.name)
        .await
        .map_err(|e| server.explain(&e))?;
    if args.json {
        output::json(&phases)?;
    } else {
        output::line(&render(&phases, args.last))?;
    }
    Ok(0)
}

fn render(phases: &InstancePhases, last: usize) -> String {
    let total: u64 = phases.phase_durations_ms.values().sum();
    let rows: Vec<[String; 5]> = phases
        .phase_durations_ms
        .iter()
        .map(|(phase, ms)| {
            let estimated = phases.phase_durations_estimated_ms.get(phase);
            let now = if *phase == phases.current_phase {
                "*"
            } else {
                ""
            };
            [
                format!("{phase}{now}"),
                seconds(*ms),
                share(*ms, total),
                bar(*ms, total),
                estimated.map_or(String::new(), |ms| format!("{} estimated", seconds(*ms))),
            ]
        })
        .collect();
    let mut text = output::table(["PHASE", "SECONDS", "SHARE", "", ""], &rows);
    text.push_str(&format!(
        "\n{} s in all; * since {}",
        seconds(total),
        phases.current_phase_since
    ));
    let shown = &phases.transitions[phases.transitions.len().saturating_sub(last)..];
    if !shown.is_empty() {
        let rows: Vec<[String; 3]> = shown
            .iter()
            .map(|t| {
                [
                    t.at.clone(),
                    format!("{} -> {}", t.from, t.to),
                    t.cause.clone(),
                ]
            })
            .collect();
        text.push_str("\n\n");
        text.push_str(&output::table(["WHEN", "CHANGE", "CAUSE"], &rows));
    }
    text
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// Tenths of a percent, rounded down; of nothing, nothing.
fn share(ms: u64, total: u64) -> String {
    let tenths = (u128::from(ms) * 1000)
        .checked_div(u128::from(total))
        .unwrap_or(0);
    format!("{}.{}%", tenths / 10, tenths % 10)
}

/// A phase that took any time at all is seen.
fn bar(ms: u64, total: u64) -> String {
    let length = (u128::from(ms) * u128::from(BAR))
        .checked_div(u128::from(total))
        .unwrap_or(0);
    let length = usize::try_from(length).unwrap_or(0);
    "#".repeat(length.max(usize::from(ms > 0)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_table_adds_up_and_tells_estimates_apart() {
        let phases: InstancePhases = serde_json::from_value(serde_json::json!({
            "id": "i", "name": "web", "current_phase": "standby",
            "current_phase_since": "2026-01-01T00:01:00Z",
            "phase_durations_ms": {"running": 90_000, "standby": 300_000, "paused": 5},
            "phase_durations_estimated_ms": {"standby": 1_500},
            "transitions": [
                {"at": "2026-01-01T00:00:00Z", "from": "initializing", "to": "running", "cause": "guest"},
                {"at": "2026-01-01T00:01:00Z", "from": "running", "to": "paused", "cause": "user"}
            ],
            "transitions_total": 2
        }))
        .unwrap();
        let text = render(&phases, 1);
        for part in [
            "standby*  300.000  76.9%",
            "running   90.000   23.0%  #########",
            "1.500 estimated",
            "390.005 s in all; * since 2026-01-01T00:01:00Z",
            "running -> paused  user",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains("initializing"), "{text}");
        // A sliver is one mark, not none.
        assert!(text.contains("paused    0.005    0.0%   #"), "{text}");
    }

    #[test]
    fn of_no_time_there_is_no_share() {
        assert_eq!((share(0, 0), bar(0, 0)), ("0.0%".into(), String::new()));
    }
}
