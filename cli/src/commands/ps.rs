//! `doze ps`: which instances there are.
use doze_api::{Instance, InstanceState, client::InstanceFilter};
use futures::{StreamExt as _, stream};
use time::OffsetDateTime;

use super::{auto_standby, common};
use crate::{connection, failure::Failure, output};

/// Instances whose way to sleep is asked for at the same time.
const ASKED_AT_ONCE: usize = 16;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Show stopped instances too
    #[arg(short, long)]
    all: bool,
    /// Only instances in this state (implies --all), for example Running
    #[arg(long)]
    state: Option<InstanceState>,
    /// Only instances with this tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let filter = InstanceFilter {
        state: args.state,
        tags: common::map(args.tags),
    };
    let mut instances = server
        .client
        .list_instances(&filter)
        .await
        .map_err(|e| server.explain(&e))?;
    if !args.all && args.state.is_none() {
        instances.retain(|instance| instance.state != InstanceState::Stopped);
    }
    if args.json {
        output::json(&instances)?;
    } else if args.quiet {
        for instance in &instances {
            output::line(&instance.name)?;
        }
    } else {
        let sleep = sleep(&server, &instances).await;
        output::line(&render(&instances, &sleep, OffsetDateTime::now_utc()))?;
    }
    Ok(0)
}

/// When each may fall asleep by itself, as far as that is to be known of one that runs and may.
async fn sleep(server: &connection::Server, instances: &[Instance]) -> Vec<String> {
    let asked = instances.iter().map(async |instance| {
        let policy = instance.auto_standby.as_ref();
        match policy.map(|policy| policy.enabled == Some(true)) {
            None => "-".to_owned(),
            Some(false) => "off".to_owned(),
            Some(true) if instance.state != InstanceState::Running => "-".to_owned(),
            Some(true) => match server.client.auto_standby_status(&instance.id).await {
                Ok(status) => auto_standby::word(&status),
                // It is gone since it was listed.
                Err(_) => "-".to_owned(),
            },
        }
    });
    stream::iter(asked).buffered(ASKED_AT_ONCE).collect().await
}

fn render(instances: &[Instance], sleep: &[String], now: OffsetDateTime) -> String {
    let rows: Vec<_> = instances
        .iter()
        .zip(sleep)
        .map(|(instance, sleep)| row(instance, sleep, now))
        .collect();
    output::table(
        [
            "NAME",
            "ID",
            "IMAGE",
            "STATE",
            "SINCE",
            "IP",
            "MEMORY",
            "MONITOR",
            "IDLE-TIMEOUT",
            "SLEEPS",
        ],
        &rows,
    )
}

fn row(instance: &Instance, sleep: &str, now: OffsetDateTime) -> [String; 10] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        instance.name.clone(),
        common::short_id(&instance.id).to_owned(),
        familiar(&instance.image).to_owned(),
        state(instance),
        output::age(instance.current_phase_since.as_deref(), now),
        or_dash(
            instance
                .network
                .as_ref()
                .and_then(|network| network.ip.clone()),
        ),
        or_dash(instance.size.clone()),
        or_dash(instance.hypervisor.map(|hypervisor| hypervisor.to_string())),
        or_dash(
            instance
                .auto_standby
                .as_ref()
                .and_then(|policy| policy.idle_timeout.clone()),
        ),
        sleep.to_owned(),
    ]
}

/// `Stopped (3)` for a program that ended with code 3.
fn state(instance: &Instance) -> String {
    match (instance.state, instance.exit_code) {
        (InstanceState::Stopped, Some(code)) => format!("Stopped ({code})"),
        (state, _) => state.to_string(),
    }
}

/// The image's name without the parts that normalising added.
pub fn familiar(image: &str) -> &str {
    let short = image.strip_prefix("docker.io/").unwrap_or(image);
    let short = short.strip_prefix("library/").unwrap_or(short);
    short.strip_suffix(":latest").unwrap_or(short)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use time::format_description::well_known::Rfc3339;

    use super::*;

    #[test]
    fn familiar_names() {
        for (image, want) in [
            ("docker.io/library/alpine:latest", "alpine"),
            ("docker.io/library/alpine:3.20", "alpine:3.20"),
            ("docker.io/team/app:latest", "team/app"),
            ("ghcr.io/library/x:latest", "ghcr.io/library/x"),
        ] {
            assert_eq!(familiar(image), want);
        }
    }

    #[test]
    fn a_row_says_how_a_program_ended_and_since_when() {
        let instance: Instance = serde_json::from_value(serde_json::json!({
            "id": "abcdefghijklmnopqrstuvwx", "name": "web", "image": "docker.io/library/redis:latest",
            "state": "Stopped", "created_at": "2026-01-01T00:00:00Z", "exit_code": 3,
            "current_phase_since": "2026-01-01T00:00:00Z", "size": "256MB", "hypervisor": "qemu",
            "network": {"enabled": true, "ip": "10.0.0.2"},
            "auto_standby": {"enabled": true, "idle_timeout": "5m0s"}
        }))
        .unwrap();
        let now = OffsetDateTime::parse("2026-01-01T00:05:00Z", &Rfc3339).unwrap();
        let text = render(&[instance], &["-".to_owned()], now);
        let cells: Vec<_> = text
            .lines()
            .nth(1)
            .unwrap()
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect();
        assert_eq!(
            cells,
            [
                "web",
                "abcdefghijkl",
                "redis",
                "Stopped (3)",
                "5m",
                "10.0.0.2",
                "256MB",
                "qemu",
                "5m0s",
                "-"
            ]
        );
    }
}
