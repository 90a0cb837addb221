//! What has to be translated again after a change, and the outcome of it: dirty keys in, changed resources out. The
//! translation itself is in the pure functions of `workloads`, `services` and `networks`; here is only who depends on whom:
//!
//! ```text
//! namespace ──► its pods                                             zone of a node ──► its pods
//! pod ──► slices that refer to it, or name an address it claims      node, service CIDR ──► networks
//! service ──► its slices                                             networks ──► problems of pods and services
//! policy ──► the pods of its namespace                               service that policies target ──► the same, and them
//! slice ──► pods and other endpoints that it says something else of
//! ```
//!
//! The outcome is the same as if all of it had been translated anew, which a test holds it to.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weft_proto::{
    node::{LocalWorkload, MeshConfig, Node},
    security::Authorization,
    workload::{Address, address},
};

use super::{
    Identities, MeshSettings, mesh_config, networks, place,
    policies::{self, Policy},
    services::{self, Membership, Slice},
    workloads,
};
use crate::{
    enrollment::{Enrolled, Places},
    store::{Index, Name, Store, Touched},
};

/// What became of what was dirty, by name: its new content, or None where there is nothing, also if there never was.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    pub addresses: BTreeMap<String, Option<Address>>,
    /// By node, and then by name.
    pub local: BTreeMap<String, BTreeMap<String, Option<LocalWorkload>>>,
    pub mesh: Option<MeshConfig>,
    pub nodes: BTreeMap<String, Option<Node>>,
    pub policies: BTreeMap<String, Option<Authorization>>,
    /// What a person should know, by what it is about.
    pub problems: BTreeMap<String, Option<String>>,
}

/// What became of who is to be in the mesh.
#[derive(Debug, Default)]
pub struct Placed {
    /// The pods that are no longer desired as they were, and as what they were.
    pub former: Places,
    /// Where pods are, or were, of which anything may be different.
    pub nodes: BTreeSet<String>,
}

/// What is remembered of earlier translations, to know what a change changes.
#[derive(Debug)]
pub struct Translator {
    configured: MeshSettings,
    /// With the ranges that the cluster adds.
    settings: MeshSettings,
    mesh: Option<MeshConfig>,
    desired: Places,
    identities: Identities,
    policies: BTreeMap<Name, Policy>,
    slices: BTreeMap<Name, Slice>,
    /// Slices by the pods that they put behind a Service.
    slices_of_pod: Index<Name>,
    /// Slices by addresses of endpoints that are no pods. The first slice to name an address has it; of others it would
    /// look like a dispute.
    slices_of_address: Index<IpAddr>,
}

/// Keys of what has to be translated again.
#[derive(Debug, Default)]
struct Dirty {
    pods: BTreeSet<Name>,
    services: BTreeSet<Name>,
    /// Endpoints without a pod, by slice and address.
    others: BTreeSet<(Name, IpAddr)>,
}

impl Translator {
    pub fn new(settings: MeshSettings) -> Self {
        Self {
            configured: settings.clone(),
            settings,
            mesh: None,
            desired: Places::new(),
            identities: Identities::default(),
            policies: BTreeMap::new(),
            slices: BTreeMap::new(),
            slices_of_pod: Index::default(),
            slices_of_address: Index::default(),
        }
    }

    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    /// The pods that labels want in the mesh and that have a node and an address.
    pub fn desired(&self) -> &Places {
        &self.desired
    }

    /// What the certificate authority may issue.
    pub fn identities(&self) -> &Identities {
        &self.identities
    }

    /// The first half: who is to be in the mesh, and who may have which identity.
    pub fn place(&mut self, store: &Store, touched: &Touched) -> Placed {
        let Placed { mut former, mut nodes } = Placed::default();
        for name in pods_of(store, touched) {
            let pods = [touched.pods.get(&name).and_then(Option::as_ref), store.pods.get(&name)];
            nodes.extend(pods.into_iter().flatten().filter_map(|pod| pod.spec.node_name.clone()));
            let uid = self.settings.pod_uid(&name.0, &name.1);
            let place = place(store, &name);
            if self.desired.get(&uid) != place.as_ref() {
                let old = match place {
                    Some(place) => self.desired.insert(uid.clone(), place),
                    None => self.desired.remove(&uid),
                };
                former.extend(old.map(|old| (uid, old)));
            }
        }
        for node in &nodes {
            self.identities.update(store, &self.settings, node);
        }
        Placed { former, nodes }
    }

