//! Against a model that only knows when somebody was there, on random histories.
#![allow(clippy::unwrap_used, reason = "tests")]
use proptest::prelude::*;

use super::*;

fn at(us: u64) -> Stamp {
    Stamp {
        boot_id: "b".into(),
        boottime_us: us,
        wall_us: 1_000_000 + i64::try_from(us).unwrap(),
    }
}

fn policy(idle_timeout: Duration) -> Policy {
    Policy::Enabled(EnabledPolicy {
        idle_timeout,
        ignore_source_cidrs: vec![],
        ignore_destination_ports: vec![],
        max_flow_idle: None,
    })
}

fn facts<'a>(policy: &'a Policy, running_since: &'a Stamp, seen: Seen) -> Facts<'a> {
    Facts {
        supported: true,
        policy: Some(policy),
        reach: Reach::Address,
        running_since: Some(running_since),
        seen: Ok(seen),
    }
}

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn after_the_last_connection_it_is_due_at_the_timeout_and_not_before() {
    let (policy, start) = (policy(TIMEOUT), at(0));
    let busy = Seen {
        connections: 1,
        ..Seen::default()
    };
    let (memory, verdict) = look(
        &Memory::default(),
        &facts(&policy, &start, busy),
        &at(50_000_000),
    );
    assert_eq!(verdict, Verdict::Active(busy));
    assert_eq!(memory.last_activity, Some(at(50_000_000)));
    let quiet = facts(&policy, &start, Seen::default());
    let (memory, verdict) = look(&memory, &quiet, &at(51_000_000));
    assert_eq!(verdict, Verdict::Idle { remaining: TIMEOUT });
    let (memory, verdict) = look(&memory, &quiet, &at(60_999_999));
    assert_eq!(
        verdict,
        Verdict::Idle {
            remaining: Duration::from_micros(1)
        }
    );
    assert!(look(&memory, &quiet, &at(61_000_000)).1.is_due());
}

#[test]
fn what_was_before_it_ran_does_not_count() {
    let policy = policy(TIMEOUT);
    let memory = Memory {
        idle_since: Some(at(0)),
        ..Memory::default()
    };
    let woken = at(100_000_000);
    let quiet = facts(&policy, &woken, Seen::default());
    let (memory, verdict) = look(&memory, &quiet, &at(101_000_000));
    assert_eq!(memory.idle_since, Some(woken.clone()));
    assert_eq!(
        verdict,
        Verdict::Idle {
            remaining: Duration::from_secs(9)
        }
    );
}

#[test]
fn the_first_sight_after_a_restart_lets_the_old_countdown_go_on_and_a_loss_does_not() {
    let (policy, start) = (policy(TIMEOUT), at(0));
    let memory = Memory {
        idle_since: Some(at(5_000_000)),
        ..Memory::default()
    };
    let mut blind = facts(&policy, &start, Seen::default());
    blind.seen = Err(Blind::Resyncing);
    let (kept, verdict) = look(&memory, &blind, &at(20_000_000));
    assert_eq!(verdict, Verdict::Blind(Blind::Resyncing));
    let quiet = facts(&policy, &start, Seen::default());
    assert!(look(&kept, &quiet, &at(20_000_000)).1.is_due());
    blind.seen = Err(Blind::Lost("gone".into()));
    let (lost, _) = look(&memory, &blind, &at(20_000_000));
    let (_, verdict) = look(&lost, &quiet, &at(21_000_000));
    assert_eq!(verdict, Verdict::Idle { remaining: TIMEOUT });
}

#[test]
fn what_is_remembered_survives_writing_and_reading() {
    let memory = Memory {
        idle_since: Some(at(1)),
        last_activity: Some(at(2)),
        hold: Some(Span {
            since: at(3),
            length: TIMEOUT,
        }),
        pause: Some(Span {
            since: at(4),
            length: TIMEOUT,
        }),
    };
    let text = serde_json::to_string(&memory).unwrap();
    let read: Memory = serde_json::from_str(&text).unwrap();
    assert_eq!(
        read,
        Memory {
            pause: None,
            ..memory
        }
    );
}

