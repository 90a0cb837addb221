//! What `/metrics` shows. Labels are at workload level, never at connection level; a connection looks its counters up
//! once, when it opens.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder, text::encode,
    },
    metrics::{counter::ConstCounter, counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use weft_kernel::Kernel;

/// A label's text, shared with the mesh model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Text(pub Arc<str>);

impl Text {
    pub fn unknown() -> Self {
        Self("unknown".into())
    }
}

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> std::fmt::Result {
        encoder.write_str(&self.0)
    }
}

/// Which end of a connection this agent serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "label values are lower case")]
pub enum Reporter {
    source,
    destination,
}

/// How the connection's bytes cross the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "label values are lower case")]
pub enum Security {
    mutual_tls,
    plaintext,
}

/// Who talks to whom.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ConnectionLabels {
    pub reporter: Reporter,
    pub source_workload: Text,
    pub source_namespace: Text,
    pub source_principal: Text,
    pub destination_workload: Text,
    pub destination_namespace: Text,
    pub destination_principal: Text,
    pub destination_service: Text,
    pub security: Security,
}

/// Pods of this node.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct WorkloadLabels {
    pub workload: Text,
    pub namespace: Text,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FailureLabels {
    pub reporter: Reporter,
    pub reason: &'static str,
}

/// What policies said of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "label values are lower case")]
pub enum Verdict {
    allowed,
    /// Let in, and would not be if what is on trial were in force.
    audited,
    denied,
}

pub const NO_POLICY: &str = "none";

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct AuthorizationLabels {
    pub verdict: Verdict,
    /// What the verdict rests on; [`NO_POLICY`] where that is no single one.
    pub policy: Text,
    pub source_namespace: Text,
    pub source_principal: Text,
    pub destination_workload: Text,
    pub destination_namespace: Text,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct IdentityLabels {
    pub identity: Text,
}

/// Callers judged, by policy and by who calls whom.
#[derive(Debug, Clone, Default)]
pub struct Judged {
    family: Family<AuthorizationLabels, Counter>,
    /// The series of each policy, which the family cannot be asked for.
    series: Arc<Mutex<HashMap<Arc<str>, HashSet<AuthorizationLabels>>>>,
}

impl Judged {
    pub fn count(&self, labels: &AuthorizationLabels) {
        if let Some(counter) = self.family.get(labels) {
            counter.inc();
            return;
        }
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        if &*labels.policy.0 != NO_POLICY {
            series.entry(labels.policy.0.clone()).or_default().insert(labels.clone());
        }
        self.family.get_or_create(labels).inc();
    }

    /// Drops the series of policies that are not there any more. A connection that was judged by one of them may still be
    /// about to count it, which the next call mends.
    pub fn retain(&self, is_there: impl Fn(&str) -> bool) {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        series.retain(|policy, labels| {
            let stays = is_there(policy);
            for labels in labels.iter().filter(|_| !stays) {
                self.family.remove(labels);
            }
            stays
        });
    }
}

/// Every metric of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub opened: Family<ConnectionLabels, Counter>,
    pub closed: Family<ConnectionLabels, Counter>,
    pub sent: Family<ConnectionLabels, Counter>,
    pub received: Family<ConnectionLabels, Counter>,
    pub failed: Family<FailureLabels, Counter>,
    pub judged: Judged,
    tls_refused: Family<ReasonLabels, Counter>,
    pub enrolled: Gauge,
    pub existing: Family<WorkloadLabels, Gauge>,
    pub enrollment_failures: Counter,
    pub xds_connected: Gauge,
    pub xds_rejected: Counter,
    pub certificate_expiry: Family<IdentityLabels, Gauge<f64, AtomicU64>>,
    pub certificate_failures: Counter,
}

