//! AuthorizationPolicies: what each says on the wire, and which are in force for a pod. One at a time.
//!
//! The wire knows Allow, Deny and, as a dry run, Audit. All else is said with these three, so that whoever enforces them
//! needs to know no more: a default is a built-in Allow, which is named where no other is; a floor is a built-in Deny.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use weft_api::{
    AuthorizationPolicy, DefaultInbound, Pod,
    authorization_policy::{Action, Cidr, Operation, PolicySpec, Principal, Rule, ServiceAccount, Source, Target},
    inbound_choice,
};
use weft_core::TrustDomain;
use weft_proto::security::{self as wire, Authorization, Scope, StringMatch, string_match::MatchType};

use super::{MeshSettings, octets, services::Membership};
use crate::store::{Name, Store};

/// Where built-in policies are. No namespace can have that name, since it has a dot.
const BUILT_IN: &str = "policy.weft.dev";

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
    settings: &MeshSettings,
    name: &Name,
    pod: &Pod,
    membership: &Membership,
) -> InForce {
    let inbound = settings.inbound;
    let namespace = store.namespaces.get(&name.0).map(|namespace| &**namespace);
    let choice = inbound_choice(inbound.default, inbound.floor, namespace, pod);
    let mut default = choice.default;
    let mut names = Vec::new();
    let mut allowed = false;
    for (policy_name, policy) in store.policies_in(&name.0) {
        if !is_about(store, settings, &name.0, policy, pod, membership) {
            continue;
        }
        names.push(wire_name(policy_name));
        match &policy.spec {
            Ok(spec) if spec.action == Action::Allow => allowed = true,
            // Whoever shows no identity cannot be told from those that are named.
            Ok(spec) if spec.action == Action::Deny && names_identities(spec) => {
                default = default.max(DefaultInbound::AllAuthenticated);
            }
            _ => {}
        }
    }
    let built_in = |name: &str| format!("{BUILT_IN}/{name}");
    if !allowed && default != DefaultInbound::AllUnauthenticated {
        names.push(built_in(default.as_str()));
    }
    names.extend(floor(inbound.floor).map(built_in));
    InForce { names, problem: choice.problem }
}

/// Whether a policy targets one of these Services, so that with the Service changes what it is about.
pub(super) fn targets(policy: &AuthorizationPolicy, service: &str) -> bool {
    matches!(policy.target(), Target::Services(services) if services.iter().any(|s| s == service))
}

/// A Service's pods are those that it selects, also before any slice has them, and those that a slice has.
fn is_about(
    store: &Store,
    settings: &MeshSettings,
    namespace: &str,
    policy: &AuthorizationPolicy,
    pod: &Pod,
    membership: &Membership,
) -> bool {
    let labels = &pod.metadata.labels;
    let has = |wanted: &BTreeMap<String, String>| wanted.iter().all(|(key, value)| labels.get(key) == Some(value));
    let is_behind = |name: &String| {
        let service = store.services.get(&(namespace.to_owned(), name.clone()));
        let selector = service.map(|service| &service.spec.selector).filter(|selector| !selector.is_empty());
        selector.is_some_and(has) || membership.services.contains_key(&settings.service_key(namespace, name))
    };
    match policy.target() {
        Target::Namespace => true,
        Target::Labels(wanted) => has(wanted),
        Target::Services(services) => services.iter().any(is_behind),
    }
}

fn names_identities(spec: &PolicySpec) -> bool {
    spec.rules.iter().flat_map(|rule| &rule.from).any(Source::names_identities)
}

fn wire_name((namespace, name): &Name) -> String {
    format!("{namespace}/{name}")
}

/// What a floor is called. The others hold as the least that a default may be.
fn floor(floor: DefaultInbound) -> Option<&'static str> {
    match floor {
        DefaultInbound::AllAuthenticated => Some("floor-all-authenticated"),
        DefaultInbound::ClusterAuthenticated => Some("floor-cluster-authenticated"),
        DefaultInbound::AllUnauthenticated | DefaultInbound::Audit | DefaultInbound::Deny => None,
    }
}

/// What stands for defaults and floors, by name.
pub(super) fn built_in(trust_domain: &TrustDomain) -> BTreeMap<String, Authorization> {
    let cluster = || pattern(&Principal::Prefix(format!("{trust_domain}/")));
    let somebody = || pattern(&Principal::Any);
    let is = |one: StringMatch| wire::Match { principals: vec![one], ..Default::default() };
    let is_not = |one: StringMatch| wire::Match { not_principals: vec![one], ..Default::default() };
    let [allow, deny] = [wire::Action::Allow, wire::Action::Deny];
    [
        ("deny", allow, None, false),
        ("audit", allow, None, true),
        ("all-authenticated", allow, Some(is(somebody())), false),
        ("cluster-authenticated", allow, Some(is(cluster())), false),
        ("floor-all-authenticated", deny, Some(is_not(somebody())), false),
        ("floor-cluster-authenticated", deny, Some(is_not(cluster())), false),
    ]
    .into_iter()
    .map(|(name, action, matches, dry_run)| {
        let name = (BUILT_IN.to_owned(), name.to_owned());
        let rules = matches.map(|m| wire::Rule { clauses: vec![clause(vec![m])] });
        (wire_name(&name), authorization(&name, action, dry_run, rules.into_iter().collect()))
    })
    .collect()
}

