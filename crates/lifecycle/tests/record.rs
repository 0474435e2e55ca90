//! Random facts and clocks through `Record::apply`: whatever happens, in whatever order, the ledger adds up
//! and the record stays one that the rules know.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::collections::BTreeMap;

use doze_lifecycle::{
    Admission, Cause, Command, Exit, Fact, KEPT_TRANSITIONS, Operation, ProcessRef, Record, Stamp,
    State, admission::admit,
};
use proptest::prelude::*;

fn stamp(boot: u8, boottime_us: u64, wall_us: i64) -> Stamp {
    Stamp {
        boot_id: format!("boot-{boot}"),
        boottime_us,
        wall_us,
    }
}

fn process() -> ProcessRef {
    ProcessRef {
        pid: 42,
        start_ticks: 7,
        boot_id: "boot-0".into(),
    }
}

/// A guest that was Running when it fell asleep, in an earlier boot of the host.
fn sleeper() -> Record {
    let at = |us| stamp(0, us, 1_600_000_000_000_000);
    [
        Fact::MachineSpawned(process()),
        Fact::CpusStarted { agent: true },
        Fact::ProgramStarted,
        Fact::AgentReady,
        Fact::Admitted(Operation::Standby),
        Fact::CpusPaused,
        Fact::SnapshotCommitted,
        Fact::MachineGone { failure: None },
    ]
    .iter()
    .fold(Record::creating(at(1)), |record, fact| {
        record.apply(fact, &at(2), None).unwrap()
    })
}

/// How an instance comes into the world.
fn beginnings() -> impl Strategy<Value = fn(Stamp) -> Record> {
    proptest::sample::select(vec![
        Record::creating as fn(Stamp) -> Record,
        |at| Record::forking(None, at),
        |at| Record::forking(Some(&sleeper()), at),
    ])
}

fn facts() -> impl Strategy<Value = Fact> {
    prop_oneof![
        proptest::sample::select(Operation::ALL.to_vec()).prop_map(Fact::Admitted),
        Just(Fact::MachineSpawned(process())),
        any::<bool>().prop_map(|agent| Fact::CpusStarted { agent }),
        Just(Fact::ProgramStarted),
        Just(Fact::AgentReady),
        (0..256i32).prop_map(|code| Fact::ProgramExited(Exit {
            code,
            message: String::new()
        })),
        Just(Fact::GuestPoweredOff),
        proptest::option::of(Just("died".to_owned()))
            .prop_map(|failure| Fact::MachineGone { failure }),
        (0..60_000_000u64).prop_map(|boottime_us| Fact::MachineFoundGone {
            failure: Some("died".into()),
            last_seen: stamp(0, boottime_us, 1_700_000_000_000_000),
        }),
        (0..60_000_000u64).prop_map(|boottime_us| Fact::GuestFoundOff {
            last_seen: stamp(0, boottime_us, 1_700_000_000_000_000),
        }),
        Just(Fact::OperationFailed {
            reason: "no".into()
        }),
        Just(Fact::CpusPaused),
        Just(Fact::SnapshotCommitted),
        Just(Fact::StandbyAbandoned {
            reason: Some("no".into())
        }),
        any::<bool>().prop_map(|agent| Fact::Resumed {
            process: process(),
            agent
        }),
        Just(Fact::AgentAnswered),
        Just(Fact::AnswerOverdue),
        (0..60_000_000u64).prop_map(|boottime_us| Fact::MemoryLost {
            reason: "no".into(),
            last_seen: stamp(0, boottime_us, 1_700_000_000_000_000),
        }),
        Just(Fact::MemoryDiscarded),
        Just(Fact::GuestContinued),
        Just(Fact::Forked),
        any::<bool>().prop_map(|memory| Fact::RolledBack {
            memory_of: memory.then(|| Box::new(sleeper())),
        }),
    ]
}

/// How a host's clocks move between two facts.
#[derive(Debug, Clone)]
enum Tick {
    /// Both clocks go on; the wall clock is stepped by the second number besides.
    Forward(u64, i64),
    /// The host reboots: the boot clock starts again, the wall clock jumps.
    Reboot(i64),
    /// The fact is told with a stamp from the past, as boot markers are.
    Past(u64),
}

