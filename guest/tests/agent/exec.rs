//! Commands without a terminal.
use doze_agent::{
    client::{AgentError, ExecEvent},
    message::ExecRequest,
};

use crate::harness::*;

#[tokio::test]
async fn output_keeps_its_order_and_the_exit_code_comes_last() {
    let pair = Pair::start().await;
    let mut session = pair
        .sh("for i in 1 2 3; do echo out$i; echo err$i >&2; done; exit 3")
        .await;
    let (output, end) = finish(&mut session).await;
    assert_eq!(
        String::from_utf8(output).unwrap(),
        "out1\nerr1\nout2\nerr2\nout3\nerr3\n"
    );
    assert_eq!(end, exit(3, "exited with code 3"));
    assert_eq!(session.next().await, None);
}

#[tokio::test]
async fn environment_and_directory_are_the_programs_plus_the_requests() {
    let pair = Pair::start().await;
    let request = ExecRequest {
        env: vec![
            ("FROM_REQUEST".into(), "a b".into()),
            ("FROM_IMAGE".into(), "changed".into()),
        ],
        cwd: Some("usr".into()),
        ..shell(
            "pwd; echo $FROM_IMAGE $FROM_REQUEST; env | wc -l; ps -o sid= -p $$ | tr -d ' '; echo $$",
        )
    };
    let (output, end) = finish(&mut pair.client.exec(request).await.unwrap()).await;
    let text = String::from_utf8(output).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..2], ["/usr", "changed a b"]);
    // PATH and both variables, and the shell's own PWD: nothing of this test's environment.
    assert_eq!(lines[2], "4");
    assert_eq!(lines[3], lines[4], "a session of its own");
    assert_eq!(end.code, 0);
    assert_eq!(end.message, "");
}

#[tokio::test]
async fn input_reaches_the_command_and_ends() {
    let pair = Pair::start().await;
    let mut session = pair.sh("cat; echo end").await;
    let input = session.input();
    input.write(bytes("hello\n")).await.unwrap();
    assert_eq!(until(&mut session, "hello").await, "hello\n");
    input.write(bytes("again\n")).await.unwrap();
    input.close().await.unwrap();
    let (output, end) = finish(&mut session).await;
    assert_eq!(output, b"again\nend\n");
    assert_eq!(end.code, 0);
    assert!(matches!(
        input.write(bytes("late")).await,
        Err(AgentError::Refused(_))
    ));
}

