//! Translation to the snapshot that is served: encoding, and versions that are hashes of it. What did not change since
//! the last snapshot is neither encoded nor hashed again.

use std::collections::{BTreeMap, HashMap};

use prost::Message;
use weft_proto::{
    MESH_CONFIG_NAME, type_url,
    workload::{Address, PortList, Workload, address},
};
use weft_xds::{Resources, Snapshot, resource};

use crate::translate::Translation;

/// Builds one snapshot after the other.
#[derive(Debug, Default)]
pub struct Builder {
    last: Translation,
    snapshot: Snapshot,
}

impl Builder {
    /// The next snapshot; None if nothing in it would differ from the last one.
    pub fn build(&mut self, next: Translation) -> Option<Snapshot> {
        let first = self.snapshot.version == 0;
        let same = next.addresses == self.last.addresses
            && next.local == self.last.local
            && next.mesh == self.last.mesh;
        if same && !first {
            return None;
        }
        let mut shared = std::mem::take(&mut self.snapshot.shared);
        update(
            shared.entry(type_url::ADDRESS).or_default(),
            &self.last.addresses,
            &next.addresses,
            encode_address,
        );
        let mesh = Resources::unit(MESH_CONFIG_NAME.to_owned(), resource(next.mesh.encode_to_vec()));
        shared.insert(type_url::MESH_CONFIG, mesh);

        let nothing = BTreeMap::new();
        let mut per_node = std::mem::take(&mut self.snapshot.per_node);
        per_node.retain(|node, _| next.local.contains_key(node));
        for (node, local) in &next.local {
            let types = per_node.entry(node.clone()).or_default();
            let last = self.last.local.get(node).unwrap_or(&nothing);
            update(types.entry(type_url::LOCAL_WORKLOAD).or_default(), last, local, Message::encode_to_vec);
        }
        self.snapshot = Snapshot { version: self.snapshot.version + 1, shared, per_node };
        self.last = next;
        Some(self.snapshot.clone())
    }
}

/// Brings `resources` from `last` to `next`.
fn update<M: PartialEq>(
    resources: &mut Resources,
    last: &BTreeMap<String, M>,
    next: &BTreeMap<String, M>,
    encode: impl Fn(&M) -> Vec<u8>,
) {
    for name in last.keys().filter(|name| !next.contains_key(*name)) {
        resources.remove(name);
    }
    for (name, message) in next.iter().filter(|(name, message)| last.get(*name) != Some(*message)) {
        resources.insert(name.clone(), resource(encode(message)));
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

    fn translation(addresses: &[(&str, Address)]) -> Translation {
        Translation {
            addresses: addresses.iter().map(|(name, a)| ((*name).to_owned(), a.clone())).collect(),
            ..Translation::default()
        }
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
        let first =
            builder.build(translation(&[("a", workload("a", [])), ("b", workload("b", []))])).unwrap();
        assert_eq!(first.version, 1);
        assert!(builder.build(translation(&[("a", workload("a", [])), ("b", workload("b", []))])).is_none());
        let second =
            builder.build(translation(&[("a", workload("a", [1])), ("c", workload("c", []))])).unwrap();
        let names = |s: &Snapshot| s.shared[type_url::ADDRESS].keys().cloned().collect::<Vec<_>>();
        assert_eq!(
            (names(&first), names(&second)),
            (vec!["a".to_owned(), "b".into()], vec!["a".to_owned(), "c".into()])
        );
        let version = |s: &Snapshot| s.shared[type_url::ADDRESS]["a"].0.clone();
        assert_ne!(version(&first), version(&second));
        // Another replica, which saw only the outcome, serves the same versions.
        let other = Builder::default()
            .build(translation(&[("a", workload("a", [1])), ("c", workload("c", []))]))
            .unwrap();
        assert_eq!(other.shared, second.shared);
    }

    #[test]
    fn an_empty_mesh_is_served_too() {
        let snapshot = Builder::default().build(Translation::default()).unwrap();
        assert!(snapshot.shared[type_url::MESH_CONFIG].contains_key(MESH_CONFIG_NAME));
        assert!(snapshot.shared[type_url::ADDRESS].is_empty());
    }

    #[test]
    fn local_workloads_come_and_go_with_their_node() {
        let local = |uids: &[&str]| Translation {
            local: [(
                "n1".to_owned(),
                uids.iter().map(|u| ((*u).to_owned(), LocalWorkload::default())).collect(),
            )]
            .into(),
            ..Translation::default()
        };
        let mut builder = Builder::default();
        let snapshot = builder.build(local(&["a", "b"])).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).len(), 2);
        assert_eq!(snapshot.view("n2", type_url::LOCAL_WORKLOAD).len(), 0);
        let snapshot = builder.build(local(&["b"])).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).keys().collect::<Vec<_>>(), ["b"]);
        let snapshot = builder.build(Translation::default()).unwrap();
        assert_eq!(snapshot.view("n1", type_url::LOCAL_WORKLOAD).len(), 0);
    }
}
