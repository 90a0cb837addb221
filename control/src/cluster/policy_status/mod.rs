//! The conditions of AuthorizationPolicies. `Accepted`: whether a policy is in force as it is written, as translation says
//! (`translate::policies`). `Programmed`: on how many nodes, as their agents have accepted what follows from it ([`reach`]).
//!
//! They follow from what is in the cluster alone ([`known`]), so every replica comes to the same; the one that leads writes
//! them. There are few policies and they change seldom: one write at a time.

mod known;
pub mod reach;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};
use weft_api::{Kind, pod::Condition};
use weft_core::TrustDomain;

use self::{known::Known, reach::Reached};
use super::{REQUEST_TIMEOUT, code, words};
use crate::{metrics::Metrics, source::Delta, store::Name};

/// After a write that failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What the source tells.
#[derive(Debug)]
pub enum Input {
    Objects {
        delta: Delta,
        /// Up to where policies have been told, with this.
        read: Option<u64>,
    },
    /// Whether pods of a node are enrolled.
    Node { name: String, has_pods: bool },
}

/// What of a change is of interest here.
pub fn part(delta: &Delta) -> Delta {
    let kinds = [Kind::AuthorizationPolicy, Kind::Service];
    Delta {
        upserts: delta.upserts.iter().filter(|object| kinds.contains(&object.kind())).cloned().collect(),
        deletes: delta.deletes.iter().filter(|key| kinds.contains(&key.kind)).cloned().collect(),
    }
}

/// Where it is said how far nodes have followed, and that somebody waits for one.
#[derive(Debug)]
pub struct Reach {
    pub reached: watch::Receiver<Arc<Reached>>,
    pub wanted: watch::Sender<bool>,
}

/// Writes conditions whenever this replica leads, until nothing more comes.
pub async fn run(
    client: Client,
    trust_domain: TrustDomain,
    mut inputs: mpsc::Receiver<Input>,
    mut leads: watch::Receiver<bool>,
    Reach { mut reached, wanted }: Reach,
    metrics: Metrics,
) {
    let mut known = Known::new(trust_domain);
    let mut writer = Writer::new(client);
    let mut leading = false;
    loop {
        if leading != *leads.borrow_and_update() {
            leading = !leading;
            writer.start_over(if leading { known.policies().cloned().collect() } else { BTreeSet::new() });
        }
        let pending = known.pending().len();
        metrics.policies_pending.set(pending as i64);
        wanted.send_if_modified(|wanted| std::mem::replace(wanted, pending > 0) != (pending > 0));
        if leading {
            writer.begin(&known);
        }
        tokio::select! {
            input = inputs.recv() => {
                let Some(input) = input else { return };
                writer.queue.append(&mut known.apply(input));
            }
            changed = leads.changed() => if changed.is_err() { return },
            changed = reached.changed() => {
                if changed.is_err() {
                    return;
                }
                known.follow(reached.borrow_and_update().clone());
                writer.queue.extend(known.pending().iter().cloned());
            }
            Some(outcome) = writer.attempt.join_next() => writer.ended(outcome),
            () = sleep_until(writer.not_before), if leading && writer.is_waiting() => {}
        }
    }
}

struct Writer {
    client: Client,
    /// To be looked at.
    queue: BTreeSet<Name>,
    /// Those of which a write failed: others first.
    failed: BTreeSet<Name>,
    /// One at most.
    attempt: JoinSet<(Name, Result<(), String>)>,
    not_before: Instant,
    complaint: String,
}

impl Writer {
    fn new(client: Client) -> Self {
        Self {
            client,
            queue: BTreeSet::new(),
            failed: BTreeSet::new(),
            attempt: JoinSet::new(),
            not_before: Instant::now(),
            complaint: String::new(),
        }
    }

    fn start_over(&mut self, queue: BTreeSet<Name>) {
        self.attempt.abort_all();
        self.queue = queue;
        self.failed.clear();
    }

    /// Whether there is something to do later.
    fn is_waiting(&self) -> bool {
        self.attempt.is_empty() && !(self.queue.is_empty() && self.failed.is_empty())
    }

    /// Begins the next write, if it is time.
    fn begin(&mut self, known: &Known) {
        while self.is_waiting() && self.not_before <= Instant::now() {
            if self.queue.is_empty() {
                std::mem::swap(&mut self.queue, &mut self.failed);
            }
            let Some(name) = self.queue.pop_first() else { return };
            if let Some(conditions) = known.due(&name, Timestamp::now()) {
                self.attempt.spawn(attempt(self.client.clone(), name, conditions));
            }
        }
    }

    fn ended(&mut self, outcome: Result<(Name, Result<(), String>), JoinError>) {
        match outcome {
            Ok((_, Ok(()))) => self.complaint.clear(),
            Ok((name, Err(why))) => {
                if self.complaint != why {
                    let (namespace, policy) = &name;
                    tracing::warn!(
                        target: "status",
                        "cannot write the conditions of {namespace}/{policy}: {why}; trying again"
                    );
                    self.complaint = why;
                }
                self.failed.insert(name);
                self.not_before = Instant::now() + PAUSE;
            }
            // Broken off, since this replica does not lead any more.
            Err(_) => {}
        }
    }
}

/// One write, of our conditions only. What is gone needs none.
async fn attempt(client: Client, name: Name, conditions: Vec<Condition>) -> (Name, Result<(), String>) {
    let kind = Kind::AuthorizationPolicy;
    let (group, version) = kind.api_version().split_once('/').unwrap_or_default();
    let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural());
    let policies: Api<DynamicObject> = Api::namespaced_with(client, &name.0, &resource);
    let patch = json!({
        "apiVersion": kind.api_version(), "kind": kind.as_str(), "metadata": {"name": name.1},
        "status": {"conditions": conditions},
    });
    let params = PatchParams::apply("weft-control").force();
    let patch = Patch::Apply(patch);
    let result = match timeout(REQUEST_TIMEOUT, policies.patch_status(&name.1, &params, &patch)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if code(&error) == 404 => Ok(()),
        Ok(Err(error)) => Err(words(&error)),
        Err(_) => Err("no answer in time".to_owned()),
    };
    (name, result)
}