fn ticks() -> impl Strategy<Value = Tick> {
    prop_oneof![
        6 => (0..5_000_000u64, prop_oneof![4 => Just(0i64), 1 => -4_000_000_000i64..4_000_000_000])
            .prop_map(|(forward, step)| Tick::Forward(forward, step)),
        1 => (-4_000_000_000i64..4_000_000_000).prop_map(Tick::Reboot),
        2 => (0..20_000_000u64).prop_map(Tick::Past),
    ]
}

struct Host {
    boot: u8,
    boottime: u64,
    wall: i64,
    /// The ledger's timeline, kept independently: boot clock within a boot, clamped wall across.
    timeline: u64,
}

impl Host {
    fn tick(&mut self, tick: &Tick) -> Stamp {
        match tick {
            Tick::Forward(forward, step) => {
                self.boottime += forward;
                self.wall += *forward as i64 + step;
                self.timeline += forward;
            }
            Tick::Reboot(jump) => {
                self.boot += 1;
                self.boottime = 1_000_000;
                self.wall += jump;
            }
            Tick::Past(age) => return self.now().earlier(*age),
        }
        self.now()
    }
    fn now(&self) -> Stamp {
        stamp(self.boot, self.boottime, self.wall)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn within_one_boot_the_sum_of_all_phases_is_the_time_that_passed(
        begin in beginnings(),
        steps in proptest::collection::vec((facts(), ticks()), 1..80)
    ) {
        let mut host = Host { boot: 0, boottime: 50_000_000, wall: 1_700_000_000_000_000, timeline: 0 };
        let mut record = begin(host.now());
        let mut transitions = 0u64;
        for (fact, tick) in steps.iter().filter(|(_, t)| !matches!(t, Tick::Reboot(_))) {
            let at = host.tick(tick);
            if let Ok(next) = record.apply(fact, &at, None) {
                transitions += u64::from(next.state() != record.state());
                record = next;
            }
            let sum: u64 = record.ledger().durations_us(&host.now()).values().sum();
            prop_assert_eq!(sum, host.timeline);
            let ms: u64 = record.ledger().durations_ms(&host.now()).values().sum();
            // Whole milliseconds lose less than one per phase, so less than one per transition and the first.
            prop_assert!(host.timeline / 1000 - ms <= transitions + 1);
        }
    }

    /// Also across reboots and stepped clocks: what the ledger holds is the way from each transition to the
    /// next on its own timeline, and nothing else.
    #[test]
    fn the_sum_of_all_phases_is_the_length_of_the_ledgers_timeline(
        begin in beginnings(),
        steps in proptest::collection::vec((facts(), ticks()), 1..80)
    ) {
        let way = |from: &Stamp, to: &Stamp| match from.boot_id == to.boot_id {
            true => to.boottime_us.saturating_sub(from.boottime_us),
            false => u64::try_from(to.wall_us - from.wall_us).unwrap_or(0),
        };
        let mut host = Host { boot: 0, boottime: 50_000_000, wall: 1_700_000_000_000_000, timeline: 0 };
        let mut record = begin(host.now());
        let mut length = 0u64;
        for (fact, tick) in &steps {
            let at = host.tick(tick);
            let before = record.current_since().clone();
            if let Ok(next) = record.apply(fact, &at, None) {
                record = next;
            }
            length += way(&before, record.current_since());
            // Nothing that happened before the host's last boot makes a phase begin before it.
            let boot = |s: &Stamp| s.boot_id.trim_start_matches("boot-").parse::<u8>().unwrap();
            prop_assert!(boot(record.current_since()) >= boot(&before));
            let now = host.now();
            let sum: u64 = record.ledger().durations_us(&now).values().sum();
            prop_assert_eq!(sum, length + way(record.current_since(), &now));
        }
    }

    #[test]
    fn committed_time_never_shrinks_whatever_the_clocks_do(
        begin in beginnings(),
        steps in proptest::collection::vec((facts(), ticks()), 1..80)
    ) {
        let mut host = Host { boot: 0, boottime: 50_000_000, wall: 1_700_000_000_000_000, timeline: 0 };
        let mut record = begin(host.now());
        let mut closed: BTreeMap<State, u64> = BTreeMap::new();
        for (fact, tick) in &steps {
            let at = host.tick(tick);
            if let Ok(next) = record.apply(fact, &at, None) {
                record = next;
            }
            prop_assert_eq!(record.ledger().current(), record.state());
            let now = record.ledger().durations_us(record.current_since());
            for (state, before) in &closed {
                prop_assert!(now.get(state).copied().unwrap_or(0) >= *before, "{} shrank", state);
            }
            closed = now;
        }
    }

    #[test]
    fn a_record_that_the_rules_made_is_one_they_know(
        begin in beginnings(),
        steps in proptest::collection::vec(facts(), 1..80)
    ) {
        let mut record = begin(stamp(0, 1, 1));
        for (n, fact) in steps.iter().enumerate() {
            if let Ok(next) = record.apply(fact, &stamp(0, n as u64, n as i64), None) {
                record = next;
            }
            if record.machine().is_none() {
                let preparing = record.state() == State::Created
                    && matches!(record.operation(), Some(Operation::Create | Operation::Fork))
                    || record.state() == State::Created && record.operation() == Some(Operation::Delete);
                prop_assert!(
                    preparing || !record.state().has_machine(),
                    "{} without a machine, {:?}", record.state(), record.operation()
                );
            } else {
                prop_assert!(record.state().has_machine(), "{} with a machine", record.state());
            }
            prop_assert!(record.state() != State::Standby || record.has_snapshot());
            if record.has_snapshot() && record.machine().is_some() {
                prop_assert_eq!(record.operation(), Some(Operation::Standby));
            }
            let text = serde_json::to_string(&record).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Record>(&text).unwrap(), &record);
        }
    }

