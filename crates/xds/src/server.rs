//! The server's streams: each is a state machine of its own that ends with its connection, pulls from the latest
//! snapshot when the client can take more, and so costs other streams nothing however slow its client is.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::metadata::MetadataMap;
use tonic::{Request, Status, Streaming};
use tracing::{debug, info, warn};
use weft_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

use crate::followers::{Follower, Followers};
use crate::order::TypeKey;
use crate::subscription::{Answer, Next, Subscription};
use crate::wire::{Decided, Pieces, Service, Whole};
use crate::{KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, Progress, Snapshot};

/// Types one stream may ask for. Weft has a handful; a peer could make up any number.
const MAX_TYPES: usize = 32;
/// Resources one stream may ask for by name, per type.
const MAX_NAMES: usize = 1 << 20;

/// Name of a node, as its token proves it.
pub type NodeName = String;

/// What an [`Authenticate`] answers, in time.
pub type Authentication = Pin<Box<dyn Future<Output = Result<NodeName, Status>> + Send>>;

/// Says which node is calling, from the metadata of the call (`authorization`), or refuses it. Run for every stream;
/// somebody else may have to be asked.
pub type Authenticate = Arc<dyn Fn(&MetadataMap) -> Authentication + Send + Sync>;

/// A delta ADS server for whatever snapshots it is given.
pub struct Server {
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    progress: Progress,
    authenticate: Authenticate,
    whole: Arc<Whole>,
    stats: Arc<Stats>,
    followers: Arc<Followers>,
}

/// What the server counts, for the controller's metrics.
#[derive(Debug, Default)]
pub struct Stats {
    streams: AtomicU64,
    responses: AtomicU64,
    acks: AtomicU64,
    nacks: AtomicU64,
    refused: AtomicU64,
    behind: AtomicU64,
}

impl Stats {
    /// Streams open now.
    pub fn streams(&self) -> u64 {
        self.streams.load(Ordering::Relaxed)
    }

    /// Responses sent.
    pub fn responses(&self) -> u64 {
        self.responses.load(Ordering::Relaxed)
    }

    /// Responses accepted by their client.
    pub fn acks(&self) -> u64 {
        self.acks.load(Ordering::Relaxed)
    }

    /// Responses rejected by their client.
    pub fn nacks(&self) -> u64 {
        self.nacks.load(Ordering::Relaxed)
    }

    /// Streams refused because the caller could not prove who it is.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Streams ended because their client had seen more than this server.
    pub fn behind(&self) -> u64 {
        self.behind.load(Ordering::Relaxed)
    }
}

impl Server {
    /// Serves the latest snapshot of `snapshots`. While there is none, streams are held and nothing is answered. When
    /// the sender is dropped all streams end with `UNAVAILABLE`. What `progress` knows is never more than what the latest
    /// snapshot holds.
    pub fn new(
        snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        progress: Progress,
        authenticate: Authenticate,
    ) -> Server {
        Server {
            snapshots,
            progress,
            authenticate,
            whole: Arc::default(),
            stats: Arc::default(),
            followers: Arc::default(),
        }
    }

    /// Counters that live as long as the server.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// How far the clients of this server have followed, as long as it lives.
    pub fn followers(&self) -> Arc<Followers> {
        self.followers.clone()
    }

    /// The service. Put it behind a server made by [`with_keepalive`].
    pub fn into_service(self) -> Service {
        Service(Arc::new(self))
    }

    /// A new stream: of requests, and in return of responses. An error is the last of them.
    pub(crate) async fn open(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<impl Stream<Item = Result<Pieces, Status>> + Send + use<>, Status> {
        let authentication = (self.authenticate)(request.metadata());
        let node = authentication.await.inspect_err(|status| {
            self.stats.refused.fetch_add(1, Ordering::Relaxed);
            warn!(peer = ?request.remote_addr(), reason = status.message(), "refused an xDS stream");
        })?;
        // Before anything is answered, so that to its client this is no connection yet.
        self.progress.reach(request.metadata()).await.inspect_err(|status| {
            self.stats.behind.fetch_add(1, Ordering::Relaxed);
            warn!(node, reason = status.message(), "sent an xDS stream away");
        })?;
        info!(node, peer = ?request.remote_addr(), "xDS stream opened");
        self.stats.streams.fetch_add(1, Ordering::Relaxed);
        let client = Client {
            follower: self.followers.join(&node),
            node,
            requests: request.into_inner(),
            snapshots: self.snapshots.clone(),
            snapshot: None,
            types: BTreeMap::new(),
            nonce: 0,
            ended: false,
            whole: self.whole.clone(),
            stats: self.stats.clone(),
        };
        Ok(stream::unfold(client, |mut client| async { client.next().await.map(|item| (item, client)) }))
    }
}

/// A tonic server that notices a client which vanished without a word.
pub fn with_keepalive(server: tonic::transport::Server) -> tonic::transport::Server {
    server
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .tcp_nodelay(true)
}

/// One stream.
struct Client {
    node: NodeName,
    follower: Follower,
    requests: Streaming<DeltaDiscoveryRequest>,
    snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// The latest there was. Once there is one it never becomes none again.
    snapshot: Option<Arc<Snapshot>>,
    types: BTreeMap<TypeKey, Subscription>,
    nonce: u64,
    ended: bool,
    whole: Arc<Whole>,
    stats: Arc<Stats>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stats.streams.fetch_sub(1, Ordering::Relaxed);
        info!(node = self.node, "xDS stream ended");
    }
}

