//! Snapshots, forks and schedules: what is refused before the engine is asked.
use super::*;

const RESTORE: &str = "/instances/seed-0/snapshots/nosuch/restore";

#[tokio::test]
async fn requests_are_refused_before_anything_changes() {
    let server = server_with(1).await;
    let snapshots = "/instances/seed-0/snapshots";
    let forks = "/instances/seed-0/fork";
    let of_snapshot = "/snapshots/nosuch/fork";
    for (path, body, status, code, part) in [
        (snapshots, json!({}), 400, "missing_field", "`kind`"),
        (
            snapshots,
            json!({"kind": "stopped"}),
            400,
            "invalid_field",
            "kind: ",
        ),
        (
            snapshots,
            json!({"kind": "Stopped", "name": "Before"}),
            400,
            "invalid_name",
            "name: \"Before\"",
        ),
        (
            snapshots,
            json!({"kind": "Stopped", "nmae": "x"}),
            400,
            "invalid_field",
            "`nmae`",
        ),
        (
            snapshots,
            json!({"kind": "Stopped", "tags": {"": "x"}}),
            400,
            "invalid_field",
            "tags: ",
        ),
        (
            snapshots,
            json!({"kind": "Standby", "compression": {"enabled": true, "algorithm": "lz4", "level": 12}}),
            400,
            "invalid_field",
            "compression.level: 12 ",
        ),
        (
            snapshots,
            json!({"kind": "Standby", "compression": {"enabled": true, "algorithm": "gzip"}}),
            400,
            "invalid_field",
            "algorithm: \"gzip\" ",
        ),
        (
            snapshots,
            json!({"kind": "Stopped", "compression": {"enabled": true}}),
            400,
            "invalid_field",
            "compression.enabled: ",
        ),
        (forks, json!({}), 400, "missing_field", "`name`"),
        (
            forks,
            json!({"name": "a".repeat(64)}),
            400,
            "invalid_name",
            "name: ",
        ),
        (
            forks,
            json!({"name": "a", "target_state": "Paused"}),
            400,
            "invalid_field",
            "target_state: ",
        ),
        (
            forks,
            json!({"name": "a", "target_hypervisor": "qemu"}),
            400,
            "invalid_field",
            "`target_hypervisor`",
        ),
        (
            forks,
            json!({"name": "a", "target_state": "Standby"}),
            400,
            "invalid_field",
            "target_state: Standby ",
        ),
        (
            "/instances/nosuch/fork",
            json!({"name": "a"}),
            404,
            "not_found",
            "nosuch",
        ),
        (
            "/instances/nosuch/snapshots/nosuch/restore",
            json!({}),
            404,
            "not_found",
            "instance",
        ),
        (
            of_snapshot,
            json!({"name": "a", "from_running": true}),
            400,
            "invalid_field",
            "`from_running`",
        ),
        (
            of_snapshot,
            json!({"name": "a", "target_hypervisor": "xen"}),
            400,
            "invalid_field",
            "target_hypervisor: ",
        ),
        (
            of_snapshot,
            json!({"name": "a", "target_hypervisor": "cloud-hypervisor"}),
            501,
            "not_implemented",
            "target_hypervisor: ",
        ),
        (
            RESTORE,
            json!({"target_hypervisor": "vz"}),
            501,
            "not_implemented",
            "target_hypervisor: ",
        ),
        (
            RESTORE,
            json!({"name": "a"}),
            400,
            "invalid_field",
            "`name`",
        ),
    ] {
        let answer = server.send(Method::POST, path, body.to_string()).await;
        let message = answer.error(status, code);
        assert!(message.contains(part), "{path} {body}: {message}");
    }
    for query in ["kind=standby", "source=x", "tag=x", "name=a&name=b"] {
        let path = format!("/snapshots?{query}");
        server.get(&path).await.error(400, "invalid_field");
    }
    server
        .get("/resources?of=x")
        .await
        .error(400, "invalid_field");
}

