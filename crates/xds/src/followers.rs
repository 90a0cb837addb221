//! How far agents have followed: for every open stream, the newest snapshot of which its client has accepted everything. What
//! an agent accepted is in force there, so by this it is known where a change has arrived.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::NodeName;

/// The open streams, by node. A node that opens another one is known by the newest.
#[derive(Debug, Default)]
pub struct Followers(Mutex<BTreeMap<NodeName, Arc<AtomicU64>>>);

impl Followers {
    /// Each node with the [`crate::Snapshot::version`] up to which it has followed; 0 for one that has nothing yet.
    pub fn each(&self) -> Vec<(NodeName, u64)> {
        let streams = self.streams();
        streams.iter().map(|(node, version)| (node.clone(), version.load(Ordering::Relaxed))).collect()
    }

    pub(crate) fn join(self: &Arc<Self>, node: &str) -> Follower {
        let version = Arc::new(AtomicU64::new(0));
        self.streams().insert(node.to_owned(), version.clone());
        Follower { all: self.clone(), node: node.to_owned(), version }
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<NodeName, Arc<AtomicU64>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream.
pub(crate) struct Follower {
    all: Arc<Followers>,
    node: NodeName,
    version: Arc<AtomicU64>,
}

impl Follower {
    /// Its client has accepted everything of this snapshot.
    pub(crate) fn has(&self, version: u64) {
        self.version.store(version, Ordering::Relaxed);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut streams = self.all.streams();
        if streams.get(&self.node).is_some_and(|version| Arc::ptr_eq(version, &self.version)) {
            streams.remove(&self.node);
        }
    }
}
