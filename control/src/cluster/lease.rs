//! Which of several replicas leads: the holder of a Lease. Every replica serves agents; the holder alone writes status.
//!
//! As client-go does it: a holder renews, and others take over when they have seen no renewal for as long as the Lease
//! says. That is measured by their own clock, since theirs and the holder's may differ; the times in the Lease are for
//! people. The API server's versions decide between two that write at once. A holder that cannot renew stops before
//! others may start. Leading is no lock all the same: a process that stood still may write once more before it knows, so
//! what a leader writes must be right to write twice.

use std::{future::Future, time::Duration};

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{REQUEST_TIMEOUT, code, metadata, words};
use crate::metrics::Metrics;

const NAME: &str = "weft-control";

#[derive(Debug, Clone, Copy)]
struct Timing {
    /// How long a Lease counts for others after they last saw it renewed. Whole seconds.
    duration: Duration,
    /// A holder that has not renewed for that long leads no more. The rest of `duration` is for what it has under way.
    deadline: Duration,
    /// How often a holder renews.
    renew: Duration,
    /// How often the others look, and how soon a renewal that failed is tried again.
    retry: Duration,
}

const TIMING: Timing = Timing {
    duration: Duration::from_secs(15),
    deadline: Duration::from_secs(10),
    renew: Duration::from_secs(5),
    retry: Duration::from_secs(2),
};

/// This replica's part in the election; it ends with [`Candidate::resign`].
#[derive(Debug)]
pub struct Candidate {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Candidate {
    /// Takes part under the name of `identity`, which no other replica has, as soon as `ready` holds. The receiver says
    /// whether this replica leads.
    pub fn start(
        client: Client,
        namespace: &str,
        identity: String,
        metrics: Metrics,
        ready: impl Future<Output = ()> + Send + 'static,
    ) -> (Self, watch::Receiver<bool>) {
        let leases: Api<Lease> = Api::namespaced(client, namespace);
        let (leads, receiver) = watch::channel(false);
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            tokio::select! {
                () = ready => {}
                _ = &mut stopped => return,
            }
            let leadership = Leadership { leads, metrics };
            Election::new(leases, identity, TIMING).run(leadership, stopped).await;
        });
        (Self { stop, task }, receiver)
    }

    /// Stops leading and lets the next one start at once. Returns soon, whatever the API server does.
    pub async fn resign(self) {
        drop(self.stop);
        // A panic in there was reported already.
        let _ = self.task.await;
    }
}

/// Says to this process and to whoever reads metrics whether this replica leads.
struct Leadership {
    leads: watch::Sender<bool>,
    metrics: Metrics,
}

impl Leadership {
    fn set(&self, leads: bool) {
        self.metrics.leader.set(leads.into());
        let changed = self.leads.send_if_modified(|now| std::mem::replace(now, leads) != leads);
        match leads {
            true if changed => tracing::info!(target: "lease", "leading: this replica writes status"),
            false if changed => tracing::info!(target: "lease", "not leading any more"),
            _ => {}
        }
    }

    fn holds(&self) -> bool {
        *self.leads.borrow()
    }
}

/// Where the Lease is.
trait Leases: Send + Sync {
    fn read(&self) -> impl Future<Output = kube::Result<Option<Lease>>> + Send;
    /// Makes it, or replaces the version that `lease` names.
    fn write(&self, lease: &Lease) -> impl Future<Output = kube::Result<Lease>> + Send;
}

impl Leases for Api<Lease> {
    async fn read(&self) -> kube::Result<Option<Lease>> {
        self.get_opt(NAME).await
    }

    async fn write(&self, lease: &Lease) -> kube::Result<Lease> {
        match lease.metadata.resource_version {
            Some(_) => self.replace(NAME, &PostParams::default(), lease).await,
            None => self.create(&PostParams::default(), lease).await,
        }
    }
}

struct Election<L> {
    leases: L,
    identity: String,
    timing: Timing,
    observed: Option<Observed>,
}

/// The Lease as it was last seen.
struct Observed {
    lease: Lease,
    /// When it was first seen to say what it says.
    since: Instant,
}

impl<L: Leases> Election<L> {
    fn new(leases: L, identity: String, timing: Timing) -> Self {
        Self { leases, identity, timing, observed: None }
    }