    /// What the table lets run, the rules let begin.
    #[test]
    fn admission_and_apply_agree(begin in beginnings(), steps in proptest::collection::vec(facts(), 1..40)) {
        let mut record = begin(stamp(0, 1, 1));
        for (n, fact) in steps.iter().enumerate() {
            let at = stamp(0, n as u64, n as i64);
            if let Ok(next) = record.apply(fact, &at, None) {
                record = next;
            }
            for command in Command::ALL {
                let operation = match command {
                    // Both begin a start, each in its own state.
                    Command::Start { discard_memory, .. }
                        if discard_memory != (record.state() == State::Standby) =>
                    {
                        continue;
                    }
                    Command::Start { .. } => Operation::Start,
                    Command::Standby { options: true } if record.state() == State::Standby => {
                        continue;
                    }
                    Command::Standby { .. } => Operation::Standby,
                    Command::Restore => Operation::Restore,
                    Command::Stop => Operation::Stop,
                    Command::Delete { .. } => Operation::Delete,
                    Command::Exec => continue,
                    // Copying what rests changes nothing of it, so nothing is recorded.
                    Command::Snapshot { .. } | Command::Fork { .. }
                        if record.state() != State::Running =>
                    {
                        continue;
                    }
                    Command::Snapshot { stopped: true } | Command::Fork { from_running: false } => continue,
                    Command::Snapshot { .. } | Command::Fork { .. } => Operation::Snapshot,
                    Command::Rollback => Operation::Rollback,
                };
                let begins = record.apply(&Fact::Admitted(operation), &at, None).is_ok();
                let runs = admit(record.state(), record.operation(), command) == Admission::Run;
                prop_assert_eq!(
                    begins, runs,
                    "{:?} of {} with {:?}", command, record.state(), record.operation()
                );
            }
        }
    }
}

fn after(facts: &[(Fact, u64)]) -> Record {
    facts
        .iter()
        .fold(Record::creating(stamp(0, 0, 0)), |record, (fact, at_ms)| {
            record
                .apply(fact, &stamp(0, at_ms * 1000, 0), None)
                .unwrap()
        })
}

#[test]
fn running_begins_when_the_guest_says_so_the_later_of_program_and_agent() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 10),
        (Fact::CpusStarted { agent: true }, 20),
        // Told late, with their true ages: the agent before the program.
        (Fact::AgentReady, 2_000),
        (Fact::ProgramStarted, 3_000),
    ]);
    assert_eq!(record.state(), State::Running);
    let spent = record.ledger().durations_ms(&stamp(0, 10_000_000, 0));
    assert_eq!(spent["created"], 20);
    assert_eq!(spent["initializing"], 2_980);
    assert_eq!(spent["running"], 7_000);
}

