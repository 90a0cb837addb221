//! A policy's rules on the wire.

use std::net::IpAddr;

use ipnet::IpNet;
use weft_api::authorization_policy::{
    Action, Cidr, Name, Operation, Principal, Rule, ServiceAccount, Source,
};
use weft_core::TrustDomain;
use weft_proto::security::{self as wire, StringMatch, string_match::MatchType};

use crate::translate::octets;

/// The rule on the wire. What only a waypoint can tell never allows, and is taken for granted where it denies. Sources
/// that ask several things of a caller are rules of their own, made only as they are asked for.
pub(super) fn wire_rules(
    trust_domain: &TrustDomain,
    namespace: &str,
    action: Action,
    rule: &Rule,
) -> impl Iterator<Item = wire::Rule> {
    let denies = action == Action::Deny;
    let to = rule.to.iter().filter(|operation| denies || !operation.needs_l7()).map(ports);
    let to: Vec<wire::Match> = to.collect();
    let never = to.is_empty() && !rule.to.is_empty();
    // A match that says nothing is none on the wire: with one, this is about every port.
    let to = (!to.is_empty() && !to.contains(&wire::Match::default())).then(|| clause(to));
    let sources = rule.from.iter().map(|source| from(trust_domain, namespace, source, denies));
    let (simple, others): (Vec<_>, Vec<_>) = sources.partition(|matches| matches.len() == 1);
    let simple = clause(simple.into_iter().flatten().collect());
    let simple = match (rule.from.is_empty(), simple.matches.is_empty()) {
        (true, _) => Some(Vec::new()),
        (false, true) => None,
        (false, false) => Some(vec![simple]),
    };
    let others = others.into_iter().map(|matches| matches.into_iter().map(|m| clause(vec![m])).collect());
    let all = simple.into_iter().chain(others).filter(move |_| !never);
    all.map(move |clauses: Vec<_>| wire::Rule { clauses: clauses.into_iter().chain(to.clone()).collect() })
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
    let namespaces =
        |names: &[Name]| names.iter().map(|name| pattern(&namespace(&name.0))).collect::<Vec<_>>();
    let accounts =
        |accounts: &[ServiceAccount]| accounts.iter().map(account).map(|a| pattern(&a)).collect::<Vec<_>>();
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

pub(super) fn clause(matches: Vec<wire::Match>) -> wire::Clause {
    wire::Clause { matches }
}

pub(super) fn pattern(principal: &Principal) -> StringMatch {
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
