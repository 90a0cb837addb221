//! NetworkPolicies beside the mesh. They are enforced on what crosses the pods' links, which between pods of the mesh is
//! the tunnel: one TCP port, 15008, whatever port the application is called at.

use std::collections::BTreeMap;

use serde_json::Value;
use weft_api::Pod;

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::cluster::Part;

const TUNNEL: u64 = 15008;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let (mut closed, mut bypassed) = (Vec::new(), Vec::new());
    let mut found = || -> Part<()> {
        let pods = view.mesh_pods()?;
        for policy in installed.policies.as_ref()? {
            let metadata = &policy["metadata"];
            let namespace = metadata["namespace"].as_str().unwrap_or_default();
            let selects = |pod: &&Pod| {
                pod.metadata.namespace.as_deref() == Some(namespace)
                    && is_selected(&policy["spec"]["podSelector"], &pod.metadata.labels)
            };
            let Some(pod) = pods.iter().copied().find(|pod| selects(pod)) else { continue };
            let name = format!("{namespace}/{}", metadata["name"].as_str().unwrap_or_default());
            for direction in directions(&policy["spec"]) {
                let rules = policy["spec"][direction].as_array().map(Vec::as_slice).unwrap_or_default();
                let about = format!("{name} ({direction}), which applies to {}", pod.metadata.name);
                match tunnel(rules) {
                    Tunnel::Closed => closed.push(about),
                    Tunnel::BesideOthers => bypassed.push(about),
                    Tunnel::Open => {}
                }
            }
        }
        Ok(())
    };
    let blocks = "no NetworkPolicy blocks the tunnel's port between pods of the mesh";
    if let Err(why) = found() {
        return vec![Check::unknown(blocks, &why)];
    }
    vec![
        Check::of(
            Outcome::Error,
            blocks,
            closed,
            "add TCP port 15008 to its rules for peers of the mesh; other ports do not matter between them",
        ),
        Check::of(
            Outcome::Warning,
            "no NetworkPolicy is meant to limit ports that the tunnel carries",
            bypassed,
            "what may use 15008 reaches every port of the pod through the tunnel: port rules of a NetworkPolicy do not \
             hold between pods of the mesh",
        ),
    ]
}

/// What a list of rules means for the tunnel.
#[derive(Debug, PartialEq, Eq)]
enum Tunnel {
    Closed,
    Open,
    /// Open, and other rules limit the ports of the same direction.
    BesideOthers,
}

fn tunnel(rules: &[Value]) -> Tunnel {
    let ports = |rule: &Value| rule["ports"].as_array().filter(|ports| !ports.is_empty()).cloned();
    let opens = |rule: &Value| ports(rule).is_none_or(|ports| ports.iter().any(is_tunnel));
    let limits = |rule: &Value| ports(rule).is_some_and(|ports| ports.iter().any(|port| !is_tunnel(port)));
    match (rules.iter().any(opens), rules.iter().any(limits)) {
        (false, _) => Tunnel::Closed,
        (true, false) => Tunnel::Open,
        (true, true) => Tunnel::BesideOthers,
    }
}

fn is_tunnel(port: &Value) -> bool {
    if port["protocol"].as_str().is_some_and(|protocol| protocol != "TCP") {
        return false;
    }
    match (&port["port"], port["endPort"].as_u64()) {
        (Value::Null, _) => true,
        (Value::Number(first), Some(last)) => {
            first.as_u64().is_some_and(|first| (first..=last).contains(&TUNNEL))
        }
        (Value::Number(only), None) => only.as_u64() == Some(TUNNEL),
        // Named after a container's port, and the tunnel's is none.
        _ => false,
    }
}

/// The directions that a policy closes but for its rules.
fn directions(spec: &Value) -> Vec<&'static str> {
    let named = |kind: &str| spec["policyTypes"].as_array().map(|types| types.iter().any(|t| t == kind));
    let mut directions = Vec::new();
    if named("Ingress").unwrap_or(true) {
        directions.push("ingress");
    }
    if named("Egress").unwrap_or_else(|| spec["egress"].is_array()) {
        directions.push("egress");
    }
    directions
}

/// As Kubernetes reads a label selector.
fn is_selected(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let equal = |(key, value): (&String, &Value)| labels.get(key).map(String::as_str) == value.as_str();
    let exact = selector["matchLabels"].as_object().is_none_or(|wanted| wanted.iter().all(equal));
    let expression = |expression: &Value| {
        let value = labels.get(expression["key"].as_str().unwrap_or_default());
        let among = || {
            let values = expression["values"].as_array().map(Vec::as_slice).unwrap_or_default();
            value.is_some_and(|value| values.iter().any(|v| v == value.as_str()))
        };
        match expression["operator"].as_str() {
            Some("In") => among(),
            Some("NotIn") => !among(),
            Some("Exists") => value.is_some(),
            Some("DoesNotExist") => value.is_none(),
            _ => false,
        }
    };
    exact && selector["matchExpressions"].as_array().is_none_or(|all| all.iter().all(expression))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rules_open_the_tunnel_or_not() {
        let rule = |ports: Value| json!({"ports": ports});
        for (rules, expected) in [
            (vec![], Tunnel::Closed),
            (vec![json!({})], Tunnel::Open),
            (vec![json!({"from": [{"podSelector": {}}]})], Tunnel::Open),
            (vec![rule(json!([{"port": 8080}]))], Tunnel::Closed),
            (vec![rule(json!([{"port": "http"}]))], Tunnel::Closed),
            (vec![rule(json!([{"port": 15008}]))], Tunnel::Open),
            (vec![rule(json!([{"port": 15008, "protocol": "UDP"}]))], Tunnel::Closed),
            (vec![rule(json!([{"port": 15000, "endPort": 15020}]))], Tunnel::Open),
            (vec![rule(json!([{"port": 8080}])), rule(json!([{"port": 15008}]))], Tunnel::BesideOthers),
            (vec![rule(json!([{"port": 8080}, {"port": 15008}]))], Tunnel::BesideOthers),
            (vec![rule(json!([{"protocol": "TCP"}]))], Tunnel::Open),
        ] {
            assert_eq!(tunnel(&rules), expected, "{rules:?}");
        }
    }

    #[test]
    fn policies_close_what_their_types_say() {
        for (spec, expected) in [
            (json!({}), vec!["ingress"]),
            (json!({"egress": []}), vec!["ingress", "egress"]),
            (json!({"policyTypes": ["Egress"]}), vec!["egress"]),
            (json!({"policyTypes": ["Ingress", "Egress"]}), vec!["ingress", "egress"]),
        ] {
            assert_eq!(directions(&spec), expected, "{spec}");
        }
    }

    #[test]
    fn selectors() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        for (selector, expected) in [
            (json!({}), true),
            (Value::Null, true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "other"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false),
            (json!({"matchExpressions": [{"key": "x", "operator": "DoesNotExist"}]}), true),
            (json!({"matchExpressions": [{"key": "x", "operator": "Exists"}]}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "Sideways"}]}), false),
        ] {
            assert_eq!(is_selected(&selector, &labels), expected, "{selector}");
        }
    }
}
