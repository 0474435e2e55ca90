//! Snapshots that move between two servers of one world.
use std::{
    collections::BTreeSet,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use doze_engine::{
    EngineError, KillPoint, Revival, Snapshot, SnapshotFilter, SnapshotKind, SnapshotRequest,
    TargetState,
};
use doze_lifecycle::State;

use crate::{
    commands::exported,
    lab::{Lab, PATIENCE, settled},
    steps::{Act, Step},
};

mod callers;
mod forged;

const NAME: &str = "source";

struct Sent {
    here: Lab,
    snapshot: Arc<Snapshot>,
    stream: Vec<u8>,
    counter: u64,
}

/// A server with a running guest and an exported snapshot of it.
fn sent(kind: SnapshotKind) -> Sent {
    let here = Lab::new(false);
    let engine = here.engine();
    here.run(async { engine.create(Lab::request(NAME)).await })
        .unwrap();
    let view = here
        .run(settled(&engine, &here.world, NAME, PATIENCE))
        .unwrap();
    for _ in 0..5 {
        here.world.tick(&view.id);
    }
    let counter = here.world.counter(&view.id).unwrap();
    if kind == SnapshotKind::Stopped {
        here.run(async { engine.stop(NAME).await }).unwrap();
    }
    let request = SnapshotRequest {
        kind,
        name: Some("moving".to_owned()),
        tags: [("team".to_owned(), "a".to_owned())].into(),
        compression: None,
    };
    let snapshot = here
        .run(async { engine.create_snapshot(NAME, request).await })
        .unwrap();
    if kind == SnapshotKind::Standby {
        here.world.tick(&view.id);
    }
    let stream = here.run(exported(&engine, &snapshot.id)).unwrap();
    Sent {
        here,
        snapshot,
        stream,
        counter,
    }
}

fn import(there: &Lab, stream: &[u8], name: Option<&str>) -> Result<Arc<Snapshot>, EngineError> {
    let (engine, reader) = (there.engine(), io::Cursor::new(stream.to_vec()));
    let name = name.map(str::to_owned);
    there.run(async { engine.import_snapshot(reader, name).await })
}

/// All but the record, which is made anew of what can be checked.
fn without_record(snapshot: &Snapshot) -> serde_json::Value {
    let mut all = serde_json::to_value(snapshot).unwrap();
    assert!(all.as_object_mut().unwrap().remove("record").is_some());
    all
}

/// Every file below the data folder that a failed import must not have left.
fn files(lab: &Lab) -> BTreeSet<String> {
    fn walk(dir: &Path, all: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            all.insert(path.display().to_string());
            if path.is_dir() {
                walk(&path, all);
            }
        }
    }
    let mut all = BTreeSet::new();
    for folder in ["boot", "captures", "snapshots", "instances"] {
        walk(&lab.data_dir().join(folder), &mut all);
    }
    all
}

/// The stream with its description changed and everything else as it should be.
fn altered(stream: &[u8], change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut change = Some(change);
    retold(stream, |name, content| {
        if name == "snapshot.json"
            && let Some(change) = change.take()
        {
            let mut told = serde_json::from_slice(content).unwrap();
            change(&mut told);
            *content = serde_json::to_vec(&told).unwrap();
        }
        true
    })
}

fn retold(stream: &[u8], mut change: impl FnMut(&str, &mut Vec<u8>) -> bool) -> Vec<u8> {
    use doze_snapshot::stream::{StreamReader, StreamWriter};
    let mut reader = StreamReader::new(stream).unwrap();
    let mut writer = StreamWriter::new(Vec::new()).unwrap();
    while let Some(header) = reader.next_file().unwrap() {
        let mut content = reader.small(&header, 1 << 30).unwrap();
        if change(&header.name, &mut content) {
            writer.bytes(&header.name, &content).unwrap();
        }
    }
    writer.finish().unwrap()
}

