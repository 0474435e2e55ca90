//! Standby and restore, as the agent sees them: the connection lives, the host is another one.
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use doze_agent::{
    client::{AgentClient, AgentError, ExecEvent},
    config::machine_id,
    message::Identity,
};

use crate::harness::*;

const WHY: &str = "the instance was put to standby";

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[tokio::test]
async fn a_restored_guest_has_its_clock_set_and_fresh_entropy_before_it_answers() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let kernel = Recorder::default();
    let _guest = Guest::with_exec_on(kernel.clone(), &socket);
    let client = AgentClient::connect(socket);
    let before = now();
    let answer = client.restored([0x5a; 32], PATIENCE).await.unwrap();
    assert_eq!(answer.problem, None);
    let mended = kernel.mended.lock().unwrap().clone();
    let [
        Mended::Clock(clock),
        Mended::Entropy(entropy),
        Mended::Reseeded,
    ] = &mended[..3]
    else {
        panic!("{mended:?}");
    };
    // The message has microseconds.
    assert!(*clock + Duration::from_micros(1) >= before && *clock <= now());
    assert_eq!(entropy, &[0x5a; 32]);
}

#[tokio::test]
async fn what_the_guest_could_not_do_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let kernel = Recorder {
        broken: true,
        ..Recorder::default()
    };
    let _guest = Guest::with_exec_on(kernel, &socket);
    let client = AgentClient::connect(socket);
    let problem = client.restored([1; 32], PATIENCE).await.unwrap().problem;
    assert!(
        problem.as_deref().is_some_and(|p| p.contains("reseeded")),
        "{problem:?}"
    );
}

fn fork() -> Identity {
    Identity {
        hostname: "fork".into(),
        machine_id: machine_id("fork"),
        network: None,
    }
}

#[tokio::test]
async fn a_copy_becomes_somebody_else_before_it_answers() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let kernel = Recorder::default();
    let called_as_before = |agent: &doze_guest::agent::Agent| {
        let mut defaults = defaults();
        defaults.env.set("HOSTNAME", FORMER_HOSTNAME);
        agent.ready(defaults);
    };
    let _guest = Guest::on(kernel.clone(), &socket, Box::new(called_as_before));
    let client = AgentClient::connect(socket);
    let answer = client.restored([3; 32], PATIENCE).await.unwrap();
    assert!(!answer.identity_applied);
    let hostname = async || {
        let mut session = client.exec(shell("echo $HOSTNAME")).await.unwrap();
        String::from_utf8(finish(&mut session).await.0).unwrap()
    };
    assert_eq!(hostname().await, format!("{FORMER_HOSTNAME}\n"));
    kernel.mended.lock().unwrap().clear();

    let who = fork();
    let asked = client.restored_as(&who, [4; 32], PATIENCE);
    let answer = asked.await.unwrap();
    assert_eq!((answer.identity_applied, answer.problem), (true, None));
    let mended = kernel.mended.lock().unwrap().clone();
    assert!(
        matches!(&mended[..4], [Mended::Clock(_), Mended::Entropy(seed), Mended::Reseeded, Mended::Identity(taken)]
            if *seed == [4; 32] && *taken == who),
        "{mended:?}"
    );
    assert_eq!(hostname().await, "fork\n");
}

#[tokio::test]
async fn a_copy_that_failed_to_become_somebody_else_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let kernel = Recorder {
        broken: true,
        ..Recorder::default()
    };
    let _guest = Guest::with_exec_on(kernel, &socket);
    let client = AgentClient::connect(socket);
    let who = fork();
    let asked = client.restored_as(&who, [4; 32], PATIENCE);
    let answer = asked.await.unwrap();
    assert!(!answer.identity_applied);
    let problem = answer.problem.unwrap();
    assert!(
        problem.contains("the identity was not taken: no device"),
        "{problem}"
    );
}

/// Each budget cuts somewhere else in what the hosts and the guest say: in a handshake, in a command's input,
/// in its output.
#[tokio::test]
async fn a_new_host_takes_over_wherever_the_old_one_was_cut() {
    const PLENTY: u64 = u64::MAX;
    for budget in [30_000, 33_333, 50_001, 66_000, PLENTY] {
        let folder = tempfile::tempdir().unwrap();
        let (front, back) = (folder.path().join("front"), folder.path().join("back"));
        let kernel = Recorder::default();
        let _guest = Guest::with_exec_on(kernel.clone(), &back);
        let relay = restoring_relay(front.clone(), back, vec![budget, PLENTY]);

        let old = AgentClient::connect(front.clone());
        connected(&old).await;
        let mut session = old
            .exec(shell("sleep 1000 & echo $! $$ ok; cat"))
            .await
            .unwrap();
        let pids = until(&mut session, "ok").await;
        let input = session.input();
        let writer = tokio::spawn(async move {
            loop {
                input.write(vec![b'x'; 32 << 10].into()).await?;
            }
        });
        // Some of it has come back, so that both directions are in the middle of something.
        assert!(matches!(
            patient(session.next()).await,
            Some(ExecEvent::Output(_))
        ));
        assert_eq!(old.open_sessions(), 1);
        patient(old.clone().close_with(WHY)).await;
        let end = patient(async {
            loop {
                match session.next().await {
                    Some(ExecEvent::Output(_)) => {}
                    other => return other,
                }
            }
        });
        assert_eq!(end.await, Some(ExecEvent::Failed(WHY.into())));
        let blocked: Result<(), AgentError> = patient(writer).await.unwrap();
        assert!(matches!(&blocked, Err(AgentError::Unavailable(t)) if t == WHY));
        drop((session, old));

        let new = AgentClient::connect(front);
        new.linked(PATIENCE).await.unwrap();
        let answer = new.restored([9; 32], PATIENCE).await.unwrap();
        assert_eq!(answer.problem, None, "{budget}");
        assert!(
            kernel
                .mended
                .lock()
                .unwrap()
                .contains(&Mended::Entropy(vec![9; 32]))
        );
        // The old host's commands are over in the guest as well, and new ones work.
        for pid in pids.split(' ').take(2) {
            gone(pid).await;
        }
        let (output, end) = finish(&mut new.exec(shell("echo new")).await.unwrap()).await;
        assert_eq!((&output[..], end.code), (&b"new\n"[..], 0));
        relay.abort();
    }
}

#[tokio::test]
async fn closing_with_a_reason_leaves_the_guests_commands_to_the_next_host() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _guest = Guest::with_exec(&socket);
    let old = AgentClient::connect(socket.clone());
    connected(&old).await;
    let mut session = old
        .exec(shell("sleep 1000 & echo $! $$ ok; wait"))
        .await
        .unwrap();
    let text = until(&mut session, "ok").await;
    old.close_with(WHY).await;
    assert_eq!(
        patient(session.next()).await,
        Some(ExecEvent::Failed(WHY.into()))
    );
    drop(session);
    let pids: Vec<_> = text.split(' ').take(2).collect();
    for pid in &pids {
        assert!(
            std::fs::exists(format!("/proc/{pid}")).unwrap(),
            "nobody was told to end it"
        );
    }
    let _new = AgentClient::connect(socket);
    for pid in pids {
        gone(pid).await;
    }
}
