//! Who decides whether and how memory is compressed and when, what is refused, and what a restart of the server makes
//! of a plan. Small guests: a plan that has an hour costs nothing.
use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use doze_e2e::{
    Api, Case, Sample, Witness, World,
    compression::{balanced, forms, quiet, reaches, snapshot_reaches},
    sample::Random,
};
use serde_json::{Value, json};

use super::{
    Codec, SLOW, alive, all_is_well, codec, drop_snapshot, guest, only, sleep, snapshot_dir, take,
    text, wake,
};
use crate::crash_standby::instance_dir;

const HOUR: &str = "1h0m0s";
/// Rows of the table that a test run looks at; there are 27.
const ROWS: usize = 6;

pub fn cases(sample: &Sample, board: usize) -> Vec<Case> {
    // What the server decides does not depend on the board: a test run has it on one.
    if !sample.campaign && board != sample.random("policy").below(2) {
        return vec![];
    }
    let (random, rows) = (
        sample.random("who decides"),
        if sample.campaign { 27 } else { ROWS },
    );
    let mut cases = vec![Case::new("who_decides", move |world: &World| {
        Box::pin(who_decides(world, random.clone(), rows))
    })];
    cases.extend(doze_e2e::cases![
        what_is_wrong_is_refused_and_the_guest_goes_on,
        delays,
        a_restart_keeps_the_deadline,
        a_server_that_dies_at_work_leaves_nothing,
    ]);
    cases
}

/// What a level says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Says {
    Nothing,
    Off,
    On(Codec),
}

impl Says {
    fn all(codec: Codec) -> [Says; 3] {
        [Says::Nothing, Says::Off, Says::On(codec)]
    }

    fn request(self) -> Value {
        match self {
            Says::Nothing => Value::Null,
            // Whatever else it says.
            Says::Off => json!({"enabled": false, "algorithm": "brotli", "level": 77}),
            Says::On(codec) => codec.request(),
        }
    }

    fn environment(self) -> Vec<(&'static str, String)> {
        const ENABLED: &str = "DOZE_SNAPSHOT__COMPRESSION_DEFAULT__ENABLED";
        const ALGORITHM: &str = "DOZE_SNAPSHOT__COMPRESSION_DEFAULT__ALGORITHM";
        const LEVEL: &str = "DOZE_SNAPSHOT__COMPRESSION_DEFAULT__LEVEL";
        match self {
            Says::Nothing => vec![],
            Says::Off => vec![
                (ENABLED, "false".into()),
                (ALGORITHM, "brotli".into()),
                (LEVEL, "77".into()),
            ],
            // Its case does not matter here.
            Says::On(codec) => vec![
                (ENABLED, "true".into()),
                (ALGORITHM, codec.algorithm.to_uppercase()),
                (LEVEL, codec.level.to_string()),
            ],
        }
    }
}

/// The first that says something.
fn decided(levels: [Says; 3]) -> Option<Codec> {
    for says in levels {
        match says {
            Says::Nothing => {}
            Says::Off => return None,
            Says::On(codec) => return Some(codec),
        }
    }
    None
}

