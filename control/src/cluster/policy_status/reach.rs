//! How far in the history of policies each node has followed: the newest resourceVersion of which its agent has accepted all
//! that follows. A replica knows that of the agents on its own port. So while a policy waits for nodes, each writes it into
//! the ConfigMap `weft-policies`, where the one that leads finds that of all. It is one object for all nodes, written at most
//! once a second, because a change of one policy reaches every node.
//!
//! An agent never goes back behind what it once had, so what is written here stays true without its writer.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use weft_api::Kind;
use weft_proto::type_url;
use weft_xds::{Followers, Snapshot, VersionVector};

use crate::cluster::{ClusterError, bounded, code, metadata};

const CONFIG_MAP: &str = "weft-policies";
/// How often own agents are looked at, which costs a number of each.
const INTERVAL: Duration = Duration::from_secs(1);
/// How often the others' are read.
const LOOK: Duration = Duration::from_secs(2);
/// After a request that failed.
const RETRY: Duration = Duration::from_secs(5);
/// States that agents may still be on their way to.
const REMEMBERED: usize = 64;

/// By node.
pub type Reached = BTreeMap<String, u64>;

/// What this replica's agents follow.
#[derive(Debug, Clone)]
pub struct Served {
    pub followers: Arc<Followers>,
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What is known is in the latest snapshot.
    pub known: watch::Receiver<VersionVector>,
}

/// Which snapshot was the first with how much of the history of policies. Both grow.
#[derive(Debug, Default)]
struct History(VecDeque<(u64, u64)>);

impl History {
    fn note(&mut self, snapshot: u64, read: u64) {
        if self.0.back().is_none_or(|(_, last)| *last < read) {
            if self.0.len() == REMEMBERED {
                self.0.pop_front();
            }
            self.0.push_back((snapshot, read));
        }
    }

    fn reached(&self, snapshot: u64) -> Option<u64> {
        self.0.iter().rev().find(|(first, _)| *first <= snapshot).map(|(_, read)| *read)
    }
}

struct Reporter {
    maps: Api<ConfigMap>,
    what: String,
    served: Served,
    history: History,
    /// As the ConfigMap was last seen, and when.
    seen: watch::Sender<Arc<Reached>>,
    looked: Option<Instant>,
}

/// Writes down how far this replica's agents have followed and reads how far all have, while somebody waits for one of them.
pub async fn run(
    client: Client,
    namespace: String,
    served: Served,
    seen: watch::Sender<Arc<Reached>>,
    wanted: watch::Receiver<bool>,
) {
    let what = format!("ConfigMap {namespace}/{CONFIG_MAP}");
    let maps = Api::namespaced(client, &namespace);
    let mut reporter = Reporter { maps, what, served, history: History::default(), seen, looked: None };
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complaint = String::new();
    while !reporter.seen.is_closed() {
        ticks.tick().await;
        let wanted = *wanted.borrow();
        match reporter.look(wanted).await {
            Ok(()) => complaint.clear(),
            Err(error) => {
                let error = error.to_string();
                if complaint != error {
                    tracing::warn!(target: "status", "how far nodes have followed: {error}; trying again");
                    complaint = error;
                }
                ticks.reset_after(RETRY);
            }
        }
    }
}

impl Reporter {
    async fn look(&mut self, wanted: bool) -> Result<(), ClusterError> {
        // In this order: what is known is in every snapshot from then on.
        let read = self.served.known.borrow().get(Kind::AuthorizationPolicy.plural());
        let snapshot = self.served.snapshots.borrow().clone();
        let (Some(read), Some(snapshot)) = (read, snapshot) else { return Ok(()) };
        self.history.note(snapshot.version, read);
        if !wanted {
            return Ok(());
        }
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            let map = self.maps.get_opt(CONFIG_MAP);
            let failed = |error| ClusterError::request(&self.what, &error);
            let map = bounded(&self.what, async { map.await.map_err(failed) }).await?;
            self.saw(map.unwrap_or_default());
        }
        let news = self.news(&snapshot);
        if news.is_empty() { Ok(()) } else { self.write(news).await }
    }

    /// What is to be written: own agents that have got further, and nothing of nodes that are gone.
    fn news(&self, snapshot: &Snapshot) -> BTreeMap<String, Option<String>> {
        let seen = self.seen.borrow();
        let nodes = snapshot.shared.get(&type_url::NODE);
        let is_there = |node: &str| nodes.is_some_and(|nodes| nodes.contains_key(node));
        let own = self.served.followers.each().into_iter().filter(|(node, _)| is_there(node));
        let own = own.filter_map(|(node, version)| Some((node, self.history.reached(version)?)));
        let further = own.filter(|(node, reached)| seen.get(node).is_none_or(|seen| seen < reached));
        let gone = seen.keys().filter(|node| !is_there(node)).map(|node| (node.clone(), None));
        further.map(|(node, reached)| (node, Some(reached.to_string()))).chain(gone).collect()
    }

    async fn write(&mut self, news: BTreeMap<String, Option<String>>) -> Result<(), ClusterError> {
        let patch = json!({ "data": news });
        let write = async {
            let params = PatchParams::default();
            match self.maps.patch(CONFIG_MAP, &params, &Patch::Merge(&patch)).await {
                Err(error) if code(&error) == 404 => {
                    let data = news.into_iter().filter_map(|(node, reached)| Some((node, reached?)));
                    let data = Some(data.collect());
                    let map = ConfigMap { metadata: metadata(CONFIG_MAP), data, ..ConfigMap::default() };
                    self.maps.create(&PostParams::default(), &map).await
                }
                outcome => outcome,
            }
            .map_err(|error| ClusterError::request(&self.what, &error))
        };
        let map = bounded(&self.what, write).await?;
        self.saw(map);
        Ok(())
    }

    fn saw(&mut self, map: ConfigMap) {
        let data = map.data.unwrap_or_default();
        let reached = data.into_iter().filter_map(|(node, reached)| Some((node, reached.parse().ok()?)));
        let reached: Reached = reached.collect();
        self.looked = Some(Instant::now());
        self.seen.send_if_modified(|seen| {
            let differs = **seen != reached;
            if differs {
                *seen = Arc::new(reached);
            }
            differs
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_what_its_snapshot_had() {
        let mut history = History::default();
        assert_eq!(history.reached(9), None);
        for (snapshot, read) in [(1, 10), (1, 12), (3, 12), (4, 20)] {
            history.note(snapshot, read);
        }
        for (snapshot, reached) in [(0, None), (1, Some(12)), (3, Some(12)), (4, Some(20)), (5, Some(20))] {
            assert_eq!(history.reached(snapshot), reached, "{snapshot}");
        }
        (0..REMEMBERED as u64).for_each(|n| history.note(10 + n, 30 + n));
        assert_eq!((history.reached(9), history.reached(10)), (None, Some(30)));
    }
}
