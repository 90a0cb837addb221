//! A node: a network, mount, PID, UTS, IPC and cgroup namespace with containerd, a kubelet and kube-proxy in it. What
//! runs inside, and in which order, is in `node-init.sh`.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::cgroup::NodeCgroups;
use super::control_plane::{ControlPlane, DNS_ADDRESS, POD_CIDR, created};
use super::pki::kubeconfig;
use crate::place::Place;
use crate::process::{Process, run_ok};

const COMMAND: Duration = Duration::from_secs(60);

/// A running node.
#[derive(Debug)]
pub struct KubeNode {
    /// Declared first: its end ends everything in the cgroups.
    init: Mutex<Option<Process>>,
    place: Place,
    programs: PathBuf,
    cgroups: NodeCgroups,
}

impl KubeNode {
    /// Starts the node on `place`, with `images` for its container runtime. The kubelet announces it to the API server
    /// by itself.
    pub fn start(
        place: &Place,
        plane: &ControlPlane,
        server: Ipv4Addr,
        programs: &Path,
        images: &[PathBuf],
    ) -> Result<KubeNode> {
        let (name, dir) = (place.name(), place.dir());
        // What the node needs of the bed's files, under the names it will see.
        let pki = created(dir.join("pki"))?;
        plane.pki.issue(
            name,
            Some("system:nodes"),
            &format!("system:node:{name}"),
            &[name],
            &place.addresses(),
        )?;
        for file in [
            format!("{name}.crt"),
            format!("{name}.key"),
            "ca.crt".into(),
            "proxy.crt".into(),
            "proxy.key".into(),
        ] {
            std::fs::copy(plane.pki.path(&file), pki.join(&file)).with_context(|| file.clone())?;
        }
        let server = format!("https://{server}:6443");
        let seen = Path::new("/mnt/pki");
        kubeconfig(&dir.join("kubelet.kubeconfig"), &server, seen, name)?;
        kubeconfig(&dir.join("proxy.kubeconfig"), &server, seen, "proxy")?;
        std::fs::write(dir.join("containerd.toml"), CONTAINERD)?;
        std::fs::write(dir.join("kubelet.yaml"), kubelet(name, place.v4))?;
        std::fs::write(dir.join("kube-proxy.yaml"), kube_proxy(name, place.v4, place.v6))?;
        std::fs::write(dir.join("resolv.conf"), format!("nameserver {DNS_ADDRESS}\n"))?;
        std::fs::write(dir.join("init.sh"), include_str!("node-init.sh"))?;
        let own = created(dir.join("images"))?;
        for image in images {
            let file = image.file_name().with_context(|| image.display().to_string())?;
            std::fs::copy(image, own.join(file)).with_context(|| image.display().to_string())?;
        }
        let cgroups = NodeCgroups::create(&dir.to_string_lossy().trim_matches('/').replace('/', "-"))?;
        let node =
            KubeNode { init: Mutex::default(), place: place.clone(), programs: programs.to_owned(), cgroups };
        node.boot()?;
        Ok(node)
    }

    fn boot(&self) -> Result<()> {
        let dir = self.place.dir();
        let mut command = self.place.command(
            "unshare",
            [
                "--mount",
                "--pid",
                "--uts",
                "--ipc",
                "--cgroup",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
            ],
        );
        command.arg(dir.join("init.sh"));
        command.env("NODE", self.place.name()).env("NODE_DIR", dir).env("PROGRAMS", &self.programs);
        command.env("NODE_ADDRESS", format!("{},{}", self.place.v4, self.place.v6));
        self.cgroups.enter_before(&mut command);
        let process = self.place.start_command("init", command)?;
        *self.init.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(process);
        Ok(())
    }

    /// Cuts its power and starts it again: what is on its disk is still there, its processes, mounts and pods' network
    /// namespaces are not.
    pub fn restart(&self) -> Result<()> {
        let init = self.init.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        init.context("the node is down")?.kill()?;
        self.boot()
    }

