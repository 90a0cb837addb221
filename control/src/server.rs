//! Puts the parts together: everything `weft-control` needs to start, and the tasks and threads it runs.

use std::{future::Future, net::SocketAddr, path::Path, sync::Arc};

use anyhow::Context;
use hyper::StatusCode;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use weft_xds::{Progress, VersionVector};

use crate::{
    auth::{Authenticator, join::TokenKey, review::Reviewer},
    ca::Authority,
    cluster::{
        self,
        enrollment::Records,
        lease::Candidate,
        policy_status::{
            Reach,
            reach::{self, Served},
        },
        status,
    },
    config::{Config, Source},
    controller::{Controller, Input, Published},
    enrollment::Enrollment,
    grpc, http,
    metrics::{self, Metrics},
    source::{self, directory::Directory, kubernetes},
    state_dir::{Lock, StateDir},
    tls::{self, ServerIdentity},
    translate::MeshSettings,
    trust::{
        Settled,
        keeper::{self, Keeper, Place, Trust},
    },
};

/// Changes and reports that wait for the controller. Full, it makes their senders wait.
const QUEUE: usize = 64;

/// A controller that listens, and has read its objects or does.
pub struct Server {
    listener: TcpListener,
    identity: Arc<ServerIdentity>,
    xds: weft_xds::Server,
    authenticator: Authenticator,
    authority: Authority,
    progress: Progress,
    inputs: mpsc::Sender<Input>,
    metrics: Metrics,
    candidate: Option<Candidate>,
    _lock: Option<Lock>,
}

/// What differs between a directory and a cluster.
struct Parts {
    keeper: Keeper,
    trust: Trust,
    authenticator: Authenticator,
    controller: Controller,
    published: Published,
    watching: Watching,
    lock: Option<Lock>,
}

/// What sends changes to the controller, once that runs.
enum Watching {
    Directory(Directory),
    Cluster { client: kube::Client, namespace: String, pod_name: String },
}

impl Server {
    /// Reads keys, state and objects, opens the ports, and starts to watch. Whatever is wrong with them is an error
    /// now rather than later. In a cluster objects come later.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let metrics = Metrics::default();
        let parts = match &config.source {
            Source::Directory { directory, state_dir } => {
                from_directory(StateDir::open(state_dir)?, directory, &config, &metrics).await?
            }
            Source::Kubernetes { namespace, pod_name } => {
                from_cluster(namespace.clone(), pod_name.clone(), &config, &metrics).await?
            }
        };
        let Parts { keeper, trust, authenticator, controller, published, watching, lock } = parts;
        let identity = ServerIdentity::new(trust.clone())?;
        let Published { snapshots, identities, progress, wanted, settled } = published;
        let authenticate = authenticate(authenticator.clone());
        let xds = weft_xds::Server::new(snapshots.clone(), progress.clone(), authenticate);
        let trust_domain = config.mesh.trust_domain.clone();
        let overlap = config.rotation.overlap;
        let authority = Authority::new(trust.clone(), overlap, trust_domain, identities, metrics.clone());

        let listener = http::bind(config.listen, "agents").await?;
        serve_metrics(config.metrics_listen, &metrics, &xds).await?;
        serve_readiness(config.ready_listen, &metrics).await?;
        let (inputs, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("controller".to_owned()).spawn(move || controller.run(queue))?;
        let served = Served { followers: xds.followers(), snapshots, known: progress.known() };
        let (candidate, leads) =
            watching.start(config.mesh, inputs.clone(), wanted, metrics.clone(), served)?;
        follow(keeper, trust, leads, settled, inputs.clone());
        Ok(Self {
            listener,
            identity,
            xds,
            authenticator,
            authority,
            progress,
            inputs,
            metrics,
            candidate,
            _lock: lock,
        })
    }

    /// Serves agents until `shutdown`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::spawn(self.identity.clone().keep_fresh());
        let incoming = tls::accept(self.listener, self.identity, self.metrics)?;
        let xds = self.xds.into_service();
        let shutdown = async {
            shutdown.await;
            if let Some(candidate) = self.candidate {
                candidate.resign().await;
            }
        };
        grpc::serve(incoming, xds, self.authenticator, self.authority, self.progress, self.inputs, shutdown)
            .await
            .context("serving agents")
    }
}

/// Whom the mesh believes: kept up to date here, and told to agents.
fn follow(
    keeper: Keeper,
    trust: Trust,
    leads: watch::Receiver<bool>,
    settled: watch::Receiver<Option<Arc<Settled>>>,
    inputs: mpsc::Sender<Input>,
) {
    tokio::spawn(keeper.run(leads, settled));
    tokio::spawn(keeper::each_bundle(trust, inputs));
}

fn authenticate(authenticator: Authenticator) -> weft_xds::Authenticate {
    Arc::new(move |metadata| {
        let (authenticator, metadata) = (authenticator.clone(), metadata.clone());
        Box::pin(async move { Ok(authenticator.node(&metadata).await?) })
    })
}