/// One moment of a history.
#[derive(Debug, Clone)]
struct Moment {
    after: u64,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Seen(Seen),
    Blind(bool),
    Hold(u64),
    Failed(u64),
    Off,
    Asleep,
}

fn moments() -> impl Strategy<Value = Vec<Moment>> {
    let seen =
        (0..2u64, any::<bool>(), 0..2usize).prop_map(|(connections, passed_by, sessions)| {
            What::Seen(Seen {
                connections,
                passed_by,
                sessions,
            })
        });
    let what = prop_oneof![
        8 => Just(What::Seen(Seen::default())),
        3 => seen,
        1 => any::<bool>().prop_map(What::Blind),
        1 => (0..30_000_000u64).prop_map(What::Hold),
        1 => (0..30_000_000u64).prop_map(What::Failed),
        1 => Just(What::Off),
        1 => Just(What::Asleep),
    ];
    let moment = (0..15_000_000u64, what).prop_map(|(after, what)| Moment { after, what });
    proptest::collection::vec(moment, 1..60)
}

proptest! {
    /// Never due unless all was quiet, in sight, running and unheld for the whole timeout; and always
    /// due when it was.
    #[test]
    fn due_exactly_when_quiet_for_long_enough(history in moments()) {
        let on = policy(TIMEOUT);
        let off = Policy::Disabled;
        let timeout = u64::try_from(TIMEOUT.as_micros()).unwrap();
        let (mut memory, mut now) = (Memory::default(), 1_000_000u64);
        let mut running = Some(at(now));
        // The model: the moment from which the countdown runs.
        let mut counting: Option<u64> = None;
        for moment in history {
            now += moment.after;
            let (mut policy, mut seen) = (&on, Ok(Seen::default()));
            match moment.what {
                What::Seen(what) => seen = Ok(what),
                What::Blind(lost) => seen = Err(match lost {
                    true => Blind::Lost("x".into()),
                    false => Blind::Resyncing,
                }),
                What::Hold(length) => {
                    memory.hold = Some(Span { since: at(now), length: Duration::from_micros(length) });
                }
                What::Failed(length) => {
                    memory.pause = Some(Span { since: at(now), length: Duration::from_micros(length) });
                }
                What::Off => policy = &off,
                What::Asleep => running = None,
            }
            let held = |span: &Option<Span>| span.as_ref().map_or(0, |s| {
                s.since.boottime_us + u64::try_from(s.length.as_micros()).unwrap()
            });
            let until = held(&memory.hold).max(held(&memory.pause));
            let now_at = at(now);
            let facts = Facts {
                supported: true,
                policy: Some(policy),
                reach: Reach::Address,
                running_since: running.as_ref(),
                seen: seen.clone(),
            };
            let (next, verdict) = look(&memory, &facts, &now_at);
            // Looking again at the same moment changes nothing, but for one who passed by.
            if !matches!(seen, Ok(Seen { passed_by: true, .. })) {
                prop_assert_eq!(&look(&next, &facts, &now_at), &(next.clone(), verdict.clone()));
            }
            memory = next;
            match (&seen, policy, &running) {
                (_, Policy::Disabled, _) => counting = None,
                (_, _, None) => counting = None,
                (Err(Blind::Lost(_)), ..) => counting = None,
                (Err(Blind::Resyncing), ..) => {}
                (Ok(seen), ..) if seen.connections > 0 || seen.sessions > 0 => counting = None,
                (Ok(seen), ..) if seen.passed_by => counting = Some(now),
                (Ok(_), ..) => counting = counting.or(Some(now)),
            }
            let visible = seen == Ok(Seen::default()) && policy == &on && running.is_some();
            let quiet = counting.is_some_and(|since| now >= since + timeout);
            prop_assert_eq!(
                verdict.is_due(),
                visible && quiet && now >= until,
                "{:?} at {}, counting since {:?}, held until {}", verdict, now, counting, until
            );
            if running.is_none() {
                // It runs again, from this moment on.
                running = Some(at(now));
                counting = memory.idle_since.as_ref().map(|_| now);
            }
        }
    }
}
