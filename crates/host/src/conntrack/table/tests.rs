#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use proptest::prelude::*;

use super::*;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

fn flow(port: u16, id: u32, state: Option<TcpState>) -> Flow {
    let original = Tuple {
        source: Ipv4Addr::new(192, 0, 2, 1).into(),
        source_port: port,
        destination: GUEST.into(),
        destination_port: 80,
    };
    Flow {
        id,
        zone: 0,
        protocol: Protocol::Tcp,
        original,
        reply: Tuple {
            source: original.destination,
            source_port: 80,
            destination: original.source,
            destination_port: port,
        },
        state,
        status: Status(8),
        timeout: Some(60),
    }
}

const OPEN: Option<TcpState> = Some(TcpState::Established);
const OVER: Option<TcpState> = Some(TcpState::TimeWait);

fn states(table: &Table) -> Vec<(u16, u32, Option<TcpState>)> {
    let flows = table.flows_to(GUEST.into());
    flows
        .iter()
        .map(|f| (f.original.source_port, f.id, f.state))
        .collect()
}

#[test]
fn a_flow_comes_back_as_it_went_in_and_only_for_its_destination() {
    let mut table = Table::new(10);
    let mut next = flow(1, 1, OPEN);
    next.original.destination = Ipv4Addr::new(10, 77, 0, 3).into();
    let mut v6 = flow(9, 9, OPEN);
    for tuple in [&mut v6.original, &mut v6.reply] {
        tuple.source = "fd00::1".parse().unwrap();
        tuple.destination = "fd00::2".parse().unwrap();
    }
    for flow in [flow(1, 1, OPEN), next, v6] {
        let changed = table.apply(&Event::New(flow));
        assert_eq!(changed, Some(flow.original.destination));
        assert_eq!(table.flows_to(flow.original.destination), [flow]);
    }
    assert_eq!(table.len(), 3);
    assert!(
        table
            .flows_to(Ipv4Addr::new(10, 77, 0, 1).into())
            .is_empty()
    );
    assert_eq!(table.flows_to(GUEST.to_ipv6_mapped().into()).len(), 1);
}

#[test]
fn an_update_about_something_else_keeps_the_state() {
    let mut table = Table::new(10);
    table.apply(&Event::New(flow(1, 1, OPEN)));
    let mut marked = flow(1, 1, None);
    marked.status = Status::ASSURED;
    table.apply(&Event::Update(marked));
    assert_eq!(states(&table), [(1, 1, OPEN)]);
    assert_eq!(table.flows_to(GUEST.into())[0].status, Status::ASSURED);
    // Another flow with the same tuple starts without a past.
    table.apply(&Event::Update(flow(1, 2, None)));
    assert_eq!(states(&table), [(1, 2, None)]);
}

#[test]
fn a_late_end_of_an_earlier_flow_does_not_end_its_successor() {
    let mut table = Table::new(10);
    table.apply(&Event::New(flow(1, 2, OPEN)));
    assert_eq!(table.apply(&Event::Destroy(flow(1, 1, OVER))), None);
    assert_eq!(states(&table), [(1, 2, OPEN)]);
}

#[test]
fn a_dump_does_not_bring_back_what_ended_while_it_ran() {
    let mut table = Table::new(10);
    table.begin_resync();
    table.apply(&Event::Destroy(flow(1, 1, OVER)));
    table.dumped(&flow(1, 1, OPEN));
    // Neither the first of two that ended.
    for id in [1, 2] {
        table.apply(&Event::New(flow(3, id, OPEN)));
        table.apply(&Event::Destroy(flow(3, id, OVER)));
    }
    table.dumped(&flow(3, 1, OPEN));
    // But a successor with the same tuple is another flow.
    table.apply(&Event::Destroy(flow(2, 1, OVER)));
    table.dumped(&flow(2, 7, OPEN));
    assert_eq!(table.finish_resync(), Outcome::Truth);
    assert_eq!(states(&table), [(2, 7, OPEN)]);
}

#[test]
fn a_dump_does_not_undo_what_an_event_said_while_it_ran() {
    let mut table = Table::new(10);
    table.begin_resync();
    table.apply(&Event::Update(flow(1, 1, OVER)));
    table.dumped(&flow(1, 1, OPEN));
    table.dumped(&flow(2, 1, OPEN));
    table.apply(&Event::Update(flow(2, 1, OVER)));
    table.finish_resync();
    assert_eq!(states(&table), [(1, 1, OVER), (2, 1, OVER)]);
}

#[test]
fn an_event_without_state_leaves_the_state_to_the_dump() {
    let mut table = Table::new(10);
    table.apply(&Event::New(flow(1, 1, OPEN)));
    // The change to TIME_WAIT was lost.
    table.begin_resync();
    table.apply(&Event::Update(flow(1, 1, None)));
    table.dumped(&flow(1, 1, OVER));
    table.finish_resync();
    assert_eq!(states(&table), [(1, 1, OVER)]);
}