#[test]
fn without_an_agent_the_program_alone_makes_it_running() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 10),
        (Fact::CpusStarted { agent: false }, 20),
        (Fact::ProgramStarted, 500),
    ]);
    assert_eq!(record.state(), State::Running);
}

#[test]
fn a_marker_older_than_the_phase_is_clamped_to_its_beginning() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 10),
        (Fact::CpusStarted { agent: true }, 1_000),
        (Fact::ProgramStarted, 5),
        (Fact::AgentReady, 6),
    ]);
    assert_eq!(record.state(), State::Running);
    let spent = record.ledger().durations_ms(&stamp(0, 1_500_000, 0));
    assert_eq!(
        (spent["created"], spent["initializing"], spent["running"]),
        (1_000, 0, 500)
    );
}

#[test]
fn a_create_that_fails_is_deleted_also_after_a_crash() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 10),
        (Fact::MachineGone { failure: None }, 20),
        (
            Fact::OperationFailed {
                reason: "no".into(),
            },
            30,
        ),
    ]);
    assert_eq!(record.operation(), Some(Operation::Delete));
}

#[test]
fn a_failed_start_leaves_it_stopped_with_the_reason() {
    let stopped = Record::stopped(stamp(0, 0, 0));
    let record = [
        Fact::Admitted(Operation::Start),
        Fact::MachineSpawned(process()),
        Fact::MachineGone { failure: None },
        Fact::OperationFailed {
            reason: "no kernel".into(),
        },
    ]
    .iter()
    .fold(stopped, |record, fact| {
        record.apply(fact, &stamp(0, 1, 1), None).unwrap()
    });
    assert_eq!((record.state(), record.operation()), (State::Stopped, None));
    assert_eq!(record.failure(), Some("no kernel"));
}

#[test]
fn a_record_of_a_newer_program_is_refused_with_both_versions() {
    let text = serde_json::to_string(&Record::stopped(stamp(0, 0, 0))).unwrap();
    let newer: Record =
        serde_json::from_str(&text.replace("\"version\":4", "\"version\":99")).unwrap();
    let error = newer.check_version().unwrap_err();
    assert!(error.contains("99") && error.contains('4'), "{error}");
}

fn running_at(ms: u64) -> Vec<(Fact, u64)> {
    vec![
        (Fact::MachineSpawned(process()), 0),
        (Fact::CpusStarted { agent: true }, 0),
        (Fact::ProgramStarted, ms),
        (Fact::AgentReady, ms),
    ]
}

fn asleep() -> Vec<(Fact, u64)> {
    let mut facts = running_at(100);
    facts.extend([
        (Fact::Admitted(Operation::Standby), 1_000),
        (Fact::CpusPaused, 1_100),
        (Fact::SnapshotCommitted, 1_150),
        (Fact::MachineGone { failure: None }, 1_160),
    ]);
    facts
}

#[test]
fn a_sleep_is_booked_from_pause_to_answer() {
    let mut facts = asleep();
    facts.extend([
        (Fact::Admitted(Operation::Restore), 5_000),
        (
            Fact::Resumed {
                process: process(),
                agent: true,
            },
            5_200,
        ),
    ]);
    let record = after(&facts);
    assert_eq!(record.state(), State::Initializing);
    assert!(record.awaits_answer() && !record.has_snapshot());
    facts.push((Fact::AgentAnswered, 5_260));
    let record = after(&facts);
    assert_eq!((record.state(), record.restores()), (State::Running, 1));
    let spent = record.ledger().durations_ms(&stamp(0, 6_260_000, 0));
    assert_eq!(spent["initializing"], 100 + 60);
    assert_eq!(spent["running"], 1_000 + 1_000);
    assert_eq!(spent["paused"], 60);
    assert_eq!(spent["standby"], 5_200 - 1_160);
}

