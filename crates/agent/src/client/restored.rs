//! The first words to a guest that came out of a snapshot.
//!
//! ```text
//!   handshake ─> Restored {new nonce, wall clock of this moment, entropy} ─> RestoredDone {nonce} ─> Answer
//!                    └── Unsupported (agent of 1.0) ─> Ping ─> Pong ─> Answer with a problem
//! ```
//!
//! A copy of another guest gets its identity in the same message. It has it only when its agent says so: one of
//! 1.1 does not know the field, does the rest, and answers without a word about it.
//!
//! The nonce did not exist when the snapshot was made, so the answer can come from nobody but a guest that
//! runs now. The clock is read when the message is made, which is after the handshake; what it waits here
//! travels in its frame. What it waits on the way is known only afterwards, and bounded by the round trip:
//! after a slow one (memory that is still being read, a busy host) the clock is set again.
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;

use super::{AgentClient, AgentError, MAIN_STREAM, Shared, ToGuest, lock};
use crate::message::{Identity, version_text};

/// A guest's clock may be late by at most this much, or it is set again.
const CLOCK_WITHIN: Duration = Duration::from_millis(500);
const ATTEMPTS: u32 = 3;
/// The version that brought [`ToGuest::Restored`].
const SINCE: u32 = 1 << 16 | 1;
/// The version that brought its identity.
const IDENTITY_SINCE: u32 = 1 << 16 | 2;

/// That a restored guest answered, and what it could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What of clock, entropy and identity is not as it should be; the guest runs all the same.
    pub problem: Option<String>,
    /// It took the identity that it was given, and says so. Without it a copy still is who it was copied from.
    pub identity_applied: bool,
    /// From the last request to its answer: the clock, if set, is late by less.
    pub round_trip: Duration,
    /// When the first answer came: since then it is known to run.
    pub at: Instant,
}

/// What the guest said to one request.
pub(super) enum Reply {
    Done {
        problem: Option<String>,
        identity_applied: bool,
    },
    Unsupported(String),
}

impl AgentClient {
    /// Gets proof that the guest runs, sets its wall clock to this host's and mixes `entropy` (never used
    /// before) into its random numbers. Call it when the CPUs run; waits for the handshake if there was
    /// none yet, all within `timeout`.
    ///
    /// A guest whose agent is too old to set clock and entropy answers as well: see [`Answer::problem`].
    ///
    /// # Errors
    /// Without an answer: [`AgentError::Unavailable`] when no handshake came about, [`AgentError::Timeout`]
    /// when none followed it, [`AgentError::Lost`] when the guest restarted meanwhile.
    pub async fn restored(
        &self,
        entropy: [u8; 32],
        timeout: Duration,
    ) -> Result<Answer, AgentError> {
        self.restored_with(entropy, None, timeout).await
    }

    /// [`restored`](Self::restored) for a copy of another guest, which becomes `identity` before it answers. It
    /// did only if [`Answer::identity_applied`]; why not is the problem. May be called again: who has the
    /// identity already takes it once more.
    ///
    /// # Errors
    /// As [`restored`](Self::restored); [`AgentError::Refused`] for an identity that no guest can take.
    pub async fn restored_as(
        &self,
        identity: &Identity,
        entropy: [u8; 32],
        timeout: Duration,
    ) -> Result<Answer, AgentError> {
        let refused = |e: crate::config::ConfigError| AgentError::Refused(e.to_string());
        identity.check().map_err(refused)?;
        self.restored_with(entropy, Some(identity), timeout).await
    }

