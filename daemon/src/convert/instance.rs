//! From the engine's view of an instance to the wire.
use std::collections::BTreeMap;

use doze_api::{
    Hypervisor, Instance, InstanceNetwork, InstancePhases, InstanceState, PhaseTransition,
    WaitForStateResponse, format_size,
};
use doze_engine::{InstanceView, WaitOutcome};
use doze_lifecycle::{Stamp, State, Transition};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// Of a restored instance whose agent says nothing: Initializing at first, Running when its time is over.
const UNANSWERED: &str = "the guest runs again, but its agent has not answered yet";

/// One consistent answer: state, phase and durations come from the same record and moment.
pub(crate) fn instance(view: &InstanceView, now: &Stamp) -> Instance {
    let spec = &view.spec;
    let record = &view.record;
    let exit = record.exit();
    Instance {
        id: view.id.clone(),
        name: view.name.clone(),
        image: spec.image.clone(),
        state: match view.unknown {
            Some(_) => InstanceState::Unknown,
            None => state(view.state()),
        },
        state_error: view.unknown.clone(),
        failure: record
            .failure()
            .or_else(|| record.awaits_answer().then_some(UNANSWERED))
            .map(str::to_owned),
        created_at: timestamp(view.created_at_us),
        started_at: record.started_at_us().map(timestamp),
        stopped_at: record.stopped_at_us().map(timestamp),
        expires_at: None,
        // `Unknown` is a diagnosis, not a phase: the last one goes on.
        current_phase: Some(view.state().phase().to_owned()),
        current_phase_since: Some(timestamp(record.current_since().wall_us)),
        phase_durations_ms: owned(view.phase_durations_ms(now)),
        phase_durations_estimated_ms: owned(record.ledger().estimated_ms()),
        has_snapshot: record.has_snapshot(),
        exit_code: exit.map(|exit| exit.code),
        exit_message: exit
            .map(|exit| exit.message.clone())
            .filter(|message| !message.is_empty())
            .or_else(|| ended_without_exit(view)),
        platform: Some(spec.platform.clone()),
        hypervisor: Some(hypervisor(spec.hypervisor)),
        vcpus: Some(spec.vcpus),
        size: Some(format_size(spec.memory_bytes)),
        overlay_size: Some(format_size(spec.overlay_bytes)),
        network: Some(InstanceNetwork {
            enabled: spec.network_enabled,
            name: spec.network_enabled.then(|| "default".to_owned()),
            ip: view.network.as_ref().map(|claim| claim.ip.to_string()),
            mac: view.network.as_ref().map(|claim| claim.mac.clone()),
        }),
        env: spec.env.clone(),
        tags: spec.tags.clone(),
        volumes: Vec::new(),
        auto_standby: spec.auto_standby.as_ref().map(super::auto_standby::shown),
        snapshot_policy: (spec.snapshot_policy.as_ref()).map(super::compression::shown_policy),
        standby_compression: super::compression::of_instance(view),
    }
}

/// The ledger, whole.
pub(crate) fn phases(view: &InstanceView, now: &Stamp) -> InstancePhases {
    let ledger = view.record.ledger();
    InstancePhases {
        id: view.id.clone(),
        name: view.name.clone(),
        current_phase: view.state().phase().to_owned(),
        current_phase_since: timestamp(ledger.since().wall_us),
        phase_durations_ms: owned(ledger.durations_ms(now)),
        phase_durations_estimated_ms: owned(ledger.estimated_ms()),
        transitions: ledger.transitions().map(transition).collect(),
        transitions_total: ledger.transitions_total(),
    }
}

fn transition(transition: &Transition) -> PhaseTransition {
    PhaseTransition {
        at: timestamp(transition.at.wall_us),
        from: transition.from.phase().to_owned(),
        to: transition.to.phase().to_owned(),
        cause: transition.cause.as_str().to_owned(),
    }
}

fn owned(durations: BTreeMap<&'static str, u64>) -> BTreeMap<String, u64> {
    durations
        .into_iter()
        .map(|(phase, ms)| (phase.to_owned(), ms))
        .collect()
}

pub(crate) fn wait_outcome(outcome: WaitOutcome) -> WaitForStateResponse {
    WaitForStateResponse {
        state: match outcome.unknown {
            Some(_) => InstanceState::Unknown,
            None => state(outcome.state),
        },
        timed_out: outcome.timed_out,
        state_error: outcome.unknown,
    }
}

pub(crate) fn state(state: State) -> InstanceState {
    match state {
        State::Created => InstanceState::Created,
        State::Initializing => InstanceState::Initializing,
        State::Running => InstanceState::Running,
        State::Paused => InstanceState::Paused,
        State::Shutdown => InstanceState::Shutdown,
        State::Stopped => InstanceState::Stopped,
        State::Standby => InstanceState::Standby,
    }
}

/// `None` for `Unknown`, which nothing can be told to reach.
pub(crate) fn target_state(state: InstanceState) -> Option<State> {
    match state {
        InstanceState::Created => Some(State::Created),
        InstanceState::Initializing => Some(State::Initializing),
        InstanceState::Running => Some(State::Running),
        InstanceState::Paused => Some(State::Paused),
        InstanceState::Shutdown => Some(State::Shutdown),
        InstanceState::Stopped => Some(State::Stopped),
        InstanceState::Standby => Some(State::Standby),
        InstanceState::Unknown => None,
    }
}