#[test]
fn a_standby_before_the_boot_finished_goes_on_initializing() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 0),
        (Fact::CpusStarted { agent: true }, 0),
        (Fact::Admitted(Operation::Standby), 10),
        (Fact::CpusPaused, 20),
        (Fact::SnapshotCommitted, 30),
        (Fact::MachineGone { failure: None }, 40),
        (Fact::Admitted(Operation::Restore), 1_000),
        (
            Fact::Resumed {
                process: process(),
                agent: true,
            },
            1_100,
        ),
        (Fact::AgentAnswered, 1_200),
    ]);
    assert_eq!(record.state(), State::Initializing);
    let record = [Fact::ProgramStarted, Fact::AgentReady]
        .iter()
        // Its own account says a moment before it slept.
        .fold(record, |r, f| {
            r.apply(f, &stamp(0, 15_000, 0), None).unwrap()
        });
    assert_eq!(record.state(), State::Running);
    let spent = record.ledger().durations_ms(&stamp(0, 1_300_000, 0));
    assert_eq!((spent["initializing"], spent["running"]), (20 + 100, 100));
}

#[test]
fn without_an_agent_it_runs_at_the_resume_acknowledgement() {
    let mut facts = asleep();
    facts.extend([
        (Fact::Admitted(Operation::Restore), 5_000),
        (
            Fact::Resumed {
                process: process(),
                agent: false,
            },
            5_200,
        ),
    ]);
    assert_eq!(after(&facts).state(), State::Running);
}

/// Drain, reboot, restore: the markers of the first boot say nothing about the second.
#[test]
fn a_reboot_in_a_sleep_bills_nothing_twice() {
    for agent in [false, true] {
        let mut record = after(&asleep());
        let later = |seconds: u64| stamp(1, seconds * 1_000_000, 1_000_000_000);
        for (fact, at) in [
            (Fact::Admitted(Operation::Restore), later(10)),
            (
                Fact::Resumed {
                    process: process(),
                    agent,
                },
                later(11),
            ),
        ] {
            record = record.apply(&fact, &at, None).unwrap();
        }
        if agent {
            record = record
                .apply(&Fact::AgentAnswered, &later(12), None)
                .unwrap();
        }
        assert_eq!(record.state(), State::Running);
        let spent = record.ledger().durations_ms(&later(20));
        let running = if agent { 8_000 } else { 9_000 };
        assert_eq!(spent["running"], 1_000 + running);
        assert_eq!(record.current_since().boot_id, "boot-1");
    }
}

#[test]
fn a_standby_that_was_not_wanted_any_more_is_no_failure() {
    let mut facts = running_at(100);
    facts.push((Fact::Admitted(Operation::Standby), 1_000));
    facts.push((Fact::CpusPaused, 1_100));
    facts.push((Fact::StandbyAbandoned { reason: None }, 1_300));
    let record = after(&facts);
    assert_eq!((record.state(), record.operation()), (State::Running, None));
    assert_eq!(record.failure(), None);
}

#[test]
fn an_abandoned_standby_leaves_the_guest_as_it_was_with_the_reason() {
    let abandon = |extra: &[(Fact, u64)]| {
        let mut facts = running_at(100);
        facts.push((Fact::Admitted(Operation::Standby), 1_000));
        facts.extend_from_slice(extra);
        facts.push((
            Fact::StandbyAbandoned {
                reason: Some("disk full".into()),
            },
            1_300,
        ));
        after(&facts)
    };
    for record in [abandon(&[]), abandon(&[(Fact::CpusPaused, 1_100)])] {
        assert_eq!((record.state(), record.operation()), (State::Running, None));
        assert_eq!(record.failure(), Some("disk full"));
        assert!(!record.has_snapshot());
    }
}

#[test]
fn a_committed_snapshot_outlives_a_failed_restore_and_is_given_up_only_on_request() {
    let mut facts = asleep();
    facts.extend([
        (Fact::Admitted(Operation::Restore), 5_000),
        (
            Fact::OperationFailed {
                reason: "state is altered".into(),
            },
            5_100,
        ),
    ]);
    let record = after(&facts);
    assert_eq!(
        (record.state(), record.operation(), record.has_snapshot()),
        (State::Standby, None, true)
    );
    assert_eq!(record.failure(), Some("state is altered"));
    facts.extend([
        (Fact::Admitted(Operation::Start), 6_000),
        (Fact::MemoryDiscarded, 6_010),
    ]);
    let record = after(&facts);
    assert_eq!(record.state(), State::Stopped);
    assert_eq!(record.operation(), Some(Operation::Start));
    assert!(!record.has_snapshot());
}

