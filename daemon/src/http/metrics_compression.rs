//! The part of `GET /metrics` that is about compressed memory.
use std::fmt;

use doze_engine::{CompressionMetrics, Histogram, Jobs, Labels};
use doze_vmm::Hypervisor;
use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Unit,
};

type Pairs = Vec<(&'static str, String)>;

pub(super) fn encode(metrics: &CompressionMetrics, encoder: &mut DescriptorEncoder) -> fmt::Result {
    let help = "Compressions that were planned; the sum of all that are pending, active or ended";
    counters(
        encoder,
        ("doze_snapshot_compression_planned", help),
        metrics,
        |jobs| vec![(vec![], jobs.planned)],
    )?;
    let help = "Compressions that ended, by result";
    counters(
        encoder,
        ("doze_snapshot_compression_jobs", help),
        metrics,
        |jobs| {
            let ended = jobs.ended.iter();
            ended
                .map(|(result, count)| (vec![("result", result.as_str())], *count))
                .collect()
        },
    )?;
    let help =
        "Bytes of raw memory, holes included, and of compressed memory, of those that succeeded";
    counters(
        encoder,
        ("doze_snapshot_compression_bytes", help),
        metrics,
        |jobs| {
            vec![
                (vec![("direction", "in")], jobs.bytes_in),
                (vec![("direction", "out")], jobs.bytes_out),
            ]
        },
    )?;
    gauges(
        encoder,
        "doze_snapshot_compression_pending",
        "Compressions that wait for their time or their turn",
        metrics,
        |jobs| jobs.pending,
    )?;
    gauges(
        encoder,
        "doze_snapshot_compression_active",
        "Compressions at work",
        metrics,
        |jobs| jobs.active,
    )?;
    let help = "How long compressions worked, by result";
    let duration = (
        "doze_snapshot_compression_duration",
        help,
        Some(&Unit::Seconds),
    );
    histograms(encoder, duration, metrics, |jobs| {
        let all = jobs.duration.iter();
        all.map(|(result, found)| (vec![("result", result.as_str())], found))
            .collect()
    })?;
    let help = "From plan to begin, the delay included";
    let wait = (
        "doze_snapshot_compression_wait_duration",
        help,
        Some(&Unit::Seconds),
    );
    histograms(encoder, wait, metrics, |jobs| vec![(vec![], &jobs.wait)])?;
    let help = "Raw bytes by compressed ones";
    let ratio = ("doze_snapshot_compression_ratio", help, None);
    histograms(encoder, ratio, metrics, |jobs| vec![(vec![], &jobs.ratio)])?;
    preemptions(metrics, encoder)?;
    preparations(metrics, encoder)
}

/// More labels of one number.
type Labelled<T> = Vec<(Vec<(&'static str, &'static str)>, T)>;

fn counters(
    encoder: &mut DescriptorEncoder,
    (name, help): (&str, &str),
    metrics: &CompressionMetrics,
    read: impl Fn(&Jobs) -> Labelled<u64>,
) -> fmt::Result {
    let kind = ConstCounter::new(0u64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, jobs) in &metrics.jobs {
        for (more, count) in read(jobs) {
            let labels = pairs(labels, &more);
            ConstCounter::new(count).encode(family.encode_family(&Set(labels))?)?;
        }
    }
    Ok(())
}

fn gauges(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    metrics: &CompressionMetrics,
    read: impl Fn(&Jobs) -> u64,
) -> fmt::Result {
    let kind = ConstGauge::<i64>::new(0).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, jobs) in &metrics.jobs {
        let gauge = ConstGauge::new(i64::try_from(read(jobs)).unwrap_or(i64::MAX));
        gauge.encode(family.encode_family(&Set(pairs(labels, &[])))?)?;
    }
    Ok(())
}

fn histograms(
    encoder: &mut DescriptorEncoder,
    (name, help, unit): (&str, &str, Option<&Unit>),
    metrics: &CompressionMetrics,
    read: impl Fn(&Jobs) -> Labelled<&Histogram>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
    for (labels, jobs) in &metrics.jobs {
        for (more, histogram) in read(jobs) {
            let labels = pairs(labels, &more);
            Shown(histogram).encode(family.encode_family(&Set(labels))?)?;
        }
    }
    Ok(())
}

fn preemptions(metrics: &CompressionMetrics, encoder: &mut DescriptorEncoder) -> fmt::Result {
    let kind = ConstCounter::new(0u64).metric_type();
    let help = "Compressions that were halted at work, by the operation that needed the files";
    let name = "doze_snapshot_compression_preemptions";
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for ((labels, operation), count) in &metrics.preemptions {
        let labels = pairs(labels, &[("operation", *operation)]);
        ConstCounter::new(*count).encode(family.encode_family(&Set(labels))?)?;
    }
    Ok(())
}

fn preparations(metrics: &CompressionMetrics, encoder: &mut DescriptorEncoder) -> fmt::Result {
    let help = "Until a restore had its raw memory, by how it came to it";
    let name = "doze_snapshot_restore_memory_prepare_duration";
    let unit = Some(&Unit::Seconds);
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
    for ((how, hypervisor), histogram) in &metrics.preparations {
        let labels = [("path", how.as_str()), ("hypervisor", name_of(*hypervisor))];
        Shown(histogram).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn pairs(labels: &Labels, more: &[(&'static str, &'static str)]) -> Pairs {
    let mut all = vec![
        ("algorithm", labels.algorithm.to_string()),
        ("level", labels.level.to_string()),
        ("hypervisor", name_of(labels.hypervisor).to_owned()),
        ("source", labels.source.as_str().to_owned()),
    ];
    all.extend(more.iter().map(|(key, value)| (*key, (*value).to_owned())));
    all
}

fn name_of(hypervisor: Hypervisor) -> &'static str {
    crate::convert::instance::hypervisor(hypervisor).as_str()
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Set(Pairs);

impl EncodeLabelSet for Set {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder) -> fmt::Result {
        self.0.encode(encoder)
    }
}

struct Shown<'a>(&'a Histogram);

impl EncodeMetric for Shown<'_> {
    fn encode(&self, mut encoder: MetricEncoder) -> fmt::Result {
        let Histogram {
            bounds,
            counts,
            sum,
        } = self.0;
        let bounds = bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<_> = bounds.zip(counts.iter().copied()).collect();
        let count = counts.iter().sum();
        encoder.encode_histogram::<NoLabelSet>(*sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