/// The policy of that name, and what is wrong with it. One that cannot be understood denies.
pub(super) fn policy(
    store: &Store,
    settings: &MeshSettings,
    name: &Name,
) -> (String, Option<Authorization>, Option<String>) {
    let Some(policy) = store.policies.get(name) else { return (wire_name(name), None, None) };
    let (authorization, problem) = match &policy.spec {
        Ok(spec) => {
            let rule = |rule| wire_rules(&settings.trust_domain, &name.0, spec.action, rule);
            let (action, dry_run) = match spec.action {
                Action::Allow => (wire::Action::Allow, false),
                Action::Audit => (wire::Action::Allow, true),
                Action::Deny => (wire::Action::Deny, false),
            };
            let rules = spec.rules.iter().flat_map(rule).collect();
            (authorization(name, action, dry_run, rules), missing_services(store, name, spec))
        }
        Err(unintelligible) => (
            authorization(name, wire::Action::Deny, false, vec![wire::Rule::default()]),
            Some(format!("{}; it denies everything", unintelligible.why)),
        ),
    };
    (wire_name(name), Some(authorization), problem)
}

fn missing_services(store: &Store, (namespace, _): &Name, spec: &PolicySpec) -> Option<String> {
    let Target::Services(services) = &spec.target else { return None };
    let is_missing = |name: &&String| !store.services.contains_key(&(namespace.clone(), (*name).clone()));
    let missing: Vec<&str> = services.iter().filter(is_missing).map(String::as_str).collect();
    (!missing.is_empty()).then(|| format!("there is no Service {} in namespace {namespace}", missing.join(", ")))
}

fn authorization(
    (namespace, name): &Name,
    action: wire::Action,
    dry_run: bool,
    rules: Vec<wire::Rule>,
) -> Authorization {
    Authorization {
        name: name.clone(),
        namespace: namespace.clone(),
        // In force where a workload names it.
        scope: Scope::WorkloadSelector.into(),
        action: action.into(),
        rules,
        dry_run,
    }
}

/// A rule on the wire for each of its sources. What only a waypoint can tell never allows, and is taken for granted where
/// it denies.
fn wire_rules(trust_domain: &TrustDomain, namespace: &str, action: Action, rule: &Rule) -> Vec<wire::Rule> {
    let denies = action == Action::Deny;
    let to = rule.to.iter().filter(|operation| denies || !operation.needs_l7()).map(ports);
    let to: Vec<wire::Match> = to.collect();
    if to.is_empty() && !rule.to.is_empty() {
        return Vec::new();
    }
    // A match that says nothing is none on the wire: with one, this is about every port.
    let to = (!to.is_empty() && !to.contains(&wire::Match::default())).then(|| clause(to));
    let everybody = [Source::default()];
    let sources = if rule.from.is_empty() { &everybody } else { rule.from.as_slice() };
    let rule = |source| {
        let from = from(trust_domain, namespace, source, denies).into_iter();
        let clauses = from.map(|m| clause(vec![m])).chain(to.clone()).collect();
        wire::Rule { clauses }
    };
    sources.iter().map(rule).collect()
}

fn ports(operation: &Operation) -> wire::Match {
    wire::Match {
        destination_ports: operation.ports.iter().map(|port| port.0.into()).collect(),
        not_destination_ports: operation.not_ports.iter().map(|port| port.0.into()).collect(),
        ..Default::default()
    }
}

/// What a source asks of a caller, all of which has to hold. Namespaces and service accounts are those of the mesh's own
/// trust domain.
fn from(trust_domain: &TrustDomain, own: &str, source: &Source, denies: bool) -> Vec<wire::Match> {
    let namespace = |name: &str| Principal::Prefix(format!("{trust_domain}/ns/{name}/sa/"));
    let account = |ServiceAccount { namespace, name }: &ServiceAccount| {
        let namespace = namespace.as_deref().unwrap_or(own);
        Principal::Exact(format!("{trust_domain}/ns/{namespace}/sa/{name}"))
    };
    let patterns = |principals: &[Principal]| principals.iter().map(pattern).collect::<Vec<_>>();
    let namespaces = |names: &[weft_api::authorization_policy::Name]| {
        names.iter().map(|name| pattern(&namespace(&name.0))).collect::<Vec<_>>()
    };
    let accounts = |accounts: &[ServiceAccount]| accounts.iter().map(account).map(|a| pattern(&a)).collect::<Vec<_>>();
    let ranges = |cidrs: &[Cidr]| cidrs.iter().map(|cidr| range(cidr.0)).collect::<Vec<_>>();

    let positive =
        [patterns(&source.principals), namespaces(&source.namespaces), accounts(&source.service_accounts)];
    let mut matches: Vec<wire::Match> = positive
        .into_iter()
        .filter(|principals| !principals.is_empty())
        .map(|principals| wire::Match { principals, ..Default::default() })
        .collect();
    let not_principals = [
        patterns(&source.not_principals),
        namespaces(&source.not_namespaces),
        accounts(&source.not_service_accounts),
    ]
    .concat();
    let mut rest = wire::Match {
        not_principals,
        source_ips: ranges(&source.cidrs),
        not_source_ips: ranges(&source.not_cidrs),
        ..Default::default()
    };
    // Whoever shows no identity is not known to be another one than those named.
    if source.excludes_identities() && !denies {
        rest.principals = vec![pattern(&Principal::Any)];
    }
    if rest != wire::Match::default() {
        matches.push(rest);
    }
    matches
}

fn clause(matches: Vec<wire::Match>) -> wire::Clause {
    wire::Clause { matches }
}

fn pattern(principal: &Principal) -> StringMatch {
    let match_type = match principal {
        Principal::Exact(text) => MatchType::Exact(text.clone()),
        Principal::Prefix(text) => MatchType::Prefix(text.clone()),
        Principal::Suffix(text) => MatchType::Suffix(text.clone()),
        Principal::Any => MatchType::Presence(()),
    };
    StringMatch { match_type: Some(match_type) }
}

fn range(range: IpNet) -> wire::Address {
    let ip: IpAddr = range.network();
    wire::Address { address: octets(ip), length: range.prefix_len().into() }
}

