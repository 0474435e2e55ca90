//! `doze inspect`: everything the server says about an instance.
use doze_api::{Instance, StandbyCompressionState};

use super::common;
use crate::{connection, failure::Failure, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print the server's own answer as JSON, an array for several instances (the default)
    #[arg(long)]
    json: bool,
    /// Print what a person wants to know, one line each
    #[arg(short, long, conflicts_with = "json")]
    summary: bool,
    /// Instances: names, ids or beginnings of ids
    #[arg(required = true)]
    names: Vec<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = &connection::connect(options)?;
    let mut found = Vec::new();
    for name in &args.names {
        found.push(
            server
                .client
                .get_instance(name)
                .await
                .map_err(|e| server.explain(&e))?,
        );
    }
    match (args.summary, found.as_slice()) {
        (false, [one]) => output::json(one)?,
        (false, several) => output::json(&several)?,
        (true, several) => {
            let texts: Vec<_> = several.iter().map(describe).collect();
            output::line(&texts.join("\n\n"))?;
        }
    }
    Ok(0)
}

/// What becomes of its memory while it sleeps.
fn compression(instance: &Instance) -> String {
    let Some(kept) = &instance.standby_compression else {
        return String::new();
    };
    let how = super::compression::shown(&kept.compression);
    let raw = kept.uncompressed_size_bytes;
    match (kept.state, kept.compressed_size_bytes, &kept.error) {
        (StandbyCompressionState::Pending, ..) => format!("{how}, pending, due {}", kept.due_at),
        (_, Some(size), _) => {
            format!("{how}, {} of {}", output::bytes(size), output::bytes(raw))
        }
        (_, _, Some(error)) => format!("{how}, failed: {error}"),
        (state, ..) => format!("{how}, {}", state.as_str()),
    }
}

fn describe(instance: &Instance) -> String {
    let mut lines = Vec::new();
    let mut say = |key: &str, value: &str| {
        if !value.is_empty() {
            lines.push(format!("{key:<12} {value}"));
        }
    };
    say("name", &instance.name);
    say("id", &instance.id);
    say("image", &instance.image);
    say(
        "state",
        &format!("{}{}", instance.state, common::why(instance)),
    );
    say(
        "since",
        instance.current_phase_since.as_deref().unwrap_or_default(),
    );
    if let Some(code) = instance.exit_code {
        say(
            "exit",
            &format!("{code} ({})", common::ending(instance, code)),
        );
    }
    say("created", &instance.created_at);
    say(
        "started",
        instance.started_at.as_deref().unwrap_or_default(),
    );
    say(
        "stopped",
        instance.stopped_at.as_deref().unwrap_or_default(),
    );
    say(
        "monitor",
        instance.hypervisor.map(|h| h.as_str()).unwrap_or_default(),
    );
    say("compression", &compression(instance));
    say("platform", instance.platform.as_deref().unwrap_or_default());
    say(
        "vcpus",
        &instance
            .vcpus
            .map(|count| count.to_string())
            .unwrap_or_default(),
    );
    say("memory", instance.size.as_deref().unwrap_or_default());
    say(
        "overlay",
        instance.overlay_size.as_deref().unwrap_or_default(),
    );
    if let Some(network) = instance.network.as_ref().filter(|network| network.enabled) {
        say("ip", network.ip.as_deref().unwrap_or_default());
        say("mac", network.mac.as_deref().unwrap_or_default());
    }
    say(
        "tags",
        &join(
            instance
                .tags
                .iter()
                .map(|(key, value)| format!("{key}={value}")),
        ),
    );
    say(
        "env",
        &join(
            instance
                .env
                .iter()
                .map(|(key, value)| format!("{key}={value}")),
        ),
    );
    let phases = instance.phase_durations_ms.iter();
    say(
        "phases",
        &join(phases.map(|(phase, ms)| format!("{phase} {}.{:03}s", ms / 1000, ms % 1000))),
    );
    lines.join("\n")
}

fn join(items: impl Iterator<Item = String>) -> String {
    items.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_is_absent_takes_no_line() {
        let instance: Instance = serde_json::from_value(serde_json::json!({
            "id": "i", "name": "web", "image": "x", "state": "Stopped", "created_at": "2026-01-01T00:00:00Z",
            "exit_code": 137, "exit_message": "killed by signal 9 (SIGKILL)", "failure": "the VMM died",
            "phase_durations_ms": {"running": 61005, "stopped": 7}
        }))
        .unwrap();
        let text = describe(&instance);
        assert!(
            text.contains("state        Stopped (the VMM died)"),
            "{text}"
        );
        assert!(
            text.contains("exit         137 (killed by signal 9 (SIGKILL))"),
            "{text}"
        );
        assert!(
            text.contains("phases       running 61.005s, stopped 0.007s"),
            "{text}"
        );
        assert!(!text.contains("monitor") && !text.contains("ip "), "{text}");
    }
}
