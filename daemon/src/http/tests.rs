//! The real router over a real engine, on a private data folder without network or monitor.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::time::Duration;

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
mod snapshots;
use crate::{
    config::{Config, Secret},
    secret,
};

mod auto_standby;

struct Server {
    router: Router,
    token: String,
    state: AppState,
    dir: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

use bytes::Bytes;

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    /// Asserts status and code, and that the body is the contract's error; gives the message.
    fn error(&self, status: u16, code: &str) -> String {
        let body: doze_api::ErrorBody = serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {} {:?}", self.status, self.body));
        assert_eq!(
            (self.status.as_u16(), body.code.as_str()),
            (status, code),
            "{}",
            body.message
        );
        if status == 409 || status == 501 {
            assert_eq!(self.headers["x-should-retry"], "false");
        }
        body.message
    }
}

async fn server() -> Server {
    server_with(0).await
}

/// `seeded` stopped instances are there: seed-0, seed-1, ...
async fn server_with(seeded: usize) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("d");
    let variables = [
        ("DOZE_DATA_DIR", data.to_str().unwrap()),
        ("DOZE_NETWORK__ENABLED", "false"),
        ("DOZE_HYPERVISOR__QEMU_PATH", "/nonexistent/qemu"),
        ("DOZE_KERNEL__IMAGE", "/nonexistent/kernel"),
    ]
    .map(|(name, text)| (name.to_owned(), text.to_owned()));
    let config = Config::parse(None, variables).unwrap();
    doze_engine::seed_stopped(&data, None, seeded)
        .await
        .unwrap();
    let engine = Engine::open(config.engine(b"", Vec::new())).await.unwrap();
    let secret = Secret::new("0123456789abcdef0123456789abcdef");
    let uploads = config.uploads_dir();
    std::fs::create_dir(&uploads).unwrap();
    let state = AppState::new(Parts {
        engine,
        verifier: Verifier::new(&secret),
        uploads,
        max_import_bytes: 1 << 20,
    })
    .unwrap();
    Server {
        router: router(state.clone()),
        token: secret::sign(&secret, "tests", Duration::from_secs(60)).unwrap(),
        state,
        dir,
    }
}

impl Server {
    async fn raw(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: axum::body::to_bytes(body, 16 << 20).await.unwrap(),
        }
    }

    async fn send(&self, method: Method, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .body(body.into())
            .unwrap();
        self.raw(request).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, Body::empty()).await
    }

    async fn create(&self, body: Value) -> Answer {
        self.send(Method::POST, "/instances", body.to_string())
            .await
    }
}

#[tokio::test]
async fn only_health_needs_no_token() {
    let server = server().await;
    let bare = |path: &str, value: Option<&str>| {
        let mut request = Request::builder().uri(path);
        if let Some(value) = value {
            request = request.header(header::AUTHORIZATION, value);
        }
        request.body(Body::empty()).unwrap()
    };
    let answer = server.raw(bare("/health", None)).await;
    assert_eq!(
        (answer.status, answer.json()),
        (StatusCode::OK, json!({"status": "ok"}))
    );
    let wrong = secret::sign(&Secret::new("other"), "x", Duration::from_secs(60)).unwrap();
    let wrong = format!("Bearer {wrong}");
    for path in [
        "/instances",
        "/spec.yaml",
        "/builds",
        "/no/such/path",
        "/capabilities",
    ] {
        for value in [
            None,
            Some("Bearer"),
            Some("Basic eDp5"),
            Some("Bearer x"),
            Some(wrong.as_str()),
        ] {
            let answer = server.raw(bare(path, value)).await;
            answer.error(401, "unauthorized");
            assert!(
                answer.headers[header::WWW_AUTHENTICATE]
                    .to_str()
                    .unwrap()
                    .starts_with("Bearer")
            );
        }
    }
    // The scheme's case does not matter (RFC 9110 section 11.1).
    let lower = format!("bearer {}", server.token);
    assert_eq!(
        server.raw(bare("/instances", Some(&lower))).await.status,
        StatusCode::OK
    );
}

