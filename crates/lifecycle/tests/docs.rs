//! The tables of docs/lifecycle.md are made from the code; `UPDATE_DOCS=1` rewrites them, otherwise a
//! difference fails.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write,
    path::PathBuf,
};

use doze_lifecycle::{
    Command, Exit, Fact, Operation, ProcessRef, Record, Stamp, State, admission::admit,
};

fn facts() -> Vec<Fact> {
    let process = ProcessRef {
        pid: 1,
        start_ticks: 1,
        boot_id: "b".into(),
    };
    let mut all: Vec<Fact> = Operation::ALL.into_iter().map(Fact::Admitted).collect();
    all.extend([
        Fact::MachineSpawned(process.clone()),
        Fact::CpusStarted { agent: false },
        Fact::ProgramStarted,
        Fact::AgentReady,
        Fact::ProgramExited(Exit {
            code: 0,
            message: String::new(),
        }),
        Fact::GuestPoweredOff,
        Fact::MachineGone { failure: None },
        Fact::MachineFoundGone {
            failure: None,
            last_seen: Stamp {
                boot_id: "b".into(),
                boottime_us: 0,
                wall_us: 0,
            },
        },
        Fact::GuestFoundOff {
            last_seen: Stamp {
                boot_id: "b".into(),
                boottime_us: 0,
                wall_us: 0,
            },
        },
        Fact::OperationFailed { reason: "r".into() },
        Fact::CpusPaused,
        Fact::SnapshotCommitted,
        Fact::StandbyAbandoned {
            reason: Some("r".into()),
        },
        Fact::Resumed {
            process: process.clone(),
            agent: false,
        },
        Fact::AgentAnswered,
        Fact::AnswerOverdue,
        Fact::MemoryLost {
            reason: "r".into(),
            last_seen: Stamp {
                boot_id: "b".into(),
                boottime_us: 0,
                wall_us: 0,
            },
        },
        Fact::MemoryDiscarded,
        Fact::GuestContinued,
        Fact::Forked,
        Fact::RolledBack { memory_of: None },
    ]);
    all
}

fn name(fact: &Fact) -> String {
    match fact {
        Fact::Admitted(operation) => format!("Admitted({})", operation.as_str()),
        other => other.name().to_owned(),
    }
}

type Key = (State, Option<Operation>, bool, bool);

fn key(record: &Record) -> Key {
    (
        record.state(),
        record.operation(),
        record.machine().is_some(),
        record.has_snapshot() && record.state() != State::Standby,
    )
}

fn place((state, operation, machine, snapshot): Key) -> String {
    let operation = operation.map_or(String::new(), |o| format!(", {} in flight", o.as_str()));
    let machine = if machine { ", VMM" } else { "" };
    let snapshot = if snapshot { ", snapshot committed" } else { "" };
    format!("{state}{operation}{machine}{snapshot}")
}

/// Every transition that can be reached from a new instance.
fn transitions() -> String {
    let at = Stamp {
        boot_id: "b".into(),
        boottime_us: 0,
        wall_us: 0,
    };
    let created = Record::creating(at.clone());
    let sleeper = Record::forking(None, at.clone());
    let firsts = [
        created,
        Record::forking(Some(&sleeper), at.clone()),
        sleeper,
    ];
    let mut seen: BTreeMap<_, _> = firsts.iter().map(|r| (key(r), r.clone())).collect();
    let mut queue = VecDeque::from(firsts);
    let mut rows: BTreeMap<Key, BTreeMap<String, String>> = BTreeMap::new();
    while let Some(record) = queue.pop_front() {
        for fact in facts() {
            let Ok(next) = record.apply(&fact, &at, None) else {
                continue;
            };
            let target = place(key(&next));
            rows.entry(key(&record))
                .or_default()
                .insert(name(&fact), target);
            if seen.insert(key(&next), next.clone()).is_none() {
                queue.push_back(next);
            }
        }
    }
    let mut table = String::from("| from | fact | to |\n|---|---|---|\n");
    for (from, targets) in rows {
        for (fact, to) in targets {
            let to = if to == place(from) {
                "(unchanged)".to_owned()
            } else {
                to
            };
            writeln!(table, "| {} | {fact} | {to} |", place(from)).unwrap();
        }
    }
    table
}

fn admissions() -> String {
    let mut table = String::from("| state, operation in flight |");
    for command in Command::ALL {
        write!(table, " {} |", command.as_str()).unwrap();
    }
    table.push_str("\n|---|");
    table.push_str(&"---|".repeat(Command::ALL.len()));
    table.push('\n');
    let rest = State::ALL
        .into_iter()
        .map(|state| (state.to_string(), state, None));
    let busy = Operation::ALL.into_iter().map(|operation| {
        (
            format!("any, {}", operation.as_str()),
            State::Running,
            Some(operation),
        )
    });
    for (label, state, operation) in rest.chain(busy) {
        write!(table, "| {label} |").unwrap();
        for command in Command::ALL {
            write!(table, " {} |", admit(state, operation, command).as_str()).unwrap();
        }
        table.push('\n');
    }
    table
}

fn replace(text: &str, section: &str, table: &str) -> String {
    let (begin, end) = (
        format!("<!-- {section} -->\n"),
        format!("<!-- end {section} -->"),
    );
    let start = text.find(&begin).expect("the section's begin") + begin.len();
    let stop = text.find(&end).expect("the section's end");
    format!("{}{table}{}", &text[..start], &text[stop..])
}

#[test]
fn the_tables_of_the_documentation_are_those_of_the_code() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/lifecycle.md");
    let text = std::fs::read_to_string(&path).expect("docs/lifecycle.md");
    let updated = replace(&text, "transitions", &transitions());
    let updated = replace(&updated, "admission", &admissions());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, updated).expect("writing docs/lifecycle.md");
    } else {
        assert!(
            text == updated,
            "docs/lifecycle.md is stale; run: UPDATE_DOCS=1 cargo test -p doze-lifecycle --test docs"
        );
    }
}
