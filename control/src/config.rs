//! The controller's settings: flags, environment and a file, in this order of precedence, read once and validated.
//! Defaults are declared here and nowhere else.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use ipnet::IpNet;
use serde::Deserialize;
use weft_api::{DefaultInbound, field::is_dns_subdomain};
use weft_core::TrustDomain;

use crate::{
    translate::{Inbound, MeshSettings},
    trust::{Rotation, given::Given},
};

const EXAMPLES: &str = "\
Examples:
  Configure the mesh from a directory of manifests:
    weft-control --directory /etc/weft/manifests --state-dir /var/lib/weft \\
        --pod-networks 10.1.0.0/16,fd00:1::/64 --service-networks 10.96.0.0/12

  Configure it from the cluster that this runs in:
    weft-control --kubernetes

  Make a join token for the agent of node-1; the agent trusts the root beside it:
    weft-control token --state-dir /var/lib/weft --node node-1 > node-1.token
    cp /var/lib/weft/root.pem control-ca.pem

  Replace the root of trust while everything runs:
    weft-control rotate --state-dir /var/lib/weft

Every flag can also be set in the environment (WEFT_POD_NETWORKS=...) or in the --config file (pod-networks: [...]).
A flag wins over the environment, and that over the file.";

const ROTATE_AFTER: Duration = Duration::from_secs(365 * 24 * 3600);
const OVERLAP: Duration = Duration::from_secs(3600);

/// The controller of the Weft service mesh: reads Kubernetes objects, tells agents what is where, and issues
/// certificates.
#[derive(Debug, Parser)]
#[command(name = "weft-control", version, after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// YAML file with any of these settings, under the names of their flags.
    #[arg(long, env = "WEFT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a join token with which an agent proves that it is its node's.
    Token(TokenArgs),
    /// Replace the root of trust, without a connection being lost. The controller that uses the state directory does it, and
    /// this prints how it goes on until it is done.
    Rotate(RotateArgs),
}

#[derive(Debug, Args)]
pub struct TokenArgs {
    /// The controller's state directory, which holds the key that signs tokens.
    #[arg(long, env = "WEFT_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// The node the token is for.
    #[arg(long, value_name = "NAME")]
    pub node: String,
    /// How long the token is valid: a number and s, m, h or d.
    #[arg(long, default_value = "8760h", value_parser = parse_duration, value_name = "DURATION")]
    pub ttl: Duration,
}

#[derive(Debug, Args)]
pub struct RotateArgs {
    /// The controller's state directory.
    #[arg(long, env = "WEFT_STATE_DIR", value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Do not wait until it is done.
    #[arg(long)]
    pub no_wait: bool,
}

