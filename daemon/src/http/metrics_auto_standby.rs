//! The part of `GET /metrics` that is about automatic standby and what it sees of connections.
use std::collections::BTreeMap;

use doze_engine::AutoStandbyMetrics;
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

pub(super) fn encode(
    metrics: &AutoStandbyMetrics,
    encoder: &mut DescriptorEncoder,
) -> std::fmt::Result {
    counters(
        encoder,
        (
            "doze_auto_standby_attempts",
            "Standbys that auto-standby asked for, by how they ended",
        ),
        "status",
        &metrics.attempts,
    )?;
    counters(
        encoder,
        (
            "doze_auto_standby_errors",
            "Errors of auto-standby, by what failed; each counts as busy",
        ),
        "operation",
        &metrics.errors,
    )?;
    instances(&metrics.instances, encoder)?;
    gauge(
        encoder,
        "doze_auto_standby_connections",
        "Connections that keep instances awake",
        metrics.connections,
    )?;
    let Some(conntrack) = &metrics.conntrack else {
        return Ok(());
    };
    let events = BTreeMap::from([
        ("new", conntrack.new),
        ("update", conntrack.update),
        ("destroy", conntrack.destroy),
        ("ignored", conntrack.ignored),
        ("malformed", conntrack.malformed),
        ("overflow", conntrack.overflows),
        ("disconnect", conntrack.disconnects),
    ]);
    let help =
        "Events of the kernel's connection tracking; the last three mean that some were missed";
    counters(encoder, ("doze_conntrack_events", help), "result", &events)?;
    let resyncs = BTreeMap::from([
        ("ok", conntrack.resyncs),
        ("failed", conntrack.failed_resyncs),
    ]);
    let help = "Times that the table of connections was read anew";
    counters(
        encoder,
        ("doze_conntrack_resyncs", help),
        "result",
        &resyncs,
    )?;
    let help = "How long reading it took";
    let mut family = encoder.encode_descriptor(
        "doze_conntrack_resync",
        help,
        Some(&Unit::Seconds),
        ConstGauge::<f64>::new(0.0).metric_type(),
    )?;
    for (which, took) in [
        ("last", conntrack.last_resync),
        ("longest", conntrack.longest_resync),
    ] {
        let seconds = ConstGauge::<f64>::new(took.as_secs_f64());
        seconds.encode(family.encode_family(&[("which", which)])?)?;
    }
    gauge(
        encoder,
        "doze_conntrack_flows",
        "Connections known",
        conntrack.flows,
    )
}

fn counters(
    encoder: &mut DescriptorEncoder,
    (name, help): (&str, &str),
    label: &'static str,
    values: &BTreeMap<&'static str, u64>,
) -> std::fmt::Result {
    let kind = ConstCounter::new(0u64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (value, count) in values {
        ConstCounter::new(*count).encode(family.encode_family(&[(label, *value)])?)?;
    }
    Ok(())
}

fn instances(
    values: &BTreeMap<&'static str, u64>,
    encoder: &mut DescriptorEncoder,
) -> std::fmt::Result {
    let kind = ConstGauge::<i64>::new(0).metric_type();
    let help = "Instances with a policy, by their status";
    let mut family = encoder.encode_descriptor("doze_auto_standby_instances", help, None, kind)?;
    for (status, count) in values {
        let gauge = ConstGauge::new(i64::try_from(*count).unwrap_or(i64::MAX));
        gauge.encode(family.encode_family(&[("status", *status)])?)?;
    }
    Ok(())
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: u64) -> std::fmt::Result {
    let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    let descriptor = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
    gauge.encode(descriptor)
}
