//! Whether everything is installed, and the controller works.

use serde_json::Value;

use super::{
    report::{Check, Outcome},
    view::{Installed, View},
};
use crate::cluster::Part;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let namespace = &view.namespace;
    let mut checks = vec![installation(namespace, installed)];
    let running = "the controller is running";
    let wrong = installed.control.as_ref().map_err(String::clone).and_then(|control| match control {
        None => Ok(vec![format!("there is no Deployment {namespace}/weft-control")]),
        Some(control) => unavailable(control, installed),
    });
    let hint = format!(
        "kubectl -n {namespace} describe deployment weft-control\nkubectl -n {namespace} logs deployment/weft-control"
    );
    checks.push(Check::from(Outcome::Error, running, wrong, hint));
    checks
}

fn installation(namespace: &str, installed: &Installed) -> Check {
    let what = "everything that belongs to an installation is there";
    let wrong = installed.missing.clone();
    // `upgrade` keeps the installation's settings.
    let command = if matches!(installed.control, Ok(Some(_))) { "upgrade" } else { "install" };
    let hint = match namespace {
        "weft-system" => format!("weft {command} | kubectl apply -f -"),
        namespace => format!("weft {command} --namespace {namespace} | kubectl apply -f -"),
    };
    // Of definitions we depend on, the consequence is worth a word.
    let wrong = wrong.map(|missing| {
        let explain = |name: String| match name.strip_prefix("CustomResourceDefinition/") {
            Some(definition) => format!(
                "the definition (CRD) {definition} is missing: the controller can neither read nor write these objects"
            ),
            None => format!("{name} is missing"),
        };
        missing.into_iter().map(explain).collect()
    });
    Check::from(Outcome::Error, what, wrong, hint)
}

/// What keeps the Deployment from being available.
fn unavailable(control: &Value, installed: &Installed) -> Part<Vec<String>> {
    let number = |path: &str| control.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    let (wanted, ready) = (number("/spec/replicas"), number("/status/readyReplicas"));
    if wanted > 0 && ready >= wanted {
        return Ok(Vec::new());
    }
    let mut wrong = vec![format!("{ready} of {wanted} replicas are ready")];
    wrong.extend(installed.pods_of("weft-control")?.filter_map(trouble));
    wrong.extend(events(installed, &["ReplicaSet", "Deployment"], "weft-control"));
    Ok(wrong)
}

/// Why a pod is not ready, as the kubelet or the scheduler says it.
pub fn trouble(pod: &Value) -> Option<String> {
    let name = pod["metadata"]["name"].as_str()?;
    let node = pod["spec"]["nodeName"].as_str().unwrap_or("no node");
    let status = &pod["status"];
    let conditions = status["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let condition = |kind: &str| conditions.iter().find(|condition| condition["type"] == kind);
    if condition("Ready").is_some_and(|ready| ready["status"] == "True") {
        return None;
    }
    let say = |why: &str, more: &Value| {
        let more = more.as_str().unwrap_or_default().trim();
        // Of a log, the end says why.
        let last = more.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
        Some(format!("{name} on {node}: {why}{}{last}", if last.is_empty() { "" } else { ": " }))
    };
    let container = &status["containerStatuses"][0];
    let (waiting, ended) = (&container["state"]["waiting"], &container["lastState"]["terminated"]);
    let ended =
        if container["state"]["terminated"].is_object() { &container["state"]["terminated"] } else { ended };
    if let Some(code) = ended["exitCode"].as_i64() {
        return say(&format!("ended with status {code}"), &ended["message"]);
    }
    if let Some(reason) = waiting["reason"].as_str() {
        return say(reason, &waiting["message"]);
    }
    match condition("PodScheduled") {
        Some(scheduled) if scheduled["status"] == "False" => say("not scheduled", &scheduled["message"]),
        _ => say("not ready", &Value::Null),
    }
}

/// What Kubernetes last said about objects of these kinds whose name begins so: why pods could not be made, mostly.
pub fn events(installed: &Installed, kinds: &[&str], name: &str) -> Vec<String> {
    let events = installed.events.as_deref().unwrap_or_default().iter();
    let about = events.filter(|event| {
        let object = &event["involvedObject"];
        kinds.iter().any(|kind| object["kind"] == *kind)
            && object["name"].as_str().is_some_and(|found| found.starts_with(name))
    });
    let last = about.max_by_key(|event| event["lastTimestamp"].as_str().unwrap_or_default().to_owned());
    last.and_then(|event| event["message"].as_str()).map(str::to_owned).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_says_why_it_is_not_ready() {
        let pod =
            |status: Value| json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n"}, "status": status});
        let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let pulling = json!({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]});
        let crashed = json!({"containerStatuses": [{
            "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
            "lastState": {"terminated": {"exitCode": 1, "message": "starting\nweft-control: the root has expired\n"}},
        }]});
        let pending =
            json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes"}]});
        for (status, expected) in [
            (ready, None),
            (pulling, Some("p on n: ImagePullBackOff: no such image")),
            (crashed, Some("p on n: ended with status 1: weft-control: the root has expired")),
            (pending, Some("p on n: not scheduled: 0/2 nodes")),
            (json!({}), Some("p on n: not ready")),
        ] {
            assert_eq!(trouble(&pod(status)).as_deref(), expected);
        }
    }
}
