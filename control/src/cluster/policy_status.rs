//! The condition `Accepted` of AuthorizationPolicies: whether a policy is in force as it is written. Translation says that
//! (`translate::policies`); here it is written down.
//!
//! It follows from what is in the cluster alone, so every replica comes to the same; the one that leads writes it. There
//! are few policies and they change seldom: one write at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};
use weft_api::{AuthorizationPolicy, Kind, Object, ObjectKey, pod::Condition};
use weft_core::TrustDomain;

use super::{REQUEST_TIMEOUT, code, words};
use crate::{
    source::Delta,
    store::Name,
    translate::policies::{Reason, problem, targets},
};

const ACCEPTED: &str = "Accepted";
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);

/// What of a change is of interest here.
pub fn part(delta: &Delta) -> Delta {
    let kinds = [Kind::AuthorizationPolicy, Kind::Service];
    Delta {
        upserts: delta.upserts.iter().filter(|object| kinds.contains(&object.kind())).cloned().collect(),
        deletes: delta.deletes.iter().filter(|key| kinds.contains(&key.kind)).cloned().collect(),
    }
}

/// The objects from which conditions follow.
struct Known {
    trust_domain: TrustDomain,
    policies: BTreeMap<Name, Arc<AuthorizationPolicy>>,
    services: BTreeSet<Name>,
}

impl Known {
    fn new(trust_domain: TrustDomain) -> Self {
        Self { trust_domain, policies: BTreeMap::new(), services: BTreeSet::new() }
    }

