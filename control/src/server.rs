//! Puts the parts together: everything `weft-control` needs to start, and the tasks and threads it runs.

use std::{future::Future, net::SocketAddr, sync::Arc};

use anyhow::Context;
use hyper::StatusCode;
use tokio::{net::TcpListener, sync::mpsc};

use crate::{
    auth::{Authenticator, TokenKey},
    ca::Authority,
    config::Config,
    controller::{Controller, Input},
    enrollment::Enrollment,
    grpc, http,
    metrics::{self, Metrics},
    root::Root,
    source::{directory::Directory, watch},
    state_dir::{Lock, StateDir},
    tls::{self, ServerIdentity},
};

/// Changes and reports that wait for the controller. Full, it makes their senders wait.
const QUEUE: usize = 64;

/// A controller that has read its objects and listens.
pub struct Server {
    listener: TcpListener,
    identity: Arc<ServerIdentity>,
    xds: weft_xds::Server,
    authenticator: Authenticator,
    authority: Authority,
    inputs: mpsc::Sender<Input>,
    metrics: Metrics,
    _lock: Lock,
}

impl Server {
    /// Reads keys, state and objects, opens the ports, and starts to watch. Whatever is wrong with them is an error
    /// now rather than later.
    pub async fn start(config: Config) -> anyhow::Result<Self> {
        let metrics = Metrics::default();
        let state = StateDir::open(&config.state_dir)?;
        let lock = state.lock()?;
        let root = Arc::new(Root::load_or_create(&state, config.mesh.trust_domain.as_str())?);
        let authenticator = Authenticator::new(TokenKey::load_or_create(&state)?, metrics.clone());
        let identity = ServerIdentity::new(root.clone())?;
        let directory = Directory::open(&config.directory)?;

        let trust_domain = config.mesh.trust_domain.clone();
        let (mut controller, published) =
            Controller::new(config.mesh.clone(), Enrollment::load(state)?, metrics.clone());
        if directory.is_empty() && controller.remembers_pods() {
            tracing::error!(
                "{} holds no objects, but pods from it are enrolled: nothing is served until it holds some",
                directory.path().display()
            );
        } else {
            controller.objects(directory.all());
        }

        let node_of = authenticator.clone();
        let authenticate: weft_xds::Authenticate = Arc::new(move |metadata| Ok(node_of.node(metadata)?));
        let xds = weft_xds::Server::new(published.snapshots, authenticate);
        let authority = Authority::new(root, trust_domain, published.identities, metrics.clone());

        let listener = http::bind(config.listen, "agents").await?;
        serve_metrics(config.metrics_listen, &metrics, &xds).await?;
        serve_readiness(config.ready_listen, &metrics).await?;
        let (inputs, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("controller".to_owned()).spawn(move || controller.run(queue))?;
        start_watching(directory, inputs.clone(), metrics.clone())?;
        Ok(Self { listener, identity, xds, authenticator, authority, inputs, metrics, _lock: lock })
    }

    /// Serves agents until `shutdown`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::spawn(self.identity.clone().keep_fresh());
        let incoming = tls::accept(self.listener, self.identity, self.metrics)?;
        let xds = self.xds.into_service();
        grpc::serve(incoming, xds, self.authenticator, self.authority, self.inputs, shutdown)
            .await
            .context("serving agents")
    }
}

fn start_watching(directory: Directory, inputs: mpsc::Sender<Input>, metrics: Metrics) -> anyhow::Result<()> {
    metrics.source_complaints.set(directory.complaints().len() as i64);
    let send = move |delta: crate::source::Delta, complaints: usize| {
        metrics.source_complaints.set(complaints as i64);
        delta.is_empty() || inputs.blocking_send(Input::Objects(delta)).is_ok()
    };
    std::thread::Builder::new().name("directory".to_owned()).spawn(move || watch::run(directory, send))?;
    Ok(())
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
        "/readyz" if metrics.is_ready() => Some((StatusCode::OK, http::TEXT, "ready\n".to_owned())),
        "/readyz" => {
            Some((StatusCode::SERVICE_UNAVAILABLE, http::TEXT, "no state to serve yet\n".to_owned()))
        }
        _ => None,
    }));
    Ok(())
}
