//! What host and guest say to each other once frames flow.
use serde::{Deserialize, Serialize};

/// Version both ends announce; an end accepts any version whose major part it knows.
pub const PROTOCOL: u32 = 1;

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
