//! Which addresses are captured: what the settings say, and what a cluster says of itself in its Nodes and ServiceCIDRs.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use weft_proto::node as wire;

use super::{MeshSettings, octets};
use crate::store::Store;

/// The settings with the ranges that `store` adds: those of pods are where its Nodes' pods live, those of Services what
/// its ServiceCIDRs say.
pub(super) fn effective(store: &Store, settings: &MeshSettings) -> MeshSettings {
    let pods = store.nodes.values().flat_map(|node| node.pod_networks());
    let services = store.service_cidrs.values().flat_map(|cidr| cidr.spec.cidrs.iter().copied());
    MeshSettings {
        pod_networks: with(&settings.pod_networks, pods.collect()),
        service_networks: with(&settings.service_networks, services.collect()),
        ..settings.clone()
    }
}

/// The Node of that name, as agents hear of it: its own addresses are captured only at some ports. A kubelet says itself
/// what they are; one that names a pod's or a Service's takes nothing from these, since agents see to them first.
pub(super) fn node(store: &Store, name: &str) -> Option<wire::Node> {
    let addresses: BTreeSet<IpAddr> = store.nodes.get(name)?.addresses().collect();
    Some(wire::Node { addresses: addresses.into_iter().map(octets).collect() })
}

/// What is configured stays as it was written; what is added is merged into as few ranges as possible.
fn with(configured: &[IpNet], mut added: Vec<IpNet>) -> Vec<IpNet> {
    added.retain(|network| !configured.iter().any(|known| known.contains(network)));
    if added.is_empty() {
        return configured.to_vec();
    }
    let mut networks = configured.to_vec();
    networks.extend(IpNet::aggregate(&added));
    networks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        source::Delta,
        translate::tests::{objects, settings},
    };

    fn store(text: &str) -> Store {
        let mut store = Store::default();
        store.apply(Delta { upserts: objects(text), deletes: Vec::new() });
        store
    }

    fn networks(text: &str, settings: &MeshSettings) -> [Vec<String>; 2] {
        let effective = effective(&store(text), settings);
        [effective.pod_networks, effective.service_networks]
            .map(|networks| networks.iter().map(IpNet::to_string).collect())
    }

    fn node(name: &str, pods: &str, address: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: {pods}, podCIDRs: [{pods}]}}\n\
             status: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n"
        )
    }

    const CIDR: &str = "---\napiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: kubernetes}\n\
        spec: {cidrs: [10.96.0.0/16, 'fd01::/112']}\n";

    #[test]
    fn a_cluster_says_where_its_pods_and_services_are() {
        let bare = MeshSettings { pod_networks: Vec::new(), service_networks: Vec::new(), ..settings() };
        let text = [
            node("n1", "10.244.0.0/24", "192.0.2.1"),
            node("n2", "10.244.1.0/24", "192.0.2.2"),
            node("n3", "10.244.4.0/24", "192.0.2.9"),
            CIDR.to_owned(),
        ];
        let [pods, services] = networks(&text.concat(), &bare);
        assert_eq!(pods, ["10.244.0.0/23", "10.244.4.0/24"]);
        assert_eq!(services, ["10.96.0.0/16", "fd01::/112"]);
        assert_eq!(networks("", &bare), [const { Vec::<String>::new() }; 2]);
    }

    #[test]
    fn settings_come_first_and_are_not_repeated() {
        let text = [node("n1", "10.1.7.0/24", "192.0.2.1"), node("n2", "10.9.0.0/24", "192.0.2.2")];
        let [pods, services] = networks(&text.concat(), &settings());
        assert_eq!(pods, ["10.1.0.0/16", "fd00::/16", "10.9.0.0/24"]);
        assert_eq!(services, ["10.2.0.0/16"]);
    }

    #[test]
    fn a_nodes_own_addresses() {
        let store = store(&node(
            "n1",
            "10.1.0.0/24",
            "192.0.2.1}, {type: ExternalIP, address: '2001:db8::1'}, {type: Hostname, address: 192.0.2.9",
        ));
        let found = super::node(&store, "n1").unwrap();
        let [v4, v6] = ["192.0.2.1", "2001:db8::1"].map(|ip| octets(ip.parse().unwrap()));
        assert_eq!(found.addresses, [v4, v6]);
        assert_eq!(super::node(&store, "n2"), None);
    }
}
