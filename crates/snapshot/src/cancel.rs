//! Stopping a call from another thread.
use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
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

    /// Asks the calls that were given this flag to stop, and gives their threads their priority back, so
    /// that they get to run and can leave. Does not wait for them: the call itself returns when its last
    /// thread is gone.
    pub fn cancel(&self) {
        // Before the lock is taken: whoever registers after it was released sees the flag.
        self.0.cancelled.store(true, Ordering::SeqCst);
        for thread in self.lowered().iter() {
            give_back(thread);
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
    pub(crate) fn lower_current_thread(&self, background: bool) -> Option<LoweredGuard<'_>> {
        if !background {
            return None;
        }
        let lowered = match background::lower_current_thread() {
            Ok(lowered) => Arc::new(lowered),
            Err(error) => {
                tracing::warn!(%error, "cannot lower a worker's priority; it works with the normal one");
                return None;
            }
        };
        let mut threads = self.lowered();
        threads.push(lowered.clone());
        if self.is_cancelled() {
            give_back(&lowered);
        }
        Some(LoweredGuard {
            cancel: self,
            lowered,
        })
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
        // Out of the list first, under its lock: from here on nobody else touches this thread's number.
        self.cancel
            .lowered()
            .retain(|thread| !Arc::ptr_eq(thread, &self.lowered));
        give_back(&self.lowered);
    }
}
