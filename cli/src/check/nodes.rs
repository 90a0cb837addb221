//! Whether the nodes are such as an agent can run on, as far as Kubernetes tells.

use std::time::SystemTime;

use anyhow::Result;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    report::{Check, Outcome},
    server::{CLOCK_HINT, MAX_SKEW, by},
    view::View,
};
use crate::cluster::Cluster;
use crate::cluster::seconds;

/// The first kernel with everything that the agent needs.
const KERNEL: (u32, u32) = (5, 17);

/// When each kubelet last said that it lives, by its own clock.
pub async fn leases(cluster: &Cluster) -> Result<Vec<Value>> {
    cluster.list("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases").await
}

pub fn checks(view: &View, leases: &Result<Vec<Value>>) -> Vec<Check> {
    let nodes = match &view.nodes {
        Ok(nodes) => nodes,
        Err(why) => return vec![Check::unknown("the nodes can be listed", why)],
    };
    let linux: Vec<&Value> = nodes.iter().filter(|node| info(node, "operatingSystem") != "windows").collect();
    let others = nodes.iter().filter(|node| info(node, "operatingSystem") == "windows");
    let kernel = |node: &&&Value| !is_new_enough(info(node, "kernelVersion"));
    let unready = |node: &Value| Some(format!("{}: {}", name(node), unready(node)?));
    vec![
        Check::of(
            Outcome::Warning,
            "every node runs Linux",
            others.map(|node| format!("{}: Windows", name(node))).collect(),
            "pods on those nodes stay outside the mesh",
        ),
        Check::of(
            Outcome::Error,
            format!("every node's kernel is {}.{} or newer", KERNEL.0, KERNEL.1),
            linux
                .iter()
                .filter(kernel)
                .map(|node| format!("{}: {}", name(node), info(node, "kernelVersion")))
                .collect(),
            "upgrade them, or keep the agent off them with agent.tolerations and taints; where a distribution has \
             backported what is needed, `weft-agent preflight` on the node says so",
        ),
        Check::of(
            Outcome::Error,
            "every node is ready, with its network plugin",
            linux.iter().copied().filter_map(unready).collect(),
            "install the cluster's own CNI plugin first: Weft's is chained after it",
        ),
        match leases {
            Ok(leases) => Check::of(
                Outcome::Error,
                "the nodes' clocks agree with the API server's",
                leases.iter().filter_map(|lease| skew(lease, view.server.clock)).collect(),
                CLOCK_HINT,
            ),
            Err(error) => {
                Check::unknown("the nodes' clocks agree with the API server's", &format!("{error:#}"))
            }
        },
    ]
}

pub fn name(node: &Value) -> &str {
    node["metadata"]["name"].as_str().unwrap_or_default()
}

fn info<'a>(node: &'a Value, what: &str) -> &'a str {
    node["status"]["nodeInfo"][what].as_str().unwrap_or_default()
}

/// Reads versions such as `6.1.0-13-amd64`. One that cannot be read is left to the agent, which tries the features.
fn is_new_enough(version: &str) -> bool {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= KERNEL,
        _ => true,
    }
}

/// Why a node is not ready.
pub fn unready(node: &Value) -> Option<String> {
    let conditions = node["status"]["conditions"].as_array()?;
    let ready = conditions.iter().find(|condition| condition["type"] == "Ready")?;
    (ready["status"] != "True").then(|| {
        let text = |key: &str| ready[key].as_str().unwrap_or_default();
        format!("{} {}", text("reason"), text("message")).trim().to_owned()
    })
}

/// Kubelets renew every ten seconds: a lease that was renewed in the future has another clock. One that is old may be
/// that of a kubelet that is gone, which shows elsewhere.
fn skew(lease: &Value, clock: SystemTime) -> Option<String> {
    let renewed = OffsetDateTime::parse(lease["spec"]["renewTime"].as_str()?, &Rfc3339).ok()?;
    let ahead = renewed.unix_timestamp_nanos() as f64 / 1e9 - seconds(clock);
    (ahead > MAX_SKEW).then(|| format!("{}: {}", name(lease), by(ahead)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    #[test]
    fn kernels() {
        for (version, fine) in [
            ("5.17.0", true),
            ("6.1.0-13-amd64", true),
            ("5.15.0-1034-azure", false),
            ("4.18.0-477.el8", false),
            ("strange", true),
        ] {
            assert_eq!(is_new_enough(version), fine, "{version}");
        }
    }

    #[test]
    fn a_lease_from_the_future_has_another_clock() {
        let lease = json!({"metadata": {"name": "n1"}, "spec": {"renewTime": "2030-01-01T00:10:00.000000Z"}});
        let clock = SystemTime::UNIX_EPOCH + Duration::from_secs(1_893_456_000);
        assert_eq!(skew(&lease, clock).as_deref(), Some("n1: 10 min ahead"));
        assert_eq!(skew(&lease, clock + Duration::from_secs(600)), None);
        assert_eq!(skew(&lease, clock + Duration::from_secs(6000)), None, "not there any more");
    }
}
