//! One watch: kube's own, which lists, watches, goes on after a break and lists again when it must. Here its events are
//! made ours: objects are read at once, so that what Weft does not use of them is not kept.

use std::{fmt::Debug, time::Duration};

use futures_util::{Stream, StreamExt};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject, GroupVersionKind},
    runtime::{
        WatchStreamExt,
        utils::Backoff,
        watcher::{self, DefaultBackoff, watcher},
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use weft_api::{FieldError, Kind, ObjectKey};

use super::cache::Item;
use crate::{
    cluster::{
        self, WATCH_SECONDS,
        enrollment::{REMEDY, Record, api, read},
    },
    source::manifest,
};

/// How the watch of enrolled pods is called to people.
pub const ENROLLMENT: &str = "nodeenrollments.mesh.weft.dev";

/// Where kubectl keeps a copy of the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// The longest pause before a watch is tried again.
const LAST_RETRY: Duration = Duration::from_secs(2);

/// What a watch says, about things of type `T` that are known by a `K`.
#[derive(Debug)]
pub enum Event<T, K> {
    /// Everything there is follows, up to `End`.
    Begin,
    Listed(T),
    End,
    Applied(T),
    Deleted(K),
    /// There is no such kind.
    Missing,
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
        /// As [`cluster::passes`] has it.
        passes: bool,
    },
    /// Said with every sign of life.
    Working {
        what: &'static str,
    },
}

/// Watches a kind until nobody listens.
pub async fn objects(client: Client, kind: Kind, told: mpsc::Sender<Told>) {
    let (group, version) = kind.api_version().rsplit_once('/').unwrap_or(("", kind.api_version()));
    let gvk = GroupVersionKind::gvk(group, version, kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural());
    let api: Api<DynamicObject> = Api::all_with(client, &resource);
    let mut watch = Box::pin(watch_stream(api, watcher::Config::default()));
    while let Some(event) = watch.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if kind.is_optional() && is_missing(&error) {
                    if told.send(Told::Objects { kind, event: Event::Missing }).await.is_err() {
                        return;
                    }
                } else if !broken(&told, kind.plural(), &error).await {
                    return;
                }
                continue;
            }
        };
        let event = match event {
            watcher::Event::Init => Event::Begin,
            watcher::Event::InitApply(object) => Event::Listed(item(kind, object)),
            watcher::Event::InitDone => Event::End,
            watcher::Event::Apply(object) => Event::Applied(item(kind, object)),
            watcher::Event::Delete(object) => Event::Deleted(key(kind, &object)),
        };
        // Init is said before the API server has been asked.
        let works = !matches!(event, Event::Begin);
        if works && told.send(Told::Working { what: kind.plural() }).await.is_err() {
            return;
        }
        if told.send(Told::Objects { kind, event }).await.is_err() {
            return;
        }
    }
}

/// Watches who is enrolled, until nobody listens.
pub async fn enrollment(client: Client, told: mpsc::Sender<Told>) {
    let objects = api(client);
    while list_and_watch(&objects, &told).await.is_some() {}
}

/// One watch of who is enrolled. A listing with a NodeEnrollment that cannot be understood does not count: to start on it
/// would announce that node's pods as plaintext. So it is listed again when something changes. None when nobody listens.
async fn list_and_watch(objects: &Api<DynamicObject>, told: &mpsc::Sender<Told>) -> Option<()> {
    let mut watch = Box::pin(watch_stream(objects.clone(), watcher::Config::default()));
    let mut unreadable = false;
    while let Some(event) = watch.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) if is_missing(&error) => {
                let why = REMEDY.to_owned();
                told.send(Told::Broken { what: ENROLLMENT, why, passes: false }).await.ok()?;
                continue;
            }
            Err(error) => {
                broken(told, ENROLLMENT, &error).await.then_some(())?;
                continue;
            }
        };
        let event = match event {
            watcher::Event::Init => {
                unreadable = false;
                Event::Begin
            }
            watcher::Event::InitApply(object) => match record(told, &object).await? {
                Some(record) => Event::Listed(record),
                None => {
                    unreadable = true;
                    continue;
                }
            },
            watcher::Event::InitDone if unreadable => continue,
            watcher::Event::InitDone => Event::End,
            watcher::Event::Apply(_) | watcher::Event::Delete(_) if unreadable => return Some(()),
            watcher::Event::Apply(object) => match record(told, &object).await? {
                Some(record) => Event::Applied(record),
                None => continue,
            },
            watcher::Event::Delete(object) => Event::Deleted(object.name_any()),
        };
        if !unreadable && !matches!(event, Event::Begin) {
            told.send(Told::Working { what: ENROLLMENT }).await.ok()?;
        }
        told.send(Told::Enrollment(event)).await.ok()?;
    }
    Some(())
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

fn watch_stream<K>(
    api: Api<K>,
    config: watcher::Config,
) -> impl Stream<Item = watcher::Result<watcher::Event<K>>>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api, config.timeout(WATCH_SECONDS)).backoff(Impatient::default())
}

/// kube's own backoff up to a few seconds. It would grow to a minute, which after a restart of the API server would be a
/// minute in which pods cannot start.
#[derive(Default)]
struct Impatient(DefaultBackoff);

impl Iterator for Impatient {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LAST_RETRY))
    }
}

impl Backoff for Impatient {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Says that a watch is broken, unless all that happened is that it was too old to go on and is listing anew.
async fn broken(told: &mpsc::Sender<Told>, what: &'static str, error: &watcher::Error) -> bool {
    let (why, passes) = match error {
        watcher::Error::WatchError(status) if status.code == 410 => return true,
        watcher::Error::WatchError(status) => (status.message.clone(), cluster::passes(status.code)),
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => {
            (cluster::words(error), cluster::passes(cluster::code(error)))
        }
        other => (other.to_string(), false),
    };
    told.send(Told::Broken { what, why, passes }).await.is_ok()
}

fn is_missing(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(error) if cluster::code(error) == 404)
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
