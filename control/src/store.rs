//! The objects in force, typed and indexed. One task owns it (`controller`); everything else works on what that task
//! derives from it. Applies changes and remembers what they touched, decides nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use weft_api::{
    AuthorizationPolicy, EndpointSlice, Kind, Namespace, Node, Object, ObjectKey, Pod, Service, ServiceCidr,
    discovery::{AddressType, Endpoint},
};

use crate::source::Delta;

/// Namespace and name.
pub type Name = (String, String);

#[derive(Debug, Default)]
pub struct Store {
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    pub pods: BTreeMap<Name, Arc<Pod>>,
    pub services: BTreeMap<Name, Arc<Service>>,
    pub slices: BTreeMap<Name, Arc<EndpointSlice>>,
    pub nodes: BTreeMap<String, Arc<Node>>,
    pub service_cidrs: BTreeMap<String, Arc<ServiceCidr>>,
    pub policies: BTreeMap<Name, Arc<AuthorizationPolicy>>,
    pub indexes: Indexes,
    touched: Touched,
}

/// Who is affected by a change of something else. Kept by the store, for others to read.
#[derive(Debug, Default)]
pub struct Indexes {
    /// Pods by the addresses that they claim as their own.
    pub pods_by_address: Index<IpAddr>,
    pub pods_by_node: Index<String>,
    pub slices_by_service: Index<Name>,
    /// Slices by the pods that their endpoints refer to.
    pub slices_by_pod: Index<Name>,
    /// Slices by the addresses of endpoints that refer to no pod.
    pub slices_by_address: Index<IpAddr>,
}

