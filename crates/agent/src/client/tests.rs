//! The client against a guest's end of the channel that does as a test says.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{path::Path, time::SystemTime};

use tempfile::TempDir;
use tokio::{net::UnixListener, sync::mpsc};

use super::*;
use crate::{
    message::{ENTROPY_BYTES, Identity, ToHost},
    session::Event,
};

/// Long enough on a busy machine; only a hang takes it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest was told, with the time each message had waited at the host.
type Heard = mpsc::UnboundedReceiver<(u32, ToGuest, Duration)>;

struct Guest {
    endpoint: Endpoint,
    heard: Heard,
    _folder: TempDir,
    socket: PathBuf,
}

impl Guest {
    fn listen(protocol: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let endpoint = Endpoint::new(Role::Guest, 5);
        endpoint.announce(protocol);
        let (sender, heard) = mpsc::unbounded_channel();
        tokio::spawn(serve(bind(&socket), endpoint.clone(), sender));
        Self {
            endpoint,
            heard,
            _folder: folder,
            socket,
        }
    }

    fn client(&self) -> AgentClient {
        AgentClient::connect(self.socket.clone())
    }

    async fn hears(&mut self) -> (u32, ToGuest, Duration) {
        let next = tokio::time::timeout(PATIENCE, self.heard.recv());
        next.await.expect("it hangs").expect("the guest goes on")
    }

    fn says(&self, stream: u32, message: &ToHost) {
        self.endpoint.open(stream);
        self.endpoint.send(stream, message).unwrap();
    }

    /// The nonce and the rest of the next request, which is about a restore.
    async fn hears_restored(&mut self) -> (u64, i64, String, Duration) {
        match self.hears().await {
            (
                MAIN_STREAM,
                ToGuest::Restored {
                    nonce,
                    wall_us,
                    entropy,
                    identity: None,
                },
                waited,
            ) => (nonce, wall_us, entropy, waited),
            other => panic!("{other:?}"),
        }
    }

    /// The nonce of the next request, which is about a copy that becomes somebody.
    async fn hears_identity(&mut self) -> (u64, Identity) {
        match self.hears().await {
            (
                MAIN_STREAM,
                ToGuest::Restored {
                    nonce,
                    identity: Some(identity),
                    ..
                },
                _,
            ) => (nonce, identity),
            other => panic!("{other:?}"),
        }
    }

    fn answers(&self, nonce: u64, problem: Option<&str>, identity_applied: bool) {
        let problem = problem.map(str::to_owned);
        let done = ToHost::RestoredDone {
            nonce,
            problem,
            identity_applied,
        };
        self.says(MAIN_STREAM, &done);
    }

    async fn begins(&mut self) -> u32 {
        match self.hears().await {
            (stream, ToGuest::Exec { .. }, _) => {
                self.says(stream, &ToHost::ExecStarted);
                stream
            }
            other => panic!("{other:?}"),
        }
    }
}

fn bind(socket: &Path) -> UnixListener {
    UnixListener::bind(socket).unwrap()
}

async fn serve(
    listener: UnixListener,
    endpoint: Endpoint,
    heard: mpsc::UnboundedSender<(u32, ToGuest, Duration)>,
) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (reader, writer) = stream.into_split();
        let tell = |event| {
            if let Event::Control {
                stream,
                payload,
                waited,
            } = event
            {
                let message = serde_json::from_slice(&payload).unwrap();
                heard.send((stream, message, waited)).ok();
            }
        };
        endpoint.drive(reader, writer, tell).await.ok();
    }
}

fn now_us() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    i64::try_from(now.unwrap().as_micros()).unwrap()
}

/// A call that goes on while the test plays the guest.
fn restored(client: &AgentClient) -> JoinHandle<Result<Answer, AgentError>> {
    let client = client.clone();
    tokio::spawn(async move { client.restored([0xc4; 32], PATIENCE).await })
}

fn restored_as(
    client: &AgentClient,
    identity: &Identity,
) -> JoinHandle<Result<Answer, AgentError>> {
    let (client, identity) = (client.clone(), identity.clone());
    tokio::spawn(async move { client.restored_as(&identity, [0xc4; 32], PATIENCE).await })
}

fn someone() -> Identity {
    Identity {
        hostname: "fork".into(),
        machine_id: crate::config::machine_id("fork"),
        network: None,
    }
}

async fn exec(client: &AgentClient, guest: &mut Guest) -> (ExecSession, u32) {
    client.handle.shared.reached(|v| v.connected).await.unwrap();
    let (session, stream) = tokio::join!(client.exec(ExecRequest::default()), guest.begins());
    (session.unwrap(), stream)
}