impl Client {
    /// The next response, made when the connection has room for it, so from the latest snapshot.
    async fn next(&mut self) -> Option<Result<Pieces, Status>> {
        if self.ended {
            return None;
        }
        loop {
            if let Some(latest) = &*self.snapshots.borrow_and_update() {
                self.snapshot = Some(latest.clone());
            }
            if let Some(decided) = self.decide() {
                self.stats.responses.fetch_add(1, Ordering::Relaxed);
                let encoded = decided.encode(&self.whole);
                self.ended = encoded.is_err();
                return Some(encoded);
            }
            if self.types.keys().next_back().is_some_and(TypeKey::is_last)
                && let Some(version) = self.types.values().map(Subscription::accepted).min()
            {
                self.follower.has(version);
            }
            let outcome = tokio::select! {
                request = self.requests.message() => match request {
                    Ok(Some(request)) => self.receive(request),
                    Ok(None) => return None,
                    Err(status) => Err(status),
                },
                changed = self.snapshots.changed() => {
                    changed.map_err(|_| Status::unavailable("the controller is shutting down"))
                }
            };
            if let Err(status) = outcome {
                debug!(node = self.node, %status, "xDS stream ends");
                self.ended = true;
                return Some(Err(status));
            }
        }
    }

    fn receive(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if request.type_url.is_empty() {
            return Err(Status::invalid_argument("a request without a type URL"));
        }
        let named = request.resource_names_subscribe.iter().chain(&request.resource_names_unsubscribe);
        if named.chain(request.initial_resource_versions.keys()).any(|name| name.is_empty()) {
            return Err(Status::invalid_argument("a resource without a name"));
        }
        let key = TypeKey::new(&request.type_url);
        let Some(subscription) = self.types.get_mut(&key) else {
            if self.types.len() == MAX_TYPES {
                return Err(Status::resource_exhausted(format!("more than {MAX_TYPES} types on one stream")));
            }
            debug!(
                node = self.node,
                kind = key.url(),
                kept = request.initial_resource_versions.len(),
                "subscribed"
            );
            let subscription = Subscription::new(request);
            check_names(&subscription)?;
            self.types.insert(key, subscription);
            return Ok(());
        };
        match subscription.update(request) {
            Answer::None => {}
            Answer::Ack => {
                self.stats.acks.fetch_add(1, Ordering::Relaxed);
            }
            Answer::Nack(why) => {
                self.stats.nacks.fetch_add(1, Ordering::Relaxed);
                warn!(node = self.node, kind = key.url(), ?why, "the client rejected an update");
            }
        }
        check_names(subscription)
    }

    /// The first type in order that has something to send. Types after one that must wait for an answer wait with it,
    /// else a later type could get ahead of an earlier one of the same snapshot.
    fn decide(&mut self) -> Option<Decided> {
        let snapshot = self.snapshot.as_ref()?;
        let nonce = (self.nonce + 1).to_string();
        for (key, subscription) in &mut self.types {
            let type_url = key.url();
            match subscription.advance(&snapshot.view(&self.node, type_url), snapshot.version, &nonce) {
                Next::Idle => {}
                Next::Blocked => return None,
                Next::Send { upserts, removed, whole } => {
                    debug!(
                        node = self.node,
                        kind = type_url,
                        snapshot = snapshot.version,
                        upserts = upserts.len(),
                        removed = removed.len(),
                        "sending"
                    );
                    self.nonce += 1;
                    let head = DeltaDiscoveryResponse {
                        system_version_info: snapshot.seen.to_string(),
                        resources: Vec::new(),
                        type_url: type_url.to_owned(),
                        nonce,
                        removed_resources: removed,
                    };
                    return Some(Decided { head, upserts, whole });
                }
            }
        }
        None
    }
}

fn check_names(subscription: &Subscription) -> Result<(), Status> {
    if subscription.names() > MAX_NAMES {
        return Err(Status::resource_exhausted(format!("more than {MAX_NAMES} names of one type")));
    }
    Ok(())
}
