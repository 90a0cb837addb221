//! The plugin as a container runtime runs it: its program, with the environment and the standard input of the CNI
//! specification, beside an agent and an API server that are not real.
#![allow(clippy::unwrap_used, reason = "tests")]

mod fake;

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use fake::Api;
use serde_json::{Value, json};
use tempfile::TempDir;
use weft_cni::settings::Settings;

const ENVIRONMENT: [(&str, &str); 5] = [
    ("CNI_CONTAINERID", "c0ffee"),
    ("CNI_NETNS", "/var/run/netns/cni-1"),
    ("CNI_IFNAME", "eth0"),
    ("CNI_PATH", "/opt/cni/bin"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c0ffee;K8S_POD_UID=u-1",
    ),
];

/// A node with the plugin installed, and no agent unless a test starts one.
struct Node {
    dir: TempDir,
    settings: Settings,
}

/// What the runtime sees.
#[derive(Debug)]
struct Seen {
    good: bool,
    stdout: String,
}

impl Node {
    fn new(api: Option<&Api>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            socket: dir.path().join("agent.sock"),
            // Nobody listens on port 1.
            api_server: api.map_or("127.0.0.1:1".to_owned(), |api| api.address.clone()),
            api_ca: api.map_or(fake::api(&[]).ca, |api| api.ca.clone()),
            api_token: "its-token".to_owned(),
            excluded_namespaces: vec!["kube-system".to_owned()],
        };
        let node = Self { dir, settings };
        node.write_settings();
        node
    }

    fn settings_file(&self) -> PathBuf {
        self.dir.path().join("cni.json")
    }

    fn write_settings(&self) {
        std::fs::write(self.settings_file(), serde_json::to_vec(&self.settings).unwrap()).unwrap();
    }

    /// The configuration that a runtime makes of the conflist's entry.
    fn config(&self, version: &str) -> Value {
        json!({"cniVersion": version, "name": "net", "type": "weft-cni", "settings": self.settings_file(),
            "prevResult": result(version)})
    }

    fn run(&self, command: &str, input: &str, changes: &[(&str, &str)]) -> Seen {
        let mut plugin = Command::new(env!("CARGO_BIN_EXE_weft-cni"));
        plugin.env_clear().envs(ENVIRONMENT).env("CNI_COMMAND", command).envs(changes.iter().copied());
        let mut plugin = plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        plugin.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = plugin.wait_with_output().unwrap();
        Seen { good: output.status.success(), stdout: String::from_utf8(output.stdout).unwrap() }
    }

    fn add(&self) -> Seen {
        self.run("ADD", &self.config("1.0.0").to_string(), &[])
    }
}

impl Seen {
    /// The pod may start, with this result.
    fn passed(&self, version: &str) {
        assert!(self.good, "{self:?}");
        assert_eq!(serde_json::from_str::<Value>(&self.stdout).unwrap(), result(version));
    }

