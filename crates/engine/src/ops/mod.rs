//! One operation, one file. Each borrows the instance exclusively, records before it acts, and on
//! failure undoes what it did. `Cancel` is looked at between effects, never inside one.
pub mod create;
pub mod delete;
pub mod launch;
pub mod restore;
pub mod standby;
pub mod start;
pub mod stop;

use tokio_util::sync::CancellationToken;

use crate::EngineError;

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
