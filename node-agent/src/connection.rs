//! What is recorded of one connection: counters by workload while it is open, one access log line when it ends.

use std::{
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::metrics::{counter::Counter, family::Family};
use tracing::{info, warn};
use weft_core::{
    Service, SpiffeId, Workload,
    policy::{self, Decision},
};
use weft_transport::{Counters, RelayError};

use crate::{
    authorization::Admission,
    metrics::{
        AuthorizationLabels, ConnectionLabels, FailureLabels, Metrics, NO_POLICY, Reporter, Security, Text,
        Verdict,
    },
};

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
    /// What policies say of the caller, and which one.
    judged: Option<(Verdict, Option<Arc<str>>)>,
    started: Instant,
}

/// How a connection ended, for its line in the access log; or that it did not.
enum End<'a> {
    Complete,
    Failed {
        reason: &'a str,
        detail: &'a str,
    },
    /// It begins, on trial.
    Audited,
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
            judged: None,
            started: Instant::now(),
        }
    }

    /// Counts it as refused and says why.
    pub fn refused(self, refusal: &Refusal) {
        self.metrics
            .failed
            .get_or_create(&FailureLabels { reporter: self.reporter, reason: refusal.reason })
            .inc();
        self.log(0, 0, End::Failed { reason: refusal.reason, detail: &refusal.detail });
    }

    /// Counts what policies say of the caller, whose identity must be known by now. That somebody is let in on trial is
    /// said at once, since connections may last.
    pub fn judged(&mut self, decision: &Decision) {
        let verdict = match decision.verdict {
            policy::Verdict::Allowed => Verdict::allowed,
            policy::Verdict::Audited => Verdict::audited,
            policy::Verdict::Denied => Verdict::denied,
        };
        let [_, source_namespace, source_principal] = self.source.labels();
        let [destination_workload, destination_namespace, _] = self.destination.labels();
        let policy = Text(decision.policy.clone().unwrap_or_else(|| NO_POLICY.into()));
        let labels = AuthorizationLabels {
            verdict,
            policy,
            source_namespace,
            source_principal,
            destination_workload,
            destination_namespace,
        };
        self.metrics.judged.count(&labels);
        self.judged = Some((verdict, decision.policy.clone()));
        if verdict == Verdict::audited {
            self.log(0, 0, End::Audited);
        }
    }

    fn opened<'a>(&'a mut self, counters: &'a Counters) -> Open<'a> {
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
        let counter = |family: &Family<ConnectionLabels, Counter>| family.get_or_create(&labels).clone();
        counter(&self.metrics.opened).inc();
        let [closed, sent, received] =
            [&self.metrics.closed, &self.metrics.sent, &self.metrics.received].map(counter);
        Open {
            closed,
            sent,
            received,
            connection: self,
            counters,
            reported: (0, 0),
            error: Some(("cut", "the pod or the agent went away".to_owned())),
        }
    }

    fn log(&self, sent: u64, received: u64, end: End) {
        let judged = self.judged.as_ref();
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
                    verdict = judged.map(|(verdict, _)| tracing::field::debug(verdict)),
                    policy = judged.and_then(|(_, policy)| policy.as_deref()),
                    bytes_sent = sent,
                    bytes_received = received,
                    duration_ms = self.started.elapsed().as_millis() as u64,
                    $($more)*
                )
            };
        }
        match end {
            End::Complete => line!(info, "connection complete"),
            End::Failed { reason, detail } => line!(warn, reason, error = detail, "connection failed"),
            End::Audited => line!(warn, "connection would be denied"),
        }
    }
}

/// How often an open connection's bytes reach the metrics.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Runs `relaying` to its end with `connection` counted as open, its bytes as they flow, and its end logged; also where
/// the future is dropped, because the pod went or the agent's time to drain was over. Ends early where the caller was let
/// in by policies that no longer do.
pub async fn carry(
    connection: &mut Connection,
    admission: Option<Admission>,
    counters: &Counters,
    mut relaying: Pin<&mut impl Future<Output = Result<(), RelayError>>>,
) {
    let mut open = connection.opened(counters);
    let mut revoked = pin!(async {
        match admission {
            Some(mut admission) => admission.revoked().await,
            None => std::future::pending().await,
        }
    });
    loop {
        tokio::select! {
            biased;
            // First: not one more byte after that.
            (decision, refusal) = &mut revoked => {
                open.connection.judged(&decision);
                open.error = Some((refusal.reason, refusal.detail));
                return;
            }
            end = tokio::time::timeout(REPORT_INTERVAL, &mut relaying) => match end {
                Err(_) => open.report(),
                Ok(result) => {
                    open.error = result.err().map(|e| (e.reason(), e.to_string()));
                    return;
                }
            },
        }
    }
}

/// A connection that is being carried.
struct Open<'a> {
    connection: &'a mut Connection,
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
        let end = match &self.error {
            Some((reason, detail)) => End::Failed { reason, detail },
            None => End::Complete,
        };
        self.connection.log(sent, received, end);
    }
}
