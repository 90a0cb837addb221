//! A cluster: nodes, pods, the controller, the agents, and the directory that stands for the API server.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::agent::{Agent, ENROLL_TIMEOUT, wait_enrolled};
use crate::bed::Bed;
use crate::capture::Capture;
use crate::control::{Controller, Source};
use crate::manifest::{Directory, Endpoint, Frontends, Labels, MESH_LABEL, PodManifest, ServiceManifest};
use crate::place::Place;
use crate::pod::{Pod, Service};
use crate::poll::until;
use crate::relay::Relay;
use crate::topology::{Node, Topology};

const LAST_WORDS: Duration = Duration::from_millis(100);

/// Describes a cluster before it starts.
#[derive(Clone, Debug)]
pub struct Builder {
    name: String,
    nodes: Vec<String>,
    agent_flags: Vec<String>,
    control_flags: Vec<String>,
}

impl Builder {
    /// The name that it will have.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a node.
    pub fn node(mut self, name: &str) -> Builder {
        self.nodes.push(name.to_owned());
        self
    }

    /// Adds a flag for every agent.
    pub fn agent_flag(mut self, flag: &str) -> Builder {
        self.agent_flags.push(flag.to_owned());
        self
    }

    /// Adds a flag for the controller.
    pub fn control_flag(mut self, flag: &str) -> Builder {
        self.control_flags.push(flag.to_owned());
        self
    }

    /// Starts everything: network, controller, an agent on every node.
    pub fn start(self) -> Result<Cluster> {
        let cluster = self.start_without_agents()?;
        for agent in cluster.agents.values() {
            agent.start_unready()?;
        }
        for agent in cluster.agents.values() {
            agent.wait_ready()?;
        }
        Ok(cluster)
    }

    /// Network and controller; agents are started by name later.
    pub fn start_without_agents(self) -> Result<Cluster> {
        let cluster = self.start_plain()?;
        cluster.controller.start()?;
        for agent in cluster.agents.values() {
            std::fs::write(agent.token_file(), cluster.controller.token(agent.node())?)?;
        }
        // As somebody does who sets up a host: once.
        std::fs::copy(cluster.controller.state_dir().join("root.pem"), control_ca(&cluster.topology))?;
        Ok(cluster)
    }

    /// The network alone.
    pub fn start_plain(self) -> Result<Cluster> {
        let bed = Bed::new(&self.name)?;
        let topology = Topology::create(&bed, &self.nodes)?;
        let directory = Directory::create(bed.subdir("manifests")?, bed.subdir("manifests.new")?)?;
        // A directory without any manifest may be one that lost them: there is always this Namespace.
        directory.namespace("default", &Labels::new())?;
        let controller = Controller::new(
            topology.control.clone(),
            Source::Directory(directory.clone(), self.control_flags),
        );
        let mut agents = BTreeMap::new();
        for node in topology.nodes() {
            let relay = Relay::start(node.netns(), controller.address())?;
            let root = control_ca(&topology);
            let agent = Agent::new(&bed, &node.place, relay, root, self.agent_flags.clone());
            crate::isolate::mount_bpffs(&agent.bpffs())?;
            agents.insert(node.name().to_owned(), agent);
        }
        Ok(Cluster { agents, controller, bed, topology, directory, objects: Mutex::default() })
    }
}

/// By what agents know the controller.
fn control_ca(topology: &Topology) -> PathBuf {
    topology.control.dir().join("control-ca.pem")
}

/// A running cluster. Dropping it ends its processes; the bed's end removes the rest.
#[derive(Debug)]
pub struct Cluster {
    // First, so that agents end before the controller, and both before their network.
    agents: BTreeMap<String, Agent>,
    controller: Controller,
    topology: Topology,
    bed: Bed,
    directory: Directory,
    objects: Mutex<Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    namespaces: BTreeMap<String, Labels>,
    pods: BTreeMap<String, PodManifest>,
    services: u8,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        // Programs that log from a thread of their own get their last lines out, for the case that this one failed.
        crate::poll::pause(LAST_WORDS);
        for agent in self.agents.values() {
            let _ = agent.kill();
            // The pins, and with them the programs at the root of all cgroups, which takes 64 of a kind at most.
            crate::isolate::unmount(&agent.bpffs());
        }
    }
}

impl Cluster {
    /// Begins the description of a cluster. The name must be new in this bed.
    #[expect(clippy::new_ret_no_self, reason = "reads as what it is: Cluster::new(name).node(..).start()")]
    pub fn new(name: &str) -> Builder {
        Builder {
            name: name.to_owned(),
            nodes: Vec::new(),
            agent_flags: Vec::new(),
            control_flags: Vec::new(),
        }
    }