pub(crate) fn hypervisor(hypervisor: doze_vmm::Hypervisor) -> Hypervisor {
    match hypervisor {
        doze_vmm::Hypervisor::Qemu => Hypervisor::Qemu,
        doze_vmm::Hypervisor::QemuMicrovm => Hypervisor::QemuMicrovm,
        doze_vmm::Hypervisor::CloudHypervisor => Hypervisor::CloudHypervisor,
        doze_vmm::Hypervisor::Firecracker => Hypervisor::Firecracker,
    }
}

/// RFC 3339 in UTC. A clock beyond the year 9999 says the last moment that can be written.
pub(crate) fn timestamp(wall_us: i64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(wall_us) * 1000)
        .ok()
        .and_then(|moment| moment.format(&Rfc3339).ok())
        .unwrap_or_else(|| "9999-12-31T23:59:59Z".to_owned())
}

/// Why it is Stopped, when its program left no exit: a monitor that died, a guest that never booted.
fn ended_without_exit(view: &InstanceView) -> Option<String> {
    let record = &view.record;
    (view.state() == State::Stopped && record.exit().is_none())
        .then(|| record.failure().map(str::to_owned))
        .flatten()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]
    use std::{collections::BTreeMap, sync::Arc};

    use doze_engine::{InstanceSpec, NetworkClaim};
    use doze_lifecycle::{Fact, Record};

    use super::*;

    fn stamp(seconds: u64) -> Stamp {
        Stamp {
            boot_id: "boot".to_owned(),
            boottime_us: seconds * 1_000_000,
            wall_us: 1_700_000_000_000_000 + i64::try_from(seconds).unwrap() * 1_000_000,
        }
    }

    fn view(record: Record) -> InstanceView {
        InstanceView {
            id: "a".repeat(24),
            name: "web".to_owned(),
            created_at_us: 1_700_000_000_123_456,
            spec: Arc::new(InstanceSpec {
                image: "docker.io/library/alpine:latest".to_owned(),
                image_digest: "sha256:0".to_owned(),
                platform: "linux/amd64".to_owned(),
                hypervisor: doze_vmm::Hypervisor::QemuMicrovm,
                vcpus: 2,
                memory_bytes: 1 << 30,
                overlay_bytes: 10 << 30,
                env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
                entrypoint: None,
                cmd: None,
                tags: BTreeMap::new(),
                network_enabled: true,
                skip_guest_agent: false,
                auto_standby: None,
                snapshot_policy: None,
            }),
            network: Some(NetworkClaim {
                ip: "10.77.0.2".parse().unwrap(),
                mac: "52:54:00:00:00:01".to_owned(),
                tap: "dz0".to_owned(),
            }),
            record: Arc::new(record),
            compression: None,
            compressing: None,
            unknown: None,
        }
    }

    #[test]
    fn an_answer_is_complete_and_agrees_with_itself() {
        let answer = instance(&view(Record::creating(stamp(0))), &stamp(2));
        let json = serde_json::to_value(&answer).unwrap();
        assert_eq!(json["state"], "Created");
        assert_eq!(json["current_phase"], "created");
        assert_eq!(json["current_phase_since"], "2023-11-14T22:13:20Z");
        assert_eq!(json["phase_durations_ms"]["created"], 2000);
        assert_eq!(json["created_at"], "2023-11-14T22:13:20.123456Z");
        assert_eq!(json["size"], "1GB");
        assert_eq!(json["overlay_size"], "10GB");
        assert_eq!(json["hypervisor"], "qemu-microvm");
        assert_eq!(json["network"]["name"], "default");
        assert_eq!(json["network"]["ip"], "10.77.0.2");
        assert_eq!(json["has_snapshot"], false);
        // Fields the contract calls nullable are there, with null.
        for field in [
            "expires_at",
            "exit_code",
            "started_at",
            "stopped_at",
            "state_error",
        ] {
            assert!(json.as_object().unwrap()[field].is_null(), "{field}");
        }
        assert!(json.get("exit_message").is_none());
    }

    #[test]
    fn unknown_is_a_diagnosis_and_the_phase_goes_on() {
        let mut view = view(Record::creating(stamp(0)));
        view.unknown = Some("the monitor does not answer".to_owned());
        let answer = instance(&view, &stamp(1));
        assert_eq!(answer.state, InstanceState::Unknown);
        assert_eq!(answer.current_phase.as_deref(), Some("created"));
        assert_eq!(
            answer.state_error.as_deref(),
            Some("the monitor does not answer")
        );
    }

    #[test]
    fn a_stopped_one_has_been_accounted() {
        let record = Record::stopped(stamp(0));
        let record = record
            .apply(
                &Fact::Admitted(doze_lifecycle::Operation::Start),
                &stamp(1),
                None,
            )
            .unwrap();
        let answer = instance(&view(record), &stamp(5));
        assert_eq!(
            answer.current_phase.as_deref(),
            Some(answer.state.as_str().to_lowercase().as_str())
        );
        assert_eq!(answer.phase_durations_ms.values().sum::<u64>(), 5000);
    }

    #[test]
    fn times_beyond_the_calendar_are_still_times() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(timestamp(-1), "1969-12-31T23:59:59.999999Z");
        assert_eq!(timestamp(i64::MAX), "9999-12-31T23:59:59Z");
    }
}
