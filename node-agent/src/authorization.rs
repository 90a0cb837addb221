//! Who may call the pods of this node. The policies come from the controller, and every workload names those in force for
//! it; here they are compiled, once a change, into what the workers ask.
//!
//! A policy that is named and not there is unknown, not absent: whoever calls is held until it has come, and then refused.
//! A policy that cannot be understood denies. What is open when policies change is decided again, by the connection itself.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

use tokio::sync::watch;
use tracing::warn;
use weft_core::{
    SpiffeId,
    policy::{Attempt, Decision, Guard, Policy, Verdict},
};
use weft_proto::{
    authorization::{self, TAG},
    type_url,
};

use crate::{
    connection::{Connection, Refusal},
    pod::PodHandle,
    state::Snapshot,
    worker::Worker,
};

/// What is in force for a pod; None while a policy that is named has not come.
type InForce = Option<Arc<Guard>>;

/// What is in force for each pod of this node, by uid. Shared with the workers; follows changes.
#[derive(Debug, Clone, Default)]
pub struct Guarded(imbl::HashMap<Arc<str>, watch::Receiver<InForce>>);

/// All policies, and who is guarded by which.
#[derive(Debug, Default)]
pub struct Guards {
    /// By their names on the wire.
    policies: BTreeMap<Arc<str>, Arc<Policy>>,
    pods: BTreeMap<Arc<str>, Pod>,
    guarded: Guarded,
}

#[derive(Debug)]
struct Pod {
    /// What it is guarded by, in the workload's order. None without a workload.
    named: Option<Vec<Named>>,
    in_force: watch::Sender<InForce>,
}

/// A policy's name, and the policy if it has come.
type Named = (Arc<str>, Option<Arc<Policy>>);

impl Guards {
    /// Takes in what changed of policies.
    pub fn apply<'a>(&mut self, upserts: impl Iterator<Item = (&'a str, Policy)>, removed: &[String]) {
        for name in removed {
            self.policies.remove(name.as_str());
        }
        self.policies.extend(upserts.map(|(name, policy)| (name.into(), Arc::new(policy))));
    }

    /// Whether there is a policy that people know by that name.
    pub fn has(&self, name: &str) -> bool {
        let tagged = format!("{name}{TAG}");
        let from = (Bound::Included(tagged.as_str()), Bound::Unbounded);
        let is_tagged = |(found, _): (&Arc<str>, &Arc<Policy>)| found.starts_with(&tagged);
        self.policies.contains_key(name) || self.policies.range::<str, _>(from).next().is_some_and(is_tagged)
    }

    /// Brings what is in force in line with `next`, in which resources of a type are new, or no longer there.
    pub fn follow(&mut self, next: &Snapshot, type_url: &str, new: &[&str], removed: &[&str]) -> Guarded {
        let changed = new.iter().chain(removed).copied();
        match type_url {
            type_url::AUTHORIZATION => {
                let changed: HashSet<&str> = changed.collect();
                let concerned =
                    |pod: &Pod| pod.named.iter().flatten().any(|(name, _)| changed.contains(&**name));
                let pods = self.pods.iter().filter(|(_, pod)| concerned(pod)).map(|(uid, _)| uid.clone());
                pods.collect::<Vec<_>>().iter().for_each(|uid| self.put_in_force(next, uid));
            }
            type_url::ADDRESS => {
                for (uid, _) in changed.filter_map(|name| next.local.get_key_value(name)) {
                    self.put_in_force(next, uid);
                }
            }
            type_url::LOCAL_WORKLOAD => {
                for (uid, _) in changed.filter_map(|name| next.local.get_key_value(name)) {
                    self.put_in_force(next, uid);
                }
                removed.iter().for_each(|uid| self.forget(uid));
                // A pod that is not heard of may run on: if it comes back, its open connections follow it again.
                self.pods
                    .retain(|uid, pod| next.local.contains_key(uid) || pod.in_force.receiver_count() > 0);
            }
            _ => {}
        }
        self.guarded.clone()
    }

    fn put_in_force(&mut self, next: &Snapshot, uid: &Arc<str>) {
        let named = |name: &Arc<str>| (name.clone(), self.policies.get(name).cloned());
        // Without its workload nobody can say what is in force.
        let workload = next.mesh.workload(uid);
        let named: Option<Vec<Named>> = workload.map(|w| w.policies.iter().map(named).collect());
        let there = || named.as_ref()?.iter().map(|(_, policy)| policy.clone()).collect::<Option<Vec<_>>>();
        let guard = || there().map(|policies| Arc::new(Guard::new(policies)));
        let (guarded, known) = (&mut self.guarded.0, self.pods.get_mut(uid));
        match known {
            Some(pod) => {
                if !is_same(pod.named.as_deref(), named.as_deref()) {
                    pod.in_force.send_replace(guard());
                    pod.named = named;
                }
                if !guarded.contains_key(uid) {
                    guarded.insert(uid.clone(), pod.in_force.subscribe());
                }
            }
            None => {
                let (in_force, receiver) = watch::channel(guard());
                guarded.insert(uid.clone(), receiver);
                self.pods.insert(uid.clone(), Pod { named, in_force });
            }
        }
    }

    fn forget(&mut self, uid: &str) {
        self.guarded.0.remove(uid);
        if let Some(pod) = self.pods.get_mut(uid) {
            pod.named = None;
            pod.in_force.send_replace(None);
        }
    }
}

