//! The condition `weft.dev/Enrolled` of Pods: whether a pod that labels want in the mesh is there, and why not.
//!
//! It follows from what is in the cluster alone (the Pod, its Namespace's label, its node's NodeEnrollment), so every
//! replica comes to the same, whichever the agents reported to; the one that leads writes it. A Pod is left alone as
//! long as it has nothing to do with the mesh, and written only where it does not say already what it should.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::{api::core::v1, jiff::Timestamp};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use weft_api::{Kind, Namespace, Object, ObjectKey, Pod, mesh_choice, pod::Condition};

use super::{
    REQUEST_TIMEOUT, code,
    enrollment::{Heard, Record},
    policy_status::{self, Reach},
    words,
};
use crate::{enrollment::Place, metrics::Metrics, source::Delta, store::Name, translate::MeshSettings};

/// Changes that wait to be looked at for policies.
const QUEUE: usize = 64;
/// Writes under way at once.
const AT_ONCE: usize = 8;
/// Between the starts of two writes: twenty a second, whatever happens to however many pods.
const INTERVAL: Duration = Duration::from_millis(50);
/// Most pods are enrolled before that: they are written once and not twice.
const WAITING_TOLD_AFTER: Duration = Duration::from_secs(2);
/// After a write the watch has this long to show it.
const ECHO: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

const ENROLLED: &str = "Enrolled";
const WAITING: &str = "Waiting";
const FAILED: &str = "Failed";
const NOT_IN_MESH: &str = "NotInMesh";
const COMPLETED: &str = "Completed";

/// What the source tells.
#[derive(Debug)]
pub enum Input {
    Objects {
        delta: Delta,
        /// Up to where policies have been told, with this.
        policies_read: Option<u64>,
    },
    Enrollment(Heard),
}

impl Input {
    /// What of it is of interest to whoever writes the conditions of policies.
    fn for_policies(&self) -> Option<policy_status::Input> {
        Some(match self {
            Self::Objects { delta, policies_read } => {
                let delta = policy_status::part(delta);
                if delta.is_empty() {
                    return None;
                }
                policy_status::Input::Objects { delta, read: *policies_read }
            }
            Self::Enrollment(Heard { node, record }) => {
                let has_pods = record.as_ref().is_some_and(|record| !record.places.is_empty());
                policy_status::Input::Node { name: node.clone(), has_pods }
            }
        })
    }
}

/// What the condition should say.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    enrolled: bool,
    reason: &'static str,
    message: String,
}

impl Wanted {
    fn no(reason: &'static str, message: impl Into<String>) -> Self {
        Self { enrolled: false, reason, message: message.into() }
    }

    fn is_said_by(&self, condition: &Condition) -> bool {
        condition.is_true() == self.enrolled
            && condition.reason == self.reason
            && condition.message == self.message
    }
}

/// What the condition of a pod should say; None where it is to stay as it is.
fn wanted(namespace: Option<&Namespace>, pod: &Pod, uid: &str, record: Option<&Record>) -> Option<Wanted> {
    let carried = pod.status.conditions.enrolled.as_ref();
    if pod.is_gone() {
        let stale = carried.is_some_and(Condition::is_true);
        return stale.then(|| Wanted::no(COMPLETED, "the pod has ended"));
    }
    let choice = mesh_choice(namespace, pod);
    if !choice.wanted {
        let told = carried.is_some() || choice.problem.is_some();
        let why = choice.problem.unwrap_or_else(|| "labels do not want it in the mesh".to_owned());
        return told.then(|| Wanted::no(NOT_IN_MESH, why));
    }
    // The agent's word counts more than what it said earlier: such a pod is not served.
    if let Some(message) = record.and_then(|record| record.failures.get(uid)) {
        return Some(Wanted::no(FAILED, message.clone()));
    }
    let Some(place) = Place::of(pod) else {
        let lacks = if pod.spec.node_name.is_none() { "node" } else { "address" };
        return Some(Wanted::no(WAITING, format!("the pod has no {lacks} yet")));
    };
    if record.and_then(|record| record.places.get(uid)) == Some(&place) {
        return Some(Wanted { enrolled: true, reason: ENROLLED, message: String::new() });
    }
    let node = place.node;
    Some(Wanted::no(WAITING, format!("the agent of node {node} has not reported it; does it run there?")))
}

