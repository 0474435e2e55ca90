//! What reconnects, restarts and refusals do.
use std::time::{Duration, Instant};

use doze_agent::{
    client::{AgentClient, AgentError, ExecEvent},
    message::ProgramExit,
};
use doze_guest::agent::Request;

use crate::{exec::numbers, harness::*};

#[tokio::test]
async fn connections_that_break_lose_nothing() {
    for seed in 1..4 {
        let folder = tempfile::tempdir().unwrap();
        let (front, back) = (folder.path().join("front"), folder.path().join("back"));
        let _guest = Guest::with_exec(&back);
        let relay = cutting_relay(front.clone(), back, seed * 7919);
        let client = AgentClient::connect(front);
        connected(&client).await;

        let run = async |script: &str| loop {
            // Between two connections a new command is refused at once, never lost.
            match client.exec(shell(script)).await {
                Ok(session) => return session,
                Err(AgentError::Unavailable(_)) => connected(&client).await,
                Err(error) => panic!("{error}"),
            }
        };
        let mut counting = run("seq 1 300000").await;
        let (output, end) = finish(&mut counting).await;
        assert!(
            output == numbers(300_000).as_bytes(),
            "{} bytes",
            output.len()
        );
        assert_eq!(end.code, 0);

        let mut echo = run("cat").await;
        let input = echo.input();
        let text = numbers(30_000);
        let sender = tokio::spawn({
            let text = text.clone();
            async move {
                for part in text.as_bytes().chunks(3000) {
                    input.write(part.to_vec().into()).await.unwrap();
                }
                input.close().await.unwrap();
            }
        });
        let (output, _) = finish(&mut echo).await;
        patient(sender).await.unwrap();
        assert!(output == text.as_bytes(), "{} bytes", output.len());
        relay.abort();
    }
}

#[tokio::test]
async fn a_new_server_hears_the_status_and_ends_the_old_ones_commands() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let boot = Instant::now();
    let _guest = Guest::start(
        &socket,
        Box::new(move |agent| {
            agent.program_started(boot);
            agent.ready(defaults());
            agent.program_exited(ProgramExit {
                code: 7,
                message: "exited with code 7".into(),
            });
        }),
    );
    // A server that is killed says nothing more: its runtime stops between two polls.
    let old_socket = socket.clone();
    let old_server = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let old = AgentClient::connect(old_socket);
            connected(&old).await;
            let script = shell("sleep 1000 & echo $! $$ ok; wait");
            let mut session = old.exec(script).await.unwrap();
            until(&mut session, "ok").await
        })
    };
    let text = tokio::task::spawn_blocking(old_server).await.unwrap();
    let pids: Vec<_> = text.split(' ').take(2).collect();
    for pid in &pids {
        assert!(
            std::fs::exists(format!("/proc/{pid}")).unwrap(),
            "nobody killed it yet"
        );
    }

    let new = AgentClient::connect(socket);
    let view = patient(new.view().wait_for(|v| v.program_exit.is_some()))
        .await
        .unwrap()
        .clone();
    assert_eq!(view.program_exit.unwrap().code, 7);
    assert!(view.agent_ready.is_some());
    // Never earlier than it was; how much later depends on how long the message took.
    assert!(view.program_started.unwrap() >= boot - Duration::from_millis(1));
    for pid in pids {
        gone(pid).await;
    }
}

#[tokio::test]
async fn a_new_guest_fails_old_sessions_and_clears_the_view() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let guest = Guest::with_exec(&socket);
    let client = AgentClient::connect(socket.clone());
    connected(&client).await;
    let mut session = client.exec(shell("sleep 1000")).await.unwrap();
    let epoch = client.view().borrow().guest_epoch;
    drop(guest);
    let _second = Guest::start(&socket, Box::new(|_| {}));
    assert!(matches!(
        patient(session.next()).await,
        Some(ExecEvent::Failed(_))
    ));
    let view = patient(client.view().wait_for(|v| v.connected))
        .await
        .unwrap()
        .clone();
    assert_ne!(view.guest_epoch, epoch);
    assert!(view.program_started.is_none() && view.agent_ready.is_none());
}

#[tokio::test]
async fn without_agent_commands_are_refused_and_shutdown_works() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let mut guest = Guest::start(
        &socket,
        Box::new(|agent| agent.program_started(Instant::now())),
    );
    let client = AgentClient::connect(socket);
    let view = patient(client.view().wait_for(|v| v.program_started.is_some()))
        .await
        .unwrap()
        .clone();
    assert!(view.agent_ready.is_none());
    let refusal = client.exec(shell("true")).await.err().unwrap();
    assert!(
        matches!(&refusal, AgentError::Refused(t) if t.contains("skip_guest_agent")),
        "{refusal}"
    );
    client.shutdown(Duration::from_secs(3)).await.unwrap();
    let request = patient(guest.requests.recv()).await;
    assert_eq!(
        request,
        Some(Request::Shutdown {
            grace: Duration::from_secs(3)
        })
    );
}

#[tokio::test]
async fn a_boot_error_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _guest = Guest::start(
        &socket,
        Box::new(|agent| agent.boot_error("no disk".into())),
    );
    let client = AgentClient::connect(socket);
    let view = patient(client.view().wait_for(|v| v.boot_error.is_some()))
        .await
        .unwrap()
        .clone();
    assert_eq!(view.boot_error.as_deref(), Some("no disk"));
}

#[tokio::test]
async fn nobody_there_is_said_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let client = AgentClient::connect(socket.clone());
    let error = client.exec(shell("true")).await.err().unwrap();
    assert!(matches!(&error, AgentError::Unavailable(_)), "{error}");
    let error = client
        .ping(Duration::from_millis(50))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains(socket.to_str().unwrap()), "{error}");
    // The socket may come later than its client.
    let _guest = Guest::with_exec(&socket);
    client.ping(PATIENCE).await.unwrap();
}