async fn start_with(world: &World, environment: &[(&'static str, String)]) -> Result<()> {
    let pairs: Vec<(&str, &str)> = environment.iter().map(|(k, v)| (*k, v.as_str())).collect();
    world.server.stop().await?;
    world.server.start_with(&pairs).await
}

/// Request, instance and server, each of which says nothing, no, or a codec of its own.
async fn who_decides(world: &World, mut random: Random, count: usize) -> Result<()> {
    let api = world.api().await?;
    let mut rows = Vec::new();
    for server in Says::all(codec("zstd", 3)) {
        for instance in Says::all(codec("lz4", 4)) {
            for request in Says::all(codec("zstd", 7)) {
                rows.push((server, instance, request));
            }
        }
    }
    let chosen = random.choose(rows, count);
    for instance in Says::all(codec("lz4", 4)) {
        let mut request = world.tiny("table");
        request["name"] = json!(name(instance));
        if instance != Says::Nothing {
            request["snapshot_policy"] = json!({"compression": instance.request()});
        }
        let id = world.boot(request).await?;
        let shown = &api.instance(&id).await?["snapshot_policy"];
        let right = match instance {
            Says::Nothing => shown.is_null(),
            Says::Off => *shown == json!({"compression": {"enabled": false}}),
            Says::On(codec) => *shown == json!({"compression": codec.request()}),
        };
        ensure!(right, "{instance:?}: {shown}");
    }
    for server in Says::all(codec("zstd", 3)) {
        if !chosen.iter().any(|(of, ..)| *of == server) {
            continue;
        }
        start_with(world, &server.environment()).await?;
        for (_, instance, request) in chosen.iter().filter(|(of, ..)| *of == server) {
            row(
                api,
                *instance,
                *request,
                decided([*request, *instance, server]),
            )
            .await
            .with_context(|| format!("{request:?}, {instance:?}, {server:?}"))?;
        }
        balanced(api).await?;
    }
    for instance in Says::all(codec("lz4", 4)) {
        api.remove(name(instance)).await?;
    }
    start_with(world, &[]).await?;
    all_is_well(world).await
}

fn name(instance: Says) -> &'static str {
    match instance {
        Says::Nothing => "says-nothing",
        Says::Off => "says-off",
        Says::On(_) => "says-on",
    }
}

/// What a standby and a snapshot of it are planned to become.
async fn row(api: &Api, instance: Says, request: Says, wanted: Option<Codec>) -> Result<()> {
    let key = name(instance);
    let (mut standby, mut snapshot) = (
        json!({"compression_delay": "1h"}),
        json!({"kind": "Standby"}),
    );
    if request != Says::Nothing {
        standby["compression"] = request.request();
        snapshot["compression"] = request.request();
    }
    let made = take(api, key, snapshot).await?;
    let (config, state) = (&made["compression"], &made["compression_state"]);
    let right = match wanted {
        None => config.is_null() && state == "none",
        Some(codec) => {
            *config == codec.request() && (state == "compressing" || state == "compressed")
        }
    };
    ensure!(right, "wanted {wanted:?}: {made}");
    let answer = sleep(api, key, standby).await?;
    let planned = &answer["standby_compression"];
    let right = match wanted {
        // A delay without anything to delay is ignored.
        None => planned.is_null(),
        Some(codec) => planned["compression"] == codec.request() && planned["state"] == "pending",
    };
    ensure!(right, "wanted {wanted:?}: {answer}");
    api.post_empty(&format!("/instances/{key}/restore"))
        .await?
        .expect(200)?;
    drop_snapshot(api, &text(&made, "id")?).await
}

async fn what_is_wrong_is_refused_and_the_guest_goes_on(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "small", 16).await?;
    let standby = format!("/instances/{id}/standby");
    let snapshots = format!("/instances/{id}/snapshots");
    let wrong = [
        (json!({"enabled": true, "level": 0}), "level", "1 to 19"),
        (json!({"enabled": true, "level": 20}), "level", "1 to 19"),
        (json!({"enabled": true, "level": -1}), "level", "1 to 19"),
        (
            json!({"enabled": true, "algorithm": "lz4", "level": 10}),
            "level",
            "0 to 9",
        ),
        (json!({"enabled": true, "level": "fast"}), "level", "fast"),
        (json!({"enabled": true, "level": 1.5}), "level", "1.5"),
        (
            json!({"enabled": true, "algorithm": "brotli"}),
            "algorithm",
            "brotli",
        ),
        (json!({"algorithm": "zstd"}), "enabled", "enabled"),
        (json!({"enabled": "yes"}), "enabled", "yes"),
        (json!({"enabled": true, "quality": 3}), "quality", "quality"),
    ];
    for (config, field, word) in &wrong {
        let code = match config.get("enabled") {
            None => "missing_field",
            Some(_) => "invalid_field",
        };
        let body = json!({"compression": config});
        let refused = api.post(&standby, body).await?;
        refused
            .refused(400, code, &["compression", field, word])
            .with_context(|| config.to_string())?;
        let body = json!({"kind": "Standby", "compression": config});
        let refused = api.post(&snapshots, body).await?;
        refused
            .refused(400, code, &["compression", field, word])
            .with_context(|| config.to_string())?;
        let mut create = world.tiny("wrong");
        create["snapshot_policy"] = json!({"compression": config});
        let refused = api.post("/instances", create).await?;
        refused
            .refused(400, code, &["snapshot_policy", field, word])
            .with_context(|| config.to_string())?;
    }
    let compression = json!({"enabled": true});
    for delay in ["-1s", "soon", "5", ""] {
        let body = json!({"compression": compression, "compression_delay": delay});
        let refused = api.post(&standby, body).await?;
        refused
            .refused(400, "invalid_field", &["compression_delay", delay])
            .with_context(|| format!("{delay:?}"))?;
        let mut create = world.tiny("wrong");
        create["snapshot_policy"] = json!({"standby_compression_delay": delay});
        let refused = api.post("/instances", create).await?;
        let field = "snapshot_policy.standby_compression_delay";
        refused
            .refused(400, "invalid_field", &[field, delay])
            .with_context(|| format!("{delay:?}"))?;
    }
    let body = json!({"kind": "Stopped", "compression": compression});
    api.post(&snapshots, body)
        .await?
        .refused(400, "invalid_field", &["compression", "Stopped"])?;
    // Refused before anything changed.
    alive(api, &id).await?;
    witness.survived(api, &id).await?;
    ensure!(
        api.instance(&id).await?["phase_durations_ms"]
            .get("standby")
            .is_none()
    );
    all_is_well(world).await
}

