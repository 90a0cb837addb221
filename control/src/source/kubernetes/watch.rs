//! What is watched: a kind of object that Weft reads, or who is enrolled. Objects are read at once, so that what Weft does
//! not use of them is not kept. How a watch goes on is in [`super::list_watch`].

use std::sync::Arc;

use kube::{
    Api, Client, ResourceExt,
    api::{ApiResource, DynamicObject, GroupVersionKind},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use weft_api::{FieldError, Kind, ObjectKey};

use super::{
    cache::Item,
    list_watch::{Asks, Failure, ListWatch, Next},
};
use crate::{
    cluster::enrollment::{ENROLLMENT, REMEDY, Record, api, read},
    source::manifest,
};

/// Where kubectl keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What a watch says, about things of type `T` that are known by a `K`. The numbers are resourceVersions, up to which
/// everything has been said.
#[derive(Debug)]
pub enum Event<T, K> {
    /// Everything there is follows, up to `End`.
    Begin,
    Listed(T),
    /// With whether the list was asked for.
    End(u64, bool),
    Applied(T, u64),
    Deleted(K, u64),
    Nothing(u64),
    /// There is no such kind.
    Missing,
}

impl<T, K> Event<T, K> {
    /// Up to where everything has been said with it.
    pub fn version(&self) -> Option<u64> {
        match self {
            Self::End(version, _) | Self::Nothing(version) => Some(*version),
            Self::Applied(_, version) | Self::Deleted(_, version) => Some(*version),
            Self::Begin | Self::Listed(_) | Self::Missing => None,
        }
    }

    pub fn ends_list(&self) -> bool {
        matches!(self, Self::End(..))
    }

    /// Whether it ends a list that somebody asked for.
    pub fn was_asked(&self) -> bool {
        matches!(self, Self::End(_, true))
    }
}

#[derive(Debug)]
pub enum Told {
    Objects {
        kind: Kind,
        event: Event<Item, ObjectKey>,
    },
    Enrollment(Event<(String, Record), String>),
    Broken {
        what: &'static str,
        why: String,
        /// As [`crate::cluster::passes`] has it.
        passes: bool,
    },
    /// Said with every sign of life.
    Working {
        what: &'static str,
    },
}

/// Watches a kind until nobody listens. Does what is asked of it meanwhile.
pub async fn objects(client: Client, kind: Kind, asks: Arc<Asks>, told: mpsc::Sender<Told>) {
    let (group, version) = kind.api_version().rsplit_once('/').unwrap_or(("", kind.api_version()));
    let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural());
    let mut watch = ListWatch::new(Api::all_with(client, &resource), asks);
    loop {
        let event = match watch.next().await {
            Ok(Next::Begin) => Event::Begin,
            Ok(Next::Listed(object)) => Event::Listed(item(kind, object)),
            Ok(Next::End { version, asked }) => Event::End(version, asked),
            Ok(Next::Applied(object, version)) => Event::Applied(item(kind, object), version),
            Ok(Next::Deleted(object, version)) => Event::Deleted(key(kind, &object), version),
            Ok(Next::Nothing(version)) => Event::Nothing(version),
            Err(Failure::Missing) if kind.is_optional() => Event::Missing,
            Err(failure) => {
                let broken = broken(kind.plural(), &failure);
                if told.send(broken).await.is_err() {
                    return;
                }
                continue;
            }
        };
        let works = !matches!(event, Event::Missing);
        if works && told.send(Told::Working { what: kind.plural() }).await.is_err() {
            return;
        }
        if told.send(Told::Objects { kind, event }).await.is_err() {
            return;
        }
    }
}

/// Watches who is enrolled, until nobody listens. Does what is asked of it meanwhile.
pub async fn enrollment(client: Client, asks: Arc<Asks>, told: mpsc::Sender<Told>) {
    let objects = api(client);
    while list_and_watch(&objects, &asks, &told).await.is_some() {}
}

/// One watch of who is enrolled. A listing with a NodeEnrollment that cannot be understood does not count: to start on it
/// would announce that node's pods as plaintext. So it is listed again when something changes. None when nobody listens.
async fn list_and_watch(
    objects: &Api<DynamicObject>,
    asks: &Arc<Asks>,
    told: &mpsc::Sender<Told>,
) -> Option<()> {
    let mut watch = ListWatch::new(objects.clone(), asks.clone());
    let mut unreadable = false;
    loop {
        let event = match watch.next().await {
            Ok(Next::Begin) => {
                unreadable = false;
                Event::Begin
            }
            Ok(Next::Listed(object)) => match record(told, &object).await? {
                Some(record) => Event::Listed(record),
                None => {
                    unreadable = true;
                    continue;
                }
            },
            Ok(Next::End { .. } | Next::Nothing(_)) if unreadable => continue,
            Ok(Next::Applied(..) | Next::Deleted(..)) if unreadable => return Some(()),
            Ok(Next::End { version, asked }) => Event::End(version, asked),
            Ok(Next::Nothing(version)) => Event::Nothing(version),
            Ok(Next::Applied(object, version)) => match record(told, &object).await? {
                Some(record) => Event::Applied(record, version),
                // Its last good version stays in force.
                None => Event::Nothing(version),
            },
            Ok(Next::Deleted(object, version)) => Event::Deleted(object.name_any(), version),
            Err(Failure::Missing) => {
                let why = REMEDY.to_owned();
                told.send(Told::Broken { what: ENROLLMENT, why, passes: false }).await.ok()?;
                continue;
            }
            Err(failure) => {
                told.send(broken(ENROLLMENT, &failure)).await.ok()?;
                continue;
            }
        };
        if !unreadable && !matches!(event, Event::Begin) {
            told.send(Told::Working { what: ENROLLMENT }).await.ok()?;
        }
        told.send(Told::Enrollment(event)).await.ok()?;
    }
}

/// What a NodeEnrollment says; None, with a complaint, if it cannot be understood. The outer None is: nobody listens.
async fn record(told: &mpsc::Sender<Told>, object: &DynamicObject) -> Option<Option<(String, Record)>> {
    match read(object) {
        Ok(record) => Some(Some(record)),
        Err(error) => {
            let why = format!("{error}; if it cannot be mended, delete it");
            told.send(Told::Broken { what: ENROLLMENT, why, passes: false }).await.ok()?;
            Some(None)
        }
    }
}

fn broken(what: &'static str, failure: &Failure) -> Told {
    Told::Broken { what, why: failure.to_string(), passes: failure.passes() }
}

fn key(kind: Kind, object: &DynamicObject) -> ObjectKey {
    ObjectKey { kind, namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// Reads an object; what Weft does not use of it ends here.
fn item(kind: Kind, mut object: DynamicObject) -> Item {
    let key = key(kind, &object);
    object.metadata.managed_fields = None;
    if let Some(annotations) = &mut object.metadata.annotations {
        annotations.remove(LAST_APPLIED);
    }
    let metadata = serde_json::to_value(&object.metadata).unwrap_or_default();
    let object = match object.data {
        Value::Object(mut fields) => {
            fields.insert("metadata".to_owned(), metadata);
            manifest::read(kind, &Value::Object(fields))
        }
        Value::Null => manifest::read(kind, &json!({ "metadata": metadata })),
        _ => Err(FieldError { path: ".".to_owned(), message: "is no object".to_owned() }),
    };
    Item { key, object }
}
