//! The list of scenarios.
use doze_engine::{SnapshotKind, TargetState};

use crate::{
    pool::wanted,
    scenario::{Begin, Op, Scenario, When},
    steps::Act,
};

fn every() -> Vec<Scenario> {
    let thorough = |scenario| Scenario {
        thorough: true,
        ..scenario
    };
    let plain = plain().into_iter().map(thorough).collect();
    [plain, copies(), troubled(), troubled_copies(), packing()].concat()
}

/// All that are wanted.
pub fn all() -> Vec<Scenario> {
    let mut all = every();
    all.retain(|scenario| wanted(scenario.name));
    all
}

/// How many there are.
pub fn count() -> usize {
    every().len()
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

/// Copies of instances: kept, made new instances of, gone back to.
pub fn copies() -> Vec<Scenario> {
    use {Begin as F, Op as O, TargetState as T};
    let of = Scenario::plain;
    let (memory, disk) = (SnapshotKind::Standby, SnapshotKind::Stopped);
    vec![
        of("snapshot of a running one", F::Running, O::Snapshot),
        of("snapshot of a sleeping one", F::Standby, O::Snapshot),
        of("snapshot of a stopped one", F::Stopped, O::Snapshot),
        of("fork of a running one", F::Running, O::Fork(T::Running)),
        of(
            "fork of a running one, asleep",
            F::Running,
            O::Fork(T::Standby),
        ),
        of(
            "fork of a running one, stopped",
            F::Running,
            O::Fork(T::Stopped),
        ),
        of("fork of a sleeping one", F::Standby, O::Fork(T::Running)),
        of(
            "fork of a sleeping one, asleep",
            F::Standby,
            O::Fork(T::Standby),
        ),
        of("fork of a stopped one", F::Stopped, O::Fork(T::Stopped)),
        of(
            "fork of a stopped one, running",
            F::Stopped,
            O::Fork(T::Running),
        ),
        of("fork of a snapshot", F::Running, O::ForkStored(T::Running)).keeping(memory),
        of(
            "fork of a snapshot, asleep",
            F::Stopped,
            O::ForkStored(T::Standby),
        )
        .keeping(memory),
        of(
            "fork of a snapshot, stopped",
            F::Standby,
            O::ForkStored(T::Stopped),
        )
        .keeping(memory),
        of(
            "fork of a disk, running",
            F::Running,
            O::ForkStored(T::Running),
        )
        .keeping(disk),
        of("rollback", F::Running, O::Rollback(T::Running)).keeping(memory),
        of("rollback, asleep", F::Standby, O::Rollback(T::Standby)).keeping(memory),
        of("rollback, stopped", F::Running, O::Rollback(T::Stopped)).keeping(memory),
        of("rollback of a disk", F::Standby, O::Rollback(T::Running)).keeping(disk),
        of(
            "rollback of a stopped one",
            F::Stopped,
            O::Rollback(T::Standby),
        )
        .keeping(memory),
        of("delete of a snapshot", F::Running, O::DropSnapshot).keeping(memory),
        of("import", F::Running, O::Import).keeping(memory),
        of("import of a disk", F::Stopped, O::Import).keeping(disk),
        of("scheduled snapshot", F::Running, O::Schedule),
        of("restore of a new fork", F::Forked, O::Restore),
        of("restore after a rollback", F::RolledBack, O::Restore),
    ]
}

/// The same interrupted and failing.
pub fn troubled_copies() -> Vec<Scenario> {
    use {Begin as F, Op as O, TargetState as T, When as W};
    let of = Scenario::plain;
    let memory = SnapshotKind::Standby;
    let snapshot = |name| of(name, F::Running, O::Snapshot);
    let fork = |name| of(name, F::Running, O::Fork(T::Running));
    let stored = |name| of(name, F::Stopped, O::ForkStored(T::Running)).keeping(memory);
    let rollback = |name| of(name, F::Running, O::Rollback(T::Running)).keeping(memory);
    let import = |name| of(name, F::Running, O::Import).keeping(memory);
    vec![
        snapshot("snapshot, deleted while saving").then(W::Call("vmm.save"), O::Discard),
        snapshot("snapshot, stopped while saving").then(W::Call("vmm.save"), O::Stop),
        snapshot("snapshot, standby while saving").then(W::Call("vmm.save"), O::Standby),
        snapshot("snapshot, restored while pausing").then(W::Call("vmm.pause"), O::Restore),
        snapshot("snapshot, forked while saving").then(W::Call("vmm.save"), O::Fork(T::Standby)),
        snapshot("snapshot, deleted while placed").then(W::Point("snapshot.placed"), O::Discard),
        snapshot("snapshot, save refused").fails("vmm.save", Act::Refuse),
        snapshot("snapshot, pause refused late").fails("vmm.pause", Act::RefuseAfter),
        snapshot("snapshot, VMM dies while saving").fails("vmm.save", Act::Die),
        fork("fork, source deleted while saving").then(W::Call("vmm.save"), O::Discard),
        fork("fork, source deleted when copied").then(W::Point("fork.copied"), O::Discard),
        fork("fork, deleted when recorded").then(W::Point("fork.recorded"), O::DropFork),
        fork("fork, deleted when made").then(W::Point("fork.files_made"), O::DropFork),
        fork("fork, deleted while loading").then(W::Call("vmm.load"), O::DropFork),
        fork("fork, source standby while loading").then(W::Call("vmm.load"), O::Standby),
        fork("fork, load refused").fails("vmm.load", Act::Refuse),
        fork("fork, VMM dies loading").fails("vmm.load", Act::Die),
        Scenario {
            stubborn: true,
            ..fork("fork that does not take its identity")
        },
        Scenario {
            mute: true,
            ..fork("fork that does not answer, deleted")
                .then(W::Point("restore.recorded"), O::DropFork)
        },
        stored("fork of a snapshot deleted meanwhile").then(W::Call("vmm.load"), O::DropSnapshot),
        stored("fork of a snapshot, deleted while spawning")
            .then(W::Call("monitor.spawn_to_load"), O::DropFork),
        of(
            "fork of a stopped one, spawn refused",
            F::Stopped,
            O::Fork(T::Running),
        )
        .fails("monitor.spawn", Act::Refuse),
        rollback("rollback, deleted when staged").then(W::Point("rollback.staged"), O::Discard),
        rollback("rollback, deleted when committed").then(W::Point("rollback.marked"), O::Discard),
        rollback("rollback, deleted while killing").then(W::Call("vmm.kill"), O::Discard),
        rollback("rollback, its snapshot deleted").then(W::Call("vmm.kill"), O::DropSnapshot),
        rollback("rollback, stopped while loading").then(W::Call("vmm.load"), O::Stop),
        rollback("rollback, load refused").fails("vmm.load", Act::Refuse),
        rollback("rollback, VMM dies when killed").fails("vmm.kill", Act::Die),
        import("import, its source deleted when received")
            .then(W::Point("import.received"), O::Discard),
        import("import, what was exported deleted when placed")
            .then(W::Point("import.placed"), O::DropSnapshot),
        of("delete of a snapshot, twice", F::Running, O::DropSnapshot)
            .keeping(memory)
            .then(W::Point("snapshot.row_removed"), O::DropSnapshot),
    ]
}

/// On a server that compresses whatever sleeps.
pub fn packing() -> Vec<Scenario> {
    use {Begin as F, Op as O, TargetState as T, When as W};
    let of = Scenario::packing;
    let memory = SnapshotKind::Standby;
    let pack = |name| of(name, F::Running, O::Pack);
    let restore = |name| of(name, F::Standby, O::Restore);
    vec![
        pack("compressed"),
        pack("compressed, restored when made").then(W::Point("compression.made"), O::Restore),
        pack("compressed, restored when it is").then(W::Point("compression.recorded"), O::Restore),
        pack("compressed, snapshot when made").then(W::Point("compression.made"), O::Snapshot),
        pack("compressed, forked when made")
            .then(W::Point("compression.made"), O::Fork(T::Standby)),
        pack("compressed, deleted when made").then(W::Point("compression.made"), O::Discard),
        pack("compressed, rolled back when made")
            .then(W::Point("compression.made"), O::Rollback(T::Running))
            .keeping(memory),
        pack("compressed, rolled back to sleep when made")
            .then(W::Point("compression.made"), O::Rollback(T::Standby))
            .keeping(memory),
        of(
            "standby, rolled back while compressing",
            F::Running,
            O::Standby,
        )
        .then(W::Point("standby.recorded"), O::Rollback(T::Standby))
        .keeping(memory),
        of(
            "standby, restored while compressing",
            F::Running,
            O::Standby,
        )
        .then(W::Point("standby.recorded"), O::Restore),
        restore("restore of compressed memory"),
        restore("restore of compressed memory, load refused").fails("vmm.load", Act::Refuse),
        restore("restore of compressed memory, VMM dies loading").fails("vmm.load", Act::Die),
        restore("restore of compressed memory, deleted").then(W::Call("vmm.load"), O::Discard),
        Scenario {
            altered: true,
            ..restore("restore of compressed memory with an altered state")
        },
        of(
            "start discarding compressed memory",
            F::Standby,
            O::StartDiscarding,
        ),
        of("snapshot of compressed memory", F::Standby, O::Snapshot),
        of(
            "snapshot of a running one, compressed",
            F::Running,
            O::Snapshot,
        ),
        of("fork of compressed memory", F::Standby, O::Fork(T::Running)),
        of(
            "fork of compressed memory, asleep",
            F::Standby,
            O::Fork(T::Standby),
        ),
        of(
            "fork of compressed memory, stopped",
            F::Standby,
            O::Fork(T::Stopped),
        ),
        of(
            "fork of a compressed snapshot",
            F::Running,
            O::ForkStored(T::Running),
        )
        .keeping(memory),
        of(
            "fork of a compressed snapshot, asleep",
            F::Stopped,
            O::ForkStored(T::Standby),
        )
        .keeping(memory),
        of(
            "rollback to compressed memory",
            F::Running,
            O::Rollback(T::Running),
        )
        .keeping(memory),
        of(
            "rollback of compressed memory",
            F::Standby,
            O::Rollback(T::Standby),
        )
        .keeping(memory),
        of(
            "rollback of compressed memory, running",
            F::Standby,
            O::Rollback(T::Running),
        )
        .keeping(memory),
        of(
            "delete of a compressed snapshot",
            F::Standby,
            O::DropSnapshot,
        )
        .keeping(memory),
        of("restore of a new compressed fork", F::Forked, O::Restore),
        of(
            "restore after a rollback to compressed memory",
            F::RolledBack,
            O::Restore,
        ),
    ]
}