    /// Until `stopped` is dropped.
    async fn run(mut self, leadership: Leadership, mut stopped: oneshot::Receiver<()>) {
        let Timing { deadline, renew, retry, .. } = self.timing;
        let mut renewed = Instant::now();
        let mut complaint = String::new();
        loop {
            let asked = Instant::now();
            let mut patience = REQUEST_TIMEOUT;
            if leadership.holds() {
                patience = patience.min((renewed + deadline).saturating_duration_since(asked));
            }
            let attempt = tokio::select! {
                attempt = timeout(patience, self.attempt()) => attempt,
                _ = &mut stopped => break,
            };
            // A refusal is an answer, too.
            if matches!(&attempt, Ok(Ok(_) | Err(kube::Error::Api(_)))) {
                leadership.metrics.set_in_touch();
            }
            let pause = match attempt {
                Ok(Ok(true)) => {
                    renewed = asked;
                    complaint.clear();
                    leadership.set(true);
                    renew
                }
                Ok(Ok(false)) => {
                    complaint.clear();
                    leadership.set(false);
                    retry
                }
                failed => {
                    let why = match failed {
                        Ok(Err(error)) => words(&error),
                        _ => "no answer in time".to_owned(),
                    };
                    // It may have been written nevertheless.
                    self.observed_is_old();
                    if complaint != why {
                        tracing::warn!(target: "lease", "Lease {NAME}: {why}; trying again");
                        complaint = why;
                    }
                    retry
                }
            };
            let mut next = Instant::now() + pause;
            if leadership.holds() {
                let end = renewed + deadline;
                if end <= Instant::now() {
                    leadership.set(false);
                } else {
                    next = next.min(end);
                }
            }
            tokio::select! {
                () = sleep_until(next) => {}
                _ = &mut stopped => break,
            }
        }
        if leadership.holds() {
            leadership.set(false);
            self.release().await;
        }
    }

    /// Tries to get the Lease or to keep it; says whether it is ours now.
    async fn attempt(&mut self) -> kube::Result<bool> {
        // What we wrote last is most likely what is there. If it is not, a second look says what is.
        for known in [self.is_ours() && self.version().is_some(), false] {
            if !known {
                let lease = self.leases.read().await?;
                self.observe(lease);
            }
            let Some(bid) = self.bid() else { return Ok(false) };
            match self.leases.write(&bid).await {
                Ok(lease) => {
                    self.observe(Some(lease));
                    return Ok(true);
                }
                Err(error) if matches!(code(&error), 404 | 409) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn observe(&mut self, lease: Option<Lease>) {
        self.observed = lease.map(|lease| {
            let same = self.observed.as_ref().filter(|observed| observed.lease.spec == lease.spec);
            Observed { since: same.map_or_else(Instant::now, |observed| observed.since), lease }
        });
    }

    fn observed_is_old(&mut self) {
        if let Some(observed) = &mut self.observed {
            observed.lease.metadata.resource_version = None;
        }
    }

    fn spec(&self) -> Option<&LeaseSpec> {
        self.observed.as_ref().and_then(|observed| observed.lease.spec.as_ref())
    }

    fn version(&self) -> Option<&String> {
        self.observed.as_ref().and_then(|observed| observed.lease.metadata.resource_version.as_ref())
    }

    fn is_ours(&self) -> bool {
        self.spec().and_then(|spec| spec.holder_identity.as_ref()) == Some(&self.identity)
    }

    /// The Lease to write to get or keep it; None while it counts as another's.
    fn bid(&self) -> Option<Lease> {
        let now = MicroTime(Timestamp::now());
        let ours = LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.duration.as_secs()).ok(),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(0),
            ..LeaseSpec::default()
        };
        let Some(Observed { lease, since }) = &self.observed else {
            return Some(Lease { metadata: metadata(NAME), spec: Some(ours) });
        };
        let theirs = lease.spec.clone().unwrap_or_default();
        let transitions = theirs.lease_transitions.unwrap_or(0);
        let spec = if self.is_ours() {
            LeaseSpec { acquire_time: theirs.acquire_time, lease_transitions: Some(transitions), ..ours }
        } else {
            let seconds = u64::try_from(theirs.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
            let held = theirs.holder_identity.is_some_and(|holder| !holder.is_empty());
            if held && since.elapsed() < Duration::from_secs(seconds) {
                return None;
            }
            LeaseSpec { lease_transitions: Some(transitions + 1), ..ours }
        };
        Some(Lease { metadata: lease.metadata.clone(), spec: Some(spec) })
    }

    /// Gives the Lease up, so that nobody has to wait for its end.
    async fn release(&mut self) {
        let patience = self.timing.retry;
        let released = async {
            if self.version().is_none() {
                let lease = self.leases.read().await?;
                self.observe(lease);
            }
            let Some(mut lease) = self.bid().filter(|_| self.is_ours()) else { return Ok(()) };
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = Some(String::new());
                spec.lease_duration_seconds = Some(1);
            }
            self.leases.write(&lease).await.map(drop)
        };
        let why = match timeout(patience, released).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => words(&error),
            Err(_) => "no answer in time".to_owned(),
        };
        tracing::warn!(target: "lease", "Lease {NAME} is not given up, it has to run out: {why}");
    }
}

#[cfg(test)]
mod tests;
