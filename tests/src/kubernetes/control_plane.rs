//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler on a machine of their own; or the first two alone.

use std::ffi::OsString;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::pki::{Pki, kubeconfig};
use crate::http::send;
use crate::place::Place;
use crate::poll::until;
use crate::process::{Process, run_ok};

/// Ranges of the pods' addresses; each node gets a /24 and a /64 of them.
pub const POD_CIDR: &str = "10.44.0.0/16,fd00:10:44::/48";
/// Ranges of the Services' addresses.
pub const SERVICE_CIDR: &str = "10.97.0.0/16,fd00:10:97::/112";
/// Address of the cluster's DNS.
pub const DNS_ADDRESS: &str = "10.97.0.10";

/// Where etcd listens, on loopback.
const ETCD: &str = "127.0.0.1:2379";
const API_PORT: u16 = 6443;
const READY: Duration = Duration::from_secs(90);
const KUBECTL: Duration = Duration::from_secs(90);

/// The running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    place: Place,
    programs: PathBuf,
    pub(super) pki: Pki,
    api: Mutex<Option<Process>>,
    api_flags: Vec<String>,
    /// etcd first.
    others: Vec<Process>,
}

impl ControlPlane {
    /// Starts all of it on `place`; returns when the API server is ready and pods could be made.
    pub fn start(place: &Place, programs: &Path) -> Result<ControlPlane> {
        let mut plane = Self::start_storage(place, programs, Vec::new())?;
        plane.start_managers()?;
        Ok(plane)
    }

    /// Starts etcd and the API server, which gets `api_flags` as well: enough for everything that talks to it, nothing
    /// of which runs a pod.
    pub fn start_storage(place: &Place, programs: &Path, api_flags: Vec<String>) -> Result<ControlPlane> {
        let dir = place.dir();
        let pki = Pki::create(created(dir.join("pki"))?)?;
        let own: IpAddr = place.v4.into();
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        pki.issue(
            "apiserver",
            None,
            "kube-apiserver",
            &names,
            &[own, [127, 0, 0, 1].into(), [10, 97, 0, 1].into()],
        )?;
        let masters = Some("system:masters");
        let server = format!("https://{own}:{API_PORT}");
        for (file, group, user) in [
            ("admin", masters, "admin"),
            ("kubelet-client", masters, "kube-apiserver-kubelet-client"),
            ("controller-manager", None, "system:kube-controller-manager"),
            ("scheduler", None, "system:kube-scheduler"),
            ("proxy", None, "system:kube-proxy"),
        ] {
            pki.issue(file, group, user, &[], &[])?;
            kubeconfig(&dir.join(format!("{file}.kubeconfig")), &server, &dir.join("pki"), file)?;
        }
        let mut plane = ControlPlane {
            place: place.clone(),
            programs: programs.to_owned(),
            pki,
            api: Mutex::default(),
            api_flags,
            others: Vec::new(),
        };
        let local = format!("http://{ETCD}");
        let data = format!("--data-dir={}", dir.join("etcd").display());
        let etcd = [
            &data,
            "--unsafe-no-fsync",
            "--log-level=warn",
            &format!("--listen-client-urls={local}"),
            &format!("--advertise-client-urls={local}"),
            "--listen-peer-urls=http://127.0.0.1:2380",
        ]
        .map(str::to_owned);
        plane.others.push(plane.program("etcd", &etcd)?);
        plane.start_api()?;
        Ok(plane)
    }

    fn start_managers(&mut self) -> Result<()> {
        let dir = self.place.dir();
        let pki = |file: &str| self.pki.path(file).display().to_string();
        let config = |file: &str| format!("--kubeconfig={}", dir.join(file).display());
        let manager = [
            config("controller-manager.kubeconfig"),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            "--use-service-account-credentials".to_owned(),
            format!("--service-account-private-key-file={}", pki("sa.key")),
            format!("--root-ca-file={}", pki("ca.crt")),
            format!("--cluster-signing-cert-file={}", pki("ca.crt")),
            format!("--cluster-signing-key-file={}", pki("ca.key")),
            format!("--cluster-cidr={POD_CIDR}"),
            "--allocate-node-cidrs".to_owned(),
            "--node-cidr-mask-size-ipv6=64".to_owned(),
            format!("--service-cluster-ip-range={SERVICE_CIDR}"),
        ];
        let scheduler = [
            config("scheduler.kubeconfig"),
            "--leader-elect=false".into(),
            "--bind-address=127.0.0.1".into(),
        ];
        let others =
            [self.program("kube-controller-manager", &manager)?, self.program("kube-scheduler", &scheduler)?];
        self.others.extend(others);
        until(READY, "the default service account is there", || {
            self.kubectl(["get", "serviceaccount", "default"]).map(|_| true)
        })
    }