#[tokio::test]
async fn a_token_that_says_less_is_forbidden_everything() {
    let server = server().await;
    let key = jsonwebtoken::EncodingKey::from_secret(b"0123456789abcdef0123456789abcdef");
    let signed = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    for claim in ["permissions", "scope", "aud", "build_id"] {
        let claims = json!({"sub": "x", claim: ["instances:read"]});
        let token = jsonwebtoken::encode(&signed, &claims, &key).unwrap();
        for (method, path) in [
            (Method::GET, "/instances"),
            (Method::POST, "/instances"),
            (Method::GET, "/no/such/path"),
        ] {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header(header::AUTHORIZATION, format!("Bearer {token}"))
                .body(Body::empty())
                .unwrap();
            let message = server.raw(request).await.error(403, "forbidden");
            assert!(message.contains(&format!("{claim:?}")), "{message}");
        }
    }
}

#[tokio::test]
async fn every_endpoint_that_is_not_served_says_so() {
    let server = server().await;
    assert!(contract::NOT_SERVED.len() >= 35);
    for (method, path) in contract::NOT_SERVED {
        let concrete = path
            .replace("{id}", "abc")
            .replace("{name}", "docker.io%2Flibrary%2Falpine:latest")
            .replace("{snapshot_id}", "s")
            .replace("{volume_id}", "v");
        let answer = server.send(method.clone(), &concrete, "{}").await;
        let message = answer.error(501, "not_implemented");
        assert!(message.contains(&format!("{method} {path}")), "{message}");
    }
    for method in [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
    ] {
        for path in ["/v2", "/v2/", "/v2/library/alpine/blobs/uploads/"] {
            let answer = server.send(method.clone(), path, Body::empty()).await;
            assert_eq!(
                answer.status,
                StatusCode::NOT_IMPLEMENTED,
                "{method} {path}"
            );
        }
    }
}

/// Each operation of the document reaches a handler of its own, and none of the unserved ones is in it.
#[tokio::test]
async fn the_document_and_the_router_agree() {
    let server = server().await;
    let document = server.get("/spec.json").await.json();
    let mut count = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in ["get", "post", "put", "patch", "delete"] {
            if item.get(method).is_none() {
                continue;
            }
            count += 1;
            let method: Method = method.to_uppercase().parse().unwrap();
            assert!(
                !contract::NOT_SERVED.contains(&(method.clone(), path.as_str())),
                "{method} {path}"
            );
            let concrete = path
                .replace("{id}", "nosuch")
                .replace("{snapshot_id}", "nosuch")
                .replace("{name}", "nosuch");
            let answer = server.send(method.clone(), &concrete, Body::empty()).await;
            assert_ne!(
                answer.status,
                StatusCode::METHOD_NOT_ALLOWED,
                "{method} {path}"
            );
            assert_ne!(
                answer.status,
                StatusCode::NOT_IMPLEMENTED,
                "{method} {path}"
            );
            let text = String::from_utf8_lossy(&answer.body);
            assert!(!text.contains("\"path: "), "{method} {path}: {text}");
        }
    }
    assert_eq!(count, 37);
    let yaml = server.get("/spec.yaml").await;
    assert_eq!(yaml.headers[header::CONTENT_TYPE], "application/yaml");
    assert!(yaml.body.starts_with(b"openapi: 3.1.0"));
}

#[tokio::test]
async fn wrong_paths_and_methods_have_error_bodies() {
    let server = server().await;
    assert!(
        server
            .get("/nope")
            .await
            .error(404, "not_found")
            .contains("/nope")
    );
    assert!(
        server
            .get("/instances/a/nope")
            .await
            .error(404, "not_found")
            .contains("path")
    );
    let answer = server.send(Method::PUT, "/instances", "{}").await;
    assert!(answer.error(405, "bad_request").contains("PUT"));
    assert!(answer.headers.contains_key(header::ALLOW));
    server
        .send(Method::POST, "/capabilities", "")
        .await
        .error(405, "bad_request");
    server.get("/instances/%FF").await.error(400, "bad_request");
}

