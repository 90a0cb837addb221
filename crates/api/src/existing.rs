//! What is to become of connections that are older than the enrolment of their pod.

use crate::{Namespace, Pod, labels::CUT_EXISTING};

/// What annotations say of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutChoice {
    /// Whether they are to be cut.
    pub wanted: bool,
    /// What is wrong with the annotations, for a person to act on.
    pub problem: Option<String>,
}

/// The rule: the pod's annotation, else its namespace's, else no. A value other than `true` and `false` is read as `false` and
/// reported: what was cut by mistake stays cut, and `weft check` warns of what was not.
pub fn cut_choice(namespace: Option<&Namespace>, pod: &Pod) -> CutChoice {
    let of_pod = pod.metadata.annotations.get(CUT_EXISTING).map(|value| (value, "the pod's"));
    let of_namespace = namespace.and_then(|namespace| namespace.metadata.annotations.get(CUT_EXISTING));
    let said = of_pod.or(of_namespace.map(|value| (value, "its namespace's")));
    let problem = said.filter(|(value, _)| !["true", "false"].contains(&value.as_str())).map(|(value, whose)| {
        format!("{whose} annotation {CUT_EXISTING} is {value:?}, neither \"true\" nor \"false\"; read as \"false\"")
    });
    CutChoice { wanted: said.is_some_and(|(value, _)| value == "true"), problem }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_pod_wins_over_its_namespace() {
        for (namespace, pod, wanted, reported) in [
            (None, None, false, false),
            (Some("true"), None, true, false),
            (None, Some("true"), true, false),
            (Some("true"), Some("false"), false, false),
            (Some("false"), Some("true"), true, false),
            (Some("yes"), None, false, true),
            (Some("true"), Some("True"), false, true),
            (Some("?"), Some("true"), true, false),
        ] {
            let metadata = |value: Option<&str>| {
                let annotations = value.map_or(json!({}), |v| json!({ CUT_EXISTING: v }));
                json!({"name": "shop", "annotations": annotations})
            };
            let of: Namespace = serde_json::from_value(json!({"metadata": metadata(namespace)})).unwrap();
            let it: Pod = serde_json::from_value(json!({"metadata": metadata(pod), "spec": {}})).unwrap();
            let choice = cut_choice(Some(&of), &it);
            assert_eq!(
                (choice.wanted, choice.problem.is_some()),
                (wanted, reported),
                "{namespace:?}, {pod:?}"
            );
        }
    }
}
