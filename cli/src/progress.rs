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

/// How many bytes went by, on the terminal, from the second second on; the line goes when this is dropped.
pub struct Bytes {
    what: &'static str,
    total: Option<u64>,
    done: u64,
    /// `None`: nobody looks.
    from: Option<Instant>,
    /// What stands there now.
    shown: String,
}

impl Bytes {
    /// `what` happened to so many: `sent`, `received`.
    pub fn new(what: &'static str, total: Option<u64>) -> Self {
        Self {
            what,
            total,
            done: 0,
            from: terminal::is_terminal(std::io::stderr()).then(|| Instant::now() + STEP),
            shown: String::new(),
        }
    }

    pub fn add(&mut self, bytes: u64) {
        self.set(self.done + bytes);
    }

    pub fn set(&mut self, done: u64) {
        self.done = done;
        if self.from.is_none_or(|from| Instant::now() < from) {
            return;
        }
        let text = describe(self.what, done, self.total);
        if text != self.shown {
            output::status_line(&text);
            self.shown = text;
        }
    }

    pub fn done(&self) -> u64 {
        self.done
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if !self.shown.is_empty() {
            output::status_line("");
        }
    }
}

fn describe(what: &str, done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) if total > 0 => {
            let percent = (u128::from(done) * 100 / u128::from(total)).min(100);
            format!(
                "{} of {} {what} ({percent} %)",
                output::bytes(done),
                output::bytes(total)
            )
        }
        Some(_) | None => format!("{} {what}", output::bytes(done)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_words() {
        assert_eq!(
            describe("sent", 512, Some(1024)),
            "512 B of 1.0 KiB sent (50 %)"
        );
        assert_eq!(describe("received", 2048, None), "2.0 KiB received");
        assert_eq!(describe("sent", 0, Some(0)), "0 B sent");
    }
}
