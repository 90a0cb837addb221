//! What the conditions of policies follow from: the policies, the Services that exist, the nodes with enrolled pods, and how
//! far each of those has followed. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;
use weft_api::{AuthorizationPolicy, Kind, Object, ObjectKey, pod::Condition};
use weft_core::TrustDomain;

use super::{Input, reach::Reached};
use crate::{
    cluster::seconds,
    source::Delta,
    store::Name,
    translate::policies::{Reason, problem, targets},
};

const ACCEPTED: &str = AuthorizationPolicy::ACCEPTED;
const PROGRAMMED: &str = AuthorizationPolicy::PROGRAMMED;
const PENDING: &str = "Pending";
/// So many of the nodes that a policy waits for are named.
const NAMED: usize = 5;

pub struct Known {
    trust_domain: TrustDomain,
    policies: BTreeMap<Name, Policy>,
    services: BTreeSet<Name>,
    /// Those with enrolled pods. On others there is nothing to enforce.
    nodes: BTreeSet<String>,
    reached: Arc<Reached>,
    /// How far every one of `nodes` has followed.
    everywhere: u64,
    /// The policies of which it is not written down that every node enforces them.
    pending: BTreeSet<Name>,
}

struct Policy {
    object: Arc<AuthorizationPolicy>,
    /// Who has followed up to here has this generation of it.
    since: Option<u64>,
}

/// What a condition says, of the generation that is there.
struct Said {
    kind: &'static str,
    holds: bool,
    reason: &'static str,
    message: String,
}

impl Known {
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            policies: BTreeMap::new(),
            services: BTreeSet::new(),
            nodes: BTreeSet::new(),
            reached: Arc::default(),
            everywhere: u64::MAX,
            pending: BTreeSet::new(),
        }
    }

    pub fn policies(&self) -> impl Iterator<Item = &Name> {
        self.policies.keys()
    }

    /// Takes in what changed. Returns the policies that it concerns at once.
    pub fn apply(&mut self, input: Input) -> BTreeSet<Name> {
        match input {
            Input::Objects { delta, read } => self.objects(delta, read),
            Input::Node { name, has_pods } => {
                let changed = if has_pods { self.nodes.insert(name) } else { self.nodes.remove(&name) };
                if !changed {
                    return BTreeSet::new();
                }
                self.count();
                self.pending.clone()
            }
        }
    }

    /// Takes in how far nodes have followed.
    pub fn follow(&mut self, reached: Arc<Reached>) {
        self.reached = reached;
        self.count();
    }

    fn count(&mut self) {
        let reached = |node| self.reached.get(node).copied().unwrap_or_default();
        self.everywhere = self.nodes.iter().map(reached).min().unwrap_or(u64::MAX);
    }

    fn objects(&mut self, Delta { upserts, deletes }: Delta, read: Option<u64>) -> BTreeSet<Name> {
        let mut concerned = BTreeSet::new();
        for ObjectKey { kind, namespace, name } in deletes {
            let name = (namespace, name);
            match kind {
                Kind::AuthorizationPolicy => {
                    self.policies.remove(&name);
                    self.pending.remove(&name);
                }
                Kind::Service => {
                    self.services.remove(&name);
                    concerned.extend(self.targeting(&name));
                }
                _ => {}
            }
        }
        for object in upserts {
            let ObjectKey { namespace, name, .. } = object.key();
            let name = (namespace, name);
            match object {
                Object::AuthorizationPolicy(object) => {
                    let known = self.policies.get(&name).filter(|known| known.is_of_the_same(&object));
                    let since = known.map_or(read, |known| known.since);
                    let policy = Policy { object, since };
                    match policy.is_pending() {
                        true => self.pending.insert(name.clone()),
                        false => self.pending.remove(&name),
                    };
                    self.policies.insert(name.clone(), policy);
                    concerned.insert(name);
                }
                Object::Service(_) if self.services.insert(name.clone()) => {
                    concerned.extend(self.targeting(&name));
                }
                _ => {}
            }
        }
        concerned
    }

    fn targeting(&self, (namespace, service): &Name) -> Vec<Name> {
        let from = (namespace.clone(), String::new());
        let policies = self.policies.range(from..).take_while(|(name, _)| name.0 == *namespace);
        policies
            .filter(|(_, policy)| targets(&policy.object, service))
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// The policies of which it is not written down that every node enforces them.
    pub fn pending(&self) -> &BTreeSet<Name> {
        &self.pending
    }

    /// The conditions to write; None where they say already what they should.
    pub fn due(&self, name: &Name, now: Timestamp) -> Option<Vec<Condition>> {
        let policy = self.policies.get(name)?;
        let accepted = self.accepted(name, &policy.object);
        let programmed = self.programmed(policy, accepted.holds);
        let said: Vec<Said> = [Some(accepted), programmed].into_iter().flatten().collect();
        let is_written = said.iter().all(|said| said.is_said_by(policy));
        (!is_written).then(|| said.into_iter().map(|said| policy.condition(said, now)).collect())
    }

    fn accepted(&self, name: &Name, policy: &AuthorizationPolicy) -> Said {
        let is_there = |service: &Name| self.services.contains(service);
        let (holds, reason, message) = match problem(&self.trust_domain, name, policy, is_there) {
            None => (true, ACCEPTED, String::new()),
            Some(problem) => {
                let reason = match problem.reason {
                    Reason::Invalid => "Invalid",
                    Reason::TargetNotFound => "TargetNotFound",
                    Reason::TooLarge => "TooLarge",
                };
                (false, reason, problem.why)
            }
        };
        Said { kind: ACCEPTED, holds, reason, message }
    }

    /// Whether every node enforces this generation. Where it was so, it is: nodes that come later begin with it.
    fn programmed(&self, policy: &Policy, accepted: bool) -> Option<Said> {
        let since = policy.since?;
        let carried = policy.object.condition(PROGRAMMED).filter(|_| policy.is_programmed());
        let (holds, reason, message) = match carried {
            _ if !accepted => {
                (false, "NotAccepted", "it is not in force as it is written: see Accepted".to_owned())
            }
            Some(carried) => (true, PROGRAMMED, carried.message.clone()),
            // What nodes have is what stood for it. That this has ended is told with what is written here.
            None if was_refused(&policy.object) => (false, PENDING, "nodes are being told".to_owned()),
            None if since <= self.everywhere => (true, PROGRAMMED, self.enforced()),
            None => (false, PENDING, self.waiting(since)),
        };
        Some(Said { kind: PROGRAMMED, holds, reason, message })
    }

    fn enforced(&self) -> String {
        match self.nodes.len() {
            0 => "no node had pods in the mesh then".to_owned(),
            all => format!("{all} of {all} nodes that had pods in the mesh then enforce it"),
        }
    }

    fn waiting(&self, since: u64) -> String {
        let is_behind = |node: &&String| self.reached.get(*node).is_none_or(|reached| *reached < since);
        let mut behind = self.nodes.iter().filter(is_behind);
        let mut names: Vec<String> = behind.by_ref().take(NAMED).cloned().collect();
        let more = behind.count();
        let (all, late) = (self.nodes.len(), names.len() + more);
        if more > 0 {
            names.push(format!("{more} more"));
        }
        let (enforce, names) = (all - late, names.join(", "));
        format!("{enforce} of {all} nodes with pods in the mesh enforce it; waiting for {names}")
    }
}