/// Every setting, each of which may be missing at one level and given at another.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct Flags {
    /// Directory of Kubernetes manifests (*.yaml, *.yml, *.json) to read and watch.
    #[arg(long, env = "WEFT_DIRECTORY", value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Directory for keys and what must survive a restart; made if missing, and refused if others can read it.
    #[arg(long, env = "WEFT_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Read a cluster's objects from its API server instead, and keep keys and state there. The server is that of
    /// KUBECONFIG, else that of the pod's service account.
    #[arg(long, env = "WEFT_KUBERNETES", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    kubernetes: Option<bool>,
    /// Namespace of the controller and the agents in the cluster. [default: the pod's, or the kubeconfig's]
    #[arg(long, env = "WEFT_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,
    /// Name of this replica among those of a cluster's controller: the pod's. [default: host name and process id]
    #[arg(long, env = "WEFT_POD_NAME", value_name = "NAME")]
    pod_name: Option<String>,
    /// Address of the port for agents: xDS, certificates and reports, over TLS. [default: 0.0.0.0:15012]
    #[arg(long, env = "WEFT_LISTEN", value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Address of /metrics. [default: 0.0.0.0:15020]
    #[arg(long, env = "WEFT_METRICS_LISTEN", value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Address of /readyz and /livez. [default: 0.0.0.0:15021]
    #[arg(long, env = "WEFT_READY_LISTEN", value_name = "ADDRESS")]
    ready_listen: Option<SocketAddr>,
    /// Ranges of pod addresses: TCP from enrolled pods to them is captured. In a cluster, those of its Nodes (podCIDRs)
    /// are added.
    #[arg(long, env = "WEFT_POD_NETWORKS", value_delimiter = ',', value_name = "CIDR,...")]
    pod_networks: Option<Vec<String>>,
    /// Ranges of Service addresses: TCP from enrolled pods to them is captured. In a cluster, its ServiceCIDRs are
    /// added.
    #[arg(long, env = "WEFT_SERVICE_NETWORKS", value_delimiter = ',', value_name = "CIDR,...")]
    service_networks: Option<Vec<String>>,
    /// Ranges that are never captured, even inside the others.
    #[arg(long, env = "WEFT_EXTERNAL_NETWORKS", value_delimiter = ',', value_name = "CIDR,...")]
    external_networks: Option<Vec<String>>,
    /// Trust domain of the identities issued. [default: cluster.local]
    #[arg(long, env = "WEFT_TRUST_DOMAIN", value_name = "NAME")]
    trust_domain: Option<String>,
    /// Name of the cluster in workloads' uids. [default: Kubernetes]
    #[arg(long, env = "WEFT_CLUSTER_ID", value_name = "NAME")]
    cluster_id: Option<String>,
    /// DNS domain of Services. [default: cluster.local]
    #[arg(long, env = "WEFT_CLUSTER_DOMAIN", value_name = "DOMAIN")]
    cluster_domain: Option<String>,
    /// Who may call a pod where no policy and no annotation says it: all-unauthenticated, audit, all-authenticated,
    /// cluster-authenticated or deny. [default: all-unauthenticated]
    #[arg(long, env = "WEFT_DEFAULT_INBOUND", value_name = "WHO")]
    default_inbound: Option<String>,
    /// The least that annotations of namespaces may say of that. With all-authenticated or cluster-authenticated, no policy
    /// lets anybody in who does not prove such an identity. [default: all-unauthenticated]
    #[arg(long, env = "WEFT_INBOUND_FLOOR", value_name = "WHO")]
    inbound_floor: Option<String>,
    /// With `false`, every pod leaves the mesh, whatever its labels say: before an uninstallation. In a cluster only.
    /// [default: true]
    #[arg(long, env = "WEFT_MESH_ENABLED", value_name = "BOOL")]
    mesh_enabled: Option<bool>,
    /// Directory with the root that is to sign, or an intermediate under one, instead of a root that the controller makes:
    /// tls.crt (the certificate that signs, then those above it), tls.key, and ca.crt (the root, unless it is the last one in
    /// tls.crt). Another one that is put there is taken in as a rotation.
    #[arg(long, env = "WEFT_ISSUER", value_name = "DIR")]
    issuer: Option<String>,
    /// Age at which the root of trust is replaced by a new one: a number and s, m, h or d; 0s for never. [default: 365d]
    #[arg(long, env = "WEFT_ROTATE_ROOT_AFTER", value_name = "DURATION")]
    rotate_root_after: Option<String>,
    /// How long two roots are believed at least before the new one signs, and again before the old one is let go. Certificates
    /// of callers that are no agents are valid for that long at most. [default: 1h with --kubernetes, 0s with --directory,
    /// where there are no such callers]
    #[arg(long, env = "WEFT_ROOT_OVERLAP", value_name = "DURATION")]
    root_overlap: Option<String>,
    /// What to log, such as `info` or `warn,ca=debug`. [default: info]
    #[arg(long, env = "WEFT_LOG", value_name = "FILTER")]
    log: Option<String>,
}

/// The settings in force.
#[derive(Debug, Clone)]
pub struct Config {
    pub source: Source,
    pub listen: SocketAddr,
    pub metrics_listen: SocketAddr,
    pub ready_listen: SocketAddr,
    pub log: String,
    pub mesh: MeshSettings,
    pub rotation: Rotation,
    pub issuer: Option<Given>,
}

/// Where objects are read, and where what must survive a restart is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Directory {
        directory: PathBuf,
        state_dir: PathBuf,
    },
    /// The namespace is the controller's own, where it is not as the API server's credentials say. No other replica
    /// has that pod name.
    Kubernetes {
        namespace: Option<String>,
        pod_name: String,
    },
}

