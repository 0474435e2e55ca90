//! Snapshots and forks, from the wire to the engine and back.
//!
//! A request is checked in two steps: first what can be said without looking at anything, then, with the snapshot
//! at hand, whether the target fits what it holds.
use doze_api::{
    CompressionState, CreateSnapshotRequest, ForkInstanceRequest, ForkSnapshotRequest,
    RestoreSnapshotRequest,
};
use doze_engine::{
    ForkRequest, Progress, Revival, Snapshot, SnapshotKind, SnapshotRequest, TargetState,
};
use doze_lifecycle::State;
use doze_vmm::Hypervisor;

use super::{
    compression,
    create::{self, Collector},
    fields::{self, Checked},
    instance::{self, timestamp},
};
use crate::http::errors::ApiError;

/// A request to keep a moment.
pub(crate) fn create(request: CreateSnapshotRequest) -> Checked<SnapshotRequest> {
    let mut complaints = Vec::new();
    let mut keep = Collector(&mut complaints);
    let kind = kind(request.kind);
    let name = request.name.as_deref();
    keep.checked(name.map_or(Ok(()), |name| fields::label("name", name, fields::MAX_NAME)));
    let compression = keep.checked(request.compression.map_or(Ok(None), |wanted| {
        if wanted.enabled && kind == SnapshotKind::Stopped {
            return Err(fields::invalid(
                "invalid_field",
                "compression.enabled",
                "true",
                "false with the kind Stopped, which has no memory to compress",
            ));
        }
        compression::compression("compression", &wanted).map(Some)
    }));
    let tags = request.tags.unwrap_or_default();
    complaints.extend(fields::tags(&tags));
    match ApiError::all(complaints) {
        Some(error) => Err(error),
        None => Ok(SnapshotRequest {
            kind,
            name: request.name,
            tags,
            compression: compression.flatten(),
        }),
    }
}

/// A request to fork an instance.
pub(crate) fn fork_instance(request: ForkInstanceRequest) -> Checked<ForkRequest> {
    fields::instance_name(&request.name)?;
    Ok(ForkRequest {
        name: request.name,
        from_running: request.from_running.unwrap_or(false),
        target: request.target_state.map(target_state),
    })
}

/// Refuses what a source in this state cannot become. The engine looks again: only it knows the state of the
/// moment of the copy.
pub(crate) fn fits_source(target: Option<TargetState>, source: State) -> Checked<()> {
    match (source, target) {
        (State::Stopped, Some(TargetState::Standby)) => Err(fields::invalid(
            "invalid_field",
            "target_state",
            "Standby",
            "Stopped, Running (a Stopped source has no memory to sleep with)",
        )),
        (State::Stopped, None | Some(TargetState::Stopped | TargetState::Running)) => Ok(()),
        (State::Created | State::Initializing | State::Running, _) => Ok(()),
        (State::Paused | State::Shutdown | State::Standby, _) => Ok(()),
    }
}

/// What a stored snapshot is to become, before anybody looked at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    state: Option<TargetState>,
    hypervisor: Option<Hypervisor>,
}

/// A request to bring an instance back to a snapshot.
pub(crate) fn restore(request: &RestoreSnapshotRequest) -> Checked<Target> {
    Ok(Target {
        state: request.target_state.map(target_state),
        hypervisor: target_hypervisor(request.target_hypervisor)?,
    })
}

/// A request for a new instance from a snapshot: its name and its target.
pub(crate) fn fork_snapshot(request: ForkSnapshotRequest) -> Checked<(String, Target)> {
    let mut complaints = Vec::new();
    let mut keep = Collector(&mut complaints);
    keep.checked(fields::instance_name(&request.name));
    let hypervisor = keep.checked(target_hypervisor(request.target_hypervisor));
    match ApiError::all(complaints) {
        Some(error) => Err(error),
        None => Ok((
            request.name,
            Target {
                state: request.target_state.map(target_state),
                hypervisor: hypervisor.flatten(),
            },
        )),
    }
}

