//! Which addresses are captured: what the settings say, and what a cluster says of itself in its Nodes and ServiceCIDRs.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;

use super::MeshSettings;
use crate::store::Store;

/// The settings with the ranges that `store` adds. Those of pods are where its Nodes' pods live, those of Services what
/// its ServiceCIDRs say, and a Node's own addresses are never captured.
pub(super) fn effective(store: &Store, settings: &MeshSettings) -> MeshSettings {
    let pods = store.nodes.values().flat_map(|node| node.pod_networks());
    let services = store.service_cidrs.values().flat_map(|cidr| cidr.spec.cidrs.iter().copied());
    MeshSettings {
        pod_networks: with(&settings.pod_networks, pods.collect()),
        service_networks: with(&settings.service_networks, services.collect()),
        external_networks: with(&settings.external_networks, node_addresses(store)),
        ..settings.clone()
    }
}

/// A kubelet says itself what its node's addresses are. One that names a pod's or a Service's must not be able to make
/// the mesh send there in the clear, so those are left out.
fn node_addresses(store: &Store) -> Vec<IpNet> {
    let indexes = &store.indexes;
    let taken =
        |ip: &IpAddr| indexes.pods_by_address.contains(ip) || indexes.services_by_address.contains(ip);
    let addresses: BTreeSet<&IpAddr> = indexes.nodes_by_address.keys().collect();
    addresses.into_iter().filter(|address| !taken(address)).map(|address| IpNet::from(*address)).collect()
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

    fn networks(text: &str, settings: &MeshSettings) -> [Vec<String>; 3] {
        let mut store = Store::default();
        store.apply(Delta { upserts: objects(text), deletes: Vec::new() });
        let effective = effective(&store, settings);
        [effective.pod_networks, effective.service_networks, effective.external_networks]
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
        let [pods, services, external] = networks(&text.concat(), &bare);
        assert_eq!(pods, ["10.244.0.0/23", "10.244.4.0/24"]);
        assert_eq!(services, ["10.96.0.0/16", "fd01::/112"]);
        assert_eq!(external, ["192.0.2.1/32", "192.0.2.2/32", "192.0.2.9/32"]);
        assert_eq!(networks("", &bare), [const { Vec::<String>::new() }; 3]);
    }

    #[test]
    fn settings_come_first_and_are_not_repeated() {
        let text = [node("n1", "10.1.7.0/24", "192.0.2.1"), node("n2", "10.9.0.0/24", "192.0.2.2")];
        let [pods, services, _] = networks(&text.concat(), &settings());
        assert_eq!(pods, ["10.1.0.0/16", "fd00::/16", "10.9.0.0/24"]);
        assert_eq!(services, ["10.2.0.0/16"]);
    }

    #[test]
    fn a_node_cannot_take_a_pod_or_a_service_out_of_the_mesh() {
        let pod = |name: &str, ip: &str, host: bool| {
            format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\n\
                 spec: {{hostNetwork: {host}}}\nstatus: {{podIP: {ip}}}\n"
            )
        };
        let service =
            "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.2.0.1}\n";
        let text = [
            node("n1", "10.1.0.0/24", "10.1.5.5"),
            node("n2", "10.1.1.0/24", "10.2.0.1"),
            node("n3", "10.1.2.0/24", "192.0.2.3"),
            pod("web", "10.1.5.5", false),
            pod("proxy", "192.0.2.3", true),
            service.to_owned(),
        ];
        let [_, _, external] = networks(&text.concat(), &settings());
        assert_eq!(external, ["192.0.2.3/32"]);
    }
}
