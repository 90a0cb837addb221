//! Translation to the snapshot that is served: encoding, and versions that are hashes of it. What did not change since
//! the last snapshot is not hashed again, and is shared with it.

use std::collections::{BTreeMap, HashMap};

use prost::Message;
use weft_proto::{
    MESH_CONFIG_NAME, TRUST_BUNDLE_NAME,
    node::TrustBundle,
    type_url,
    workload::{Address, PortList, Workload, address},
};
use weft_xds::{Resources, Snapshot, VersionVector, resource};

use crate::translate::incremental::Changes;

/// Builds one snapshot after the other.
#[derive(Debug, Default)]
pub struct Builder {
    snapshot: Snapshot,
    /// The snapshot differs from the last one that was built.
    changed: bool,
}

impl Builder {
    /// Takes in changes, for the next snapshot.
    pub fn apply(&mut self, changes: Changes) {
        let Changes { addresses, local, mesh, nodes, policies, problems: _ } = changes;
        let Snapshot { shared, per_node, .. } = &mut self.snapshot;
        let known = shared.entry(type_url::ADDRESS).or_default();
        for (name, address) in addresses {
            self.changed |= set(known, name, address.map(|address| encode_address(&address)));
        }
        let known = shared.entry(type_url::NODE).or_default();
        for (name, node) in nodes {
            self.changed |= set(known, name, node.map(|node| node.encode_to_vec()));
        }
        let known = shared.entry(type_url::AUTHORIZATION).or_default();
        for (name, policy) in policies {
            self.changed |= set(known, name, policy.map(|policy| policy.encode_to_vec()));
        }
        if let Some(mesh) = mesh {
            let known = shared.entry(type_url::MESH_CONFIG).or_default();
            self.changed |= set(known, MESH_CONFIG_NAME.to_owned(), Some(mesh.encode_to_vec()));
        }
        for (node, local) in local {
            let mut types = per_node.remove(&node).unwrap_or_default();
            let known = types.entry(type_url::LOCAL_WORKLOAD).or_default();
            for (name, workload) in local {
                self.changed |= set(known, name, workload.map(|workload| workload.encode_to_vec()));
            }
            if !known.is_empty() {
                per_node.insert(node, types);
            }
        }
    }

    /// Takes in whom to believe, for the next snapshot.
    pub fn trust(&mut self, bundle: &TrustBundle) {
        let known = self.snapshot.shared.entry(type_url::TRUST_BUNDLE).or_default();
        self.changed |= set(known, TRUST_BUNDLE_NAME.to_owned(), Some(bundle.encode_to_vec()));
    }

    /// Nothing that is taken in from now on holds more of the source than this.
    pub fn holds(&mut self, content: VersionVector) {
        self.snapshot.seen = content;
    }

    /// The next snapshot; None if nothing in it would differ from the last one.
    pub fn build(&mut self) -> Option<Snapshot> {
        if !std::mem::take(&mut self.changed) && self.snapshot.version > 0 {
            return None;
        }
        self.snapshot.version += 1;
        Some(self.snapshot.clone())
    }
}

/// Brings one resource up to date. Returns whether it was not.
fn set(resources: &mut Resources, name: String, content: Option<Vec<u8>>) -> bool {
    match content {
        None => resources.remove(&name).is_some(),
        Some(content) if resources.get(&name).is_some_and(|(_, known)| *known == content) => false,
        Some(content) => {
            resources.insert(name, resource(content));
            true
        }
    }
}

/// Field numbers in `istio.workload`.
const ADDRESS_WORKLOAD: u32 = 1;
const WORKLOAD_SERVICES: u32 = 22;

/// One entry of the map `Workload.services`, as maps are on the wire.
#[derive(Clone, PartialEq, Message)]
struct ServicesEntry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<PortList>,
}

/// Encodes an address so that equal content has equal bytes. The generated type keeps services in a HashMap, whose
/// order differs from run to run: they are written here, sorted, after the other fields (fields may come in any order).
fn encode_address(address: &Address) -> Vec<u8> {
    let Some(address::Type::Workload(workload)) = &address.r#type else {
        return address.encode_to_vec();
    };
    let mut inner = Workload { services: HashMap::new(), ..workload.clone() }.encode_to_vec();
    let sorted: BTreeMap<&String, &PortList> = workload.services.iter().collect();
    for (key, value) in sorted {
        let entry = ServicesEntry { key: key.clone(), value: Some(value.clone()) };
        put_message(&mut inner, WORKLOAD_SERVICES, &entry.encode_to_vec());
    }
    let mut outer = Vec::with_capacity(inner.len() + 8);
    put_message(&mut outer, ADDRESS_WORKLOAD, &inner);
    outer
}

