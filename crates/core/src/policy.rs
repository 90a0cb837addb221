//! Who may call whom, at layer 4: the policies that are in force for a pod, compiled into one [`Guard`], and its verdicts.
//!
//! What is in force for which pod the controller decides. It says that by naming policies, defaults included, so that here
//! are only three lists: whoever a Deny matches is denied; where there are Allows, so is whoever none of them matches; and
//! where there are Audits, it is told of whoever is admitted although none of them matches.
//!
//! The meaning of a rule is that of `istio.security.Authorization`: a policy matches if one of its rules does, a rule if
//! all of its clauses do, a clause if one of its matches does, a match if every field that says something does.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use crate::SpiffeId;

/// Who calls, and where.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// As proven by a certificate. None of a caller outside the mesh.
    pub identity: Option<&'a SpiffeId>,
    pub source: IpAddr,
    /// The pod's port.
    pub port: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    Allow,
    Deny,
    /// An Allow on trial.
    Audit,
}

/// One policy, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `NAMESPACE/NAME`.
    pub name: Arc<str>,
    pub action: Action,
    pub rules: Vec<Rule>,
}

/// Clauses. A rule without any matches everybody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule(pub Vec<Vec<Match>>);

/// Every field has to match. Each is two lists: one of the first, if there are any, and none of the second.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// Identities without their scheme. A caller without identity is none of them.
    pub principals: (Vec<Pattern>, Vec<Pattern>),
    pub sources: (Vec<IpNet>, Vec<IpNet>),
    pub ports: (Vec<u16>, Vec<u16>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// Anybody who has an identity.
    Presence,
}

impl Policy {
    /// What stands for a policy that cannot be understood: it denies.
    pub fn unintelligible(name: Arc<str>) -> Self {
        Self { name, action: Action::Deny, rules: vec![Rule::default()] }
    }
}

impl Rule {
    fn matches(&self, attempt: &Attempt, principal: Option<&str>) -> bool {
        self.0.iter().all(|clause| clause.iter().any(|m| m.matches(attempt, principal)))
    }

    /// Who this rule can match, where it lists them: identities, and namespaces as [`namespace_of`] has them.
    fn callers(&self) -> Option<BTreeSet<&str>> {
        self.0.iter().find_map(|clause| {
            let all = clause.iter().all(|m| !m.principals.0.is_empty());
            let callers = clause.iter().flat_map(|m| &m.principals.0).map(Pattern::caller).collect();
            if all { callers } else { None }
        })
    }
}

/// The part of an identity that everybody of its namespace has: `TRUST_DOMAIN/ns/NAMESPACE/sa/`.
fn namespace_of(principal: &str) -> Option<&str> {
    let (at, _) = principal.match_indices('/').nth(3)?;
    let mut parts = principal.split('/');
    let is_ours = (parts.nth(1), parts.nth(1)) == (Some("ns"), Some("sa"));
    is_ours.then(|| &principal[..=at])
}

impl Match {
    fn matches(&self, attempt: &Attempt, principal: Option<&str>) -> bool {
        field(&self.ports, |port| *port == attempt.port)
            && field(&self.sources, |range| range.contains(&attempt.source))
            && field(&self.principals, |pattern| principal.is_some_and(|p| pattern.matches(p)))
    }
}

fn field<T>((one_of, none_of): &(Vec<T>, Vec<T>), matches: impl Fn(&T) -> bool) -> bool {
    (one_of.is_empty() || one_of.iter().any(&matches)) && !none_of.iter().any(&matches)
}

impl Pattern {
    /// The identity, or the namespace as [`namespace_of`] has it, that this is about, if it is about one alone.
    fn caller(&self) -> Option<&str> {
        match self {
            Self::Exact(principal) => Some(principal),
            Self::Prefix(prefix) if namespace_of(prefix) == Some(prefix) => Some(prefix),
            _ => None,
        }
    }

    fn matches(&self, principal: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *principal,
            Self::Prefix(prefix) => principal.starts_with(&**prefix),
            Self::Suffix(suffix) => principal.ends_with(&**suffix),
            Self::Presence => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    Allowed,
    /// Admitted, and would not be if the Audits were Allows.
    Audited,
    Denied,
}

/// A verdict and the policy that it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub verdict: Verdict,
    /// None where no policy is in force, or where several Allows are and none of them matches.
    pub policy: Option<Arc<str>>,
}

/// The policies in force for one pod. What a verdict costs depends on those that may concern the caller, not on how many
/// there are that name others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guard {
    deny: Rules,
    allow: Rules,
    audit: Rules,
}

impl Guard {
    pub fn new(policies: impl IntoIterator<Item = Arc<Policy>>) -> Self {
        let mut guard = Self::default();
        for policy in policies {
            match policy.action {
                Action::Allow => &mut guard.allow,
                Action::Deny => &mut guard.deny,
                Action::Audit => &mut guard.audit,
            }
            .add(policy);
        }
        guard
    }

    pub fn decide(&self, attempt: &Attempt) -> Decision {
        let principal = attempt.identity.map(SpiffeId::principal);
        let first = |rules: &Rules| rules.first(attempt, principal.as_deref());
        let decision = |verdict, policy| Decision { verdict, policy };
        if let Some(policy) = first(&self.deny) {
            return decision(Verdict::Denied, Some(policy));
        }
        let admitted = first(&self.allow);
        if admitted.is_none() && self.allow.applies() {
            return decision(Verdict::Denied, self.allow.only());
        }
        if self.audit.applies() && first(&self.audit).is_none() {
            return decision(Verdict::Audited, self.audit.only());
        }
        decision(Verdict::Allowed, admitted)
    }
}

/// The rules of all policies of one action.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Rules {
    policies: Vec<Arc<Policy>>,
    /// Every rule: of which policy, and which of its rules.
    rules: Vec<(usize, usize)>,
    /// The rules that list who they are for, by identity and namespace.
    by_caller: HashMap<Box<str>, Vec<usize>>,
    /// All others.
    any_caller: Vec<usize>,
}

impl Rules {
    fn add(&mut self, policy: Arc<Policy>) {
        for (index, rule) in policy.rules.iter().enumerate() {
            let number = self.rules.len();
            match rule.callers() {
                Some(callers) => {
                    for caller in callers {
                        self.by_caller.entry(caller.into()).or_default().push(number);
                    }
                }
                None => self.any_caller.push(number),
            }
            self.rules.push((self.policies.len(), index));
        }
        self.policies.push(policy);
    }

    fn applies(&self) -> bool {
        !self.policies.is_empty()
    }

    /// The policy, if there is but one.
    fn only(&self) -> Option<Arc<str>> {
        match self.policies.as_slice() {
            [policy] => Some(policy.name.clone()),
            _ => None,
        }
    }

    /// The first policy that matches.
    fn first(&self, attempt: &Attempt, principal: Option<&str>) -> Option<Arc<str>> {
        let listed = |caller: &str| self.by_caller.get(caller).map(Vec::as_slice).unwrap_or_default();
        let matches = |number: &usize| {
            let (policy, rule) = self.rules[*number];
            self.policies[policy].rules[rule].matches(attempt, principal)
        };
        let own = principal.map(listed).unwrap_or_default();
        let namespace = principal.and_then(namespace_of).map(listed).unwrap_or_default();
        let lists = [own, namespace, self.any_caller.as_slice()];
        let first = lists.iter().filter_map(|list| list.iter().copied().find(matches)).min()?;
        Some(self.policies[self.rules[first].0].name.clone())
    }
}

#[cfg(test)]
mod tests;
