//! A cluster's API server as a source: one watch for each kind that Weft reads, and one for the NodeEnrollments, which say
//! who is enrolled. Nothing is passed on before every one of them has listed what there is, since half a mesh reads as an
//! order to leave it. A watch that breaks is taken up where it was, or by a new listing that is compared with what was
//! known ([`cache`]); meanwhile what was last known stays in force.
//!
//! With everything that is passed on goes how far each kind has been read, as resourceVersions ([`News`]): by that replicas
//! and agents know who is behind whom. A kind that somebody has seen more of is listed anew ([`demand`]).
//!
//! A kind more is a line in `weft_api::Kind`.

mod cache;
mod demand;
mod list_watch;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use kube::Client;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use weft_api::{Kind, Object, labels::MESH};
use weft_xds::VersionVector;

use self::{
    cache::{Cache, Change},
    demand::Demand,
    watch::{Event, Told},
};
use super::{Delta, News};
use crate::{
    cluster::{
        enrollment::{ENROLLMENT, Heard, Record},
        status,
    },
    controller::Input,
    metrics::Metrics,
};

/// Events that wait to be taken in. Full, it makes the watches wait.
const QUEUE: usize = 256;
/// How often is said what a start still waits for.
const REMINDER: Duration = Duration::from_secs(10);

/// Watches until the controller is gone. `statuses` is told the same, and what the controller has no use for: what Weft
/// itself wrote on objects. `wanted` says how far others have read.
pub async fn run(
    client: Client,
    mesh_enabled: bool,
    inputs: mpsc::Sender<Input>,
    statuses: mpsc::Sender<status::Input>,
    wanted: mpsc::Receiver<VersionVector>,
    metrics: Metrics,
) {
    let (sender, mut events) = mpsc::channel(QUEUE);
    let mut demand = Demand::new(wanted);
    for kind in Kind::ALL {
        tokio::spawn(watch::objects(client.clone(), kind, demand.asks(kind.plural()), sender.clone()));
    }
    tokio::spawn(watch::enrollment(client, demand.asks(ENROLLMENT), sender));
    let mut source = Source::new(mesh_enabled, inputs, statuses, metrics);
    let mut reminder = interval(REMINDER);
    reminder.set_missed_tick_behavior(MissedTickBehavior::Delay);
    reminder.tick().await;
    loop {
        let alive = tokio::select! {
            told = events.recv() => match told {
                Some(told) => source.take(told, &demand).await,
                None => return,
            },
            () = demand.due() => {
                demand.ask(&source.known);
                true
            }
            _ = reminder.tick(), if !source.open => {
                source.remind();
                true
            }
        };
        if !alive {
            return;
        }
    }
}

struct Source {
    /// Otherwise labels that want pods in the mesh are overlooked.
    mesh_enabled: bool,
    caches: HashMap<Kind, Cache>,
    records: Records,
    /// What is wrong with a watch now, by what it watches.
    broken: BTreeMap<&'static str, String>,
    /// Everything has been listed once, and passed on.
    open: bool,
    /// Up to where each kind has been read, and where something in it last changed.
    known: VersionVector,
    content: VersionVector,
    inputs: mpsc::Sender<Input>,
    statuses: mpsc::Sender<status::Input>,
    metrics: Metrics,
}

/// The object without the label that wants it, or the pods of it, in the mesh.
fn unlabelled(mut item: cache::Item) -> cache::Item {
    match &mut item.object {
        Ok(Object::Namespace(namespace)) => drop(Arc::make_mut(namespace).metadata.labels.remove(MESH)),
        Ok(Object::Pod(pod)) => drop(Arc::make_mut(pod).metadata.labels.remove(MESH)),
        _ => {}
    }
    item
}

/// The NodeEnrollments, by node.
#[derive(Debug, Default)]
struct Records {
    known: BTreeMap<String, Record>,
    listing: BTreeMap<String, Record>,
    listed: bool,
}

impl Source {
    fn new(
        mesh_enabled: bool,
        inputs: mpsc::Sender<Input>,
        statuses: mpsc::Sender<status::Input>,
        metrics: Metrics,
    ) -> Self {
        Self {
            mesh_enabled,
            caches: Kind::ALL.map(|kind| (kind, Cache::default())).into(),
            records: Records::default(),
            broken: BTreeMap::new(),
            open: false,
            known: VersionVector::default(),
            content: VersionVector::default(),
            inputs,
            statuses,
            metrics,
        }
    }

    /// Takes in one event and passes on what follows. False when nobody listens any more.
    async fn take(&mut self, told: Told, demand: &Demand) -> bool {
        // A list that was asked for, and whether it told what the watch had not.
        let (newest, missed);
        let (change, heard) = match told {
            Told::Broken { what, why, passes } => {
                if self.broken.get(what) != Some(&why) {
                    match passes {
                        true => tracing::warn!(target: "source", "cannot watch {what}: {why}; trying again"),
                        false => {
                            tracing::error!(target: "source", "cannot watch {what}: {why}; trying again")
                        }
                    }
                    self.broken.insert(what, why);
                }
                return true;
            }
            Told::Working { what } => {
                if self.broken.remove(what).is_some() {
                    tracing::info!(target: "source", "watching {what} again");
                }
                return true;
            }
            Told::Objects { kind, event } => {
                let (what, version, list) = (kind.plural(), event.version(), event.ends_list());
                newest = version.filter(|_| event.was_asked()).map(|version| (what, version));
                // What is there when it is first listed may be the outcome of changes up to then.
                let first = list && !self.caches[&kind].is_listed();
                let change = self.objects(kind, event);
                self.read(what, version, first || !change.delta.is_empty());
                missed = !change.delta.is_empty();
                (change, Vec::new())
            }
            Told::Enrollment(event) => {
                let (version, list) = (event.version(), event.ends_list());
                newest = version.filter(|_| event.was_asked()).map(|version| (ENROLLMENT, version));
                let first = list && !self.records.listed;
                let heard = self.enrollment(event);
                self.read(ENROLLMENT, version, first || !heard.is_empty());
                missed = !heard.is_empty();
                (Change::default(), heard)
            }
        };
        if let Some((what, version)) = newest {
            demand.answered(what, version, missed);
        }
        let complaints: usize = self.caches.values().map(Cache::complaints).sum();
        self.metrics.source_complaints.set(complaints as i64);
        if self.open { self.send(heard, change, newest).await } else { self.try_open().await }
    }