/// The condition to write over `carried`. Its time is when its status last changed, not its words.
fn condition(wanted: Wanted, carried: Option<&Condition>, now: Timestamp) -> Condition {
    let status = if wanted.enrolled { "True" } else { "False" };
    let unchanged = carried.filter(|carried| carried.status == status);
    let since = unchanged.and_then(|carried| carried.last_transition_time.clone());
    Condition {
        kind: Condition::ENROLLED.to_owned(),
        status: status.to_owned(),
        reason: wanted.reason.to_owned(),
        message: wanted.message,
        observed_generation: None,
        last_transition_time: Some(since.unwrap_or_else(|| super::seconds(now))),
    }
}

/// The objects from which conditions follow.
struct Known {
    settings: MeshSettings,
    namespaces: BTreeMap<String, Arc<Namespace>>,
    pods: BTreeMap<Name, Arc<Pod>>,
    records: BTreeMap<String, Record>,
}

impl Known {
    /// Takes in what changed. Returns the pods that it concerns.
    fn apply(&mut self, input: Input) -> BTreeSet<Name> {
        let mut concerned = BTreeSet::new();
        match input {
            Input::Objects { delta: Delta { upserts, deletes }, .. } => {
                for ObjectKey { kind, namespace, name } in deletes {
                    match kind {
                        Kind::Pod => {
                            self.pods.remove(&(namespace.clone(), name.clone()));
                            concerned.insert((namespace, name));
                        }
                        Kind::Namespace => {
                            self.namespaces.remove(&name);
                            concerned.extend(self.pods_of(&name));
                        }
                        _ => {}
                    }
                }
                for object in upserts {
                    let ObjectKey { namespace, name, .. } = object.key();
                    match object {
                        Object::Pod(pod) => {
                            self.pods.insert((namespace.clone(), name.clone()), pod);
                            concerned.insert((namespace, name));
                        }
                        Object::Namespace(object) => {
                            concerned.extend(self.pods_of(&name));
                            self.namespaces.insert(name, object);
                        }
                        _ => {}
                    }
                }
            }
            Input::Enrollment(Heard { node, record }) => {
                let new = record.clone().unwrap_or_default();
                let old = match record {
                    Some(record) => self.records.insert(node, record),
                    None => self.records.remove(&node),
                };
                let old = old.unwrap_or_default();
                let uids = differing(&old.places, &new.places);
                let uids = uids.chain(differing(&old.failures, &new.failures));
                concerned.extend(uids.filter_map(|uid| self.settings.pod_of(uid)));
            }
        }
        concerned
    }

    fn pods_of(&self, namespace: &str) -> Vec<Name> {
        let from = (namespace.to_owned(), String::new());
        self.pods.range(from..).map(|(name, _)| name).take_while(|(of, _)| of == namespace).cloned().collect()
    }

    fn wanted(&self, name: &Name) -> Option<(&Arc<Pod>, Wanted)> {
        let pod = self.pods.get(name)?;
        let record = pod.spec.node_name.as_ref().and_then(|node| self.records.get(node));
        let uid = self.settings.pod_uid(&name.0, &name.1);
        let namespace = self.namespaces.get(&name.0).map(|namespace| &**namespace);
        Some((pod, wanted(namespace, pod, &uid, record)?))
    }
}

/// Keys of what is not the same in both.
fn differing<'a, T: PartialEq>(
    one: &'a BTreeMap<String, T>,
    other: &'a BTreeMap<String, T>,
) -> impl Iterator<Item = &'a String> {
    let changed = one.iter().filter(|(uid, value)| other.get(*uid) != Some(*value)).map(|(uid, _)| uid);
    changed.chain(other.keys().filter(|uid| !one.contains_key(*uid)))
}

/// Pods by when they are to be looked at.
#[derive(Debug, Default)]
struct Queue {
    by_time: BTreeSet<(Instant, Name)>,
    times: HashMap<Name, Instant>,
}

impl Queue {
    fn set(&mut self, name: &Name, at: Instant) {
        self.remove(name);
        self.by_time.insert((at, name.clone()));
        self.times.insert(name.clone(), at);
    }