impl Target {
    /// Refuses what a snapshot of this kind cannot become.
    pub(crate) fn of(self, kind: SnapshotKind) -> Checked<Revival> {
        let mut complaints = Vec::new();
        match (kind, self.state) {
            (SnapshotKind::Stopped, Some(TargetState::Standby)) => {
                complaints.push(fields::invalid(
                    "invalid_field",
                    "target_state",
                    "Standby",
                    "Stopped, Running (a Stopped snapshot has no memory to sleep with)",
                ))
            }
            (SnapshotKind::Stopped, None | Some(TargetState::Stopped | TargetState::Running))
            | (SnapshotKind::Standby, _) => {}
        }
        match (kind, self.hypervisor) {
            (SnapshotKind::Standby, Some(hypervisor)) => complaints.push(fields::invalid(
                "invalid_field",
                "target_hypervisor",
                instance::hypervisor(hypervisor),
                "none with a Standby snapshot, whose memory only its own monitor can read",
            )),
            (SnapshotKind::Standby, None) | (SnapshotKind::Stopped, _) => {}
        }
        match ApiError::all(complaints) {
            Some(error) => Err(error),
            None => Ok(Revival {
                target: self.state,
                hypervisor: self.hypervisor,
            }),
        }
    }
}

fn target_hypervisor(wanted: Option<doze_api::Hypervisor>) -> Checked<Option<Hypervisor>> {
    wanted
        .map(|wanted| create::hypervisor("target_hypervisor", wanted))
        .transpose()
}

pub(crate) fn kind(kind: doze_api::SnapshotKind) -> SnapshotKind {
    match kind {
        doze_api::SnapshotKind::Standby => SnapshotKind::Standby,
        doze_api::SnapshotKind::Stopped => SnapshotKind::Stopped,
    }
}

fn wire_kind(kind: SnapshotKind) -> doze_api::SnapshotKind {
    match kind {
        SnapshotKind::Standby => doze_api::SnapshotKind::Standby,
        SnapshotKind::Stopped => doze_api::SnapshotKind::Stopped,
    }
}

fn target_state(state: doze_api::TargetState) -> TargetState {
    match state {
        doze_api::TargetState::Stopped => TargetState::Stopped,
        doze_api::TargetState::Standby => TargetState::Standby,
        doze_api::TargetState::Running => TargetState::Running,
    }
}

