//! What the controller counts, for `/metrics`.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};
use weft_xds::Stats;

/// A replica that has not been answered by the API server for that long may be behind the others by as much: it is not
/// one to send agents to.
const OUT_OF_TOUCH: Duration = Duration::from_secs(15);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Reason {
    pub reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabel {
    pub kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NodeLabel {
    pub node: String,
}

/// Cheap to clone: every clone counts into the same numbers.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub certificates_issued: Counter,
    pub certificates_refused: Family<Reason, Counter>,
    pub authentication_refused: Family<Reason, Counter>,
    pub tls_failed: Counter,
    pub objects: Family<KindLabel, Gauge>,
    /// Files and objects of the directory whose present version is not in force.
    pub source_complaints: Gauge,
    pub translation_problems: Gauge,
    pub pods_desired: Gauge,
    pub pods_enrolled: Gauge,
    pub enrollment_failures: Family<NodeLabel, Gauge>,
    pub snapshots: Counter,
    pub leader: Gauge,
    pub conditions_written: Counter,
    pub conditions_failed: Counter,
    pub policies_pending: Gauge,
    pub root_expiry: Gauge,
    pub root_rotation: Gauge,
    pub root_waiting: Family<NodeLabel, Gauge>,
    ready: Arc<AtomicBool>,
    /// When the API server last answered, where one is asked regularly.
    in_touch: Arc<Mutex<Option<Instant>>>,
}

impl Metrics {
    pub fn refused_certificate(&self, reason: &'static str) {
        self.certificates_refused.get_or_create(&Reason { reason }).inc();
    }

    pub fn refused_caller(&self, reason: &'static str) {
        self.authentication_refused.get_or_create(&Reason { reason }).inc();
    }

    /// Ready: the first state is served.
    pub fn set_ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
    }

    /// The API server has answered.
    pub fn set_in_touch(&self) {
        *self.in_touch.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Why agents should be sent elsewhere; None if not.
    pub fn unready(&self) -> Option<&'static str> {
        if !self.ready.load(Ordering::Relaxed) {
            return Some("no state to serve yet\n");
        }
        let in_touch = *self.in_touch.lock().unwrap_or_else(PoisonError::into_inner);
        in_touch.filter(|at| at.elapsed() > OUT_OF_TOUCH).map(|_| "the API server does not answer\n")
    }

    /// The registry with all of it, and what the xDS server counts itself.
    pub fn registry(&self, xds: Arc<Stats>) -> Registry {
        let mut registry = Registry::with_prefix("weft_control");
        let m = self;
        registry.register(
            "certificates_issued",
            "Certificates issued to workloads",
            m.certificates_issued.clone(),
        );
        registry.register(
            "certificates_refused",
            "Requests for certificates refused",
            m.certificates_refused.clone(),
        );
        registry.register(
            "authentication_refused",
            "Calls refused because the caller's token proved nothing",
            m.authentication_refused.clone(),
        );
        registry.register("tls_handshakes_failed", "TLS handshakes that failed", m.tls_failed.clone());
        registry.register("objects", "Objects in force", m.objects.clone());
        registry.register(
            "source_complaints",
            "Manifests and objects whose present version is not in force",
            m.source_complaints.clone(),
        );
        registry.register(
            "translation_problems",
            "Objects that need a person's attention",
            m.translation_problems.clone(),
        );
        registry.register("pods_desired", "Pods that labels want in the mesh", m.pods_desired.clone());
        registry.register("pods_enrolled", "Pods announced as reachable by tunnel", m.pods_enrolled.clone());
        registry.register(
            "enrollment_failures",
            "Pods that labels want in the mesh and that their node's agent cannot enrol",
            m.enrollment_failures.clone(),
        );
        registry.register("snapshots", "States published", m.snapshots.clone());
        registry.register(
            "leader",
            "Whether this replica leads and so writes status: 1 or 0",
            m.leader.clone(),
        );
        registry.register(
            "pod_conditions_written",
            "Conditions written on Pods, by the replica that leads",
            m.conditions_written.clone(),
        );
        registry.register(
            "pod_conditions_failed",
            "Conditions of Pods that could not be written, and are tried again",
            m.conditions_failed.clone(),
        );
        registry.register(
            "policies_pending",
            "AuthorizationPolicies that not every node is known to enforce yet",
            m.policies_pending.clone(),
        );
        registry.register(
            "root_expiry_timestamp_seconds",
            "When the root that signs expires, Unix time",
            m.root_expiry.clone(),
        );
        registry.register(
            "root_rotation_phase",
            "0: there is one root; 1: another is announced; 2: it signs, and the old one is still believed",
            m.root_rotation.clone(),
        );
        registry.register(
            "root_rotation_waiting",
            "Nodes that a rotation of the root waits for",
            m.root_waiting.clone(),
        );
        registry.register_collector(Box::new(XdsStats(xds)));
        registry
    }
}

/// The numbers that the xDS server keeps.
#[derive(Debug)]
struct XdsStats(Arc<Stats>);

impl Collector for XdsStats {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let stats = &self.0;
        let gauge = ConstGauge::new(i64::try_from(stats.streams()).unwrap_or(i64::MAX));
        gauge.encode(encoder.encode_descriptor(
            "xds_streams",
            "xDS streams open",
            None,
            gauge.metric_type(),
        )?)?;
        for (name, help, value) in [
            ("xds_responses", "xDS responses sent", stats.responses()),
            ("xds_acks", "xDS responses accepted by their client", stats.acks()),
            ("xds_nacks", "xDS responses rejected by their client", stats.nacks()),
            (
                "xds_behind",
                "xDS streams sent away since their node had seen more than this replica",
                stats.behind(),
            ),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}

/// The registry in the text format of OpenMetrics.
pub fn text(registry: &Registry) -> String {
    let mut text = String::new();
    if let Err(error) = encode(&mut text, registry) {
        tracing::error!("cannot encode metrics: {error}");
    }
    text
}
