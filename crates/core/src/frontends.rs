//! Where Services take connections beside their cluster addresses: at a port of an external address, and at a port of
//! every node. Such an address may have other ports that are none of the mesh's business, so one is never a whole
//! address. Kept by [`crate::Mesh`], which knows what else is at an address.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use imbl::{HashMap, OrdMap, Vector};

use crate::{mesh::Target, workload::Service};

/// Services by external addresses and node ports, and the addresses of nodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Frontends {
    external: OrdMap<SocketAddr, Vector<Arc<Service>>>,
    node_ports: HashMap<u16, Vector<Arc<Service>>>,
    nodes: HashMap<Arc<str>, Arc<[IpAddr]>>,
    /// How many nodes say that it is theirs.
    node_addresses: HashMap<IpAddr, usize>,
}

impl Frontends {
    pub fn insert(&mut self, service: &Arc<Service>) {
        for at in service.external_ports() {
            self.external.entry(at).or_default().push_back(service.clone());
        }
        for port in &service.node_ports {
            self.node_ports.entry(port.node_port).or_default().push_back(service.clone());
        }
    }

    pub fn remove(&mut self, service: &Service) {
        for at in service.external_ports() {
            if let Some(claims) = self.external.get_mut(&at) {
                claims.retain(|s| s.key != service.key);
                if claims.is_empty() {
                    self.external.remove(&at);
                }
            }
        }
        for port in &service.node_ports {
            if let Some(claims) = self.node_ports.get_mut(&port.node_port) {
                claims.retain(|s| s.key != service.key);
                if claims.is_empty() {
                    self.node_ports.remove(&port.node_port);
                }
            }
        }
    }

    /// What is known of a node from now on; None if it is gone. What that may change is added to `touched`.
    pub fn set_node(
        &mut self,
        name: Arc<str>,
        addresses: Option<Vec<IpAddr>>,
        touched: &mut BTreeSet<Target>,
    ) {
        let addresses: Option<Arc<[IpAddr]>> = addresses.map(Arc::from);
        let new = addresses.iter().flat_map(|a| a.iter().copied()).collect::<BTreeSet<_>>();
        let old = match addresses {
            Some(addresses) => self.nodes.insert(name, addresses),
            None => self.nodes.remove(&name),
        };
        let old = old.iter().flat_map(|a| a.iter().copied()).collect::<BTreeSet<_>>();
        for ip in new.difference(&old) {
            *self.node_addresses.entry(*ip).or_default() += 1;
            touched.insert(Target::Address(*ip));
        }
        for ip in old.difference(&new) {
            match self.node_addresses.get(ip) {
                Some(count) if *count > 1 => drop(self.node_addresses.insert(*ip, count - 1)),
                _ => drop(self.node_addresses.remove(ip)),
            }
            touched.insert(Target::Address(*ip));
        }
    }

    pub fn nodes(&self) -> impl Iterator<Item = (&Arc<str>, &[IpAddr])> {
        self.nodes.iter().map(|(name, addresses)| (name, &**addresses))
    }

