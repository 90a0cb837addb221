//! The agent's settings: flags, then environment, then a YAML file, then defaults; read once, validated once.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::Args;
use serde::Deserialize;
use weft_cni::install::Installation;

use crate::cni::Install;

/// Everything that can be set, as written by a person. Each flag has the environment variable shown and, in the file
/// given by `--config`, a key of the same name with underscores.
#[derive(Debug, Default, Clone, Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// YAML file with any of these settings; flags and environment win over it.
    #[arg(long, env = "WEFT_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Name of this node, as in the pods' nodeName.
    #[arg(long, env = "WEFT_NODE")]
    pub node: Option<String>,
    /// Controller's xDS and CA address; the port is 15012 unless given.
    #[arg(long, env = "WEFT_CONTROL", value_name = "HOST[:PORT]")]
    pub control: Option<String>,
    /// PEM file with the roots the controller's certificate must chain to.
    #[arg(long, env = "WEFT_CONTROL_CA", value_name = "FILE")]
    pub control_ca: Option<PathBuf>,
    /// File with the join token; read again at every connect.
    #[arg(long, env = "WEFT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Name under which kernel programs and maps are pinned; two agents on one kernel need two [default: weft]
    #[arg(long, env = "WEFT_INSTANCE")]
    pub instance: Option<String>,
    /// Where bpffs is mounted [default: /sys/fs/bpf]
    #[arg(long, env = "WEFT_BPFFS", value_name = "DIR")]
    pub bpffs: Option<PathBuf>,
    /// The cgroup2 directory that all pods' processes are below, which is where Services are recognised beside a CNI that
    /// rewrites their addresses in sockets [default: the kubelet's, if there is one]
    #[arg(long, env = "WEFT_PODS_CGROUP", value_name = "DIR")]
    pub pods_cgroup: Option<PathBuf>,
    /// The kubelet's cgroup2 cgroup, as /proc/PID/cgroup has it on the node: connections of root's processes in it are
    /// probes, and go straight to applications [default: found by the kubelet's process]
    #[arg(long, env = "WEFT_KUBELET_CGROUP", value_name = "PATH")]
    pub kubelet_cgroup: Option<String>,
    /// Unix socket of the admin interface [default: /run/weft/agent.sock]
    #[arg(long, env = "WEFT_ADMIN_SOCKET", value_name = "PATH")]
    pub admin_socket: Option<PathBuf>,
    /// File for the roots that the controller says are to be believed. It makes the agent know the controller after a rotation
    /// of the root; so on a node whose --control-ca nobody renews it belongs on a disk [default: beside the admin socket]
    #[arg(long, env = "WEFT_TRUST_FILE", value_name = "FILE")]
    pub trust_file: Option<PathBuf>,
    /// Address of /metrics [default: 0.0.0.0:15020]
    #[arg(long, env = "WEFT_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// Address of /readyz [default: 0.0.0.0:15021]
    #[arg(long, env = "WEFT_READY_LISTEN", value_name = "IP:PORT")]
    pub ready_listen: Option<SocketAddr>,
    /// Unix socket on which the CNI plugin announces new pods; none unless given
    #[arg(long, env = "WEFT_CNI_SOCKET", value_name = "PATH")]
    pub cni_socket: Option<PathBuf>,
    /// The node's directory of network configurations, in which the CNI plugin is kept; not unless given
    #[arg(
        long,
        env = "WEFT_CNI_CONF_DIR",
        value_name = "DIR",
        requires = "cni_socket",
        requires = "cni_bin_dir"
    )]
    pub cni_conf_dir: Option<PathBuf>,
    /// The node's directory of CNI plugins
    #[arg(long, env = "WEFT_CNI_BIN_DIR", value_name = "DIR")]
    pub cni_bin_dir: Option<PathBuf>,
    /// Namespaces whose pods start even where neither agent nor API server can say whether they belong to the mesh
    /// [default: kube-system]
    #[arg(long, env = "WEFT_CNI_EXCLUDED_NAMESPACES", value_delimiter = ',', value_name = "NAME,...")]
    pub cni_excluded_namespaces: Option<Vec<String>>,
    /// Seconds that open connections get to end after SIGTERM [default: 30]
    #[arg(long, env = "WEFT_DRAIN_DEADLINE", value_name = "SECONDS")]
    pub drain_deadline: Option<u64>,
    /// Data-path threads, each with its own connections and tunnels [default: half the cores, at least 1]
    #[arg(long, env = "WEFT_WORKERS")]
    pub workers: Option<usize>,
    /// Seconds a connection waits for news (its pod's publication, an unknown address, a certificate) before it is
    /// refused [default: 5]
    #[arg(long, env = "WEFT_HOLD_TIMEOUT", value_name = "SECONDS")]
    pub hold_timeout: Option<u64>,
    /// Open connections of one pod; further ones wait in its listener's backlog [default: 16384]
    #[arg(long, env = "WEFT_MAX_CONNECTIONS_PER_POD", value_name = "N")]
    pub max_connections_per_pod: Option<usize>,
    /// Log filter, for example info,weft_agent=debug,access=off [default: info]
    #[arg(long, env = "WEFT_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Log lines as JSON [default: false]
    #[arg(long, env = "WEFT_LOG_JSON", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub log_json: Option<bool>,
    /// Let the kernel programs log each captured and refused connection; for debugging [default: false]
    #[arg(long, env = "WEFT_EBPF_LOG", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub ebpf_log: Option<bool>,
}

