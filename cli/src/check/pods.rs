//! Which pods are in the mesh, and why others that should be are not.

use std::collections::BTreeMap;

use weft_api::Pod;

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::cluster::Part;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let namespace = &view.namespace;
    let what = "every pod that is to be in the mesh is enrolled";
    let hint =
        format!("kubectl -n {namespace} logs daemonset/weft-agent; enrolment is tried again by itself");
    match enrolment(view, installed) {
        Err(why) => vec![Check::unknown(what, &why)],
        Ok((0, _)) => vec![Check::of(
            Outcome::Warning,
            what,
            vec!["no pod is to be in the mesh".to_owned()],
            "kubectl label namespace NAME weft.dev/mesh=enabled",
        )],
        Ok((wanted, wrong)) => {
            let what = format!("{what} ({} of {wanted})", wanted - wrong.len());
            vec![Check::of(Outcome::Error, what, wrong, hint), labels(view)]
        }
    }
}

/// How many pods there should be, and which of them are not enrolled, and why.
fn enrolment(view: &View, installed: &Installed) -> Part<(usize, Vec<String>)> {
    let pods = view.mesh_pods()?;
    let mut wrong = Vec::new();
    let mut by_node: BTreeMap<&str, Vec<&Pod>> = BTreeMap::new();
    for pod in &pods {
        by_node.entry(pod.spec.node_name.as_deref().unwrap_or_default()).or_default().push(pod);
    }
    for (node, pods) in by_node {
        let answer = installed.agents.get(node);
        for pod in pods {
            let (namespace, name) =
                (pod.metadata.namespace.as_deref().unwrap_or_default(), &pod.metadata.name);
            let why = match answer {
                _ if node.is_empty() => Some("is on no node yet".to_owned()),
                None => Some(format!("no agent runs on {node}: its connections are refused")),
                Some(Err(why)) => Some(format!("the agent of {node} does not answer: {why}")),
                Some(Ok(answer)) => {
                    let own = format!("/Pod/{namespace}/{name}");
                    let mut known = answer.status.pods.iter().filter(|known| known.uid.ends_with(&own));
                    match known.next() {
                        None => Some(format!("the agent of {node} has not heard of it")),
                        Some(known) if known.phase.as_deref() == Some("published") => None,
                        Some(known) => Some(known.failure.clone().unwrap_or_else(|| {
                            format!("is not announced yet ({})", known.phase.as_deref().unwrap_or("waiting"))
                        })),
                    }
                }
            };
            wrong.extend(why.map(|why| format!("{namespace}/{name}: {why}")));
        }
    }
    Ok((pods.len(), wrong))
}

/// Labels that do not mean what somebody meant.
fn labels(view: &View) -> Check {
    let what = "the labels that put pods into the mesh can be understood";
    let problems = || -> Part<Vec<String>> {
        let namespaces = view.namespaces.as_ref()?;
        let pods = view.pods.as_ref()?.iter().filter(|pod| !pod.is_gone());
        let problem = |pod: &Pod| {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let problem = weft_api::mesh_choice(namespaces.get(namespace), pod).problem?;
            Some(format!("{namespace}/{}: {problem}", pod.metadata.name))
        };
        Ok(pods.filter_map(problem).collect())
    };
    Check::from(
        Outcome::Warning,
        what,
        problems(),
        "kubectl label --overwrite ... weft.dev/mesh=enabled (or disabled)",
    )
}
