//! The proof that a restored guest lives: its agent answers a question asked after its CPUs ran.
//!
//! The question carries what the guest missed while it slept: the wall clock (read anew for each attempt)
//! and fresh entropy with a unique nonce. It is repeated until it is answered, because a guest that
//! is only slow must not be given up; the driver reads the answer whenever it comes.
use std::time::{Duration, Instant};

use doze_agent::{client::AgentClient, message::Identity};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// How long a guest may take for its answer. One that takes longer counts as Running, because it has its CPUs, and is
/// asked on.
pub const ANSWER_PATIENCE: Duration = Duration::from_secs(15);
/// One question waits this long for its answer.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Before a guest that did not take its identity is told again.
const AGAIN: Duration = Duration::from_secs(5);
/// Between attempts that failed at once.
const PAUSE: Duration = Duration::from_millis(100);

/// The guest's answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub at: Instant,
    /// What the guest could not do, for people to read.
    pub problem: Option<String>,
    /// It is who it was told to be, if it was told.
    pub identity_applied: bool,
}

/// A question that is being asked. Dropping it stops asking.
pub struct Proof {
    pub answer: watch::Receiver<Option<Answer>>,
    /// When it was asked first.
    pub since: Instant,
    /// The problem that its log has.
    pub noted: Option<String>,
    _asking: AbortOnDropHandle<()>,
}

impl Proof {
    /// Must be called after the CPUs were let run, or the answer would prove nothing.
    /// With `identity` the guest is a copy of another one and is told who it is.
    pub fn ask(agent: AgentClient, instance: String, identity: Option<Identity>) -> Proof {
        let (sender, answer) = watch::channel::<Option<Answer>>(None);
        let asking = tokio::spawn(async move {
            loop {
                let asked = match &identity {
                    Some(identity) => agent.restored_as(identity, rand::random(), ATTEMPT).await,
                    None => agent.restored(rand::random(), ATTEMPT).await,
                };
                match asked {
                    Ok(told) => {
                        let done = identity.is_none() || told.identity_applied;
                        let answer = Answer {
                            at: told.at,
                            problem: told.problem,
                            identity_applied: told.identity_applied,
                        };
                        // The same complaint is no news.
                        sender.send_if_modified(|last| {
                            let news = last.as_ref().is_none_or(|last| {
                                last.problem != answer.problem
                                    || last.identity_applied != answer.identity_applied
                            });
                            *last = Some(answer);
                            news
                        });
                        if done {
                            return;
                        }
                        // Whatever it lacks, a full disk perhaps, may be mended.
                        tokio::time::sleep(AGAIN).await;
                    }
                    Err(error) => {
                        tracing::warn!(%instance, %error, "a restored guest has not answered yet");
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Proof {
            answer,
            since: Instant::now(),
            noted: None,
            _asking: AbortOnDropHandle::new(asking),
        }
    }
}
