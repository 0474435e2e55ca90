//! Stopping a call from another thread.
use std::{
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Builder},
};

use doze_host::background::{self, Lowered};

use crate::error::Error;

/// A flag that several threads share; clones are the same flag. Once set it stays set.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Inner>);

#[derive(Default)]
struct Inner {
    cancelled: AtomicBool,
    /// Threads at work with a low priority. Each takes itself out before it ends.
    lowered: Mutex<Vec<Arc<Lowered>>>,
}

impl Cancel {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the calls that were given this flag to stop, and gives their threads their priority back and a little
    /// more, so that they get to run and can leave. Does not wait for them: the call itself returns when its last
    /// thread is gone.
    pub fn cancel(&self) {
        // Before the lock is taken: whoever registers after it was released sees the flag.
        self.0.cancelled.store(true, Ordering::SeqCst);
        for thread in self.lowered().iter() {
            if let Err(error) = thread.hurry() {
                tracing::warn!(%error, "cannot give a thread its priority back");
            }
        }
    }

    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// # Errors
    /// [`Error::Cancelled`] when it is.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }

    /// Lowers the calling thread until the guard goes or [`Self::cancel`] is called. A thread whose
    /// priority cannot be lowered works on as it is: later is worse than impolite.
    ///
    /// A helper with an ordinary priority does it, while the calling thread waits. A thread that lowered itself
    /// may not run again for long where others want the core, and must neither be unknown to the flag by then
    /// nor hold its lock.
    pub(crate) fn lower_current_thread(&self, background: bool) -> Option<LoweredGuard<'_>> {
        if !background {
            return None;
        }
        let thread = background::current_thread();
        let lower = || {
            let mut threads = self.lowered();
            if self.is_cancelled() {
                return Ok(None);
            }
            let lowered = Arc::new(background::lower_thread(thread)?);
            threads.push(lowered.clone());
            Ok(Some(lowered))
        };
        let outcome: io::Result<_> = thread::scope(|scope| {
            let helper = Builder::new()
                .name("snapshot-codec".to_owned())
                .spawn_scoped(scope, lower)?;
            (helper.join()).map_err(|_| io::Error::other("the helper panicked"))?
        });
        match outcome {
            Ok(lowered) => lowered.map(|lowered| LoweredGuard {
                cancel: self,
                lowered,
            }),
            Err(error) => {
                tracing::warn!(%error, "cannot lower a worker's priority; it works with the normal one");
                None
            }
        }
    }

    fn lowered(&self) -> MutexGuard<'_, Vec<Arc<Lowered>>> {
        self.0
            .lowered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancel").field(&self.is_cancelled()).finish()
    }
}

fn give_back(thread: &Lowered) {
    if let Err(error) = thread.give_back() {
        tracing::warn!(%error, "cannot give a thread its priority back");
    }
}

/// Must be dropped on the thread that it stands for.
pub(crate) struct LoweredGuard<'a> {
    cancel: &'a Cancel,
    lowered: Arc<Lowered>,
}

impl Drop for LoweredGuard<'_> {
    fn drop(&mut self) {
        // Before the lock is taken: whoever cancels must not wait for somebody who never runs.
        give_back(&self.lowered);
        // From here on nobody else touches this thread's number.
        self.cancel
            .lowered()
            .retain(|thread| !Arc::ptr_eq(thread, &self.lowered));
        if self.cancel.is_cancelled() {
            // Perhaps it was hurried in between, and would stay so.
            give_back(&self.lowered);
        }
    }
}