    /// Everything of a kind has been told up to `version`.
    fn read(&mut self, what: &'static str, version: Option<u64>, changed: bool) {
        let Some(version) = version else { return };
        // It may have been one that was not there.
        self.known.lower(what, version);
        self.known.raise(what, version);
        if changed {
            self.content.raise(what, version);
        }
    }

    fn objects(&mut self, kind: Kind, event: Event<cache::Item, weft_api::ObjectKey>) -> Change {
        let cache = self.caches.entry(kind).or_default();
        let read = |item| if self.mesh_enabled { item } else { unlabelled(item) };
        match event {
            Event::Begin => cache.begin(),
            Event::Listed(item) => cache.list(read(item)),
            Event::End(..) => return cache.end(),
            Event::Applied(item, _) => return cache.apply(read(item)),
            Event::Deleted(key, _) => return cache.delete(&key),
            Event::Nothing(_) => {}
            // The kind does not exist there. That it once did and is gone now is not believed without a listing.
            Event::Missing if !cache.is_listed() => {
                tracing::info!(
                    target: "source",
                    "the API server has no {} {}; going on without", kind.api_version(), kind.as_str()
                );
                cache.begin();
                // Whoever has seen more of it saw what is not there any more.
                self.known.raise(kind.plural(), u64::MAX);
                return cache.end();
            }
            Event::Missing => {}
        }
        Change::default()
    }

    fn enrollment(&mut self, event: Event<(String, Record), String>) -> Vec<Heard> {
        let records = &mut self.records;
        match event {
            Event::Begin => records.listing.clear(),
            Event::Listed((node, record)) => drop(records.listing.insert(node, record)),
            Event::End(..) => {
                let listing = std::mem::take(&mut records.listing);
                let gone = records.known.keys().filter(|node| !listing.contains_key(*node));
                let gone = gone.map(|node| Heard { node: node.clone(), record: None });
                let changed =
                    listing.iter().filter(|(node, record)| records.known.get(*node) != Some(*record));
                let changed =
                    changed.map(|(node, record)| Heard { node: node.clone(), record: Some(record.clone()) });
                let heard = gone.chain(changed).collect();
                (records.known, records.listed) = (listing, true);
                return heard;
            }
            Event::Applied((node, record), _) => {
                records.known.insert(node.clone(), record.clone());
                return vec![Heard { node, record: Some(record) }];
            }
            Event::Deleted(node, _) => {
                records.known.remove(&node);
                return vec![Heard { node, record: None }];
            }
            Event::Nothing(_) | Event::Missing => {}
        }
        Vec::new()
    }

    /// Passes on everything at once, when everything has been listed: who is enrolled first.
    async fn try_open(&mut self) -> bool {
        if !self.waiting().is_empty() {
            return true;
        }
        self.open = true;
        let heard = self.records.known.iter();
        let heard = heard.map(|(node, record)| Heard { node: node.clone(), record: Some(record.clone()) });
        let heard = heard.collect();
        let mut objects = Delta::default();
        for kind in Kind::ALL {
            objects.upserts.extend(self.caches[&kind].objects().cloned());
        }
        tracing::info!(target: "source", objects = objects.upserts.len(), "everything is listed");
        self.send(heard, objects.into(), None).await
    }

    /// What has not been listed yet.
    fn waiting(&self) -> Vec<&'static str> {
        let kinds = Kind::ALL.into_iter().filter(|kind| !self.caches[kind].is_listed()).map(Kind::plural);
        kinds.chain((!self.records.listed).then_some(ENROLLMENT)).collect()
    }

    fn remind(&self) {
        let waiting = self.waiting().into_iter().map(|what| match self.broken.get(what) {
            Some(why) => format!("{what} ({why})"),
            None => what.to_owned(),
        });
        let waiting = waiting.collect::<Vec<_>>().join(", ");
        tracing::error!(target: "source", "nothing is served yet: waiting for the list of {waiting}");
    }

    async fn send(
        &self,
        heard: Vec<Heard>,
        Change { delta, echoes }: Change,
        newest: Option<(&'static str, u64)>,
    ) -> bool {
        let upserts = delta.upserts.iter().cloned().chain(echoes).collect();
        let objects = status::Input::Objects {
            delta: Delta { upserts, deletes: delta.deletes.clone() },
            policies_read: self.known.get(Kind::AuthorizationPolicy.plural()),
        };
        for status in heard.iter().cloned().map(status::Input::Enrollment).chain([objects]) {
            // It may have ended before this source, in a shutdown.
            let _ = self.statuses.send(status).await;
        }
        let (known, content) = (self.known.clone(), self.content.clone());
        let news = News { heard, delta, known, content, newest };
        self.inputs.send(Input::News(news)).await.is_ok()
    }
}
