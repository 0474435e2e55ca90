//! How often the disk is waited for on the way to sleep and back.
use crate::{
    lab::{Lab, PATIENCE},
    scenarios,
    steps::Step,
};

/// Commits of the undisturbed operation of this name, up to the answer.
fn commits(name: &str) -> usize {
    let all = scenarios::plain();
    let scenario = all.iter().find(|scenario| scenario.name == name).unwrap();
    let lab = Lab::new(false);
    scenario.prepare(&lab);
    lab.world.state().steps.arm(Vec::new());
    scenario.act(&lab, PATIENCE / 2).unwrap();
    let steps = lab.world.state().steps.disarm();
    let commit = |step: &&Step| step.label == "after store.commit";
    steps.iter().filter(commit).count()
}

/// Admitted, paused, committed, asleep.
#[test]
fn a_standby_takes_four_commits() {
    assert_eq!(commits("standby"), 4);
}

/// Admitted, resumed, answered.
#[test]
fn a_restore_takes_three_commits() {
    assert_eq!(commits("restore"), 3);
}