    /// Where the API server listens.
    pub fn address(&self) -> SocketAddr {
        self.place.at(API_PORT)
    }

    /// Where a program of Kubernetes is.
    pub fn program_path(&self, name: &str) -> String {
        self.programs.join(name).to_string_lossy().into_owned()
    }

    /// Starts the API server, or starts it again.
    pub fn start_api(&self) -> Result<()> {
        let pki = |file: &str| self.pki.path(file).display().to_string();
        let own = self.place.v4;
        let mut flags = vec![
            format!("--etcd-servers=http://{ETCD}"),
            format!("--bind-address={own}"),
            format!("--advertise-address={own}"),
            format!("--secure-port={API_PORT}"),
            "--endpoint-reconciler-type=lease".to_owned(),
            format!("--tls-cert-file={}", pki("apiserver.crt")),
            format!("--tls-private-key-file={}", pki("apiserver.key")),
            format!("--client-ca-file={}", pki("ca.crt")),
            format!("--kubelet-certificate-authority={}", pki("ca.crt")),
            format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
            format!("--kubelet-client-key={}", pki("kubelet-client.key")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            format!("--service-account-key-file={}", pki("sa.pub")),
            format!("--service-account-signing-key-file={}", pki("sa.key")),
            format!("--service-cluster-ip-range={SERVICE_CIDR}"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--allow-privileged".to_owned(),
        ];
        flags.extend_from_slice(&self.api_flags);
        let process = self.program("kube-apiserver", &flags)?;
        *self.api.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(process);
        until(READY, "the API server is ready", || {
            ensure!(self.api_runs()?, "it ended");
            // Cheaper to ask than kubectl.
            drop(self.place.connect(self.address())?);
            self.kubectl(["get", "--raw", "/readyz"]).map(|_| true)
        })
    }

    /// Stops etcd where it is: the API server takes requests and answers none that needs it.
    pub fn pause_storage(&self) -> Result<()> {
        self.etcd()?.signal(Signal::SIGSTOP)
    }

    /// Lets etcd go on.
    pub fn resume_storage(&self) -> Result<()> {
        self.etcd()?.signal(Signal::SIGCONT)
    }

    fn etcd(&self) -> Result<&Process> {
        self.others.first().context("etcd does not run")
    }

    /// Makes etcd forget what was before now: whoever watches from an older version has to list anew.
    pub fn compact_storage(&self) -> Result<()> {
        let ask = |path: &str, body: &Value| -> Result<Value> {
            let stream = self.place.connect(ETCD.parse()?)?;
            let reply = send(&stream, "POST", path, "application/json", &body.to_string())?;
            ensure!(reply.status == 200, "etcd, {path}: {} {}", reply.status, reply.body);
            Ok(serde_json::from_str(&reply.body)?)
        };
        // The gateway writes 64-bit numbers as text. Any key will do.
        let now = ask("/v3/kv/range", &json!({"key": "AA=="}))?["header"]["revision"].take();
        ask("/v3/kv/compaction", &json!({"revision": now, "physical": true})).map(drop)
    }

    /// SIGKILL to the API server.
    pub fn kill_api(&self) -> Result<()> {
        let process = self.api.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        process.context("no API server runs")?.kill()
    }

    fn api_runs(&self) -> Result<bool> {
        self.api
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .as_mut()
            .map_or(Ok(false), Process::running)
    }

    /// Runs kubectl as the cluster's administrator; it must succeed. Returns its standard output.
    pub fn kubectl<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        let output = run_ok(self.kubectl_command(args), KUBECTL)?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Runs kubectl as the administrator with `input` on its standard input; it must succeed.
    pub fn feed(&self, arguments: &[&str], input: &str) -> Result<()> {
        let what = format!("kubectl {}", arguments[0]);
        let mut child = self
            .kubectl_command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context(what.clone())?;
        child.stdin.take().context("its input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// kubectl as the cluster's administrator, not yet started.
    pub fn kubectl_command<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.program_path("kubectl"));
        command.args(args.into_iter().map(Into::into));
        command
    }

    /// Any program as the cluster's administrator, not yet started.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.place.command(program, [""; 0]);
        command.env("KUBECONFIG", self.kubeconfig()).env("HOME", self.place.dir());
        command
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.place.dir().join("admin.kubeconfig")
    }

    /// The machine that all of it runs on.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// One of the files of the cluster's authority.
    pub fn pki_file(&self, file: &str) -> PathBuf {
        self.pki.path(file)
    }

    fn program(&self, name: &str, flags: &[String]) -> Result<Process> {
        self.place.start(name, &self.program_path(name), flags)
    }
}

/// A directory, made.
pub(super) fn created(path: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}
