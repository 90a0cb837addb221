//! What one watch has told of its kind: the objects in force, and what of a new listing is there so far. Pure. A listing
//! counts as a whole, and what it does not name is gone: the watch was not told of deletions while it was broken.

use std::collections::BTreeMap;

use weft_api::{FieldError, Object, ObjectKey};

use crate::source::Delta;

/// One object of a watch: what it is, and its content or why that cannot be read.
#[derive(Debug, Clone)]
pub struct Item {
    pub key: ObjectKey,
    pub object: Result<Object, FieldError>,
}

/// What followed from an event.
#[derive(Debug, Default, PartialEq)]
pub struct Change {
    pub delta: Delta,
    /// Objects of which nothing has changed but what Weft itself writes there.
    pub echoes: Vec<Object>,
}

#[derive(Debug, Default)]
pub struct Cache {
    objects: BTreeMap<ObjectKey, Object>,
    /// Why what the cluster has now is not in force.
    complaints: BTreeMap<ObjectKey, String>,
    listing: Option<Listing>,
    listed: bool,
}

#[derive(Debug, Default)]
struct Listing {
    objects: BTreeMap<ObjectKey, Object>,
    complaints: BTreeMap<ObjectKey, String>,
}

impl Cache {
    /// Whether everything of the kind has been seen once.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    pub fn complaints(&self) -> usize {
        self.complaints.len()
    }

    /// Everything in force.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.values()
    }

    /// A listing begins; one that was not finished is forgotten.
    pub fn begin(&mut self) {
        self.listing = Some(Listing::default());
    }

    pub fn list(&mut self, item: Item) {
        let listing = self.listing.get_or_insert_default();
        match item.object {
            Ok(object) => drop(listing.objects.insert(item.key, object)),
            Err(error) => {
                if let Some(last_good) = self.objects.get(&item.key) {
                    listing.objects.insert(item.key.clone(), last_good.clone());
                }
                listing.complaints.insert(item.key, complaint(&error));
            }
        }
    }

    /// The listing is complete.
    pub fn end(&mut self) -> Change {
        let Listing { objects, complaints } = self.listing.take().unwrap_or_default();
        for (key, complaint) in &complaints {
            if self.complaints.get(key) != Some(complaint) {
                complain(key, complaint);
            }
        }
        for key in self.complaints.keys().filter(|key| !complaints.contains_key(*key)) {
            valid_again(key);
        }
        let Delta { upserts, deletes } = Delta::between(&self.objects, &objects);
        let is_echo = |new: &Object| self.objects.get(&new.key()).is_some_and(|old| old.is_same_to_mesh(new));
        let (echoes, upserts) = upserts.into_iter().partition(is_echo);
        (self.objects, self.complaints, self.listed) = (objects, complaints, true);
        Change { delta: Delta { upserts, deletes }, echoes }
    }

    /// An object is new or has changed; what of it Weft does not read may be all that did.
    pub fn apply(&mut self, item: Item) -> Change {
        let Item { key, object } = item;
        match object {
            Ok(object) => {
                if self.complaints.remove(&key).is_some() {
                    valid_again(&key);
                }
                let old = self.objects.insert(key, object.clone());
                match old {
                    Some(old) if old == object => Change::default(),
                    Some(old) if old.is_same_to_mesh(&object) => {
                        Change { echoes: vec![object], ..Change::default() }
                    }
                    _ => Delta { upserts: vec![object], deletes: Vec::new() }.into(),
                }
            }
            Err(error) => {
                let complaint = complaint(&error);
                if self.complaints.get(&key) != Some(&complaint) {
                    complain(&key, &complaint);
                    self.complaints.insert(key, complaint);
                }
                Change::default()
            }
        }
    }

    pub fn delete(&mut self, key: &ObjectKey) -> Change {
        self.complaints.remove(key);
        let deletes = self.objects.remove_entry(key).map(|(key, _)| key).into_iter().collect();
        Delta { upserts: Vec::new(), deletes }.into()
    }
}

impl From<Delta> for Change {
    fn from(delta: Delta) -> Self {
        Self { delta, echoes: Vec::new() }
    }
}

fn complaint(error: &FieldError) -> String {
    format!("field {}: {}; its last good version stays in force", error.path, error.message)
}

fn complain(key: &ObjectKey, complaint: &str) {
    tracing::error!(target: "source", "{key}: {complaint}");
}

