//! The agent's half of the CNI plugin: a Unix socket on which the plugin announces pods before they start, and a task that
//! puts the plugin into the node's network configuration and keeps it there. What is done about a pod is `enroll`'s
//! business.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use http_body_util::{BodyExt, Limited};
use hyper::{Method, Request, StatusCode, body::Incoming};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};
use weft_api::agent::PluginStatus;
use weft_cni::{
    http::ApiServer,
    install::Installation,
    protocol::{ADD, AddReply, AddRequest, ErrorReply},
    settings::Settings,
    token,
};

use crate::http::{self, Reply, unix_listener};

/// A request is a few hundred bytes.
const MAX_REQUEST: usize = 64 << 10;
/// The plugin sends its request at once.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the network configuration is looked at: another component may write it anew.
const LOOK: Duration = Duration::from_secs(1);
/// Where a pod finds the credentials of its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// What the plugin asks of the enroller: whether the pod belongs to the mesh; if so it is protected when the answer comes.
pub struct Asked {
    pub request: AddRequest,
    pub answer: oneshot::Sender<Result<bool, String>>,
}

/// Serves the plugin on `socket`. A predecessor's socket is replaced.
pub fn serve(socket: &std::path::Path, asked: mpsc::Sender<Asked>) -> anyhow::Result<()> {
    let listener = unix_listener(socket).with_context(|| format!("listening on {}", socket.display()))?;
    info!(socket = %socket.display(), "serving the CNI plugin");
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let asked = asked.clone();
                    http::serve(stream, HEADER_TIMEOUT, move |request| answer(request, asked.clone()));
                }
                Err(error) => http::pause(&error).await,
            }
        }
    });
    Ok(())
}

async fn answer(request: Request<Incoming>, asked: mpsc::Sender<Asked>) -> Reply {
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, MAX_REQUEST).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return failed(StatusCode::BAD_REQUEST, error.to_string()),
    };
    let malformed = |error: serde_json::Error| failed(StatusCode::BAD_REQUEST, error.to_string());
    match (parts.method, parts.uri.path()) {
        (Method::POST, ADD) => {
            let request: AddRequest = match serde_json::from_slice(&body) {
                Ok(request) => request,
                Err(error) => return malformed(error),
            };
            let (tell, told) = oneshot::channel();
            if asked.send(Asked { request, answer: tell }).await.is_err() {
                return failed(StatusCode::SERVICE_UNAVAILABLE, "the agent is shutting down".to_owned());
            }
            match told.await {
                Ok(Ok(enrolled)) => json(StatusCode::OK, &AddReply { enrolled }),
                Ok(Err(why)) => failed(StatusCode::SERVICE_UNAVAILABLE, why),
                Err(_) => failed(StatusCode::SERVICE_UNAVAILABLE, "the agent is shutting down".to_owned()),
            }
        }
        _ => failed(StatusCode::NOT_FOUND, format!("POST {ADD}")),
    }
}

fn failed(status: StatusCode, error: String) -> Reply {
    json(status, &ErrorReply { error })
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Reply {
    http::reply(status, "application/json", serde_json::to_vec(body).unwrap_or_default())
}

/// How the plugin is installed.
#[derive(Debug, Clone)]
pub struct Install {
    /// The plugin's program, as the agent brings it along.
    pub program: PathBuf,
    pub node: Installation,
    pub socket: PathBuf,
    pub excluded_namespaces: Vec<String>,
}

/// Puts the plugin in place and keeps it there. Runs as long as the agent: what is wrong is said, once, and tried again.
///
/// `retiring` ends it, and takes out what was put in.
pub async fn keep_installed(
    install: Install,
    status: watch::Sender<PluginStatus>,
    mut retiring: watch::Receiver<bool>,
) {
    let mut token: Option<(String, Instant)> = None;
    loop {
        let (job, known) = (install.clone(), token.clone());
        let done = tokio::task::spawn_blocking(move || job.once(known)).await;
        match done.map_err(anyhow::Error::from).and_then(|done| done) {
            Ok((joined, used)) => {
                token = Some(used);
                status.send_replace(PluginStatus::InPlace);
                if joined {
                    info!(conf_dir = %install.node.conf_dir.display(), "the CNI plugin is in the node's network configuration");
                }
            }
            Err(error) => {
                let failed = PluginStatus::Failed { error: format!("{error:#}") };
                if status.send_replace(failed.clone()) != failed {
                    warn!(
                        error = format!("{error:#}"),
                        "the CNI plugin is not in place; new pods start before they are protected"
                    );
                }
            }
        }
        let _ = tokio::time::timeout(LOOK, retiring.wait_for(|retiring| *retiring)).await;
        if *retiring.borrow() {
            break;
        }
    }
    let node = install.node.clone();
    let done = tokio::task::spawn_blocking(move || node.remove()).await;
    status.send_replace(match done.map_err(anyhow::Error::from).and_then(|done| Ok(done?)) {
        Ok(()) => PluginStatus::NotManaged,
        Err(error) => PluginStatus::Failed { error: format!("{error:#}") },
    });
}

impl Install {
    /// Brings everything in place; true if the plugin was not in the configuration, and the plugin's token with its age.
    fn once(&self, token: Option<(String, Instant)>) -> anyhow::Result<(bool, (String, Instant))> {
        if token.is_none() {
            self.node.put_program(&self.program)?;
        }
        let mut settings = self.settings()?;
        let half = Duration::from_secs(token::LIFETIME / 2);
        let token = match token.filter(|(_, since)| since.elapsed() < half) {
            Some(token) => token,
            None => {
                let own = read("token")?;
                let api =
                    ApiServer { address: &settings.api_server, ca: &settings.api_ca, token: own.trim() };
                let token = token::request(api, read("namespace")?.trim()).map_err(anyhow::Error::msg)?;
                (token, Instant::now())
            }
        };
        settings.api_token = token.0.clone();
        self.node.put_settings(&settings)?;
        Ok((self.node.join()?, token))
    }

    fn settings(&self) -> anyhow::Result<Settings> {
        let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
        let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        Ok(Settings {
            socket: self.socket.clone(),
            api_server: format!("{host}:{port}"),
            api_ca: read("ca.crt")?,
            api_token: String::new(),
            excluded_namespaces: self.excluded_namespaces.clone(),
        })
    }
}

/// A file of the agent's own service account.
fn read(name: &str) -> anyhow::Result<String> {
    let path = format!("{ACCOUNT}/{name}");
    std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))
}
