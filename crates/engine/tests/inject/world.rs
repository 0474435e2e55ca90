//! What outlives a crash of the server: VMM processes, their guests, and the memory files.
//!
//! ```text
//!   a guest is a counter:  ───resume: new generation──> memory file, overlay
//!   and an identity        ───save──> state file { generation, counter, identity }
//!                          <──load─── only if state, memory and overlay are of one generation
//! ```
//! So device state that is loaded on memory or disks that ran on, the one thing that must never
//! happen, is seen at once and noted in [`State::violations`]. A guest that boots is who its config disk says; one
//! that wakes with another's memory is that other one until its agent was told.
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use doze_agent::config;
use doze_engine::{CommitStep, KillPoint, KillSwitch};
use doze_host::process::ProcessId;
use doze_vmm::{MachineDescription, MachineStatus, VmmError};
use tokio::sync::{Notify, watch};

use crate::{
    content::{self, Content, Saved},
    guest::{Frozen, Guest},
    steps::{Act, Crash, Steps, quiet_crashes},
};

pub struct Vmm {
    pub process: ProcessId,
    pub instance: String,
    pub memory: PathBuf,
    pub overlay: PathBuf,
    pub status: watch::Sender<MachineStatus>,
    pub content: Content,
    /// Spawned to load, nothing loaded yet.
    waits: bool,
    task: tokio::task::AbortHandle,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Habits {
    /// Restored guests do not answer.
    pub mute: bool,
    /// Guests do not power off when they are asked to.
    pub deaf: bool,
    /// Copies do not take the identity that they are given.
    pub stubborn: bool,
}

#[derive(Default)]
pub struct State {
    pub vmms: BTreeMap<i32, Vmm>,
    next_pid: i32,
    generations: u64,
    pub guests: Vec<Arc<Guest>>,
    frozen: Vec<Frozen>,
    pub steps: Steps,
    pub violations: Vec<String>,
    /// Instances whose VMM died by itself.
    pub died: BTreeSet<String>,
    pub habits: Habits,
    points: Vec<KillPoint>,
    moves: u64,
}

pub struct Shared {
    state: Mutex<State>,
    runtime: tokio::runtime::Handle,
    pub stalled: Notify,
    pub released: Notify,
    /// A kill point was reached.
    pub reached: Notify,
}

#[derive(Clone)]
pub struct World(pub Arc<Shared>);

impl World {
    /// `runtime` runs the guests.
    pub fn new(runtime: tokio::runtime::Handle) -> World {
        quiet_crashes();
        World(Arc::new(Shared {
            state: Mutex::default(),
            runtime,
            stalled: Notify::new(),
            released: Notify::new(),
            reached: Notify::new(),
        }))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn spawn(
        &self,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::AbortHandle {
        self.0.runtime.spawn(work).abort_handle()
    }

    /// Ends the driver here when that is planned.
    pub fn hit(&self, label: &str) -> Option<Act> {
        let act = {
            let mut state = self.state();
            state.moves += 1;
            state.steps.hit(label)
        };
        if act == Some(Act::Crash) {
            std::panic::panic_any(Crash);
        }
        act
    }

    /// The server's kill switch: its points and commits are steps, too.
    pub fn kill_switch(&self) -> KillSwitch {
        let (points, commits) = (self.clone(), self.clone());
        KillSwitch::watched(move |point| {
            points.state().points.push(point);
            points.hit(&format!("point {}", point.name()));
            points.0.reached.notify_waiters();
        })
        .watching_commits(move |step| {
            let label = match step {
                CommitStep::Before => "before store.commit",
                CommitStep::After => "after store.commit",
            };
            match commits.hit(label) {
                None => Ok(()),
                Some(_) => Err("injected: the disk is full".to_owned()),
            }
        })
    }

    /// Every kill point reached since the world began.
    pub fn points(&self) -> Vec<KillPoint> {
        self.state().points.clone()
    }

    /// Grows with everything the server does.
    pub fn moves(&self) -> u64 {
        self.state().moves
    }

    pub fn crashed(&self) -> bool {
        self.state().steps.crashed
    }

    /// The counter of the one live VMM of this instance.
    pub fn counter(&self, instance: &str) -> Option<u64> {
        let state = self.state();
        let mut live = state.vmms.values().filter(|vmm| vmm.instance == instance);
        live.next().map(|vmm| vmm.content.counter)
    }

    /// The running guest does something that its memory remembers.
    pub fn tick(&self, instance: &str) {
        let mut state = self.state();
        let vmm = state.vmms.values_mut().find(|vmm| vmm.instance == instance);
        let vmm = vmm.expect("a live machine");
        vmm.content.counter += 1;
        vmm.write().unwrap();
    }

    /// The power fails: no VMM survives.
    pub fn power_loss(&self) {
        let all: Vec<i32> = self.state().vmms.keys().copied().collect();
        for pid in all {
            self.state().end(pid);
        }
    }

    /// Whether nobody but itself is what the one live guest of this instance takes itself for.
    pub fn is_itself(&self, instance: &str) -> bool {
        let state = self.state();
        let mut live = state.vmms.values().filter(|vmm| vmm.instance == instance);
        live.all(|vmm| vmm.content.identity == config::machine_id(instance))
    }
}

impl State {
    pub fn spawn_vmm(
        &mut self,
        world: &World,
        machine: &MachineDescription,
        load: bool,
    ) -> Result<i32, VmmError> {
        let io = |context: &str, source| VmmError::Io {
            context: context.to_owned(),
            source,
        };
        let alive = self.vmms.values().any(|vmm| vmm.instance == machine.id);
        if alive {
            self.violations.push("a second VMM is started".to_owned());
        }
        let disks = machine.disks.iter().find(|disk| !disk.read_only);
        let overlay = disks.unwrap().path.clone();
        self.check_places(machine, &overlay);
        let identity = match load {
            true => String::new(),
            false => self.configured(machine).map_err(|e| io("config disk", e))?,
        };
        let size = machine.memory.check_size(machine.memory_bytes);
        match load {
            true => size.map_err(|e| io("mapping memory", e))?,
            false => machine
                .memory
                .create(machine.memory_bytes)
                .map_err(|e| io("memory", e))?,
        }
        let socket = machine.run_dir.join("agent.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(|e| io("binding the control socket", e))?;
        self.next_pid += 1;
        let pid = self.next_pid;
        let status = watch::Sender::new(MachineStatus::Prelaunch);
        let task = world.spawn(crate::guest::serve(
            world.clone(),
            pid,
            listener,
            status.subscribe(),
        ));
        if !load {
            self.guests.push(Arc::default());
        }
        let vmm = Vmm {
            process: ProcessId {
                pid: 1_000_000_000 + pid,
                start_ticks: u64::from(pid.unsigned_abs()),
                boot_id: "fake".to_owned(),
            },
            instance: machine.id.clone(),
            memory: machine.memory.path.clone(),
            overlay,
            status,
            content: Content {
                generation: 0,
                counter: 0,
                identity,
                guest: self.guests.len().saturating_sub(1),
            },
            waits: load,
            task,
        };
        if !load {
            content::write(&vmm.memory, content::MEMORY_AT, &vmm.content)
                .map_err(|e| io("writing memory", e))?;
        }
        self.vmms.insert(pid, vmm);
        Ok(pid)
    }

    /// What a machine writes to must be its own.
    fn check_places(&mut self, machine: &MachineDescription, overlay: &Path) {
        let own =
            |path: &Path| path.parent().and_then(Path::file_name) == Some(machine.id.as_ref());
        let places = [&machine.memory.path, &machine.run_dir, &machine.vmm_log];
        for path in places.into_iter().map(PathBuf::as_path).chain([overlay]) {
            if !own(path) {
                let text = format!("a machine of {} uses {}", machine.id, path.display());
                self.violations.push(text);
            }
        }
    }

    /// Who its config disk says that a guest is.
    fn configured(&mut self, machine: &MachineDescription) -> std::io::Result<String> {
        let disk = machine
            .disks
            .iter()
            .find(|disk| disk.serial == config::CONFIG_SERIAL);
        let config = std::fs::read(&disk.unwrap().path)?;
        let config = config::decode(&config).expect("the engine's own config disk");
        if config.instance_id != machine.id {
            self.violations
                .push("it boots with the config of another one".into());
        }
        Ok(config::machine_id(&config.instance_id))
    }

    pub fn key(&self, process: &ProcessId) -> Option<i32> {
        let found = self.vmms.iter().find(|(_, vmm)| vmm.process == *process);
        found.map(|(pid, _)| *pid)
    }

    pub fn live(&mut self, pid: i32, during: &'static str) -> Result<&mut Vmm, VmmError> {
        let log = "it died".to_owned();
        self.vmms
            .get_mut(&pid)
            .ok_or(VmmError::Exited { during, log })
    }

    /// A VMM ends without anybody wanting it.
    pub fn die(&mut self, pid: i32) {
        if let Some(vmm) = self.vmms.get(&pid) {
            self.died.insert(vmm.instance.clone());
        }
        self.end(pid);
    }

    pub fn end(&mut self, pid: i32) {
        if let Some(vmm) = self.vmms.remove(&pid) {
            vmm.status.send_replace(MachineStatus::Gone);
            vmm.task.abort();
        }
    }

    pub fn resume(&mut self, pid: i32) -> Result<(), VmmError> {
        self.generations += 1;
        let generation = self.generations;
        let vmm = self.live(pid, "resume")?;
        let refused = |message: &str| VmmError::Refused {
            command: "cont",
            message: message.to_owned(),
        };
        if vmm.waits {
            return Err(refused("nothing is loaded"));
        }
        let status = *vmm.status.borrow();
        match status {
            MachineStatus::Prelaunch | MachineStatus::Paused => {
                vmm.content.generation = generation;
                vmm.write().map_err(|e| refused(&e.to_string()))?;
                let guest = vmm.content.guest;
                vmm.status.send_replace(MachineStatus::Running);
                self.guests[guest].ran(generation);
                Ok(())
            }
            MachineStatus::Running | MachineStatus::Shutdown => Ok(()),
            MachineStatus::Failed | MachineStatus::Gone => Err(refused("it cannot run")),
        }
    }

    pub fn pause(&mut self, pid: i32) -> Result<(), VmmError> {
        let vmm = self.live(pid, "pause")?;
        let status = *vmm.status.borrow();
        match status {
            MachineStatus::Running => {
                vmm.status.send_replace(MachineStatus::Paused);
                Ok(())
            }
            MachineStatus::Paused | MachineStatus::Prelaunch => Ok(()),
            other => Err(VmmError::Refused {
                command: "stop",
                message: format!("it is {other:?}"),
            }),
        }
    }

    pub fn power_off(&mut self, pid: i32) {
        if let Some(vmm) = self.vmms.get(&pid) {
            vmm.status.send_if_modified(|status| {
                let runs = *status == MachineStatus::Running;
                if runs {
                    *status = MachineStatus::Shutdown;
                }
                runs
            });
        }
    }

    /// What the state file of a machine that stands still says.
    pub fn save(&mut self, pid: i32) -> Result<Saved, VmmError> {
        let vmm = self.live(pid, "save")?;
        let (paused, content, instance) = (
            *vmm.status.borrow() == MachineStatus::Paused,
            vmm.content.clone(),
            vmm.instance.clone(),
        );
        if !paused {
            let text = "a machine is saved that is not paused".to_owned();
            self.violations.push(text);
        }
        self.frozen.push(self.guests[content.guest].freeze());
        Ok(Saved {
            content,
            instance,
            frozen: self.frozen.len() - 1,
        })
    }

    pub fn load(&mut self, pid: i32, saved: &Saved) -> Result<(), VmmError> {
        let vmm = self.live(pid, "load")?;
        let refused = |message: String| VmmError::Refused {
            command: "load",
            message,
        };
        if !vmm.waits {
            return Err(refused("it does not wait for a load".into()));
        }
        let memory = content::of_memory(&vmm.memory);
        let overlay = content::of_overlay(&vmm.overlay);
        let memory = memory.map_err(|e| refused(format!("memory: {e}")))?;
        let overlay = overlay.map_err(|e| refused(format!("overlay: {e}")))?;
        if memory != saved.content || overlay != saved.content {
            let text = format!("loading {saved:?} on memory {memory:?} and overlay {overlay:?}");
            self.violations.push(text.clone());
            return Err(refused(text));
        }
        vmm.waits = false;
        vmm.content = memory;
        vmm.status.send_replace(MachineStatus::Paused);
        let same = vmm.instance == saved.instance;
        // One that ran on since, or is another one's, knows no more than what was frozen.
        if !same || self.guests[saved.content.guest].last_ran() != saved.content.generation {
            let thawed = Guest::thaw(self.frozen[saved.frozen].clone());
            self.guests.push(Arc::new(thawed));
            let guest = self.guests.len() - 1;
            self.live(pid, "load")?.content.guest = guest;
        }
        Ok(())
    }

    /// The running guest becomes somebody. `false`: it stands still.
    pub fn become_somebody(&mut self, pid: i32, identity: &str) -> bool {
        match self.vmms.get_mut(&pid) {
            Some(vmm) if *vmm.status.borrow() == MachineStatus::Running => {
                vmm.content.identity = identity.to_owned();
                vmm.write().is_ok()
            }
            Some(_) | None => false,
        }
    }

    pub fn guest_of(&self, pid: i32) -> Option<Arc<Guest>> {
        let vmm = self.vmms.get(&pid).filter(|vmm| !vmm.waits)?;
        self.guests.get(vmm.content.guest).cloned()
    }
}

impl Vmm {
    fn write(&mut self) -> std::io::Result<()> {
        content::write(&self.memory, content::MEMORY_AT, &self.content)?;
        content::write(&self.overlay, content::OVERLAY_AT, &self.content)
    }
}