    pub fn node_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.node_addresses.keys().copied()
    }

    pub fn is_node(&self, ip: IpAddr) -> bool {
        self.node_addresses.contains_key(&ip)
    }

    /// Whether some Service has this external address.
    pub fn is_external(&self, ip: IpAddr) -> bool {
        self.external.range(SocketAddr::new(ip, 0)..=SocketAddr::new(ip, u16::MAX)).next().is_some()
    }

    /// Every Service that takes connections to this external address and port.
    pub fn external(&self, at: SocketAddr) -> impl Iterator<Item = &Arc<Service>> + Clone {
        self.external.get(&at).into_iter().flatten()
    }

    /// Every Service that has this node port.
    pub fn node_port(&self, port: u16) -> impl Iterator<Item = &Arc<Service>> + Clone {
        self.node_ports.get(&port).into_iter().flatten()
    }

    /// Who takes a connection to `to`, each with its own port that is meant. At a node's address an external address
    /// comes before a node port, as in kube-proxy.
    pub fn claims(&self, to: SocketAddr) -> Vec<(&Arc<Service>, u16)> {
        let external: Vec<_> = self.external(to).map(|service| (service, to.port())).collect();
        if !external.is_empty() || !self.is_node(to.ip()) {
            return external;
        }
        let ports = |service: &Service| service.service_port(to.port());
        self.node_port(to.port()).filter_map(|service| Some((service, ports(service)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        AddressKind, Mesh, Tunnel,
        mesh::tests::{address, at, ip, outer_service, workload},
    };

    fn nodes(mesh: &mut Mesh, nodes: &[(&str, &[&str])]) -> BTreeSet<Target> {
        mesh.apply_nodes(nodes.iter().map(|(name, addresses)| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|a| ip(a)).collect();
            ((*name).into(), (!addresses.is_empty()).then_some(addresses))
        }))
    }

    fn port(text: &str) -> Target {
        Target::Port(text.parse().expect("an address and a port"))
    }

    #[test]
    fn a_node_port_leads_to_its_service_at_every_node_and_only_there() {
        let mut mesh = Mesh::new("");
        let touched = nodes(&mut mesh, &[("n1", &["192.0.2.1", "2001:db8::1"]), ("n2", &["192.0.2.2"])]);
        assert_eq!(
            touched,
            BTreeSet::from([address("192.0.2.1"), address("192.0.2.2"), address("2001:db8::1")])
        );
        mesh.apply([outer_service("s", &["10.96.0.1"], 80, &[], Some(30080))], []);
        assert!(!mesh.is_meshed(Target::NodePort(30080)));
        assert_eq!(
            at(&mesh, "192.0.2.1:30080"),
            "outside",
            "nobody behind it is enrolled: it is left as it is"
        );
        let touched = mesh.apply([workload("a", &["10.0.0.1"], Tunnel::Hbone, &[("s", 80, 8080)])], []);
        assert!(touched.contains(&Target::NodePort(30080)));
        assert!(mesh.is_meshed(Target::NodePort(30080)) && !mesh.is_meshed(Target::NodePort(30081)));
        for (to, expected) in [
            ("192.0.2.1:30080", "s port 80"),
            ("[2001:db8::1]:30080", "s port 80"),
            ("192.0.2.2:30080", "s port 80"),
            ("192.0.2.2:80", "outside"),
            ("192.0.2.3:30080", "unknown"),
            ("10.0.0.1:30080", "a"),
            ("10.96.0.1:30080", "s port 30080"),
        ] {
            assert_eq!(at(&mesh, to), expected, "{to}");
        }
        assert_eq!(mesh.kind(ip("192.0.2.1")), AddressKind::Node);
        // A node that leaves takes its addresses along, unless another one has them too.
        nodes(&mut mesh, &[("n3", &["192.0.2.2"])]);
        assert_eq!(nodes(&mut mesh, &[("n2", &[])]), BTreeSet::from([address("192.0.2.2")]));
        assert_eq!(mesh.kind(ip("192.0.2.2")), AddressKind::Node);
        nodes(&mut mesh, &[("n3", &[])]);
        assert_eq!(mesh.kind(ip("192.0.2.2")), AddressKind::Unknown);
        mesh.apply([], ["s".into()]);
        assert_eq!(at(&mesh, "192.0.2.1:30080"), "outside");
    }

    #[test]
    fn services_share_an_external_address_by_port() {
        let mut mesh = Mesh::new("");
        mesh.apply(
            [
                outer_service("s", &["10.96.0.1"], 80, &["192.0.2.9"], None),
                outer_service("t", &["10.96.0.2"], 81, &["192.0.2.9"], None),
                outer_service("plain", &["10.96.0.3"], 82, &["192.0.2.9"], None),
                workload("a", &["10.0.0.1"], Tunnel::Hbone, &[("s", 80, 8080)]),
                workload("b", &["10.0.0.2"], Tunnel::Hbone, &[("t", 81, 8080)]),
                workload("c", &["10.0.0.3"], Tunnel::None, &[("plain", 82, 8080)]),
            ],
            [],
        );
        let ports = [
            (80, "s port 80", true),
            (81, "t port 81", true),
            (82, "outside", false),
            (22, "outside", false),
        ];
        for (number, expected, meshed) in ports {
            let to = format!("192.0.2.9:{number}");
            assert_eq!((at(&mesh, &to).as_str(), mesh.is_meshed(port(&to))), (expected, meshed), "{to}");
        }
        assert_eq!(mesh.kind(ip("192.0.2.9")), AddressKind::External);
        // Only where two claim the same port it is nobody's.
        mesh.apply([outer_service("u", &["10.96.0.4"], 81, &["192.0.2.9"], None)], []);
        assert_eq!(at(&mesh, "192.0.2.9:81"), "conflict");
        assert_eq!(at(&mesh, "192.0.2.9:80"), "s port 80");
        let touched = mesh.apply([], ["s".into(), "t".into(), "u".into(), "plain".into()]);
        assert!(touched.contains(&port("192.0.2.9:81")) && touched.contains(&address("192.0.2.9")));
        assert_eq!(mesh.kind(ip("192.0.2.9")), AddressKind::Unknown);
    }

    #[test]
    fn a_nodes_own_address_may_be_external_too() {
        let mut mesh = Mesh::new("");
        nodes(&mut mesh, &[("n1", &["192.0.2.1"])]);
        mesh.apply(
            [
                outer_service("s", &["10.96.0.1"], 80, &["192.0.2.1"], Some(30080)),
                outer_service("t", &["10.96.0.2"], 30080, &["192.0.2.1"], None),
                workload("a", &["10.0.0.1"], Tunnel::Hbone, &[("s", 80, 8080), ("t", 30080, 8080)]),
            ],
            [],
        );
        assert_eq!(mesh.kind(ip("192.0.2.1")), AddressKind::Node);
        assert_eq!(at(&mesh, "192.0.2.1:80"), "s port 80");
        assert_eq!(at(&mesh, "192.0.2.1:30080"), "t port 30080", "as kube-proxy has it");
        assert_eq!(at(&mesh, "192.0.2.1:10250"), "outside");
    }

    #[test]
    fn ports_that_others_claim_do_not_take_an_address_from_its_owner() {
        let mut mesh = Mesh::new("");
        nodes(&mut mesh, &[("n1", &["10.0.0.1", "10.0.0.2", "10.96.0.1"])]);
        let taken = ["10.0.0.1", "10.0.0.2", "10.96.0.1"];
        mesh.apply(
            [
                outer_service("s", &["10.96.0.1"], 80, &[], None),
                outer_service("thief", &["10.96.0.2"], 80, &taken, None),
                workload("enrolled", &["10.0.0.1"], Tunnel::Hbone, &[("s", 80, 8080), ("thief", 80, 8080)]),
                // Such as the API server, an endpoint with its node's address.
                workload("plain", &["10.0.0.2"], Tunnel::None, &[]),
            ],
            [],
        );
        assert_eq!(at(&mesh, "10.0.0.1:80"), "enrolled");
        assert_eq!(at(&mesh, "10.96.0.1:80"), "s port 80");
        assert_eq!(
            (mesh.kind(ip("10.0.0.1")), mesh.kind(ip("10.96.0.1"))),
            (AddressKind::Enrolled, AddressKind::Meshed)
        );
        assert_eq!(at(&mesh, "10.0.0.2:80"), "thief port 80");
        assert_eq!(
            (at(&mesh, "10.0.0.2:6443").as_str(), mesh.kind(ip("10.0.0.2"))),
            ("plain", AddressKind::Node)
        );
    }
}
