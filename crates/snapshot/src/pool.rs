//! All cores on the chunks of one file, with the results in order.
//!
//! ```text
//!   next: 0 1 2 3 ...                 window: at most 4 results per worker wait
//!        |   |   |
//!      worker worker worker  ---> [ 5 |   | 7 ] ---> consume(4), consume(5), ... on the calling thread
//! ```
//!
//! A worker that is ahead waits until there is room, so memory stays bounded however slow the consumer is.
//! The first error, on either side, stops everybody; [`run`] returns when the last worker is gone.
use std::{
    num::NonZeroUsize,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, Builder},
};

use crate::{cancel::Cancel, error::Error};

const MAX_THREADS: usize = 64;
const WINDOW_PER_THREAD: usize = 4;

/// Who works.
#[derive(Debug, Clone, Copy)]
pub struct Team<'a> {
    /// `None`: one for each core.
    pub threads: Option<NonZeroUsize>,
    pub background: bool,
    pub cancel: &'a Cancel,
}

impl Team<'_> {
    fn size(&self, jobs: u64) -> usize {
        let wanted = self
            .threads
            // No answer means no cgroup or affinity could be read; one worker is always right.
            .or_else(|| thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get);
        let useful = usize::try_from(jobs).unwrap_or(usize::MAX);
        wanted.min(MAX_THREADS).min(useful).max(1)
    }
}

struct State<T> {
    next: u64,
    consumed: u64,
    /// The result of job `i` waits at `i % window`.
    ready: Vec<Option<T>>,
    failure: Option<Error>,
    stop: bool,
    /// Workers that wait for room. Nobody is woken who does not wait, and nobody for what is not for them: with
    /// chunks of zeros a job is less work than a wake-up.
    waiting: usize,
    /// What the consumer waits for.
    wanted: Option<u64>,
}

struct Shared<T> {
    jobs: u64,
    state: Mutex<State<T>>,
    /// There is room for one more result.
    room: Condvar,
    /// The result that the consumer waits for is there.
    result: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, failure: Option<Error>) {
        let mut state = self.lock();
        state.stop = true;
        if state.failure.is_none() {
            state.failure = failure;
        }
        self.room.notify_all();
        self.result.notify_all();
    }

    fn slot(state: &State<T>, job: u64) -> usize {
        // Less than the window, which is a usize.
        (job % state.ready.len() as u64) as usize
    }

    /// The next job, once there is room for its result; `None` when there is nothing left to do.
    fn take(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.stop || state.next == self.jobs {
                return None;
            }
            if state.next < state.consumed + state.ready.len() as u64 {
                let job = state.next;
                state.next += 1;
                return Some(job);
            }
            state.waiting += 1;
            state = (self.room.wait(state)).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    fn deliver(&self, job: u64, result: T) {
        let mut state = self.lock();
        let slot = Self::slot(&state, job);
        state.ready[slot] = Some(result);
        let wanted = state.wanted == Some(job);
        drop(state);
        if wanted {
            self.result.notify_one();
        }
    }

    fn receive(&self, job: u64) -> Result<T, Error> {
        let mut state = self.lock();
        loop {
            if let Some(failure) = state.failure.take() {
                return Err(failure);
            }
            let slot = Self::slot(&state, job);
            if let Some(result) = state.ready[slot].take() {
                state.wanted = None;
                return Ok(result);
            }
            state.wanted = Some(job);
            state = (self.result.wait(state)).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn consumed(&self, jobs: u64) {
        let mut state = self.lock();
        state.consumed = jobs;
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.room.notify_one();
        }
    }
}

/// Tells the consumer when a worker panics; it would wait for ever.
struct Witness<'a, T>(&'a Shared<T>);

impl<T> Drop for Witness<'_, T> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(Some(Error::Worker));
        }
    }
}

