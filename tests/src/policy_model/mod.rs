//! Who may call whom, written once more from what AuthorizationPolicies are said to mean: plain and slow, on manifests as
//! JSON, sharing nothing with the product. The controller's translation and the agents are held to it, with the rows of
//! [`sentences`] and those of [`generator`].

pub mod generator;
pub mod sentences;

use std::net::IpAddr;

use serde_json::{Map, Value, json};

const TRUST_DOMAIN: &str = "spiffe://cluster.local/";
/// Who may call where no Allow speaks, the laxest first.
pub const DEFAULTS: [&str; 5] =
    ["all-unauthenticated", "audit", "all-authenticated", "cluster-authenticated", "deny"];
const ANNOTATION: &str = "policy.weft.dev/default-inbound";

const IDENTITIES: [&str; 3] = ["principals", "namespaces", "serviceAccounts"];
const NO_IDENTITIES: [&str; 3] = ["notPrincipals", "notNamespaces", "notServiceAccounts"];
const SOURCE: [&str; 8] = [
    "principals",
    "notPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "cidrs",
    "notCidrs",
];
const L7: [&str; 6] = ["methods", "notMethods", "paths", "notPaths", "hosts", "notHosts"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    Allowed,
    /// Admitted, and would not be if what is on trial were in force.
    Audited,
    Denied,
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The SPIFFE ID that it proves.
    pub identity: Option<String>,
    pub source: IpAddr,
}

/// What the controller is told of the whole mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub default: &'static str,
    pub floor: &'static str,
}

/// What becomes of `caller` at `port` of `pod`, among all `objects`. None where nobody guards the pod.
pub fn verdict(mesh: Mesh, objects: &[Value], pod: &Value, caller: &Caller, port: u16) -> Option<Verdict> {
    let namespace = namespace_of(pod);
    let of_namespace = find(objects, "Namespace", "", namespace);
    if !is_in_mesh(of_namespace, pod) {
        return None;
    }
    let policies: Vec<Policy> =
        policies_about(objects, pod).map(|(policy, _)| Policy::read(objects, policy)).collect();
    let those = |action: &str| policies.iter().filter(|p| p.action == action).collect::<Vec<_>>();
    let [allows, denies, audits] = ["Allow", "Deny", "Audit"].map(those);
    let any_matches =
        |policies: &[&Policy]| policies.iter().any(|policy| policy.matches(namespace, caller, port));

    let proves = |what: &str| match what {
        "all-authenticated" => caller.identity.is_some(),
        // Whatever denies asks of whom an Allow admits as much as what comes before it.
        "cluster-authenticated" | "deny" => is_of_own_domain(caller),
        _ => true,
    };
    if any_matches(&denies) || !proves(mesh.floor) {
        return Some(Verdict::Denied);
    }
    let mut on_trial = !audits.is_empty();
    if !allows.is_empty() {
        if !any_matches(&allows) {
            return Some(Verdict::Denied);
        }
    } else {
        let mut default = default_of(mesh, of_namespace, pod);
        if denies.iter().any(|deny| deny.names_identities()) {
            default = stricter(default, "all-authenticated");
        }
        if default == "deny" || !proves(default) {
            return Some(Verdict::Denied);
        }
        on_trial |= default == "audit";
    }
    Some(if on_trial && !any_matches(&audits) { Verdict::Audited } else { Verdict::Allowed })
}

/// The AuthorizationPolicies that are about `pod`, each also as what a person reads.
pub fn policies_about<'a>(
    objects: &'a [Value],
    pod: &'a Value,
) -> impl Iterator<Item = (&'a Value, String)> + 'a {
    let of_namespace = objects.iter().filter(|object| {
        object["kind"] == "AuthorizationPolicy" && namespace_of(object) == namespace_of(pod)
    });
    of_namespace
        .filter(|policy| is_about(objects, policy, pod))
        .map(|policy| (policy, policy["spec"].to_string()))
}

fn find<'a>(objects: &'a [Value], kind: &str, namespace: &str, name: &str) -> Option<&'a Value> {
    objects.iter().find(|object| {
        object["kind"] == kind && namespace_of(object) == namespace && object["metadata"]["name"] == name
    })
}

fn namespace_of(object: &Value) -> &str {
    object["metadata"]["namespace"].as_str().unwrap_or_default()
}