#[test]
fn a_snapshot_with_memory_goes_on_at_another_server() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let imported = import(&there, &sent.stream, None).unwrap();
    assert_ne!(imported.id, sent.snapshot.id);
    let mut expected = (*sent.snapshot).clone();
    expected.id.clone_from(&imported.id);
    // Its manifest says other paths.
    expected.size_bytes = imported.size_bytes;
    assert_eq!(without_record(&imported), without_record(&expected));
    // Nothing in it leads back to where it came from.
    let place = there.data_dir().join("snapshots").join(&imported.id);
    let manifest = std::fs::read_to_string(place.join("snapshot/manifest.json")).unwrap();
    let from = sent.here.data_dir().display().to_string();
    assert!(!manifest.contains(&from), "{manifest}");

    let engine = there.engine();
    for name in ["one", "two"] {
        let revival = Revival::default();
        let fork = there
            .run(async {
                engine
                    .fork_snapshot(&imported.id, name.to_owned(), revival)
                    .await
            })
            .unwrap();
        assert_eq!(fork.state(), State::Running);
        assert_eq!(there.world.counter(&fork.id), Some(sent.counter));
    }
    let violations = there.world.state().violations.clone();
    assert!(violations.is_empty(), "{violations:?}");
}

#[test]
fn a_disk_alone_moves_too() {
    let sent = sent(SnapshotKind::Stopped);
    let there = sent.here.beside();
    let imported = import(&there, &sent.stream, Some("other")).unwrap();
    assert_eq!(imported.name.as_deref(), Some("other"));
    assert_eq!(
        (imported.kind, imported.memory_bytes),
        (SnapshotKind::Stopped, 0)
    );
    let engine = there.engine();
    let revival = Revival {
        target: Some(TargetState::Running),
        hypervisor: None,
    };
    let id = imported.id.clone();
    there
        .run(async move { engine.fork_snapshot(&id, "fork".to_owned(), revival).await })
        .unwrap();
    let overlay = |lab: &Lab, id: &str| {
        std::fs::read(
            lab.data_dir()
                .join("snapshots")
                .join(id)
                .join("overlay.raw"),
        )
        .unwrap()
    };
    assert!(overlay(&sent.here, &sent.snapshot.id) == overlay(&there, &imported.id));
}

#[test]
fn the_same_name_is_refused_and_another_one_is_not() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let first = import(&there, &sent.stream, None).unwrap();
    let before = files(&there);
    let error = import(&there, &sent.stream, None).unwrap_err();
    let EngineError::SnapshotNameTaken { name, holder } = &error else {
        panic!("{error}");
    };
    assert_eq!((name.as_str(), holder), ("moving", &first.id));
    assert_eq!(files(&there), before);
    import(&there, &sent.stream, Some("again")).unwrap();
    // Also on the server that it came from.
    import(&sent.here, &sent.stream, Some("returned")).unwrap();
}

#[test]
fn what_is_cut_or_damaged_leaves_nothing() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let before = files(&there);
    let whole = &sent.stream;
    for part in 0..16 {
        let end = whole.len() * part / 16;
        let error = import(&there, &whole[..end], None).unwrap_err();
        assert!(matches!(error, EngineError::BrokenStream { .. }), "{error}");
        let mut flipped = whole.clone();
        flipped[end] ^= 0x10;
        let error = import(&there, &flipped, None).unwrap_err();
        let refused = matches!(
            error,
            EngineError::BrokenStream { .. } | EngineError::NotImportable { .. }
        );
        assert!(refused, "{error}");
        assert_eq!(files(&there), before, "{part}");
    }
    let error = import(&there, &whole[..whole.len() - 1], None).unwrap_err();
    assert!(error.to_string().contains("cut off"), "{error}");
    // A part that is missing, one that is too many, one that is another one.
    let lacking = retold(whole, |name, _| name != "memory");
    let error = import(&there, &lacking, None).unwrap_err().to_string();
    assert!(error.contains("it brings no memory"), "{error}");
    let longer = retold(whole, |name, content| {
        if name == "overlay.raw" {
            content.push(1);
        }
        true
    });
    let error = import(&there, &longer, None).unwrap_err().to_string();
    assert!(error.contains("its overlay.raw claims"), "{error}");
    for (part, word) in [
        ("kernel", "kernel"),
        ("initramfs", "initramfs"),
        ("state.state", "device state"),
    ] {
        let other = retold(whole, |name, content| {
            if name == part {
                content[0] ^= 1;
            }
            true
        });
        let error = import(&there, &other, None).unwrap_err();
        assert!(matches!(error, EngineError::BrokenStream { .. }), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(files(&there), before);
    let failing = there.run(async {
        let reader = (&whole[..1000]).chain(Failing);
        there
            .engine()
            .import_snapshot(OwnedReader::of(reader), None)
            .await
    });
    let error = failing.unwrap_err().to_string();
    assert!(error.contains("the line is dead"), "{error}");
    assert_eq!(files(&there), before);
    import(&there, whole, None).unwrap();
}

struct Failing;

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other("the line is dead"))
    }
}

