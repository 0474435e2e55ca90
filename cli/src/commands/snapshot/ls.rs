//! `doze snapshot ls`: which snapshots there are.
use doze_api::{CompressionState, Snapshot, SnapshotKind, client::SnapshotListFilter};
use time::OffsetDateTime;

use crate::{
    commands::{common, compression},
    connection,
    failure::Failure,
    output,
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only snapshots of this kind: Standby or Stopped
    #[arg(long)]
    kind: Option<SnapshotKind>,
    /// Only snapshots with this tag; repeat for several
    #[arg(long = "tag", value_name = "KEY=VALUE", value_parser = common::pair)]
    tags: Vec<(String, String)>,
    /// Print ids only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only snapshots of this instance, which may be gone: its name, id or the beginning of its id
    name: Option<String>,
}

pub async fn run(args: Args, options: &connection::Options) -> Result<u8, Failure> {
    let server = connection::connect(options)?;
    let filter = SnapshotListFilter {
        kind: args.kind,
        tags: common::map(args.tags),
        ..SnapshotListFilter::default()
    };
    let mut snapshots = server
        .client
        .list_snapshots(&filter)
        .await
        .map_err(|e| server.explain(&e))?;
    if let Some(source) = &args.name {
        snapshots.retain(|snapshot| is_of(snapshot, source));
    }
    if args.json {
        output::json(&snapshots)?;
    } else if args.quiet {
        for snapshot in &snapshots {
            output::line(&snapshot.id)?;
        }
    } else {
        output::line(&render(&snapshots, OffsetDateTime::now_utc()))?;
    }
    Ok(0)
}

/// Asked of the snapshots, because the instance itself may be gone.
fn is_of(snapshot: &Snapshot, source: &str) -> bool {
    snapshot.source_instance_name == source || snapshot.source_instance_id.starts_with(source)
}

fn render(snapshots: &[Snapshot], now: OffsetDateTime) -> String {
    let rows: Vec<_> = snapshots.iter().map(|s| row(s, now)).collect();
    output::table(
        [
            "ID", "NAME", "OF", "KIND", "AGE", "SIZE", "ON DISK", "MEMORY", "TAKEN BY",
        ],
        &rows,
    )
}

fn row(snapshot: &Snapshot, now: OffsetDateTime) -> [String; 9] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        common::short_id(&snapshot.id).to_owned(),
        or_dash(snapshot.name.clone()),
        snapshot.source_instance_name.clone(),
        snapshot.kind.to_string(),
        output::age(Some(&snapshot.created_at), now),
        output::bytes(snapshot.size_bytes),
        or_dash(snapshot.allocated_bytes.map(output::bytes)),
        memory(snapshot),
        if snapshot.scheduled {
            "schedule"
        } else {
            "user"
        }
        .to_owned(),
    ]
}

/// How its memory is kept, if it has any.
fn memory(snapshot: &Snapshot) -> String {
    let how = (snapshot.compression.as_ref()).map_or_else(String::new, compression::shown);
    match snapshot.compression_state {
        _ if snapshot.kind == SnapshotKind::Stopped => "-".to_owned(),
        None | Some(CompressionState::None) => "raw".to_owned(),
        Some(CompressionState::Compressed) => how,
        Some(CompressionState::Compressing) => format!("raw, {how} soon"),
        Some(CompressionState::Error) => format!("raw, {how} failed"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use time::format_description::well_known::Rfc3339;

    use super::*;
    use crate::commands::snapshot::tests::snapshot;

    #[test]
    fn the_table_says_whose_and_how_large() {
        let now = OffsetDateTime::parse("2026-01-01T02:00:00Z", &Rfc3339).unwrap();
        let mut nightly = snapshot("abcdefghijklmnopqrstuvwx", Some("nightly-1"), "web");
        nightly.allocated_bytes = Some(1 << 20);
        nightly.scheduled = true;
        nightly.compression = compression::wanted("zstd:3").ok();
        nightly.compression_state = Some(CompressionState::Compressed);
        let text = render(&[nightly, snapshot("b", None, "db")], now);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[1],
            "abcdefghijkl  nightly-1  web  Standby  2h   3.0 MiB  1.0 MiB  zstd:3  schedule"
        );
        assert_eq!(
            lines[2],
            "b             -          db   Standby  2h   3.0 MiB  -        raw     user"
        );
    }

    #[test]
    fn the_source_is_known_by_name_id_and_prefix() {
        let snapshot = snapshot("a", None, "web");
        for key in ["web", "web-id", "web-i"] {
            assert!(is_of(&snapshot, key), "{key}");
        }
        for key in ["db", "web-id2", "a"] {
            assert!(!is_of(&snapshot, key), "{key}");
        }
    }
}
