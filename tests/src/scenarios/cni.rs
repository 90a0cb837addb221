//! Stories of pods that ask before they start: the test is the CNI plugin and the container runtime. The pods' manifests
//! have a UID and no annotation, and no cgroup tells the agent about them: it knows their namespaces from the plugin alone.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::sockets::read_line;
use weft_testbed::{Bed, Moment, Pod, Server, servers, traffic};

use crate::runner::Scenario;
use crate::shop::{ECHO, marker};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "cni_add_protects",
    "a pod that asked before it started is captured from then on; one outside the mesh starts at once",
    add,
)];

const NEWS: Duration = Duration::from_secs(20);

fn add(cluster: Builder) -> Result<()> {
    let socket = Bed::named(cluster.name()).dir().join("cni.sock");
    let cluster = cluster
        .node("east")
        .node("west")
        .agent_flag("--cni-socket")
        .agent_flag(&socket.to_string_lossy())
        .start_without_agents()?;
    let plain = cluster.pod("plain/server", "west")?;
    let _echo = Server::start(&plain, ECHO, servers::echo)?;
    cluster.label_namespace("shop")?;
    let east = cluster.agent("east")?;
    east.start()?;

    // Before the controller speaks of a pod there is no answer, and in the end a refusal that says whose fault it is.
    let fresh = cluster.pod_unannounced("shop/fresh", "east", "default")?;
    let _pause = fresh.start("pause", "sleep", ["600"])?;
    let start = Instant::now();
    let (status, body) = ask(&socket, "/v1/add", &fresh, "uid-unheard")?;
    let took = start.elapsed();
    ensure!(
        status == 503 && body["error"].as_str().is_some_and(|e| e.contains("controller")),
        "{status} {body}"
    );
    ensure!((8..15).contains(&took.as_secs()), "the refusal came after {took:?}");

    // One outside the mesh is let go at once.
    let outsider = cluster.pod_unannounced("plain/outsider", "east", "default")?;
    announce(&cluster, &outsider, "uid-outsider")?;
    let answer = ask(&socket, "/v1/add", &outsider, "uid-outsider")?;
    ensure!(answer == (200, json!({"enrolled": false})), "{answer:?}");

    // One of the mesh: asked first, announced later.
    let secret = marker("cni");
    let capture = cluster.capture()?;
    // The agent's last acknowledgement must be through: the controller sends nothing new before it.
    pause(Duration::from_millis(500));
    cluster.hold_reports("east")?;
    let asking = std::thread::spawn({
        let (socket, fresh) = (socket.clone(), fresh.clone());
        move || ask(&socket, "/v1/add", &fresh, "uid-fresh")
    });
    pause(Duration::from_millis(500));
    ensure!(!asking.is_finished(), "an answer before the controller has spoken of the pod");
    announce(&cluster, &fresh, "uid-fresh")?;
    let answer = asking.join().map_err(|_| anyhow::anyhow!("the asking thread ended"))??;
    ensure!(answer == (200, json!({"enrolled": true})), "{answer:?}");
    let mut waiting = fresh.connect(plain.at(ECHO)).context("the first connection of the pod")?;
    waiting.write_all(format!("{secret}\n").as_bytes())?;
    pause(Duration::from_secs(1));
    waiting.set_nonblocking(true)?;
    match waiting.peek(&mut [0]) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
        other => bail!("the first connection of a pod that is not published was not held: {other:?}"),
    }
    waiting.set_nonblocking(false)?;
    ensure!(east.metrics()?.sum("weft_kernel_captured_total", &[]) >= 1.0, "nothing was captured");
    let published = Moment::now();
    cluster.release("east")?;
    ensure!(read_line(&mut waiting)? == secret, "the held connection answered something else");
    cluster.wait_enrolled(&[&fresh])?;
    traffic::call(&fresh, plain.at_v6(ECHO), &secret)?;
    let recording = capture.stop()?;
    let seen = recording.find(secret.as_bytes());
    ensure!(!seen.is_empty(), "the capture saw nothing, so it would not have seen a leak");
    ensure!(
        seen.iter().all(|seen| seen.at >= published),
        "the pod's payload was on the wire before it was published"
    );

    // Asked again, as after a restart of the runtime, it is what it was.
    let answer = ask(&socket, "/v1/add", &fresh, "uid-fresh")?;
    ensure!(answer == (200, json!({"enrolled": true})), "{answer:?}");
    ensure!(
        east.phase_of(&fresh.uid())?.as_deref() == Some("published"),
        "asking again ended the protection"
    );
    traffic::call(&fresh, plain.at(ECHO), &secret)?;
    // Nobody has heard of this one, so only a pod that is not captured is told by its kernel that nothing listens there.
    let unknown = cluster.pod_unannounced("shop/unknown", "west", "default")?;
    fresh.connect(unknown.at(ECHO)).context("asked about twice, the pod is not captured any more")?;

    // Without its label it goes, and the next ADD of it says so.
    cluster.unlabel_namespace("shop")?;
    until(NEWS, "the pod has left the mesh", || Ok(east.phase_of(&fresh.uid())?.is_none()))?;
    let answer = ask(&socket, "/v1/add", &fresh, "uid-fresh")?;
    ensure!(answer == (200, json!({"enrolled": false})), "{answer:?}");
    Ok(())
}

/// As the API server would have it: a UID, and nothing about the namespace.
fn announce(cluster: &weft_testbed::Cluster, pod: &Pod, uid: &str) -> Result<()> {
    let (namespace, name) = pod.name().split_once('/').context("NAMESPACE/NAME")?;
    let ips: Vec<_> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "spec": {"nodeName": pod.node(), "containers": [{"name": "main", "image": "none"}]},
        "status": {"phase": "Running", "podIP": pod.addresses()[0], "podIPs": ips},
    });
    cluster.directory().write(&format!("cni-{uid}.yaml"), &manifest.to_string())
}

/// What the plugin does.
fn ask(socket: &Path, path: &str, pod: &Pod, uid: &str) -> Result<(u16, Value)> {
    let addresses = pod.addresses();
    let netns = pod.netns().path();
    let body = json!({
        "netns": netns,
        "pod": pod.name(),
        "pod_uid": uid,
        "addresses": addresses,
    })
    .to_string();
    let mut stream = UnixStream::connect(socket).context("the agent's CNI socket")?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").context("no end of headers")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    Ok((status, serde_json::from_str(body).with_context(|| format!("the reply {body:?}"))?))
}
