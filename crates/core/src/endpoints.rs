//! The endpoints of one service, and which of them a caller is given.
//!
//! They are kept in the order of zone, node and uid, so that those near a caller lie together: a choice among them costs
//! the same however many others there are.

use std::{cmp::Ordering, net::IpAddr, ops::Range, sync::Arc};

use imbl::Vector;

use crate::{
    balance,
    workload::{Health, Nearness, Service, Tunnel, Workload},
};

/// Where a caller is, and what it dialled.
#[derive(Debug, Clone, Copy)]
pub struct Caller<'a> {
    pub node: &'a str,
    /// Empty where the node has none.
    pub zone: &'a str,
    pub dialled: IpAddr,
}

impl Caller<'_> {
    /// Which endpoints of `service` are for it. `internalTrafficPolicy` speaks of cluster addresses; pods that dial others
    /// are sent to any endpoint, as by kube-proxy.
    pub(crate) fn nearness(&self, service: &Service) -> Nearness {
        match service.nearness {
            Nearness::OnlyNode if !service.addresses.contains(&self.dialled) => Nearness::Any,
            nearness => nearness,
        }
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoints {
    all: Vector<Arc<Workload>>,
    enrolled: usize,
}

/// What endpoints are sorted by.
type Position<'a> = (&'a str, &'a str, &'a str);

fn position(workload: &Workload) -> Position<'_> {
    (&workload.zone, &workload.node, &workload.uid)
}

impl Endpoints {
    pub fn insert(&mut self, workload: Arc<Workload>) {
        let place = self.all.binary_search_by(|other| position(other).cmp(&position(&workload)));
        self.enrolled += usize::from(workload.tunnel == Tunnel::Hbone);
        self.all.insert(place.unwrap_or_else(|place| place), workload);
    }