/// Why the settings are no good.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {why}")]
    File { path: PathBuf, why: String },
    #[error("{flag} is missing: {hint}")]
    Missing { flag: &'static str, hint: &'static str },
    #[error("{flag}: {why}")]
    Invalid { flag: &'static str, why: String },
}

impl Cli {
    /// The settings of all levels as one, validated.
    pub fn config(self) -> Result<Config, ConfigError> {
        let file = match &self.config {
            Some(path) => read_file(path)?,
            None => Flags::default(),
        };
        self.flags.or(file).validate()
    }
}

fn read_file(path: &Path) -> Result<Flags, ConfigError> {
    let error = |why: String| ConfigError::File { path: path.to_owned(), why };
    let text = fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
    serde_yaml_ng::from_str::<Option<Flags>>(&text)
        .map(Option::unwrap_or_default)
        .map_err(|e| error(e.to_string()))
}

impl Flags {
    fn or(self, other: Flags) -> Flags {
        Flags {
            directory: self.directory.or(other.directory),
            state_dir: self.state_dir.or(other.state_dir),
            kubernetes: self.kubernetes.or(other.kubernetes),
            namespace: self.namespace.or(other.namespace),
            pod_name: self.pod_name.or(other.pod_name),
            listen: self.listen.or(other.listen),
            metrics_listen: self.metrics_listen.or(other.metrics_listen),
            ready_listen: self.ready_listen.or(other.ready_listen),
            pod_networks: self.pod_networks.or(other.pod_networks),
            service_networks: self.service_networks.or(other.service_networks),
            external_networks: self.external_networks.or(other.external_networks),
            trust_domain: self.trust_domain.or(other.trust_domain),
            cluster_id: self.cluster_id.or(other.cluster_id),
            cluster_domain: self.cluster_domain.or(other.cluster_domain),
            default_inbound: self.default_inbound.or(other.default_inbound),
            inbound_floor: self.inbound_floor.or(other.inbound_floor),
            mesh_enabled: self.mesh_enabled.or(other.mesh_enabled),
            issuer: self.issuer.or(other.issuer),
            rotate_root_after: self.rotate_root_after.or(other.rotate_root_after),
            root_overlap: self.root_overlap.or(other.root_overlap),
            log: self.log.or(other.log),
        }
    }

    fn validate(self) -> Result<Config, ConfigError> {
        const NETWORKS: &str = "what is in none of these ranges is not captured, so they have no default";
        let missing = |flag, hint| ConfigError::Missing { flag, hint };
        let invalid = |flag, why: String| ConfigError::Invalid { flag, why };
        let who = |flag, value: Option<String>| match value.as_deref() {
            None | Some("") => Ok(DefaultInbound::default()),
            Some(text) => text.parse().map_err(|why| invalid(flag, why)),
        };
        let text = |value: Option<String>, default: &str| value.unwrap_or_else(|| default.to_owned());

        let trust_domain = TrustDomain::new(&text(self.trust_domain, "cluster.local"))
            .map_err(|e| invalid("--trust-domain", e.to_string()))?;
        let cluster_id = text(self.cluster_id, "Kubernetes");
        if cluster_id.is_empty()
            || !cluster_id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        {
            return Err(invalid(
                "--cluster-id",
                format!("{cluster_id:?} is no name: letters, digits, '-', '_' and '.'"),
            ));
        }
        let cluster_domain = text(self.cluster_domain, "cluster.local");
        if !is_dns_subdomain(&cluster_domain) {
            return Err(invalid("--cluster-domain", format!("{cluster_domain:?} is no DNS domain")));
        }
        let source = source(self.kubernetes, self.directory, self.state_dir, self.namespace, self.pod_name)?;
        let in_directory = matches!(source, Source::Directory { .. });
        let needed = |flag, networks: Option<Vec<IpNet>>| match networks {
            None if in_directory => Err(missing(flag, NETWORKS)),
            networks => Ok(networks.unwrap_or_default()),
        };
        let mesh = MeshSettings {
            trust_domain,
            cluster_id,
            cluster_domain,
            pod_networks: needed("--pod-networks", networks("--pod-networks", self.pod_networks)?)?,
            service_networks: needed(
                "--service-networks",
                networks("--service-networks", self.service_networks)?,
            )?,
            external_networks: networks("--external-networks", self.external_networks)?.unwrap_or_default(),
            netns_annotations: in_directory,
            inbound: Inbound {
                default: who("--default-inbound", self.default_inbound)?,
                floor: who("--inbound-floor", self.inbound_floor)?,
            },
            enabled: self.mesh_enabled.unwrap_or(true),
        };
        let duration = |flag, value: Option<String>, default| match value.as_deref() {
            None | Some("") => Ok(default),
            Some(text) => parse_duration(text).map_err(|why| invalid(flag, why)),
        };
        let after = duration("--rotate-root-after", self.rotate_root_after, ROTATE_AFTER)?;
        let overlap = if in_directory { Duration::ZERO } else { OVERLAP };
        let issuer = self.issuer.filter(|directory| !directory.is_empty()).map(|directory| Given {
            directory: directory.into(),
            trust_domain: mesh.trust_domain.as_str().to_owned(),
        });
        let rotation = Rotation {
            after: (!after.is_zero()).then_some(after),
            overlap: duration("--root-overlap", self.root_overlap, overlap)?,
        };
        let port =
            |address: Option<SocketAddr>, port| address.unwrap_or(SocketAddr::from(([0, 0, 0, 0], port)));
        Ok(Config {
            source,
            listen: port(self.listen, 15012),
            metrics_listen: port(self.metrics_listen, 15020),
            ready_listen: port(self.ready_listen, 15021),
            log: text(self.log, "info"),
            issuer,
            mesh,
            rotation,
        })
    }
}