    /// The machine.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A command that will run in the node, as after an ssh to it.
    pub fn command(&self, program: &str) -> Result<Command> {
        let init = self.init.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let unshare = init.as_ref().context("the node is down")?.pid();
        let children = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let Some(child) = children.split_whitespace().next() else {
            bail!("the node's first process has ended")
        };
        let mut command = self.place.command("nsenter", ["--target", child, "--all", "--", program]);
        command.current_dir("/");
        Ok(command)
    }

    /// Runs a command in the node; it must succeed.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut command = self.command(program)?;
        command.args(args);
        let output =
            run_ok(command, COMMAND).with_context(|| format!("in the node {}", self.place.name()))?;
        Ok(String::from_utf8_lossy(&output).into_owned())
    }

    /// Gives the node its ranges of pods' addresses, in a network configuration of that name: the `bridge` plugin, and in
    /// a `.conflist` `portmap` chained after it.
    pub fn write_cni(&self, file: &str, pod_cidrs: &[&str]) -> Result<()> {
        let ranges: Vec<_> = pod_cidrs.iter().map(|cidr| format!(r#"[{{"subnet": "{cidr}"}}]"#)).collect();
        let network = r#""cniVersion": "0.4.0", "name": "test""#;
        let bridge = format!(
            r#""type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
  "ipam": {{"type": "host-local", "ranges": [{}],
           "routes": [{{"dst": "0.0.0.0/0"}}, {{"dst": "::/0"}}]}}"#,
            ranges.join(", ")
        );
        let text = if file.ends_with(".conflist") {
            let portmap = r#"{"type": "portmap", "capabilities": {"portMappings": true}}"#;
            format!("{{{network}, \"plugins\": [\n {{{bridge}}},\n {portmap}]}}\n")
        } else {
            format!("{{{network}, {bridge}}}\n")
        };
        let dir = self.place.dir().join("root/etc/cni/net.d");
        // Renamed within the directory: containerd 1.6 does not look when a file arrives from elsewhere.
        let beside = dir.join(format!("{file}.new"));
        std::fs::write(&beside, text).with_context(|| beside.display().to_string())?;
        std::fs::rename(&beside, dir.join(file)).context("the node's CNI configuration")
    }
}

impl Drop for KubeNode {
    fn drop(&mut self) {
        if crate::bed::keeping() {
            return;
        }
        // Its end ends the node's PID namespace; only then can the cgroups go.
        drop(self.init.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        self.cgroups.remove(Duration::from_secs(10));
    }
}

const CONTAINERD: &str = r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:test"
  restrict_oom_score_adj = true # root may be without CAP_SYS_RESOURCE
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"#;

fn kubelet(name: &str, address: Ipv4Addr) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false # from 1.35 on the default is true
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
address: {address}
tlsCertFile: /mnt/pki/{name}.crt
tlsPrivateKeyFile: /mnt/pki/{name}.key
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: true}}
  x509: {{clientCAFile: /mnt/pki/ca.crt}}
authorization: {{mode: Webhook}}
clusterDNS: [{DNS_ADDRESS}]
clusterDomain: cluster.local
resolvConf: /mnt/resolv.conf
failSwapOn: false
oomScoreAdj: 0 # to lower it takes CAP_SYS_RESOURCE
# A full disk of the test machine is no reason to evict its pods.
evictionHard: {{memory.available: 100Mi, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%, imagefs.inodesFree: 0%}}
imageGCHighThresholdPercent: 100
nodeStatusUpdateFrequency: 2s
nodeStatusReportFrequency: 30s
syncFrequency: 10s
volumeStatsAggPeriod: -1s
shutdownGracePeriod: 0s
"
    )
}

fn kube_proxy(name: &str, address: Ipv4Addr, address_v6: Ipv6Addr) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {{kubeconfig: /mnt/proxy.kubeconfig}}
clusterCIDR: {POD_CIDR}
oomScoreAdj: 0
hostnameOverride: {name}
nodeIPOverride: [{address}, \"{address_v6}\"]
conntrack: {{maxPerCore: 0}} # nf_conntrack_max stays as it is
metricsBindAddress: 127.0.0.1:10249
healthzBindAddress: 127.0.0.1:10256
"
    )
}
