//! A cluster with a real API server, real controllers and real agents, and neither kubelet nor container runtime: nodes
//! and pods are the bed's, and what kubelets would write about them is written here. Weft is installed by what `weft
//! install` prints, and each of its programs runs with the token that a kubelet would have got for its pod.
//!
//! A pod's first process lives in a cgroup with the pod's UID in its name, as a runtime's does: by that an agent finds
//! the pod's network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::api::Api;
use super::cgroup::NodeCgroups;
use super::control_plane::ControlPlane;
use super::pki::token_kubeconfig;
use super::programs;
use crate::agent::{self, Agent};
use crate::bed::Bed;
use crate::binaries::binary;
use crate::capture::Capture;
use crate::control::{Controller, Source};
use crate::place::Place;
use crate::pod::Pod;
use crate::poll::pause;
use crate::process::{Process, run_ok};
use crate::relay::Relay;
use crate::topology::{Node, Topology};

/// The namespace that Weft is installed in.
pub const SYSTEM: &str = "weft-system";
const INSTALL: Duration = Duration::from_secs(10);
const CGROUPS_END: Duration = Duration::from_secs(5);
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A running cluster. Dropping it ends its processes; the bed's end removes the rest.
#[derive(Debug)]
pub struct ApiCluster {
    // In the order in which they end.
    agents: BTreeMap<String, Agent>,
    controllers: Vec<Controller>,
    /// Each controller's way to the API server.
    doors: Vec<Relay>,
    sandboxes: Mutex<BTreeMap<String, Process>>,
    namespaces: Mutex<BTreeSet<String>>,
    api: Api,
    plane: ControlPlane,
    manifests: String,
    root: PathBuf,
    cgroups: NodeCgroups,
    topology: Topology,
}

impl Drop for ApiCluster {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        // Programs that log from a thread of their own get their last lines out, for the case that this one failed.
        pause(LAST_WORDS);
        for agent in self.agents.values() {
            let _ = agent.kill();
            crate::isolate::unmount(&agent.bpffs());
        }
        self.sandboxes().clear();
        self.cgroups.remove(CGROUPS_END);
    }
}

impl ApiCluster {
    /// Starts the API server, installs Weft, and writes down nodes and Weft's own pods. Neither controllers nor agents
    /// run yet.
    pub fn start(name: &str, nodes: &[&str], replicas: u8) -> Result<ApiCluster> {
        Self::start_with(name, nodes, replicas, &[])
    }

    /// As `start`, with flags for the API server.
    pub fn start_with(name: &str, nodes: &[&str], replicas: u8, api_flags: &[&str]) -> Result<ApiCluster> {
        let programs = programs()?;
        let bed = Bed::new(name)?;
        let names: Vec<_> = nodes.iter().map(|node| (*node).to_owned()).collect();
        let topology = Topology::create(&bed, &names)?;
        let machine = topology.add_machine("api", 3)?;
        let mut flags = Api::audit_flags(&machine)?;
        flags.extend(api_flags.iter().map(|flag| (*flag).to_owned()));
        let plane = ControlPlane::start_storage(&machine, &programs, flags)?;
        let api = Api::start(&machine, &plane)?;

        let manifests = install_manifests(&topology.control)?;
        plane.feed(&["apply", "--filename=-"], &manifests)?;
        let control_template = pod_template(&manifests, "Deployment")?;

        for node in topology.nodes() {
            api.apply(&node_object(node))?;
        }
        let (mut controllers, mut doors) = (Vec::new(), Vec::new());
        for number in 1..=replicas {
            let place = match number {
                1 => topology.control.clone(),
                _ => topology.add_machine(&format!("control-{number}"), 3 + number)?,
            };
            let door = Relay::start(place.netns(), plane.address())?;
            let pod = format!("weft-control-{number}");
            api.apply(&from_template(&control_template, &pod, nodes.first().context("no node")?))?;
            let mut environment = environment(&control_template);
            let kubeconfig = admit(&api, &plane, &place, &door, &pod)?;
            environment.push(("KUBECONFIG".to_owned(), kubeconfig.display().to_string()));
            controllers.push(Controller::new(place, Source::Cluster(environment)));
            doors.push(door);
        }
        let addresses: Vec<SocketAddr> = controllers.iter().map(Controller::address).collect();
        let root = topology.control.dir().join("root.pem");
        let mut agents = BTreeMap::new();
        for node in topology.nodes() {
            let relay = Relay::start_spread(node.netns(), &addresses)?;
            let agent = Agent::new(&bed, &node.place, relay, root.clone(), Vec::new());
            crate::isolate::mount_bpffs(&agent.bpffs())?;
            agents.insert(node.name().to_owned(), agent);
        }
        let cluster = ApiCluster {
            agents,
            controllers,
            doors,
            sandboxes: Mutex::default(),
            namespaces: Mutex::default(),
            api,
            plane,
            manifests,
            root,
            cgroups: NodeCgroups::unified(name)?,
            topology,
        };
        for node in nodes {
            cluster.agent_pod(&agent_pod_name(node), node)?;
        }
        Ok(cluster)
    }

