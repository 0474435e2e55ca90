//! The keeper against a monitor that misbehaves: the listener is ours, and so the process to watch is ourselves.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
};

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

fn ourselves() -> ProcessId {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Field 2 may hold spaces; field 3 follows the last parenthesis (proc_pid_stat(5)).
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    ProcessId {
        pid: i32::try_from(std::process::id()).unwrap(),
        start_ticks: rest.split(' ').nth(22 - 3).unwrap().parse().unwrap(),
        boot_id: doze_host::clock::boot_id().unwrap(),
    }
}

/// The monitor's end of one connection.
struct Peer {
    requests: Lines<BufReader<OwnedReadHalf>>,
    answers: OwnedWriteHalf,
}

impl Peer {
    async fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        let (read, write) = stream.into_split();
        let mut peer = Self {
            requests: BufReader::new(read).lines(),
            answers: write,
        };
        peer.send(json!({ "QMP": {} })).await;
        peer.answer("qmp_capabilities", json!({})).await;
        peer
    }

    async fn send(&mut self, message: Value) {
        let line = format!("{message}\r\n");
        self.answers.write_all(line.as_bytes()).await.unwrap();
    }

    /// The next request, which must be this one.
    async fn expect(&mut self, command: &str) -> Value {
        let line = self.requests.next_line().await.unwrap().expect("a request");
        let request: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(request["execute"], command);
        request["id"].clone()
    }

    async fn answer(&mut self, command: &str, answer: Value) {
        let id = self.expect(command).await;
        self.send(json!({ "return": answer, "id": id })).await;
    }

    /// What the keeper asks on each new connection, and its first look.
    async fn settled(&mut self, status: &str) {
        self.status(status).await;
        self.answer("query-migrate", json!({})).await;
        self.status(status).await;
    }

    /// The look before a migration that is refused, and the one after.
    async fn status_twice(&mut self, status: &str) {
        self.status(status).await;
        self.status(status).await;
    }

    async fn status(&mut self, status: &str) {
        let answer = json!({ "status": status, "running": status == "running" });
        self.answer("query-status", answer).await;
    }
}

struct Stage {
    folder: TempDir,
    listener: UnixListener,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp.sock")).unwrap();
        Self { folder, listener }
    }

    async fn take_up(&self, id: &ProcessId) -> Result<Option<QemuMachine>, VmmError> {
        let process = Arc::new(ProcessHandle::open(id).unwrap().unwrap());
        let places = Places {
            qmp_socket: self.folder.path().join("qmp.sock"),
            agent_socket: self.folder.path().join("agent.sock"),
            vmm_log: self.folder.path().join("log"),
        };
        take_up(process, places, 0, PATIENCE, "attach").await
    }

    /// A machine in this status, the keeper idle.
    async fn machine(&self, status: &str) -> (QemuMachine, Peer) {
        let ours = ourselves();
        let monitor = async {
            let mut peer = Peer::accept(&self.listener).await;
            // The one that makes the machine, and the keeper's first.
            peer.status(status).await;
            peer
        };
        let (machine, mut peer) = tokio::join!(self.take_up(&ours), monitor);
        peer.settled(status).await;
        peer.status(status).await;
        (machine.unwrap().unwrap(), peer)
    }
}

#[tokio::test]
async fn a_request_survives_a_lost_connection() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("prelaunch").await;
    let monitor = async {
        peer.expect("cont").await;
        drop(peer);
        let mut peer = Peer::accept(&stage.listener).await;
        peer.settled("prelaunch").await;
        peer.answer("cont", json!({})).await;
        peer.status("running").await;
        peer
    };
    let (resumed, _peer) = tokio::join!(machine.resume(), monitor);
    resumed.unwrap();
    assert_eq!(*machine.watch().borrow(), MachineStatus::Running);
}

#[tokio::test]
async fn a_save_is_not_repeated_on_a_new_connection() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("paused").await;
    let folder = tempfile::tempdir().unwrap();
    let monitor = async {
        peer.status("paused").await;
        peer.expect("migrate-set-capabilities").await;
        drop(peer);
        let mut peer = Peer::accept(&stage.listener).await;
        peer.settled("paused").await;
        peer.status("paused").await;
        peer
    };
    let (saved, mut peer) = tokio::join!(machine.save(folder.path()), monitor);
    let e = saved.unwrap_err();
    assert!(
        e.to_string().contains("connection to the VMM was lost"),
        "{e}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // The next thing it hears is what is asked next.
    let monitor = async {
        peer.answer("cont", json!({})).await;
        peer.status("running").await;
    };
    let (resumed, ()) = tokio::join!(machine.resume(), monitor);
    resumed.unwrap();
}