    fn remove(&mut self, name: &Name) {
        if let Some(at) = self.times.remove(name) {
            self.by_time.remove(&(at, name.clone()));
        }
    }

    fn next(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    fn pop(&mut self) -> Option<Name> {
        let (_, name) = self.by_time.pop_first()?;
        self.times.remove(&name);
        Some(name)
    }
}

/// A write of one pod's condition, and how it went.
struct Attempt {
    name: Name,
    pod_uid: Option<String>,
    condition: Condition,
    result: Result<(), Refused>,
}

enum Refused {
    /// There is no such pod any more.
    Gone,
    Failed(String),
}

struct Written {
    pod_uid: Option<String>,
    condition: Condition,
    at: Instant,
}

struct Retry {
    not_before: Instant,
    pause: Duration,
}

struct Writer {
    client: Client,
    metrics: Metrics,
    known: Known,
    queue: Queue,
    /// What was just written and may not have come back by the watch.
    written: HashMap<Name, Written>,
    retries: HashMap<Name, Retry>,
    attempts: JoinSet<Attempt>,
    busy: HashSet<Name>,
    /// No write starts before.
    slot: Instant,
    complaint: String,
}

/// Writes conditions whenever this replica leads, until nothing more comes.
pub async fn run(
    client: Client,
    settings: MeshSettings,
    mut inputs: mpsc::Receiver<Input>,
    mut leads: watch::Receiver<bool>,
    reach: Reach,
    metrics: Metrics,
) {
    let (policies, queue) = mpsc::channel(QUEUE);
    let trust_domain = settings.trust_domain.clone();
    let (leader, counts) = (leads.clone(), metrics.clone());
    tokio::spawn(policy_status::run(client.clone(), trust_domain, queue, leader, reach, counts));
    let known =
        Known { settings, namespaces: BTreeMap::new(), pods: BTreeMap::new(), records: BTreeMap::new() };
    let mut writer = Writer {
        client,
        metrics,
        known,
        queue: Queue::default(),
        written: HashMap::new(),
        retries: HashMap::new(),
        attempts: JoinSet::new(),
        busy: HashSet::new(),
        slot: Instant::now(),
        complaint: String::new(),
    };
    let mut leading = false;
    loop {
        if leading != *leads.borrow_and_update() {
            leading = !leading;
            writer.start_over(leading);
        }
        let next = writer.next();
        tokio::select! {
            input = inputs.recv() => {
                let Some(input) = input else { return };
                if let Some(part) = input.for_policies() {
                    let _ = policies.send(part).await;
                }
                let concerned = writer.known.apply(input);
                if leading {
                    concerned.iter().for_each(|name| writer.consider(name));
                }
            }
            changed = leads.changed() => if changed.is_err() { return },
            Some(attempt) = writer.attempts.join_next() => writer.ended(attempt),
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => writer.write_next(),
        }
    }
}

impl Writer {
    /// A replica that begins to lead looks at every pod; one that does not lead writes nothing more.
    fn start_over(&mut self, leading: bool) {
        self.attempts.abort_all();
        self.queue = Queue::default();
        self.written.clear();
        self.retries.clear();
        self.busy.clear();
        if leading {
            let names: Vec<Name> = self.known.pods.keys().cloned().collect();
            names.iter().for_each(|name| self.consider(name));
        }
    }

    /// The pod, and the condition to write there; None if it says what it should.
    fn due(&self, name: &Name) -> Option<(&Arc<Pod>, Condition)> {
        let (pod, wanted) = self.known.wanted(name)?;
        let written = self
            .written
            .get(name)
            .filter(|written| written.pod_uid == pod.metadata.uid && written.at.elapsed() < ECHO);
        let carried = match written {
            Some(written) => Some(&written.condition),
            None => pod.status.conditions.enrolled.as_ref(),
        };
        if carried.is_some_and(|carried| wanted.is_said_by(carried)) {
            return None;
        }
        Some((pod, condition(wanted, carried, Timestamp::now())))
    }

