//! A cluster with an API server in memory, and what tests ask of it again and again.

use std::{fs, process::Command, time::Duration};

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use weft_xds::{ControlEndpoint, TokenSource};

use super::{
    BINARY, Control, LONG,
    api::{Api, Door},
    get,
};

/// A cluster with a node and a labelled namespace.
pub struct Cluster {
    pub api: Api,
    path: tempfile::TempDir,
}

pub const AGENT: &str = "agent.token.n1";
pub const OTHER_AGENT: &str = "agent.token.n2";
pub const POD: &str = "pod.token.web";

pub fn reviewed(namespace: &str, account: &str, node: &str) -> Value {
    json!({"authenticated": true, "audiences": ["weft"], "user": {
        "username": format!("system:serviceaccount:{namespace}:{account}"),
        "extra": {"authentication.kubernetes.io/node-name": [node], "authentication.kubernetes.io/pod-uid": ["1"]}
    }})
}

impl Cluster {
    pub fn new() -> Self {
        let api = Api::start();
        api.put("nodes", json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.1.0.0/24"]}}));
        api.put(
            "servicecidrs",
            json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}}),
        );
        for (token, node) in [(AGENT, "n1"), (OTHER_AGENT, "n2")] {
            api.token(token, reviewed("weft-system", "weft-agent", node));
        }
        api.token(POD, reviewed("shop", "web", "n1"));
        let cluster = Self { api, path: tempfile::tempdir().unwrap() };
        cluster.label("enabled");
        let server = format!("http://{}", cluster.api.address);
        let kubeconfig = json!({"apiVersion": "v1", "kind": "Config", "current-context": "a",
            "clusters": [{"name": "a", "cluster": {"server": server}}],
            "users": [{"name": "a", "user": {"token": "t"}}],
            "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", "namespace": "weft-system"}}]});
        fs::write(cluster.kubeconfig(), kubeconfig.to_string()).unwrap();
        cluster
    }

    pub fn kubeconfig(&self) -> std::path::PathBuf {
        self.path.path().join("kubeconfig")
    }

    pub fn label(&self, value: &str) {
        self.api.put("namespaces", json!({"metadata": {"name": "shop", "labels": {"weft.dev/mesh": value}}}));
    }

    pub fn pod(&self, name: &str, ip: &str) {
        let pod = json!({
            "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "managedFields": [{}]},
            "spec": {"nodeName": "n1", "serviceAccountName": name, "containers": [{"name": "a"}]},
            "status": {"podIP": ip}
        });
        self.api.put("pods", pod);
    }

    pub fn start(&self) -> Control {
        self.start_with_flags(&[])
    }

    pub fn start_with_flags(&self, flags: &[&str]) -> Control {
        self.start_with(&self.kubeconfig(), flags)
    }

    /// A replica that reaches the API server by that door.
    pub fn start_behind(&self, door: &Door) -> Control {
        let path = self.path.path().join("kubeconfig-of-the-other");
        let own = fs::read_to_string(self.kubeconfig()).unwrap();
        let address = |of: std::net::SocketAddr| format!("http://{of}");
        fs::write(&path, own.replace(&address(self.api.address), &address(door.address))).unwrap();
        self.start_with(&path, &[])
    }

    fn start_with(&self, kubeconfig: &std::path::Path, flags: &[&str]) -> Control {
        let mut command = Command::new(BINARY);
        command.arg("--kubernetes").args(flags).env("KUBECONFIG", kubeconfig).env("RUST_BACKTRACE", "1");
        for flag in ["--listen", "--metrics-listen", "--ready-listen"] {
            command.args([flag, "127.0.0.1:0"]);
        }
        Control::start(command)
    }

    pub fn endpoint(&self, control: &Control, token: &str) -> ControlEndpoint {
        let path = self.path.path().join(token);
        fs::write(&path, token).unwrap();
        let root = self.api.get("configmaps", "weft-system", "weft-root").unwrap();
        ControlEndpoint {
            address: control.agents.clone(),
            ca: root["data"]["root.pem"].as_str().unwrap().as_bytes().to_owned().into(),
            server_name: "weft-control".to_owned(),
            token: TokenSource::file(path),
            seen: None,
        }
    }

    /// What is written down of node n1.
    pub fn enrollment(&self) -> Option<Value> {
        self.api.get("nodeenrollments", "", "n1").map(|object| object["status"].clone())
    }
}

/// The condition of a pod: status, reason, message.
pub fn condition(cluster: &Cluster, name: &str) -> Option<[String; 3]> {
    let pod = cluster.api.get("pods", "shop", name)?;
    let conditions = pod["status"]["conditions"].as_array()?;
    let ours = conditions.iter().find(|condition| condition["type"] == "weft.dev/Enrolled")?;
    Some(["status", "reason", "message"].map(|field| ours[field].as_str().unwrap().to_owned()))
}

pub async fn becomes(cluster: &Cluster, name: &str, expected: [&str; 3]) {
    let words = format!("{name} is {expected:?}");
    eventually(&words, async || condition(cluster, name).is_some_and(|now| now == expected)).await;
}

pub fn terminate(control: &mut Control) {
    let id = nix::unistd::Pid::from_raw(control.child.id().cast_signed());
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(control.child.wait().unwrap().success());
}

pub async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

pub async fn ready(control: &Control) {
    eventually("ready", async || get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 200")).await;
}

pub async fn is_ready(control: &Control) -> bool {
    get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 200")
}

pub async fn counts(control: &Control, line: &str) {
    // A whole line: the words that explain a metric begin with its name, too.
    eventually(line, async || get(&control.metrics, "/metrics").await.lines().any(|l| l == line)).await;
}