#[test]
fn a_vmm_that_dies_in_a_standby_is_asleep_after_the_commit_and_stopped_before() {
    let dying = |committed: bool| {
        let mut facts = running_at(100);
        facts.push((Fact::Admitted(Operation::Standby), 1_000));
        facts.push((Fact::CpusPaused, 1_100));
        if committed {
            facts.push((Fact::SnapshotCommitted, 1_150));
        }
        facts.push((
            Fact::MachineGone {
                failure: Some("died".into()),
            },
            1_200,
        ));
        after(&facts)
    };
    let before = dying(false);
    assert_eq!((before.state(), before.operation()), (State::Stopped, None));
    let after = dying(true);
    assert_eq!((after.state(), after.operation()), (State::Standby, None));
    assert_eq!(after.failure(), None);
}

#[test]
fn a_record_of_the_first_version_still_loads() {
    let mut value = serde_json::to_value(after(&running_at(100))).unwrap();
    let fields = value.as_object_mut().unwrap();
    fields.insert("version".into(), 1.into());
    for newer in ["snapshot", "restores"] {
        fields.remove(newer).unwrap();
    }
    for newer in ["estimated_us", "transitions", "transitions_total"] {
        fields["ledger"]
            .as_object_mut()
            .unwrap()
            .remove(newer)
            .unwrap();
    }
    fields["boot"]
        .as_object_mut()
        .unwrap()
        .remove("proof")
        .unwrap();
    let record: Record = serde_json::from_value(value).unwrap();
    record.check_version().unwrap();
    assert_eq!(record.state(), State::Running);
    assert!(!record.has_snapshot() && !record.awaits_answer());
}

#[test]
fn a_vmm_found_gone_is_booked_to_its_last_proof_of_life_and_the_rest_told_apart() {
    let mut facts = running_at(100);
    facts.push((
        Fact::MachineFoundGone {
            failure: Some("gone".into()),
            last_seen: stamp(0, 4_000_000, 0),
        },
        10_000,
    ));
    let record = after(&facts);
    assert_eq!(record.state(), State::Stopped);
    let spent = record.ledger().durations_ms(&stamp(0, 12_000_000, 0));
    assert_eq!((spent["running"], spent["stopped"]), (3_900, 8_000));
    // Only what nobody saw: since it was found, it is known.
    assert_eq!(
        record.ledger().estimated_ms(),
        BTreeMap::from([("stopped", 6_000)])
    );
}

#[test]
fn the_last_transitions_explain_the_sums() {
    let record = after(&asleep());
    let told: Vec<_> = record
        .ledger()
        .transitions()
        .map(|t| (t.from, t.to, t.at.boottime_us / 1000, t.cause))
        .collect();
    assert_eq!(
        told,
        [
            (State::Created, State::Initializing, 0, Cause::User),
            (State::Initializing, State::Running, 100, Cause::Guest),
            (State::Running, State::Paused, 1_100, Cause::User),
            (State::Paused, State::Standby, 1_160, Cause::Guest),
        ]
    );
    assert_eq!(record.ledger().transitions_total(), 4);
}

#[test]
fn only_the_newest_transitions_are_kept_and_all_are_counted() {
    let mut record = after(&asleep());
    let at = stamp(0, 2_000_000, 0);
    let cycle = [
        Fact::Admitted(Operation::Restore),
        Fact::Resumed {
            process: process(),
            agent: false,
        },
        Fact::Admitted(Operation::Standby),
        Fact::CpusPaused,
        Fact::SnapshotCommitted,
        Fact::MachineGone { failure: None },
    ];
    for fact in cycle.iter().cycle().take(cycle.len() * 100) {
        record = record.apply(fact, &at, Some(Cause::AutoStandby)).unwrap();
    }
    assert_eq!(record.ledger().transitions().len(), KEPT_TRANSITIONS);
    assert!(record.ledger().transitions_total() > 300);
    assert!(
        record
            .ledger()
            .transitions()
            .all(|t| t.cause == Cause::AutoStandby)
    );
}

