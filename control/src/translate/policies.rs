//! AuthorizationPolicies: what each says on the wire, and which are in force for a pod. One at a time.
//!
//! The wire knows Allow, Deny and, as a dry run, Audit. All else is said with these three, so that whoever enforces them
//! needs to know no more: a default is a built-in Allow, which is named where no other is; a floor is a built-in Deny.
//!
//! Agents hear of a policy's content and of who it is about one after the other. So its name on the wire changes with its
//! action and with what it is about: in between, those who name it find nothing, which is unknown and no verdict. Rules
//! that change alone take the place of the old ones in one step.

mod rules;

use std::collections::BTreeMap;

use prost::Message;
use weft_api::{
    AuthorizationPolicy, DefaultInbound, Pod,
    authorization_policy::{Action, PolicySpec, Principal, Source, Target},
    inbound_choice,
};
use weft_core::TrustDomain;
use weft_proto::{
    authorization::TAG,
    security::{self as wire, Authorization, Scope, StringMatch},
};
use weft_xds::Version;

use self::rules::{clause, pattern, wire_rules};
use super::{MeshSettings, services::Membership};
use crate::store::{Name, Store};

/// Where built-in policies are. No namespace can have that name, since it has a dot.
const BUILT_IN: &str = "policy.weft.dev";
/// What denies everybody.
const NOBODY: &str = "nobody";
/// The most policies that one pod can have: each of them costs every agent some bytes for each of the pods.
const MAX_OF_POD: usize = 256;
/// The largest policy on the wire. All policies go to all nodes.
const MAX_BYTES: usize = 32 << 10;

/// A policy as it is enforced. One that cannot be is replaced by one that denies everybody.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Policy {
    /// On the wire.
    pub name: String,
    pub content: Authorization,
    /// For a person.
    pub problem: Option<String>,
    target: Target,
    allows: bool,
    /// Asks who the caller is, to deny him.
    denies_identities: bool,
}

/// What is in force for one pod.
#[derive(Debug, Default)]
pub(super) struct InForce {
    /// Names on the wire, in order.
    pub names: Vec<String>,
    /// For a person.
    pub problem: Option<String>,
}

pub(super) fn in_force(
    store: &Store,
    policies: &BTreeMap<Name, Policy>,
    settings: &MeshSettings,
    name: &Name,
    pod: &Pod,
    membership: &Membership,
) -> InForce {
    let inbound = settings.inbound;
    let namespace = store.namespaces.get(&name.0).map(|namespace| &**namespace);
    let choice = inbound_choice(inbound.default, inbound.floor, namespace, pod);
    let built_in = |name: &str| format!("{BUILT_IN}/{name}");
    let from = (name.0.clone(), String::new());
    let of_namespace = policies.range(from..).take_while(|(of, _)| of.0 == name.0).map(|(_, policy)| policy);
    let is_about = |policy: &&Policy| is_about(store, settings, &name.0, &policy.target, pod, membership);
    let about: Vec<&Policy> = of_namespace.filter(is_about).collect();
    if about.len() > MAX_OF_POD {
        let problem =
            format!("{} policies are about it, more than {MAX_OF_POD}: nobody may call it", about.len());
        return InForce { names: vec![built_in(NOBODY)], problem: Some(problem) };
    }
    let mut names: Vec<String> = about.iter().map(|policy| policy.name.clone()).collect();
    let mut default = choice.default;
    // Whoever shows no identity cannot be told from those that are named.
    if about.iter().any(|policy| policy.denies_identities) {
        default = default.max(DefaultInbound::AllAuthenticated);
    }
    if default != DefaultInbound::AllUnauthenticated && !about.iter().any(|policy| policy.allows) {
        names.push(built_in(default.as_str()));
    }
    names.extend(floor(inbound.floor).map(built_in));
    InForce { names, problem: choice.problem }
}