#[tokio::test]
async fn commands_that_cannot_start_end_as_in_a_shell() {
    let pair = Pair::start().await;
    let run = async |command: &str, cwd: Option<&str>| {
        let request = ExecRequest {
            command: vec![command.into()],
            cwd: cwd.map(Into::into),
            ..ExecRequest::default()
        };
        let (output, end) = finish(&mut pair.client.exec(request).await.unwrap()).await;
        assert!(output.is_empty());
        end
    };
    assert_eq!(
        run("no-such-thing", None).await,
        exit(127, "command not found: no-such-thing")
    );
    assert_eq!(
        run("/etc/passwd", None).await,
        exit(126, "permission denied: /etc/passwd")
    );
    let end = run("true", Some("/nowhere")).await;
    assert_eq!(end.code, 126);
    assert!(
        end.message.starts_with("working directory /nowhere: "),
        "{end:?}"
    );
    let script = pair.folder.path().join("script");
    std::fs::write(&script, "#!/no/interpreter\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(run(script.to_str().unwrap(), None).await.code, 127);
}

#[tokio::test]
async fn a_signal_is_named() {
    let pair = Pair::start().await;
    let (_, end) = finish(&mut pair.sh("kill -9 $$").await).await;
    assert_eq!(end, exit(137, "killed by signal 9 (SIGKILL)"));
}

#[tokio::test]
async fn a_timeout_kills_the_whole_group() {
    let pair = Pair::start().await;
    let request = ExecRequest {
        timeout_ms: Some(300),
        ..shell("sleep 1000 & echo $!; wait")
    };
    let mut session = pair.client.exec(request).await.unwrap();
    let (output, end) = finish(&mut session).await;
    assert_eq!(end, exit(124, "timed out after 300 ms"));
    gone(&String::from_utf8(output).unwrap()).await;
}

#[tokio::test]
async fn a_dropped_session_takes_its_group_along() {
    let pair = Pair::start().await;
    let mut session = pair.sh("sleep 1000 & echo $! $$ ok; wait").await;
    let text = until(&mut session, "ok").await;
    drop(session);
    for pid in text.split(' ').take(2) {
        gone(pid).await;
    }
    pair.client.ping(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn a_descendant_that_keeps_the_output_open_does_not_keep_the_session() {
    let pair = Pair::start().await;
    let mut session = pair.sh("sleep 1000 & echo $! last words").await;
    let (output, end) = finish(&mut session).await;
    let text = String::from_utf8(output).unwrap();
    assert!(text.ends_with(" last words\n"), "{text:?}");
    assert_eq!(end.code, 0);
    // It outlived the session, as in a shell; this test cleans up after itself.
    let pid = text.split(' ').next().unwrap();
    assert!(
        std::process::Command::new("kill")
            .arg("-9")
            .arg(pid)
            .status()
            .unwrap()
            .success()
    );
}

#[tokio::test]
async fn an_unread_command_stops_nobody_else_and_loses_nothing() {
    let pair = Pair::start().await;
    let mut slow = pair.sh("seq 1 200000").await;
    for _ in 0..3 {
        let (output, _) = finish(&mut pair.sh("echo quick").await).await;
        assert_eq!(output, b"quick\n");
    }
    let (output, end) = finish(&mut slow).await;
    assert!(
        output == numbers(200_000).as_bytes(),
        "{} bytes",
        output.len()
    );
    assert_eq!(end.code, 0);
}

pub fn numbers(to: u32) -> String {
    (1..=to).map(|n| format!("{n}\n")).collect()
}

#[tokio::test]
async fn input_waits_for_a_command_that_does_not_read() {
    let pair = Pair::start().await;
    let mut session = pair.sh("read go; wc -c").await;
    let input = session.input();
    let writer = tokio::spawn(async move {
        for _ in 0..64 {
            input.write(vec![b'x'; 32 << 10].into()).await.unwrap();
        }
        input.write(bytes("\n")).await.unwrap();
        input.close().await.unwrap();
    });
    // `read` takes everything up to the first newline, which is at the very end.
    let (output, _) = finish(&mut session).await;
    patient(writer).await.unwrap();
    assert_eq!(String::from_utf8(output).unwrap().trim(), "0");
}

#[tokio::test]
async fn a_command_that_closed_its_input_does_not_block_the_sender() {
    let pair = Pair::start().await;
    let mut session = pair.sh("exec 0<&-; echo closed; sleep 1000").await;
    until(&mut session, "closed").await;
    let input = session.input();
    for _ in 0..64 {
        patient(input.write(vec![b'x'; 32 << 10].into()))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn many_at_once() {
    let pair = Pair::start().await;
    let mut sessions = Vec::new();
    for n in 0..40 {
        sessions.push((n, pair.sh(&format!("seq 1 2000; exit {n}")).await));
    }
    for (n, mut session) in sessions {
        let (output, end) = finish(&mut session).await;
        assert_eq!(String::from_utf8(output).unwrap(), numbers(2000));
        assert_eq!(end.code, n);
    }
}

#[tokio::test]
async fn a_request_too_large_for_one_message_is_refused() {
    let pair = Pair::start().await;
    let error = pair
        .client
        .exec(shell(&"x".repeat(70_000)))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(&error, AgentError::Refused(text) if text.contains("65536")),
        "{error}"
    );
}

#[tokio::test]
async fn closing_the_client_fails_what_runs() {
    let pair = Pair::start().await;
    let mut session = pair.sh("sleep 1000 & echo $! $$ ok; wait").await;
    let text = until(&mut session, "ok").await;
    pair.client.clone().close().await;
    for pid in text.split(' ').take(2) {
        gone(pid).await;
    }
    assert!(matches!(
        patient(session.next()).await,
        Some(ExecEvent::Failed(_))
    ));
    assert_eq!(session.next().await, None);
    assert!(pair.client.exec(shell("true")).await.is_err());
}