/// The pod's label counts, else its namespace's.
fn is_in_mesh(namespace: Option<&Value>, pod: &Value) -> bool {
    let label = |object: &Value| {
        object["metadata"]["labels"]["weft.dev/mesh"].as_str().map(|value| value == "enabled")
    };
    label(pod).or_else(|| label(namespace?)).unwrap_or(false)
}

fn default_of(mesh: Mesh, namespace: Option<&Value>, pod: &Value) -> &'static str {
    let said = |object: &Value| {
        let value = object["metadata"]["annotations"][ANNOTATION].as_str()?;
        Some(DEFAULTS.into_iter().find(|default| *default == value).unwrap_or("deny"))
    };
    let outer = stricter(namespace.and_then(said).unwrap_or(mesh.default), mesh.floor);
    said(pod).map_or(outer, |of_pod| stricter(of_pod, outer))
}

fn stricter(one: &'static str, other: &'static str) -> &'static str {
    let strictness = |default: &str| DEFAULTS.iter().position(|d| *d == default);
    if strictness(one) > strictness(other) { one } else { other }
}

fn is_of_own_domain(caller: &Caller) -> bool {
    caller.identity.as_ref().is_some_and(|id| id.starts_with(TRUST_DOMAIN))
}

/// Where what it is about cannot be read, that is its whole namespace.
fn is_about(objects: &[Value], policy: &Value, pod: &Value) -> bool {
    let spec = spec_of(policy);
    if !target_is_understood(&spec) || lacks_a_service(objects, policy) {
        return true;
    }
    if let Some(wanted) = spec["selector"]["matchLabels"].as_object() {
        return has_labels(pod, wanted);
    }
    let Some(refs) = spec["targetRefs"].as_array() else { return true };
    refs.iter().any(|target| is_behind(objects, namespace_of(pod), &target["name"], pod))
}

fn has_labels(pod: &Value, wanted: &Map<String, Value>) -> bool {
    wanted.iter().all(|(key, value)| pod["metadata"]["labels"].get(key) == Some(value))
}

/// Whether it is about a Service that is not there: then nobody knows what else it should be about.
fn lacks_a_service(objects: &[Value], policy: &Value) -> bool {
    let spec = spec_of(policy);
    let is_there = |name: &str| find(objects, "Service", namespace_of(policy), name).is_some();
    spec["targetRefs"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|target| !target["name"].as_str().is_some_and(is_there))
}

/// Behind a Service by its selector, or because one of its slices says so.
fn is_behind(objects: &[Value], namespace: &str, service: &Value, pod: &Value) -> bool {
    let Some(found) = find(objects, "Service", namespace, service.as_str().unwrap_or_default()) else {
        return false;
    };
    let selector = found["spec"]["selector"].as_object();
    if selector.is_some_and(|selector| !selector.is_empty() && has_labels(pod, selector)) {
        return true;
    }
    objects
        .iter()
        .filter(|slice| slice["kind"] == "EndpointSlice" && namespace_of(slice) == namespace)
        .filter(|slice| slice["metadata"]["labels"]["kubernetes.io/service-name"] == *service)
        .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
        .map(|endpoint| &endpoint["targetRef"])
        .any(|target| {
            target["name"] == pod["metadata"]["name"] && namespace_of_target(target, namespace) == namespace
        })
}

fn namespace_of_target<'a>(target: &'a Value, own: &'a str) -> &'a str {
    target["namespace"].as_str().unwrap_or(own)
}

/// A policy's content. One that cannot be understood, or lacks a Service, is a Deny of everybody.
struct Policy {
    action: String,
    rules: Vec<Value>,
}

impl Policy {
    fn read(objects: &[Value], policy: &Value) -> Policy {
        let spec = spec_of(policy);
        if !is_understood(&spec) || lacks_a_service(objects, policy) {
            return Policy { action: "Deny".to_owned(), rules: vec![json!({})] };
        }
        Policy {
            action: spec["action"].as_str().unwrap_or("Allow").to_owned(),
            rules: spec["rules"].as_array().cloned().unwrap_or_default(),
        }
    }

    fn matches(&self, namespace: &str, caller: &Caller, port: u16) -> bool {
        let denies = self.action == "Deny";
        let from = |item: &Value| source_matches(item, denies, namespace, caller);
        let to = |item: &Value| operation_matches(item, denies, port);
        self.rules.iter().any(|rule| one_of(&rule["from"], from) && one_of(&rule["to"], to))
    }

