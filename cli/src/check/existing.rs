//! Whether connections are left that are older than the enrolment of their pods.

use weft_api::agent::PodStatus;

use super::{
    report::{Check, Outcome},
    view::Installed,
};

pub fn checks(installed: &Installed) -> Vec<Check> {
    let answers = installed.agents.values().filter_map(|answer| answer.as_ref().ok());
    vec![Check::of(
        Outcome::Warning,
        "no connection between pods in the mesh is older than their enrolment",
        answers.flat_map(|answer| &answer.status.pods).filter_map(left).collect(),
        "they are in the clear until they end. Restart the pod at either end, or have the agents cut them:\n\
         kubectl annotate namespace NAME weft.dev/cut-existing-connections=true",
    )]
}

fn left(pod: &PodStatus) -> Option<String> {
    let name = pod.uid.rsplit_once("/Pod/").map_or(pod.uid.as_str(), |(_, name)| name);
    match (pod.connections_before_enrollment, &pod.connections_problem) {
        (0, None) => None,
        (0, Some(problem)) => Some(format!("{name}: {problem}")),
        (count, None) => Some(format!("{name}: {count}")),
        (count, Some(problem)) => Some(format!("{name}: {count}; {problem}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_how_many_and_why_they_are_still_there() {
        for (count, problem, expected) in [
            (0, None, None),
            (3, None, Some("shop/web: 3")),
            (0, Some("no list"), Some("shop/web: no list")),
            (3, Some("no cut"), Some("shop/web: 3; no cut")),
        ] {
            let pod = PodStatus {
                uid: "Kubernetes//Pod/shop/web".to_owned(),
                connections_before_enrollment: count,
                connections_problem: problem.map(str::to_owned),
                ..PodStatus::default()
            };
            assert_eq!(left(&pod).as_deref(), expected);
        }
    }
}
