//! One try to put an instance to sleep, shared by the watcher that wants it and the driver that does it.
//!
//! ```text
//!   watcher ── Standby{attempt} ──> driver: look ─> flush ─> pause ─> look ─> seal ─> MARK ─> last look
//!      └── call_off (somebody came, a hold) ──> until the last look has sealed it            │
//!                                                    the mark is taken back if it fails <────┘
//! ```
//! Three fresh looks: right before anything is touched, while the guest is paused, and after the mark. The
//! last one is what makes the promise good: whoever sent a packet before the snapshot was committed is in
//! the kernel's table by the time it is dumped, and the mark is taken back and the guest goes on.
use std::sync::{Arc, Mutex};

use doze_host::{conntrack::policy::Policy, net::Network};
use tokio_util::sync::CancellationToken;

use super::{
    counters::{Counters, Failed},
    eyes::{self, Eyes},
};
use crate::{EngineError, context::lock, instance::Instance};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Why it is not wanted any more.
    CalledOff(&'static str),
    /// It is going to sleep, whatever comes.
    Sealed,
}

pub struct Attempt {
    eyes: Arc<Eyes>,
    counters: Arc<Counters>,
    state: Mutex<State>,
    cancel: CancellationToken,
}

impl Attempt {
    pub fn new(eyes: Arc<Eyes>, counters: Arc<Counters>) -> Attempt {
        Attempt {
            eyes,
            counters,
            state: Mutex::new(State::Open),
            cancel: CancellationToken::new(),
        }
    }

    /// What the operation looks at between its steps; calling off cancels it.
    pub fn cancel(&self) -> CancellationToken {
        self.cancel.clone()
    }

    /// `false`: too late, it falls asleep.
    pub fn call_off(&self, why: &'static str) -> bool {
        let mut state = lock(&self.state);
        match *state {
            State::Open => {
                *state = State::CalledOff(why);
                self.cancel.cancel();
                true
            }
            State::CalledOff(_) => true,
            State::Sealed => false,
        }
    }

    fn seal(&self) -> Result<(), EngineError> {
        let mut state = lock(&self.state);
        if let State::CalledOff(by) = *state {
            return Err(EngineError::Interrupted { by });
        }
        *state = State::Sealed;
        Ok(())
    }

    /// Right before anything is touched.
    pub async fn first_look(&self, instance: &Instance) -> Result<(), EngineError> {
        if let Some(network) = instance.ctx.network().await? {
            self.check_tracking(&network).await?;
        }
        self.look(instance).await
    }

    async fn check_tracking(&self, network: &Network) -> Result<(), EngineError> {
        eyes::is_tracking(network).await.map_err(|error| {
            self.counters.failed(Failed::Rules);
            tracing::warn!(%error, "our nftables rules are gone, so connections may not be tracked");
            EngineError::Interrupted {
                by: "the loss of the rules that let connections be seen",
            }
        })
    }

    /// Fails when somebody uses the instance, or when that cannot be known.
    pub async fn look(&self, instance: &Instance) -> Result<(), EngineError> {
        let busy = |by| Err(EngineError::Interrupted { by });
        if let State::CalledOff(by) = *lock(&self.state) {
            return busy(by);
        }
        let Some(Policy::Enabled(policy)) = &instance.spec.auto_standby else {
            return busy("a change of its policy");
        };
        let Some(claim) = &instance.claim else {
            return busy("the loss of its address");
        };
        let open = instance
            .live
            .as_ref()
            .map(|live| live.agent.open_sessions());
        if open.unwrap_or(0) > 0 {
            return busy("an exec session");
        }
        match self.eyes.fresh(claim.ip, policy).await {
            Ok(sight) if sight.active == 0 => Ok(()),
            Ok(_) => busy("a connection"),
            Err(error) => {
                self.counters.failed(Failed::Dump);
                tracing::warn!(instance = %instance.id, %error, "connections could not be read; the instance counts as busy");
                busy("connections that could not be read")
            }
        }
    }

    /// After the mark, before anybody is told. Once it has succeeded nobody can call it off.
    pub async fn last_look(&self, instance: &Instance) -> Result<(), EngineError> {
        self.look(instance).await?;
        self.seal()
    }
}
