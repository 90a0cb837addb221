//! The cluster that commands talk to: plain requests to the API server, and programs run in its pods.

use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::AttachParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc2822};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    time::{Duration, timeout},
};

/// A request that takes longer has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// A program in a pod that takes longer has failed.
const EXEC_TIMEOUT: Duration = Duration::from_secs(10);
/// Objects a request: more would make the API server hold large answers.
const PAGE: usize = 500;

/// Which cluster, and where in it Weft is.
#[derive(Debug, Clone, Args)]
pub struct Target {
    /// Namespace that Weft is installed in.
    #[arg(short, long, default_value = "weft-system", value_name = "NAME")]
    pub namespace: String,
    /// Context of the kubeconfig; its current one if not given. KUBECONFIG says which file.
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

/// A cluster, by its API server.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
}

/// What the API server says of itself, and when.
#[derive(Debug, Clone)]
pub struct Server {
    pub version: String,
    /// Major and minor.
    pub numbers: (u32, u32),
    /// Its clock, to the second.
    pub clock: SystemTime,
}

impl Cluster {
    pub async fn connect(context: Option<&str>) -> Result<Self> {
        let mut config = match context {
            None => Config::infer().await.context("no kubeconfig can be used")?,
            Some(name) => {
                let options = KubeConfigOptions { context: Some(name.to_owned()), ..Default::default() };
                let file = Kubeconfig::read().context("reading the kubeconfig")?;
                Config::from_custom_kubeconfig(file, &options).await.context("the kubeconfig")?
            }
        };
        // Every command has its own patience.
        config.default_retry = false;
        config.connect_timeout = Some(REQUEST_TIMEOUT);
        Ok(Self { client: Client::try_from(config).context("the kubeconfig")? })
    }

    /// The API server's version and clock.
    pub async fn server(&self) -> Result<Server> {
        let request = http::Request::get("/version").body(kube::client::Body::empty())?;
        let response = bounded(async { Ok(self.client.send(request).await?) }).await?;
        ensure!(response.status().is_success(), "GET /version: {}", response.status());
        let date = response.headers().get(http::header::DATE).and_then(|date| date.to_str().ok());
        let date = date.context("the API server's answers have no date")?;
        // HTTP writes GMT where RFC 2822 has an offset.
        let clock = OffsetDateTime::parse(&date.replace("GMT", "+0000"), &Rfc2822).context("its date")?;
        let version: Value = self.get("/version").await?;
        let number = |key: &str| {
            let digits: String =
                version[key].as_str().unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or_default()
        };
        Ok(Server {
            version: version["gitVersion"].as_str().unwrap_or_default().to_owned(),
            numbers: (number("major"), number("minor")),
            clock: clock.into(),
        })
    }

    /// An object, or whatever else is at `path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let request = http::Request::get(path).body(Vec::new())?;
        bounded(async { self.client.request(request).await.map_err(words) }).await.context(path.to_owned())
    }

    /// An object; `None` where there is none.
    pub async fn find(&self, path: &str) -> Result<Option<Value>> {
        let request = http::Request::get(path).body(Vec::new())?;
        let answer = bounded(async { Ok(self.client.request(request).await) }).await;
        match answer.context(path.to_owned())? {
            Ok(object) => Ok(Some(object)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(words(error).context(path.to_owned())),
        }
    }

    /// Everything at `path`, page by page. Objects that are not as Kubernetes makes them are left out.
    pub async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<Vec<T>> {
        let (mut found, mut next) = (Vec::new(), String::new());
        loop {
            let join = if path.contains('?') { '&' } else { '?' };
            let mut page: Value = self.get(&format!("{path}{join}limit={PAGE}&continue={next}")).await?;
            if let Some(items) = page["items"].as_array_mut() {
                found.extend(items.drain(..).filter_map(|item| serde_json::from_value(item).ok()));
            }
            match page["metadata"]["continue"].as_str().filter(|token| !token.is_empty()) {
                Some(token) => next = token.to_owned(),
                None => return Ok(found),
            }
        }
    }

    /// POST; returns what the API server made of it.
    pub async fn post(&self, path: &str, object: &Value) -> Result<Value> {
        let request = http::Request::post(path)
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(serde_json::to_vec(object)?)?;
        bounded(async { self.client.request(request).await.map_err(words) }).await.context(path.to_owned())
    }

    /// Strategic merge patch.
    pub async fn patch(&self, path: &str, patch: &Value) -> Result<Value> {
        let request = http::Request::patch(path)
            .header(http::header::CONTENT_TYPE, "application/strategic-merge-patch+json")
            .body(serde_json::to_vec(patch)?)?;
        bounded(async { self.client.request(request).await.map_err(words) }).await.context(path.to_owned())
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, path: &str) -> Result<()> {
        let body = serde_json::to_vec(&serde_json::json!({"propagationPolicy": "Background"}))?;
        let request =
            http::Request::delete(path).header(http::header::CONTENT_TYPE, "application/json").body(body)?;
        let answer = bounded(async { Ok(self.client.request::<Value>(request).await) }).await;
        match answer.context(path.to_owned())? {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            answer => answer.map(drop).map_err(words).context(path.to_owned()),
        }
    }

    /// Runs a program in a pod, and returns what it printed. It must succeed.
    pub async fn exec(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> Result<String> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let run = async {
            let parameters = AttachParams::default().container(container).stdin(false);
            let mut process = pods.exec(pod, command.iter().copied(), &parameters).await.map_err(words)?;
            let (out, err) = (process.stdout(), process.stderr());
            let status = process.take_status();
            let (out, err) = tokio::join!(all(out), all(err));
            let status = match status {
                Some(status) => status.await,
                None => None,
            };
            match status {
                Some(status) if status.status.as_deref() == Some("Success") => Ok(out),
                Some(status) => {
                    let why = if err.trim().is_empty() { status.message.unwrap_or_default() } else { err };
                    Err(anyhow!("{}", why.trim()))
                }
                None => Err(anyhow!("the connection broke off")),
            }
        };
        timeout(EXEC_TIMEOUT, run).await.context("no answer in time")?
    }
}

/// Something that may not be there, and then why.
pub type Part<T> = Result<T, String>;

pub fn part<T>(result: Result<T>) -> Part<T> {
    result.map_err(|error| format!("{error:#}"))
}

/// Where the API server has an object. Every kind that we install has a regular plural.
pub fn path(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (version, metadata) = (text(&object["apiVersion"]), &object["metadata"]);
    let root = if version.contains('/') { "apis" } else { "api" };
    let namespace = match metadata["namespace"].as_str() {
        Some(namespace) => format!("namespaces/{namespace}/"),
        None => String::new(),
    };
    let plural = format!("{}s", text(&object["kind"]).to_lowercase());
    format!("/{root}/{version}/{namespace}{plural}/{}", text(&metadata["name"]))
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

async fn all(stream: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(mut stream) = stream {
        // What came before it broke off is as much as there is.
        let _ = stream.read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn bounded<T>(request: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(REQUEST_TIMEOUT, request).await.context("the API server does not answer")?
}

/// An error as a person reads it.
fn words(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow!("{} ({})", status.message, status.code),
        error => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                // Many repeat what they wrap.
                if !text.contains(&cause.to_string()) {
                    text = format!("{text}: {cause}");
                }
                source = cause.source();
            }
            anyhow!("{}", text.trim_start_matches("ServiceError: "))
        }
    }
}