/// `allocated`: bytes of disk its files hold.
pub(crate) fn snapshot(snapshot: &Snapshot, allocated: u64) -> doze_api::Snapshot {
    let kept = snapshot.compression.as_ref();
    doze_api::Snapshot {
        id: snapshot.id.clone(),
        name: snapshot.name.clone(),
        kind: wire_kind(snapshot.kind),
        source_instance_id: snapshot.source_id.clone(),
        source_instance_name: snapshot.source_name.clone(),
        source_hypervisor: instance::hypervisor(snapshot.hypervisor()),
        created_at: timestamp(snapshot.created_at_us),
        size_bytes: snapshot.size_bytes,
        allocated_bytes: Some(allocated),
        scheduled: snapshot.scheduled,
        tags: snapshot.tags.clone(),
        compression: kept.map(|kept| compression::shown(kept.codec)),
        compression_state: Some(match kept.map(|kept| &kept.progress) {
            None => CompressionState::None,
            Some(Progress::Planned) => CompressionState::Compressing,
            Some(Progress::Compressed { .. }) => CompressionState::Compressed,
            Some(Progress::Failed { .. }) => CompressionState::Error,
        }),
        compression_error: kept.and_then(compression::error),
        compressed_size_bytes: kept.and_then(compression::compressed_size),
        uncompressed_size_bytes: match snapshot.kind {
            SnapshotKind::Standby => Some(snapshot.memory_bytes),
            SnapshotKind::Stopped => None,
        },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use serde_json::{Value, json};

    use super::*;

    fn convert(body: Value) -> Checked<SnapshotRequest> {
        create(serde_json::from_value(body).unwrap())
    }

    #[test]
    fn a_request_arrives_whole() {
        let request = convert(json!({
            "kind": "Standby", "name": "before-upgrade", "tags": {"t": "v"}, "compression": {"enabled": false},
        }))
        .unwrap();
        assert_eq!(request.kind, SnapshotKind::Standby);
        assert_eq!(request.name.as_deref(), Some("before-upgrade"));
        assert_eq!(request.tags["t"], "v");
        // Not compressing asks for nothing, whatever the kind.
        let request = convert(json!({"kind": "Stopped", "compression": {"enabled": false}}));
        assert_eq!(request.unwrap().name, None);
    }

    #[test]
    fn compression_is_for_what_has_memory() {
        let compression = json!({"enabled": true, "algorithm": "lz4"});
        let request = json!({"kind": "Stopped", "compression": compression});
        let error = convert(request).unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        assert!(error.body.message.starts_with("compression.enabled: "));
        let request = convert(json!({"kind": "Standby", "compression": compression})).unwrap();
        let Some(doze_engine::Compression::On(codec)) = request.compression else {
            panic!("{request:?}");
        };
        assert_eq!(
            (codec.algorithm(), codec.level()),
            (doze_engine::Algorithm::Lz4, 0)
        );
    }

    #[test]
    fn all_complaints_about_a_snapshot_come_at_once() {
        let error = convert(json!({
            "kind": "Standby", "name": "-", "tags": {"": "x"}, "compression": {"enabled": true, "level": 20},
        }))
        .unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        assert_eq!(error.body.details.len(), 3, "{:?}", error.body.details);
    }

    #[test]
    fn a_snapshot_becomes_only_what_it_holds() {
        use SnapshotKind as K;
        use TargetState as T;
        let target = |state| Target {
            state,
            hypervisor: None,
        };
        for state in [None, Some(T::Stopped), Some(T::Standby), Some(T::Running)] {
            let revival = target(state).of(K::Standby).unwrap();
            assert_eq!((revival.target, revival.hypervisor), (state, None));
        }
        for state in [None, Some(T::Stopped), Some(T::Running)] {
            assert_eq!(target(state).of(K::Stopped).unwrap().target, state);
        }
        let error = target(Some(T::Standby)).of(K::Stopped).unwrap_err();
        assert_eq!(error.body.code, "invalid_field");
        assert!(
            error.body.message.starts_with("target_state: Standby "),
            "{error}"
        );
    }

    #[test]
    fn a_stopped_source_does_not_become_a_sleeping_fork() {
        use TargetState as T;
        for state in State::ALL {
            for target in [None, Some(T::Stopped), Some(T::Standby), Some(T::Running)] {
                let refused = state == State::Stopped && target == Some(T::Standby);
                assert_eq!(
                    fits_source(target, state).is_err(),
                    refused,
                    "{state} {target:?}"
                );
            }
        }
    }

    #[test]
    fn only_a_stopped_snapshot_changes_its_monitor() {
        let request = |hypervisor: &str| RestoreSnapshotRequest {
            target_state: None,
            target_hypervisor: Some(hypervisor.parse().unwrap()),
        };
        let target = restore(&request("qemu")).unwrap();
        let revival = target.of(SnapshotKind::Stopped).unwrap();
        assert_eq!(revival.hypervisor, Some(Hypervisor::Qemu));
        let error = target.of(SnapshotKind::Standby).unwrap_err();
        assert_eq!(error.body.code, "invalid_field");
        assert!(
            error.body.message.starts_with("target_hypervisor: qemu "),
            "{error}"
        );
        let error = restore(&request("vz")).unwrap_err();
        assert_eq!(error.body.code, "not_implemented");
        assert!(
            error.body.message.starts_with("target_hypervisor: vz "),
            "{error}"
        );
    }

    #[test]
    fn forks_need_a_good_name() {
        let fork = |name: &str| {
            fork_instance(ForkInstanceRequest {
                name: name.to_owned(),
                ..ForkInstanceRequest::default()
            })
        };
        let request = fork("web-2").unwrap();
        assert!(!request.from_running);
        assert_eq!(request.target, None);
        assert_eq!(fork("Web").unwrap_err().body.code, "invalid_name");
        let error = fork_snapshot(ForkSnapshotRequest {
            name: "-".to_owned(),
            target_state: None,
            target_hypervisor: Some(doze_api::Hypervisor::Firecracker),
        })
        .unwrap_err();
        assert_eq!(error.body.code, "invalid_name");
        assert_eq!(error.body.details.len(), 2);
    }
}
