//! `policy.weft.dev/v1alpha1`, AuthorizationPolicy: who may call the pods of its namespace.
//!
//! The specification is read as a whole, or not at all: a policy of which anything is not understood, be it a field of a
//! later version, is [`Unintelligible`], and denies. It is no mistake of the file or the object that it is in, which would
//! leave what was in force before.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error},
};
use serde_json::Value;

use crate::{field::is_dns_subdomain, meta::ObjectMeta, pod::Condition};

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "Object")]
pub struct AuthorizationPolicy {
    pub metadata: ObjectMeta,
    pub spec: Result<PolicySpec, Unintelligible>,
    pub status: PolicyStatus,
}

/// As it is written.
#[derive(Deserialize)]
struct Object {
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
    #[serde(default, deserialize_with = "crate::field::nullable")]
    status: PolicyStatus,
}

impl From<Object> for AuthorizationPolicy {
    fn from(Object { metadata, spec, status }: Object) -> Self {
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        Self { spec: self::spec(&spec, namespace), metadata, status }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct PolicyStatus {
    #[serde(default, deserialize_with = "crate::field::nullable")]
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicySpec {
    pub target: Target,
    pub action: Action,
    /// One of them has to match.
    pub rules: Vec<Rule>,
}

/// A policy that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unintelligible {
    /// For a person to mend it.
    pub why: String,
    /// Everything in the namespace, where not even this can be understood.
    pub target: Target,
}

/// Which pods of the namespace it is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Target {
    #[default]
    Namespace,
    /// Those with all of these labels.
    Labels(BTreeMap<String, String>),
    /// Those behind one of these Services.
    Services(BTreeSet<String>),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub enum Action {
    #[default]
    Allow,
    Deny,
    /// An Allow on trial: it denies nobody, and whom it would is counted and logged.
    Audit,
}

/// Matches a caller that one of `from` matches, in what one of `to` matches. An empty list matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rule {
    #[serde(default, deserialize_with = "some")]
    pub from: Vec<Source>,
    #[serde(default, deserialize_with = "some")]
    pub to: Vec<Operation>,
}

/// A caller for which every list here holds: that it is one of those named, or, of the lists `not_*`, none of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// SPIFFE IDs; with `*` as the first or last character, all that end or begin so.
    #[serde(default, deserialize_with = "some")]
    pub principals: Vec<Principal>,
    #[serde(default, deserialize_with = "some")]
    pub not_principals: Vec<Principal>,
    #[serde(default, deserialize_with = "some")]
    pub namespaces: Vec<Name>,
    #[serde(default, deserialize_with = "some")]
    pub not_namespaces: Vec<Name>,
    #[serde(default, deserialize_with = "some")]
    pub service_accounts: Vec<ServiceAccount>,
    #[serde(default, deserialize_with = "some")]
    pub not_service_accounts: Vec<ServiceAccount>,
    #[serde(default, deserialize_with = "some")]
    pub cidrs: Vec<Cidr>,
    #[serde(default, deserialize_with = "some")]
    pub not_cidrs: Vec<Cidr>,
}

impl Source {
    /// Whether it asks who the caller is.
    pub fn names_identities(&self) -> bool {
        let Self { principals, namespaces, service_accounts, cidrs: _, not_cidrs: _, .. } = self;
        !(principals.is_empty() && namespaces.is_empty() && service_accounts.is_empty())
            || self.excludes_identities()
    }

    pub fn excludes_identities(&self) -> bool {
        let Self { not_principals, not_namespaces, not_service_accounts, .. } = self;
        !(not_principals.is_empty() && not_namespaces.is_empty() && not_service_accounts.is_empty())
    }
}

/// What is asked of the pod. All but ports is for waypoints to tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Operation {
    #[serde(default, deserialize_with = "some")]
    pub ports: Vec<Port>,
    #[serde(default, deserialize_with = "some")]
    pub not_ports: Vec<Port>,
    #[serde(default, deserialize_with = "some")]
    pub methods: Vec<String>,
    #[serde(default, deserialize_with = "some")]
    pub not_methods: Vec<String>,
    #[serde(default, deserialize_with = "some")]
    pub paths: Vec<String>,
    #[serde(default, deserialize_with = "some")]
    pub not_paths: Vec<String>,
    #[serde(default, deserialize_with = "some")]
    pub hosts: Vec<String>,
    #[serde(default, deserialize_with = "some")]
    pub not_hosts: Vec<String>,
}

