//! Who may call whom: policies that are not what their authors meant, and annotations that are not understood.

use std::collections::BTreeSet;

use weft_api::{AuthorizationPolicy, DefaultInbound, inbound_choice};

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::cluster::Part;

const ACCEPTED: &str = "Accepted";

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let accepted = "every AuthorizationPolicy is accepted";
    let understood = "every annotation policy.weft.dev/default-inbound is understood";
    vec![
        Check::from(
            Outcome::Warning,
            accepted,
            installed.authorization.as_ref().map_err(String::clone).map(|all| all.iter().filter_map(refused).collect()),
            "kubectl get authorizationpolicies.policy.weft.dev -A\ndocs/policy.md says what a policy can say",
        ),
        Check::from(
            Outcome::Warning,
            understood,
            annotations(view),
            "docs/policy.md has the values; one that is not known is read as deny",
        ),
    ]
}

/// What is wrong with a policy: as the controller says it, or as it can be read from the policy itself.
fn refused(policy: &AuthorizationPolicy) -> Option<String> {
    let name = format!("{}/{}", policy.metadata.namespace.as_deref().unwrap_or_default(), policy.metadata.name);
    let condition = policy.status.conditions.iter().find(|condition| condition.kind == ACCEPTED);
    match (&policy.spec, condition) {
        (_, Some(condition)) if !condition.is_true() => Some(format!("{name}: {}", condition.message)),
        (Err(unintelligible), None) => Some(format!("{name}: {}; it denies everything", unintelligible.why)),
        (_, None) => Some(format!("{name}: the controller has not said whether it accepts it")),
        (_, Some(_)) => None,
    }
}

/// Each problem once, with one of the pods that have it.
fn annotations(view: &View) -> Part<Vec<String>> {
    let (pods, namespaces) = (view.mesh_pods()?, view.namespaces.as_ref()?);
    let lax = DefaultInbound::default();
    let mut said = BTreeSet::new();
    let mut wrong = Vec::new();
    for pod in pods {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        if let Some(problem) = inbound_choice(lax, lax, namespaces.get(namespace), pod).problem
            && said.insert((namespace, problem.clone()))
        {
            wrong.push(format!("{namespace}/{}: {problem}", pod.metadata.name));
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_wrong_with_a_policy() {
        let read = |spec, conditions| {
            let policy = json!({
                "metadata": {"name": "p", "namespace": "shop"}, "spec": spec, "status": {"conditions": conditions},
            });
            refused(&serde_json::from_value(policy).unwrap()).unwrap_or_default()
        };
        let condition = |status, message| json!([{"type": "Accepted", "status": status, "message": message}]);
        assert_eq!(read(json!({}), condition("True", "")), "");
        assert_eq!(read(json!({}), condition("False", "no Service web")), "shop/p: no Service web");
        assert!(read(json!({}), json!([])).contains("has not said"));
        assert!(read(json!({"moods": 1}), json!([])).contains("moods"));
    }
}