impl Policy {
    /// Whether `other` says the same, and nodes have the same of both.
    fn is_of_the_same(&self, other: &AuthorizationPolicy) -> bool {
        let (ours, theirs) = (&self.object.metadata, &other.metadata);
        (&ours.uid, ours.generation) == (&theirs.uid, theirs.generation)
            && was_refused(&self.object) == was_refused(other)
    }

    /// Whether somebody waits for every node to enforce it.
    fn is_pending(&self) -> bool {
        self.since.is_some() && !was_refused(&self.object) && !self.is_programmed()
    }

    /// Whether it is written that every node enforces this generation.
    fn is_programmed(&self) -> bool {
        let generation = self.object.metadata.generation;
        self.object.condition(PROGRAMMED).is_some_and(|c| c.is_true() && c.observed_generation == generation)
    }

    /// Its time is when its status last changed, not its words.
    fn condition(&self, Said { kind, holds, reason, message }: Said, now: Timestamp) -> Condition {
        let unchanged = self.object.condition(kind).filter(|carried| carried.is_true() == holds);
        let since = unchanged.and_then(|carried| carried.last_transition_time.clone());
        Condition {
            kind: kind.to_owned(),
            status: if holds { "True" } else { "False" }.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: self.object.metadata.generation,
            last_transition_time: Some(since.unwrap_or_else(|| seconds(now))),
        }
    }
}

/// Whether it is written that something else is in force in its place.
fn was_refused(policy: &AuthorizationPolicy) -> bool {
    policy.condition(ACCEPTED).is_some_and(|accepted| !accepted.is_true())
}

impl Said {
    fn is_said_by(&self, policy: &Policy) -> bool {
        let generation = policy.object.metadata.generation;
        policy.object.condition(self.kind).is_some_and(|carried| {
            (
                carried.is_true(),
                carried.reason.as_str(),
                carried.message.as_str(),
                carried.observed_generation,
            ) == (self.holds, self.reason, self.message.as_str(), generation)
        })
    }
}

#[cfg(test)]
mod tests;