async fn delays(world: &World) -> Result<()> {
    let api = world.api().await?;
    let mut request = world.tiny("patient");
    request["snapshot_policy"] = json!({
        "compression": {"enabled": true, "algorithm": "lz4"}, "standby_compression_delay": "60m"
    });
    let id = world.boot(request).await?;
    let witness = Witness::plant_mixed(api, &id, 16).await?;
    let policy = &api.instance(&id).await?["snapshot_policy"];
    let wanted = json!({
        "compression": {"enabled": true, "algorithm": "lz4", "level": 0}, "standby_compression_delay": HOUR
    });
    ensure!(*policy == wanted, "{policy}");
    // The instance's, where the request says nothing.
    let begun = time::now_ms();
    let answer = sleep(api, &id, json!({})).await?;
    let due = time::parse_ms(&text(&answer["standby_compression"], "due_at")?)?;
    ensure!(
        answer["standby_compression"]["state"] == "pending"
            && (begun + 3_600_000..=time::now_ms() + 3_600_000).contains(&due),
        "{due} is not an hour after {begun}: {answer}"
    );
    only(world, &id, "memory")?;
    wake(world, &id).await?;
    // The request's, where it says one; none is one, too.
    sleep(api, &id, json!({"compression_delay": "0s"})).await?;
    reaches(api, &id, &["compressed"], 300).await?;
    only(world, &id, "memory.lz4")?;
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    let begun = Instant::now();
    sleep(api, &id, json!({"compression_delay": "1500ms"})).await?;
    reaches(api, &id, &["compressed"], 300).await?;
    ensure!(
        begun.elapsed() >= Duration::from_millis(1500),
        "it did not wait"
    );
    wake(world, &id).await?;
    // A snapshot never waits.
    let made = take(api, &id, json!({"kind": "Standby"})).await?;
    let snapshot = text(&made, "id")?;
    let made = snapshot_reaches(api, &snapshot, &["compressed"], 300).await?;
    let found = forms(&snapshot_dir(world, &snapshot))?;
    let bytes = std::fs::metadata(snapshot_dir(world, &snapshot).join("memory.lz4"))?.len();
    ensure!(
        found == ["memory.lz4"]
            && made["compressed_size_bytes"] == bytes
            && made["uncompressed_size_bytes"] == 256 << 20
            && made["compression"] == json!({"enabled": true, "algorithm": "lz4", "level": 0})
            && made["compression_error"].is_null()
            && made["size_bytes"]
                .as_u64()
                .is_some_and(|all| all < 256 << 20),
        "{found:?}: {made}"
    );
    drop_snapshot(api, &snapshot).await?;
    // Nothing to wait for.
    let off = json!({"compression": {"enabled": false}, "compression_delay": "1ms"});
    let answer = sleep(api, &id, off).await?;
    ensure!(answer["standby_compression"].is_null(), "{answer}");
    // To want it now is too late; the guest sleeps as it does.
    let late = json!({"compression": {"enabled": true}});
    api.post(&format!("/instances/{id}/standby"), late)
        .await?
        .refused(409, "invalid_state", &["Standby"])?;
    only(world, &id, "memory")?;
    wake(world, &id).await?;
    // Where some is planned, none and another time come too late, too.
    let planned = json!({"compression": {"enabled": true}, "compression_delay": "1h"});
    let answer = sleep(api, &id, planned).await?;
    ensure!(
        answer["standby_compression"]["state"] == "pending",
        "{answer}"
    );
    for late in [
        json!({"compression": {"enabled": false}}),
        json!({"compression_delay": "0s"}),
    ] {
        api.post(&format!("/instances/{id}/standby"), late)
            .await?
            .refused(409, "invalid_state", &["Standby"])?;
    }
    let still = api.get(&format!("/instances/{id}")).await?.expect(200)?;
    ensure!(
        still["standby_compression"] == answer["standby_compression"],
        "{still}"
    );
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    api.remove(&id).await?;
    all_is_well(world).await
}

