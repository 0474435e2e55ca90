//! The machine monitor of the fake world. Every call is a step before and after its effect.
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use doze_host::process::ProcessId;
use doze_vmm::{
    Accel, Hypervisor, Machine, MachineDescription, MachineStatus, Monitor, Probe, SavedFile,
    VmmError,
};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use crate::{
    steps::Act,
    world::{State, World},
};

const VERSION: &str = "7.2.22";
const STATE: &str = "state";

pub struct FakeMonitor(pub World);

pub struct FakeMachine {
    world: World,
    pid: i32,
    process: ProcessId,
    socket: PathBuf,
    status: watch::Receiver<MachineStatus>,
}

impl World {
    /// One call: its effect on the world, disturbed as planned. `pids` are the VMMs that it concerns.
    async fn call<T>(
        &self,
        name: &'static str,
        concerns: impl Fn(&State) -> Option<i32> + Send,
        work: impl FnOnce(&mut State) -> Result<T, VmmError> + Send,
    ) -> Result<T, VmmError> {
        tokio::task::yield_now().await;
        let refused = || VmmError::Refused {
            command: name,
            message: "injected".to_owned(),
        };
        let die = || {
            let mut state = self.state();
            if let Some(pid) = concerns(&state) {
                state.die(pid);
            }
        };
        let act = self.hit(&format!("before {name}"));
        match act {
            Some(Act::Refuse) => return Err(refused()),
            Some(Act::Die) => die(),
            Some(Act::Stall) => {
                self.0.stalled.notify_one();
                self.0.released.notified().await;
            }
            Some(Act::Crash | Act::RefuseAfter | Act::DieAfter) | None => {}
        }
        let done = work(&mut self.state());
        match act {
            Some(Act::RefuseAfter) => return Err(refused()),
            Some(Act::DieAfter) => die(),
            _ => {}
        }
        self.hit(&format!("after {name}"));
        tokio::task::yield_now().await;
        done
    }

    async fn spawn_vmm(
        &self,
        name: &'static str,
        machine: &MachineDescription,
        load: bool,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let of = |state: &State| {
            let mut all = state.vmms.iter();
            let found = all.rfind(|(_, vmm)| vmm.instance == machine.id);
            found.map(|(pid, _)| *pid)
        };
        let made = self
            .call(name, of, |state| {
                let pid = state.spawn_vmm(self, machine, load)?;
                Ok(self.machine(state, pid, machine))
            })
            .await;
        if made.is_err() {
            // The contract: on error nothing of it is left.
            let mut state = self.state();
            if let Some(pid) = of(&state) {
                state.end(pid);
            }
            let _ = std::fs::remove_file(machine.run_dir.join("agent.sock"));
            if !load {
                let _ = std::fs::remove_file(&machine.memory.path);
            }
        }
        Ok(Box::new(made?))
    }

    fn machine(&self, state: &State, pid: i32, description: &MachineDescription) -> FakeMachine {
        let vmm = &state.vmms[&pid];
        FakeMachine {
            world: self.clone(),
            pid,
            process: vmm.process.clone(),
            socket: description.run_dir.join("agent.sock"),
            status: vmm.status.subscribe(),
        }
    }
}

fn nobody(_: &State) -> Option<i32> {
    None
}

#[async_trait]
impl Monitor for FakeMonitor {
    fn hypervisor(&self) -> Hypervisor {
        Hypervisor::QemuMicrovm
    }