const CONTROL_PORT: u16 = 15012;
/// Where the admin interface is unless a setting says otherwise.
pub const ADMIN_SOCKET: &str = "/run/weft/agent.sock";

/// `HOST:PORT`, also for a host alone. Kubernetes gives pods the address of a Service so, an IPv6 one without brackets.
fn with_port(address: String) -> String {
    match address.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, CONTROL_PORT).to_string(),
        Err(_) if address.contains(':') => address,
        Err(_) => format!("{address}:{CONTROL_PORT}"),
    }
}

/// A path that may be left out, also by an empty variable, as the chart's are.
pub fn given(path: Option<String>) -> Option<PathBuf> {
    path.filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Validated settings.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: String,
    pub control: String,
    pub control_ca: PathBuf,
    pub token_file: PathBuf,
    pub instance: String,
    pub bpffs: PathBuf,
    pub pods_cgroup: Option<PathBuf>,
    pub kubelet_cgroup: Option<PathBuf>,
    pub admin_socket: PathBuf,
    pub trust_file: PathBuf,
    pub metrics_listen: SocketAddr,
    pub ready_listen: SocketAddr,
    pub cni_socket: Option<PathBuf>,
    pub cni_install: Option<Install>,
    pub drain_deadline: Duration,
    pub workers: usize,
    pub hold_timeout: Duration,
    pub max_connections_per_pod: usize,
    pub log: String,
    pub log_json: bool,
    pub ebpf_log: bool,
}