impl Operation {
    /// Whether it asks for what a connection does not show.
    pub fn needs_l7(&self) -> bool {
        let Self { ports: _, not_ports: _, methods, not_methods, paths, not_paths, hosts, not_hosts } = self;
        [methods, not_methods, paths, not_paths, hosts, not_hosts].into_iter().any(|list| !list.is_empty())
    }
}

/// Identities, without their scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Everybody who has one.
    Any,
}

/// The name of a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(pub String);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// None means that of the policy.
    pub namespace: Option<String>,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr(pub IpNet);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port(pub u16);

macro_rules! read_with {
    ($($type:ty: $from:ty, $read:expr;)*) => {
        $(impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let read: fn(&$from) -> Result<$type, &'static str> = $read;
                let value = <$from>::deserialize(deserializer)?;
                read(&value).map_err(|why| D::Error::custom(format_args!("{value:?} {why}")))
            }
        })*
    };
}

read_with! {
    Principal: String, |text| principal(text);
    Name: String, |text| match is_dns_subdomain(text) {
        true => Ok(Name(text.clone())),
        false => Err("is not the name of a namespace"),
    };
    ServiceAccount: String, |text| service_account(text).ok_or("is neither NAME nor NAMESPACE/NAME of a service account");
    Cidr: String, |text| cidr(text);
    Port: u32, |number| match u16::try_from(*number) {
        Ok(port) if port > 0 => Ok(Port(port)),
        _ => Err("is not a port number"),
    };
}

fn principal(text: &str) -> Result<Principal, &'static str> {
    const SCHEME: &str = "spiffe://";
    let plain = |text: &str| !text.is_empty() && !text.contains('*');
    match (text, text.strip_prefix('*'), text.strip_suffix('*'), text.strip_prefix(SCHEME)) {
        ("*", ..) => Ok(Principal::Any),
        (_, Some(suffix), ..) if plain(suffix) && !suffix.contains("//") => {
            // The scheme, of which this has the end, is not there where it is looked for.
            let whole = suffix.strip_prefix('/').filter(|rest| is_identity(rest));
            let suffix = || Principal::Suffix(suffix.to_owned());
            Ok(whole.map_or_else(suffix, |whole| Principal::Exact(whole.to_owned())))
        }
        (_, None, Some(prefix), _) if plain(prefix) => match prefix.strip_prefix(SCHEME) {
            Some("") => Ok(Principal::Any),
            Some(prefix) => Ok(Principal::Prefix(prefix.to_owned())),
            None => Err("does not begin with spiffe://"),
        },
        (_, None, None, Some(exact)) if plain(exact) => match is_identity(exact) {
            true => Ok(Principal::Exact(exact.to_owned())),
            false => Err("is not spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"),
        },
        (_, None, None, None) => Err("does not begin with spiffe://"),
        _ => Err("has a * elsewhere than as its first or its last character, or // behind it"),
    }
}

/// Whether it is the path and trust domain of an identity that the mesh knows.
fn is_identity(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    matches!(parts.as_slice(), [domain, "ns", namespace, "sa", account]
        if is_dns_subdomain(domain) && is_dns_subdomain(namespace) && is_dns_subdomain(account))
}

fn service_account(text: &str) -> Option<ServiceAccount> {
    let (namespace, name) = match text.split_once('/') {
        Some((namespace, name)) => (Some(namespace), name),
        None => (None, text),
    };
    let valid = is_dns_subdomain(name) && namespace.is_none_or(is_dns_subdomain);
    valid.then(|| ServiceAccount { namespace: namespace.map(str::to_owned), name: name.to_owned() })
}

fn cidr(text: &str) -> Result<Cidr, &'static str> {
    let range: IpNet = text.parse().map_err(|_| "is not a range of addresses such as 10.0.0.0/8")?;
    // Callers' addresses are never in this form, so that it would match nobody.
    match range {
        IpNet::V6(range) if range.prefix_len() > 0 && range.addr().to_ipv4_mapped().is_some() => {
            Err("is a range of IPv4 addresses in IPv6 form; write it as IPv4")
        }
        range if range.trunc() != range => Err("has bits behind its prefix"),
        range => Ok(Cidr(range)),
    }
}

/// A list that is absent or names something: whether an empty one, or null, means everything or nothing, people differ.
fn some<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    match Option::<Vec<T>>::deserialize(deserializer)?.filter(|list| !list.is_empty()) {
        Some(list) => Ok(list),
        None => Err(D::Error::custom("is empty; leave it out, or name something")),
    }
}

