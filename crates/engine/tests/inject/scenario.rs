//! Everything an instance can be told to do, from where it can be told.
use std::time::Duration;

use doze_engine::{Engine, EngineError, StartOverrides};
use doze_lifecycle::State;

use crate::{
    lab::{Lab, PATIENCE, settled},
    steps::{Act, Step},
    world::World,
};

pub const NAME: &str = "one";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Create,
    Start,
    StartDiscarding,
    Standby,
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
}

/// Where the instance is before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    Nothing,
    Running,
    Standby,
    Stopped,
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
}

impl Scenario {
    const fn plain(name: &'static str, from: Begin, op: Op) -> Scenario {
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
        }
    }

    fn then(self, when: When, op: Op) -> Scenario {
        Scenario {
            then: Some((when, op)),
            ..self
        }
    }

    fn fails(self, call: &'static str, act: Act) -> Scenario {
        Scenario {
            fails: Some((call, act)),
            ..self
        }
    }

    pub fn does(&self, op: Op) -> bool {
        self.op == op || self.then.is_some_and(|(_, then)| then == op)
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
        self.from == Begin::Standby || self.does(Op::Standby)
    }
}

/// The operations, each from the state it is made for.
pub fn plain() -> Vec<Scenario> {
    use {Begin as F, Op as O};
    let of = Scenario::plain;
    vec![
        of("create", F::Nothing, O::Create),
        of("start", F::Stopped, O::Start),
        of("standby", F::Running, O::Standby),
        of("restore", F::Standby, O::Restore),
        of("stop", F::Running, O::Stop),
        of("delete running", F::Running, O::Delete),
        of("delete sleeping", F::Standby, O::Delete),
        of("start discarding memory", F::Standby, O::StartDiscarding),
    ]
}

/// Those that are interrupted, fail, or happen by themselves.
pub fn troubled() -> Vec<Scenario> {
    use {Begin as F, Op as O, When as W};
    let of = Scenario::plain;
    let standby = |name| of(name, F::Running, O::Standby);
    let restore = |name| of(name, F::Standby, O::Restore);
    vec![
        standby("standby, restored while saving").then(W::Call("vmm.save"), O::Restore),
        standby("standby, stopped while saving").then(W::Call("vmm.save"), O::Stop),
        standby("standby, deleted while saving").then(W::Call("vmm.save"), O::Discard),
        standby("standby, restored while pausing").then(W::Call("vmm.pause"), O::Restore),
        standby("standby, restored after its commit").then(W::Call("vmm.kill"), O::Restore),
        standby("standby, deleted after its commit").then(W::Call("vmm.kill"), O::Discard),
        standby("standby, save refused").fails("vmm.save", Act::Refuse),
        standby("standby, VMM dies while saving").fails("vmm.save", Act::Die),
        Scenario {
            altered: true,
            ..restore("restore of an altered state")
        },
        restore("restore, load refused").fails("vmm.load", Act::Refuse),
        restore("restore, VMM dies loading").fails("vmm.load", Act::Die),
        restore("restore, deleted while loading").then(W::Call("vmm.load"), O::Discard),
        restore("restore, standby while loading").then(W::Call("vmm.load"), O::Standby),
        Scenario {
            mute: true,
            ..restore("restore of a mute guest, deleted")
                .then(W::Point("restore.recorded"), O::Discard)
        },
        of("start, stopped while spawning", F::Stopped, O::Start)
            .then(W::Call("monitor.spawn"), O::Stop),
        of("start, deleted while spawning", F::Stopped, O::Start)
            .then(W::Call("monitor.spawn"), O::Discard),
        of("start, spawn refused", F::Stopped, O::Start).fails("monitor.spawn", Act::Refuse),
        of(
            "start discarding, resume refused",
            F::Standby,
            O::StartDiscarding,
        )
        .fails("vmm.resume", Act::Refuse),
        of("create, deleted while spawning", F::Nothing, O::Create)
            .then(W::Call("monitor.spawn"), O::Discard),
        of("create, resume refused", F::Nothing, O::Create).fails("vmm.resume", Act::Refuse),
        Scenario {
            deaf: true,
            ..of("stop of a deaf guest, deleted", F::Running, O::Stop)
                .then(W::Point("stop.guest_asked"), O::Discard)
        },
        of("power off by itself", F::Running, O::PowerOff),
        of("death by itself", F::Running, O::Death),
    ]
}