async fn from_directory(
    state: StateDir,
    directory: &Path,
    config: &Config,
    metrics: &Metrics,
) -> anyhow::Result<Parts> {
    let lock = state.lock()?;
    let settings = &config.mesh;
    let organization = settings.trust_domain.as_str();
    let place = Place::Directory(state.clone());
    let (keeper, trust) =
        Keeper::open(place, config.rotation, config.issuer.clone(), organization, metrics.clone()).await?;
    let authenticator = Authenticator::join_tokens(TokenKey::load_or_create(&state)?, metrics.clone());
    let directory = Directory::open(directory)?;
    let enrollment = Enrollment::load(state)?;
    let (mut controller, published) = Controller::new(settings.clone(), enrollment, metrics.clone());
    controller.trust(&trust.borrow().authorities.bundle());
    if directory.is_empty() && controller.remembers_pods() {
        tracing::error!(
            "{} holds no objects, but pods from it are enrolled: nothing is served until it holds some",
            directory.path().display()
        );
    } else {
        controller.objects(directory.all());
    }
    let watching = Watching::Directory(directory);
    Ok(Parts { keeper, trust, authenticator, controller, published, watching, lock: Some(lock) })
}

async fn from_cluster(
    namespace: Option<String>,
    pod_name: String,
    config: &Config,
    metrics: &Metrics,
) -> anyhow::Result<Parts> {
    let settings = &config.mesh;
    let (client, own) = cluster::connect().await?;
    let namespace = namespace.unwrap_or(own);
    tracing::info!(target: "cluster", namespace, "configured by the API server");
    let organization = settings.trust_domain.as_str();
    let place = Place::Cluster { client: client.clone(), namespace: namespace.clone() };
    let (keeper, trust) =
        Keeper::open(place, config.rotation, config.issuer.clone(), organization, metrics.clone()).await?;

    let authenticator = Authenticator::reviews(Reviewer::new(client.clone(), &namespace), metrics.clone());
    let enrollment = Enrollment::in_cluster(Records::new(client.clone()));
    let (mut controller, published) = Controller::new(settings.clone(), enrollment, metrics.clone());
    controller.trust(&trust.borrow().authorities.bundle());
    let watching = Watching::Cluster { client, namespace, pod_name };
    Ok(Parts { keeper, trust, authenticator, controller, published, watching, lock: None })
}

impl Watching {
    /// Starts it. In a cluster this replica is then a candidate for leading, once it has something to serve. The receiver
    /// says whether it leads, as the only controller of a directory does.
    fn start(
        self,
        settings: MeshSettings,
        inputs: mpsc::Sender<Input>,
        wanted: mpsc::Receiver<VersionVector>,
        metrics: Metrics,
        served: Served,
    ) -> anyhow::Result<(Option<Candidate>, watch::Receiver<bool>)> {
        match self {
            Self::Cluster { client, namespace, pod_name } => {
                let mut snapshots = served.snapshots.clone();
                let ready = async move { drop(snapshots.wait_for(Option::is_some).await) };
                let (candidate, leads) =
                    Candidate::start(client.clone(), &namespace, pod_name, metrics.clone(), ready);
                let (seen, reached) = watch::channel(Arc::default());
                let (awaited, is_awaited) = watch::channel(false);
                tokio::spawn(reach::run(client.clone(), namespace, served, seen, is_awaited));
                let (statuses, queue) = mpsc::channel(QUEUE);
                let enabled = settings.enabled;
                let reach = Reach { reached, wanted: awaited };
                let (leader, counts) = (leads.clone(), metrics.clone());
                tokio::spawn(status::run(client.clone(), settings, queue, leader, reach, counts));
                tokio::spawn(kubernetes::run(client, enabled, inputs, statuses, wanted, metrics));
                Ok((Some(candidate), leads))
            }
            Self::Directory(directory) => {
                metrics.source_complaints.set(directory.complaints().len() as i64);
                let send = move |delta: crate::source::Delta, complaints: usize| {
                    metrics.source_complaints.set(complaints as i64);
                    delta.is_empty() || inputs.blocking_send(Input::Objects(delta)).is_ok()
                };
                std::thread::Builder::new()
                    .name("directory".to_owned())
                    .spawn(move || source::watch::run(directory, send))?;
                Ok((None, watch::channel(true).1))
            }
        }
    }
}

async fn serve_metrics(address: SocketAddr, metrics: &Metrics, xds: &weft_xds::Server) -> anyhow::Result<()> {
    let listener = http::bind(address, "metrics").await?;
    let registry = metrics.registry(xds.stats());
    tokio::spawn(http::serve(listener, move |path| {
        (path == "/metrics").then(|| (StatusCode::OK, http::OPEN_METRICS, metrics::text(&registry)))
    }));
    Ok(())
}

async fn serve_readiness(address: SocketAddr, metrics: &Metrics) -> anyhow::Result<()> {
    let listener = http::bind(address, "readiness").await?;
    let metrics = metrics.clone();
    tokio::spawn(http::serve(listener, move |path| match path {
        "/livez" => Some((StatusCode::OK, http::TEXT, "live\n".to_owned())),
        "/readyz" => Some(match metrics.unready() {
            None => (StatusCode::OK, http::TEXT, "ready\n".to_owned()),
            Some(why) => (StatusCode::SERVICE_UNAVAILABLE, http::TEXT, why.to_owned()),
        }),
        _ => None,
    }));
    Ok(())
}
