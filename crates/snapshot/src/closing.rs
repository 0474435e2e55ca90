//! Files that a cancelled call left unfinished: closed by threads nobody waits for, unless they want the space.
use std::{
    fs::File,
    io,
    sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::Builder,
    time::Duration,
};

static CLOSING: Mutex<usize> = Mutex::new(0);
static CLOSED: Condvar = Condvar::new();

fn closing() -> MutexGuard<'static, usize> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whoever closes a file without a name gives its space back, and waits until the disk has what is under way: for a
/// few hundred MiB longer than a cancel may take. So a thread of its own holds it a little longer than the caller,
/// who drops `file` and then what this returns.
///
/// # Errors
/// There is no descriptor or no thread left for it: then the caller closes it by dropping `file`.
pub fn close_elsewhere(file: &File) -> io::Result<mpsc::Sender<()>> {
    let file = file.try_clone()?;
    let (closer, closed_here) = mpsc::channel();
    *closing() += 1;
    let close = move || {
        // Nothing is ever sent: it ends when the sender goes.
        let _gone = closed_here.recv();
        drop(file);
        *closing() -= 1;
        CLOSED.notify_all();
    };
    match Builder::new()
        .name("snapshot-close".to_owned())
        .spawn(close)
    {
        Ok(_) => Ok(closer),
        Err(error) => {
            *closing() -= 1;
            Err(error)
        }
    }
}

/// Waits until the space of all files that cancelled calls left unfinished is free, for `patience` at most.
pub fn wait_for_space(patience: Duration) {
    let outcome = CLOSED.wait_timeout_while(closing(), patience, |closing| *closing > 0);
    drop(outcome.unwrap_or_else(PoisonError::into_inner));
}
