//! `GET /metrics`: counters and gauges in the OpenMetrics text format, which Prometheus reads.
//!
//! The numbers are read when somebody asks; nothing is collected in between.
use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use doze_engine::{AutoStandbyMetrics, CompressionMetrics, MetricsView};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::{AppState, errors::ApiError, extract::QueryReader};

/// OpenMetrics 1.0, "Protocol Negotiation".
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Counters and gauges for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "server", operation_id = "getMetrics",
    responses((status = 200, description = "OpenMetrics text", body = String,
        content_type = "application/openmetrics-text")))]
pub(super) async fn metrics(
    State(state): State<AppState>,
    query: QueryReader,
) -> Result<Response, ApiError> {
    query.finish("none")?;
    let engine = state.engine();
    let look = Look {
        view: engine.metrics(),
        auto_standby: engine.auto_standby_metrics(),
        compression: engine.compression_metrics(),
    };
    let text = render(look)
        .map_err(|error| ApiError::internal(format!("writing the metrics: {error}")))?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response())
}

fn render(look: Look) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(look));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Look {
    view: MetricsView,
    auto_standby: AutoStandbyMetrics,
    compression: CompressionMetrics,
}

impl Collector for Look {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        instances(&self.view, &mut encoder)?;
        phase_seconds(&self.view, &mut encoder)?;
        transitions(&self.view, &mut encoder)?;
        super::metrics_auto_standby::encode(&self.auto_standby, &mut encoder)?;
        super::metrics_compression::encode(&self.compression, &mut encoder)
    }
}

fn instances(view: &MetricsView, encoder: &mut DescriptorEncoder) -> std::fmt::Result {
    let kind = ConstGauge::<i64>::new(0).metric_type();
    let mut family =
        encoder.encode_descriptor("doze_instances", "Instances by state", None, kind)?;
    for (state, count) in &view.instances {
        let gauge = ConstGauge::new(i64::try_from(*count).unwrap_or(i64::MAX));
        gauge.encode(family.encode_family(&[("state", state.phase())])?)?;
    }
    Ok(())
}

fn phase_seconds(view: &MetricsView, encoder: &mut DescriptorEncoder) -> std::fmt::Result {
    let kind = ConstCounter::new(0.0).metric_type();
    let mut family = encoder.encode_descriptor(
        "doze_phase",
        "Time that all instances spent in a phase since the server's start",
        Some(&Unit::Seconds),
        kind,
    )?;
    for (state, us) in &view.phase_us {
        // Whole microseconds up to 2^53 (285 years) are exact.
        let counter = ConstCounter::new(*us as f64 / 1e6);
        counter.encode(family.encode_family(&[("phase", state.phase())])?)?;
    }
    Ok(())
}

fn transitions(view: &MetricsView, encoder: &mut DescriptorEncoder) -> std::fmt::Result {
    let kind = ConstCounter::new(0u64).metric_type();
    let mut family = encoder.encode_descriptor(
        "doze_phase_transitions",
        "Changes of phase since the server's start",
        None,
        kind,
    )?;
    for ((from, to, cause), count) in &view.changes {
        let labels = [
            ("from", from.phase()),
            ("to", to.phase()),
            ("cause", cause.as_str()),
        ];
        ConstCounter::new(*count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use doze_engine::{JobResult, Jobs, Labels, Source};
    use doze_lifecycle::{Cause, State};

    use super::*;

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let view = MetricsView {
            instances: BTreeMap::from([(State::Running, 2)]),
            phase_us: BTreeMap::from([(State::Standby, 1_500_000)]),
            changes: BTreeMap::from([((State::Running, State::Paused, Cause::AutoStandby), 3)]),
        };
        let auto_standby = AutoStandbyMetrics {
            conntrack: Some(doze_host::conntrack::Counters {
                overflows: 1,
                last_resync: std::time::Duration::from_millis(250),
                flows: 7,
                ..Default::default()
            }),
            attempts: BTreeMap::from([("asleep", 4)]),
            errors: BTreeMap::from([("dump", 2)]),
            instances: BTreeMap::from([("active", 5)]),
            connections: 6,
        };
        let labels = Labels {
            algorithm: doze_engine::Algorithm::Zstd,
            level: 3,
            hypervisor: doze_vmm::Hypervisor::QemuMicrovm,
            source: Source::Standby,
        };
        let mut jobs = Jobs {
            planned: 2,
            pending: 1,
            bytes_in: 300,
            ..Jobs::default()
        };
        jobs.ended.insert(JobResult::Success, 1);
        jobs.ratio.counts[3] = 1;
        jobs.ratio.sum = 3.0;
        let compression = CompressionMetrics {
            jobs: BTreeMap::from([(labels, jobs)]),
            preemptions: BTreeMap::from([((labels, "fork"), 5)]),
            preparations: BTreeMap::new(),
        };
        let look = Look {
            view,
            auto_standby,
            compression,
        };
        let text = render(look).unwrap();
        let of = "algorithm=\"zstd\",level=\"3\",hypervisor=\"qemu-microvm\",source=\"standby\"";
        let compression = [
            format!("doze_snapshot_compression_planned_total{{{of}}} 2"),
            format!("doze_snapshot_compression_pending{{{of}}} 1"),
            format!("doze_snapshot_compression_active{{{of}}} 0"),
            format!("doze_snapshot_compression_jobs_total{{{of},result=\"success\"}} 1"),
            format!("doze_snapshot_compression_jobs_total{{{of},result=\"canceled\"}} 0"),
            format!("doze_snapshot_compression_bytes_total{{{of},direction=\"in\"}} 300"),
            format!("doze_snapshot_compression_ratio_sum{{{of}}} 3.0"),
            format!("doze_snapshot_compression_ratio_bucket{{le=\"2.0\",{of}}} 0"),
            format!("doze_snapshot_compression_ratio_bucket{{le=\"+Inf\",{of}}} 1"),
            format!("doze_snapshot_compression_preemptions_total{{{of},operation=\"fork\"}} 5"),
        ];
        for line in compression {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        for line in [
            "# TYPE doze_instances gauge",
            "doze_instances{state=\"running\"} 2",
            "# TYPE doze_phase_seconds counter",
            "doze_phase_seconds_total{phase=\"standby\"} 1.5",
            "doze_phase_transitions_total{from=\"running\",to=\"paused\",cause=\"auto-standby\"} 3",
            "doze_auto_standby_attempts_total{status=\"asleep\"} 4",
            "doze_auto_standby_errors_total{operation=\"dump\"} 2",
            "doze_auto_standby_instances{status=\"active\"} 5",
            "doze_auto_standby_connections 6",
            "doze_conntrack_events_total{result=\"overflow\"} 1",
            "doze_conntrack_resync_seconds{which=\"last\"} 0.25",
            "doze_conntrack_flows 7",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