#[test]
fn a_files_time_becomes_a_moment_of_the_ledger_within_what_is_known() {
    let record = after(&running_at(1_000));
    let ledger = record.ledger();
    let now = stamp(0, 10_000_000, 9_000_000);
    assert_eq!(ledger.moment(3_000_000, &now).boottime_us, 4_000_000);
    assert_eq!(ledger.moment(-5, &now), *ledger.since());
    assert_eq!(ledger.moment(i64::MAX, &now), now);
    // After a reboot only the wall clock compares.
    let rebooted = stamp(1, 5, 7_000_000);
    assert_eq!(ledger.moment(3_000_000, &rebooted).boot_id, "boot-0");
    assert_eq!(ledger.moment(8_000_000, &rebooted), rebooted);
}

#[test]
fn a_fork_begins_a_ledger_of_its_own_and_wakes_as_what_its_source_was() {
    let source = sleeper();
    let spent = |record: &Record, at| record.ledger().durations_ms(&stamp(9, at, 0));
    let mut fork = Record::forking(Some(&source), stamp(9, 1_000, 0));
    assert_eq!(
        (fork.state(), fork.operation()),
        (State::Created, Some(Operation::Fork))
    );
    assert!(spent(&fork, 5_000).keys().eq([&State::Created.phase()]));
    let apply =
        |record: &Record, fact: Fact, us| record.apply(&fact, &stamp(9, us, 0), None).unwrap();
    let resting = apply(&fork, Fact::Forked, 2_000);
    assert_eq!(
        (resting.state(), resting.has_snapshot()),
        (State::Standby, true)
    );
    fork = apply(
        &fork,
        Fact::Resumed {
            process: process(),
            agent: true,
        },
        3_000,
    );
    assert_eq!(fork.state(), State::Initializing);
    assert!(fork.awaits_answer() && !fork.has_snapshot());
    fork = apply(&fork, Fact::AgentAnswered, 4_000);
    assert_eq!((fork.state(), fork.operation()), (State::Running, None));
    assert_eq!(spent(&fork, 9_000)["running"], 5);
}

#[test]
fn a_fork_that_fails_is_deleted_also_after_a_crash() {
    for source in [None, Some(&sleeper())] {
        let fork = Record::forking(source, stamp(0, 0, 0));
        let failed = Fact::OperationFailed {
            reason: "no".into(),
        };
        let failed = fork.apply(&failed, &stamp(0, 1, 0), None).unwrap();
        assert_eq!(failed.operation(), Some(Operation::Delete));
    }
}

#[test]
fn a_snapshot_of_a_running_guest_books_its_pause_and_leaves_it_as_it_was() {
    let record = after(&[
        (Fact::MachineSpawned(process()), 0),
        (Fact::CpusStarted { agent: false }, 0),
        (Fact::ProgramStarted, 0),
        (Fact::Admitted(Operation::Snapshot), 100),
        (Fact::CpusPaused, 110),
        (Fact::GuestContinued, 125),
    ]);
    assert_eq!((record.state(), record.operation()), (State::Running, None));
    assert!(!record.has_snapshot() && record.failure().is_none());
    assert_eq!(
        record.ledger().durations_ms(&stamp(0, 200_000, 0))["paused"],
        15
    );
}

#[test]
fn a_rollback_replaces_what_the_instance_remembers() {
    let running = after(&[
        (Fact::MachineSpawned(process()), 0),
        (Fact::CpusStarted { agent: false }, 0),
        (Fact::ProgramStarted, 0),
        (Fact::Admitted(Operation::Rollback), 100),
    ]);
    let at = stamp(0, 200_000, 0);
    let back = Fact::RolledBack {
        memory_of: Some(Box::new(sleeper())),
    };
    assert!(
        running.apply(&back, &at, None).is_err(),
        "its machine is still there"
    );
    let gone = running
        .apply(&Fact::MachineGone { failure: None }, &at, None)
        .unwrap();
    let asleep = gone.apply(&back, &at, None).unwrap();
    assert_eq!(
        (asleep.state(), asleep.has_snapshot()),
        (State::Standby, true)
    );
    let stopped = gone
        .apply(&Fact::RolledBack { memory_of: None }, &at, None)
        .unwrap();
    assert_eq!(
        (stopped.state(), stopped.has_snapshot()),
        (State::Stopped, false)
    );
    assert_eq!(stopped.operation(), None);
}