/// What a reader gives, and its error.
struct OwnedReader(io::Cursor<Vec<u8>>);

impl OwnedReader {
    fn of(mut reader: impl Read) -> OwnedReader {
        let mut bytes = Vec::new();
        let error = reader.read_to_end(&mut bytes).unwrap_err();
        assert_eq!(error.to_string(), "the line is dead");
        OwnedReader(io::Cursor::new(bytes))
    }
}

impl Read for OwnedReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Failing.read(buffer),
            got => Ok(got),
        }
    }
}

#[test]
fn what_this_host_cannot_use_is_refused_with_the_reason() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let before = files(&there);
    type Change = fn(&mut serde_json::Value);
    let cases: [(&[&str], Change); 9] = [
        (&["9.9.9", "7.2.22"], |told| {
            told["guest"]["manifest"]["monitor_version"] = "9.9.9".into();
        }),
        (&["image", "sha256:00", "doze image import"], |told| {
            let digest = format!("sha256:{}", "0".repeat(64));
            told["snapshot"]["spec"]["image_digest"] = digest.into();
        }),
        (&["root file system", "mkfs.erofs"], |told| {
            told["rootfs"] = format!("sha256:{}", "0".repeat(64)).into();
        }),
        (&["Kvm", "Tcg"], |told| {
            told["guest"]["manifest"]["machine"]["accel"] = "kvm".into();
            told["guest"]["host"]["cpu_flags"] = serde_json::json!(["fpu"]);
        }),
        (&["kHz"], |told| {
            told["guest"]["host"]["tsc_khz"] = 1.into();
        }),
        (&["description", "version 2"], |told| {
            told["version"] = 2.into();
        }),
        (&["vcpus", "limits.max_vcpus_per_instance"], |told| {
            told["snapshot"]["spec"]["vcpus"] = 5.into();
        }),
        (&["overlay", "limits.max_overlay"], |told| {
            told["snapshot"]["spec"]["overlay_bytes"] = (2_u64 << 30).into();
        }),
        (&["record version 99"], |told| {
            told["snapshot"]["record"]["version"] = 99.into();
        }),
    ];
    for (words, change) in cases {
        let error = import(&there, &altered(&sent.stream, change), None).unwrap_err();
        assert!(
            matches!(error, EngineError::NotImportable { .. }),
            "{words:?}: {error}"
        );
        let text = error.to_string();
        assert!(
            words.iter().all(|word| text.contains(word)),
            "{words:?}: {text}"
        );
        assert_eq!(files(&there), before);
    }
}

/// A stream that is whole, but whose description would lead somewhere else.
#[test]
fn what_is_described_is_not_believed() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let before = files(&there);
    type Change = fn(&mut serde_json::Value);
    let cases: [Change; 13] = [
        |told| {
            let disks = told["guest"]["manifest"]["machine"]["disks"].as_array_mut();
            let disks = disks.unwrap();
            let mut more = disks[0].clone();
            more["serial"] = "doze-more".into();
            more["path"] = "/etc/shadow".into();
            disks.push(more);
        },
        |told| told["guest"]["manifest"]["machine"]["disks"][0]["read_only"] = false.into(),
        |told| told["guest"]["manifest"]["machine"]["memory_bytes"] = (1 << 20).into(),
        |told| told["guest"]["manifest"]["memory"]["size"] = (1 << 20).into(),
        |told| told["guest"]["manifest"]["files"][0]["name"] = "../state".into(),
        |told| told["guest"]["manifest"]["files"][0]["name"] = "manifest.json".into(),
        |told| told["guest"]["manifest"]["files"] = serde_json::json!([]),
        |told| told["guest"]["kernel"] = "../../doze.db".into(),
        |told| told["snapshot"]["source_id"] = "../x".into(),
        |told| told["snapshot"]["kind"] = "Stopped".into(),
        |told| told["guest"] = serde_json::Value::Null,
        |told| told["snapshot"]["spec"]["cmd"] = serde_json::json!(["a\0b"]),
        |told| {
            let policy = serde_json::json!({"enabled": {
                "idle_timeout": {"secs": 0, "nanos": 0}, "ignore_source_cidrs": [],
                "ignore_destination_ports": [], "max_flow_idle": null
            }});
            told["snapshot"]["spec"]["auto_standby"] = policy;
        },
    ];
    for (number, change) in cases.into_iter().enumerate() {
        let error = import(&there, &altered(&sent.stream, change), None).unwrap_err();
        let refused = matches!(error, EngineError::BrokenStream { .. });
        assert!(refused, "{number}: {error}");
        assert_eq!(files(&there), before);
    }
    // Paths are not used: the snapshot is as good as it was.
    let elsewhere = altered(&sent.stream, |told| {
        let machine = &mut told["guest"]["manifest"]["machine"];
        for field in ["kernel", "initramfs", "run_dir", "vmm_log", "app_log"] {
            machine[field] = "/etc/passwd".into();
        }
        machine["memory"]["path"] = "/etc/passwd".into();
        for disk in 0..3 {
            machine["disks"][disk]["path"] = "/etc/passwd".into();
        }
    });
    let imported = import(&there, &elsewhere, None).unwrap();
    let engine = there.engine();
    let fork = there
        .run(async {
            let revival = Revival::default();
            engine
                .fork_snapshot(&imported.id, "fork".to_owned(), revival)
                .await
        })
        .unwrap();
    assert_eq!(there.world.counter(&fork.id), Some(sent.counter));
    let place = there.instance_dir(&fork.id).join("snapshot.consumed");
    assert!(!place.exists());
}