    fn names_identities(&self) -> bool {
        let items = self.rules.iter().flat_map(|rule| rule["from"].as_array().into_iter().flatten());
        items.into_iter().any(has_identities)
    }
}

/// Whether an item matches, or there is no list.
fn one_of(list: &Value, matches: impl Fn(&Value) -> bool) -> bool {
    list.as_array().is_none_or(|items| items.iter().any(matches))
}

fn has_identities(item: &Value) -> bool {
    IDENTITIES.iter().chain(&NO_IDENTITIES).any(|list| item.get(list).is_some())
}

fn source_matches(item: &Value, denies: bool, namespace: &str, caller: &Caller) -> bool {
    if caller.identity.is_none() {
        // In a Deny nobody knows that he is none of those named; elsewhere he would have to prove that he is not.
        if has_identities(item) && (!denies || IDENTITIES.iter().any(|list| item.get(list).is_some())) {
            return false;
        }
    }
    let named = |id: &str, list: &str, entry: &str| match list {
        "principals" | "notPrincipals" => matches_pattern(entry, id),
        "namespaces" | "notNamespaces" => id.starts_with(&format!("{TRUST_DOMAIN}ns/{entry}/sa/")),
        _ => match entry.split_once('/') {
            Some((namespace, name)) => id == format!("{TRUST_DOMAIN}ns/{namespace}/sa/{name}"),
            None => id == format!("{TRUST_DOMAIN}ns/{namespace}/sa/{entry}"),
        },
    };
    SOURCE.iter().all(|list| {
        let Some(entries) = item[list].as_array() else { return true };
        let mut entries = entries.iter().filter_map(Value::as_str);
        let is_one = match *list {
            "cidrs" | "notCidrs" => {
                entries.any(|range| parse_range(range).is_some_and(|r| contains(r, caller.source)))
            }
            list => caller.identity.as_ref().is_some_and(|id| entries.any(|entry| named(id, list, entry))),
        };
        is_one != list.starts_with("not")
    })
}

fn operation_matches(item: &Value, denies: bool, port: u16) -> bool {
    let is_one = |list: &str| item[list].as_array().map(|ports| ports.iter().any(|p| *p == port));
    let visible = is_one("ports") != Some(false) && is_one("notPorts") != Some(true);
    visible && (denies || L7.iter().all(|field| item.get(field).is_none()))
}

/// SPIFFE IDs with their scheme.
fn matches_pattern(pattern: &str, id: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => id.ends_with(end),
        (_, Some(beginning)) => id.starts_with(beginning),
        _ => id == pattern,
    }
}

/// An address as its bits, and how many of them count.
fn parse_range(text: &str) -> Option<(IpAddr, u32)> {
    let (address, length) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let length: u32 = length.parse().ok()?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    (length <= bits).then_some((address, length))
}

fn bits(address: IpAddr) -> String {
    match address {
        IpAddr::V4(ip) => format!("{:032b}", ip.to_bits()),
        IpAddr::V6(ip) => format!("{:0128b}", ip.to_bits()),
    }
}

fn contains((network, length): (IpAddr, u32), address: IpAddr) -> bool {
    let (network, address) = (bits(network), bits(address));
    network.len() == address.len() && network[..length as usize] == address[..length as usize]
}

/// The specification without what says as much as nothing: what is null, unless it is in a rule, where it might be a list
/// that was to be filled in, and a target that is the policy's own Namespace.
fn spec_of(policy: &Value) -> Value {
    let mut spec = policy["spec"].clone();
    if let Some(fields) = spec.as_object_mut() {
        let own = json!([{"kind": "Namespace", "name": namespace_of(policy)}]);
        fields.retain(|key, value| key == "action" || !value.is_null());
        if !fields.contains_key("selector") {
            fields.retain(|_, value| *value != own);
        }
    }
    if let Some(selector) = spec.get_mut("selector").and_then(Value::as_object_mut) {
        selector.retain(|_, labels| !labels.is_null());
    }
    spec
}