fn is_same(one: Option<&[Named]>, other: Option<&[Named]>) -> bool {
    let same_policy = |one: &Option<Arc<Policy>>, other: &Option<Arc<Policy>>| match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (one, other) => one.is_none() && other.is_none(),
    };
    let same = |((a, one), (b, other)): (&Named, &Named)| a == b && same_policy(one, other);
    match (one, other) {
        (Some(one), Some(other)) => one.len() == other.len() && one.iter().zip(other).all(same),
        (one, other) => one.is_none() && other.is_none(),
    }
}

/// A caller that was let in. Whether it may stay is decided again with every change of policies.
pub struct Admission {
    in_force: watch::Receiver<InForce>,
    identity: Option<SpiffeId>,
    source: IpAddr,
    port: u16,
}

/// Lets a caller in, or refuses it, as policies say; waits for those that have not come yet. `identity` is proven.
pub async fn admit(
    worker: &Worker,
    pod: &PodHandle,
    connection: &mut Connection,
    identity: Option<SpiffeId>,
    source: IpAddr,
    port: u16,
) -> Result<Admission, Refusal> {
    let known = |snapshot: &Snapshot| {
        let in_force = snapshot.guarded.0.get(&pod.uid)?;
        in_force.borrow().is_some().then(|| in_force.clone())
    };
    let in_force = worker.hold(known).await.ok_or_else(|| {
        Refusal::new("policy_unknown", "the policies in force for the pod have not come from the controller")
    })?;
    let mut admission = Admission { in_force, identity, source, port };
    match admission.judge() {
        Some(decision) => {
            connection.judged(&decision);
            match decision.verdict {
                Verdict::Denied => Err(denial(&decision)),
                Verdict::Allowed | Verdict::Audited => Ok(admission),
            }
        }
        // It has become unknown since.
        None => Err(Refusal::new("policy_unknown", "the policies in force for the pod are changing")),
    }
}

impl Admission {
    /// As of now. None where nobody can say.
    fn judge(&mut self) -> Option<Decision> {
        let guard = self.in_force.borrow_and_update().clone()?;
        let attempt = Attempt { identity: self.identity.as_ref(), source: self.source, port: self.port };
        Some(guard.decide(&attempt))
    }

    /// Ends when policies no longer admit the caller, with why. While they are unknown the last verdict holds: it was
    /// given on what was known, and what comes is decided in a moment.
    pub async fn revoked(&mut self) -> (Decision, Refusal) {
        loop {
            if self.in_force.changed().await.is_err() {
                // The pod leaves, and its connections end otherwise.
                std::future::pending::<()>().await;
            }
            if let Some(decision) = self.judge().filter(|decision| decision.verdict == Verdict::Denied) {
                let refusal = denial(&decision);
                return (decision, refusal);
            }
        }
    }
}

/// What the caller's agent is told. A caller outside the mesh is told nothing.
fn denial(decision: &Decision) -> Refusal {
    let by = match &decision.policy {
        Some(policy) => format!("denied by policy {policy}"),
        None => "denied: no Allow policy admits it".to_owned(),
    };
    Refusal { reason: "denied_by_policy", detail: by }
}

/// Reads a policy. One that cannot be understood is read as one that denies.
pub fn read(name: &str, value: &[u8]) -> Policy {
    authorization::read(name, value).unwrap_or_else(|why| {
        warn!(policy = name, why, "a policy cannot be understood; it denies");
        Policy::unintelligible(name.into())
    })
}

#[cfg(test)]
mod tests;