    /// Takes out `workload` as it was put in.
    pub fn remove(&mut self, workload: &Workload) {
        if let Ok(place) = self.all.binary_search_by(|other| position(other).cmp(&position(workload))) {
            self.all.remove(place);
            self.enrolled -= usize::from(workload.tunnel == Tunnel::Hbone);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub fn has_enrolled(&self) -> bool {
        self.enrolled > 0
    }

    /// See [`crate::Mesh::endpoint`].
    pub fn choose(
        &self,
        service: &Service,
        port: u16,
        caller: Caller<'_>,
        mut random: impl FnMut(usize) -> usize,
        load: impl Fn(&Workload) -> u64,
    ) -> Option<(Arc<Workload>, u16)> {
        // Those that are ending serve until there is somebody else, as kube-proxy has it.
        let healths: &[Health] = match service.accepts_unready {
            true => &[Health::Unready],
            false => &[Health::Ready, Health::Draining],
        };
        for &worst in healths {
            for Range { start, end } in self.tiers(caller.nearness(service), caller) {
                let at = |i: usize| &self.all[start + i];
                let is_usable = |i: usize| at(i).health <= worst && at(i).serves(&service.key, port);
                if let Some(i) = balance::pick(end - start, &mut random, is_usable, |i| load(at(i))) {
                    return Some((at(i).clone(), at(i).target_port(&service.key, port)?));
                }
            }
        }
        None
    }

    /// Which endpoints are tried, one range after the other.
    fn tiers(
        &self,
        nearness: Nearness,
        Caller { node, zone, .. }: Caller<'_>,
    ) -> impl Iterator<Item = Range<usize>> {
        let all = || 0..self.all.len();
        let in_zone = || self.range(|other| other.0.cmp(zone));
        let on_node = || self.range(|other| (other.0, other.1).cmp(&(zone, node)));
        let tiers = match nearness {
            Nearness::Any => [Some(all()), None, None],
            Nearness::PreferZone => [Some(in_zone()), Some(all()), None],
            Nearness::PreferNode => [Some(on_node()), Some(in_zone()), Some(all())],
            Nearness::OnlyNode => [Some(on_node()), None, None],
        };
        tiers.into_iter().flatten()
    }

    /// The endpoints that `compare` says are equal to what is looked for.
    fn range(&self, compare: impl Fn(Position<'_>) -> Ordering) -> Range<usize> {
        let first = |after: fn(Ordering) -> bool| {
            let side = |w: &Arc<Workload>| match after(compare(position(w))) {
                true => Ordering::Greater,
                false => Ordering::Less,
            };
            // Never Ok: nothing compares as equal.
            self.all.binary_search_by(side).unwrap_or_else(|place| place)
        };
        first(Ordering::is_ge)..first(Ordering::is_gt)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::Ipv4Addr};

    use super::*;
    use crate::{PortMapping, SpiffeId, TrustDomain, balance::tests::lcg};

    const CLUSTER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1));

    fn endpoint(name: &str, zone: &str, node: &str) -> Workload {
        let trust = TrustDomain::new("cluster.local").expect("valid");
        Workload {
            uid: name.into(),
            name: name.into(),
            namespace: "ns".into(),
            workload_name: name.into(),
            identity: SpiffeId::new(trust, "ns", name).expect("valid"),
            node: node.into(),
            zone: zone.into(),
            network: "".into(),
            host_network: false,
            addresses: vec![[10, 0, 0, 1].into()],
            tunnel: Tunnel::None,
            health: Health::Ready,
            services: vec![("ns/s".into(), vec![PortMapping { service_port: 80, target_port: 8080 }])],
            policies: Vec::new(),
        }
    }

    fn service(nearness: Nearness) -> Service {
        Service {
            key: "ns/s".into(),
            name: "s".into(),
            namespace: "ns".into(),
            addresses: vec![CLUSTER],
            ports: Vec::new(),
            external_addresses: Vec::new(),
            node_ports: Vec::new(),
            nearness,
            accepts_unready: false,
            affinity: None,
        }
    }

    /// Everybody who is ever chosen.
    fn chosen(all: &[Workload], service: &Service, node: &str, zone: &str) -> BTreeSet<String> {
        chosen_at(CLUSTER, all, service, node, zone)
    }

    fn chosen_at(
        dialled: IpAddr,
        all: &[Workload],
        service: &Service,
        node: &str,
        zone: &str,
    ) -> BTreeSet<String> {
        let mut endpoints = Endpoints::default();
        all.iter().for_each(|w| endpoints.insert(Arc::new(w.clone())));
        let mut random = lcg();
        let caller = Caller { node, zone, dialled };
        let once =
            |_| endpoints.choose(service, 80, caller, &mut random, |_| 0).map(|(w, _)| w.name.to_string());
        (0..100).filter_map(once).collect()
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn near_ones_first() {
        let all = [
            endpoint("a", "z1", "n1"),
            endpoint("b", "z1", "n2"),
            endpoint("c", "z2", "n3"),
            endpoint("d", "z2", "n3"),
            endpoint("e", "", "n4"),
        ];
        let everybody = ["a", "b", "c", "d", "e"];
        for (nearness, node, zone, expected) in [
            (Nearness::Any, "n1", "z1", &everybody[..]),
            (Nearness::PreferZone, "n1", "z1", &["a", "b"]),
            (Nearness::PreferZone, "n9", "z2", &["c", "d"]),
            (Nearness::PreferZone, "n9", "z9", &everybody),
            (Nearness::PreferNode, "n2", "z1", &["b"]),
            (Nearness::PreferNode, "n9", "z1", &["a", "b"]),
            (Nearness::PreferNode, "n9", "z9", &everybody),
            (Nearness::OnlyNode, "n3", "z2", &["c", "d"]),
            (Nearness::OnlyNode, "n4", "", &["e"]),
            (Nearness::OnlyNode, "n9", "z1", &[]),
        ] {
            assert_eq!(
                chosen(&all, &service(nearness), node, zone),
                names(expected),
                "{nearness:?} {node} {zone}"
            );
        }
    }

    #[test]
    fn a_policy_for_the_node_is_one_for_cluster_addresses() {
        let all = [endpoint("a", "z1", "n1"), endpoint("b", "z2", "n2")];
        let external = [203, 0, 113, 9].into();
        assert_eq!(chosen_at(external, &all, &service(Nearness::OnlyNode), "n1", "z1"), names(&["a", "b"]));
        assert_eq!(chosen_at(external, &all, &service(Nearness::PreferNode), "n1", "z1"), names(&["a"]));
    }

    #[test]
    fn farther_ones_where_no_near_one_serves() {
        let sick = Workload { health: Health::Unready, ..endpoint("a", "z1", "n1") };
        let elsewhere = Workload { services: Vec::new(), ..endpoint("b", "z1", "n1") };
        let all = [sick, elsewhere, endpoint("c", "z1", "n2"), endpoint("d", "z2", "n3")];
        assert_eq!(chosen(&all, &service(Nearness::PreferNode), "n1", "z1"), names(&["c"]));
        assert_eq!(chosen(&all, &service(Nearness::OnlyNode), "n1", "z1"), names(&[]));
    }

    #[test]
    fn those_that_are_ending_serve_only_where_nobody_else_does() {
        let draining = Workload { health: Health::Draining, ..endpoint("a", "", "n1") };
        let unready = Workload { health: Health::Unready, ..endpoint("b", "", "n1") };
        let all = [draining, unready, endpoint("c", "", "n2")];
        let any = service(Nearness::Any);
        assert_eq!(chosen(&all, &any, "n1", ""), names(&["c"]));
        assert_eq!(chosen(&all[..2], &any, "n1", ""), names(&["a"]));
        assert_eq!(chosen(&all[1..2], &any, "n1", ""), names(&[]));
        // Its own node's ending endpoint, rather than nobody.
        assert_eq!(chosen(&all, &service(Nearness::OnlyNode), "n1", ""), names(&["a"]));
        assert_eq!(
            chosen(&all, &Service { accepts_unready: true, ..any }, "n1", ""),
            names(&["a", "b", "c"])
        );
    }

    #[test]
    fn removal_finds_what_was_put_in() {
        let mut endpoints = Endpoints::default();
        let all: Vec<_> = (0..200)
            .map(|i| {
                let tunnel = if i % 2 == 0 { Tunnel::Hbone } else { Tunnel::None };
                let (name, zone, node) = (format!("w{i}"), format!("z{}", i % 3), format!("n{}", i % 7));
                Arc::new(Workload { tunnel, ..endpoint(&name, &zone, &node) })
            })
            .collect();
        all.iter().for_each(|w| endpoints.insert(w.clone()));
        assert!(endpoints.all.iter().is_sorted_by_key(|w| (&w.zone, &w.node, &w.uid)));
        assert_eq!((endpoints.all.len(), endpoints.enrolled), (200, 100));
        all.iter().for_each(|w| endpoints.remove(w));
        assert!(endpoints.is_empty() && !endpoints.has_enrolled());
    }
}