    async fn probe(&self) -> Probe {
        let probed = self.0.call("monitor.probe", nobody, |_| Ok(())).await;
        let (version, missing) = match probed {
            Ok(()) => (Some(VERSION.to_owned()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Probe {
            version,
            missing,
            accel: Accel::Tcg,
        }
    }

    async fn machine_type(&self) -> Result<String, VmmError> {
        self.0
            .call("monitor.machine_type", nobody, |_| Ok("microvm".to_owned()))
            .await
    }

    async fn spawn(&self, machine: &MachineDescription) -> Result<Box<dyn Machine>, VmmError> {
        self.0.spawn_vmm("monitor.spawn", machine, false).await
    }

    async fn spawn_to_load(
        &self,
        machine: &MachineDescription,
    ) -> Result<Box<dyn Machine>, VmmError> {
        self.0
            .spawn_vmm("monitor.spawn_to_load", machine, true)
            .await
    }

    async fn check_loads(
        &self,
        machine: &MachineDescription,
        saved_version: &str,
    ) -> Result<(), VmmError> {
        self.0
            .call("monitor.check_loads", nobody, |_| {
                if saved_version == VERSION {
                    return Ok(());
                }
                Err(VmmError::Incompatible {
                    hypervisor: "fake",
                    machine_type: machine.machine_type.clone(),
                    saved: saved_version.to_owned(),
                    here: VERSION.to_owned(),
                    rule: "the same version",
                })
            })
            .await
    }

    async fn find(&self, id: &str) -> Result<Vec<ProcessId>, VmmError> {
        let of = |state: &State| {
            let mut all = state.vmms.iter();
            all.find(|(_, vmm)| vmm.instance == id).map(|(pid, _)| *pid)
        };
        self.0
            .call("monitor.find", of, |state| {
                let all = state.vmms.values();
                let ours = all.filter(|vmm| vmm.instance == id);
                Ok(ours.map(|vmm| vmm.process.clone()).collect())
            })
            .await
    }

    async fn kill(&self, process: &ProcessId) -> Result<(), VmmError> {
        let of = |state: &State| state.key(process);
        self.0
            .call("monitor.kill", of, |state| {
                if let Some(pid) = state.key(process) {
                    state.end(pid);
                }
                Ok(())
            })
            .await
    }

    async fn attach(
        &self,
        machine: &MachineDescription,
        process: &ProcessId,
    ) -> Result<Option<Box<dyn Machine>>, VmmError> {
        let of = |state: &State| state.key(process);
        self.0
            .call("monitor.attach", of, |state| {
                let found = state.key(process);
                let machine = found.map(|pid| self.0.machine(state, pid, machine));
                Ok(machine.map(|machine| Box::new(machine) as Box<dyn Machine>))
            })
            .await
    }
}

impl FakeMachine {
    async fn call<T>(
        &self,
        name: &'static str,
        work: impl FnOnce(&mut State) -> Result<T, VmmError> + Send,
    ) -> Result<T, VmmError> {
        let pid = self.pid;
        let of = move |state: &State| state.vmms.contains_key(&pid).then_some(pid);
        self.world.call(name, of, work).await
    }
}

#[async_trait]
impl Machine for FakeMachine {
    fn process(&self) -> &ProcessId {
        &self.process
    }

    fn version(&self) -> &str {
        VERSION
    }

    fn agent_socket(&self) -> &Path {
        &self.socket
    }

    fn watch(&self) -> watch::Receiver<MachineStatus> {
        self.status.clone()
    }

    async fn status(&self) -> Result<MachineStatus, VmmError> {
        self.call("vmm.status", |state| {
            let vmm = state.vmms.get(&self.pid);
            Ok(vmm.map_or(MachineStatus::Gone, |vmm| *vmm.status.borrow()))
        })
        .await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.call("vmm.resume", |state| state.resume(self.pid))
            .await
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.call("vmm.pause", |state| state.pause(self.pid)).await
    }

    async fn save(&self, folder: &Path) -> Result<Vec<SavedFile>, VmmError> {
        self.call("vmm.save", |state| {
            let text = serde_json::to_vec(&state.save(self.pid)?).unwrap();
            let context = "writing the state".to_owned();
            std::fs::write(folder.join(STATE), &text)
                .map_err(|source| VmmError::Io { context, source })?;
            Ok(vec![SavedFile {
                name: STATE.to_owned(),
                size: text.len() as u64,
                sha256: hex::encode(Sha256::digest(&text)),
            }])
        })
        .await
    }

    async fn load(&self, folder: &Path) -> Result<(), VmmError> {
        self.call("vmm.load", |state| {
            let context = "reading the state".to_owned();
            let text = std::fs::read(folder.join(STATE))
                .map_err(|source| VmmError::Io { context, source })?;
            let saved = serde_json::from_slice(&text).map_err(|e| VmmError::Refused {
                command: "load",
                message: e.to_string(),
            })?;
            state.load(self.pid, &saved)
        })
        .await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.call("vmm.kill", |state| {
            state.end(self.pid);
            Ok(())
        })
        .await
    }
}
