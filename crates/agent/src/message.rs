//! What host and guest say to each other once frames flow.
//!
//! Control frames carry one JSON object with a `type`. A stream id in the frame says which exec
//! session a message belongs to; stream 0 is for the guest as a whole.
//!
//! ```text
//!   host                                   guest
//!     │ Exec ─────────────── stream n ───────>│
//!     │<── ExecStarted | ExecRefused ─────────│
//!     │ data (stdin), StdinClose, Resize ────>│
//!     │<──────────────── data (output) ───────│
//!     │<──────────────── ExecExited ──────────│   or  Kill ──> (ends without an answer)
//!     │                                       │
//!     │ Restored ──────────── stream 0 ──────>│   after every restore from a snapshot
//!     │<──────────────── RestoredDone ────────│   its clock is set, its entropy fresh, its identity its own
//! ```
//!
//! An end ignores a `type` it does not know (and says so once, see [`ToHost::Unsupported`]), so a
//! newer minor version may add messages.
use serde::{Deserialize, Serialize};

use crate::config::{self, ConfigError, GuestNetwork};

/// Version both ends announce: major << 16 | minor. An end accepts any version whose major part
/// it knows.
///
/// 1.1 added [`ToGuest::Restored`], 1.2 its identity; a guest that was put to standby with an agent of an older
/// version still wakes with it.
pub const PROTOCOL: u32 = 1 << 16 | 2;

/// Whether this end can talk to one that announces `version`.
pub fn speaks(version: u32) -> bool {
    version >> 16 == PROTOCOL >> 16
}

/// `1.1` of [`PROTOCOL`].
pub fn version_text(version: u32) -> String {
    format!("{}.{}", version >> 16, version & 0xffff)
}

/// Exec sessions one guest holds at most; another one is refused.
pub const MAX_EXECS: usize = 256;
/// Bytes of JSON in one control message at most.
pub const MAX_CONTROL: usize = crate::frame::MAX_PAYLOAD;
/// Bytes of entropy in one [`ToGuest::Restored`]; at least what makes the kernel's generator count as seeded.
pub const ENTROPY_BYTES: std::ops::RangeInclusive<usize> = 32..=64;

/// A command to run in the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub tty: bool,
    /// Added to the program's environment, by key.
    pub env: Vec<(String, String)>,
    pub cwd: Option<String>,
    /// Killed (SIGKILL to its process group, exit code 124) after this long.
    pub timeout_ms: Option<u64>,
    pub rows: Option<u16>,
    pub cols: Option<u16>,
}

/// How a program or command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramExit {
    /// 0-255; 128 + signal when killed by one; 127 not found; 126 not executable.
    pub code: i32,
    /// `exited with code 3`, `killed by signal 9 (SIGKILL)`, `command not found: foo`, ...; empty for code 0.
    pub message: String,
}

/// Who a guest is from now on that woke as a copy of another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub hostname: String,
    /// 32 lower-case hexadecimal digits (machine-id(5)); see [`config::machine_id`].
    pub machine_id: String,
    /// Absent for a guest without a network.
    pub network: Option<GuestNetwork>,
}

impl Identity {
    /// # Errors
    /// A value no guest can take, by its field.
    pub fn check(&self) -> Result<(), ConfigError> {
        config::check_hostname(&self.hostname)?;
        config::check_machine_id(&self.machine_id)?;
        self.network.as_ref().map_or(Ok(()), GuestNetwork::check)
    }
}

/// From the host to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToGuest {
    /// Opens its stream.
    Exec { request: ExecRequest },
    /// End of input: EOF on a pipe, ^D on a tty.
    StdinClose,
    /// New size of the session's terminal.
    Resize { rows: u16, cols: u16 },
    /// SIGKILL to the session's process group; the guest forgets the stream.
    Kill,
    /// Stream 0; answered by [`ToHost::Pong`].
    Ping { nonce: u64 },
    /// Stream 0. Stop signal to the program, SIGKILL after this long, then power off.
    Shutdown { grace_ms: u64 },
    /// Stream 0. The guest's memory and devices came out of a snapshot: its clock stood still, and what
    /// its random numbers come from may have been used before. Answered by [`ToHost::RestoredDone`].
    Restored {
        nonce: u64,
        /// The host's wall clock when the message was made: microseconds since 1970-01-01 UTC. The time the
        /// message waited afterwards travels in the frame and is to be added.
        wall_us: i64,
        /// Hexadecimal, [`ENTROPY_BYTES`] bytes; never used before.
        entropy: String,
        /// For a copy of another guest: taken after clock and entropy, before the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        identity: Option<Identity>,
    },
    /// A message of a newer version.
    #[serde(other)]
    Unknown,
}