/// Whether a policy targets that Service, so that with the Service changes what it is about.
pub fn targets(policy: &AuthorizationPolicy, service: &str) -> bool {
    matches!(policy.target(), Target::Services(services) if services.contains(service))
}

/// A Service's pods are those that it selects, also before any slice has them, and those that a slice has.
fn is_about(
    store: &Store,
    settings: &MeshSettings,
    namespace: &str,
    target: &Target,
    pod: &Pod,
    membership: &Membership,
) -> bool {
    let labels = &pod.metadata.labels;
    let has =
        |wanted: &BTreeMap<String, String>| wanted.iter().all(|(key, value)| labels.get(key) == Some(value));
    let is_behind = |name: &String| {
        let service = store.services.get(&(namespace.to_owned(), name.clone()));
        let selector = service.map(|service| &service.spec.selector).filter(|selector| !selector.is_empty());
        selector.is_some_and(has) || membership.services.contains_key(&settings.service_key(namespace, name))
    };
    match target {
        Target::Namespace => true,
        Target::Labels(wanted) => has(wanted),
        Target::Services(services) => services.iter().any(is_behind),
    }
}

fn names_identities(spec: &PolicySpec) -> bool {
    spec.rules.iter().flat_map(|rule| &rule.from).any(Source::names_identities)
}

/// What a floor is called that holds for Allows as well. As the least that a default may be, each does.
fn floor(floor: DefaultInbound) -> Option<&'static str> {
    match floor {
        DefaultInbound::AllAuthenticated => Some("floor-all-authenticated"),
        DefaultInbound::ClusterAuthenticated | DefaultInbound::Deny => Some("floor-cluster-authenticated"),
        DefaultInbound::AllUnauthenticated | DefaultInbound::Audit => None,
    }
}

/// What stands for defaults and floors, by name.
pub(super) fn built_in(trust_domain: &TrustDomain) -> BTreeMap<String, Authorization> {
    let cluster = || pattern(&Principal::Prefix(format!("{trust_domain}/")));
    let somebody = || pattern(&Principal::Any);
    let is = |one: StringMatch| vec![wire::Match { principals: vec![one], ..Default::default() }];
    let is_not = |one: StringMatch| vec![wire::Match { not_principals: vec![one], ..Default::default() }];
    let [allow, deny] = [wire::Action::Allow, wire::Action::Deny];
    [
        (NOBODY, deny, Some(Vec::new()), false),
        ("deny", allow, None, false),
        ("audit", allow, None, true),
        ("all-authenticated", allow, Some(is(somebody())), false),
        ("cluster-authenticated", allow, Some(is(cluster())), false),
        ("floor-all-authenticated", deny, Some(is_not(somebody())), false),
        ("floor-cluster-authenticated", deny, Some(is_not(cluster())), false),
    ]
    .into_iter()
    .map(|(name, action, matches, dry_run)| {
        let rules = matches.map(|m| wire::Rule { clauses: m.into_iter().map(|m| clause(vec![m])).collect() });
        let policy = authorization(BUILT_IN, name.to_owned(), action, dry_run, rules.into_iter().collect());
        (format!("{BUILT_IN}/{name}"), policy)
    })
    .collect()
}

/// The policy of that name.
pub(super) fn policy(store: &Store, settings: &MeshSettings, name: &Name) -> Option<Policy> {
    let policy = store.policies.get(name)?;
    let has_service = |service: &Name| store.services.contains_key(service);
    Some(match enforceable(&settings.trust_domain, name, policy, has_service) {
        Ok((spec, (action, dry_run, rules))) => Policy {
            target: spec.target.clone(),
            allows: spec.action == Action::Allow,
            denies_identities: spec.action == Action::Deny && names_identities(spec),
            ..made(name, &spec.target, action, dry_run, rules)
        },
        Err(Problem { why, target, .. }) => {
            let nobody = made(name, &target, wire::Action::Deny, false, vec![wire::Rule::default()]);
            Policy { problem: Some(why), target, ..nobody }
        }
    })
}