async fn a_restart_keeps_the_deadline(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "small", 16).await?;
    let body = json!({"compression": codec("zstd", 1).request(), "compression_delay": "1h"});
    let planned = sleep(api, &id, body).await?["standby_compression"].clone();
    for orderly in [true, false] {
        match orderly {
            true => world.server.stop().await?,
            false => world.server.kill().await?,
        }
        world.server.start().await?;
        let now = api.instance(&id).await?["standby_compression"].clone();
        ensure!(now == planned, "was {planned}, is {now}");
        let account = balanced(api).await?;
        ensure!(
            account.sum("zstd,level=1", |jobs| jobs.pending) == 1,
            "{account:?}"
        );
    }
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    // Overdue when the server is back: at once.
    let body = json!({"compression": codec("zstd", 1).request(), "compression_delay": "2s"});
    let planned = sleep(api, &id, body).await?["standby_compression"].clone();
    ensure!(planned["state"] == "pending", "{planned}");
    world.server.kill().await?;
    only(world, &id, "memory")?;
    let due = time::parse_ms(&text(&planned, "due_at")?)?;
    while time::now_ms() <= due {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.server.start().await?;
    let done = reaches(api, &id, &["compressed"], 300).await?;
    ensure!(done["due_at"] == planned["due_at"], "was {planned}: {done}");
    only(world, &id, "memory.zst")?;
    // What is done is done, whoever serves.
    world.server.kill().await?;
    world.server.start().await?;
    let after = api.instance(&id).await?["standby_compression"].clone();
    ensure!(after == done, "was {done}, is {after}");
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    all_is_well(world).await
}

/// The stage file goes, the plan starts again, and the raw file is what it was.
async fn a_server_that_dies_at_work_leaves_nothing(world: &World) -> Result<()> {
    let api = world.api().await?;
    let (id, witness) = guest(world, "halfway", 64).await?;
    let taken = take(
        api,
        &id,
        json!({"kind": "Standby", "compression": SLOW.request()}),
    )
    .await?;
    let snapshot = text(&taken, "id")?;
    sleep(api, &id, json!({"compression": SLOW.request()})).await?;
    let (own, stored) = (instance_dir(world, &id), snapshot_dir(world, &snapshot));
    for orderly in [false, true] {
        let (first, second) = (staged(&own).await?, staged(&stored).await?);
        match orderly {
            true => {
                world.server.stop().await?;
                ensure!(forms(&own)? == ["memory"] && forms(&stored)? == ["memory"]);
            }
            false => {
                world.server.kill().await?;
                ensure!(forms(&own)?.contains(&first) && forms(&stored)?.contains(&second));
            }
        }
        world.server.start().await?;
        reaches(api, &id, &["compressing"], 60).await?;
        snapshot_reaches(api, &snapshot, &["compressing"], 60).await?;
        let (other, another) = (staged(&own).await?, staged(&stored).await?);
        ensure!(other != first && another != second, "{other}, {another}");
        for dir in [&own, &stored] {
            let found = forms(dir)?;
            ensure!(
                found.len() == 2 && found.contains(&"memory".to_owned()),
                "{found:?}"
            );
        }
    }
    wake(world, &id).await?;
    witness.survived(api, &id).await?;
    let back = format!("/instances/{id}/snapshots/{snapshot}/restore");
    api.post(&back, json!({})).await?.expect(200)?;
    witness.survived(api, &id).await?;
    drop_snapshot(api, &snapshot).await?;
    quiet(api, 10).await?;
    all_is_well(world).await
}

/// The name of the half-made artefact, once there is one.
async fn staged(dir: &Path) -> Result<String> {
    let search = async {
        loop {
            let found = forms(dir)?;
            if let Some(stage) = found.into_iter().find(|name| name.starts_with('.')) {
                return anyhow::Ok(stage);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), search)
        .await
        .with_context(|| format!("nothing is being made in {}", dir.display()))?
}

/// Milliseconds since the Unix epoch.
mod time {
    use anyhow::{Context as _, Result};
    pub use doze_e2e::phases::now_ms;

    pub fn parse_ms(text: &str) -> Result<i128> {
        doze_e2e::phases::parse_time(text).with_context(|| format!("a time: {text:?}"))
    }
}
