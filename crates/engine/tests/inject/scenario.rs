//! Everything an instance can be told to do, from where it can be told.
use std::time::Duration;

use doze_engine::{
    EngineError, Revival, SnapshotKind, StandbyOptions, StartOverrides, TargetState,
};
use doze_lifecycle::State;

use crate::{
    commands::{answered, arrival, command, fork, take, until},
    content::Content,
    lab::{Lab, PATIENCE, packed, settle, settled},
    steps::{Act, Step},
};

pub const NAME: &str = "one";
/// What forks are called.
pub const FORK: &str = "fork";
/// The snapshot that is there before.
pub const KEPT: &str = "kept";
/// The snapshot that is taken.
pub const NEW: &str = "new";
/// Where a fork comes from that is there before.
const PARENT: &str = "parent";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Create,
    Start,
    StartDiscarding,
    Standby,
    /// A standby, and all that was planned with it.
    Pack,
    Restore,
    Stop,
    /// The guest gets time to end.
    Delete,
    /// A delete that waits for nothing.
    Discard,
    /// The guest powers off by itself.
    PowerOff,
    /// Its VMM dies by itself.
    Death,
    Snapshot,
    /// The snapshot that is there before is exported and comes back under another name.
    Import,
    Fork(TargetState),
    /// A fork of the snapshot that is there before.
    ForkStored(TargetState),
    /// Back to the snapshot that is there before.
    Rollback(TargetState),
    /// The delete of that snapshot.
    DropSnapshot,
    /// The delete of the fork.
    DropFork,
    /// A schedule's run, which replaces the snapshot of the one before.
    Schedule,
}

/// Where the instance is before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    Nothing,
    Running,
    Standby,
    Stopped,
    /// Asleep, with the memory of another one. It never ran.
    Forked,
    /// Asleep, with the memory of a snapshot.
    RolledBack,
}

