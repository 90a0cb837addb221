//! A controller that serves whatever a test publishes, agents that record what they are told, and a raw client that
//! can do what the library's client never would.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Identity, ServerTlsConfig};
use tonic::{Status, Streaming};
use weft_proto::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use weft_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use weft_proto::type_url::{ADDRESS, LOCAL_WORKLOAD, MESH_CONFIG};
use weft_xds::{
    Backoff, ClientConfig, ControlEndpoint, Followers, Progress, Resources, Server, Snapshot, Stats,
    TokenSource, Update, VersionVector, channel, resource, run, with_keepalive,
};

/// Longest wait for what must happen.
pub const SOON: Duration = Duration::from_secs(10);
/// How long nothing may happen where nothing must.
pub const QUIET: Duration = Duration::from_millis(300);
pub const SERVER_NAME: &str = "weft-control";

pub struct Pki {
    pub ca_pem: String,
    server: Identity,
}

/// One for all tests; a second one for whom nobody trusts.
pub static PKI: LazyLock<Pki> = LazyLock::new(pki);

pub fn pki() -> Pki {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new([SERVER_NAME.to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    Pki { ca_pem: ca.pem(), server: Identity::from_pem(leaf.pem(), key.serialize_pem()) }
}

/// Type, name, content.
pub type Item = (&'static str, &'static str, &'static str);

/// A snapshot with the shared `items` and each node's own ones.
pub fn snapshot(items: &[Item], own: &[(&str, &[Item])]) -> Snapshot {
    let by_type = |items: &[Item]| {
        let mut types: HashMap<&'static str, Resources> = HashMap::new();
        for (type_url, name, content) in items {
            types.entry(type_url).or_default().insert((*name).to_owned(), resource(*content));
        }
        types
    };
    let per_node = own.iter().map(|(node, items)| ((*node).to_owned(), by_type(items))).collect();
    Snapshot { version: 1, seen: VersionVector::default(), shared: by_type(items), per_node }
}

/// The token of a node is `let-me-in-NODE`.
pub struct Controller {
    pub address: SocketAddr,
    pub stats: Arc<Stats>,
    pub followers: Arc<Followers>,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    known: watch::Sender<VersionVector>,
    /// What clients had seen that it had not.
    pub wanted: mpsc::Receiver<VersionVector>,
    runtime: Option<Runtime>,
}

impl Controller {
    pub async fn start(first: Option<Snapshot>) -> Controller {
        Controller::start_at("127.0.0.1:0".parse().unwrap(), first).await
    }

    /// On a runtime of its own, so that stopping it is like killing the process: every connection breaks.
    pub async fn start_at(address: SocketAddr, first: Option<Snapshot>) -> Controller {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = {
            let bind = runtime.spawn(async move {
                loop {
                    match TcpListener::bind(address).await {
                        Ok(listener) => return listener,
                        // The port of a controller just stopped.
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            });
            tokio::time::timeout(SOON, bind).await.unwrap().unwrap()
        };
        let address = listener.local_addr().unwrap();
        let (snapshots, receiver) = watch::channel(first.map(Arc::new));
        let (known, known_receiver) = watch::channel(VersionVector::default());
        let (wanted_sender, wanted) = mpsc::channel(1);
        let server = Server::new(
            receiver,
            Progress::new(known_receiver, wanted_sender),
            Arc::new(|metadata| {
                let token = metadata.get("authorization").and_then(|value| value.to_str().ok());
                let node = token.and_then(|token| token.strip_prefix("Bearer let-me-in-"));
                let node = node
                    .map(str::to_owned)
                    .ok_or_else(|| Status::unauthenticated("not a token of this mesh"));
                Box::pin(std::future::ready(node))
            }),
        );
        let (stats, followers) = (server.stats(), server.followers());
        let service = server.into_service();
        runtime.spawn(async move {
            let router = with_keepalive(tonic::transport::Server::builder())
                .tls_config(ServerTlsConfig::new().identity(PKI.server.clone()))
                .unwrap()
                .add_service(service);
            router.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Controller { address, stats, followers, snapshots, known, wanted, runtime: Some(runtime) }
    }

    pub fn publish(&self, snapshot: Snapshot) {
        self.snapshots.send_replace(Some(Arc::new(snapshot)));
    }

    pub fn publish_items(&self, items: &[Item]) {
        self.publish(snapshot(items, &[]));
    }

    /// As a replica does that has seen that much of its source.
    pub fn publish_as_of(&self, seen: &str, items: &[Item]) {
        let seen: VersionVector = seen.parse().unwrap();
        self.publish(Snapshot { seen: seen.clone(), ..snapshot(items, &[]) });
        self.know(seen);
    }

    /// It has seen more, of which nothing follows.
    pub fn know(&self, seen: VersionVector) {
        self.known.send_replace(seen);
    }

    /// What a controller that lost its source would do if it did it wrong.
    pub fn unpublish(&self) {
        self.snapshots.send_replace(None);
    }

    pub async fn streams_become(&self, count: u64) {
        eventually(SOON, || self.stats.streams() == count).await;
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub async fn eventually(limit: Duration, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(limit, wait).await.expect("did not come true in time");
}

/// Settings of a node, and the directory with its token.
pub struct Node {
    pub endpoint: ControlEndpoint,
    pub directory: TempDir,
    pub seen: watch::Sender<VersionVector>,
}

pub fn node(name: &str, address: SocketAddr) -> Node {
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, format!("let-me-in-{name}\n")).unwrap();
    let (seen, seen_receiver) = watch::channel(VersionVector::default());
    let endpoint = ControlEndpoint {
        address: address.to_string(),
        ca: PKI.ca_pem.clone().into_bytes().into(),
        server_name: SERVER_NAME.to_owned(),
        token: TokenSource::file(token),
        seen: Some(seen_receiver),
    };
    Node { endpoint, directory, seen }
}

/// The library's client with a consumer in the hands of the test.
pub struct Agent {
    pub node: Node,
    pub updates: mpsc::Receiver<Update>,
    pub connected: watch::Receiver<bool>,
    pub state: BTreeMap<(&'static str, String), Bytes>,
    pub task: JoinHandle<()>,
}

impl Agent {
    pub fn start(name: &str, address: SocketAddr) -> Agent {
        Agent::with(name, node(name, address))
    }

    pub fn with(name: &str, node: Node) -> Agent {
        let (sender, updates) = mpsc::channel(1);
        let (is_connected, connected) = watch::channel(false);
        let config = ClientConfig {
            server: node.endpoint.clone(),
            node: name.to_owned(),
            // In the wrong order, which must not matter.
            types: vec![LOCAL_WORKLOAD, MESH_CONFIG, ADDRESS],
            backoff: Backoff { min: Duration::from_millis(20), max: Duration::from_millis(200) },
            trouble: watch::Sender::default(),
        };
        let task = tokio::spawn(async move { run(config, sender, is_connected).await.unwrap() });
        Agent { node, updates, connected, state: BTreeMap::new(), task }
    }

    pub async fn next(&mut self) -> Update {
        tokio::time::timeout(SOON, self.updates.recv())
            .await
            .expect("no update came")
            .expect("the client ended")
    }

    /// Applies and accepts the next update; returns a digest of it: type, +upserts, -removed.
    pub async fn apply(&mut self) -> String {
        let update = self.next().await;
        for resource in &update.upserts {
            assert_eq!(resource.version, weft_xds::Version::of(&resource.value));
            self.state.insert((update.type_url, resource.name.clone()), resource.value.clone());
        }
        for name in &update.removed {
            self.state.remove(&(update.type_url, name.clone()));
        }
        self.node.seen.send_if_modified(|seen| seen.merge(&update.seen));
        let digest = digest(&update);
        update.ack();
        digest
    }

    /// The first three updates, of the three types.
    pub async fn sync(&mut self) -> [String; 3] {
        [self.apply().await, self.apply().await, self.apply().await]
    }

    pub async fn nothing(&mut self) {
        if let Ok(update) = tokio::time::timeout(QUIET, self.updates.recv()).await {
            panic!("unexpected: {:?}", update.map(|update| digest(&update)));
        }
    }

    pub async fn connected_becomes(&mut self, value: bool) {
        tokio::time::timeout(SOON, self.connected.wait_for(|now| *now == value)).await.unwrap().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `address! +a=1 -b`: short name of the type, `!` for a first update.
pub fn digest(update: &Update) -> String {
    let mut text = short(update.type_url).to_owned();
    if update.first {
        text.push('!');
    }
    for resource in &update.upserts {
        text.push_str(&format!(" +{}={}", resource.name, String::from_utf8_lossy(&resource.value)));
    }
    for name in &update.removed {
        text.push_str(&format!(" -{name}"));
    }
    text
}

pub fn short(type_url: &str) -> &str {
    match type_url {
        ADDRESS => "address",
        MESH_CONFIG => "config",
        LOCAL_WORKLOAD => "local",
        other => other,
    }
}

/// One stream spoken by hand.
pub struct Raw {
    pub requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub responses: Streaming<DeltaDiscoveryResponse>,
    _node: Node,
}

impl Raw {
    pub async fn open(name: &str, address: SocketAddr) -> Raw {
        let node = node(name, address);
        let (requests, outgoing) = mpsc::channel(64);
        let mut client = AggregatedDiscoveryServiceClient::new(channel(&node.endpoint).unwrap())
            .max_decoding_message_size(weft_xds::MAX_RESPONSE_BYTES);
        let responses =
            client.delta_aggregated_resources(ReceiverStream::new(outgoing)).await.unwrap().into_inner();
        Raw { requests, responses, _node: node }
    }

    pub async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub async fn subscribe(&self, type_url: &str, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        })
        .await;
    }

    pub async fn unsubscribe(&self, type_url: &str, names: &[&str]) {
        self.send(DeltaDiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names_unsubscribe: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Default::default()
        })
        .await;
    }

    pub async fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let message = tokio::time::timeout(SOON, self.responses.message()).await.expect("no response came");
        message.map(|response| response.expect("the stream ended"))
    }

    pub async fn ack(&self, response: &DeltaDiscoveryResponse) {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        })
        .await;
    }

    /// Receives and accepts; the digest is that of [`digest`].
    pub async fn apply(&mut self) -> String {
        let response = self.receive().await.unwrap();
        self.ack(&response).await;
        digest_of(&response)
    }

    pub async fn nothing(&mut self) {
        if let Ok(message) = tokio::time::timeout(QUIET, self.responses.message()).await {
            panic!("unexpected: {message:?}");
        }
    }
}

pub fn digest_of(response: &DeltaDiscoveryResponse) -> String {
    let mut text = short(&response.type_url).to_owned();
    for resource in &response.resources {
        let value = &resource.resource.as_ref().unwrap().value;
        text.push_str(&format!(" +{}={}", resource.name, String::from_utf8_lossy(value)));
    }
    for name in &response.removed_resources {
        text.push_str(&format!(" -{name}"));
    }
    text
}