#[tokio::test]
async fn a_migration_nobody_waits_for_is_ended_before_anything_else() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("paused").await;
    let monitor = async {
        peer.expect("cont").await;
        drop(peer);
        let mut peer = Peer::accept(&stage.listener).await;
        peer.status("paused").await;
        peer.answer("query-migrate", json!({ "status": "active", "ram": {} }))
            .await;
        peer.answer("migrate_cancel", json!({})).await;
        peer.send(json!({ "event": "MIGRATION", "data": { "status": "cancelled" } }))
            .await;
        peer.answer("query-migrate", json!({ "status": "cancelled" }))
            .await;
        peer.status("finish-migrate").await;
        peer.status("postmigrate").await;
        peer.answer("cont", json!({})).await;
        peer.status("running").await;
        peer
    };
    let (resumed, _peer) = tokio::join!(machine.resume(), monitor);
    resumed.unwrap();
}

#[tokio::test]
async fn what_is_not_paused_is_not_saved_and_what_does_not_wait_is_not_loaded() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("running").await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("state"), "x").unwrap();
    let (saved, ()) = tokio::join!(machine.save(folder.path()), peer.status_twice("running"));
    assert!(saved.unwrap_err().to_string().contains("\"running\""));
    let (loaded, ()) = tokio::join!(machine.load(folder.path()), peer.status_twice("paused"));
    assert!(loaded.unwrap_err().to_string().contains("does not wait"));
}

#[tokio::test]
async fn any_event_makes_the_keeper_ask_and_a_broken_line_does_not_stop_it() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("running").await;
    let mut watch = machine.watch();
    peer.answers.write_all(b"{ not json\r\n").await.unwrap();
    for (status, expected) in [
        ("shutdown", MachineStatus::Shutdown),
        ("guest-panicked", MachineStatus::Failed),
        ("a state of 2040", MachineStatus::Paused),
        ("running", MachineStatus::Running),
    ] {
        peer.send(json!({ "event": "OF_2040", "data": [1, "x", null] }))
            .await;
        peer.status(status).await;
        let seen = timeout(PATIENCE, watch.wait_for(|now| *now == expected));
        seen.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_refusal_is_told_and_the_status_is_asked_all_the_same() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("prelaunch").await;
    let monitor = async {
        let id = peer.expect("cont").await;
        peer.send(json!({ "error": { "class": "GenericError", "desc": "no" }, "id": id }))
            .await;
        peer.status("shutdown").await;
    };
    let (refused, ()) = tokio::join!(machine.resume(), monitor);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "cont: the VMM answered: no"
    );
    assert_eq!(*machine.watch().borrow(), MachineStatus::Shutdown);
}

#[tokio::test]
async fn a_stop_that_did_not_stop_is_no_success() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("running").await;
    let monitor = async {
        peer.answer("stop", json!({})).await;
        peer.status("shutdown").await;
    };
    let (paused, ()) = tokio::join!(machine.pause(), monitor);
    assert!(paused.unwrap_err().to_string().contains("it is Shutdown"));
}

#[tokio::test]
async fn a_request_given_up_is_not_carried_out_later() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("paused").await;
    // The keeper is busy with the first when the second is dropped.
    let id = {
        let first = machine.status();
        let second = machine.resume();
        tokio::pin!(first, second);
        let id = tokio::select! {
            biased;
            _ = &mut first => panic!("answered by nobody"),
            _ = &mut second => panic!("answered by nobody"),
            id = peer.expect("query-status") => id,
        };
        id
    };
    peer.send(json!({ "return": { "status": "paused", "running": false }, "id": id }))
        .await;
    let (status, ()) = tokio::join!(machine.status(), peer.status("paused"));
    assert_eq!(status.unwrap(), MachineStatus::Paused);
}

#[tokio::test]
async fn dropping_the_machine_closes_the_connection() {
    let stage = Stage::new();
    let (machine, mut peer) = stage.machine("running").await;
    drop(machine);
    let end = timeout(PATIENCE, peer.requests.next_line()).await.unwrap();
    // Reset instead of end of file when an answer of ours was still unread.
    assert!(matches!(end, Ok(None) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn a_socket_of_another_process_is_refused() {
    let stage = Stage::new();
    let child = doze_host::process::spawn_detached(&doze_host::process::Detached {
        program: "sleep".into(),
        args: vec!["600".into()],
        log: stage.folder.path().join("log"),
        mark: "doze-vmm-test".to_owned(),
    })
    .unwrap();
    let (taken, _peer) = tokio::join!(stage.take_up(child.id()), Peer::accept(&stage.listener));
    child.kill().unwrap();
    child.exited().await.unwrap();
    let refused = taken.expect_err("it is not the VMM").to_string();
    assert!(refused.contains("belongs to process"), "{refused}");
}

#[tokio::test]
async fn a_process_that_ends_before_it_answers_is_gone() {
    let stage = Stage::new();
    let child = doze_host::process::spawn_detached(&doze_host::process::Detached {
        program: "sleep".into(),
        args: vec!["600".into()],
        log: stage.folder.path().join("log"),
        mark: "doze-vmm-test".to_owned(),
    })
    .unwrap();
    let silent = async {
        let (stream, _): (UnixStream, _) = stage.listener.accept().await.unwrap();
        child.kill().unwrap();
        stream
    };
    let (taken, _stream) = tokio::join!(stage.take_up(child.id()), silent);
    assert!(taken.unwrap().is_none());
}