#[test]
fn what_its_source_could_not_be_brought_back_to_is_refused() {
    let sent = sent(SnapshotKind::Stopped);
    let networked = altered(&sent.stream, |told| {
        told["snapshot"]["spec"]["network_enabled"] = true.into();
    });
    let error = import(&sent.here, &networked, Some("b")).unwrap_err();
    assert!(
        matches!(error, EngineError::NotImportable { .. }),
        "{error}"
    );
    assert!(error.to_string().contains(NAME), "{error}");
    import(&sent.here.beside(), &networked, None).unwrap();
}

#[test]
fn a_crash_leaves_all_of_it_or_nothing() {
    let sent = sent(SnapshotKind::Standby);
    let reached = |lab: &Lab| {
        lab.engine()
            .list_snapshots(&SnapshotFilter::default())
            .len()
    };
    for (point, kept) in [
        (KillPoint::ImportReceived, 0),
        (KillPoint::ImportPlaced, 0),
        (KillPoint::ImportRecorded, 1),
    ] {
        let mut there = sent.here.beside();
        let step = Step::new(&format!("point {}", point.name()), 1);
        there.world.state().steps.arm(vec![(step, Act::Crash)]);
        assert!(import(&there, &sent.stream, None).is_err());
        there.crash();
        there.open();
        assert_eq!(reached(&there), kept, "{point:?}");
        let folders = |name| {
            let folder = there.data_dir().join(name);
            std::fs::read_dir(folder).unwrap().count()
        };
        assert_eq!((folders("captures"), folders("snapshots")), (0, kept));
        // The same again is as if nothing had happened.
        let again = import(&there, &sent.stream, Some("again")).unwrap();
        let engine = there.engine();
        let fork = there
            .run(async {
                let revival = Revival::default();
                engine
                    .fork_snapshot(&again.id, "fork".to_owned(), revival)
                    .await
            })
            .unwrap();
        assert_eq!(there.world.counter(&fork.id), Some(sent.counter));
    }
}

/// The row is the commit point: what the store refuses is gone, with the boot files that came with it.
#[test]
fn what_the_store_refuses_leaves_nothing() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    // By then the server's own boot files are made.
    import(&there, &sent.stream, Some("first")).unwrap();
    // As on a host with another kernel.
    let boot = there.data_dir().join("boot");
    std::fs::remove_dir_all(&boot).unwrap();
    doze_host::files::create_private_dir(&boot).unwrap();
    let before = files(&there);
    let step = Step::new("before store.commit", 1);
    there.world.state().steps.arm(vec![(step, Act::Refuse)]);
    let error = import(&there, &sent.stream, None).unwrap_err();
    there.world.state().steps.disarm();
    assert!(matches!(error, EngineError::Internal { .. }), "{error}");
    assert_eq!(files(&there), before);
    import(&there, &sent.stream, None).unwrap();
    assert_eq!(std::fs::read_dir(&boot).unwrap().count(), 2);
}