/// Does jobs 0 to `jobs` with `work`, each worker with its own `make()`, and gives the results in order
/// to `consume` on the calling thread. In the background all of them have a low priority meanwhile; call it
/// with an ordinary one.
///
/// # Errors
/// The first of `make`, `work` or `consume`, or [`Error::Cancelled`].
pub fn run<W, T: Send>(
    jobs: u64,
    team: Team<'_>,
    make: impl Fn() -> Result<W, Error> + Sync,
    work: impl Fn(&mut W, u64) -> Result<T, Error> + Sync,
    mut consume: impl FnMut(u64, T) -> Result<(), Error>,
) -> Result<(), Error> {
    let threads = team.size(jobs);
    let shared = Shared {
        jobs,
        state: Mutex::new(State {
            next: 0,
            consumed: 0,
            ready: std::iter::repeat_with(|| None)
                .take(threads * WINDOW_PER_THREAD)
                .collect(),
            failure: None,
            stop: false,
            waiting: 0,
            wanted: None,
        }),
        room: Condvar::new(),
        result: Condvar::new(),
    };
    let worker = || {
        let _witness = Witness(&shared);
        let _low = team.cancel.lower_current_thread(team.background);
        let mut tools = match make() {
            Ok(tools) => tools,
            Err(error) => return shared.stop(Some(error)),
        };
        while let Some(job) = shared.take() {
            match team.cancel.check().and_then(|()| work(&mut tools, job)) {
                Ok(result) => shared.deliver(job, result),
                Err(error) => return shared.stop(Some(error)),
            }
        }
    };
    thread::scope(|scope| {
        let mut workers = Vec::with_capacity(threads);
        let mut outcome = Ok(());
        for _ in 0..threads {
            match Builder::new()
                .name("snapshot-codec".to_owned())
                .spawn_scoped(scope, worker)
            {
                Ok(handle) => workers.push(handle),
                Err(source) => {
                    outcome = Err(Error::Threads {
                        step: "start a worker thread",
                        source,
                    });
                    break;
                }
            }
        }
        // Not before: a thread begins with its maker's priority. It would be too low to register with the
        // cancel flag in time, and would take that priority for the one to give back.
        let _low = team.cancel.lower_current_thread(team.background);
        if outcome.is_ok() {
            outcome = (0..jobs).try_for_each(|job| {
                let result = shared.receive(job)?;
                team.cancel.check()?;
                consume(job, result)?;
                shared.consumed(job + 1);
                Ok(())
            });
        }
        shared.stop(None);
        for worker in workers {
            if worker.join().is_err() {
                outcome = Err(Error::Worker);
            }
        }
        outcome
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn team(cancel: &Cancel, threads: usize) -> Team<'_> {
        Team {
            threads: NonZeroUsize::new(threads),
            background: false,
            cancel,
        }
    }

    #[test]
    fn results_come_in_order_and_the_window_holds() {
        let cancel = Cancel::new();
        let (started, consumed) = (AtomicU64::new(0), AtomicU64::new(0));
        let mut seen = Vec::new();
        run(
            500,
            team(&cancel, 3),
            || Ok(()),
            |(), job| {
                let ahead =
                    started.fetch_add(1, Ordering::SeqCst) + 1 - consumed.load(Ordering::SeqCst);
                // One more than the window: a job counts as consumed here a little later than there.
                assert!(ahead <= 3 * WINDOW_PER_THREAD as u64 + 1, "{ahead} ahead");
                Ok(job * 2)
            },
            |job, result| {
                seen.push((job, result));
                consumed.fetch_add(1, Ordering::SeqCst);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(seen, (0..500).map(|i| (i, i * 2)).collect::<Vec<_>>());
    }

    /// Of this thread: fields of its stat (`proc_pid_stat(5)`), counted after the name.
    fn stat(field: usize) -> i32 {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1;
        let field = after_name.split_whitespace().nth(field - 3);
        field.unwrap().parse().unwrap()
    }

    fn policy() -> i32 {
        stat(41)
    }

    fn nice() -> i32 {
        stat(19)
    }

    #[test]
    fn background_ends_for_everybody_with_a_cancel() {
        let (normal, ordinary) = (policy(), nice());
        let low = {
            let alone = Cancel::new();
            let _low = alone.lower_current_thread(true);
            policy()
        };
        let cancel = Cancel::new();
        let team = Team {
            background: true,
            ..team(&cancel, 2)
        };
        let seen = Mutex::new(Vec::new());
        let outcome = run(
            100,
            team,
            || Ok(()),
            |(), job| {
                let before = policy();
                if job == 10 {
                    cancel.cancel();
                }
                seen.lock().unwrap().push((job, before, policy()));
                Ok(())
            },
            |_, ()| Ok(()),
        );
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
        let seen = seen.into_inner().unwrap();
        assert!(seen.iter().any(|(_, before, ..)| *before == low));
        let (.., after) = seen.iter().find(|(job, ..)| *job == 10).unwrap();
        assert_eq!(*after, normal, "{seen:?}");
        assert_eq!((policy(), nice()), (normal, ordinary));
    }

    #[test]
    fn any_failure_ends_it() {
        let cancel = Cancel::new();
        let bad = |job| {
            if job == 40 {
                return Err(Error::ChunkSize { bytes: job });
            }
            Ok(())
        };
        let worker = run(
            100,
            team(&cancel, 2),
            || Ok(()),
            |(), job| bad(job),
            |_, ()| Ok(()),
        );
        assert!(matches!(worker, Err(Error::ChunkSize { bytes: 40 })));
        let consumer = run(
            100,
            team(&cancel, 2),
            || Ok(()),
            |(), _| Ok(()),
            |job, ()| bad(job),
        );
        assert!(matches!(consumer, Err(Error::ChunkSize { bytes: 40 })));
        let maker = run(
            100,
            team(&cancel, 2),
            || bad(40),
            |(), _| Ok(()),
            |_, ()| Ok(()),
        );
        assert!(matches!(maker, Err(Error::ChunkSize { bytes: 40 })));
        let panic = run(
            100,
            team(&cancel, 2),
            || Ok(()),
            |(), job| {
                assert!(job != 40, "as a defect would");
                Ok(())
            },
            |_, ()| Ok(()),
        );
        assert!(matches!(panic, Err(Error::Worker)));
        cancel.cancel();
        let cancelled = run(
            100,
            team(&cancel, 2),
            || Ok(()),
            |(), _| Ok(()),
            |_, ()| Ok(()),
        );
        assert!(matches!(cancelled, Err(Error::Cancelled)));
    }
}