#[test]
fn what_a_resync_does_not_name_is_gone_and_a_failed_one_drops_nothing() {
    let mut table = Table::new(10);
    table.apply(&Event::New(flow(1, 1, OPEN)));
    table.begin_resync();
    table.abandon_resync();
    assert_eq!(table.len(), 1);
    table.begin_resync();
    table.apply(&Event::New(flow(2, 2, OPEN)));
    table.finish_resync();
    assert_eq!(states(&table), [(2, 2, OPEN)]);
}

#[test]
fn a_full_table_says_so_and_recovers() {
    let mut table = Table::new(2);
    for port in 1..=3 {
        table.apply(&Event::New(flow(port, 1, OPEN)));
    }
    assert!(table.is_full() && table.len() == 2);
    table.begin_resync();
    for port in 1..=3 {
        table.dumped(&flow(port, 1, OPEN));
    }
    assert_eq!(table.finish_resync(), Outcome::Full);
    table.begin_resync();
    table.dumped(&flow(3, 1, OPEN));
    // 1 and 2 still take the room until the resync ends.
    assert_eq!(table.finish_resync(), Outcome::Full);
    table.begin_resync();
    table.dumped(&flow(3, 1, OPEN));
    assert_eq!(table.finish_resync(), Outcome::Truth);
    assert_eq!(states(&table), [(3, 1, OPEN)]);
}

#[test]
fn ends_beyond_the_limit_are_owned_up_to() {
    let mut table = Table::new(10);
    table.begin_resync();
    for id in 0..=u32::try_from(MAX_TOMBSTONES).unwrap() {
        let mut ended = flow(1, id, OVER);
        ended.zone = u16::try_from(id >> 16).unwrap();
        ended.original.source_port = u16::try_from(id & 0xffff).unwrap();
        table.apply(&Event::Destroy(ended));
    }
    assert_eq!(table.finish_resync(), Outcome::SomeOver);
}

/// What happens to a flow in the kernel.
#[derive(Debug, Clone, Copy)]
enum Step {
    Change(u16, u8),
    End(u16),
    /// The dump's cursor moves on by one port.
    Dump,
    /// The reader handles one queued event.
    Read,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_u16..6, 1_u8..9).prop_map(|(port, state)| Step::Change(port, state)),
        (0_u16..6).prop_map(Step::End),
        Just(Step::Dump),
        Just(Step::Read),
    ]
}

proptest! {
    /// A kernel and a reader in any interleaving: before the resync nothing was heard.
    #[test]
    fn any_race_of_a_dump_with_events_ends_in_the_truth(
        lost in prop::collection::vec(step(), 0..20),
        heard in prop::collection::vec(step(), 0..60),
    ) {
        let mut kernel: BTreeMap<u16, Flow> = BTreeMap::new();
        let mut table = Table::new(100);
        let mut ids = 0;
        let mut queue = std::collections::VecDeque::new();
        let mut change = |kernel: &mut BTreeMap<u16, Flow>, step| match step {
            Step::Change(port, state) => {
                let state = Some(TcpState::from_number(state));
                let known = kernel.get(&port).map(|flow| flow.id);
                let id = known.unwrap_or_else(|| { ids += 1; ids });
                let now = flow(port, id, state);
                kernel.insert(port, now);
                Some(if known.is_some() { Event::Update(now) } else { Event::New(now) })
            }
            Step::End(port) => kernel.remove(&port).map(Event::Destroy),
            Step::Dump | Step::Read => None,
        };
        // The table heard every other one of these.
        for (at, step) in lost.into_iter().enumerate() {
            if let Some(event) = change(&mut kernel, step) && at % 2 == 0 {
                table.apply(&event);
            }
        }
        table.begin_resync();
        // The reader reads both in its own time, the dump's pieces in their order.
        let mut pieces = std::collections::VecDeque::new();
        let mut cursor = 0;
        for step in heard {
            match step {
                Step::Dump => {
                    pieces.extend(kernel.get(&cursor).copied());
                    cursor += 1;
                    if let Some(piece) = (cursor % 2 == 0).then(|| pieces.pop_front()).flatten() {
                        table.dumped(&piece);
                    }
                }
                Step::Read => if let Some(event) = queue.pop_front() { table.apply(&event); },
                step => queue.extend(change(&mut kernel, step)),
            }
        }
        for port in cursor..6 {
            pieces.extend(kernel.get(&port).copied());
        }
        for piece in pieces {
            table.dumped(&piece);
        }
        prop_assert_eq!(table.finish_resync(), Outcome::Truth);
        for event in queue {
            table.apply(&event);
        }
        let known = table.flows_to(GUEST.into());
        prop_assert_eq!(known, kernel.values().copied().collect::<Vec<_>>());
    }
}
