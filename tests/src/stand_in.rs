//! A controller of the test's own in the place of the real one, for what Weft's controller never says, or never in that
//! order. It begins with all that the real one served, and changes of it what the test says. It speaks xDS alone: agents
//! keep the certificates they have, and what they report goes unheard.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair};
use tokio::net::TcpListener;
use tokio::runtime::{self, Runtime};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Status, metadata::MetadataMap};
use weft_proto::type_url;
use weft_xds::{
    Authenticate, Backoff, ClientConfig, ControlEndpoint, Progress, Resources, Snapshot, TokenSource,
    VersionVector, resource, with_keepalive,
};

use crate::agent::Agent;
use crate::cluster::Cluster;
use crate::control::Controller;

/// The name that agents expect in the controller's certificate.
const SERVER_NAME: &str = "weft-control";
const TYPES: [&str; 6] = [
    type_url::TRUST_BUNDLE,
    type_url::MESH_CONFIG,
    type_url::NODE,
    type_url::AUTHORIZATION,
    type_url::ADDRESS,
    type_url::LOCAL_WORKLOAD,
];
const OBSERVATION: Duration = Duration::from_secs(10);

/// Listens where the controller did. Agents that connect before `publish` are told nothing.
#[derive(Debug)]
pub struct StandIn {
    snapshot: Snapshot,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    _runtime: Runtime,
}

impl StandIn {
    /// Asks the controller of `cluster` what it serves to every node, ends it, and listens in its place.
    pub fn take_over(cluster: &Cluster) -> Result<StandIn> {
        let controller = cluster.controller();
        let mut snapshot = Snapshot::default();
        let mut tokens = HashMap::new();
        for agent in cluster.agents() {
            let mut served =
                observe(controller, agent).with_context(|| format!("what {} is served", agent.node()))?;
            let own = served.remove_entry(type_url::LOCAL_WORKLOAD);
            snapshot.per_node.insert(agent.node().to_owned(), own.into_iter().collect());
            snapshot.shared = served;
            let token = std::fs::read_to_string(agent.token_file())?;
            tokens.insert(format!("Bearer {}", token.trim()), agent.node().to_owned());
        }
        let identity = identity(controller)?;
        let (snapshots, receiver) = watch::channel(None);
        // A directory's states have no versions of a cluster's objects, so nobody has seen more than this.
        let (_, known) = watch::channel(VersionVector::default());
        let progress = Progress::new(known, mpsc::channel(1).0);
        let xds = weft_xds::Server::new(receiver, progress, authenticate(tokens)).into_service();
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let router = {
            let _runtime = runtime.enter();
            with_keepalive(Server::builder())
                .tls_config(ServerTlsConfig::new().identity(identity))?
                .add_service(xds)
        };
        controller.kill()?;
        let listener = controller.place().listen(controller.address().port())?;
        listener.set_nonblocking(true)?;
        runtime.spawn(async {
            router.serve_with_incoming(TcpListenerStream::new(TcpListener::from_std(listener)?)).await?;
            anyhow::Ok(())
        });
        Ok(StandIn { snapshot, snapshots, _runtime: runtime })
    }

    /// A resource that is the same for every node, encoded.
    pub fn get(&self, type_url: &'static str, name: &str) -> Result<&[u8]> {
        let found = self.snapshot.shared.get(type_url).and_then(|resources| resources.get(name));
        found.map(|(_, content)| &content[..]).with_context(|| format!("there is no {type_url} {name}"))
    }

    /// Adds or replaces one. Nobody hears of it before `publish`.
    pub fn put(&mut self, type_url: &'static str, name: &str, content: Vec<u8>) {
        self.snapshot.shared.entry(type_url).or_default().insert(name.to_owned(), resource(content));
    }

    /// Serves what there is now.
    pub fn publish(&mut self) {
        self.snapshot.version += 1;
        self.snapshots.send_replace(Some(Arc::new(self.snapshot.clone())));
    }
}

/// What the real controller serves to a node, asked with the node's own token.
fn observe(controller: &Controller, agent: &Agent) -> Result<HashMap<&'static str, Resources>> {
    let config = ClientConfig {
        server: ControlEndpoint {
            address: controller.address().to_string(),
            ca: std::fs::read(controller.state_dir().join("root.pem")).context("the root")?.into(),
            server_name: SERVER_NAME.to_owned(),
            token: TokenSource::file(agent.token_file()),
            seen: None,
        },
        node: agent.node().to_owned(),
        types: TYPES.to_vec(),
        backoff: Backoff::default(),
        trouble: watch::Sender::new(String::new()),
    };
    // On that one thread, since that is what enters the network namespace.
    controller.place().netns().run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async { tokio::time::timeout(OBSERVATION, first_state(config)).await })?
    })?
}

async fn first_state(config: ClientConfig) -> Result<HashMap<&'static str, Resources>> {
    let (updates, mut received) = mpsc::channel(1);
    tokio::spawn(weft_xds::run(config, updates, watch::Sender::new(false)));
    let mut state: HashMap<_, Resources> = HashMap::new();
    while state.len() < TYPES.len() {
        let update = received.recv().await.context("the client ended")?;
        let resources = state.entry(update.type_url).or_default();
        for name in &update.removed {
            resources.remove(name);
        }
        for new in &update.upserts {
            resources.insert(new.name.clone(), (new.version.clone(), new.value.clone()));
        }
        update.ack();
    }
    Ok(state)
}

/// Whose stream it is, by `authorization` as the agents send it.
fn authenticate(nodes: HashMap<String, String>) -> Authenticate {
    Arc::new(move |metadata: &MetadataMap| {
        let value = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let node = value.and_then(|value| nodes.get(value)).cloned();
        let node = node.ok_or_else(|| Status::unauthenticated("not a token of this cluster"));
        Box::pin(std::future::ready(node))
    })
}

/// A certificate such as the controller makes for its own port.
fn identity(controller: &Controller) -> Result<Identity> {
    let key = KeyPair::generate()?;
    let mut parameters = CertificateParams::new([SERVER_NAME.to_owned()])?;
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    parameters.use_authority_key_identifier_extension = true;
    let certificate = parameters.signed_by(&key, &controller.issuer()?)?;
    Ok(Identity::from_pem(certificate.pem(), key.serialize_pem()))
}