    /// Puts a pod of which something changed in line.
    fn consider(&mut self, name: &Name) {
        let now = Instant::now();
        let carried = self.known.pods.get(name).map(|pod| pod.status.conditions.enrolled.as_ref());
        let settled = |written: &Written| {
            written.at + ECHO <= now || carried.is_none_or(|carried| carried == Some(&written.condition))
        };
        if self.written.get(name).is_some_and(settled) {
            self.written.remove(name);
        }
        let Some((pod, condition)) = self.due(name) else {
            self.queue.remove(name);
            self.retries.remove(name);
            if let Some(written) = self.written.get(name) {
                // If the watch shows something else by then, somebody else wrote there.
                self.queue.set(name, written.at + ECHO);
            }
            return;
        };
        let says_true = pod.status.conditions.enrolled.as_ref().is_some_and(Condition::is_true);
        let patience =
            if condition.reason == WAITING && !says_true { WAITING_TOLD_AFTER } else { Duration::ZERO };
        let mut at = now + patience;
        if let Some(earlier) = self.queue.times.get(name) {
            at = at.min(*earlier);
        }
        if let Some(retry) = self.retries.get(name) {
            at = at.max(retry.not_before);
        }
        self.queue.set(name, at);
    }

    /// When the next write is to start.
    fn next(&self) -> Option<Instant> {
        let next = self.queue.next().filter(|_| self.attempts.len() < AT_ONCE)?;
        Some(next.max(self.slot))
    }

    fn write_next(&mut self) {
        let Some(name) = self.queue.pop() else { return };
        if self.busy.contains(&name) {
            // Looked at again when that write has ended.
            return;
        }
        let Some((pod, condition)) = self.due(&name) else { return self.consider(&name) };
        let pod_uid = pod.metadata.uid.clone();
        self.slot = Instant::now() + INTERVAL;
        self.busy.insert(name.clone());
        self.attempts.spawn(attempt(self.client.clone(), name, pod_uid, condition));
    }

    fn ended(&mut self, attempt: Result<Attempt, JoinError>) {
        // Those that were broken off when this replica ceased to lead.
        let Ok(Attempt { name, pod_uid, condition, result }) = attempt else { return };
        self.busy.remove(&name);
        match result {
            Ok(()) => {
                self.metrics.conditions_written.inc();
                self.complaint.clear();
                self.retries.remove(&name);
                let at = Instant::now();
                self.written.insert(name.clone(), Written { pod_uid, condition, at });
                self.consider(&name);
            }
            Err(Refused::Gone) => drop(self.retries.remove(&name)),
            Err(Refused::Failed(why)) => {
                self.metrics.conditions_failed.inc();
                if self.complaint != why {
                    let (namespace, pod) = (&name.0, &name.1);
                    tracing::warn!(
                        target: "status",
                        "cannot write condition {} of Pod {namespace}/{pod}: {why}; trying again",
                        Condition::ENROLLED
                    );
                    self.complaint = why;
                }
                let pause = self.retries.get(&name).map_or(FIRST_RETRY, |r| (r.pause * 2).min(LAST_RETRY));
                let retry = Retry { not_before: Instant::now() + pause, pause };
                self.retries.insert(name.clone(), retry);
                self.consider(&name);
            }
        }
    }
}

/// One write. The patch names our condition only, by its type, and the pod's UID: another pod of the name is no business
/// of it.
async fn attempt(client: Client, name: Name, pod_uid: Option<String>, condition: Condition) -> Attempt {
    let pods: Api<v1::Pod> = Api::namespaced(client, &name.0);
    let patch = json!({"metadata": {"uid": pod_uid}, "status": {"conditions": [condition]}});
    let params = PatchParams { field_manager: Some("weft-control".to_owned()), ..PatchParams::default() };
    let write = async { pods.patch_status(&name.1, &params, &Patch::Strategic(patch)).await };
    let result = match tokio::time::timeout(REQUEST_TIMEOUT, write).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if code(&error) == 404 => Err(Refused::Gone),
        Ok(Err(error)) => Err(Refused::Failed(words(&error))),
        Err(_) => Err(Refused::Failed("no answer in time".to_owned())),
    };
    Attempt { name, pod_uid, condition, result }
}

#[cfg(test)]
mod tests;