#[tokio::test]
async fn capabilities_claim_only_what_works() {
    let server = server().await;
    let answer = server.get("/capabilities").await.json();
    assert_eq!(
        answer["features"],
        json!(["exec", "images", "instances", "logs"])
    );
    assert_eq!(answer["server"]["api_version"], "0.28.0");
    assert_eq!(answer["host"]["os"], "linux");
    assert_eq!(answer["network"]["guest_to_guest"], false);
    assert!(answer["network"].get("gateway").is_none());
    let names: Vec<_> = answer["runtimes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["qemu", "qemu-microvm"]);
    for runtime in answer["runtimes"].as_array().unwrap() {
        assert_eq!(runtime["features"], json!([]));
        assert_eq!(
            runtime["available"], false,
            "there is no QEMU at /nonexistent"
        );
        assert!(
            runtime["unavailable_reason"]
                .as_str()
                .unwrap()
                .contains("/nonexistent/qemu")
        );
    }
    assert_eq!(
        answer["default_runtime"],
        json!({"name": "qemu-microvm", "available": false})
    );
}

#[tokio::test]
async fn create_refuses_what_is_wrong_and_leaves_nothing() {
    let server = server().await;
    let good = json!({"name": "web", "image": "alpine"});
    let with = |key: &str, value: Value| {
        let mut body = good.clone();
        body[key] = value;
        body
    };
    for (body, status, code, part) in [
        (json!({"image": "alpine"}), 400, "missing_field", "`name`"),
        (json!({"name": "web"}), 400, "missing_field", "`image`"),
        (with("nmae", json!(1)), 400, "invalid_field", "`nmae`"),
        (
            with("network", json!({"enabeld": true})),
            400,
            "invalid_field",
            "`enabeld`",
        ),
        (with("vcpus", json!("two")), 400, "invalid_field", "vcpus"),
        (with("vcpus", json!(0)), 400, "invalid_field", "vcpus"),
        (
            with("hypervisor", json!("xen")),
            400,
            "invalid_field",
            "hypervisor",
        ),
        (
            with("hypervisor", json!("firecracker")),
            501,
            "not_implemented",
            "hypervisor",
        ),
        (with("name", json!("Web")), 400, "invalid_name", "\"Web\""),
        (
            with("image", json!("Bad Image")),
            400,
            "invalid_name",
            "image",
        ),
        (with("size", json!("lots")), 400, "invalid_size", "\"lots\""),
        (
            with("platform", json!("linux/riscv64")),
            400,
            "invalid_platform",
            "linux/riscv64",
        ),
        (with("ttl", json!("5")), 400, "invalid_field", "ttl"),
        (with("ttl", json!("5m")), 501, "not_implemented", "ttl"),
        (with("env", json!({"A=B": ""})), 400, "invalid_field", "A=B"),
        (good.clone(), 404, "not_found", "alpine"),
        (json!([]), 400, "invalid_field", ""),
    ] {
        let message = server.create(body.clone()).await.error(status, code);
        assert!(message.contains(part), "{body}: {message}");
    }
    for (text, status, code) in [
        ("", 400, "bad_request"),
        ("{\"name\": ", 400, "bad_request"),
        ("{} {}", 400, "missing_field"),
    ] {
        server
            .send(Method::POST, "/instances", text)
            .await
            .error(status, code);
    }
    let message = server
        .send(Method::POST, "/instances", "{\n\"name\" \"x\"}")
        .await
        .error(400, "bad_request");
    assert!(message.contains("line 2 column 8"), "{message}");
    let large = format!("{{\"name\": \"{}\"}}", "x".repeat(extract::MAX_BODY));
    server
        .send(Method::POST, "/instances", large)
        .await
        .error(413, "bad_request");
    assert_eq!(server.get("/instances").await.json(), json!([]));
}

#[tokio::test]
async fn instances_are_listed_found_and_filtered() {
    let server = server_with(3).await;
    let all = server.get("/instances").await.json();
    assert_eq!(all.as_array().unwrap().len(), 3);
    let one = &all[1];
    assert_eq!(one["name"], "seed-1");
    assert_eq!(one["state"], "Stopped");
    assert_eq!(one["current_phase"], "stopped");
    assert!(one["phase_durations_ms"]["stopped"].is_u64());
    let id = one["id"].as_str().unwrap();
    for key in [id, "seed-1", &id[..20]] {
        let found = server.get(&format!("/instances/{key}")).await.json();
        assert_eq!(found["id"], id);
    }
    server
        .get("/instances/nosuch")
        .await
        .error(404, "not_found");
    let count = |query: &str| {
        let path = format!("/instances?{query}");
        let server = &server;
        async move { server.get(&path).await.json().as_array().unwrap().len() }
    };
    assert_eq!(count("state=Stopped").await, 3);
    assert_eq!(count("state=Running").await, 0);
    assert_eq!(count("tags%5Bteam%5D=seed").await, 3);
    assert_eq!(count("tags[team]=seed&tags[env]=x").await, 0);
    server
        .get("/instances?state=running")
        .await
        .error(400, "invalid_field");
    server
        .get("/instances?tag=x")
        .await
        .error(400, "invalid_field");
}

#[tokio::test]
async fn commands_take_any_kind_of_empty_body() {
    let server = server_with(1).await;
    for body in ["", "{}", "null", " \n"] {
        let answer = server
            .send(Method::POST, "/instances/seed-0/stop", body)
            .await;
        assert_eq!(answer.status, StatusCode::OK, "{body:?}");
        assert_eq!(answer.json()["state"], "Stopped");
    }
    let stop = |body: &'static str| server.send(Method::POST, "/instances/seed-0/stop", body);
    stop("{\"force\":true}").await.error(400, "invalid_field");
    let answer = server
        .send(Method::POST, "/instances/seed-0/start", "{\"cmd\":\"x\"}")
        .await;
    assert!(answer.error(400, "invalid_field").contains("cmd"));
    server
        .send(Method::POST, "/instances/nosuch/start", "")
        .await
        .error(404, "not_found");
}

#[tokio::test]
async fn wait_answers_or_says_why_not() {
    let server = server_with(1).await;
    let answer = server
        .get("/instances/seed-0/wait?state=Stopped")
        .await
        .json();
    assert_eq!(
        answer,
        json!({"state": "Stopped", "timed_out": false, "state_error": null})
    );
    // It can only get there by a new command, so there is nothing to wait for.
    let answer = server
        .get("/instances/seed-0/wait?state=Running&timeout=5m")
        .await
        .json();
    assert_eq!(answer["state"], "Stopped");
    for (query, code, part) in [
        ("", "missing_field", "state"),
        ("state=Unknown", "invalid_field", "Unknown"),
        ("state=stopped", "invalid_field", "Stopped"),
        ("state=Stopped&timeout=60", "invalid_field", "timeout"),
        ("state=Stopped&timeout=0s", "invalid_field", "timeout"),
        ("state=Stopped&tmeout=1s", "invalid_field", "tmeout"),
    ] {
        let path = format!("/instances/seed-0/wait?{query}");
        let message = server.get(&path).await.error(400, code);
        assert!(message.contains(part), "{query}: {message}");
    }
    server
        .get("/instances/nosuch/wait?state=Running")
        .await
        .error(404, "not_found");
}

#[tokio::test]
async fn logs_are_event_streams_that_end_with_the_server() {
    let server = server_with(1).await;
    let answer = server
        .get("/instances/seed-0/logs?source=hypeman&tail=5")
        .await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
    for query in ["source=kernel", "tail=-1", "tail=x", "follow=perhaps"] {
        let path = format!("/instances/seed-0/logs?{query}");
        server.get(&path).await.error(400, "invalid_field");
    }
    server
        .get("/instances/nosuch/logs")
        .await
        .error(404, "not_found");
    let following = server.get("/instances/seed-0/logs?follow=true");
    let stop = async {
        tokio::task::yield_now().await;
        server.state.stopping().cancel();
    };
    let (answer, ()) = tokio::join!(following, stop);
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn exec_is_refused_before_the_upgrade() {
    let server = server_with(1).await;
    server
        .get("/instances/nosuch/exec")
        .await
        .error(404, "not_found");
    let message = server
        .get("/instances/seed-0/exec")
        .await
        .error(409, "invalid_state");
    assert!(message.to_lowercase().contains("stopped"), "{message}");
}

#[tokio::test]
async fn delete_leaves_nothing() {
    let server = server_with(2).await;
    let delete = |path: &'static str| server.send(Method::DELETE, path, Body::empty());
    delete("/instances/seed-0?graceful_shutdown=x")
        .await
        .error(400, "invalid_field");
    let answer = delete("/instances/seed-0?graceful_shutdown=false").await;
    assert_eq!(
        (answer.status, answer.body.len()),
        (StatusCode::NO_CONTENT, 0)
    );
    assert_eq!(
        delete("/instances/seed-1").await.status,
        StatusCode::NO_CONTENT
    );
    delete("/instances/seed-0").await.error(404, "not_found");
    assert_eq!(server.get("/instances").await.json(), json!([]));
}

#[tokio::test]
async fn images_that_are_not_there() {
    let server = server().await;
    assert_eq!(server.get("/images").await.json(), json!([]));
    for name in ["alpine", "docker.io%2Flibrary%2Falpine:latest", "import"] {
        let path = format!("/images/{name}");
        server.get(&path).await.error(404, "not_found");
        server
            .send(Method::DELETE, &path, Body::empty())
            .await
            .error(404, "not_found");
    }
    server
        .get("/images/BAD%20name")
        .await
        .error(400, "invalid_name");
    server
        .get("/images?tags[a]=b&x=y")
        .await
        .error(400, "invalid_field");
}

#[tokio::test]
async fn a_bad_import_leaves_nothing() {
    let server = server().await;
    let import = |query: &str, body: Vec<u8>| {
        let path = format!("/images/import?{query}");
        let server = &server;
        async move { server.send(Method::POST, &path, body).await }
    };
    import("", vec![1]).await.error(400, "missing_field");
    import("name=BAD%20name", vec![1])
        .await
        .error(400, "invalid_name");
    import("name=a&platform=linux%2Fs390x", vec![1])
        .await
        .error(400, "invalid_platform");
    import("name=a&nmae=b", vec![1])
        .await
        .error(400, "invalid_field");
    import("name=a", vec![]).await.error(400, "bad_request");
    import("name=a", vec![0; (1 << 20) + 1])
        .await
        .error(413, "invalid_size");
    let message = import("name=a", b"this is no archive".repeat(100))
        .await
        .error(400, "invalid_request");
    assert!(!message.contains("uploads"), "{message}");
    assert_eq!(
        std::fs::read_dir(server.dir.path().join("d/uploads"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(server.get("/images").await.json(), json!([]));
}

#[tokio::test]
async fn a_panic_costs_one_answer() {
    async fn broken() {
        panic!("on purpose");
    }
    let router: Router = Router::new()
        .route("/x", axum::routing::get(broken))
        .layer(CatchPanicLayer::custom(panicked));
    let request = Request::builder().uri("/x").body(Body::empty()).unwrap();
    let response = router.oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
    let body = axum::body::to_bytes(response.into_body(), 1 << 16)
        .await
        .unwrap();
    let body: doze_api::ErrorBody = serde_json::from_slice(&body).unwrap();
    assert_eq!(body.code, "internal_error");
    assert!(!body.message.contains("on purpose"));
}

#[tokio::test]
async fn metrics_need_a_token_and_count_every_state() {
    let server = server().await;
    let bare = Request::get("/metrics").body(Body::empty()).unwrap();
    let answer = server.raw(bare).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    let answer = server.get("/metrics").await;
    assert_eq!(answer.status, StatusCode::OK);
    let kind = answer.headers[header::CONTENT_TYPE].to_str().unwrap();
    assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    for state in doze_lifecycle::State::ALL {
        let line = format!("doze_instances{{state=\"{}\"}} 0", state.phase());
        assert!(text.contains(&line), "{line}\n{text}");
    }
}
