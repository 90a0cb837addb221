//! How a cluster is wired: a bridge that is the wire, nodes on it that route, pods behind each node, and machines outside
//! the mesh. Addresses repeat from cluster to cluster: every cluster is a set of network namespaces of its own.
//!
//! ```text
//! pod eth0 --- cni0 (node) eth0 --- wire0 --- eth0 (node) cni0 --- eth0 pod
//!                                     |  \
//!                                controller outside hosts
//! ```

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, Result, ensure};

use crate::bed::Bed;
use crate::capture::Capture;
use crate::netns::Netns;
use crate::place::Place;

/// Interface index of the bridge in the wire's namespace, fixed so that a capture can tell it from its ports.
pub(crate) const BRIDGE_INDEX: i32 = 1000;

/// Hardware address of every node's bridge. Without one of its own a bridge takes the lowest of its ports', so that a new
/// pod could change it, and the other pods' packets would go to the old one for many seconds.
const GATEWAY: &str = "02:00:00:00:00:01";

/// The ranges that the controller is told.
pub const POD_NETWORKS: [&str; 2] = ["10.42.0.0/16", "fd00:10:42::/48"];
/// The ranges of cluster addresses.
pub const SERVICE_NETWORKS: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];

/// A node: routes between the wire and its pods.
#[derive(Debug)]
pub struct Node {
    pub(crate) place: Place,
    index: u8,
    pods: AtomicU8,
}

impl std::ops::Deref for Node {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Node {
    /// The ranges of its pods' addresses.
    pub fn pod_ranges(&self) -> [String; 2] {
        [format!("10.42.{}.0/24", self.index), format!("fd00:10:42:{}::/64", self.index)]
    }
}

/// The network of one cluster.
#[derive(Debug)]
pub struct Topology {
    bed: Bed,
    wire: Netns,
    nodes: Vec<Node>,
    /// The machine that the controller runs on.
    pub(crate) control: Place,
    outside: Mutex<u8>,
}

impl Topology {
    /// Makes the wire, the nodes and the controller's machine.
    pub fn create(bed: &Bed, node_names: &[String]) -> Result<Topology> {
        ensure!(node_names.len() < 100, "a cluster has fewer than 100 nodes");
        let wire = Netns::create(&bed.netns_name("wire"))?;
        wire.ip(&format!("link add wire0 index {BRIDGE_INDEX} type bridge\nlink set wire0 up"))?;
        let control = attach(bed, &wire, "control", 2)?;
        let mut nodes = Vec::new();
        for (index, name) in (1u8..).zip(node_names) {
            let place = attach(bed, &wire, name, 10 + index)?;
            place.netns.sysctl("ipv4/ip_forward", "1")?;
            place.netns.sysctl("ipv6/conf/all/forwarding", "1")?;
            place.netns.ip(&format!(
                "link add cni0 address {GATEWAY} type bridge\nlink set cni0 up\n\
                 addr add 10.42.{index}.1/24 dev cni0\naddr add fd00:10:42:{index}::1/64 dev cni0 nodad"
            ))?;
            nodes.push(Node { place, index, pods: AtomicU8::new(0) });
        }
        let topology = Topology { bed: bed.clone(), wire, nodes, control, outside: Mutex::new(0) };
        for node in &topology.nodes {
            topology.route_to_pods(&node.place, Some(node.index))?;
        }
        topology.route_to_pods(&topology.control, None)?;
        Ok(topology)
    }

    /// The nodes, in the order given.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).with_context(|| format!("there is no node {name}"))
    }

    /// Makes a network namespace for a pod behind `node`: `eth0` with both address families, default routes by the node.
    pub(crate) fn add_pod(&self, node: &str, name: &str) -> Result<Place> {
        let node = self.node(node)?;
        let number = node.pods.fetch_add(1, Ordering::SeqCst) + 1;
        ensure!(number < 200, "a node has fewer than 200 pods");
        let host = number + 9;
        let index = node.index;
        let place = Place {
            name: name.to_owned(),
            netns: Netns::create(&self.bed.netns_name(&name.replace('/', ".")))?,
            dir: self.bed.subdir(name)?,
            v4: Ipv4Addr::new(10, 42, index, host),
            v6: Ipv6Addr::new(0xfd00, 0x10, 0x42, index.into(), 0, 0, 0, host.into()),
        };
        node.netns.ip(&format!(
            "link add pod{number} type veth peer name eth0 netns {}\nlink set pod{number} master cni0 up",
            place.netns.name()
        ))?;
        place.netns.ip(&format!(
            "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n\
             route add default via 10.42.{index}.1\nroute add default via fd00:10:42:{index}::1",
            place.v4, place.v6
        ))?;
        Ok(place)
    }

    /// Makes a machine on the wire that is no part of the mesh's ranges, and can reach pods.
    pub(crate) fn add_outside(&self, name: &str) -> Result<Place> {
        let mut count = self.outside.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *count += 1;
        let place = attach(&self.bed, &self.wire, name, 199 + *count)?;
        self.route_to_pods(&place, None)?;
        Ok(place)
    }

    /// Makes a machine on the wire, at the host number given.
    pub(crate) fn add_machine(&self, name: &str, host: u8) -> Result<Place> {
        attach(&self.bed, &self.wire, name, host)
    }

    /// Starts recording the wire.
    pub fn capture(&self) -> Result<Capture> {
        Capture::start(&self.wire)
    }

    fn route_to_pods(&self, from: &Place, own: Option<u8>) -> Result<()> {
        let mut batch = String::new();
        for node in self.nodes.iter().filter(|node| Some(node.index) != own) {
            let [v4, v6] = node.pod_ranges();
            batch.push_str(&format!("route add {v4} via {}\nroute add {v6} via {}\n", node.v4, node.v6));
        }
        from.netns.ip(&batch)
    }
}

/// Makes a machine with `eth0` on the wire.
fn attach(bed: &Bed, wire: &Netns, name: &str, host: u8) -> Result<Place> {
    let place = Place {
        name: name.to_owned(),
        netns: Netns::create(&bed.netns_name(name))?,
        dir: bed.subdir(name)?,
        v4: Ipv4Addr::new(172, 31, 0, host),
        v6: Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, host.into()),
    };
    wire.ip(&format!(
        "link add port{host} type veth peer name eth0 netns {}\nlink set port{host} master wire0 up",
        place.netns.name()
    ))?;
    place.netns.ip(&format!(
        "link set eth0 up\naddr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad",
        place.v4, place.v6
    ))?;
    Ok(place)
}
