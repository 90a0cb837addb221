//! Who may call whom: policies that are not what their authors meant, and annotations that are not understood.

use std::collections::BTreeSet;

use weft_api::{AuthorizationPolicy, DefaultInbound, inbound_choice, pod::Condition};

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::cluster::Part;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let accepted = "every AuthorizationPolicy is accepted";
    let programmed = "every AuthorizationPolicy is in force on every node";
    let each = |problem: fn(&AuthorizationPolicy) -> Option<String>| -> Part<Vec<String>> {
        let policies = installed.authorization.as_ref().map_err(String::clone)?;
        Ok(policies.iter().filter_map(problem).collect())
    };
    let understood = "every annotation policy.weft.dev/default-inbound is understood";
    vec![
        Check::from(
            Outcome::Warning,
            accepted,
            each(refused),
            "kubectl get authorizationpolicies.policy.weft.dev -A\ndocs/policy.md says what a policy can say",
        ),
        Check::from(
            Outcome::Warning,
            programmed,
            each(awaited),
            format!(
                "a change takes seconds; after that: does the agent of that node run, and reach the controller?\n\
                 kubectl -n {} get pods -o wide",
                view.namespace
            ),
        ),
        Check::from(
            Outcome::Warning,
            understood,
            annotations(view),
            "docs/policy.md has the values; one that is not known is read as deny",
        ),
    ]
}

fn name(policy: &AuthorizationPolicy) -> String {
    format!("{}/{}", policy.metadata.namespace.as_deref().unwrap_or_default(), policy.metadata.name)
}

/// Why an accepted policy is not known to be in force everywhere.
fn awaited(policy: &AuthorizationPolicy) -> Option<String> {
    let is_now = |condition: &&Condition| condition.observed_generation == policy.metadata.generation;
    policy.condition(AuthorizationPolicy::ACCEPTED).filter(|accepted| accepted.is_true())?;
    let why = match policy.condition(AuthorizationPolicy::PROGRAMMED).filter(is_now) {
        Some(programmed) if programmed.is_true() => return None,
        Some(programmed) => &programmed.message,
        None => "the controller has not said where it is in force",
    };
    Some(format!("{}: {why}", name(policy)))
}

/// What is wrong with a policy: as the controller says it, or as it can be read from the policy itself.
fn refused(policy: &AuthorizationPolicy) -> Option<String> {
    let name = name(policy);
    match (&policy.spec, policy.condition(AuthorizationPolicy::ACCEPTED)) {
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
        let policy = |spec, conditions| -> AuthorizationPolicy {
            let policy = json!({
                "metadata": {"name": "p", "namespace": "shop", "generation": 2}, "spec": spec, "status": {"conditions": conditions},
            });
            serde_json::from_value(policy).unwrap()
        };
        let read = |spec, conditions| refused(&policy(spec, conditions)).unwrap_or_default();
        let condition = |status, message| json!([{"type": "Accepted", "status": status, "message": message}]);
        let both = |accepted, programmed, generation| {
            let conditions = json!([
                {"type": "Accepted", "status": accepted},
                {"type": "Programmed", "status": programmed, "message": "2", "observedGeneration": generation},
            ]);
            awaited(&policy(json!({}), conditions)).unwrap_or_default()
        };
        assert_eq!(both("True", "False", 2), "shop/p: 2");
        assert_eq!(both("True", "True", 2) + &both("False", "False", 2), "");
        assert!(both("True", "True", 1).contains("has not said"));
        assert_eq!(read(json!({}), condition("True", "")), "");
        assert_eq!(read(json!({}), condition("False", "no Service web")), "shop/p: no Service web");
        assert!(read(json!({}), json!([])).contains("has not said"));
        assert!(read(json!({"moods": 1}), json!([])).contains("moods"));
    }
}
