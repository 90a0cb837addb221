//! Which pods the labels want in the mesh. Pure; the controller's translation and its certificate authority both ask
//! this one rule, so that a pod never gets a certificate without being captured, or the other way round.

use crate::{
    Namespace, Pod,
    labels::{DISABLED, ENABLED, MESH},
};

/// What the labels say about one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshChoice {
    /// Whether the pod is to be in the mesh.
    pub wanted: bool,
    /// What is wrong with the labels, for a person to act on.
    pub problem: Option<String>,
}

/// The rule: the pod's label, else its namespace's, else no. A pod on the host's network is never in the mesh, since
/// its addresses are the node's.
///
/// A value other than `enabled` and `disabled` is read as `enabled` and reported: somebody meant to say something about
/// this pod, and of the two readings only this one cannot put traffic on the wire that was to be protected (a typing
/// error in the label of a pod that is in the mesh must not take it out).
pub fn mesh_choice(namespace: Option<&Namespace>, pod: &Pod) -> MeshChoice {
    if pod.spec.host_network {
        let asked = pod.metadata.labels.get(MESH).is_some_and(|value| value == ENABLED);
        let problem = asked.then(|| {
            format!(
                "label {MESH}: {ENABLED} has no effect: the pod is on the host's network, whose addresses are the node's"
            )
        });
        return MeshChoice { wanted: false, problem };
    }
    let of_namespace = namespace.and_then(|namespace| namespace.metadata.labels.get(MESH));
    match pod.metadata.labels.get(MESH) {
        Some(value) => read(value, "the pod's"),
        None => {
            of_namespace.map_or(MeshChoice { wanted: false, problem: None }, |v| read(v, "its namespace's"))
        }
    }
}

fn read(value: &str, whose: &str) -> MeshChoice {
    match value {
        ENABLED => MeshChoice { wanted: true, problem: None },
        DISABLED => MeshChoice { wanted: false, problem: None },
        other => MeshChoice {
            wanted: true,
            problem: Some(format!(
                "{whose} label {MESH} is {other:?}, neither {ENABLED:?} nor {DISABLED:?}; read as {ENABLED:?}"
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn choose(namespace: Option<&str>, pod: Option<&str>, host_network: bool) -> MeshChoice {
        let labels = |value: Option<&str>| value.map_or(json!({}), |v| json!({ MESH: v }));
        let ns: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "shop", "labels": labels(namespace)}}))
                .unwrap();
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web", "labels": labels(pod)}, "spec": {"hostNetwork": host_network}
        }))
        .unwrap();
        mesh_choice(Some(&ns), &pod)
    }

    #[test]
    fn the_pod_wins_over_its_namespace() {
        for (namespace, pod, wanted, reported) in [
            (None, None, false, false),
            (Some("enabled"), None, true, false),
            (Some("disabled"), None, false, false),
            (None, Some("enabled"), true, false),
            (None, Some("disabled"), false, false),
            (Some("enabled"), Some("disabled"), false, false),
            (Some("disabled"), Some("enabled"), true, false),
            (Some("Enabled"), None, true, true),
            (Some("enabled"), Some("off"), true, true),
            (Some("disabled"), Some(""), true, true),
            // The namespace's typing error is not this pod's: its own label speaks.
            (Some("yes"), Some("disabled"), false, false),
        ] {
            let choice = choose(namespace, pod, false);
            assert_eq!(
                (choice.wanted, choice.problem.is_some()),
                (wanted, reported),
                "namespace {namespace:?}, pod {pod:?}: {choice:?}"
            );
        }
    }

    #[test]
    fn never_on_the_hosts_network() {
        for (namespace, pod, reported) in
            [(Some("enabled"), None, false), (None, Some("enabled"), true), (None, Some("off"), false)]
        {
            let choice = choose(namespace, pod, true);
            assert!(!choice.wanted, "namespace {namespace:?}, pod {pod:?}");
            assert_eq!(choice.problem.is_some(), reported, "namespace {namespace:?}, pod {pod:?}");
        }
    }

    #[test]
    fn a_pod_whose_namespace_nobody_declared() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "web", "labels": {MESH: "enabled"}}}))
                .unwrap();
        assert!(mesh_choice(None, &pod).wanted);
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "web"}})).unwrap();
        assert!(!mesh_choice(None, &pod).wanted);
    }
}
