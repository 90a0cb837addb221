//! The controller of a cluster as a process on a machine of its own.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use rcgen::{Issuer, KeyPair};
use weft_api::trust::TrustStatus;

use crate::binaries::binary;
use crate::http::get;
use crate::manifest::Directory;
use crate::place::Place;
use crate::process::{Process, run_ok};
use crate::topology::{POD_NETWORKS, SERVICE_NETWORKS};

/// Port of xDS and the CA.
const XDS_PORT: u16 = 15012;
const READY_TIMEOUT: Duration = Duration::from_secs(30);

/// `weft-control`, running or not.
#[derive(Debug)]
pub struct Controller {
    place: Place,
    source: Source,
    process: Mutex<Option<Process>>,
}

/// What configures it.
#[derive(Debug)]
pub(crate) enum Source {
    /// Manifests, and more flags; keys and state are in `state_dir` then.
    Directory(Directory, Vec<String>),
    /// An API server, as the environment says.
    Cluster(Vec<(String, String)>),
}

impl Controller {
    pub(crate) fn new(place: Place, source: Source) -> Controller {
        Controller { place, source, process: Mutex::new(None) }
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<()> {
        self.start_unready()?;
        self.wait_ready()
    }

    /// Starts it without waiting.
    pub fn start_unready(&self) -> Result<()> {
        let mut command = self.place.command(&binary("weft-control")?, [""; 0]);
        match &self.source {
            Source::Directory(directory, flags) => command.args(flags).args([
                "--directory",
                &directory.path().to_string_lossy(),
                "--state-dir",
                &self.state_dir().to_string_lossy(),
                "--listen",
                &format!("0.0.0.0:{XDS_PORT}"),
                "--pod-networks",
                &POD_NETWORKS.join(","),
                "--service-networks",
                &SERVICE_NETWORKS.join(","),
            ]),
            Source::Cluster(environment) => command.arg("--kubernetes").envs(environment.iter().cloned()),
        };
        *self.slot() = Some(self.place.start_command("controller", command)?);
        Ok(())
    }

    /// Waits until `/readyz` says so.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = SocketAddr::from(([127, 0, 0, 1], 15021));
        crate::poll::until(READY_TIMEOUT, "the controller is ready", || {
            anyhow::ensure!(self.running()?, "the controller ended");
            Ok(get(&self.place.connect(ready)?, "/readyz")?.status == 200)
        })
    }

    /// SIGKILL.
    pub fn kill(&self) -> Result<()> {
        match self.slot().take() {
            Some(mut process) => process.kill(),
            None => Ok(()),
        }
    }

    /// The machine that it runs on.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Whether it runs.
    pub fn running(&self) -> Result<bool> {
        self.slot().as_mut().map_or(Ok(false), Process::running)
    }

    /// What it has written so far.
    pub fn log(&self) -> Result<String> {
        Ok(std::fs::read_to_string(self.place.dir().join("controller.log"))?)
    }

    /// A scrape of its metrics.
    pub fn metrics(&self) -> Result<crate::metrics::Metrics> {
        let address = SocketAddr::from(([127, 0, 0, 1], 15020));
        crate::metrics::Metrics::parse(&get(&self.place.connect(address)?, "/metrics")?.body)
    }

    /// The directory with the roots' certificates (`root.pem`), the key (in `trust.json`), and who is enrolled; not in a
    /// cluster.
    pub fn state_dir(&self) -> PathBuf {
        self.place.dir().join("state")
    }

    /// The root that signs, for certificates that it did not give; not in a cluster.
    pub fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        let record = std::fs::read(self.state_dir().join("trust.json")).context("the root's key")?;
        let record: serde_json::Value = serde_json::from_slice(&record)?;
        let pem = |name: &str| record["signer"][name].as_str().with_context(|| format!("no {name}"));
        Ok(Issuer::from_ca_cert_pem(pem("certificate")?, KeyPair::from_pem(pem("key")?)?)?)
    }

    /// How a rotation of the root goes on; not in a cluster.
    pub fn trust_status(&self) -> Result<TrustStatus> {
        let status = std::fs::read(self.state_dir().join("trust-status.json"))?;
        Ok(serde_json::from_slice(&status)?)
    }

    /// Replaces the root, as a person does, and returns when the command says that it is done; not in a cluster.
    pub fn rotate(&self, timeout: Duration) -> Result<()> {
        let state = self.state_dir();
        let arguments = ["rotate", "--state-dir", &state.to_string_lossy()];
        run_ok(self.place.command(&binary("weft-control")?, arguments), timeout).map(drop)
    }

    /// Where agents find it.
    pub fn address(&self) -> SocketAddr {
        self.place.at(XDS_PORT)
    }

    /// A join token for `node`; not in a cluster.
    pub fn token(&self, node: &str) -> Result<String> {
        let command = self.place.command(
            &binary("weft-control")?,
            ["token", "--state-dir", &self.state_dir().to_string_lossy(), "--node", node],
        );
        let token =
            run_ok(command, Duration::from_secs(10)).with_context(|| format!("join token for {node}"))?;
        Ok(String::from_utf8(token)?)
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}
