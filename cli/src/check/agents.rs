//! Whether an agent works on every node.

use std::collections::BTreeSet;

use serde_json::Value;
use weft_api::agent::{KubeletStatus, PluginStatus};

use super::{
    control::{events, trouble},
    nodes::name,
    report::{Check, Outcome},
    server::{CLOCK_HINT, MAX_SKEW, NOTABLE_SKEW, by},
    view::{Installed, View},
};
use crate::agents::Answer;
use crate::cluster::Part;

pub fn checks(view: &View, installed: &Installed) -> Vec<Check> {
    let namespace = &view.namespace;
    let describe = format!(
        "kubectl -n {namespace} describe daemonset weft-agent\n\
         until an agent is back, the node's pods of the mesh refuse connections and new ones do not start"
    );
    let logs = format!("kubectl -n {namespace} logs daemonset/weft-agent (or the pod of that node)");
    let answers = || installed.agents.iter().filter_map(|(node, answer)| Some((node, answer.as_ref().ok()?)));
    let each = |wrong: &dyn Fn(&Answer) -> Option<String>| -> Vec<String> {
        answers().filter_map(|(node, answer)| Some(format!("{node}: {}", wrong(answer)?))).collect()
    };
    let silent = installed.agents.iter().filter_map(|(node, answer)| match answer {
        Ok(_) => None,
        Err(why) => Some(format!("{node}: {why}")),
    });
    // An agent's clock is known through this machine's.
    let skew = |answer: &Answer| answer.skew + view.own_skew;
    let beyond = |limit: f64| move |answer: &Answer| skew(answer).abs() > limit + answer.took + 1.0;
    let (broken, odd) = (beyond(MAX_SKEW), beyond(NOTABLE_SKEW));
    let own = env!("CARGO_PKG_VERSION");
    vec![
        Check::from(Outcome::Error, "an agent is ready on every node", absent(view, installed), describe),
        Check::of(Outcome::Error, "the agents answer", silent.collect(), logs.clone()),
        Check::of(
            Outcome::Error,
            "the agents are connected to the controller",
            each(&|answer| {
                let why = answer.status.trouble.trim();
                (!answer.status.connected).then(|| match why {
                    "" => "not connected; it goes on with what it last knew".to_owned(),
                    why => format!("not connected; it goes on with what it last knew: {why}"),
                })
            }),
            format!(
                "{logs}\nwhere replicas stay behind what nodes have seen: docs/operate.md, After a restored back-up"
            ),
        ),
        Check::of(
            Outcome::Error,
            "the CNI plugin is in every node's network configuration",
            each(&|answer| match &answer.status.plugin {
                PluginStatus::Failed { error } => Some(error.clone()),
                PluginStatus::Unknown => Some("the agent has not looked yet".to_owned()),
                PluginStatus::NotManaged => Some("the agent was not told to keep it there".to_owned()),
                PluginStatus::InPlace => None,
            }),
            "new pods of the mesh start before they are protected. The agent puts the plugin there as soon as it can:\n\
             is the node's network configuration in /etc/cni/net.d, or is it elsewhere (--set cni.confDir, cni.binDir)?",
        ),
        Check::of(
            Outcome::Warning,
            "the kubelets' probes are recognised",
            each(&|answer| match &answer.status.kubelet {
                KubeletStatus::Unrecognised { why } => Some(why.clone()),
                KubeletStatus::Recognised { .. } | KubeletStatus::Unknown => None,
            }),
            "probes of pods in the mesh are judged by policy like everybody's connections, and fail where it denies\n\
             plaintext. `weft-agent preflight` on the node looks for its kubelet; --set agent.kubeletCgroup names its cgroup",
        ),
        Check::of(
            Outcome::Error,
            "the nodes' clocks agree with the API server's",
            each(&|answer| broken(answer).then(|| by(skew(answer)))),
            CLOCK_HINT,
        ),
        Check::of(
            Outcome::Warning,
            "the nodes' clocks agree to the second",
            each(&|answer| (odd(answer) && !broken(answer)).then(|| by(skew(answer)))),
            CLOCK_HINT,
        ),
        Check::of(
            Outcome::Warning,
            "the agents have the version of this command",
            each(&|answer| {
                (answer.status.version != own).then(|| format!("{}, this is {own}", answer.status.version))
            }),
            "weft upgrade | kubectl apply -f -, or use the `weft` of their version",
        ),
    ]
}

/// Linux nodes without an agent that is ready, and why.
fn absent(view: &View, installed: &Installed) -> Part<Vec<String>> {
    let Some(set) = installed.agent.as_ref()? else {
        return Ok(vec![format!("there is no DaemonSet {}/weft-agent", view.namespace)]);
    };
    let is_ready = |pod: &&Value| trouble(pod).is_none();
    let on = |pod: &Value| pod["spec"]["nodeName"].as_str().map(str::to_owned);
    let ready: BTreeSet<String> = installed.pods_of("weft-agent")?.filter(is_ready).filter_map(on).collect();
    let nodes =
        view.nodes.as_ref()?.iter().filter(|node| node["status"]["nodeInfo"]["operatingSystem"] != "windows");
    let mut wrong = Vec::new();
    for node in nodes.map(name).filter(|node| !ready.contains(*node)) {
        let mut pods = installed.pods_of("weft-agent")?.filter(|pod| pod["spec"]["nodeName"] == node);
        let why = pods.find_map(trouble);
        // Without a pod it is the DaemonSet that does not want one there, or may not make it.
        let refused = || events(installed, &["DaemonSet"], "weft-agent").pop();
        let why =
            why.or_else(refused).unwrap_or_else(|| {
                match set["spec"]["template"]["spec"]["nodeSelector"].as_object() {
                    Some(selector) if selector.len() > 1 => {
                        format!(
                            "the DaemonSet's nodeSelector leaves it out: {}",
                            Value::from(selector.clone())
                        )
                    }
                    _ => "the DaemonSet has no pod there; is it tainted?".to_owned(),
                }
            });
        wrong.push(format!("{node}: {why}"));
    }
    Ok(wrong)
}
