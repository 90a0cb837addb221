//! The objects in force, typed and indexed. One task owns it (`controller`); everything else works on what that task
//! derives from it. Applies changes, decides nothing.

use std::{collections::BTreeMap, sync::Arc};

use weft_api::{EndpointSlice, Kind, Namespace, Node, Object, ObjectKey, Pod, Service, ServiceCidr};

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
}

impl Store {
    pub fn apply(&mut self, delta: Delta) {
        delta.deletes.into_iter().for_each(|key| self.delete(key));
        delta.upserts.into_iter().for_each(|object| self.upsert(object));
    }

    fn upsert(&mut self, object: Object) {
        let ObjectKey { namespace, name, .. } = object.key();
        match object {
            Object::Namespace(o) => drop(self.namespaces.insert(name, o)),
            Object::Pod(o) => drop(self.pods.insert((namespace, name), o)),
            Object::Service(o) => drop(self.services.insert((namespace, name), o)),
            Object::EndpointSlice(o) => drop(self.slices.insert((namespace, name), o)),
            Object::Node(o) => drop(self.nodes.insert(name, o)),
            Object::ServiceCidr(o) => drop(self.service_cidrs.insert(name, o)),
        }
    }

    fn delete(&mut self, key: ObjectKey) {
        let name = (key.namespace, key.name);
        match key.kind {
            Kind::Namespace => drop(self.namespaces.remove(&name.1)),
            Kind::Pod => drop(self.pods.remove(&name)),
            Kind::Service => drop(self.services.remove(&name)),
            Kind::EndpointSlice => drop(self.slices.remove(&name)),
            Kind::Node => drop(self.nodes.remove(&name.1)),
            Kind::ServiceCidr => drop(self.service_cidrs.remove(&name.1)),
        }
    }

    /// How many objects of each kind there are.
    pub fn counts(&self) -> [(Kind, usize); 6] {
        [
            (Kind::Namespace, self.namespaces.len()),
            (Kind::Pod, self.pods.len()),
            (Kind::Service, self.services.len()),
            (Kind::EndpointSlice, self.slices.len()),
            (Kind::Node, self.nodes.len()),
            (Kind::ServiceCidr, self.service_cidrs.len()),
        ]
    }
}
