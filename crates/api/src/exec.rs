//! Frames of the exec WebSocket (`GET /instances/{id}/exec`).
//!
//! ```text
//!   client                                   server
//!     ── text   ExecStart ───────────────────>
//!     ── binary stdin ───────────────────────>
//!     ── text   {"end_of_input":true} ───────>   (an addition to the contract)
//!     ── text   {"resize":{"rows","cols"}} ──>   (tty only)
//!     <────────────────────── binary output ──   stdout and stderr merged
//!     <────────────────── text {"exitCode":N} ── the last frame
//! ```
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Bytes of one frame at most, either way: the limit the published clients set on what they receive.
pub const MAX_FRAME: usize = 1 << 20;

/// First frame of the client.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecStart {
    /// Program and arguments; not empty.
    pub command: Vec<String>,
    /// Run on a pseudo-terminal.
    #[serde(default)]
    pub tty: bool,
    /// Added to the program's environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Working directory; absolute. The image's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Seconds after which the command is killed (exit code 124); 0 or absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u32>,
    /// Seconds to wait for the guest's agent while the guest boots; absent: 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_for_agent: Option<u32>,
    /// Height of the terminal; only with `tty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u16>,
    /// Width of the terminal; only with `tty`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cols: Option<u16>,
}

/// Size of a terminal, each at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecResize {
    pub rows: u16,
    pub cols: u16,
}

/// A control frame of the client after the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeFrame {
    pub resize: ExecResize,
}

/// A control frame of the client: no more input comes. The command sees the end of its standard input; on a
/// tty, `^D`. An addition to the contract: its published clients never send it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EndOfInputFrame {
    /// Always true.
    pub end_of_input: bool,
}

/// Last frame of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecExit {
    /// 0 to 255; 128 + signal when killed by one, 127 not found, 126 not executable, 124 timed out.
    #[serde(rename = "exitCode")]
    pub exit_code: i32,
}