/// The most that a reason quotes, in characters.
const MAX_REASON: usize = 200;

fn spec(value: &Value, namespace: &str) -> Result<PolicySpec, Unintelligible> {
    let aim = ["selector", "targetRefs"].map(|field| value.get(field).cloned().unwrap_or_default());
    let target = target(aim, namespace);
    let read = target.clone().and_then(|target| {
        if value.is_null() {
            return Err("spec: is missing".to_owned());
        }
        let Content { action, rules, .. } = part(value, "spec")?;
        rules.iter().try_for_each(says_something)?;
        if action == Action::Deny && rules.is_empty() {
            return Err("spec.rules: a Deny without any denies nobody".to_owned());
        }
        Ok(PolicySpec { target, action, rules })
    });
    let short = |why: String| why.chars().take(MAX_REASON).collect();
    read.map_err(|why| Unintelligible { why: short(why), target: target.unwrap_or_default() })
}

/// The specification; what it is about is read on its own.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Content {
    #[serde(default, rename = "selector")]
    _selector: Value,
    #[serde(default, rename = "targetRefs")]
    _target_refs: Value,
    #[serde(default)]
    action: Action,
    /// An Allow without any admits nobody.
    #[serde(default, deserialize_with = "crate::field::nullable")]
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Selector {
    #[serde(default, deserialize_with = "crate::field::nullable")]
    match_labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetRef {
    #[serde(default)]
    group: String,
    kind: String,
    name: String,
}

fn part<T: DeserializeOwned>(value: &Value, name: &str) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string().as_str() {
        "." => format!("{name}: {}", error.inner()),
        path => format!("{name}.{path}: {}", error.inner()),
    })
}

fn target([selector, target_refs]: [Value; 2], namespace: &str) -> Result<Target, String> {
    match (selector, target_refs) {
        (Value::Null, Value::Null) => Ok(Target::Namespace),
        (selector, Value::Null) => {
            let Selector { match_labels } = part(&selector, "spec.selector")?;
            Ok(if match_labels.is_empty() { Target::Namespace } else { Target::Labels(match_labels) })
        }
        (Value::Null, refs) => {
            let refs: Vec<TargetRef> = part(&refs, "spec.targetRefs")?;
            let kinds: Vec<_> = refs.iter().map(|r| (r.group.as_str(), r.kind.as_str())).collect();
            match kinds.as_slice() {
                [] => Err("spec.targetRefs: is empty; leave it out, or name something".to_owned()),
                [("", "Namespace")] if refs[0].name == namespace => Ok(Target::Namespace),
                [("", "Namespace")] => {
                    Err("spec.targetRefs: is another namespace than the policy's".to_owned())
                }
                all if all.iter().all(|kind| *kind == ("", "Service")) => {
                    Ok(Target::Services(refs.into_iter().map(|r| r.name).collect()))
                }
                _ => Err("spec.targetRefs: neither its Namespace nor Services alone".to_owned()),
            }
        }
        _ => Err("spec: has both selector and targetRefs".to_owned()),
    }
}

/// An item that names nothing would match everybody, which is more often a slip than meant.
fn says_something(rule: &Rule) -> Result<(), String> {
    let slip = |list: &str| {
        Err(format!("spec.rules: an item of {list} says nothing; leave it out, or name something"))
    };
    if rule.from.contains(&Source::default()) {
        return slip("from");
    }
    if rule.to.contains(&Operation::default()) {
        return slip("to");
    }
    Ok(())
}

impl AuthorizationPolicy {
    /// The condition that it is in force as it is written.
    pub const ACCEPTED: &str = "Accepted";
    /// The condition that every node with pods in the mesh enforces it.
    pub const PROGRAMMED: &str = "Programmed";

    /// What is written of it, of whatever generation.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.conditions.iter().find(|condition| condition.kind == kind)
    }

    /// Whether the mesh follows the same from both: what Weft itself writes there counts for nothing.
    pub fn is_same_to_mesh(&self, other: &Self) -> bool {
        (&self.metadata, &self.spec) == (&other.metadata, &other.spec)
    }

    pub fn target(&self) -> &Target {
        match &self.spec {
            Ok(spec) => &spec.target,
            Err(unintelligible) => &unintelligible.target,
        }
    }
}
