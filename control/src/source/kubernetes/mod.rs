//! A cluster's API server as a source: one watch for each kind that Weft reads, and one for the NodeEnrollments, which say
//! who is enrolled. Nothing is passed on before every one of them has listed what there is, since half a mesh reads as an
//! order to leave it. A watch that breaks is taken up where it was, or by a new listing that is compared with what was
//! known ([`cache`]); meanwhile what was last known stays in force.
//!
//! A kind more is a line in `weft_api::Kind`.

mod cache;
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

use self::{
    cache::{Cache, Change},
    watch::{Event, Told},
};
use super::Delta;
use crate::{
    cluster::{
        enrollment::{Heard, Record},
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
/// itself wrote on objects.
pub async fn run(
    client: Client,
    mesh_enabled: bool,
    inputs: mpsc::Sender<Input>,
    statuses: mpsc::Sender<status::Input>,
    metrics: Metrics,
) {
    let (sender, mut events) = mpsc::channel(QUEUE);
    for kind in Kind::ALL {
        tokio::spawn(watch::objects(client.clone(), kind, sender.clone()));
    }
    tokio::spawn(watch::enrollment(client, sender));
    let mut source = Source::new(mesh_enabled, inputs, statuses, metrics);
    let mut reminder = interval(REMINDER);
    reminder.set_missed_tick_behavior(MissedTickBehavior::Delay);
    reminder.tick().await;
    loop {
        let alive = tokio::select! {
            told = events.recv() => match told {
                Some(told) => source.take(told).await,
                None => return,
            },
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
            inputs,
            statuses,
            metrics,
        }
    }

    /// Takes in one event and passes on what follows. False when nobody listens any more.
    async fn take(&mut self, told: Told) -> bool {
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
            Told::Objects { kind, event } => (self.objects(kind, event), Vec::new()),
            Told::Enrollment(event) => (Change::default(), self.enrollment(event)),
        };
        let complaints: usize = self.caches.values().map(Cache::complaints).sum();
        self.metrics.source_complaints.set(complaints as i64);
        if self.open { self.send(heard, change).await } else { self.try_open().await }
    }

    fn objects(&mut self, kind: Kind, event: Event<cache::Item, weft_api::ObjectKey>) -> Change {
        let cache = self.caches.entry(kind).or_default();
        let read = |item| if self.mesh_enabled { item } else { unlabelled(item) };
        match event {
            Event::Begin => cache.begin(),
            Event::Listed(item) => cache.list(read(item)),
            Event::End => return cache.end(),
            Event::Applied(item) => return cache.apply(read(item)),
            Event::Deleted(key) => return cache.delete(&key),
            // The kind does not exist there. That it once did and is gone now is not believed without a listing.
            Event::Missing if !cache.is_listed() => {
                tracing::info!(
                    target: "source",
                    "the API server has no {} {}; going on without", kind.api_version(), kind.as_str()
                );
                cache.begin();
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
            Event::End => {
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
            Event::Applied((node, record)) => {
                records.known.insert(node.clone(), record.clone());
                return vec![Heard { node, record: Some(record) }];
            }
            Event::Deleted(node) => {
                records.known.remove(&node);
                return vec![Heard { node, record: None }];
            }
            Event::Missing => {}
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
        self.send(heard, objects.into()).await
    }

    /// What has not been listed yet.
    fn waiting(&self) -> Vec<&'static str> {
        let kinds = Kind::ALL.into_iter().filter(|kind| !self.caches[kind].is_listed()).map(Kind::plural);
        kinds.chain((!self.records.listed).then_some(watch::ENROLLMENT)).collect()
    }

    fn remind(&self) {
        let waiting = self.waiting().into_iter().map(|what| match self.broken.get(what) {
            Some(why) => format!("{what} ({why})"),
            None => what.to_owned(),
        });
        let waiting = waiting.collect::<Vec<_>>().join(", ");
        tracing::error!(target: "source", "nothing is served yet: waiting for the list of {waiting}");
    }

    /// Who is enrolled goes first.
    async fn send(&self, heard: Vec<Heard>, Change { delta, echoes }: Change) -> bool {
        let mut inputs = Vec::new();
        let mut statuses = Vec::new();
        for heard in heard {
            statuses.push(status::Input::Enrollment(heard.clone()));
            inputs.push(Input::Enrollment(heard));
        }
        let upserts = delta.upserts.iter().cloned().chain(echoes).collect();
        statuses.push(status::Input::Objects(Delta { upserts, deletes: delta.deletes.clone() }));
        if !delta.is_empty() {
            inputs.push(Input::Objects(delta));
        }
        for status in statuses {
            // It may have ended before this source, in a shutdown.
            let _ = self.statuses.send(status).await;
        }
        for input in inputs {
            if self.inputs.send(input).await.is_err() {
                return false;
            }
        }
        true
    }
}