/// The record as a stream may bring it: valid JSON, and nothing in it true.
fn forged(record: &Record, moment: &Stamp) -> Record {
    let mut told = serde_json::to_value(record).unwrap();
    let moment = serde_json::to_value(moment).unwrap();
    for field in ["program_started", "agent_ready"] {
        told["boot"][field] = moment.clone();
    }
    told["ledger"]["since"] = moment;
    told["ledger"]["committed_us"] = serde_json::json!({"Running": u64::MAX});
    told["ledger"]["estimated_us"] = serde_json::json!({"Running": u64::MAX});
    told["ledger"]["transitions_total"] = u64::MAX.into();
    told["boots"] = u64::MAX.into();
    told["restores"] = u64::MAX.into();
    serde_json::from_value(told).unwrap()
}

#[test]
fn the_moments_of_a_record_from_elsewhere_are_not_believed() {
    for moment in [
        // This host's boot, later than all that will be; its past; another host's; the ends of the scale.
        stamp(9, u64::MAX, i64::MAX),
        stamp(9, 0, 0),
        stamp(7, 4_600_000_000_000_000, 4_600_000_000_000_000),
        stamp(9, u64::MAX, i64::MIN),
    ] {
        let told = forged(&sleeper(), &moment);
        let at = |us| stamp(9, us, 1_700_000_000_000_000);
        let kept = told.from_outside(true, &at(500_000));
        assert_eq!(
            kept.ledger()
                .durations_ms(&at(500_000))
                .values()
                .sum::<u64>(),
            0
        );
        assert!(kept.ledger().estimated_ms().is_empty());
        assert_eq!((kept.boots(), kept.restores()), (1, 0));
        // Also of what an earlier program had taken in as it was.
        for source in [&told, &kept] {
            let fork = Record::forking(Some(source), at(1_000_000));
            let resumed = Fact::Resumed {
                process: process(),
                agent: true,
            };
            let fork = fork.apply(&resumed, &at(2_000_000), None).unwrap();
            let fork = fork
                .apply(&Fact::AgentAnswered, &at(3_000_000), None)
                .unwrap();
            assert_eq!(fork.state(), State::Running);
            let spent = fork.ledger().durations_ms(&at(9_000_000));
            let expected = [
                ("created", 1_000),
                ("initializing", 1_000),
                ("running", 6_000),
            ];
            assert_eq!(spent, BTreeMap::from(expected), "{moment:?}");
            assert!(fork.ledger().estimated_ms().is_empty());
        }
    }
}

#[test]
fn a_guest_that_does_not_answer_runs_when_its_time_is_over() {
    let restored = sleeper();
    let facts = [
        (Fact::Admitted(Operation::Restore), 10_000),
        (
            Fact::Resumed {
                process: process(),
                agent: true,
            },
            20_000,
        ),
        (Fact::AnswerOverdue, 15_020_000),
    ];
    let at = |us| stamp(0, us, 1_600_000_000_000_000);
    let overdue = facts.iter().fold(restored, |record, (fact, us)| {
        record.apply(fact, &at(*us), None).unwrap()
    });
    assert_eq!(overdue.state(), State::Running);
    assert!(overdue.awaits_answer() && !overdue.answer_in_time());
    assert!(
        overdue
            .apply(&Fact::AnswerOverdue, &at(16_000_000), None)
            .is_err()
    );
    let spent = |record: &Record| record.ledger().durations_ms(&at(20_020_000));
    assert_eq!(spent(&overdue)["running"], 5_000);
    assert_eq!(spent(&overdue)["initializing"], 15_000);
    // The answer comes after all: nothing else changes.
    let answered = overdue
        .apply(&Fact::AgentAnswered, &at(18_000_000), None)
        .unwrap();
    assert_eq!(answered.state(), State::Running);
    assert!(!answered.awaits_answer());
    assert_eq!(spent(&answered), spent(&overdue));
}
