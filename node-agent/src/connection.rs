//! What is recorded of one connection: counters by workload while it is open, one access log line when it ends.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use tracing::{info, warn};
use weft_core::{Service, SpiffeId, Workload};
use weft_transport::{Counters, RelayError};

use crate::metrics::{ConnectionLabels, FailureLabels, Metrics, Reporter, Security, Text};

/// One end of a connection, as far as it is known.
#[derive(Debug, Clone, Default)]
pub struct Party {
    pub workload: Option<Arc<Workload>>,
    /// Proven by certificate, or by the kernel for the pod this agent serves.
    pub principal: Option<SpiffeId>,
}

impl Party {
    pub fn workload(workload: Arc<Workload>) -> Self {
        Self { principal: Some(workload.identity.clone()), workload: Some(workload) }
    }

    fn labels(&self) -> [Text; 3] {
        let workload = self.workload.as_ref();
        let namespace = workload.map(|w| w.namespace.clone());
        let namespace = namespace.or_else(|| self.principal.as_ref().map(|p| p.namespace().into()));
        [
            workload.map_or_else(Text::unknown, |w| Text(w.workload_name.clone())),
            namespace.map_or_else(Text::unknown, Text),
            self.principal.as_ref().map_or_else(Text::unknown, |p| Text(p.to_string().into())),
        ]
    }
}

/// A connection from accept to end. Filled in as its handler finds out more.
pub struct Connection {
    metrics: Arc<Metrics>,
    reporter: Reporter,
    /// The caller's address as this agent saw it.
    pub from: SocketAddr,
    /// The address that was dialled.
    pub to: SocketAddr,
    /// Where it went in the end: an endpoint's address or tunnel.
    pub via: Option<SocketAddr>,
    pub source: Party,
    pub destination: Party,
    pub service: Option<Arc<Service>>,
    pub security: Security,
    /// W3C trace context, the same in both agents' logs.
    pub trace: Option<String>,
    started: Instant,
}

/// Why a connection was not carried. The label is for metrics, the text for a person.
#[derive(Debug)]
pub struct Refusal {
    pub reason: &'static str,
    pub detail: String,
}

impl Refusal {
    pub fn new(reason: &'static str, detail: impl ToString) -> Self {
        Self { reason, detail: detail.to_string() }
    }
}

impl Connection {
    pub fn new(metrics: Arc<Metrics>, reporter: Reporter, from: SocketAddr, to: SocketAddr) -> Self {
        Self {
            metrics,
            reporter,
            from,
            to,
            via: None,
            source: Party::default(),
            destination: Party::default(),
            service: None,
            security: Security::plaintext,
            trace: None,
            started: Instant::now(),
        }
    }

    /// Counts it as refused and says why.
    pub fn refused(self, refusal: &Refusal) {
        self.metrics
            .failed
            .get_or_create(&FailureLabels { reporter: self.reporter, reason: refusal.reason })
            .inc();
        self.log(0, 0, Some((refusal.reason, refusal.detail.as_str())));
    }

    fn opened<'a>(&'a self, counters: &'a Counters) -> Open<'a> {
        let [source_workload, source_namespace, source_principal] = self.source.labels();
        let [destination_workload, destination_namespace, destination_principal] = self.destination.labels();
        let labels = ConnectionLabels {
            reporter: self.reporter,
            source_workload,
            source_namespace,
            source_principal,
            destination_workload,
            destination_namespace,
            destination_principal,
            destination_service: self.service.as_ref().map_or_else(Text::unknown, |s| Text(s.name.clone())),
            security: self.security,
        };
        self.metrics.opened.get_or_create(&labels).inc();
        Open {
            closed: self.metrics.closed.get_or_create(&labels).clone(),
            sent: self.metrics.sent.get_or_create(&labels).clone(),
            received: self.metrics.received.get_or_create(&labels).clone(),
            connection: self,
            counters,
            reported: (0, 0),
            error: Some(("cut", "the pod or the agent went away".to_owned())),
        }
    }

    fn log(&self, sent: u64, received: u64, error: Option<(&str, &str)>) {
        macro_rules! line {
            ($level:ident, $($more:tt)*) => {
                $level!(
                    target: "access",
                    direction = ?self.reporter,
                    src.addr = %self.from,
                    src.workload = self.source.workload.as_ref().map(|w| &*w.name),
                    src.namespace = self.source.workload.as_ref().map(|w| &*w.namespace),
                    src.identity = self.source.principal.as_ref().map(tracing::field::display),
                    dst.addr = %self.to,
                    dst.via = self.via.map(tracing::field::display),
                    dst.service = self.service.as_ref().map(|s| &*s.name),
                    dst.workload = self.destination.workload.as_ref().map(|w| &*w.name),
                    dst.namespace = self.destination.workload.as_ref().map(|w| &*w.namespace),
                    dst.identity = self.destination.principal.as_ref().map(tracing::field::display),
                    security = ?self.security,
                    trace = self.trace.as_deref(),
                    bytes_sent = sent,
                    bytes_received = received,
                    duration_ms = self.started.elapsed().as_millis() as u64,
                    $($more)*
                )
            };
        }
        match error {
            None => line!(info, "connection complete"),
            Some((reason, detail)) => line!(warn, reason, error = detail, "connection failed"),
        }
    }
}

/// How often an open connection's bytes reach the metrics.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Runs `relaying` to its end with `connection` counted as open, its bytes as they flow, and its end logged; also where
/// the future is dropped, because the pod went or the agent's time to drain was over.
pub async fn carry(
    connection: &Connection,
    counters: &Counters,
    mut relaying: Pin<&mut impl Future<Output = Result<(), RelayError>>>,
) {
    let mut open = connection.opened(counters);
    loop {
        match tokio::time::timeout(REPORT_INTERVAL, &mut relaying).await {
            Err(_) => open.report(),
            Ok(result) => {
                open.error = result.err().map(|e| (e.reason(), e.to_string()));
                return;
            }
        }
    }
}

/// A connection that is being carried.
struct Open<'a> {
    connection: &'a Connection,
    counters: &'a Counters,
    closed: Counter,
    sent: Counter,
    received: Counter,
    reported: (u64, u64),
    error: Option<(&'static str, String)>,
}

impl Open<'_> {
    /// Adds what came since the last call.
    fn report(&mut self) {
        // At the source the application is the caller, at the destination it is the called.
        let (sent, received) = match self.connection.reporter {
            Reporter::source => (self.counters.sent(), self.counters.received()),
            Reporter::destination => (self.counters.received(), self.counters.sent()),
        };
        self.sent.inc_by(sent - self.reported.0);
        self.received.inc_by(received - self.reported.1);
        self.reported = (sent, received);
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.report();
        self.closed.inc();
        let (sent, received) = self.reported;
        let error = self.error.as_ref().map(|(reason, detail)| (*reason, detail.as_str()));
        self.connection.log(sent, received, error);
    }
}
