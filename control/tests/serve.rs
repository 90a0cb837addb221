//! The program itself, over TLS: xDS, certificates, reports, tokens, restarts.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{fs, process::Command, time::Duration};

use tokio::time::timeout;
use tonic::Code;
use weft_xds::{ControlEndpoint, TokenSource};

use self::support::{Agent, BINARY, Control, UID, WEB, certificate, get, report};

fn manifest(label: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, labels: {{weft.dev/mesh: {label}}}}}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {{name: web, namespace: shop, annotations: {{weft.dev/netns: /n}}}}\n\
         spec: {{nodeName: n1, serviceAccountName: web}}\nstatus: {{podIP: 10.1.0.2}}\n"
    )
}

/// Directories of one mesh, over restarts of its controller.
struct Mesh {
    path: tempfile::TempDir,
}

impl Mesh {
    fn new(label: &str) -> Self {
        let mesh = Self { path: tempfile::tempdir().unwrap() };
        fs::create_dir(mesh.manifests()).unwrap();
        mesh.write(label);
        mesh
    }

    fn manifests(&self) -> std::path::PathBuf {
        self.path.path().join("manifests")
    }

    fn write(&self, label: &str) {
        fs::write(self.path.path().join("new"), manifest(label)).unwrap();
        fs::rename(self.path.path().join("new"), self.manifests().join("shop.yaml")).unwrap();
    }

    fn state(&self) -> std::path::PathBuf {
        self.path.path().join("state")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.args([
            "--directory",
            self.manifests().to_str().unwrap(),
            "--state-dir",
            self.state().to_str().unwrap(),
        ]);
        command.args(["--pod-networks", "10.1.0.0/16", "--service-networks", "10.2.0.0/16"]);
        for flag in ["--listen", "--metrics-listen", "--ready-listen"] {
            command.args([flag, "127.0.0.1:0"]);
        }
        command
    }

    fn start(&self) -> Control {
        Control::start(self.command())
    }

    fn token(&self, node: &str, ttl: &str) -> String {
        let output = Command::new(BINARY)
            .args(["token", "--state-dir", self.state().to_str().unwrap(), "--node", node, "--ttl", ttl])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn endpoint(&self, control: &Control, token: &str) -> ControlEndpoint {
        let path = tempfile::NamedTempFile::new_in(self.path.path()).unwrap().keep().unwrap().1;
        fs::write(&path, token).unwrap();
        ControlEndpoint {
            address: control.agents.clone(),
            ca: fs::read(self.state().join("root.pem")).unwrap().into(),
            server_name: "weft-control".to_owned(),
            token: TokenSource::file(path),
            seen: None,
        }
    }
}

#[tokio::test]
async fn a_pod_enters_the_mesh_and_stays_over_a_restart() {
    let mesh = Mesh::new("disabled");
    let control = mesh.start();
    assert!(get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 200"));
    let token = mesh.token("n1", "1h");
    let endpoint = mesh.endpoint(&control, &token);
    let mut agent = Agent::connect(endpoint.clone(), "n1");
    agent.until(false, false).await;
    mesh.write("enabled");
    agent.until(false, true).await;
    report(&endpoint, &[UID]).await.unwrap();
    agent.until(true, true).await;
    drop(control);

    let control = mesh.start();
    let endpoint = mesh.endpoint(&control, &token);
    let mut agent = Agent::connect(endpoint, "n1");
    agent.until(true, true).await;
    mesh.write("disabled");
    agent.until(false, false).await;
    let metrics = get(&control.metrics, "/metrics").await;
    assert!(metrics.contains("weft_control_xds_streams 1"), "{metrics}");
}

#[tokio::test]
async fn certificates_are_for_the_callers_own_node() {
    let mesh = Mesh::new("enabled");
    let mut command = mesh.command();
    command.args(["--log", "info,controller=debug"]);
    let control = Control::start(command);
    let own = mesh.endpoint(&control, &mesh.token("n1", "1h"));
    let chain = certificate(&own, WEB).await.unwrap();
    assert_eq!(chain[1].as_bytes(), own.ca.pem());
    let other = mesh.endpoint(&control, &mesh.token("n2", "1h"));
    assert_eq!(certificate(&other, WEB).await, Err(Code::PermissionDenied));
    assert!(control.logged("refused a certificate").contains("no live pod on node n2"));
    assert_eq!(certificate(&own, "spiffe://cluster.local/ns/shop/sa/db").await, Err(Code::PermissionDenied));
    mesh.write("disabled");
    control.logged("published a state");
    assert_eq!(certificate(&own, WEB).await, Err(Code::PermissionDenied));
    let metrics = get(&control.metrics, "/metrics").await;
    for line in [
        "weft_control_certificates_issued_total 1",
        "weft_control_certificates_refused_total{reason=\"not_on_node\"} 2",
        "weft_control_certificates_refused_total{reason=\"unlabelled\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing from\n{metrics}");
    }
}

#[tokio::test]
async fn callers_prove_who_they_are_on_every_service() {
    let mesh = Mesh::new("enabled");
    let control = mesh.start();
    let good = mesh.token("n1", "1h");
    let expired = mesh.token("n1", "1s");
    let tampered = good.replacen("weft.v1.", "weft.v1.A", 1);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    for token in [expired.as_str(), &tampered, "nonsense"] {
        let endpoint = mesh.endpoint(&control, token);
        assert_eq!(certificate(&endpoint, WEB).await, Err(Code::Unauthenticated), "{token}");
        assert_eq!(report(&endpoint, &[UID]).await, Err(Code::Unauthenticated), "{token}");
        let mut agent = Agent::connect(endpoint, "n1");
        assert!(timeout(Duration::from_millis(500), agent.updates.recv()).await.is_err(), "{token}");
    }
    let metrics = get(&control.metrics, "/metrics").await;
    for line in [
        "weft_control_certificates_refused_total{reason=\"token_expired\"} 1",
        "weft_control_certificates_refused_total{reason=\"token_forged\"} 1",
        "weft_control_certificates_refused_total{reason=\"token_malformed\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is missing from\n{metrics}");
    }
    // A server with another root is not the controller.
    let stranger = Mesh::new("enabled");
    let other = stranger.start();
    let mut endpoint = mesh.endpoint(&other, &good);
    assert!(report(&endpoint, &[]).await.is_err());
    endpoint.address = control.agents.clone();
    report(&endpoint, &[]).await.unwrap();
}