impl Settings {
    /// Fills gaps from the file, then from the defaults, and checks the result.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let file = match &self.config {
            Some(path) => {
                let text =
                    std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                serde_yaml_ng::from_str(&text).with_context(|| format!("in {}", path.display()))?
            }
            None => Settings::default(),
        };
        let required = |what: &str| {
            format!("no {what}: give --{what}, or WEFT_{}", what.to_uppercase().replace('-', "_"))
        };
        let cni_socket = self.cni_socket.or(file.cni_socket);
        let directories = self.cni_conf_dir.or(file.cni_conf_dir).zip(self.cni_bin_dir.or(file.cni_bin_dir));
        let excluded = self.cni_excluded_namespaces.or(file.cni_excluded_namespaces);
        let cni_install = match (&cni_socket, directories) {
            (Some(socket), Some((conf_dir, bin_dir))) => Some(Install {
                program: std::env::current_exe().context("own path")?.with_file_name(weft_cni::PLUGIN),
                node: Installation { conf_dir, bin_dir },
                socket: socket.clone(),
                excluded_namespaces: excluded.unwrap_or_else(|| vec!["kube-system".to_owned()]),
            }),
            _ => None,
        };
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let admin_socket: PathBuf =
            self.admin_socket.or(file.admin_socket).unwrap_or_else(|| ADMIN_SOCKET.into());
        let config = Config {
            node: self.node.or(file.node).with_context(|| required("node"))?,
            control: with_port(self.control.or(file.control).with_context(|| required("control"))?),
            control_ca: self.control_ca.or(file.control_ca).with_context(|| required("control-ca"))?,
            token_file: self.token_file.or(file.token_file).with_context(|| required("token-file"))?,
            instance: self.instance.or(file.instance).unwrap_or_else(|| "weft".into()),
            bpffs: self.bpffs.or(file.bpffs).unwrap_or_else(|| "/sys/fs/bpf".into()),
            pods_cgroup: self.pods_cgroup.or(file.pods_cgroup),
            kubelet_cgroup: given(self.kubelet_cgroup.or(file.kubelet_cgroup)),
            trust_file: (self.trust_file.or(file.trust_file))
                .unwrap_or_else(|| admin_socket.with_extension("trust")),
            admin_socket,
            metrics_listen: self
                .metrics_listen
                .or(file.metrics_listen)
                .unwrap_or(([0, 0, 0, 0], 15020).into()),
            ready_listen: self.ready_listen.or(file.ready_listen).unwrap_or(([0, 0, 0, 0], 15021).into()),
            cni_socket,
            cni_install,
            drain_deadline: Duration::from_secs(self.drain_deadline.or(file.drain_deadline).unwrap_or(30)),
            workers: self.workers.or(file.workers).unwrap_or((cores / 2).max(1)),
            hold_timeout: Duration::from_secs(self.hold_timeout.or(file.hold_timeout).unwrap_or(5)),
            max_connections_per_pod: self
                .max_connections_per_pod
                .or(file.max_connections_per_pod)
                .unwrap_or(16384),
            log: self.log.or(file.log).unwrap_or_else(|| "info".into()),
            log_json: self.log_json.or(file.log_json).unwrap_or(false),
            ebpf_log: self.ebpf_log.or(file.ebpf_log).unwrap_or(false),
        };
        ensure!((1..=1024).contains(&config.workers), "--workers must be from 1 to 1024");
        ensure!(config.max_connections_per_pod > 0, "--max-connections-per-pod must be at least 1");
        ensure!(
            !config.instance.is_empty()
                && config.instance.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')),
            "--instance may hold letters, digits, '-' and '_' only: it becomes a directory name in bpffs"
        );
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            node: Some("n".into()),
            control: Some("c:15012".into()),
            control_ca: Some("ca.pem".into()),
            token_file: Some("token".into()),
            ..Settings::default()
        }
    }

    #[test]
    fn the_controllers_port_may_be_left_out() {
        for (given, meant) in [
            ("10.0.0.1", "10.0.0.1:15012"),
            ("fd00::1", "[fd00::1]:15012"),
            ("[fd00::1]:1", "[fd00::1]:1"),
            ("weft-control.weft-system.svc", "weft-control.weft-system.svc:15012"),
            ("control:443", "control:443"),
        ] {
            assert_eq!(with_port(given.to_owned()), meant);
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let dir = std::env::temp_dir().join(format!("weft-config-{}", std::process::id()));
        std::fs::write(&dir, "workers: 3\nlog: warn\n").expect("written");
        let with_file =
            Settings { config: Some(dir.clone()), log: Some("debug".into()), ..settings() }.resolve();
        std::fs::remove_file(&dir).expect("removed");
        let config = with_file.expect("valid");
        assert_eq!((config.workers, config.log.as_str(), config.hold_timeout.as_secs()), (3, "debug", 5));
    }

    #[test]
    fn says_what_is_missing_or_wrong() {
        let error = Settings { node: None, ..settings() }.resolve().expect_err("no node");
        assert!(error.to_string().contains("--node"), "{error}");
        assert!(Settings { workers: Some(0), ..settings() }.resolve().is_err());
        assert!(Settings { instance: Some("../x".into()), ..settings() }.resolve().is_err());
        assert!(serde_yaml_ng::from_str::<Settings>("wrokers: 1").is_err(), "a misspelt key was ignored");
    }
}