    /// The run directory and its logs.
    pub fn bed(&self) -> &Bed {
        &self.bed
    }

    /// The manifests.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The controller.
    pub fn controller(&self) -> &Controller {
        &self.controller
    }

    /// The agent of a node.
    pub fn agent(&self, node: &str) -> Result<&Agent> {
        self.agents.get(node).with_context(|| format!("there is no node {node}"))
    }

    /// Every agent.
    pub fn agents(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values()
    }

    /// A node.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.topology.node(name)
    }

    /// Adds a running pod `NAMESPACE/NAME` on `node`, with the service account `default`, and its Namespace.
    pub fn pod(&self, name: &str, node: &str) -> Result<Pod> {
        self.pod_as(name, node, "default")
    }

    /// As `pod`, with a service account.
    pub fn pod_as(&self, name: &str, node: &str, service_account: &str) -> Result<Pod> {
        let pod = self.pod_unannounced(name, node, service_account)?;
        self.announce(&pod)?;
        Ok(pod)
    }

    /// A pod that runs but has no manifest yet: `announce` writes it.
    pub fn pod_unannounced(&self, name: &str, node: &str, service_account: &str) -> Result<Pod> {
        let (namespace, pod) =
            name.split_once('/').with_context(|| format!("{name} is not NAMESPACE/NAME"))?;
        Ok(Pod {
            place: self.topology.add_pod(node, name)?,
            namespace: namespace.to_owned(),
            name: pod.to_owned(),
            node: node.to_owned(),
            service_account: service_account.to_owned(),
        })
    }

    /// Announces a pod `NAMESPACE/NAME` that has taken over the network namespace and the addresses of another one.
    pub fn adopt(&self, name: &str, predecessor: &Pod, service_account: &str) -> Result<Pod> {
        let (namespace, pod) =
            name.split_once('/').with_context(|| format!("{name} is not NAMESPACE/NAME"))?;
        let mut place = predecessor.place.clone();
        place.name = name.to_owned();
        let pod = Pod {
            place,
            namespace: namespace.to_owned(),
            name: pod.to_owned(),
            service_account: service_account.to_owned(),
            ..predecessor.clone()
        };
        self.announce(&pod)?;
        Ok(pod)
    }

    /// Writes the manifest of a pod, and of its Namespace if that is new.
    pub fn announce(&self, pod: &Pod) -> Result<()> {
        let mut objects = self.objects();
        if !objects.namespaces.contains_key(&pod.namespace) {
            self.directory.namespace(&pod.namespace, &Labels::new())?;
            objects.namespaces.insert(pod.namespace.clone(), Labels::new());
        }
        let manifest = PodManifest {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            node: pod.node.clone(),
            service_account: pod.service_account.clone(),
            netns: pod.netns.path(),
            addresses: pod.addresses(),
            labels: Labels::from([("app".to_owned(), pod.name.clone())]),
        };
        self.directory.pod(&manifest)?;
        objects.pods.insert(pod.place.name.clone(), manifest);
        Ok(())
    }

    /// Removes the manifest of a pod; its processes go on.
    pub fn forget(&self, pod: &Pod) -> Result<()> {
        self.objects().pods.remove(&pod.place.name);
        self.directory.remove(&Directory::pod_file(&pod.namespace, &pod.name))
    }

    /// Adds a Service in front of pods of one namespace.
    pub fn service(&self, name: &str, port: u16, target_port: u16, pods: &[&Pod]) -> Result<Service> {
        self.service_at(name, port, target_port, pods, Frontends::default())
    }

    /// As `service`, reached in other ways as well.
    pub fn service_at(
        &self,
        name: &str,
        port: u16,
        target_port: u16,
        pods: &[&Pod],
        frontends: Frontends,
    ) -> Result<Service> {
        let number = {
            let mut objects = self.objects();
            objects.services += 1;
            objects.services
        };
        let service = Service {
            v4: Ipv4Addr::new(10, 96, 0, number),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into()),
            port,
            target_port,
        };
        let ready: Vec<_> = pods.iter().map(|pod| (*pod, json!({"ready": true}))).collect();
        self.write_service(name, service, json!({}), &ready, frontends)?;
        Ok(service)
    }

    /// Writes a Service anew: with these fields in its spec, and these pods behind it, each with its conditions.
    pub fn change_service(
        &self,
        name: &str,
        service: Service,
        spec: Value,
        endpoints: &[(&Pod, Value)],
    ) -> Result<()> {
        self.write_service(name, service, spec, endpoints, Frontends::default())
    }

    fn write_service(
        &self,
        name: &str,
        service: Service,
        spec: Value,
        endpoints: &[(&Pod, Value)],
        frontends: Frontends,
    ) -> Result<()> {
        let (namespace, name) =
            name.split_once('/').with_context(|| format!("{name} is not NAMESPACE/NAME"))?;
        let endpoint = |(pod, conditions): &(&Pod, Value)| Endpoint {
            pod: pod.name.clone(),
            addresses: pod.addresses(),
            conditions: conditions.clone(),
        };
        self.directory.service(&ServiceManifest {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            v4: service.v4,
            v6: service.v6,
            port: service.port,
            target_port: service.target_port,
            spec,
            endpoints: endpoints.iter().map(endpoint).collect(),
            frontends,
        })
    }

    /// Adds a machine on the wire outside the mesh's ranges.
    pub fn outside(&self, name: &str) -> Result<Place> {
        self.topology.add_outside(name)
    }

    /// Labels a Namespace into the mesh, and waits for nothing.
    pub fn label_namespace(&self, name: &str) -> Result<()> {
        self.change_namespace(name, |labels| drop(labels.insert(MESH_LABEL.into(), "enabled".into())))
    }

    /// Takes the label from a Namespace, and waits for nothing.
    pub fn unlabel_namespace(&self, name: &str) -> Result<()> {
        self.change_namespace(name, |labels| drop(labels.remove(MESH_LABEL)))
    }

    /// Labels one pod into the mesh, and waits for nothing.
    pub fn label_pod(&self, pod: &Pod) -> Result<()> {
        self.change_pod(pod, |labels| drop(labels.insert(MESH_LABEL.into(), "enabled".into())))
    }

    /// Takes the label from one pod, and waits for nothing.
    pub fn unlabel_pod(&self, pod: &Pod) -> Result<()> {
        self.change_pod(pod, |labels| drop(labels.remove(MESH_LABEL)))
    }

    /// Labels the Namespace and waits until every agent knows each of `pods` to be reachable by tunnel only.
    pub fn enroll(&self, namespace: &str, pods: &[&Pod]) -> Result<()> {
        self.label_namespace(namespace)?;
        self.wait_enrolled(pods)
    }

    /// Waits until every running agent knows each of `pods` as enrolled, and their own agents have let them go.
    pub fn wait_enrolled(&self, pods: &[&Pod]) -> Result<()> {
        let mut agents = Vec::new();
        for agent in self.agents.values() {
            if agent.running()? {
                agents.push(agent);
            }
        }
        ensure!(!agents.is_empty(), "no agent runs, so nothing will be enrolled");
        wait_enrolled(&agents, pods)
    }

    /// Waits until every running agent knows each of `pods`, as being outside the mesh.
    pub fn wait_outside(&self, pods: &[&Pod]) -> Result<()> {
        for pod in pods {
            until(ENROLL_TIMEOUT, &format!("{} is known to be outside the mesh", pod.name()), || {
                for agent in self.agents.values() {
                    if agent.running()? && !agent.knows_as_outside(&pod.uid())? {
                        return Ok(false);
                    }
                }
                Ok(true)
            })?;
        }
        Ok(())
    }

    /// Starts recording the wire between the nodes.
    pub fn capture(&self) -> Result<Capture> {
        self.topology.capture()
    }

    /// Holds the connection between the agent of `node` and the controller, both ways.
    pub fn hold(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.hold();
        Ok(())
    }

    /// Holds what the agent of `node` tells the controller; it still hears.
    pub fn hold_reports(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.hold_reports();
        Ok(())
    }

    /// Lets the agent of `node` and the controller talk again.
    pub fn release(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.release();
        Ok(())
    }

    /// Ends the connections between the agent of `node` and the controller; it may connect again.
    pub fn cut(&self, node: &str) -> Result<()> {
        self.agent(node)?.relay.cut();
        Ok(())
    }

    fn change_namespace(&self, name: &str, change: impl FnOnce(&mut Labels)) -> Result<()> {
        let mut objects = self.objects();
        let labels = objects.namespaces.entry(name.to_owned()).or_default();
        change(labels);
        self.directory.namespace(name, labels)
    }

    fn change_pod(&self, pod: &Pod, change: impl FnOnce(&mut Labels)) -> Result<()> {
        let mut objects = self.objects();
        let manifest =
            objects.pods.get_mut(pod.name()).with_context(|| format!("{} is not announced", pod.name()))?;
        change(&mut manifest.labels);
        self.directory.pod(manifest)
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Addresses of several places, for judging a capture.
pub fn addresses(places: &[&Place]) -> Vec<IpAddr> {
    places.iter().flat_map(|place| place.addresses()).collect()
}
