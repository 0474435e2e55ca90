//! A restored guest that keeps its answer to itself has its CPUs, and is booked so.
use std::{sync::Arc, time::Duration};

use doze_engine::{ForkRequest, InstanceView, StandbyOptions, TargetState};
use doze_lifecycle::State;

use crate::{
    lab::{Lab, PATIENCE, settled},
    scenario::{FORK, NAME},
};

fn until(lab: &Lab, name: &str, holds: impl Fn(&InstanceView) -> bool) -> Arc<InstanceView> {
    let engine = lab.engine();
    lab.run(async {
        loop {
            let view = engine.get(name).unwrap();
            if holds(&view) {
                return view;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
}

fn begun() -> Lab {
    let lab = Lab::new(false);
    let engine = lab.engine();
    lab.run(async { engine.create(Lab::request(NAME)).await })
        .unwrap();
    lab.run(settled(&engine, &lab.world, NAME, PATIENCE))
        .unwrap();
    lab
}

#[test]
fn a_restored_guest_that_swallows_the_question_runs_and_says_so() {
    let mut lab = begun();
    let engine = lab.engine();
    lab.run(async { engine.standby(NAME, StandbyOptions::default()).await })
        .unwrap();
    lab.world.state().habits.mute = true;
    let restored = lab.run(async { engine.restore(NAME).await }).unwrap();
    assert_eq!(restored.state(), State::Running);
    assert!(restored.record.awaits_answer());
    drop(engine);
    // Also for a server that comes back to it, which asks again.
    lab.crash();
    lab.open();
    let view = until(&lab, NAME, |view| view.record.operation().is_none());
    assert_eq!(view.state(), State::Running);
    assert!(view.record.awaits_answer());
    let ledger = view.record.ledger().clone();
    lab.world.state().habits.mute = false;
    let view = until(&lab, NAME, |view| !view.record.awaits_answer());
    assert_eq!(view.state(), State::Running);
    assert_eq!(*view.record.ledger(), ledger);
}

#[test]
fn a_mute_fork_runs_and_is_nobody_until_it_answers() {
    let lab = begun();
    let engine = lab.engine();
    lab.world.state().habits.mute = true;
    let request = ForkRequest {
        name: FORK.to_owned(),
        from_running: true,
        target: Some(TargetState::Running),
    };
    let fork = lab.run(async { engine.fork(NAME, request).await }).unwrap();
    assert_eq!(fork.state(), State::Running);
    assert!(fork.record.awaits_answer());
    assert!(!lab.world.is_itself(&fork.id));
    lab.world.state().habits.mute = false;
    until(&lab, FORK, |view| !view.record.awaits_answer());
    assert!(lab.world.is_itself(&fork.id));
}