    /// The second half, once `enrolled` has followed the first: everything that agents are sent. `changed` are the uids
    /// whose enrolment did. A pod is announced as reachable by tunnel if it is enrolled as the pod it is now.
    pub fn translate(
        &mut self,
        store: &Store,
        touched: &Touched,
        enrolled: &Enrolled,
        changed: &BTreeSet<String>,
    ) -> Changes {
        let mut dirty = Dirty { pods: pods_of(store, touched), ..Dirty::default() };
        dirty.pods.extend(changed.iter().filter_map(|uid| self.settings.pod_of(uid)));
        let moved = touched.moved_nodes.iter().flat_map(|node| store.indexes.pods_by_node.get(node));
        dirty.pods.extend(moved.cloned());
        dirty.services.extend(touched.services.iter().cloned());
        for name in slices_of(store, touched) {
            self.translate_slice(store, name, &mut dirty);
        }
        let mut changes = Changes::default();
        if self.mesh.is_none() {
            let built_in = policies::built_in(&self.settings.trust_domain).into_iter();
            changes.policies.extend(built_in.map(|(name, policy)| (name, Some(policy))));
        }
        self.translate_policies(store, touched, &mut dirty, &mut changes);
        if touched.networks || self.mesh.is_none() {
            self.translate_networks(store, &mut dirty, &mut changes);
        }
        for name in &dirty.services {
            self.translate_service(store, name, &mut changes);
        }
        for name in &dirty.pods {
            self.translate_pod(store, touched, enrolled, name, &mut changes);
        }
        for (slice, address) in &dirty.others {
            self.translate_other(slice, *address, &mut changes);
        }
        changes.nodes =
            touched.nodes.iter().map(|name| (name.clone(), networks::node(store, name))).collect();
        for address in &touched.addresses {
            let problem = services::address_problem(store, *address);
            changes.problems.insert(format!("address {address}"), problem);
        }
        changes
    }

    fn translate_slice(&mut self, store: &Store, name: Name, dirty: &mut Dirty) {
        let new = services::slice(store, &self.settings, &name);
        let old = self.slices.remove(&name).unwrap_or_default();
        let nothing = Slice::default();
        let is = new.as_ref().unwrap_or(&nothing);
        let serves_the_same = old.service == is.service;

        let pods: BTreeSet<&Name> = old.pods.keys().chain(is.pods.keys()).collect();
        for pod in pods {
            let (before, after) = (old.pods.get(pod), is.pods.get(pod));
            if before == after && serves_the_same {
                continue;
            }
            dirty.pods.insert(pod.clone());
            match after {
                Some(_) => self.slices_of_pod.insert(pod.clone(), &name),
                None => self.slices_of_pod.remove(pod.clone(), &name),
            }
        }

        let addresses: BTreeSet<IpAddr> = old.others.keys().chain(is.others.keys()).copied().collect();
        for address in addresses {
            let (before, after) = (old.others.get(&address), is.others.get(&address));
            if before == after && serves_the_same {
                continue;
            }
            dirty.others.insert((name.clone(), address));
            // Whoever shares an address with it may now be the first, or no longer.
            let sharing = self.slices_of_address.get(&address).cloned();
            dirty.others.extend(sharing.map(|slice| (slice, address)));
            match after {
                Some(other) if !other.host_network => self.slices_of_address.insert(address, &name),
                _ => self.slices_of_address.remove(address, &name),
            }
        }
        if let Some(new) = new {
            self.slices.insert(name, new);
        }
    }

    fn translate_networks(&mut self, store: &Store, dirty: &mut Dirty, changes: &mut Changes) {
        self.settings = networks::effective(store, &self.configured);
        let mesh = mesh_config(&self.settings);
        if self.mesh.as_ref() == Some(&mesh) {
            return;
        }
        // What is outside the ranges is reported. They change seldom enough to look at everything then.
        dirty.pods.extend(store.pods.keys().cloned());
        dirty.services.extend(store.services.keys().cloned());
        changes.mesh = Some(mesh.clone());
        self.mesh = Some(mesh);
    }

