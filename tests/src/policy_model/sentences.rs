//! What is said of policies, one sentence after the other, each with who is admitted and who is not: rows that a person
//! has decided.

mod callers;
mod misunderstood;
mod targets;
mod verdicts;

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Caller, Mesh, Verdict};

/// A sentence, what it is tried on, and what has to come of it. The pod is always `bank/vault`.
#[derive(Debug)]
pub struct Sentence {
    pub says: &'static str,
    pub mesh: Mesh,
    pub objects: Vec<Value>,
    /// CALLER PORT, and what becomes of him; None where nobody guards the pod.
    pub rows: Vec<(&'static str, Option<Verdict>)>,
}

/// The pod of every sentence, as it is in its objects.
pub fn vault(objects: &[Value]) -> &Value {
    objects.iter().find(|object| object["kind"] == "Pod").unwrap_or(&Value::Null)
}

/// `WHO[@ADDRESS] PORT`: WHO is `nobody`, NAMESPACE/ACCOUNT or a SPIFFE ID.
pub fn attempt(text: &str) -> Option<(Caller, u16)> {
    let (caller, port) = text.split_once(' ')?;
    let (who, source) = caller.split_once('@').unwrap_or((caller, "10.42.1.10"));
    let identity = match who.split_once('/') {
        _ if who == "nobody" => None,
        _ if who.starts_with("spiffe://") => Some(who.to_owned()),
        Some((namespace, account)) => Some(format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")),
        None => return None,
    };
    Some((Caller { identity, source: source.parse::<IpAddr>().ok()? }, port.parse().ok()?))
}

fn say(says: &'static str) -> Sentence {
    let objects = vec![
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "bank", "labels": {"weft.dev/mesh": "enabled"}, "annotations": {}}}),
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "vault", "namespace": "bank", "labels": {"app": "vault", "tier": "data"}, "annotations": {}},
            "spec": {"nodeName": "n1"}, "status": {"podIP": "10.42.2.10"}}),
    ];
    Sentence {
        says,
        mesh: Mesh { default: "all-unauthenticated", floor: "all-unauthenticated" },
        objects,
        rows: Vec::new(),
    }
}

impl Sentence {
    /// A policy of the pod's namespace, its specification in YAML.
    fn policy(self, spec: &str) -> Sentence {
        self.policy_in("bank", spec)
    }

    fn policy_in(mut self, namespace: &str, spec: &str) -> Sentence {
        // What is no YAML is not understood, and so makes its sentence wrong.
        let spec: Value = serde_yaml_ng::from_str(spec).unwrap_or_default();
        let name = format!("p{}", self.objects.len());
        self.objects.push(json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec}));
        self
    }

    fn object(mut self, object: Value) -> Sentence {
        self.objects.push(object);
        self
    }

    fn mesh(mut self, default: &'static str, floor: &'static str) -> Sentence {
        self.mesh = Mesh { default, floor };
        self
    }

    fn namespace_says(mut self, default: &str) -> Sentence {
        self.objects[0]["metadata"]["annotations"]["policy.weft.dev/default-inbound"] = json!(default);
        self
    }

    fn pod_says(mut self, default: &str) -> Sentence {
        self.objects[1]["metadata"]["annotations"]["policy.weft.dev/default-inbound"] = json!(default);
        self
    }

    fn pod_label(mut self, name: &str, value: &str) -> Sentence {
        self.objects[1]["metadata"]["labels"][name] = json!(value);
        self
    }

    fn allowed(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Allowed))
    }

    fn audited(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Audited))
    }

    fn denied(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Denied))
    }

    fn expect(mut self, rows: &[&'static str], verdict: Option<Verdict>) -> Sentence {
        self.rows.extend(rows.iter().map(|row| (*row, verdict)));
        self
    }
}

fn service(name: &str, selector: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "bank"},
        "spec": {"selector": selector, "ports": [{"port": 80}]}})
}

fn slice(service: &str, target: Value) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-1"), "namespace": "bank", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"addresses": ["10.42.2.10"], "targetRef": target}], "ports": [{"port": 80}]})
}

const ELSEWHERE: &str = "spiffe://elsewhere.example/ns/shop/sa/web 80";
/// Another trust domain, whose name begins as the mesh's own does.
const NEARLY: &str = "spiffe://cluster.local.example/ns/shop/sa/web 80";
const EVERYBODY: [&str; 4] = ["shop/web 80", "bank/teller 81", ELSEWHERE, "nobody 80"];
const IDENTIFIED: [&str; 3] = ["shop/web 80", "bank/teller 81", ELSEWHERE];
const SHOP: &str = "{rules: [{from: [{namespaces: [shop]}]}]}";

pub fn all() -> Vec<Sentence> {
    [targets::all(), callers::all(), verdicts::all(), misunderstood::all()].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_model::verdict;

    #[test]
    fn the_model_says_what_the_sentences_say() {
        let mut wrong = Vec::new();
        for sentence in all() {
            assert!(!sentence.rows.is_empty(), "{}", sentence.says);
            for (row, expected) in &sentence.rows {
                let (caller, port) = attempt(row).expect("a row");
                let found =
                    verdict(sentence.mesh, &sentence.objects, vault(&sentence.objects), &caller, port);
                if found != *expected {
                    wrong.push(format!(
                        "{}: {row}: {found:?}, not {expected:?}\n  {:?}",
                        sentence.says, sentence.objects
                    ));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
