//! `doze drain`: everything to sleep, then a report; a host can be rebooted after it.
use std::collections::BTreeMap;

use doze_api::{Instance, InstanceState, StandbyInstanceRequest, client::InstanceFilter};
use futures::{StreamExt, stream};
use serde::Serialize;

use crate::{
    connection::{self, Server},
    failure::{Failure, GENERAL},
    output,
};

/// How often the list is read again at most: something else keeps waking instances then.
const ROUNDS: usize = 5;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Instances put to sleep at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    parallel: u16,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What became of one instance.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    id: String,
    /// `asleep`, `was asleep`, `not running` or `failed`.
    outcome: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let awake = awake(&server, &lines).await?;
        if awake.is_empty() {
            break;
        }
        let round: Vec<Line> = stream::iter(awake)
            .map(|instance| drain(&server, instance))
            .buffer_unordered(usize::from(args.parallel))
            .inspect(|line| {
                if line.outcome == "asleep" {
                    output::remark(&format!("{} sleeps", line.name));
                }
            })
            .collect()
            .await;
        lines.extend(round.into_iter().map(|line| (line.id.clone(), line)));
    }
    let lines: Vec<Line> = lines.into_values().collect();
    let failed = lines.iter().any(|line| line.outcome == "failed");
    if args.json {
        output::json(&lines)?;
    } else {
        output::line(&report(&lines))?;
    }
    Ok(if failed { GENERAL } else { 0 })
}

/// Who has to be told, or told again because it woke meanwhile. What is said to sleep is told too, once: it may
/// be waking this moment.
async fn awake(server: &Server, told: &BTreeMap<String, Line>) -> Result<Vec<Instance>, Failure> {
    let mut instances = server
        .client
        .list_instances(&InstanceFilter::default())
        .await
        .map_err(|e| server.explain(&e))?;
    instances.retain(|instance| match told.get(&instance.id) {
        None => true,
        Some(line) if line.outcome == "failed" => false,
        Some(_) => !matches!(
            instance.state,
            InstanceState::Standby | InstanceState::Stopped
        ),
    });
    Ok(instances)
}

async fn drain(server: &Server, instance: Instance) -> Line {
    let line = |outcome, reason| Line {
        name: instance.name.clone(),
        id: instance.id.clone(),
        outcome,
        reason,
    };
    if instance.state == InstanceState::Stopped {
        return line("not running", None);
    }
    let slept = instance.state == InstanceState::Standby;
    let request = StandbyInstanceRequest::default();
    match server.client.standby_instance(&instance.id, &request).await {
        Ok(_) if slept => line("was asleep", None),
        Ok(_) => line("asleep", None),
        Err(error) => line("failed", Some(server.explain(&error).to_string())),
    }
}

fn report(lines: &[Line]) -> String {
    let rows: Vec<[String; 3]> = lines
        .iter()
        .map(|line| {
            [
                line.name.clone(),
                line.outcome.to_owned(),
                line.reason.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let count = |outcome: &str| lines.iter().filter(|line| line.outcome == outcome).count();
    format!(
        "{}\n{} put to sleep, {} slept already, {} not running, {} failed",
        output::table(["NAME", "OUTCOME", "REASON"], &rows),
        count("asleep"),
        count("was asleep"),
        count("not running"),
        count("failed")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_counts_every_outcome_and_names_the_reason() {
        let line = |name: &str, outcome, reason: Option<&str>| Line {
            name: name.into(),
            id: String::new(),
            outcome,
            reason: reason.map(str::to_owned),
        };
        let text = report(&[
            line("a", "asleep", None),
            line("b", "failed", Some("no room")),
            line("c", "not running", None),
        ]);
        assert!(text.contains("no room"), "{text}");
        assert!(
            text.ends_with("1 put to sleep, 0 slept already, 1 not running, 1 failed"),
            "{text}"
        );
    }
}