    /// Takes in what changed. Returns the policies that it concerns.
    fn apply(&mut self, Delta { upserts, deletes }: Delta) -> BTreeSet<Name> {
        let mut concerned = BTreeSet::new();
        for ObjectKey { kind, namespace, name } in deletes {
            let name = (namespace, name);
            match kind {
                Kind::AuthorizationPolicy => drop(self.policies.remove(&name)),
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
                Object::AuthorizationPolicy(policy) => {
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
        policies.filter(|(_, policy)| targets(policy, service)).map(|(name, _)| name.clone()).collect()
    }

    /// The condition to write; None where it says already what it should.
    fn due(&self, name: &Name, now: Timestamp) -> Option<Condition> {
        let policy = self.policies.get(name)?;
        let (accepted, reason, message) = self.verdict(name, policy);
        let status = if accepted { "True" } else { "False" };
        let generation = policy.metadata.generation;
        let carried = policy.status.conditions.iter().find(|condition| condition.kind == ACCEPTED);
        let says_it = |c: &&Condition| {
            (c.status.as_str(), c.reason.as_str()) == (status, reason)
                && c.message == message
                && c.observed_generation == generation
        };
        if carried.filter(says_it).is_some() {
            return None;
        }
        let unchanged = carried.filter(|carried| carried.status == status);
        let since = unchanged.and_then(|carried| carried.last_transition_time.clone());
        Some(Condition {
            kind: ACCEPTED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            observed_generation: generation,
            last_transition_time: Some(since.unwrap_or_else(|| super::seconds(now))),
        })
    }

    fn verdict(&self, name: &Name, policy: &AuthorizationPolicy) -> (bool, &'static str, String) {
        match problem(&self.trust_domain, name, policy, |service| self.services.contains(service)) {
            None => (true, ACCEPTED, String::new()),
            Some(problem) => {
                let reason = match problem.reason {
                    Reason::Invalid => "Invalid",
                    Reason::TargetNotFound => "TargetNotFound",
                    Reason::TooLarge => "TooLarge",
                };
                (false, reason, problem.why)
            }
        }
    }
}

/// Writes conditions whenever this replica leads, until nothing more comes.
pub async fn run(
    client: Client,
    trust_domain: TrustDomain,
    mut deltas: mpsc::Receiver<Delta>,
    mut leads: watch::Receiver<bool>,
) {
    let mut known = Known::new(trust_domain);
    let mut queue: BTreeSet<Name> = BTreeSet::new();
    let mut leading = false;
    let mut complaint = String::new();
    let mut not_before = Instant::now();
    loop {
        if leading != *leads.borrow_and_update() {
            leading = !leading;
            queue = known.policies.keys().cloned().collect();
        }
        let next = queue.first().filter(|_| leading).cloned();
        let due = next.as_ref().and_then(|name| Some((name.clone(), known.due(name, Timestamp::now())?)));
        let (Some(next), None) = (&next, &due) else {
            tokio::select! {
                biased;
                // What is newer goes before what is written.
                delta = deltas.recv() => {
                    let Some(delta) = delta else { return };
                    queue.append(&mut known.apply(delta));
                }
                changed = leads.changed() => if changed.is_err() { return },
                result = attempt(&client, due.as_ref(), not_before) => match result {
                    Ok(name) => {
                        complaint.clear();
                        queue.remove(&name);
                    }
                    Err(why) => {
                        if complaint != why {
                            tracing::warn!(target: "status", "cannot write a policy's condition: {why}; trying again");
                            complaint = why;
                        }
                        not_before = Instant::now() + RETRY;
                    }
                },
            }
            continue;
        };
        queue.remove(next);
    }
}

/// One write, of our condition only. What is gone needs none. Never ends if nothing is due.
async fn attempt(
    client: &Client,
    due: Option<&(Name, Condition)>,
    not_before: Instant,
) -> Result<Name, String> {
    let Some((name, condition)) = due else { return std::future::pending().await };
    sleep_until(not_before).await;
    let kind = Kind::AuthorizationPolicy;
    let (group, version) = kind.api_version().split_once('/').unwrap_or_default();
    let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural());
    let policies: Api<DynamicObject> = Api::namespaced_with(client.clone(), &name.0, &resource);
    let patch = json!({
        "apiVersion": kind.api_version(), "kind": kind.as_str(), "metadata": {"name": name.1},
        "status": {"conditions": [condition]},
    });
    let params = PatchParams::apply("weft-control").force();
    match timeout(REQUEST_TIMEOUT, policies.patch_status(&name.1, &params, &Patch::Apply(patch))).await {
        Ok(Ok(_)) => Ok(name.clone()),
        Ok(Err(error)) if code(&error) == 404 => Ok(name.clone()),
        Ok(Err(error)) => Err(words(&error)),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use weft_proto::security::Action;

    use super::*;
    use crate::translate::tests::{objects, translated};

    fn known(text: &str) -> Known {
        let mut known = Known::new(TrustDomain::new("cluster.local").unwrap());
        known.apply(Delta { upserts: objects(text), deletes: Vec::new() });
        known
    }

    const POLICY: &str = "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
                          metadata: {name: p, namespace: shop, generation: 3}\n";

    fn due(rest: &str) -> Option<(String, String, String)> {
        let name = ("shop".to_owned(), "p".to_owned());
        let condition = known(&format!("{POLICY}{rest}")).due(&name, Timestamp::UNIX_EPOCH)?;
        assert_eq!(condition.observed_generation, Some(3));
        Some((condition.status, condition.reason, condition.message))
    }

    #[test]
    fn says_whether_a_policy_was_understood() {
        let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n";
        let targets = "spec: {targetRefs: [{kind: Service, name: web}]}\n";
        let listing = |accounts: usize| {
            let accounts: Vec<String> =
                (100..100 + accounts).map(|number| format!("somebody-{number}")).collect();
            format!("spec: {{rules: [{{from: [{{serviceAccounts: [{}]}}]}}]}}\n", accounts.join(", "))
        };
        for (rest, status, reason, words) in [
            ("spec: {}\n".to_owned(), "True", "Accepted", ""),
            ("spec: {rules: [{from: []}]}\n".to_owned(), "False", "Invalid", "spec.rules[0].from"),
            ("spec: {moods: []}\n".to_owned(), "False", "Invalid", "moods"),
            (String::new(), "False", "Invalid", "missing"),
            (targets.to_owned(), "False", "TargetNotFound", "no Service web"),
            (format!("{targets}{service}"), "True", "Accepted", ""),
            // Nobody knows whom it is about, whatever else is wrong with it.
            (targets.replace("spec: {", "spec: {moods: [], "), "False", "TargetNotFound", "no Service web"),
            (listing(700), "True", "Accepted", ""),
            (listing(900), "False", "TooLarge", "32768 bytes"),
        ] {
            let (is, why, message) = due(&rest).unwrap();
            assert_eq!((is.as_str(), why.as_str()), (status, reason), "{rest}: {message}");
            assert!(message.contains(words), "{rest}: {message}");

            let translation = translated(&format!("{POLICY}{rest}"));
            let problem = translation.problems.get("AuthorizationPolicy shop/p");
            assert_eq!(problem.map(String::as_str).unwrap_or_default(), message, "{rest}");
            let mut own = translation.policies.values().filter(|policy| policy.namespace == "shop");
            let denies = own.next().is_some_and(|policy| policy.action() == Action::Deny);
            assert_eq!(denies, status == "False", "{rest}");
        }
    }

    #[test]
    fn what_is_said_already_is_not_written_again() {
        let said = |generation: i64, status: &str| {
            let condition = format!(
                "{{type: Accepted, status: '{status}', reason: Accepted, observedGeneration: {generation}}}"
            );
            due(&format!(
                "spec: {{}}\nstatus: {{conditions: [{{type: Other, status: 'True'}}, {condition}]}}\n"
            ))
        };
        assert_eq!(said(3, "True"), None);
        assert!(said(2, "True").is_some());
        assert!(said(3, "False").is_some());
    }

    #[test]
    fn a_service_that_comes_or_goes_concerns_the_policies_that_target_it() {
        let mut known = known(&format!("{POLICY}spec: {{targetRefs: [{{kind: Service, name: web}}]}}\n"));
        let service = objects("apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n");
        let key = service[0].key();
        let concerned: BTreeSet<Name> = [("shop".to_owned(), "p".to_owned())].into();
        assert_eq!(known.apply(Delta { upserts: service.clone(), deletes: Vec::new() }), concerned);
        assert_eq!(known.apply(Delta { upserts: service, deletes: Vec::new() }), BTreeSet::new());
        assert_eq!(known.apply(Delta { upserts: Vec::new(), deletes: vec![key] }), concerned);
    }
}