/// Names by something that several of them may have. One flat set, since nearly always there is one name to a key, and
/// a set for each key would weigh more than the objects.
#[derive(Debug)]
pub struct Index<K>(BTreeSet<(K, Name)>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Clone> Index<K> {
    /// In order.
    pub fn get(&self, key: &K) -> impl Iterator<Item = &Name> {
        // No name comes before the empty one.
        let all = self.0.range((key.clone(), Name::default())..);
        all.take_while(move |(of, _)| of == key).map(|(_, name)| name)
    }

    pub fn insert(&mut self, key: K, name: &Name) {
        self.0.insert((key, name.clone()));
    }

    pub fn remove(&mut self, key: K, name: &Name) {
        self.0.remove(&(key, name.clone()));
    }

    /// Puts `name` from one set of keys to another.
    fn change(&mut self, old: BTreeSet<K>, new: BTreeSet<K>, name: &Name) {
        old.difference(&new).for_each(|key| self.remove(key.clone(), name));
        new.difference(&old).for_each(|key| self.insert(key.clone(), name));
    }
}

/// What may read differently since it was last asked.
#[derive(Debug, Default, PartialEq)]
pub struct Touched {
    pub namespaces: BTreeSet<String>,
    /// With what was there before.
    pub pods: BTreeMap<Name, Option<Arc<Pod>>>,
    pub services: BTreeSet<Name>,
    pub slices: BTreeSet<Name>,
    /// Addresses that other pods claim than before.
    pub addresses: BTreeSet<IpAddr>,
    pub nodes: BTreeSet<String>,
    /// Nodes that are elsewhere than before.
    pub moved_nodes: BTreeSet<String>,
    /// The ranges of the cluster.
    pub networks: bool,
    pub policies: BTreeSet<Name>,
}

impl Store {
    pub fn apply(&mut self, delta: Delta) {
        delta.deletes.into_iter().for_each(|key| self.delete(key));
        delta.upserts.into_iter().for_each(|object| self.upsert(object));
    }

    /// Whether there is anything for [`Store::take_touched`].
    pub fn is_touched(&self) -> bool {
        self.touched != Touched::default()
    }

    /// What was touched since the last call.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// The pods of a namespace, by name.
    pub fn pods_in(&self, namespace: &str) -> impl Iterator<Item = &Name> {
        let begin = (namespace.to_owned(), String::new());
        self.pods.range(begin..).map(|(name, _)| name).take_while(move |name| name.0 == namespace)
    }

    /// The policies of a namespace, by name.
    pub fn policies_in(&self, namespace: &str) -> impl Iterator<Item = (&Name, &AuthorizationPolicy)> {
        let begin = (namespace.to_owned(), String::new());
        let policies = self.policies.range(begin..).take_while(move |(name, _)| name.0 == namespace);
        policies.map(|(name, policy)| (name, &**policy))
    }

    fn upsert(&mut self, object: Object) {
        let ObjectKey { namespace, name, .. } = object.key();
        match object {
            Object::Namespace(o) => self.set_namespace(name, Some(o)),
            Object::Pod(o) => self.set_pod((namespace, name), Some(o)),
            Object::Service(o) => self.set_service((namespace, name), Some(o)),
            Object::EndpointSlice(o) => self.set_slice((namespace, name), Some(o)),
            Object::Node(o) => self.set_node(name, Some(o)),
            Object::ServiceCidr(o) => self.set_service_cidr(name, Some(o)),
            Object::AuthorizationPolicy(o) => self.set_policy((namespace, name), Some(o)),
        }
    }

    fn delete(&mut self, key: ObjectKey) {
        let name = (key.namespace, key.name);
        match key.kind {
            Kind::Namespace => self.set_namespace(name.1, None),
            Kind::Pod => self.set_pod(name, None),
            Kind::Service => self.set_service(name, None),
            Kind::EndpointSlice => self.set_slice(name, None),
            Kind::Node => self.set_node(name.1, None),
            Kind::ServiceCidr => self.set_service_cidr(name.1, None),
            Kind::AuthorizationPolicy => self.set_policy(name, None),
        }
    }

    fn set_namespace(&mut self, name: String, new: Option<Arc<Namespace>>) {
        self.touched.namespaces.insert(name.clone());
        set(&mut self.namespaces, name, new);
    }

    fn set_pod(&mut self, name: Name, new: Option<Arc<Pod>>) {
        let old = set(&mut self.pods, name.clone(), new.clone());
        let (was, is) = (keys(&old, claims), keys(&new, claims));
        self.touched.addresses.extend(was.symmetric_difference(&is));
        self.indexes.pods_by_address.change(was, is, &name);
        let node = |pod: &Pod| pod.spec.node_name.clone().into_iter().collect();
        self.indexes.pods_by_node.change(keys(&old, node), keys(&new, node), &name);
        self.touched.pods.entry(name).or_insert(old);
    }

    fn set_service(&mut self, name: Name, new: Option<Arc<Service>>) {
        set(&mut self.services, name.clone(), new);
        self.touched.services.insert(name);
    }

    fn set_slice(&mut self, name: Name, new: Option<Arc<EndpointSlice>>) {
        let old = set(&mut self.slices, name.clone(), new.clone());
        let namespace = name.0.as_str();
        let service = |slice: &EndpointSlice| {
            slice
                .service_name()
                .map(|service| (namespace.to_owned(), service.to_owned()))
                .into_iter()
                .collect()
        };
        self.indexes.slices_by_service.change(keys(&old, service), keys(&new, service), &name);
        let pods = |slice: &EndpointSlice| {
            endpoints(slice).filter_map(|endpoint| referred_pod(namespace, endpoint)).collect()
        };
        self.indexes.slices_by_pod.change(keys(&old, pods), keys(&new, pods), &name);
        let addresses = |slice: &EndpointSlice| {
            let without = endpoints(slice).filter(|endpoint| referred_pod(namespace, endpoint).is_none());
            without.filter_map(Endpoint::address).collect()
        };
        self.indexes.slices_by_address.change(keys(&old, addresses), keys(&new, addresses), &name);
        self.touched.slices.insert(name);
    }

    fn set_node(&mut self, name: String, new: Option<Arc<Node>>) {
        let old = set(&mut self.nodes, name.clone(), new.clone());
        if old.as_deref().map(Node::locality) != new.as_deref().map(Node::locality) {
            self.touched.moved_nodes.insert(name.clone());
        }
        let networks = |node: &Node| node.pod_networks().collect();
        self.touched.networks |= keys(&old, networks) != keys(&new, networks);
        self.touched.nodes.insert(name);
    }

    fn set_service_cidr(&mut self, name: String, new: Option<Arc<ServiceCidr>>) {
        set(&mut self.service_cidrs, name, new);
        self.touched.networks = true;
    }

    fn set_policy(&mut self, name: Name, new: Option<Arc<AuthorizationPolicy>>) {
        set(&mut self.policies, name.clone(), new);
        self.touched.policies.insert(name);
    }

    /// How many objects of each kind there are.
    pub fn counts(&self) -> [(Kind, usize); 7] {
        [
            (Kind::Namespace, self.namespaces.len()),
            (Kind::Pod, self.pods.len()),
            (Kind::Service, self.services.len()),
            (Kind::EndpointSlice, self.slices.len()),
            (Kind::Node, self.nodes.len()),
            (Kind::ServiceCidr, self.service_cidrs.len()),
            (Kind::AuthorizationPolicy, self.policies.len()),
        ]
    }
}

/// Puts an object in its place, or takes it away. Returns what was there.
fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> Option<V> {
    match value {
        Some(value) => map.insert(key, value),
        None => map.remove(&key),
    }
}

/// What an object is indexed by.
fn keys<T, K: Ord>(object: &Option<Arc<T>>, keys: impl Fn(&T) -> Vec<K>) -> BTreeSet<K> {
    object.iter().flat_map(|object| keys(object)).collect()
}

/// The addresses that a pod has for itself.
fn claims(pod: &Pod) -> Vec<IpAddr> {
    if pod.is_gone() || pod.spec.host_network { Vec::new() } else { pod.addresses() }
}

/// The endpoints of a slice whose addresses are addresses.
pub fn endpoints(slice: &EndpointSlice) -> impl Iterator<Item = &Endpoint> {
    let names = slice.address_type == AddressType::Fqdn;
    slice.endpoints.iter().filter(move |_| !names)
}

/// The pod that an endpoint of a slice in `namespace` refers to by name.
pub fn referred_pod(namespace: &str, endpoint: &Endpoint) -> Option<Name> {
    let reference = endpoint.target_ref.as_ref().filter(|reference| reference.kind == "Pod")?;
    Some((reference.namespace.as_deref().unwrap_or(namespace).to_owned(), reference.name.clone()))
}
