//! Those who read and bring streams: slow, gone, and in the way of others.
use std::{
    io::{self, Read, Write},
    time::Duration,
};

use doze_engine::{EngineError, SnapshotFilter, SnapshotKind};

use super::sent;
use crate::{
    commands::{Sink, arrival},
    scenario::When,
};

/// For a delete that nothing holds up, many times over.
const ENOUGH: Duration = Duration::from_millis(500);

#[test]
fn a_reader_that_leaves_ends_the_export() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let sent = sent(SnapshotKind::Standby);
    let engine = sent.here.engine();
    let id = sent.snapshot.id.clone();
    sent.here.run(async {
        let error = engine.export_snapshot(&id, Closed).await.unwrap_err();
        assert!(matches!(error, EngineError::Interrupted { .. }), "{error}");
        // Nobody holds its gate any more.
        engine.delete_snapshot(&id).await.unwrap();
        let error = engine.export_snapshot(&id, Closed).await.unwrap_err();
        assert!(matches!(error, EngineError::NotFound { .. }), "{error}");
    });
}

/// Stands still at its first byte, once, until it is let go.
struct Gated<T> {
    inner: T,
    begun: Option<tokio::sync::oneshot::Sender<()>>,
    go: std::sync::mpsc::Receiver<()>,
}

struct Gate {
    begun: tokio::sync::oneshot::Receiver<()>,
    go: std::sync::mpsc::Sender<()>,
}

fn gated<T>(inner: T) -> (Gated<T>, Gate) {
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (let_go, go) = std::sync::mpsc::channel();
    let gated = Gated {
        inner,
        begun: Some(begun),
        go,
    };
    let gate = Gate {
        begun: has_begun,
        go: let_go,
    };
    (gated, gate)
}

impl<T> Gated<T> {
    fn pass(&mut self) {
        if let Some(begun) = self.begun.take() {
            begun.send(()).unwrap();
            self.go.recv().unwrap();
        }
    }
}

impl<T: Write> Write for Gated<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pass();
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Gated<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.pass();
        self.inner.read(buffer)
    }
}

#[test]
fn a_snapshot_is_not_deleted_while_it_is_exported() {
    let sent = sent(SnapshotKind::Standby);
    let engine = sent.here.engine();
    let id = sent.snapshot.id.clone();
    let sink = Sink::default();
    let (writer, gate) = gated(sink.clone());
    sent.here.run(async {
        let (key, exporting) = (id.clone(), engine.clone());
        let export = tokio::spawn(async move { exporting.export_snapshot(&key, writer).await });
        gate.begun.await.unwrap();
        let (key, deleting) = (id.clone(), engine.clone());
        let mut delete = tokio::spawn(async move { deleting.delete_snapshot(&key).await });
        let early = tokio::time::timeout(ENOUGH, &mut delete).await;
        assert!(early.is_err(), "{early:?}");
        assert!(sent.here.snapshot_dir(&id).join("memory").exists());
        gate.go.send(()).unwrap();
        export.await.unwrap().unwrap();
        delete.await.unwrap().unwrap();
    });
    assert!(!sent.here.snapshot_dir(&id).exists());
    assert!(sink.taken() == sent.stream);
}

#[test]
fn an_import_goes_on_when_its_caller_hangs_up() {
    let sent = sent(SnapshotKind::Standby);
    let there = sent.here.beside();
    let engine = there.engine();
    let (reader, gate) = gated(io::Cursor::new(sent.stream.clone()));
    there.world.state().steps.arm(Vec::new());
    there.run(async {
        let importing = engine.clone();
        let import = tokio::spawn(async move { importing.import_snapshot(reader, None).await });
        gate.begun.await.unwrap();
        import.abort();
        assert!(import.await.unwrap_err().is_cancelled());
        gate.go.send(()).unwrap();
        arrival(&there.world, When::Point("import.recorded")).await;
    });
    there.world.state().steps.disarm();
    assert_eq!(engine.list_snapshots(&SnapshotFilter::default()).len(), 1);
    let captures = there.data_dir().join("captures");
    assert_eq!(std::fs::read_dir(captures).unwrap().count(), 0);
}