#[tokio::test]
async fn schedules_are_refused_before_anything_changes() {
    let server = server_with(1).await;
    for (body, code, part) in [
        (json!({"interval": "1h"}), "missing_field", "`retention`"),
        (
            json!({"retention": {"max_count": 1}}),
            "missing_field",
            "`interval`",
        ),
        (
            json!({"interval": "30s", "retention": {"max_count": 1}}),
            "invalid_field",
            "interval: \"30s\"",
        ),
        (
            json!({"interval": "1h", "retention": {}}),
            "invalid_field",
            "retention: ",
        ),
        (
            json!({"interval": "1h", "retention": {"max_cuont": 1}}),
            "invalid_field",
            "`max_cuont`",
        ),
        (
            json!({"interval": "1h", "retention": {"max_count": 1.5}}),
            "invalid_field",
            "retention.max_count: ",
        ),
        (
            json!({"interval": "1h", "retention": {"max_count": 1}, "name_prefix": "a".repeat(48)}),
            "invalid_name",
            "name_prefix: ",
        ),
    ] {
        let path = "/instances/seed-0/snapshot-schedule";
        let answer = server.send(Method::PUT, path, body.to_string()).await;
        let message = answer.error(400, code);
        assert!(message.contains(part), "{body}: {message}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_named() {
    let server = server_with(1).await;
    assert_eq!(server.get("/snapshots").await.json(), json!([]));
    let fork = json!({"name": "a"}).to_string();
    let keep = json!({"kind": "Standby"}).to_string();
    let schedule = json!({"interval": "1h", "retention": {"max_count": 1}}).to_string();
    for (method, path, body, what) in [
        (Method::GET, "/snapshots/nosuch", "", "snapshot"),
        (Method::DELETE, "/snapshots/nosuch", "", "snapshot"),
        (Method::POST, "/snapshots/nosuch/fork", &fork, "snapshot"),
        (Method::POST, RESTORE, "", "snapshot"),
        (
            Method::POST,
            "/instances/nosuch/snapshots",
            &keep,
            "instance",
        ),
        (
            Method::PUT,
            "/instances/nosuch/snapshot-schedule",
            &schedule,
            "instance",
        ),
        (
            Method::GET,
            "/instances/seed-0/snapshot-schedule",
            "",
            "schedule",
        ),
        (
            Method::DELETE,
            "/instances/seed-0/snapshot-schedule",
            "",
            "schedule",
        ),
    ] {
        let answer = server.send(method.clone(), path, body.to_owned()).await;
        let message = answer.error(404, "not_found");
        assert!(message.contains(what), "{method} {path}: {message}");
    }
    // A stopped instance has no memory to keep.
    let answer = server
        .send(Method::POST, "/instances/seed-0/snapshots", keep)
        .await;
    answer.error(409, "invalid_state");
}

#[tokio::test]
async fn a_schedule_is_set_seen_and_ended() {
    let server = server_with(1).await;
    let path = "/instances/seed-0/snapshot-schedule";
    let set = |body: Value| server.send(Method::PUT, path, body.to_string());
    let made = set(json!({"interval": "90m", "retention": {"max_count": 3}})).await;
    assert_eq!(made.status, StatusCode::OK);
    let made = made.json();
    assert_eq!(made["interval"], "1h30m0s");
    assert_eq!(made["retention"], json!({"max_count": 3}));
    assert!(made["last_error"].is_null() && made["last_run_at"].is_null());
    assert_eq!(server.get(path).await.json(), made);
    let kept = set(json!({"interval": "1h30m", "retention": {"max_age": "36h"}})).await;
    assert_eq!(kept.json()["next_run_at"], made["next_run_at"]);
    let answer = server.send(Method::DELETE, path, Body::empty()).await;
    assert_eq!(
        (answer.status, answer.body.len()),
        (StatusCode::NO_CONTENT, 0)
    );
    server.get(path).await.error(404, "not_found");
}

#[tokio::test]
async fn resources_name_every_instance() {
    let server = server_with(2).await;
    let answer = server.get("/resources").await;
    assert_eq!(answer.status, StatusCode::OK);
    let answer = answer.json();
    let names: Vec<_> = answer["allocations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|allocation| allocation["instance_name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["seed-0", "seed-1"]);
    assert_eq!(answer["cpu"]["allocated"], 0);
    assert_eq!(answer["memory"]["allocated"], 0);
    assert!(answer["disk"]["capacity"].as_u64().unwrap() > 0);
    assert!(answer["gpu"].is_null());
}

#[tokio::test]
async fn a_snapshot_that_is_called_import_keeps_its_path() {
    let server = server().await;
    let path = "/snapshots/import";
    let message = server.get(path).await.error(404, "not_found");
    assert!(message.contains("import"), "{message}");
    let gone = server.send(Method::DELETE, path, Body::empty()).await;
    gone.error(404, "not_found");
    let fork = server.send(Method::POST, "/snapshots/import/fork", "{\"name\": \"a\"}");
    fork.await.error(404, "not_found");
}

#[tokio::test]
async fn what_is_no_exported_snapshot_is_refused() {
    let server = server().await;
    for (query, body, code, part) in [
        ("", "", "invalid_request", "no snapshot that doze exported"),
        (
            "",
            "{}",
            "invalid_request",
            "no snapshot that doze exported",
        ),
        ("", "doze-snap", "invalid_request", "cut off"),
        ("?name=No", "", "invalid_name", "name: \"No\""),
        ("?nmae=no", "", "invalid_field", "nmae"),
    ] {
        let path = format!("/snapshots/import{query}");
        let message = server
            .send(Method::POST, &path, body)
            .await
            .error(400, code);
        assert!(message.contains(part), "{query} {body}: {message}");
    }
    let message = server
        .get("/snapshots/nosuch/export")
        .await
        .error(404, "not_found");
    assert!(message.contains("nosuch"), "{message}");
    let captures = server.dir.path().join("d/captures");
    assert_eq!(std::fs::read_dir(captures).unwrap().count(), 0);
}