#[tokio::test]
async fn stops_on_sigterm_while_streams_are_open() {
    let mesh = Mesh::new("enabled");
    let mut control = mesh.start();
    let mut agent = Agent::connect(mesh.endpoint(&control, &mesh.token("n1", "1h")), "n1");
    agent.until(false, true).await;
    let pid = nix::unistd::Pid::from_raw(control.child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = tokio::task::spawn_blocking(move || control.child.wait().unwrap());
    assert!(timeout(Duration::from_secs(5), status).await.expect("ends in time").unwrap().success());
}

#[test]
fn does_not_start_on_what_is_wrong() {
    let failure = |mesh: &Mesh| {
        let output = mesh.command().output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let mesh = Mesh::new("enabled");
    fs::write(
        mesh.manifests().join("bad.yaml"),
        "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: x}\n",
    )
    .unwrap();
    let error = failure(&mesh);
    assert!(
        error.contains("bad.yaml: document 1, line 4, field status.podIP: \"x\" is not an IP address"),
        "{error}"
    );
    fs::remove_file(mesh.manifests().join("bad.yaml")).unwrap();

    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(mesh.state(), open).unwrap();
    let error = failure(&mesh);
    assert!(error.contains("others may read it (mode 755)") && error.contains("chmod 700"), "{error}");
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(mesh.state(), private).unwrap();

    let _running = mesh.start();
    let error = failure(&mesh);
    assert!(error.contains("another weft-control is using this state directory"), "{error}");
}

#[tokio::test]
async fn enrolled_pods_are_not_forgotten_by_starting_on_an_empty_directory() {
    let mesh = Mesh::new("enabled");
    let control = mesh.start();
    let token = mesh.token("n1", "1h");
    report(&mesh.endpoint(&control, &token), &[UID]).await.unwrap();
    drop(control);
    fs::remove_file(mesh.manifests().join("shop.yaml")).unwrap();

    let control = mesh.start();
    assert!(get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 503"));
    let endpoint = mesh.endpoint(&control, &token);
    let mut agent = Agent::connect(endpoint.clone(), "n1");
    assert!(
        timeout(Duration::from_millis(500), agent.updates.recv()).await.is_err(),
        "an empty state was served"
    );
    assert_eq!(report(&endpoint, &[]).await, Err(Code::Unavailable));
    mesh.write("enabled");
    agent.until(true, true).await;
    assert!(get(&control.ready, "/readyz").await.starts_with("HTTP/1.1 200"));
}