fn put_message(buffer: &mut Vec<u8>, tag: u32, message: &[u8]) {
    prost::encoding::encode_key(tag, prost::encoding::WireType::LengthDelimited, buffer);
    prost::encoding::encode_varint(message.len() as u64, buffer);
    buffer.extend_from_slice(message);
}

#[cfg(test)]
mod tests {
    use weft_proto::{node::LocalWorkload, workload::Port};

    use super::*;

    fn workload(uid: &str, services: impl IntoIterator<Item = u32>) -> Address {
        let ports =
            |port| PortList { ports: vec![Port { service_port: port, target_port: 1, app_protocol: 0 }] };
        let services = services.into_iter().map(|n| (format!("shop/s{n}"), ports(n))).collect();
        let workload =
            Workload { uid: uid.to_owned(), services, node: "n1".to_owned(), ..Workload::default() };
        Address { r#type: Some(address::Type::Workload(workload)) }
    }

    /// What became of addresses: those without content are gone.
    fn changes(addresses: &[(&str, Option<Address>)]) -> Changes {
        let addresses = addresses.iter().map(|(name, address)| ((*name).to_owned(), address.clone()));
        Changes { addresses: addresses.collect(), ..Changes::default() }
    }

    fn built(builder: &mut Builder, changes: Changes) -> Option<Snapshot> {
        builder.apply(changes);
        builder.build()
    }

    #[test]
    fn equal_content_has_equal_bytes_and_decodes() {
        let encoded = encode_address(&workload("a", 1..40));
        for _ in 0..8 {
            assert_eq!(encode_address(&workload("a", (1..40).rev())), encoded);
        }
        assert_eq!(Address::decode(encoded.as_slice()).unwrap(), workload("a", 1..40));
        let service = Address { r#type: Some(address::Type::Service(Default::default())) };
        assert_eq!(Address::decode(encode_address(&service).as_slice()).unwrap(), service);
    }

    #[test]
    fn follows_changes_and_says_nothing_without_one() {
        let mut builder = Builder::default();
        let (a, b, c) = (workload("a", []), workload("b", []), workload("c", []));
        let both = || changes(&[("a", Some(a.clone())), ("b", Some(b.clone()))]);
        let first = built(&mut builder, both()).unwrap();
        assert_eq!(first.version, 1);
        assert!(built(&mut builder, both()).is_none());
        assert!(built(&mut builder, changes(&[("unheard-of", None)])).is_none());
        let a = workload("a", [1]);
        let news = changes(&[("a", Some(a.clone())), ("b", None), ("c", Some(c.clone()))]);
        let second = built(&mut builder, news).unwrap();
        let names = |s: &Snapshot| s.shared[type_url::ADDRESS].keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            (names(&first), names(&second)),
            (vec!["a".to_owned(), "b".into()], vec!["a".to_owned(), "c".into()])
        );
        let version = |s: &Snapshot| s.shared[type_url::ADDRESS]["a"].0.clone();
        assert_ne!(version(&first), version(&second));
        // Another replica, which saw only the outcome, serves the same versions.
        let outcome = changes(&[("a", Some(a)), ("c", Some(c))]);
        assert_eq!(built(&mut Builder::default(), outcome).unwrap().shared, second.shared);
    }

    #[test]
    fn what_is_taken_in_is_in_the_next_snapshot() {
        let mut builder = Builder::default();
        builder.apply(changes(&[("a", Some(workload("a", [])))]));
        builder.apply(changes(&[("b", Some(workload("b", [])))]));
        assert_eq!(builder.build().unwrap().shared[type_url::ADDRESS].len(), 2);
        assert!(builder.build().is_none());
    }

    #[test]
    fn an_empty_mesh_is_served_too() {
        let empty = Changes { mesh: Some(Default::default()), ..Changes::default() };
        let snapshot = built(&mut Builder::default(), empty).unwrap();
        assert!(snapshot.shared[type_url::MESH_CONFIG].contains_key(MESH_CONFIG_NAME));
        assert!(snapshot.shared[type_url::ADDRESS].is_empty());
    }

    #[test]
    fn local_workloads_come_and_go_with_their_node() {
        let local = |uids: &[(&str, bool)]| {
            let uids = uids.iter().map(|(uid, is)| ((*uid).to_owned(), is.then(LocalWorkload::default)));
            Changes { local: [("n1".to_owned(), uids.collect())].into(), ..Changes::default() }
        };
        let mut builder = Builder::default();
        let snapshot = built(&mut builder, local(&[("a", true), ("b", true)])).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).len(), 2);
        assert_eq!(snapshot.view("n2", type_url::LOCAL_WORKLOAD).len(), 0);
        let snapshot = built(&mut builder, local(&[("a", false)])).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).keys().collect::<Vec<_>>(), ["b"]);
        let snapshot = built(&mut builder, local(&[("b", false)])).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).len(), 0);
        assert!(snapshot.per_node.is_empty());
    }
}