    /// An error object with this code, whose message has all of these words.
    fn refused(&self, code: u64, words: &[&str]) {
        assert!(!self.good, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap();
        assert_eq!(error["code"], code, "{error}");
        assert!(error["cniVersion"].is_string(), "{error}");
        for word in words {
            assert!(error["msg"].as_str().unwrap().contains(word), "{word:?} is not in {error}");
        }
    }

    fn silent(&self) {
        assert!(self.good && self.stdout.is_empty(), "{self:?}");
    }
}

/// What the plugins before left; the plugin must not touch it.
fn result(version: &str) -> Value {
    json!({"cniVersion": version,
        "interfaces": [{"name": "cni0", "mac": "02:00:00:00:00:01"}, {"name": "eth0", "sandbox": "/var/run/netns/cni-1"}],
        "ips": [{"version": "4", "interface": 1, "address": "10.0.0.5/24", "gateway": "10.0.0.1"},
            {"version": "6", "interface": 1, "address": "fd00::5/64"}],
        "routes": [{"dst": "0.0.0.0/0"}], "dns": {}, "unknown": {"kept": true}})
}

const POD: &str = "/api/v1/namespaces/shop/pods/web";
const NAMESPACE: &str = "/api/v1/namespaces/shop";

fn pod(uid: &str, labels: &Value) -> (&'static str, u16, Value) {
    (POD, 200, json!({"metadata": {"name": "web", "namespace": "shop", "uid": uid, "labels": labels}}))
}

fn namespace(labels: &Value) -> (&'static str, u16, Value) {
    (NAMESPACE, 200, json!({"metadata": {"name": "shop", "labels": labels}}))
}

#[test]
fn a_pod_that_the_agent_knows_gets_the_result_of_the_plugins_before() {
    for (enrolled, version) in
        [(true, "0.3.1"), (true, "0.4.0"), (true, "1.0.0"), (true, "1.1.0"), (false, "1.1.0")]
    {
        let node = Node::new(None);
        let heard = fake::agent(&node.settings.socket, Some((200, json!({"enrolled": enrolled}))));
        node.run("ADD", &node.config(version).to_string(), &[]).passed(version);
        let heard = heard.lock().unwrap();
        let [(head, body)] = heard.as_slice() else { panic!("{heard:?}") };
        assert!(head.starts_with("POST /v1/add HTTP/1."), "{head}");
        assert_eq!(
            serde_json::from_str::<Value>(body).unwrap(),
            json!({"pod_uid": "u-1", "pod": "shop/web", "netns": "/var/run/netns/cni-1",
                "addresses": ["10.0.0.5", "fd00::5"]})
        );
    }
}

#[test]
fn without_an_agent_a_pod_of_the_mesh_does_not_start_and_another_does() {
    let (on, off, none) =
        (json!({"weft.dev/mesh": "enabled"}), json!({"weft.dev/mesh": "disabled"}), json!({}));
    for (of_namespace, of_pod, starts) in [
        (&none, &none, true),
        (&on, &none, false),
        (&on, &off, true),
        (&none, &on, false),
        (&off, &on, false),
    ] {
        let api = fake::api(&[pod("u-1", of_pod), namespace(of_namespace)]);
        let seen = Node::new(Some(&api)).add();
        if starts {
            seen.passed("1.0.0");
        } else {
            seen.refused(
                11,
                &[
                    "shop/web belongs to the mesh",
                    "agent of this node does not answer",
                    "kubectl -n weft-system",
                ],
            );
        }
        for (head, _) in api.heard.lock().unwrap().iter() {
            assert!(head.contains("\r\nAuthorization: Bearer its-token\r\n"), "{head}");
        }
    }
}

#[test]
fn an_agent_that_cannot_say_is_no_agent_and_its_reason_is_passed_on() {
    let mesh = json!({"weft.dev/mesh": "enabled"});
    for (answer, words) in [
        (Some((503, json!({"error": "the controller has not named it"}))), "the controller has not named it"),
        (Some((500, json!("nonsense"))), "500"),
        (Some((200, json!("nonsense"))), "the agent's answer"),
        (None, "does not answer"),
    ] {
        for (labels, starts) in [(&mesh, false), (&json!({}), true)] {
            let api = fake::api(&[pod("u-1", labels), namespace(&json!({}))]);
            let node = Node::new(Some(&api));
            let _heard = fake::agent(&node.settings.socket, answer.clone());
            let seen = node.add();
            if starts { seen.passed("1.0.0") } else { seen.refused(11, &["belongs to the mesh", words]) }
        }
    }
}

#[test]
fn what_the_api_server_cannot_say_is_no_leave_to_start() {
    let plain = namespace(&json!({}));
    for (objects, word) in [
        (vec![pod("u-2", &json!({})), plain.clone()], "another one by now"),
        (vec![(POD, 403, json!({"kind": "Status"})), plain.clone()], "403"),
        (vec![(POD, 401, json!({"kind": "Status"})), plain.clone()], "401"),
        (vec![plain.clone()], "404"),
        (vec![pod("u-1", &json!({})), (NAMESPACE, 404, Value::Null)], "404"),
        (vec![(POD, 200, json!("no pod")), plain.clone()], "/pods/web"),
    ] {
        let api = fake::api(&objects);
        Node::new(Some(&api)).add().refused(11, &["cannot be found out", word]);
    }
    // Somebody else in the API server's place.
    let (real, other) = (fake::api(&[]), fake::api(&[pod("u-1", &json!({})), plain]));
    let mut node = Node::new(Some(&other));
    node.settings.api_ca = real.ca;
    node.write_settings();
    node.add().refused(11, &["cannot be found out", "ertificate"]);
    assert!(other.heard.lock().unwrap().is_empty(), "it was shown the token");
}

#[test]
fn a_static_pod_has_another_uid_at_the_api_server() {
    let mirror = |labels: &Value| {
        let (path, status, mut object) = pod("u-of-the-mirror", labels);
        object["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "u-1"});
        (path, status, object)
    };
    let api = fake::api(&[mirror(&json!({})), namespace(&json!({}))]);
    Node::new(Some(&api)).add().passed("1.0.0");
    let api = fake::api(&[mirror(&json!({"weft.dev/mesh": "enabled"})), namespace(&json!({}))]);
    Node::new(Some(&api)).add().refused(11, &["belongs to the mesh"]);
}

#[test]
fn with_nobody_to_ask_only_excluded_namespaces_start() {
    let node = Node::new(None);
    node.add().refused(11, &["cannot be found out", "agent of this node", "the API server", "127.0.0.1:1"]);
    let system = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns;K8S_POD_UID=u-2";
    node.run("ADD", &node.config("1.0.0").to_string(), &[("CNI_ARGS", system)]).passed("1.0.0");
}

#[test]
fn what_the_api_server_says_counts_in_excluded_namespaces_too() {
    let wanted = json!({"weft.dev/mesh": "enabled"});
    let api = fake::api(&[pod("u-1", &json!({})), namespace(&wanted)]);
    let mut node = Node::new(Some(&api));
    node.settings.excluded_namespaces = vec!["shop".to_owned()];
    node.write_settings();
    node.add().refused(11, &["belongs to the mesh"]);
}

#[test]
fn errors_are_those_of_the_specification() {
    let node = Node::new(None);
    let config = node.config("1.1.0");
    let without = |field: &str| {
        let mut config = config.clone();
        config.as_object_mut().unwrap().remove(field);
        config.to_string()
    };
    let good = config.to_string();
    for version in ["0.2.0", "1.2.0", "2"] {
        node.run("ADD", &node.config(version).to_string(), &[]).refused(1, &[version]);
    }
    for variable in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        node.run("ADD", &good, &[(variable, "")]).refused(4, &[variable]);
    }
    node.run("ADD", &good, &[("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web")])
        .refused(4, &["K8S_POD_UID"]);
    for command in ["", "add", "RUN"] {
        node.run(command, &good, &[]).refused(4, &["CNI_COMMAND"]);
    }
    for garbage in ["", "{", "\u{0}"] {
        node.run("ADD", garbage, &[]).refused(6, &[]);
    }
    node.run("ADD", &without("prevResult"), &[]).refused(7, &["prevResult"]);
    node.run("ADD", &without("settings"), &[]).refused(7, &["settings"]);
    std::fs::remove_file(node.settings_file()).unwrap();
    node.run("ADD", &good, &[]).refused(11, &["the agent of this node writes it"]);
}

#[test]
fn what_is_no_pod_of_kubernetes_passes() {
    let node = Node::new(None);
    node.run("ADD", &node.config("1.0.0").to_string(), &[("CNI_ARGS", "IgnoreUnknown=1")]).passed("1.0.0");
}

#[test]
fn the_node_can_add_pods_without_an_agent_and_not_without_settings() {
    let node = Node::new(None);
    // A runtime sends no variables but CNI_PATH.
    let none = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"].map(|name| (name, ""));
    let config = node.config("1.1.0").to_string();
    node.run("STATUS", &config, &none).silent();
    std::fs::remove_file(node.settings_file()).unwrap();
    node.run("STATUS", &config, &none).refused(50, &["the agent of this node writes it"]);
}

#[test]
fn everything_else_works_without_agent_settings_and_api_server() {
    let node = Node::new(None);
    std::fs::remove_file(node.settings_file()).unwrap();
    for command in ["DEL", "CHECK", "GC"] {
        node.run(command, &node.config("1.1.0").to_string(), &[]).silent();
    }
    // A DEL has no namespace when the node was rebooted, and no result when the ADD had failed.
    let config = json!({"cniVersion": "1.1.0", "name": "net", "type": "weft-cni"}).to_string();
    node.run("DEL", &config, &[("CNI_NETNS", ""), ("CNI_ARGS", "")]).silent();

    let seen = node.run("VERSION", r#"{"cniVersion": "1.0.0"}"#, &[]);
    let said: Value = serde_json::from_str(&seen.stdout).unwrap();
    assert_eq!(said["cniVersion"], "1.0.0");
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        assert!(said["supportedVersions"].as_array().unwrap().contains(&json!(version)), "{said}");
    }
}
