//! A real Kubernetes cluster on this machine: etcd, kube-apiserver and the rest on a machine of the bed's network, and
//! nodes with containerd, kubelet and kube-proxy, each in namespaces of its own. Lives in the bed, and ends with it.
//!
//! The programs are one binary, built by `cargo xtask` from the Go module in `tests/kubernetes/hyperkube`; images are what
//! it leaves in `target/test-images`.
//!
//! [`ApiCluster`] is the small sibling: a real API server, and nodes and pods of the bed whose objects the test writes
//! itself, in the kubelets' stead.

mod api;
mod bare;
pub(crate) mod cgroup;
mod control_plane;
mod node;
mod pki;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub use api::{Api, AuditedRequest};
pub use bare::{ApiCluster, SYSTEM, agent_pod_name, documents, running_pod};
pub use cgroup::{NodeCgroups, obstacle};
pub use control_plane::{ControlPlane, DNS_ADDRESS, POD_CIDR, SERVICE_CIDR};
pub use node::KubeNode;

use crate::bed::Bed;
use crate::capture::Capture;
use crate::poll::{pause, until, until_some};
use crate::topology::Topology;

const NODE_READY: Duration = Duration::from_secs(120);

/// A running cluster.
#[derive(Debug)]
pub struct KubeCluster {
    // Nodes first: their kubelets would complain about the rest.
    nodes: Vec<KubeNode>,
    plane: ControlPlane,
    topology: Topology,
}

impl KubeCluster {
    /// Starts a control plane and these nodes, and waits until all are Ready and reach each other's pods.
    pub fn start(name: &str, nodes: &[&str]) -> Result<KubeCluster> {
        let programs = programs()?;
        let images = images()?;
        let bed = Bed::new(name)?;
        let topology = Topology::create(&bed, &[])?;
        let plane = ControlPlane::start(&topology.control, &programs)?;
        let mut started = Vec::new();
        for (host, node) in (11..).zip(nodes) {
            let place = topology.add_machine(node, host)?;
            place.netns().sysctl("ipv4/ip_forward", "1")?;
            place.netns().sysctl("ipv6/conf/all/forwarding", "1")?;
            // The kubelet and kube-proxy look for default routes.
            let control = &topology.control;
            place
                .netns()
                .ip(&format!("route add default via {}\nroute add default via {}", control.v4, control.v6))?;
            started.push(KubeNode::start(&place, &plane, topology.control.v4, &programs, &images)?);
        }
        let cluster = KubeCluster { nodes: started, plane, topology };
        cluster.wire_pods()?;
        cluster.kubectl(["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s"])?;
        Ok(cluster)
    }

    /// Gives each node its range of addresses, and every machine the routes to them.
    fn wire_pods(&self) -> Result<()> {
        let mut ranges = Vec::new();
        for node in &self.nodes {
            let name = node.place().name();
            let found = until_some(NODE_READY, &format!("{name} has ranges of pod addresses"), || {
                let found = self.kubectl(["get", "node", name, "-o", "jsonpath={.spec.podCIDRs[*]}"])?;
                Ok((!found.is_empty()).then_some(found))
            })?;
            let found: Vec<_> = found.split_whitespace().collect();
            node.write_cni("10-test.conflist", &found)?;
            ranges.extend(found.into_iter().map(|range| (node.place(), range.to_owned())));
        }
        let machines = self.nodes.iter().map(KubeNode::place).chain([&self.topology.control]);
        for machine in machines {
            for (node, range) in ranges.iter().filter(|(node, _)| node.name() != machine.name()) {
                let via = node.addresses().into_iter().find(|ip| ip.is_ipv6() == range.contains(':'));
                let via = via.context("a node without an address")?;
                machine.netns().ip(&format!("route add {range} via {via}"))?;
            }
        }
        Ok(())
    }

    /// The nodes.
    pub fn nodes(&self) -> &[KubeNode] {
        &self.nodes
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Result<&KubeNode> {
        let found = self.nodes.iter().find(|node| node.place().name() == name);
        found.with_context(|| format!("there is no node {name}"))
    }

    /// The control plane.
    pub fn control_plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// Runs kubectl as the administrator; it must succeed. Returns its standard output.
    pub fn kubectl<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        self.plane.kubectl(args)
    }

    /// `kubectl apply`.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.plane.feed(&["apply", "-f", "-"], yaml)
    }

    /// `kubectl delete`; returns when everything is gone.
    pub fn delete(&self, yaml: &str) -> Result<()> {
        self.plane.feed(&["delete", "--timeout=60s", "-f", "-"], yaml)
    }

    /// Runs a command in a pod of a namespace; it must succeed.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl([&["exec", "-n", namespace, pod, "--"], command].concat())
    }

    /// A field of an object.
    pub fn field(&self, namespace: &str, object: &str, path: &str) -> Result<String> {
        self.kubectl(["get", "-n", namespace, object, "-o", &format!("jsonpath={{{path}}}")])
    }

    /// Waits until these pods are Ready; says how they are if they do not get there.
    pub fn wait_ready(&self, namespace: &str, pods: &[&str], limit: Duration) -> Result<()> {
        let start = Instant::now();
        for pod in pods {
            let left = limit.saturating_sub(start.elapsed()).max(Duration::from_secs(1));
            let result = until(left, &format!("{namespace}/{pod} is Ready"), || {
                let path = ".status.conditions[?(@.type==\"Ready\")].status";
                let ready = self.field(namespace, &format!("pod/{pod}"), path)?;
                pause(Duration::from_millis(100));
                Ok(ready == "True")
            });
            if let Err(error) = result {
                let story = self.kubectl(["describe", "-n", namespace, "pod", pod]).unwrap_or_default();
                bail!("{error:#}\n{story}");
            }
        }
        Ok(())
    }

    /// Starts recording the wire between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        self.topology.capture()
    }
}

/// The directory of the Kubernetes programs, which `cargo xtask test` names in `KUBEBUILDER_ASSETS`.
fn programs() -> Result<PathBuf> {
    let dir = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let dir = dir.context(
        "KUBEBUILDER_ASSETS is not set: run `cargo xtask test kubernetes`, which builds the programs",
    )?;
    for program in ["etcd", "kube-apiserver", "kubelet", "kubectl"] {
        ensure!(dir.join(program).exists(), "KUBEBUILDER_ASSETS has no {program}: {}", dir.display());
    }
    Ok(dir)
}

/// Every image that the nodes get: `target/test-images`, beside the profile's directory.
fn images() -> Result<Vec<PathBuf>> {
    let own = std::env::current_exe().context("own path")?;
    let dir = own.ancestors().nth(2).context("target directory")?.join("test-images");
    let mut images: Vec<_> = std::fs::read_dir(&dir)
        .with_context(|| format!("{}: `cargo xtask test kubernetes` makes them", dir.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "tar"))
        .collect();
    images.sort();
    ensure!(!images.is_empty(), "{} holds no image", dir.display());
    Ok(images)
}