fn is_understood(spec: &Value) -> bool {
    let has_only = |value: &Value, known: &[&str]| {
        value.as_object().is_some_and(|fields| fields.keys().all(|key| known.contains(&key.as_str())))
    };
    // An item that names nothing says nothing: it is as empty as a list.
    let item = |value: &Value, known: &[&str], lists: &dyn Fn(&str, &Value) -> bool| {
        let fields = value.as_object().filter(|fields| !fields.is_empty());
        has_only(value, known)
            && fields.is_some_and(|fields| fields.iter().all(|(key, list)| lists(key, list)))
    };
    let source =
        |value: &Value| item(value, &SOURCE, &|key, list| full(list, |entry| is_source_entry(key, entry)));
    let operation = |value: &Value| {
        item(value, &[&["ports", "notPorts"][..], &L7[..]].concat(), &|key, list| {
            full(list, |entry| if L7.contains(&key) { entry.is_string() } else { is_port(entry) })
        })
    };
    let rule = |rule: &Value| {
        has_only(rule, &["from", "to"])
            && rule.get("from").is_none_or(|list| full(list, source))
            && rule.get("to").is_none_or(|list| full(list, operation))
    };
    has_only(spec, &["selector", "targetRefs", "action", "rules"])
        && target_is_understood(spec)
        && spec
            .get("action")
            .is_none_or(|action| ["Allow", "Deny", "Audit"].iter().any(|known| action == known))
        && spec.get("rules").is_none_or(|rules| rules.as_array().is_some_and(|rules| rules.iter().all(rule)))
        // A Deny of nobody is a slip.
        && (spec["action"] != "Deny" || spec["rules"].as_array().is_some_and(|rules| !rules.is_empty()))
}

/// A list of one or more entries that are all in order.
fn full(list: &Value, entry: impl Fn(&Value) -> bool) -> bool {
    list.as_array().is_some_and(|entries| !entries.is_empty() && entries.iter().all(entry))
}

fn target_is_understood(spec: &Value) -> bool {
    match (spec.get("selector"), spec.get("targetRefs")) {
        (None, None) => true,
        (Some(selector), None) => selector.as_object().is_some_and(|fields| {
            fields.iter().all(|(key, labels)| {
                key == "matchLabels" && labels.as_object().is_some_and(|l| l.values().all(Value::is_string))
            })
        }),
        (None, Some(refs)) => full(refs, |target| {
            let known = ["group", "kind", "name"];
            target.as_object().is_some_and(|fields| fields.keys().all(|key| known.contains(&key.as_str())))
                && target.get("group").is_none_or(|group| group == "")
                && target["kind"] == "Service"
                && target["name"].is_string()
        }),
        (Some(_), Some(_)) => false,
    }
}

fn is_source_entry(list: &str, entry: &Value) -> bool {
    let Some(text) = entry.as_str() else { return false };
    match list {
        "principals" | "notPrincipals" => is_pattern(text),
        "namespaces" | "notNamespaces" => is_name(text),
        "serviceAccounts" | "notServiceAccounts" => {
            text.matches('/').count() < 2 && text.split('/').all(is_name)
        }
        _ => parse_range(text).is_some_and(|(address, length)| {
            // No caller's address is of the other form: it would say nothing, and look as if it did.
            let is_of_callers = length == 0 || address == address.to_canonical();
            is_of_callers && bits(address)[length as usize..].bytes().all(|bit| bit == b'0')
        }),
    }
}

/// A SPIFFE ID, with `*` as its first or its last character, of what comes behind the scheme.
fn is_pattern(text: &str) -> bool {
    let whole = |id: &str| match id.split('/').collect::<Vec<_>>().as_slice() {
        ["spiffe:", "", names @ ..] => {
            matches!(names, [_, "ns", _, "sa", _]) && names.iter().all(|name| is_name(name))
        }
        _ => false,
    };
    match (text.strip_prefix('*'), text.strip_suffix('*')) {
        (Some(""), _) => true,
        (Some(end), _) => !end.contains('*') && !end.contains("//"),
        (_, Some(beginning)) => !beginning.contains('*') && beginning.starts_with("spiffe://"),
        _ => whole(text),
    }
}

fn is_name(text: &str) -> bool {
    let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let inner = |b: u8| end(Some(b)) || b == b'-' || b == b'.';
    text.bytes().all(inner) && end(text.bytes().next()) && end(text.bytes().last())
}

fn is_port(entry: &Value) -> bool {
    entry.as_u64().is_some_and(|port| (1..=65535).contains(&port))
}
