//! How a scenario's commands are given and answered.
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use doze_engine::{
    Engine, EngineError, ForkRequest, Revival, ScheduleRequest, SnapshotKind, SnapshotRequest,
    StandbyOptions, StartOverrides, TargetState,
};
use doze_lifecycle::State;

use crate::{
    lab::{Lab, PATIENCE, packed},
    scenario::{FORK, KEPT, NAME, NEW, Op, When},
    steps::{Crash, Step},
    world::World,
};

/// Between a schedule and its first run.
const SOON_US: u64 = 100_000;
/// An interval that no run lives to see.
const LATE_US: u64 = 3_600_000_000;
/// For a scheduled run to be over.
const RUN: Duration = Duration::from_secs(5);

pub async fn arrival(world: &World, when: When) {
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

pub type Answer = Result<(), EngineError>;
type Asked = tokio::task::JoinHandle<Answer>;

/// The answer if it comes before `due`.
pub async fn until(mut asked: Asked, due: impl Future<Output = ()>) -> Result<Answer, Asked> {
    tokio::select! {
        answer = &mut asked => Ok(answered(answer)),
        () = due => Err(asked),
    }
}

/// A server that crashed in the caller's own task answered nothing.
pub fn answered(answer: Result<Answer, tokio::task::JoinError>) -> Answer {
    let panic = match answer {
        Ok(answer) => return answer,
        Err(error) => error.into_panic(),
    };
    match panic.is::<Crash>() {
        true => Err(EngineError::ShuttingDown),
        false => std::panic::resume_unwind(panic),
    }
}

pub async fn command(engine: Engine, world: World, op: Op) -> Answer {
    let start = StartOverrides::default;
    match op {
        Op::Create => engine.create(Lab::request(NAME)).await.map(drop),
        Op::Start => engine.start(NAME, start(), false).await.map(drop),
        Op::StartDiscarding => engine.start(NAME, start(), true).await.map(drop),
        Op::Standby => engine
            .standby(NAME, StandbyOptions::default())
            .await
            .map(drop),
        Op::Pack => {
            let options = StandbyOptions::default();
            engine.standby(NAME, options).await?;
            packed(&engine, &world).await;
            Ok(())
        }
        Op::Restore => engine.restore(NAME).await.map(drop),
        Op::Stop => engine.stop(NAME).await.map(drop),
        Op::Delete => engine.delete(NAME, true).await,
        Op::Discard => engine.delete(NAME, false).await,
        Op::PowerOff | Op::Death => by_itself(engine, world, op).await,
        Op::Snapshot => take(&engine, NAME, Some(NEW)).await,
        Op::Import => back_again(&engine, KEPT, Some(NEW)).await,
        Op::Fork(target) => fork(&engine, NAME, FORK, target).await,
        Op::ForkStored(target) => fork_stored(&engine, KEPT, FORK, target).await,
        Op::Rollback(target) => {
            let revival = Revival {
                target: Some(target),
                hypervisor: None,
            };
            engine.restore_snapshot(NAME, KEPT, revival).await.map(drop)
        }
        Op::DropSnapshot => engine.delete_snapshot(KEPT).await,
        Op::DropFork => engine.delete(FORK, false).await,
        Op::Schedule => scheduled(&engine, &world).await,
    }
}

/// A snapshot of the kind that its state allows.
pub async fn take(engine: &Engine, name: &str, called: Option<&str>) -> Answer {
    let kind = match engine.get(name)?.state() {
        State::Stopped => SnapshotKind::Stopped,
        _ => SnapshotKind::Standby,
    };
    let request = SnapshotRequest {
        kind,
        name: called.map(str::to_owned),
        tags: Default::default(),
        compression: None,
    };
    engine.create_snapshot(name, request).await.map(drop)
}

/// A stored snapshot is exported, and imported by the same server.
pub async fn back_again(engine: &Engine, key: &str, called: Option<&str>) -> Answer {
    let stream = exported(engine, key).await?;
    let called = called.map(str::to_owned);
    let imported = engine.import_snapshot(io::Cursor::new(stream), called);
    imported.await.map(drop)
}

/// A stored snapshot as a stream.
pub async fn exported(engine: &Engine, key: &str) -> Result<Vec<u8>, EngineError> {
    let sink = Sink::default();
    engine.export_snapshot(key, sink.clone()).await?;
    Ok(sink.taken())
}

/// Collects what is written.
#[derive(Clone, Default)]
pub struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    pub fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub async fn fork(engine: &Engine, name: &str, to: &str, target: TargetState) -> Answer {
    let request = ForkRequest {
        name: to.to_owned(),
        from_running: true,
        target: Some(target),
    };
    engine.fork(name, request).await.map(drop)
}

pub async fn fork_stored(engine: &Engine, key: &str, to: &str, target: TargetState) -> Answer {
    let revival = Revival {
        target: Some(target),
        hypervisor: None,
    };
    let made = engine.fork_snapshot(key, to.to_owned(), revival).await;
    made.map(drop)
}

/// A schedule is set, runs once and keeps the newest snapshot only.
async fn scheduled(engine: &Engine, world: &World) -> Answer {
    let old = engine.get_schedule(NAME).ok();
    let last_run = old.as_ref().and_then(|old| old.last_run_at_us);
    let last_error = old.as_ref().and_then(|old| old.last_error.clone());
    let newest = old.and_then(|old| old.last_snapshot_id);
    engine.set_schedule(NAME, schedule(SOON_US)).await?;
    let claimed = async {
        while !world.crashed() && engine.get_schedule(NAME)?.last_run_at_us == last_run {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Only this one; it reads its schedule again when it is over.
        engine.set_schedule(NAME, schedule(LATE_US)).await?;
        while !world.crashed() {
            let now = engine.get_schedule(NAME)?;
            // The last run's is shown until this one is over.
            if now.last_error != last_error
                && let Some(reason) = now.last_error
            {
                let context = "a scheduled snapshot".into();
                return Err(EngineError::Internal { context, reason });
            }
            if now.last_snapshot_id != newest {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Err(EngineError::ShuttingDown)
    };
    let late = |_| EngineError::Internal {
        context: "a scheduled snapshot".into(),
        reason: "it did not come".into(),
    };
    tokio::time::timeout(RUN, claimed).await.map_err(late)?
}

fn schedule(interval_us: u64) -> ScheduleRequest {
    ScheduleRequest {
        interval_us,
        max_count: Some(1),
        max_age_us: None,
        metadata: Default::default(),
        // Two runs in one second.
        name_prefix: Some(format!("s{:x}", rand::random::<u64>())),
    }
}

/// No more runs; one that is under way is over when nothing moves any more.
pub async fn unscheduled(engine: &Engine, world: &World) {
    let _ = engine.delete_schedule(NAME).await;
    loop {
        let before = world.moves();
        tokio::time::sleep(Duration::from_millis(50)).await;
        if world.moves() == before {
            return;
        }
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