impl Metrics {
    pub fn new(kernel: Arc<Kernel>) -> Self {
        let mut registry = Registry::with_prefix("weft");
        macro_rules! register {
            ($name:literal, $help:literal) => {{
                let metric = Default::default();
                registry.register($name, $help, Clone::clone(&metric));
                metric
            }};
        }
        let opened = register!("tcp_connections_opened", "Connections opened through the agent");
        let closed = register!("tcp_connections_closed", "Connections that ended");
        let sent = register!("tcp_sent_bytes", "Bytes from the source to the destination");
        let received = register!("tcp_received_bytes", "Bytes from the destination to the source");
        let failed = register!("tcp_connections_failed", "Connections refused or not established, by reason");
        let judged = Judged::default();
        registry.register(
            "authorization",
            "Callers judged by policies: when they connect, and when policies cut them off",
            judged.family.clone(),
        );
        let tls_refused = register!("tls_refused", "TLS peers refused, by reason");
        let enrolled = register!("enrolled_pods", "Pods of this node that are enrolled");
        let existing = register!(
            "connections_before_enrollment",
            "Open connections with others in the mesh that are older than the enrolment of their pod, and in the clear"
        );
        let enrollment_failures = register!("enrollment_failures", "Attempts to enrol a pod that failed");
        let xds_connected = register!("xds_connected", "1 while connected to the controller");
        let xds_rejected = register!("xds_rejected", "Updates from the controller that could not be applied");
        let certificate_expiry: Family<IdentityLabels, Gauge<f64, AtomicU64>> = Family::default();
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When the certificate in use expires, Unix time",
            Unit::Seconds,
            certificate_expiry.clone(),
        );
        let certificate_failures = register!("certificate_failures", "Certificate requests that failed");
        registry.register_collector(Box::new(Sampled(kernel)));
        Self {
            registry,
            opened,
            closed,
            sent,
            received,
            failed,
            judged,
            tls_refused,
            enrolled,
            existing,
            enrollment_failures,
            xds_connected,
            xds_rejected,
            certificate_expiry,
            certificate_failures,
        }
    }

    pub fn tls_refused(&self, reason: &'static str) {
        self.tls_refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// The OpenMetrics text format.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What others count, read when somebody asks.
#[derive(Debug)]
struct Sampled(Arc<Kernel>);

impl Collector for Sampled {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let counter = |n: u64| ConstCounter::new(n);
        if let Ok(counters) = self.0.counters() {
            let captured = counter(counters.captured);
            captured.encode(encoder.encode_descriptor(
                "kernel_captured",
                "Connections the kernel handed to the agent at connect",
                None,
                captured.metric_type(),
            )?)?;
            for (name, help, n) in [
                (
                    "kernel_probes",
                    "Kubelet's connections that the kernel passed to applications",
                    counters.probes,
                ),
                (
                    "kernel_probes_unrecorded",
                    "Kubelet's connections that the kernel could not remember, and handed to the agent",
                    counters.probes_unrecorded,
                ),
            ] {
                let count = counter(n);
                count.encode(encoder.encode_descriptor(name, help, None, count.metric_type())?)?;
            }
            let mut family = encoder.encode_descriptor(
                "kernel_refused",
                "Connections the kernel refused, by reason",
                None,
                captured.metric_type(),
            )?;
            for (reason, n) in counters.refusals() {
                counter(n).encode(family.encode_family(&ReasonLabels { reason })?)?;
            }
        }
        let dropped = counter(crate::logging::dropped());
        dropped.encode(encoder.encode_descriptor(
            "log_lines_dropped",
            "Log lines not written because the reader was too slow",
            None,
            dropped.metric_type(),
        )?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policys_series_go_with_it() {
        let judged = Judged::default();
        let count = |policy: &str, verdict| {
            let [source_namespace, source_principal, destination_workload, destination_namespace] =
                std::array::from_fn(|_| Text::unknown());
            let policy = Text(policy.into());
            judged.count(&AuthorizationLabels {
                verdict,
                policy,
                source_namespace,
                source_principal,
                destination_workload,
                destination_namespace,
            });
        };
        let mut registry = Registry::default();
        registry.register("judged", "", judged.family.clone());
        let shown = || {
            let mut text = String::new();
            encode(&mut text, &registry).expect("text");
            let series = text.lines().filter(|line| line.starts_with("judged_total"));
            let mut shown: Vec<String> = series
                .map(|line| {
                    let (_, policy) = line.split_once("policy=\"").expect("the label");
                    let (policy, rest) = policy.split_once('"').expect("its end");
                    format!("{policy} {}", rest.split(' ').next_back().expect("the count"))
                })
                .collect();
            shown.sort();
            shown
        };
        for policy in ["shop/gone", "shop/stays", NO_POLICY] {
            count(policy, Verdict::allowed);
            count(policy, Verdict::allowed);
        }
        count("shop/gone", Verdict::denied);
        assert_eq!(shown(), ["none 2", "shop/gone 1", "shop/gone 2", "shop/stays 2"]);
        let is_there = |policy: &str| policy == "shop/stays";
        judged.retain(is_there);
        assert_eq!(shown(), ["none 2", "shop/stays 2"]);
        // One that was judged before.
        count("shop/gone", Verdict::denied);
        judged.retain(is_there);
        assert_eq!(shown(), ["none 2", "shop/stays 2"]);
        count("shop/stays", Verdict::allowed);
        assert_eq!(shown(), ["none 2", "shop/stays 3"]);
    }
}
