//! What is being waited for, on the terminal: a line on standard error that is written over, from the second
//! second on. Into a file or a pipe goes nothing.
use std::{pin::pin, time::Duration};

use tokio::time::{Instant, interval_at};

use crate::{output, terminal};

const STEP: Duration = Duration::from_secs(1);

/// Does `work`; `what` says to the person what that is, for example `taking a snapshot of web`.
pub async fn during<T>(what: &str, work: impl Future<Output = T>) -> T {
    if !terminal::is_terminal(std::io::stderr()) {
        return work.await;
    }
    let mut work = pin!(work);
    let mut ticks = interval_at(Instant::now() + STEP, STEP);
    let mut seconds = 0_u64;
    loop {
        tokio::select! {
            outcome = &mut work => {
                if seconds > 0 {
                    output::status_line("");
                }
                return outcome;
            }
            _ = ticks.tick() => {
                seconds += 1;
                output::status_line(&format!("{what} ({seconds} s)"));
            }
        }
    }
}