#[tokio::test]
async fn linked_needs_a_listener_and_no_guest() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let client = AgentClient::connect(socket.clone());
    let error = client.linked(Duration::from_millis(50)).await.unwrap_err();
    assert!(
        matches!(&error, AgentError::Unavailable(t) if t.contains(socket.to_str().unwrap())),
        "{error}"
    );
    let listener = bind(&socket);
    client.linked(PATIENCE).await.unwrap();
    assert!(!client.view().borrow().connected);
    // And it notices that the link is gone.
    let (accepted, _) = listener.accept().await.unwrap();
    drop((accepted, listener));
    let mut view = client.view();
    let gone = view.wait_for(|v| !v.linked);
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
}

#[tokio::test]
async fn linked_stays_said_after_the_handshake() {
    let guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    client.handle.shared.reached(|v| v.connected).await.unwrap();
    client.linked(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn restored_says_the_time_of_the_message_and_returns_the_guests_answer() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    for problem in [None, Some("no clock".to_owned())] {
        let before = now_us();
        let call = restored(&client);
        let (nonce, wall_us, entropy, waited) = guest.hears_restored().await;
        assert!((before..=now_us()).contains(&wall_us));
        assert!(wall_us + i64::try_from(waited.as_micros()).unwrap() <= now_us());
        assert_eq!(entropy, "c4".repeat(32));
        assert!(ENTROPY_BYTES.contains(&(entropy.len() / 2)));
        // An answer to something else, such as an earlier restore, proves nothing.
        guest.answers(nonce ^ 1, Some("wrong"), false);
        // It was given no identity, so it has none.
        guest.answers(nonce, problem.as_deref(), true);
        let answer = call.await.unwrap().unwrap();
        assert_eq!((answer.problem, answer.identity_applied), (problem, false));
    }
}

#[tokio::test]
async fn a_clock_that_may_be_late_is_set_again() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    let call = restored(&client);
    let (first, _, seed, _) = guest.hears_restored().await;
    // The guest is slow, which is what the client measures.
    tokio::time::sleep(Duration::from_millis(600)).await;
    guest.answers(first, None, false);
    let (second, _, other_seed, _) = guest.hears_restored().await;
    assert_ne!(second, first);
    assert_ne!(other_seed, seed, "no bit of entropy counts twice");
    guest.answers(second, None, false);
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test]
async fn a_guest_that_answers_once_and_slowly_is_alive_with_a_problem() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    let call = {
        let client = client.clone();
        tokio::spawn(async move { client.restored([1; 32], Duration::from_secs(4)).await })
    };
    let (nonce, ..) = guest.hears_restored().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    guest.answers(nonce, None, false);
    let answer = call.await.unwrap().unwrap();
    assert!(answer.problem.unwrap().contains("may be late"));
}

#[tokio::test]
async fn an_agent_of_protocol_1_0_is_proved_alive_by_a_ping() {
    let mut guest = Guest::listen(1 << 16);
    let client = guest.client();
    let call = restored(&client);
    guest.hears_restored().await;
    let text = "message of a newer version".to_owned();
    guest.says(MAIN_STREAM, &ToHost::Unsupported { text });
    let (_, ToGuest::Ping { nonce }, _) = guest.hears().await else {
        panic!("no ping");
    };
    guest.says(MAIN_STREAM, &ToHost::Pong { nonce });
    assert_eq!(
        call.await.unwrap().unwrap().problem.as_deref(),
        Some("the guest's agent is of protocol 1.0 and can neither set its clock nor reseed")
    );
}