fn source(
    kubernetes: Option<bool>,
    directory: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    namespace: Option<String>,
    pod_name: Option<String>,
) -> Result<Source, ConfigError> {
    let missing = |flag, hint| ConfigError::Missing { flag, hint };
    let namespace = namespace.filter(|namespace| !namespace.is_empty());
    if kubernetes != Some(true) {
        return Ok(Source::Directory {
            directory: directory.ok_or(missing(
                "--directory",
                "the directory of manifests to read, unless --kubernetes is given",
            ))?,
            state_dir: state_dir
                .ok_or(missing("--state-dir", "where keys are kept, such as /var/lib/weft"))?,
        });
    }
    if directory.is_some() || state_dir.is_some() {
        let why =
            "objects and state are in the cluster then; leave out --directory and --state-dir".to_owned();
        return Err(ConfigError::Invalid { flag: "--kubernetes", why });
    }
    match namespace {
        Some(namespace) if !is_dns_subdomain(&namespace) => {
            Err(ConfigError::Invalid { flag: "--namespace", why: format!("{namespace:?} is no name") })
        }
        namespace => {
            let pod_name = pod_name.filter(|name| !name.is_empty()).unwrap_or_else(unique_name);
            Ok(Source::Kubernetes { namespace, pod_name })
        }
    }
}

/// A name that no other process has, also where several share a host name.
fn unique_name() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}_{}", host.trim(), std::process::id())
}