    fn translate_policies(
        &mut self,
        store: &Store,
        touched: &Touched,
        dirty: &mut Dirty,
        changes: &mut Changes,
    ) {
        let mut names = touched.policies.clone();
        for (namespace, service) in &touched.services {
            let targeting =
                store.policies_in(namespace).filter(|(_, policy)| policies::targets(policy, service));
            names.extend(targeting.map(|(name, _)| name.clone()));
        }
        let namespaces: BTreeSet<&str> = names.iter().map(|(namespace, _)| namespace.as_str()).collect();
        dirty.pods.extend(namespaces.into_iter().flat_map(|namespace| store.pods_in(namespace)).cloned());
        for name in names {
            let new = policies::policy(store, &self.settings, &name);
            let old = match &new {
                Some(policy) => self.policies.insert(name.clone(), policy.clone()),
                None => self.policies.remove(&name),
            };
            changes.policies.extend(old.map(|old| (old.name, None)));
            let problem = new.as_ref().and_then(|policy| policy.problem.clone());
            changes.problems.insert(format!("AuthorizationPolicy {}/{}", name.0, name.1), problem);
            changes.policies.extend(new.map(|new| (new.name, Some(new.content))));
        }
    }

    fn translate_service(&self, store: &Store, name: &Name, changes: &mut Changes) {
        let (service, problem) = services::service(store, &self.settings, name).unzip();
        let service = service.map(|service| Address { r#type: Some(address::Type::Service(service)) });
        changes.addresses.insert(self.settings.service_key(&name.0, &name.1), service);
        changes.problems.insert(format!("Service {}/{}", name.0, name.1), problem.flatten());
    }

    fn translate_pod(
        &self,
        store: &Store,
        touched: &Touched,
        enrolled: &Enrolled,
        name: &Name,
        changes: &mut Changes,
    ) {
        let uid = self.settings.pod_uid(&name.0, &name.1);
        let tunnel = self.desired.get(&uid).is_some_and(|place| enrolled.holds(&uid, place));
        let membership = self.membership(name);
        let pod = workloads::pod(store, &self.settings, name, &membership, &self.policies, tunnel);
        let workload = pod.workload.map(|w| Address { r#type: Some(address::Type::Workload(w)) });
        changes.addresses.insert(uid.clone(), workload);
        changes.problems.insert(format!("Pod {}/{}", name.0, name.1), pod.problem);

        let node = |pod: &weft_api::Pod| pod.spec.node_name.clone();
        let old = touched.pods.get(name).and_then(Option::as_ref).and_then(|pod| node(pod));
        if let Some(old) = old {
            changes.local.entry(old).or_default().insert(uid.clone(), None);
        }
        if let Some(node) = store.pods.get(name).and_then(|pod| node(pod)) {
            changes.local.entry(node).or_default().insert(uid, pod.local);
        }
    }

    /// What all slices together say of a pod.
    fn membership(&self, pod: &Name) -> Membership {
        let mut membership = Membership::default();
        for slice in self.slices_of_pod.get(pod).filter_map(|slice| self.slices.get(slice)) {
            if let Some(state) = slice.pods.get(pod) {
                membership.add(slice.service.as_ref(), *state);
            }
        }
        membership
    }

    fn translate_other(&self, name: &Name, address: IpAddr, changes: &mut Changes) {
        let uid = self.settings.endpoint_uid(name, address);
        let slice = self.slices.get(name);
        let endpoint = slice.and_then(|slice| Some((slice, slice.others.get(&address)?)));
        let workload = endpoint.map(|(slice, other)| {
            let mut membership = Membership::default();
            membership.add(slice.service.as_ref(), other.state);
            let first = self.slices_of_address.get(&address).next();
            let shared_address = other.host_network || first != Some(name);
            let workload =
                workloads::outside_pod(&self.settings, name, address, other, &membership, shared_address);
            Address { r#type: Some(address::Type::Workload(workload)) }
        });
        changes.addresses.insert(uid, workload);
    }
}

/// The pods that a change is about.
fn pods_of(store: &Store, touched: &Touched) -> BTreeSet<Name> {
    let of_namespaces = touched.namespaces.iter().flat_map(|namespace| store.pods_in(namespace));
    touched.pods.keys().chain(of_namespaces).cloned().collect()
}

/// The slices that may say something else after a change.
fn slices_of(store: &Store, touched: &Touched) -> BTreeSet<Name> {
    let indexes = &store.indexes;
    let of_services = touched.services.iter().flat_map(|service| indexes.slices_by_service.get(service));
    let of_pods = touched.pods.keys().flat_map(|pod| indexes.slices_by_pod.get(pod));
    let of_addresses = touched.addresses.iter().flat_map(|ip| indexes.slices_by_address.get(ip));
    touched.slices.iter().chain(of_services).chain(of_pods).chain(of_addresses).cloned().collect()
}
