//! One operation, one file. Each borrows the instance exclusively, records before it acts, and on
//! failure undoes what it did. `Cancel` is looked at between effects, never inside one.
pub mod capture;
pub mod create;
pub mod delete;
pub mod fork;
pub mod launch;
pub mod restore;
pub mod rollback;
pub mod standby;
pub mod start;
pub mod stop;
pub mod update;

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::EngineError;

/// Says where an operation's time went, in one line for its log.
pub struct Laps {
    begun: Instant,
    text: String,
}

impl Laps {
    pub fn start(operation: &str) -> Laps {
        Laps {
            begun: Instant::now(),
            text: format!("{operation} took"),
        }
    }

    /// `what` is done now: milliseconds since the operation began.
    pub fn lap(&mut self, what: &str) {
        let ms = self.begun.elapsed().as_secs_f64() * 1e3;
        self.text.push_str(&format!(" {what} {ms:.1} ms,"));
    }

    pub fn text(&self) -> &str {
        self.text.trim_end_matches(',')
    }
}

/// Why an operation that can be interrupted should give up.
pub type Cancel = CancellationToken;

/// An error when somebody asked the operation to give up.
pub fn check(cancel: &Cancel) -> Result<(), EngineError> {
    if cancel.is_cancelled() {
        return Err(EngineError::Interrupted {
            by: "a command that arrived meanwhile",
        });
    }
    Ok(())
}
