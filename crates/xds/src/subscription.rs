//! One type on one stream of the server: what the client asked for, what it has, and what it is to be sent next. Pure;
//! the stream around it is in `server`.

use std::collections::BTreeSet;

use bytes::Bytes;
use imbl::ordmap::DiffItem;
use weft_proto::discovery::DeltaDiscoveryRequest;

use crate::{Resources, Version};

const WILDCARD: &str = "*";

/// What the client asked for and where it stands.
#[derive(Debug, Default)]
pub(crate) struct Subscription {
    /// Every resource of the type.
    wildcard: bool,
    /// Resources asked for by name.
    names: BTreeSet<String>,
    /// What the client has: what it accepted, or said at the start of the stream that it kept. Of the latter only the
    /// versions are known, so compare versions, never contents.
    held: Resources,
    /// Sent and not yet answered.
    in_flight: Option<InFlight>,
    /// What the client would have had if it had not rejected the last response. Not offered again until it changes.
    rejected: Option<Resources>,
    /// To be part of the next response even if unchanged: the client asked for these by name, and gets an answer also
    /// about those which do not exist.
    asked: BTreeSet<String>,
    /// The client has nothing yet and waits to hear that it is in sync, if only by an empty response.
    must_answer: bool,
    /// The newest snapshot of which the client has all it asked for.
    accepted: u64,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    /// The snapshot that the response was made from.
    snapshot: u64,
    /// What the client has once it accepts.
    after: Resources,
}

/// What is to be done about one type.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The client has, or is being sent, all there is.
    Idle,
    /// There is news, but an earlier response is unanswered.
    Blocked,
    /// One response.
    Send {
        upserts: Vec<(String, Version, Bytes)>,
        removed: Vec<String>,
        /// What `upserts` are if they are all there is to be had, for a client that had nothing.
        whole: Option<Resources>,
    },
}

/// What a request said about the last response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Nothing, or something about a response long answered.
    None,
    Ack,
    /// With the client's reason.
    Nack(String),
}

impl Subscription {
    /// From the first request of a type on a stream.
    pub(crate) fn new(request: DeltaDiscoveryRequest) -> Subscription {
        let mut subscription = Subscription::default();
        let kept = request.initial_resource_versions;
        subscription.must_answer = kept.is_empty();
        // Naming nothing at first means everything.
        subscription.wildcard = request.resource_names_subscribe.is_empty();
        subscription.held =
            kept.into_iter().map(|(name, version)| (name, (version.into(), Bytes::new()))).collect();
        subscription.change(request.resource_names_subscribe, Vec::new());
        // The client has these already; the difference tells whether they are still right.
        let held = &subscription.held;
        subscription.asked.retain(|name| !held.contains_key(name));
        subscription.forget_unsubscribed();
        subscription
    }

    /// A further request.
    pub(crate) fn update(&mut self, request: DeltaDiscoveryRequest) -> Answer {
        let answered = self.in_flight.take_if(|flight| flight.nonce == request.response_nonce);
        let answer = match (answered, request.error_detail) {
            (None, _) => Answer::None,
            (Some(flight), None) => {
                self.held = flight.after;
                self.accepted = flight.snapshot;
                Answer::Ack
            }
            (Some(flight), Some(why)) => {
                self.rejected = Some(flight.after);
                Answer::Nack(why.message)
            }
        };
        self.change(request.resource_names_subscribe, request.resource_names_unsubscribe);
        answer
    }

    /// The newest snapshot of which the client has accepted all it asked for; 0 for none.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Number of resources asked for by name.
    pub(crate) fn names(&self) -> usize {
        self.names.len()
    }

    /// Decides what the client is to be sent now that `view`, of that snapshot, is what it should see. A response to be sent
    /// counts as in flight under `nonce` from here on.
    pub(crate) fn advance(&mut self, view: &Resources, snapshot: u64, nonce: &str) -> Next {
        let target = self.target(view);
        if let Some(flight) = &self.in_flight {
            let news = !self.asked.is_empty() || differ(&flight.after, &target);
            return if news { Next::Blocked } else { Next::Idle };
        }
        if let Some(rejected) = &self.rejected
            && self.asked.is_empty()
            && !differ(rejected, &target)
        {
            return Next::Idle;
        }
        let mut upserts = Vec::new();
        let mut removed = Vec::new();
        for item in self.held.diff(&target) {
            match item {
                DiffItem::Add(name, (version, value)) => {
                    upserts.push((name.clone(), version.clone(), value.clone()))
                }
                DiffItem::Update { old: (_, (old, _)), new: (name, (version, value)) } if old != version => {
                    upserts.push((name.clone(), version.clone(), value.clone()));
                }
                DiffItem::Update { .. } => {}
                DiffItem::Remove(name, _) => removed.push(name.clone()),
            }
        }
        for name in std::mem::take(&mut self.asked) {
            let had = self.held.get(&name).map(|(version, _)| version);
            match target.get(&name) {
                Some((version, value)) if had == Some(version) => {
                    upserts.push((name, version.clone(), value.clone()))
                }
                None if had.is_none() => removed.push(name),
                // Part of the difference.
                _ => {}
            }
        }
        self.rejected = None;
        if upserts.is_empty() && removed.is_empty() && !self.must_answer {
            // Same versions, but shared with the snapshots to come, so that the next comparison is short.
            self.held = target;
            self.accepted = snapshot;
            return Next::Idle;
        }
        self.must_answer = false;
        let whole = self.held.is_empty().then(|| target.clone());
        self.in_flight = Some(InFlight { nonce: nonce.to_owned(), snapshot, after: target });
        Next::Send { upserts, removed, whole }
    }

    fn change(&mut self, subscribe: Vec<String>, unsubscribe: Vec<String>) {
        for name in subscribe {
            if name == WILDCARD {
                self.wildcard = true;
            } else {
                self.asked.insert(name.clone());
                self.names.insert(name);
            }
        }
        let unsubscribed = !unsubscribe.is_empty();
        for name in unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.asked.remove(&name);
                self.names.remove(&name);
                // The client cannot know whether the wildcard still covers it, so it is told.
                if self.wildcard {
                    self.asked.insert(name);
                }
            }
        }
        if unsubscribed {
            self.forget_unsubscribed();
        }
    }

    /// A client drops what it no longer asks for by itself: it is not told of a removal.
    fn forget_unsubscribed(&mut self) {
        if self.wildcard {
            return;
        }
        let names = &self.names;
        let after = self.in_flight.as_mut().map(|flight| &mut flight.after);
        for map in [Some(&mut self.held), after, self.rejected.as_mut()].into_iter().flatten() {
            *map = only(map, names);
        }
        self.asked.retain(|name| names.contains(name));
    }

    fn target(&self, view: &Resources) -> Resources {
        if self.wildcard { view.clone() } else { only(view, &self.names) }
    }
}

fn only(map: &Resources, names: &BTreeSet<String>) -> Resources {
    names.iter().filter_map(|name| map.get(name).map(|entry| (name.clone(), entry.clone()))).collect()
}

fn differ(old: &Resources, new: &Resources) -> bool {
    old.diff(new).any(|item| match item {
        DiffItem::Update { old: (_, (old, _)), new: (_, (new, _)) } => old != new,
        DiffItem::Add(..) | DiffItem::Remove(..) => true,
    })
}