/// Reads ranges; None if none is given.
fn networks(flag: &'static str, texts: Option<Vec<String>>) -> Result<Option<Vec<IpNet>>, ConfigError> {
    let mut networks = Vec::new();
    for text in texts.unwrap_or_default() {
        let text = text.trim();
        if text.is_empty() {
            continue;
        }
        let invalid = |why: String| ConfigError::Invalid { flag, why };
        let network: IpNet = text
            .parse()
            .map_err(|_| invalid(format!("{text:?} is no range of addresses such as 10.1.0.0/16")))?;
        if network != network.trunc() {
            return Err(invalid(format!(
                "{text} has bits set behind its prefix; did you mean {}?",
                network.trunc()
            )));
        }
        networks.push(network);
    }
    Ok((!networks.is_empty()).then_some(networks))
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let unit = text.chars().last().ok_or("is empty")?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86400,
        _ => return Err("give a number and a unit of s, m, h or d, such as 8760h".to_owned()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|_| format!("{text:?} has no whole number"))?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(|| format!("{text:?} is too long"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const NEEDED: [&str; 8] = [
        "--directory",
        "/d",
        "--state-dir",
        "/s",
        "--pod-networks",
        "10.1.0.0/16,fd00::/64",
        "--service-networks",
        "10.2.0.0/16",
    ];

    fn config(args: &[&str]) -> Result<Config, String> {
        let cli = Cli::try_parse_from([&["weft-control"], args].concat()).map_err(|e| e.to_string())?;
        cli.config().map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_and_flags() {
        let config = config(&NEEDED).unwrap();
        assert_eq!(config.listen.port(), 15012);
        assert_eq!(config.mesh.pod_networks.len(), 2);
        assert_eq!(config.mesh.trust_domain.as_str(), "cluster.local");
    }

    #[test]
    fn the_file_gives_what_flags_do_not() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(
            file,
            "directory: /f\ncluster-id: one\nlisten: 127.0.0.1:1\nexternal-networks: [192.0.2.0/24]"
        )
        .unwrap();
        let path = file.path().to_str().unwrap();
        let config = config(&[&NEEDED[..], &["--config", path, "--listen", "127.0.0.1:2"]].concat()).unwrap();
        let from = Source::Directory { directory: "/d".into(), state_dir: "/s".into() };
        assert_eq!(config.source, from);
        assert_eq!(config.mesh.cluster_id, "one");
        assert_eq!(config.listen.port(), 2);
        assert_eq!(config.mesh.external_networks.len(), 1);
    }

    #[test]
    fn errors_say_what_to_do() {
        for (args, words) in [
            (&["--pod-networks", "10.1.0.1/16"][..], "did you mean 10.1.0.0/16?"),
            (&["--pod-networks", "ten"], "such as 10.1.0.0/16"),
            (&["--trust-domain", "A"], "trust domain"),
            (&["--cluster-id", "a/b"], "--cluster-id"),
            (&["--cluster-domain", "a b"], "--cluster-domain"),
            (&["--config", "/does/not/exist"], "/does/not/exist"),
        ] {
            let needed = NEEDED.chunks(2).filter(|pair| pair[0] != args[0]).flatten().copied();
            let error = config(&needed.chain(args.iter().copied()).collect::<Vec<_>>()).unwrap_err();
            assert!(error.contains(words), "{args:?}: {error}");
        }
        for flag in ["--directory", "--state-dir", "--pod-networks", "--service-networks"] {
            let args = NEEDED.chunks(2).filter(|pair| pair[0] != flag).flatten().copied().collect::<Vec<_>>();
            assert!(config(&args).unwrap_err().starts_with(flag));
        }
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "pod-network: [10.0.0.0/8]").unwrap();
        let path = file.path().to_str().unwrap();
        let error = config(&[&NEEDED[..], &["--config", path]].concat()).unwrap_err();
        assert!(error.contains("unknown field `pod-network`"), "{error}");
    }

    #[test]
    fn a_cluster_needs_nothing_else() {
        let in_cluster = config(&["--kubernetes", "--pod-name", "a"]).unwrap();
        assert_eq!(in_cluster.source, Source::Kubernetes { namespace: None, pod_name: "a".to_owned() });
        assert!(in_cluster.mesh.pod_networks.is_empty() && !in_cluster.mesh.netns_annotations);
        let named = config(&["--kubernetes", "--namespace", "weft", "--pod-networks", ""]).unwrap();
        let Source::Kubernetes { namespace, pod_name } = named.source else { panic!() };
        assert_eq!(namespace.as_deref(), Some("weft"));
        assert!(pod_name.ends_with(&format!("_{}", std::process::id())), "{pod_name}");
        let both = config(&[&NEEDED[..], &["--kubernetes"]].concat()).unwrap_err();
        assert!(both.starts_with("--kubernetes") && both.contains("leave out"), "{both}");
        assert!(config(&["--kubernetes", "--namespace", "a/b"]).unwrap_err().starts_with("--namespace"));
        assert!(config(&[&NEEDED[..], &["--kubernetes=false"]].concat()).is_ok());
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("8760h"), Ok(Duration::from_secs(8760 * 3600)));
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        for bad in ["", "1", "h", "-1h", "1.5h", "1y", "99999999999999999999d", "é"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
