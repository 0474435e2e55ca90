//! Who reaps: one task, on SIGCHLD, for every process this one started or (as PID 1) inherited.
use std::{cell::RefCell, collections::HashMap, io, rc::Rc};

use rustix::{
    io::Errno,
    process::{Pid, WaitOptions, WaitStatus, wait, waitpid},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, oneshot},
};

use crate::signals::Ended;

/// The processes somebody waits for.
pub struct Children {
    waiting: RefCell<HashMap<i32, oneshot::Sender<Ended>>>,
    /// Orphans are ours too.
    init: bool,
    reaped: Notify,
}

impl Children {
    /// Starts the reaping task; must be called within a local task set. With `init` it reaps any
    /// child, as PID 1 must, otherwise only those given to [`Children::watch`].
    pub fn new(init: bool) -> io::Result<Rc<Self>> {
        let children = Rc::new(Self {
            waiting: RefCell::default(),
            init,
            reaped: Notify::new(),
        });
        // Listening begins before the first child exists.
        let ends = signal(SignalKind::child())?;
        tokio::task::spawn_local(children.clone().run(ends));
        Ok(children)
    }

    /// How the child `pid` ends. Call without an await after starting it.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        self.waiting
            .borrow_mut()
            .insert(pid.as_raw_nonzero().get(), sender);
        receiver
    }

    /// Waits until no process but PID 1 is left. Meaningful for init only.
    pub async fn alone(&self) {
        loop {
            let reaped = self.reaped.notified();
            if self.reap() {
                return;
            }
            reaped.await;
        }
    }

    async fn run(self: Rc<Self>, mut ends: Signal) {
        loop {
            self.reap();
            self.reaped.notify_waiters();
            if ends.recv().await.is_none() {
                return;
            }
        }
    }

    /// Reaps whatever ended; whether no children are left.
    fn reap(&self) -> bool {
        if self.init {
            loop {
                match wait(WaitOptions::NOHANG) {
                    Ok(Some((pid, status))) => self.ended(pid.as_raw_nonzero().get(), status),
                    Ok(None) => return false,
                    Err(Errno::INTR) => {}
                    Err(_) => return true,
                }
            }
        }
        let pids: Vec<_> = self.waiting.borrow().keys().copied().collect();
        for pid in pids {
            if let Ok(Some((_, status))) = waitpid(Pid::from_raw(pid), WaitOptions::NOHANG) {
                self.ended(pid, status);
            }
        }
        self.waiting.borrow().is_empty()
    }

    fn ended(&self, pid: i32, status: WaitStatus) {
        let ended = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ended::Exited(code),
            (_, Some(signal)) => Ended::Signaled(signal),
            _ => return, // Stopped or continued: not asked for, not an end.
        };
        if let Some(waiter) = self.waiting.borrow_mut().remove(&pid) {
            // Whoever started it may have lost interest.
            waiter.send(ended).ok();
        }
    }
}
