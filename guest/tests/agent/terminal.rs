//! Commands on a terminal.
use doze_agent::message::ExecRequest;

use crate::harness::*;

fn tty(script: &str) -> ExecRequest {
    ExecRequest {
        tty: true,
        rows: Some(31),
        cols: Some(97),
        ..shell(script)
    }
}

#[tokio::test]
async fn a_terminal_is_a_terminal_of_the_given_size() {
    let pair = Pair::start().await;
    let script =
        "test -t 0 && test -t 1 && test -t 2 && echo yes; stty size; echo $TERM; echo x > /dev/tty";
    let (output, end) = finish(&mut pair.client.exec(tty(script)).await.unwrap()).await;
    assert_eq!(
        String::from_utf8(output).unwrap(),
        "yes\r\n31 97\r\nxterm\r\nx\r\n"
    );
    assert_eq!(end.code, 0);
}

#[tokio::test]
async fn a_resize_signals_the_foreground() {
    let pair = Pair::start().await;
    let script = "trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.05; done";
    let mut session = pair.client.exec(tty(script)).await.unwrap();
    until(&mut session, "ready").await;
    session.input().resize(40, 120).await.unwrap();
    let (output, end) = finish(&mut session).await;
    assert_eq!(String::from_utf8(output).unwrap().trim(), "40 120");
    assert_eq!(end.code, 4);
}

#[tokio::test]
async fn control_characters_work() {
    let pair = Pair::start().await;
    // `exec`: dash may sleep on when the signal arrives while it waits for a child.
    let script = tty("echo ready; exec sleep 1000");
    let mut session = pair.client.exec(script).await.unwrap();
    until(&mut session, "ready").await;
    session.input().write(bytes("\x03")).await.unwrap();
    let (_, end) = finish(&mut session).await;
    assert_eq!(end.code, 130, "{end:?}");

    let mut session = pair.client.exec(tty("cat; echo end")).await.unwrap();
    session.input().write(bytes("line\r")).await.unwrap();
    until(&mut session, "line\r\nline\r\n").await;
    session.input().close().await.unwrap();
    let (output, end) = finish(&mut session).await;
    assert!(String::from_utf8(output).unwrap().ends_with("end\r\n"));
    assert_eq!(end.code, 0);
}

#[tokio::test]
async fn all_output_arrives_though_the_command_ends_at_once() {
    let pair = Pair::start().await;
    for _ in 0..20 {
        let (output, _) = finish(&mut pair.client.exec(tty("seq 1 3000")).await.unwrap()).await;
        assert!(
            String::from_utf8(output)
                .unwrap()
                .ends_with("\r\n2999\r\n3000\r\n")
        );
    }
}

#[tokio::test]
async fn dropping_a_terminal_hangs_it_up() {
    let pair = Pair::start().await;
    let mut session = pair
        .client
        .exec(tty("sleep 1000 & echo $! $$ ok; wait"))
        .await
        .unwrap();
    let text = until(&mut session, "ok").await;
    drop(session);
    for pid in text.split(' ').take(2) {
        gone(pid).await;
    }
}