/// When the second command comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// While this call of the monitor hangs.
    Call(&'static str),
    /// After this kill point.
    Point(&'static str),
}

#[derive(Debug, Clone)]
pub struct Scenario {
    pub name: &'static str,
    pub from: Begin,
    pub op: Op,
    pub then: Option<(When, Op)>,
    /// The first one of these calls fails.
    pub fails: Option<(&'static str, Act)>,
    /// Its VMM dies at this call.
    pub dies_at: Option<String>,
    /// The snapshot's device state is damaged: it can never be restored.
    pub altered: bool,
    pub mute: bool,
    pub deaf: bool,
    /// Copies do not take their identity.
    pub stubborn: bool,
    /// A snapshot of this kind is there before.
    pub kept: Option<SnapshotKind>,
    /// Every crash is made with both ends, also in a short run.
    pub thorough: bool,
    /// The server compresses whatever sleeps.
    pub packs: bool,
}

impl Scenario {
    pub const fn plain(name: &'static str, from: Begin, op: Op) -> Scenario {
        Scenario {
            name,
            from,
            op,
            then: None,
            fails: None,
            dies_at: None,
            altered: false,
            mute: false,
            deaf: false,
            stubborn: false,
            kept: None,
            thorough: false,
            packs: false,
        }
    }

    pub fn packing(name: &'static str, from: Begin, op: Op) -> Scenario {
        Scenario {
            packs: true,
            ..Scenario::plain(name, from, op)
        }
    }

    pub fn keeping(self, kind: SnapshotKind) -> Scenario {
        Scenario {
            kept: Some(kind),
            ..self
        }
    }

    pub fn then(self, when: When, op: Op) -> Scenario {
        Scenario {
            then: Some((when, op)),
            ..self
        }
    }

    pub fn fails(self, call: &'static str, act: Act) -> Scenario {
        Scenario {
            fails: Some((call, act)),
            ..self
        }
    }

    pub fn does(&self, op: Op) -> bool {
        self.op == op || self.then.is_some_and(|(_, then)| then == op)
    }

    /// The one command of both that makes a fork.
    pub fn fork(&self) -> Option<Op> {
        let forks = |op: &Op| matches!(op, Op::Fork(_) | Op::ForkStored(_));
        let all = [Some(self.op), self.then.map(|(_, then)| then)];
        all.into_iter().flatten().find(forks)
    }

    pub fn rolls_back(&self) -> Option<TargetState> {
        let all = [Some(self.op), self.then.map(|(_, then)| then)];
        all.into_iter().flatten().find_map(|op| match op {
            Op::Rollback(target) => Some(target),
            _ => None,
        })
    }

    /// Nothing that is done changes the instance.
    pub fn copies(&self) -> bool {
        let copies = |op: Op| match op {
            Op::Snapshot | Op::Import | Op::Fork(_) | Op::ForkStored(_) => true,
            Op::DropSnapshot | Op::DropFork | Op::Schedule => true,
            Op::Create | Op::Start | Op::StartDiscarding | Op::Restore => false,
            Op::Standby | Op::Pack => false,
            Op::Stop | Op::Delete | Op::Discard | Op::PowerOff | Op::Death => false,
            Op::Rollback(_) => false,
        };
        copies(self.op) && self.then.is_none_or(|(_, then)| copies(then))
    }

    pub fn deletes(&self) -> bool {
        self.does(Op::Delete) || self.does(Op::Discard)
    }

    /// The same with one more failure, which is for the caller to plan.
    pub fn failing(self, step: &Step, act: Act) -> Scenario {
        let dies = act == Act::Die || act == Act::DieAfter;
        Scenario {
            dies_at: dies.then(|| step.label.clone()),
            ..self
        }
    }

    /// Its VMM dies on the way, and the guest's memory may go with it: not before a restore let its CPUs run.
    pub fn dies(&self) -> bool {
        let planned = self.fails.filter(|(_, act)| *act == Act::Die);
        let call = match (&self.dies_at, planned) {
            (Some(label), _) => label.trim_start_matches("before "),
            (None, Some((call, _))) => call,
            (None, None) => return false,
        };
        let early = [
            "monitor.probe",
            "monitor.check_loads",
            "monitor.spawn_to_load",
            "vmm.load",
        ];
        !(self.op == Op::Restore && early.contains(&call))
    }

    pub fn sleeps(&self) -> bool {
        let asleep = [Begin::Standby, Begin::Forked, Begin::RolledBack].contains(&self.from);
        let back = self.rolls_back().is_some() && self.kept == Some(SnapshotKind::Standby);
        asleep || back || self.does(Op::Standby) || self.does(Op::Pack)
    }
}

/// What is to be lost.
pub struct Stake {
    /// The guest's memory, of this boot. `None`: there is none.
    pub memory: Option<u64>,
    pub boots: u64,
    /// What is on its disk.
    pub disk: Option<Content>,
    /// What is on the disk of the snapshot that is there before, and in its memory.
    pub kept: Option<Content>,
}

impl Scenario {
    /// Brings the instance to where the scenario begins.
    pub fn prepare(&self, lab: &Lab) -> Stake {
        let engine = lab.engine();
        let kept = match self.from {
            Begin::Nothing => None,
            Begin::Forked => {
                self.run_up(lab, PARENT);
                lab.run(async {
                    fork(&engine, PARENT, NAME, TargetState::Standby)
                        .await
                        .unwrap();
                    engine.delete(PARENT, false).await.unwrap();
                });
                None
            }
            Begin::Running | Begin::Standby | Begin::Stopped | Begin::RolledBack => {
                let kept = self.run_up(lab, NAME);
                lab.run(self.bring(lab));
                kept
            }
        };
        let world = lab.world.clone();
        lab.run(packed(&engine, &world));
        let view = lab.view(NAME);
        if self.altered {
            let state = lab
                .instance_dir(&view.as_ref().unwrap().id)
                .join("snapshot/state");
            let mut text = std::fs::read(&state).unwrap();
            text[0] ^= 1;
            std::fs::write(&state, text).unwrap();
        }
        if self.op == Op::Schedule {
            // The one before.
            lab.run(command(engine, world.clone(), Op::Schedule))
                .unwrap();
        }
        let mut state = world.state();
        let habits = &mut state.habits;
        (habits.mute, habits.deaf, habits.stubborn) = (self.mute, self.deaf, self.stubborn);
        drop(state);
        let disk = view.as_ref().map(|view| lab.disk(&view.id));
        Stake {
            memory: match (self.from, &disk) {
                (Begin::Stopped | Begin::Nothing, _) | (_, None) => None,
                (_, Some(disk)) => Some(disk.counter),
            },
            boots: view.map_or(0, |view| view.record.boots()),
            disk,
            kept,
        }
    }

    /// A running instance that has a snapshot, if one is wanted, and has gone on since.
    fn run_up(&self, lab: &Lab, name: &str) -> Option<Content> {
        let (engine, world) = (lab.engine(), lab.world.clone());
        let kind = match self.from {
            Begin::RolledBack => Some(SnapshotKind::Standby),
            _ => self.kept,
        };
        lab.run(async {
            engine.create(Lab::request(name)).await.unwrap();
            let view = settled(&engine, &world, name, PATIENCE / 2).await.unwrap();
            assert_eq!(view.state(), State::Running, "{:?}", view.record.failure());
            for _ in 0..3 {
                world.tick(&view.id);
            }
            let kind = kind?;
            if kind == SnapshotKind::Stopped {
                engine.stop(name).await.unwrap();
            }
            take(&engine, name, Some(KEPT)).await.unwrap();
            let kept = lab.kept(KEPT);
            if kind == SnapshotKind::Stopped {
                let start = StartOverrides::default();
                engine.start(name, start, false).await.unwrap();
                settled(&engine, &world, name, PATIENCE / 2).await.unwrap();
            }
            for _ in 0..2 {
                world.tick(&view.id);
            }
            Some(kept)
        })
    }

    async fn bring(&self, lab: &Lab) {
        let engine = lab.engine();
        match self.from {
            Begin::Nothing | Begin::Running | Begin::Forked => {}
            Begin::Standby => drop(
                engine
                    .standby(NAME, StandbyOptions::default())
                    .await
                    .unwrap(),
            ),
            Begin::Stopped => drop(engine.stop(NAME).await.unwrap()),
            Begin::RolledBack => {
                let revival = Revival {
                    target: Some(TargetState::Standby),
                    hypervisor: None,
                };
                engine.restore_snapshot(NAME, KEPT, revival).await.unwrap();
                engine.delete_snapshot(KEPT).await.unwrap();
            }
        }
    }

    /// What the scenario itself disturbs.
    pub fn plans(&self) -> Vec<(Step, Act)> {
        let stall = match self.then {
            Some((When::Call(call), _)) => Some((call, Act::Stall)),
            Some((When::Point(_), _)) | None => None,
        };
        let all = [stall, self.fails].into_iter().flatten();
        all.map(|(call, act)| (Step::new(&format!("before {call}"), 1), act))
            .collect()
    }

    /// Does it, both commands, until everything is answered and booked. `Ok`: the (first) command was.
    pub fn act(&self, lab: &Lab, patience: Duration) -> Result<(), EngineError> {
        let (engine, world) = (lab.engine(), lab.world.clone());
        lab.run(async {
            let first = tokio::spawn(command(engine.clone(), world.clone(), self.op));
            let Some((when, then)) = self.then else {
                let answer = answered(first.await);
                if !world.crashed() {
                    settle(&engine, &world, patience).await;
                }
                return answer;
            };
            let due = arrival(&world, when);
            let first = until(first, due).await;
            let second = tokio::spawn(command(engine.clone(), world.clone(), then));
            // The driver takes the message while its call hangs: everything of the server runs on this thread.
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
            world.0.released.notify_one();
            let answer = match first {
                Ok(answer) => answer,
                Err(first) => answered(first.await),
            };
            let _ = answered(second.await);
            if !world.crashed() {
                settle(&engine, &world, patience).await;
            }
            answer
        })
    }
}
