//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler on a machine of their own.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::pki::{Pki, kubeconfig};
use crate::place::Place;
use crate::poll::until;
use crate::process::{Process, run_ok};

/// Ranges of the pods' addresses; each node gets a /24 and a /64 of them.
pub const POD_CIDR: &str = "10.44.0.0/16,fd00:10:44::/48";
/// Ranges of the Services' addresses.
pub const SERVICE_CIDR: &str = "10.97.0.0/16,fd00:10:97::/112";
/// Address of the cluster's DNS.
pub const DNS_ADDRESS: &str = "10.97.0.10";

const READY: Duration = Duration::from_secs(90);
const KUBECTL: Duration = Duration::from_secs(90);

/// The running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    place: Place,
    programs: PathBuf,
    pub(super) pki: Pki,
    api: Mutex<Option<Process>>,
    _others: Vec<Process>,
}

impl ControlPlane {
    /// Starts all of it on `place`; returns when the API server is ready and pods could be made.
    pub fn start(place: &Place, programs: &Path) -> Result<ControlPlane> {
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
        let server = format!("https://{own}:6443");
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
            _others: Vec::new(),
        };
        let local = "http://127.0.0.1:2379";
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
        plane._others.push(plane.program("etcd", &etcd)?);
        plane.start_api()?;
        let pki = |file: &str| plane.pki.path(file).display().to_string();
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
        let others = [
            plane.program("kube-controller-manager", &manager)?,
            plane.program("kube-scheduler", &scheduler)?,
        ];
        plane._others.extend(others);
        until(READY, "the default service account is there", || {
            plane.kubectl(["get", "serviceaccount", "default"]).map(|_| true)
        })?;
        Ok(plane)
    }

    /// Starts the API server, or starts it again.
    pub fn start_api(&self) -> Result<()> {
        let pki = |file: &str| self.pki.path(file).display().to_string();
        let own = self.place.v4;
        let flags = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--bind-address={own}"),
            format!("--advertise-address={own}"),
            "--secure-port=6443".to_owned(),
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
        let process = self.program("kube-apiserver", &flags)?;
        *self.api.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(process);
        until(READY, "the API server is ready", || {
            ensure!(self.api_runs()?, "it ended");
            self.kubectl(["get", "--raw", "/readyz"]).map(|_| true)
        })
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

    /// kubectl as the cluster's administrator, not yet started.
    pub fn kubectl_command<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.programs.join("kubectl").to_string_lossy());
        command.args(args.into_iter().map(Into::into));
        command
    }

    /// Any program as the cluster's administrator, not yet started.
    pub fn command(&self, program: &str) -> Command {
        let mut command = self.place.command(program, [""; 0]);
        command.env("KUBECONFIG", self.place.dir().join("admin.kubeconfig")).env("HOME", self.place.dir());
        command
    }

    fn program(&self, name: &str, flags: &[String]) -> Result<Process> {
        self.place.start(name, &self.programs.join(name).to_string_lossy(), flags)
    }
}

/// A directory, made.
pub(super) fn created(path: PathBuf) -> Result<PathBuf> {
    std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}