    /// Starts every controller and waits until all are ready.
    pub fn start_controllers(&self) -> Result<()> {
        for controller in &self.controllers {
            controller.start_unready()?;
        }
        self.wait_controllers()
    }

    /// Waits until every controller is ready; leaves the root's certificate where agents look for it, as a kubelet does.
    pub fn wait_controllers(&self) -> Result<()> {
        for controller in &self.controllers {
            controller.wait_ready()?;
        }
        let map = self.api.get(&format!("/api/v1/namespaces/{SYSTEM}/configmaps/weft-root"))?;
        std::fs::write(&self.root, map["data"]["root.pem"].as_str().context("root.pem")?)?;
        Ok(())
    }

    /// Starts an agent on every node, with its pod's token, and waits until all are ready.
    pub fn start_agents(&self) -> Result<()> {
        for (node, agent) in &self.agents {
            std::fs::write(agent.token_file(), self.agent_token(node)?)?;
            agent.start_unready()?;
        }
        self.agents.values().try_for_each(Agent::wait_ready)
    }

    /// The API server's objects.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// The API server and etcd as processes.
    pub fn control_plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// The controllers.
    pub fn controllers(&self) -> &[Controller] {
        &self.controllers
    }

    /// The way of a controller, by its number from 0, to the API server.
    pub fn door(&self, controller: usize) -> Result<&Relay> {
        self.doors.get(controller).context("no such controller")
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents.get(node).with_context(|| format!("there is no node {node}"))
    }

    /// Every agent.
    pub fn agents(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values()
    }

    /// Ends the connections between the agent of `node` and the controllers; it may connect again.
    pub fn cut(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.cut();
        Ok(())
    }

    /// Holds what the agent of `node` and the controllers send each other, until [`ApiCluster::release`].
    pub fn hold(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.hold();
        Ok(())
    }

    /// Lets everything flow that was held.
    pub fn release(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.release();
        Ok(())
    }

    /// From now on every agent connects to the first controller as long as that answers.
    pub fn prefer_first_controller(&self) {
        self.agents.values().for_each(|agent| agent.relay.prefer_first());
    }