/// Why a policy is not in force as it is written; whatever calls its target is denied instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub reason: Reason,
    /// For a person.
    pub why: String,
    target: Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Invalid,
    TargetNotFound,
    TooLarge,
}

/// What is said of a policy is this, and what is enforced follows from it.
pub fn problem(
    trust_domain: &TrustDomain,
    name: &Name,
    policy: &AuthorizationPolicy,
    has_service: impl Fn(&Name) -> bool,
) -> Option<Problem> {
    enforceable(trust_domain, name, policy, has_service).err()
}

fn enforceable<'a>(
    trust_domain: &TrustDomain,
    name: &Name,
    policy: &'a AuthorizationPolicy,
    has_service: impl Fn(&Name) -> bool,
) -> Result<(&'a PolicySpec, Content), Problem> {
    let (namespace, _) = name;
    let missing = missing_services(namespace, policy.target(), has_service);
    if !missing.is_empty() {
        let why = format!(
            "there is no Service {} in namespace {namespace}; until there is it denies everything in its namespace",
            missing.join(", ")
        );
        return Err(Problem { reason: Reason::TargetNotFound, why, target: Target::Namespace });
    }
    let mended = |reason, why: &str| {
        let why = format!("{why}; until it is mended it denies everything that it is about");
        Problem { reason, why, target: policy.target().clone() }
    };
    let spec = policy.spec.as_ref().map_err(|unintelligible| mended(Reason::Invalid, &unintelligible.why))?;
    let content = content(trust_domain, namespace, spec).map_err(|why| mended(Reason::TooLarge, &why))?;
    Ok((spec, content))
}

/// The Services that it targets and that are not there.
fn missing_services<'a>(
    namespace: &str,
    target: &'a Target,
    has_service: impl Fn(&Name) -> bool,
) -> Vec<&'a str> {
    let Target::Services(services) = target else { return Vec::new() };
    let is_missing = |name: &&String| !has_service(&(namespace.to_owned(), (*name).clone()));
    services.iter().filter(is_missing).map(String::as_str).collect()
}

/// What does not depend on the policy's rules, and is part of its name.
fn made(
    (namespace, name): &Name,
    target: &Target,
    action: wire::Action,
    dry_run: bool,
    rules: Vec<wire::Rule>,
) -> Policy {
    let tag = Version::of(format!("{action:?} {dry_run} {target:?}").as_bytes());
    let tagged = format!("{name}{TAG}{:.8}", tag.as_str());
    Policy {
        name: format!("{namespace}/{tagged}"),
        content: authorization(namespace, tagged, action, dry_run, rules),
        problem: None,
        target: target.clone(),
        allows: false,
        denies_identities: false,
    }
}

type Content = (wire::Action, bool, Vec<wire::Rule>);

/// Action, whether it is a dry run, and rules.
fn content(trust_domain: &TrustDomain, namespace: &str, spec: &PolicySpec) -> Result<Content, String> {
    let (action, dry_run) = match spec.action {
        Action::Allow => (wire::Action::Allow, false),
        Action::Audit => (wire::Action::Allow, true),
        Action::Deny => (wire::Action::Deny, false),
    };
    let mut rules = Vec::new();
    let mut bytes = 0;
    for rule in &spec.rules {
        for rule in wire_rules(trust_domain, namespace, spec.action, rule) {
            bytes += rule.encoded_len();
            if bytes > MAX_BYTES {
                return Err(format!("it is too large, with more than {MAX_BYTES} bytes for agents"));
            }
            rules.push(rule);
        }
    }
    Ok((action, dry_run, rules))
}

fn authorization(
    namespace: &str,
    name: String,
    action: wire::Action,
    dry_run: bool,
    rules: Vec<wire::Rule>,
) -> Authorization {
    Authorization {
        name,
        namespace: namespace.to_owned(),
        // In force where a workload names it.
        scope: Scope::WorkloadSelector.into(),
        action: action.into(),
        rules,
        dry_run,
    }
}