/// From the guest to the host.
///
/// Ages are microseconds between the event and the moment the message was handed to the session;
/// time spent waiting there travels in the frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToHost {
    ProgramStarted {
        age_us: u64,
    },
    AgentReady {
        age_us: u64,
    },
    ProgramExited {
        exit: ProgramExit,
    },
    BootError {
        text: String,
    },
    ExecStarted,
    /// The session never began.
    ExecRefused {
        text: String,
    },
    /// Last of its stream.
    ExecExited {
        exit: ProgramExit,
    },
    Pong {
        nonce: u64,
    },
    /// The request was accepted; the power-off follows.
    ShuttingDown,
    /// The clock is set, the entropy mixed in and the identity taken, or `problem` says which of it failed and
    /// why.
    RestoredDone {
        nonce: u64,
        problem: Option<String>,
        /// The guest is who the request said, in every part. An agent that knows of no identity leaves this out.
        #[serde(default)]
        identity_applied: bool,
    },
    /// The guest did not understand a message.
    Unsupported {
        text: String,
    },
    /// A message of a newer version.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_newer_version_are_recognised_as_such() {
        let newer = r#"{"type":"set_clock","realtime_ns":1}"#;
        assert_eq!(
            serde_json::from_str::<ToGuest>(newer).unwrap(),
            ToGuest::Unknown
        );
        assert_eq!(
            serde_json::from_str::<ToHost>(newer).unwrap(),
            ToHost::Unknown
        );
    }

    #[test]
    fn only_the_major_version_must_agree() {
        assert!(speaks(PROTOCOL));
        assert!(speaks(PROTOCOL + 7));
        assert!(!speaks(PROTOCOL + (1 << 16)));
        assert_eq!(version_text(PROTOCOL), "1.2");
    }

    /// Other versions read these: the names must not change.
    #[test]
    fn restored_has_its_form_on_the_wire() {
        let mut request = ToGuest::Restored {
            nonce: u64::MAX,
            wall_us: 1_700_000_000_000_001,
            entropy: "00ff".into(),
            identity: None,
        };
        // As in 1.1.
        let plain = r#"{"type":"restored","nonce":18446744073709551615,"wall_us":1700000000000001,"entropy":"00ff"}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), plain);
        assert_eq!(serde_json::from_str::<ToGuest>(plain).unwrap(), request);
        if let ToGuest::Restored { identity, .. } = &mut request {
            *identity = Some(someone());
        }
        let whole = r#"{"type":"restored","nonce":18446744073709551615,"wall_us":1700000000000001,"entropy":"00ff","identity":{"hostname":"web-2","machine_id":"0123456789abcdef0123456789abcdef","network":{"mac":"02:00:0a:4d:00:05","address":"10.77.0.5","prefix":16,"gateway":"10.77.0.1","dns":["1.1.1.1"]}}}"#;
        assert_eq!(serde_json::to_string(&request).unwrap(), whole);
        assert_eq!(serde_json::from_str::<ToGuest>(whole).unwrap(), request);
    }

    #[test]
    fn an_agent_that_knows_no_identity_did_not_take_it() {
        let answer = |text| serde_json::from_str::<ToHost>(text).unwrap();
        let done = |identity_applied| ToHost::RestoredDone {
            nonce: 7,
            problem: None,
            identity_applied,
        };
        let old = r#"{"type":"restored_done","nonce":7,"problem":null}"#;
        assert_eq!(answer(old), done(false));
        let new = r#"{"type":"restored_done","nonce":7,"problem":null,"identity_applied":true}"#;
        assert_eq!(answer(new), done(true));
    }

    fn someone() -> Identity {
        Identity {
            hostname: "web-2".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            network: Some(GuestNetwork {
                mac: "02:00:0a:4d:00:05".into(),
                address: [10, 77, 0, 5].into(),
                prefix: 16,
                gateway: [10, 77, 0, 1].into(),
                dns: vec![[1, 1, 1, 1].into()],
            }),
        }
    }

    #[test]
    fn an_identity_nobody_can_take_is_refused_with_its_field() {
        type Spoil = fn(&mut Identity);
        let cases: [(&str, Spoil); 7] = [
            ("hostname", |i| i.hostname = "a b".into()),
            ("machine_id", |i| i.machine_id.truncate(31)),
            ("machine_id", |i| i.machine_id.replace_range(..1, "F")),
            ("machine_id", |i| i.machine_id = "0".repeat(32)),
            ("network.mac", |i| {
                i.network.as_mut().unwrap().mac = "01:00:0a:4d:00:05".into();
            }),
            ("network.mac", |i| {
                i.network.as_mut().unwrap().mac = "02:00:0a:4d:00".into();
            }),
            ("network.prefix", |i| i.network.as_mut().unwrap().prefix = 0),
        ];
        assert!(someone().check().is_ok());
        for (field, spoil) in cases {
            let mut bad = someone();
            spoil(&mut bad);
            let message = bad.check().unwrap_err().to_string();
            assert!(message.contains(&format!("{field}: ")), "{message}");
        }
    }
}