    /// Starts recording the wire between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        self.topology.capture()
    }

    /// The root's certificate, as agents have it.
    pub fn root(&self) -> Result<Vec<u8>> {
        std::fs::read(&self.root).context("the root's certificate")
    }

    /// What `weft install` printed.
    pub fn manifests(&self) -> &str {
        &self.manifests
    }

    /// The token of the agent's pod of a node, as a kubelet asks for it.
    pub fn agent_token(&self, node: &str) -> Result<String> {
        self.api.token(SYSTEM, "weft-agent", "weft", Some(("Pod", &agent_pod_name(node))))
    }

    /// Writes down an agent's pod, as the DaemonSet's controller and a kubelet would.
    pub fn agent_pod(&self, name: &str, node: &str) -> Result<Value> {
        self.api.apply(&from_template(&pod_template(&self.manifests, "DaemonSet")?, name, node))
    }

    /// The machine of a node.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.topology.node(name)
    }

    /// kubectl as whoever holds `token`, not yet started.
    pub fn kubectl_as(&self, token: &str, args: &[&str]) -> Result<Command> {
        let dir = self.topology.control.dir();
        let (token_file, kubeconfig) = (dir.join("caller.token"), dir.join("caller.kubeconfig"));
        std::fs::write(&token_file, token)?;
        let server = format!("https://{}", self.plane.address());
        token_kubeconfig(&kubeconfig, &server, &self.plane.pki_file("ca.crt"), &token_file)?;
        let mut command = self.topology.control.command(&self.plane.program_path("kubectl"), args);
        command.env("KUBECONFIG", kubeconfig).env("HOME", dir);
        Ok(command)
    }

    /// Writes down a namespace with its labels, and the service account `default`.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: BTreeMap<_, _> = labels.iter().copied().collect();
        let metadata = json!({"name": name, "labels": labels});
        self.api.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}))?;
        self.namespaces().insert(name.to_owned());
        self.account(name, "default")
    }

    /// Writes down a service account.
    pub fn account(&self, namespace: &str, name: &str) -> Result<()> {
        let metadata = json!({"name": name, "namespace": namespace});
        self.api.apply(&json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})).map(drop)
    }

    /// Adds a running pod `NAMESPACE/NAME` on `node`, and its namespace if that is new.
    pub fn pod(&self, name: &str, node: &str) -> Result<Pod> {
        let (namespace, pod_name) = name.split_once('/').context("NAMESPACE/NAME")?;
        if !self.namespaces().contains(namespace) {
            self.namespace(namespace, &[])?;
        }
        let pod = Pod {
            place: self.topology.add_pod(node, name)?,
            namespace: namespace.to_owned(),
            name: pod_name.to_owned(),
            node: node.to_owned(),
            service_account: "default".to_owned(),
        };
        // As in life: the object, then the sandbox, and the addresses once that is there.
        let mut object = pod_object(&pod);
        let status = object["status"].take();
        let uid = self.api.apply(&object)?["metadata"]["uid"].as_str().context("uid")?.to_owned();
        let mut sandbox = pod.command("sleep", ["infinity"]);
        self.cgroups.pod(&uid)?.enter_before(&mut sandbox);
        let sandbox = pod.start_command("sandbox", sandbox)?;
        self.sandboxes().insert(name.to_owned(), sandbox);
        object["status"] = status;
        self.api.apply(&object)?;
        Ok(pod)
    }

    /// Ends a pod, and its object at once.
    pub fn delete_pod(&self, pod: &Pod) -> Result<()> {
        drop(self.sandboxes().remove(pod.place.name()));
        self.api.delete(&pod_object(pod))
    }

    /// Waits until every agent knows each of `pods` as enrolled, and their own agents have let them go.
    pub fn wait_enrolled(&self, pods: &[&Pod]) -> Result<()> {
        agent::wait_enrolled(&self.agents.values().collect::<Vec<_>>(), pods)
    }

    fn sandboxes(&self) -> MutexGuard<'_, BTreeMap<String, Process>> {
        self.sandboxes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn namespaces(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.namespaces.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A controller's token and its kubeconfig; returns where that is.
fn admit(api: &Api, plane: &ControlPlane, place: &Place, door: &Relay, pod: &str) -> Result<PathBuf> {
    let (token, kubeconfig) = (place.dir().join("token"), place.dir().join("kubeconfig"));
    std::fs::write(&token, api.token(SYSTEM, "weft-control", "", Some(("Pod", pod)))?)?;
    let server = format!("https://{}", door.address());
    token_kubeconfig(&kubeconfig, &server, &plane.pki_file("ca.crt"), &token)?;
    Ok(kubeconfig)
}

/// Name of the agent's pod of a node.
pub fn agent_pod_name(node: &str) -> String {
    format!("weft-agent-{node}")
}

/// What `weft install` prints.
fn install_manifests(place: &Place) -> Result<String> {
    let output = run_ok(place.command(&binary("weft")?, ["install"]), INSTALL)?;
    Ok(String::from_utf8(output)?)
}

/// The documents of several in one text.
pub fn documents(yaml: &str) -> Result<Vec<Value>> {
    yaml.split("\n---\n").map(|document| Ok(serde_yaml_ng::from_str(document)?)).collect()
}

/// The template of the pods of the one object of that kind.
fn pod_template(manifests: &str, kind: &str) -> Result<Value> {
    let object = documents(manifests)?.into_iter().find(|object| object["kind"] == kind);
    Ok(object.with_context(|| format!("weft install prints no {kind}"))?["spec"]["template"].take())
}

/// A running pod of a template. Weft's pods are on the node's network, or none that anything here asks for.
fn from_template(template: &Value, name: &str, node: &str) -> Value {
    let mut spec = template["spec"].clone();
    spec["nodeName"] = node.into();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": SYSTEM, "labels": template["metadata"]["labels"]},
        "spec": spec,
        "status": {"phase": "Running"},
    })
}

/// The environment of a template's one container.
fn environment(template: &Value) -> Vec<(String, String)> {
    let variables = template["spec"]["containers"][0]["env"].as_array().cloned().unwrap_or_default();
    let value = |variable: &Value| match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
        Some("metadata.namespace") => SYSTEM.to_owned(),
        _ => variable["value"].as_str().unwrap_or_default().to_owned(),
    };
    let name = |variable: &Value| variable["name"].as_str().unwrap_or_default().to_owned();
    variables.iter().map(|variable| (name(variable), value(variable))).collect()
}

fn node_object(node: &Node) -> Value {
    let ranges = node.pod_ranges();
    let addresses: Vec<_> =
        node.addresses().iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node.name(), "labels": {"kubernetes.io/os": "linux"}},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": addresses},
    })
}

fn pod_object(pod: &Pod) -> Value {
    running_pod(pod.place.name(), &pod.node, &pod.service_account, &pod.addresses())
}

/// The object of a pod `NAMESPACE/NAME` that runs and is ready.
pub fn running_pod(name: &str, node: &str, account: &str, addresses: &[IpAddr]) -> Value {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let ips: Vec<_> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "serviceAccountName": account,
            "containers": [{"name": "main", "image": "none"}],
        },
        "status": {
            "phase": "Running",
            "podIP": addresses.first(),
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}
