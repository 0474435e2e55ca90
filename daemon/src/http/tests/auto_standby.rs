//! Policy, status and hold without anybody to observe.
use super::*;

#[tokio::test]
async fn a_policy_is_changed_whole_or_not_at_all_and_shown() {
    let server = server_with(1).await;
    let patch = async |body: Value| {
        let body = body.to_string();
        server.send(Method::PATCH, "/instances/seed-0", body).await
    };
    let shown = async || server.get("/instances/seed-0").await.json()["auto_standby"].clone();
    assert_eq!(shown().await, Value::Null);
    patch(json!({})).await.error(400, "invalid_request");
    server
        .send(Method::PATCH, "/instances/seed-0", Body::empty())
        .await
        .error(400, "bad_request");
    let on = json!({"enabled": true, "idle_timeout": "90s", "ignore_source_cidrs": ["10.1.2.3/8"]});
    let message = patch(json!({"auto_standby": on, "ttl": "1h"}))
        .await
        .error(501, "not_implemented");
    assert!(message.starts_with("ttl: "), "{message}");
    assert_eq!(shown().await, Value::Null);
    let canonical =
        json!({"enabled": true, "idle_timeout": "1m30s", "ignore_source_cidrs": ["10.0.0.0/8"]});
    let answer = patch(json!({"auto_standby": on})).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.json()["auto_standby"], canonical);
    assert_eq!(shown().await, canonical);
    let wrong = json!({"auto_standby": {"enabled": true, "idle_timeout": "0s"}});
    patch(wrong).await.error(400, "invalid_field");
    assert_eq!(shown().await, canonical);
    patch(json!({"auto_standby": {"enabled": false, "idle_timeout": "5m"}})).await;
    assert_eq!(shown().await, json!({"enabled": false}));
    server
        .send(
            Method::PATCH,
            "/instances/none",
            json!({"auto_standby": {}}).to_string(),
        )
        .await
        .error(404, "not_found");
}

/// No network, so nobody can be seen: it says so, and holds nobody.
#[tokio::test]
async fn every_status_of_a_server_that_sees_nobody() {
    let server = server_with(1).await;
    for (policy, status, reason) in [
        (None, "disabled", "policy_missing"),
        (
            Some(json!({"enabled": false})),
            "disabled",
            "policy_disabled",
        ),
        (
            Some(json!({"enabled": true, "idle_timeout": "1m"})),
            "unsupported",
            "unsupported_platform",
        ),
    ] {
        let (configured, enabled) = (policy.is_some(), status == "unsupported");
        if let Some(policy) = policy {
            let body = json!({"auto_standby": policy}).to_string();
            server.send(Method::PATCH, "/instances/seed-0", body).await;
        }
        let hold = "/instances/seed-0/auto-standby/hold";
        for answer in [
            server.get("/instances/seed-0/auto-standby/status").await,
            server.send(Method::POST, hold, Body::empty()).await,
            server.send(Method::POST, hold, "{}").await,
        ] {
            assert_eq!(answer.status, StatusCode::OK);
            let answer = answer.json();
            assert_eq!(answer["status"], status, "{answer}");
            assert_eq!(answer["reason"], reason, "{answer}");
            assert_eq!(answer["supported"], false);
            assert_eq!(answer["configured"], configured);
            assert_eq!(answer["enabled"], enabled);
            assert_eq!(answer["eligible"], false);
            assert_eq!(answer["active_inbound_connections"], 0);
            for field in [
                "countdown_remaining",
                "hold_until",
                "idle_since",
                "next_standby_at",
            ] {
                assert!(answer.as_object().unwrap()[field].is_null(), "{answer}");
            }
        }
    }
    for (method, path) in [
        (Method::GET, "/instances/none/auto-standby/status"),
        (Method::POST, "/instances/none/auto-standby/hold"),
    ] {
        server
            .send(method, path, Body::empty())
            .await
            .error(404, "not_found");
    }
    let message = server
        .send(
            Method::POST,
            "/instances/seed-0/auto-standby/hold",
            "{\"for\": \"1h\"}",
        )
        .await
        .error(400, "invalid_field");
    assert!(message.contains("for"), "{message}");
}