/// A copy that does not say so did not become somebody else, whatever else it says.
#[tokio::test]
async fn a_copy_has_its_identity_when_its_agent_says_so() {
    let cases: [(u32, Option<&str>, bool, Option<&str>); 4] = [
        (2, None, true, None),
        (
            2,
            Some("the host name was not set"),
            false,
            Some("the host name was not set"),
        ),
        (2, None, false, Some("did not say")),
        (1, None, false, Some("is of protocol 1.1 and cannot")),
    ];
    for (minor, said, applied, problem) in cases {
        let mut guest = Guest::listen(1 << 16 | minor);
        let client = guest.client();
        let call = restored_as(&client, &someone());
        let (nonce, identity) = guest.hears_identity().await;
        assert_eq!(identity, someone());
        guest.answers(nonce, said, applied);
        let answer = call.await.unwrap().unwrap();
        assert_eq!(answer.identity_applied, applied);
        match (problem, answer.problem) {
            (None, None) => {}
            (Some(wanted), Some(got)) => assert!(got.contains(wanted), "{got}"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn an_identity_is_given_once_also_when_the_clock_is_set_again() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    let call = restored_as(&client, &someone());
    let (first, _) = guest.hears_identity().await;
    // The guest is slow, which is what the client measures.
    tokio::time::sleep(Duration::from_millis(600)).await;
    guest.answers(first, None, true);
    let (second, ..) = guest.hears_restored().await;
    guest.answers(second, None, false);
    let answer = call.await.unwrap().unwrap();
    assert!(answer.identity_applied && answer.problem.is_none());
}

#[tokio::test]
async fn an_identity_nobody_can_take_is_refused_before_it_is_sent() {
    let guest = Guest::listen(crate::message::PROTOCOL);
    let nameless = Identity {
        hostname: String::new(),
        ..someone()
    };
    let client = guest.client();
    let asked = client.restored_as(&nameless, [0; 32], PATIENCE);
    let error = asked.await.unwrap_err();
    assert!(
        matches!(&error, AgentError::Refused(t) if t.contains("hostname")),
        "{error}"
    );
}

#[tokio::test]
async fn no_answer_is_a_timeout_and_no_guest_is_unavailable() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    client.handle.shared.reached(|v| v.connected).await.unwrap();
    let within = Duration::from_millis(100);
    let error = client.restored([0; 32], within).await.unwrap_err();
    assert!(
        matches!(error, AgentError::Timeout(t) if t == within),
        "{error}"
    );
    guest.hears_restored().await;
    assert!(lock(&client.handle.shared.restores).is_empty());

    let nobody = AgentClient::connect("/nonexistent/socket".into());
    let error = nobody.restored([0; 32], within).await.unwrap_err();
    assert!(matches!(error, AgentError::Unavailable(_)), "{error}");
}

#[tokio::test]
async fn closing_with_a_reason_gives_it_to_everybody_and_tells_the_guest_nothing() {
    const WHY: &str = "the instance was put to standby";
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    let (mut session, _) = exec(&client, &mut guest).await;
    let input = session.input();
    // Its stream takes no more: the guest gives no credit back.
    let writer = tokio::spawn({
        let input = input.clone();
        async move {
            loop {
                input.write(vec![0; 64 << 10].into()).await?;
            }
        }
    });
    let starting = tokio::spawn({
        let client = client.clone();
        async move { client.exec(ExecRequest::default()).await }
    });
    assert!(matches!(guest.hears().await, (_, ToGuest::Exec { .. }, _)));
    let call = restored(&client);
    guest.hears_restored().await;
    assert_eq!(client.open_sessions(), 2);
    let mut sessions = client.sessions();
    assert_eq!(*sessions.borrow_and_update(), 2);

    client.clone().close_with(WHY).await;
    assert_eq!(client.open_sessions(), 0);
    assert_eq!(*sessions.wait_for(|open| *open == 0).await.unwrap(), 0);
    let failed = Some(ExecEvent::Failed(WHY.into()));
    assert_eq!(session.next().await, failed);
    assert_eq!(session.next().await, None);
    // It may run: that is for whoever asked to judge, so it is no error that one tries again after.
    let mut starting = starting.await.unwrap().unwrap();
    assert_eq!(starting.next().await, failed);
    let says_why = |error: AgentError| {
        assert!(
            matches!(&error, AgentError::Unavailable(t) if t == WHY),
            "{error}"
        );
    };
    let blocked: Result<(), _> = writer.await.unwrap();
    says_why(blocked.unwrap_err());
    says_why(input.close().await.unwrap_err());
    says_why(call.await.unwrap().unwrap_err());
    says_why(client.exec(ExecRequest::default()).await.err().unwrap());
    says_why(client.ping(PATIENCE).await.unwrap_err());
    says_why(client.linked(PATIENCE).await.unwrap_err());
    let view = client.view().borrow().clone();
    assert!(!view.connected && !view.linked);
    drop((session, starting));
    // All that a new client's question follows is what the old one said: nothing more.
    let next = guest.client();
    let ping = tokio::spawn(async move { next.ping(PATIENCE).await });
    assert!(matches!(
        guest.hears().await,
        (MAIN_STREAM, ToGuest::Ping { .. }, _)
    ));
    ping.abort();
}

#[tokio::test]
async fn sessions_are_counted_while_they_run() {
    let mut guest = Guest::listen(crate::message::PROTOCOL);
    let client = guest.client();
    let (mut first, stream) = exec(&client, &mut guest).await;
    let (second, _) = exec(&client, &mut guest).await;
    assert_eq!(client.open_sessions(), 2);
    let exit = ProgramExit {
        code: 0,
        message: String::new(),
    };
    guest.says(stream, &ToHost::ExecExited { exit: exit.clone() });
    assert_eq!(first.next().await, Some(ExecEvent::Exit(exit)));
    assert_eq!(client.open_sessions(), 1);
    drop(second);
    assert_eq!(client.open_sessions(), 0);
}