fn valid_again(key: &ObjectKey) {
    tracing::info!(target: "source", "{key}: is valid again");
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use weft_api::Kind;

    use super::*;
    use crate::source::manifest::read;

    /// A pod; one with an address that is none cannot be read.
    fn pod(name: &str, ip: &str) -> Item {
        let value = json!({"metadata": {"name": name, "namespace": "shop"}, "status": {"podIP": ip}});
        let key = ObjectKey { kind: Kind::Pod, namespace: "shop".to_owned(), name: name.to_owned() };
        Item { key, object: read(Kind::Pod, &value) }
    }

    fn words(change: &Change) -> Vec<String> {
        let upserts = change.delta.upserts.iter().map(|object| match object {
            Object::Pod(pod) => format!("+{}={}", pod.metadata.name, pod.addresses()[0]),
            other => panic!("{other:?}"),
        });
        let echoes = change.echoes.iter().map(|object| format!("~{}", object.metadata().name));
        upserts.chain(echoes).chain(change.delta.deletes.iter().map(|key| format!("-{}", key.name))).collect()
    }

    fn listing(cache: &mut Cache, items: impl IntoIterator<Item = Item>) -> Vec<String> {
        cache.begin();
        items.into_iter().for_each(|item| cache.list(item));
        words(&cache.end())
    }

    #[test]
    fn follows_a_watch() {
        let mut cache = Cache::default();
        assert!(!cache.is_listed());
        assert_eq!(listing(&mut cache, [pod("a", "10.0.0.1")]), ["+a=10.0.0.1"]);
        assert!(cache.is_listed());
        assert_eq!(words(&cache.apply(pod("b", "10.0.0.2"))), ["+b=10.0.0.2"]);
        assert_eq!(words(&cache.apply(pod("b", "10.0.0.2"))), [""; 0], "nothing that Weft reads has changed");
        assert_eq!(words(&cache.apply(pod("b", "10.0.0.3"))), ["+b=10.0.0.3"]);
        assert_eq!(words(&cache.delete(&pod("b", "10.0.0.3").key)), ["-b"]);
        assert_eq!(words(&cache.delete(&pod("b", "10.0.0.3").key)), [""; 0]);
        assert_eq!(cache.objects().count(), 1);
    }

    #[test]
    fn what_weft_wrote_comes_back_as_an_echo() {
        let with_condition = |ip: &str, status: &str| {
            let condition = json!({"type": "weft.dev/Enrolled", "status": status});
            let value = json!({"metadata": {"name": "a", "namespace": "shop"},
                "status": {"podIP": ip, "conditions": [condition]}});
            Item { object: read(Kind::Pod, &value), ..pod("a", ip) }
        };
        let mut cache = Cache::default();
        listing(&mut cache, [pod("a", "10.0.0.1")]);
        assert_eq!(words(&cache.apply(with_condition("10.0.0.1", "False"))), ["~a"]);
        assert_eq!(words(&cache.apply(with_condition("10.0.0.1", "False"))), [""; 0]);
        assert_eq!(listing(&mut cache, [with_condition("10.0.0.1", "True")]), ["~a"]);
        assert_eq!(words(&cache.apply(with_condition("10.0.0.2", "False"))), ["+a=10.0.0.2"]);
    }

    #[test]
    fn what_a_new_listing_does_not_name_is_gone() {
        let mut cache = Cache::default();
        listing(&mut cache, [pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), pod("c", "10.0.0.3")]);
        let delta = listing(&mut cache, [pod("c", "10.0.0.9"), pod("a", "10.0.0.1"), pod("d", "10.0.0.4")]);
        assert_eq!(delta, ["+c=10.0.0.9", "+d=10.0.0.4", "-b"]);
        // A listing that broke off says nothing.
        cache.begin();
        cache.list(pod("a", "10.0.0.1"));
        assert_eq!(listing(&mut cache, [pod("a", "10.0.0.1"), pod("d", "10.0.0.4")]), ["-c"]);
    }

    #[test]
    fn a_malformed_object_keeps_its_last_good_version() {
        let mut cache = Cache::default();
        assert_eq!(listing(&mut cache, [pod("a", "10.0.0.1"), pod("b", "bad")]), ["+a=10.0.0.1"]);
        assert_eq!(words(&cache.apply(pod("a", "worse"))), [""; 0]);
        assert_eq!(cache.complaints(), 2);
        // Also over a new listing, where it is named.
        assert_eq!(listing(&mut cache, [pod("a", "worse")]), [""; 0]);
        assert_eq!((cache.objects().count(), cache.complaints()), (1, 1));
        assert_eq!(words(&cache.apply(pod("a", "10.0.0.1"))), [""; 0]);
        assert_eq!(cache.complaints(), 0);
        cache.apply(pod("a", "bad"));
        assert_eq!(words(&cache.delete(&pod("a", "bad").key)), ["-a"]);
        assert_eq!(cache.complaints(), 0);
    }
}