/// What is to be lost: the guest's memory, of this boot. `None`: there is none.
pub struct Stake {
    pub memory: Option<u64>,
    pub boots: u64,
}

impl Scenario {
    /// Brings the instance to where the scenario begins.
    pub fn prepare(&self, lab: &Lab) -> Stake {
        let (engine, world) = (lab.engine(), lab.world.clone());
        if self.from == Begin::Nothing {
            return Stake {
                memory: None,
                boots: 0,
            };
        }
        let memory = lab.run(async {
            engine.create(Lab::request(NAME)).await.unwrap();
            let view = settled(&engine, &world, NAME, PATIENCE / 2).await.unwrap();
            assert_eq!(view.state(), State::Running, "{:?}", view.record.failure());
            for _ in 0..3 {
                world.tick(&view.id);
            }
            match self.from {
                Begin::Nothing | Begin::Running => Some(3),
                Begin::Standby => {
                    engine.standby(NAME, false).await.unwrap();
                    Some(3)
                }
                Begin::Stopped => {
                    engine.stop(NAME).await.unwrap();
                    None
                }
            }
        });
        if self.altered {
            let id = &lab.view(NAME).unwrap().id;
            let state = lab.instance_dir(id).join("snapshot/state");
            let mut text = std::fs::read(&state).unwrap();
            text[0] ^= 1;
            std::fs::write(&state, text).unwrap();
        }
        let mut state = world.state();
        (state.habits.mute, state.habits.deaf) = (self.mute, self.deaf);
        Stake { memory, boots: 1 }
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
                let answer = first.await.unwrap();
                if !world.crashed() {
                    let _ = settled(&engine, &world, NAME, patience).await;
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
                Err(first) => first.await.unwrap(),
            };
            let _ = second.await.unwrap();
            if !world.crashed() {
                let _ = settled(&engine, &world, NAME, patience).await;
            }
            answer
        })
    }
}

async fn arrival(world: &World, when: When) {
    match when {
        When::Call(_) => world.0.stalled.notified().await,
        When::Point(name) => loop {
            let notified = world.0.reached.notified();
            let step = Step::new(&format!("point {name}"), 1);
            if world.state().steps.seen.contains(&step) {
                return;
            }
            notified.await;
        },
    }
}

type Answer = Result<(), EngineError>;
type Asked = tokio::task::JoinHandle<Answer>;

/// The answer if it comes before `due`.
async fn until(mut asked: Asked, due: impl Future<Output = ()>) -> Result<Answer, Asked> {
    tokio::select! {
        answer = &mut asked => Ok(answer.unwrap()),
        () = due => Err(asked),
    }
}

pub async fn command(engine: Engine, world: World, op: Op) -> Answer {
    match op {
        Op::Create => engine.create(Lab::request(NAME)).await.map(drop),
        Op::Start => engine
            .start(NAME, StartOverrides::default(), false)
            .await
            .map(drop),
        Op::StartDiscarding => engine
            .start(NAME, StartOverrides::default(), true)
            .await
            .map(drop),
        Op::Standby => engine.standby(NAME, false).await.map(drop),
        Op::Restore => engine.restore(NAME).await.map(drop),
        Op::Stop => engine.stop(NAME).await.map(drop),
        Op::Delete => engine.delete(NAME, true).await,
        Op::Discard => engine.delete(NAME, false).await,
        Op::PowerOff | Op::Death => by_itself(engine, world, op).await,
    }
}

async fn by_itself(engine: Engine, world: World, op: Op) -> Answer {
    let id = engine.get(NAME)?.id.clone();
    let pid = {
        let state = world.state();
        let mut all = state.vmms.iter();
        all.find(|(_, vmm)| vmm.instance == id).map(|(pid, _)| *pid)
    };
    if let Some(pid) = pid {
        let guest = world.state().guest_of(pid);
        match (op, guest) {
            (Op::PowerOff, Some(guest)) => guest.power_off(&world, pid),
            _ => world.state().end(pid),
        }
    }
    // Booked by whoever observes it; a crash there ends the wait, too.
    let stopped = async {
        while !world.crashed() && engine.get(NAME)?.state() != State::Stopped {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE / 2, stopped).await.unwrap()
}
