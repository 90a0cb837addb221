//! From `istio.security.Authorization` to the policy that is decided by.

use std::net::IpAddr;

use ipnet::IpNet;
use prost::Message;
use weft_core::policy::{Action, Match, Pattern, Policy, Rule};

use crate::security::{self as wire, string_match::MatchType};

/// What follows in a policy's name tells apart what it was and is about. No name of an object has it.
pub const TAG: char = '@';

/// The policy in the resource of that name; or what of it is not known here, and then it must not be guessed.
pub fn read(name: &str, value: &[u8]) -> Result<Policy, String> {
    let policy = wire::Authorization::decode(value).map_err(|error| error.to_string())?;
    // What is not known is not kept.
    if policy.encoded_len() != value.len() {
        return Err("it has fields that are not known here".to_owned());
    }
    let action = match (wire::Action::try_from(policy.action), policy.dry_run) {
        (Ok(wire::Action::Allow), false) => Action::Allow,
        (Ok(wire::Action::Allow), true) => Action::Audit,
        (Ok(wire::Action::Deny), false) => Action::Deny,
        (action, dry_run) => return Err(format!("action {action:?}, dry run: {dry_run}")),
    };
    // To the one a clause without any matches nothing, to the other everything.
    let clause = |clause: wire::Clause| match clause.matches.is_empty() {
        true => Err("a clause says nothing".to_owned()),
        false => clause.matches.into_iter().map(matching).collect(),
    };
    let rule =
        |rule: wire::Rule| Ok(Rule(rule.clauses.into_iter().map(clause).collect::<Result<_, String>>()?));
    Ok(Policy {
        name: name.split(TAG).next().unwrap_or(name).into(),
        action,
        rules: policy.rules.into_iter().map(rule).collect::<Result<_, String>>()?,
    })
}

fn matching(m: wire::Match) -> Result<Match, String> {
    let unused =
        [m.namespaces.len(), m.not_namespaces.len(), m.service_accounts.len(), m.not_service_accounts.len()];
    if unused.iter().sum::<usize>() + m.destination_ips.len() + m.not_destination_ips.len() > 0 {
        return Err("it uses fields of Match that are not known here".to_owned());
    }
    let read = Match {
        principals: (all(m.principals, pattern)?, all(m.not_principals, pattern)?),
        sources: (all(m.source_ips, range)?, all(m.not_source_ips, range)?),
        ports: (all(m.destination_ports, port)?, all(m.not_destination_ports, port)?),
    };
    // To the one it matches everybody, to the other nobody.
    if read == Match::default() { Err("a match says nothing".to_owned()) } else { Ok(read) }
}

fn all<T, U>(list: Vec<T>, read: impl Fn(T) -> Result<U, String>) -> Result<Vec<U>, String> {
    list.into_iter().map(read).collect()
}

fn pattern(pattern: wire::StringMatch) -> Result<Pattern, String> {
    match pattern.match_type {
        Some(MatchType::Exact(text)) => Ok(Pattern::Exact(text.into())),
        Some(MatchType::Prefix(text)) => Ok(Pattern::Prefix(text.into())),
        Some(MatchType::Suffix(text)) => Ok(Pattern::Suffix(text.into())),
        Some(MatchType::Presence(())) => Ok(Pattern::Presence),
        None => Err("a pattern of a kind that is not known here".to_owned()),
    }
}

fn range(range: wire::Address) -> Result<IpNet, String> {
    let ip: IpAddr = match range.address.len() {
        4 => <[u8; 4]>::try_from(&range.address[..]).map(IpAddr::from),
        _ => <[u8; 16]>::try_from(&range.address[..]).map(IpAddr::from),
    }
    .map_err(|_| format!("an address of {} bytes", range.address.len()))?;
    let length = u8::try_from(range.length).map_err(|error| error.to_string())?;
    IpNet::new(ip, length).map_err(|error| error.to_string())
}

fn port(port: u32) -> Result<u16, String> {
    u16::try_from(port).map_err(|_| format!("port {port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(policy: wire::Authorization) -> String {
        read("a/b", &policy.encode_to_vec()).expect_err("refused")
    }

    fn with(matches: wire::Match) -> wire::Authorization {
        let clauses = vec![wire::Clause { matches: vec![matches] }];
        wire::Authorization { rules: vec![wire::Rule { clauses }], ..Default::default() }
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert!(read("a/b", &[0xff]).is_err());
        refused(wire::Authorization { action: 7, ..Default::default() });
        refused(wire::Authorization { action: 1, dry_run: true, ..Default::default() });
        let unknown = wire::StringMatch { match_type: None };
        let range = |bytes: usize, length| wire::Address { address: vec![0; bytes], length };
        for matches in [
            wire::Match::default(),
            wire::Match { principals: vec![unknown.clone()], ..Default::default() },
            wire::Match { namespaces: vec![unknown], ..Default::default() },
            wire::Match { destination_ips: vec![range(4, 8)], ..Default::default() },
            wire::Match { service_accounts: vec![Default::default()], ..Default::default() },
            wire::Match { source_ips: vec![range(5, 8)], ..Default::default() },
            wire::Match { source_ips: vec![range(4, 33)], ..Default::default() },
            wire::Match { destination_ports: vec![65536], ..Default::default() },
        ] {
            refused(with(matches));
        }
        let known = wire::Match { source_ips: vec![range(16, 128)], ..Default::default() };
        assert!(read("a/b", &with(known).encode_to_vec()).is_ok());
    }
}