    async fn restored_with(
        &self,
        entropy: [u8; 32],
        identity: Option<&Identity>,
        timeout: Duration,
    ) -> Result<Answer, AgentError> {
        let shared = &self.handle.shared;
        let begun = Instant::now();
        let left = || timeout.saturating_sub(begun.elapsed());
        let first = Request { entropy, identity };
        let mut answer = self.restored_once(first, timeout, left()).await?;
        for _ in 1..ATTEMPTS {
            if !answer.late() {
                break;
            }
            // Only the clock is late. Its network would be taken down once more for the same identity.
            let again = Request {
                entropy: rand::random(),
                identity: None,
            };
            match self.restored_once(again, timeout, left()).await {
                Ok(better) => {
                    answer = Answer {
                        at: answer.at,
                        identity_applied: answer.identity_applied,
                        ..better
                    }
                }
                // It answered once, so it runs; how well its clock is set is said below.
                Err(AgentError::Timeout(_) | AgentError::Unavailable(_))
                    if !shared.cancel.is_cancelled() =>
                {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if answer.late() {
            answer.problem = Some(format!(
                "the guest took {} ms to answer: its clock may be late by as much",
                answer.round_trip.as_millis()
            ));
        }
        Ok(answer)
    }

    async fn restored_once(
        &self,
        request: Request<'_>,
        timeout: Duration,
        left: Duration,
    ) -> Result<Answer, AgentError> {
        let shared = &self.handle.shared;
        let nonce = rand::random();
        let asked = shared.within(left, ask(shared, nonce, request, left)).await;
        lock(&shared.restores).remove(&nonce);
        let wanted = request.identity.is_some();
        match asked.map_err(|e| of_whole(e, timeout))? {
            (
                Reply::Done {
                    problem,
                    identity_applied,
                },
                round_trip,
            ) => {
                let not_taken = wanted && !identity_applied && problem.is_none();
                let protocol = shared.endpoint.peer_protocol();
                Ok(Answer {
                    problem: problem.or_else(|| not_taken.then(|| no_identity(protocol))),
                    identity_applied: wanted && identity_applied,
                    round_trip,
                    at: Instant::now(),
                })
            }
            (Reply::Unsupported(text), waited) => {
                let begun = Instant::now();
                let alive = self.ping(left.saturating_sub(waited)).await;
                alive.map_err(|e| of_whole(e, timeout))?;
                Ok(Answer {
                    problem: Some(unsupported(shared.endpoint.peer_protocol(), &text)),
                    identity_applied: false,
                    round_trip: begun.elapsed(),
                    at: Instant::now(),
                })
            }
        }
    }
}

impl Answer {
    /// A clock that was not set is not late, and asking again would not set it.
    fn late(&self) -> bool {
        self.problem.is_none() && self.round_trip > CLOCK_WITHIN
    }
}

/// What one request asks for beside the clock.
#[derive(Clone, Copy)]
struct Request<'a> {
    entropy: [u8; 32],
    identity: Option<&'a Identity>,
}

/// One request and its answer, from the handshake on.
async fn ask(
    shared: &Shared,
    nonce: u64,
    request: Request<'_>,
    within: Duration,
) -> Result<(Reply, Duration), AgentError> {
    shared.reached(|v| v.connected).await?;
    let (sender, receiver) = oneshot::channel();
    {
        let mut restores = lock(&shared.restores);
        restores.retain(|_, waiter| !waiter.is_closed());
        restores.insert(nonce, sender);
    }
    let request = ToGuest::Restored {
        nonce,
        wall_us: wall_us(SystemTime::now()),
        entropy: hex::encode(request.entropy),
        identity: request.identity.cloned(),
    };
    let begun = Instant::now();
    shared.endpoint.send(MAIN_STREAM, &request)?;
    let reply = shared.answer(receiver, within).await?;
    Ok((reply, begun.elapsed()))
}

/// Microseconds since 1970, negative before; beyond what fits, the end of it.
fn wall_us(at: SystemTime) -> i64 {
    match at.duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |us| -us),
    }
}

fn unsupported(protocol: Option<u32>, text: &str) -> String {
    match protocol {
        Some(version) if version < SINCE => format!(
            "the guest's agent is of protocol {} and can neither set its clock nor reseed",
            version_text(version)
        ),
        _ => format!(
            "the guest's agent neither set its clock nor reseeded: it did not understand the request ({text})"
        ),
    }
}

fn no_identity(protocol: Option<u32>) -> String {
    match protocol {
        Some(version) if version < IDENTITY_SINCE => format!(
            "the guest's agent is of protocol {} and cannot take an identity of its own",
            version_text(version)
        ),
        _ => "the guest's agent did not say that it took an identity of its own".to_owned(),
    }
}

/// The caller knows the time it gave for everything, not what was left of it.
fn of_whole(error: AgentError, timeout: Duration) -> AgentError {
    match error {
        AgentError::Timeout(_) => AgentError::Timeout(timeout),
        other => other,
    }
}
