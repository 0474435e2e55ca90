//! The guest's end of the control channel. Its CPUs stand still when its machine is not running: then
//! nothing here is polled, and what the host says waits in the socket.
use std::{
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use doze_agent::{
    endpoint::Endpoint,
    message::{ProgramExit, ToGuest, ToHost},
    session::{Event, MAIN_STREAM, Role},
};
use doze_vmm::MachineStatus;
use tokio::sync::watch;

use crate::world::World;

/// For the host to acknowledge what a guest said last.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a guest knows; part of its memory, so it survives a restore.
pub struct Guest {
    endpoint: Endpoint,
    booted: Mutex<Option<Instant>>,
    exit: Mutex<Option<ProgramExit>>,
    /// The generation with which its CPUs last began to run.
    generation: AtomicU64,
}

/// What a guest knew at one moment.
#[derive(Debug, Clone)]
pub struct Frozen {
    booted: Option<Instant>,
    exit: Option<ProgramExit>,
}

impl Default for Guest {
    fn default() -> Guest {
        Guest {
            endpoint: Endpoint::new(Role::Guest, rand::random()),
            booted: Mutex::default(),
            exit: Mutex::default(),
            generation: AtomicU64::default(),
        }
    }
}

/// The machine's chardev and the guest behind it, until the process ends.
pub async fn serve(
    world: World,
    pid: i32,
    listener: std::os::unix::net::UnixListener,
    mut status: watch::Receiver<MachineStatus>,
) {
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        if status.wait_for(runs).await.is_err() {
            return;
        }
        let Some(guest) = world.state().guest_of(pid) else {
            return;
        };
        let (reader, writer) = stream.into_split();
        let handler = |event| guest.handle(&world, pid, event);
        let mut connection = pin!(guest.endpoint.drive(reader, writer, handler));
        loop {
            let running = runs(&status.borrow_and_update());
            tokio::select! {
                _ = &mut connection, if running => break,
                changed = status.changed() => if changed.is_err() { return },
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn runs(status: &MachineStatus) -> bool {
    *status == MachineStatus::Running
}

impl Guest {
    pub fn freeze(&self) -> Frozen {
        Frozen {
            booted: *lock(&self.booted),
            exit: lock(&self.exit).clone(),
        }
    }

    /// Another one with the same memory. Its channel begins anew.
    pub fn thaw(frozen: Frozen) -> Guest {
        let guest = Guest::default();
        *lock(&guest.booted) = frozen.booted;
        *lock(&guest.exit) = frozen.exit;
        guest
    }

    pub fn ran(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    pub fn last_ran(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn handle(self: &Arc<Self>, world: &World, pid: i32, event: Event) {
        match event {
            Event::Established { .. } => self.tell_status(),
            Event::Control { payload, .. } => {
                let message = serde_json::from_slice(&payload).expect("the host's own message");
                self.answer(world, pid, message);
            }
            Event::Incompatible { .. } | Event::Data { .. } | Event::Overrun { .. } => {}
        }
    }

    fn answer(self: &Arc<Self>, world: &World, pid: i32, message: ToGuest) {
        let habits = world.state().habits;
        match message {
            ToGuest::Ping { nonce } => self.tell(&ToHost::Pong { nonce }),
            ToGuest::Restored {
                nonce, identity, ..
            } if !habits.mute => {
                let becomes = identity.filter(|_| !habits.stubborn);
                let applied = becomes.as_ref().map(|identity| {
                    let mut state = world.state();
                    state.become_somebody(pid, &identity.machine_id)
                });
                if applied != Some(false) {
                    self.tell(&ToHost::RestoredDone {
                        nonce,
                        problem: None,
                        identity_applied: applied.is_some(),
                    });
                }
            }
            ToGuest::Shutdown { .. } => {
                self.tell(&ToHost::ShuttingDown);
                if !habits.deaf {
                    self.power_off(world, pid);
                }
            }
            ToGuest::Restored { .. } | ToGuest::Exec { .. } | ToGuest::StdinClose => {}
            ToGuest::Resize { .. } | ToGuest::Kill | ToGuest::Unknown => {}
        }
    }

    /// The program ends, and the machine with it.
    pub fn power_off(self: &Arc<Self>, world: &World, pid: i32) {
        let exit = ProgramExit {
            code: 0,
            message: String::new(),
        };
        self.tell(&ToHost::ProgramExited { exit: exit.clone() });
        *lock(&self.exit) = Some(exit);
        let (guest, off) = (self.clone(), world.clone());
        world.spawn(async move {
            // Nobody may be listening; it goes down all the same.
            let _ = tokio::time::timeout(LAST_WORDS, guest.endpoint.flushed()).await;
            off.state().power_off(pid);
        });
    }

    fn tell_status(&self) {
        let booted = *lock(&self.booted).get_or_insert_with(Instant::now);
        let age_us = u64::try_from(booted.elapsed().as_micros()).unwrap();
        self.tell(&ToHost::ProgramStarted { age_us });
        self.tell(&ToHost::AgentReady { age_us });
        let exit = lock(&self.exit).clone();
        if let Some(exit) = exit {
            self.tell(&ToHost::ProgramExited { exit });
        }
    }

    fn tell(&self, message: &ToHost) {
        // Refused only when a thousand messages wait already.
        self.endpoint.send(MAIN_STREAM, message).unwrap();
    }
}
