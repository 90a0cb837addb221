//! Stories of a real Kubernetes cluster: two nodes with containerd and kubelets, on this machine.

use std::net::IpAddr;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::Moment;
use weft_testbed::agent::tunnel_in;
use weft_testbed::binaries::binary;
use weft_testbed::cluster::Builder;
use weft_testbed::http::get;
use weft_testbed::kubernetes::{KubeCluster, obstacle};
use weft_testbed::metrics::Metrics;
use weft_testbed::poll::{pause, until};
use weft_testbed::process::run_bounded;

use crate::pods::{caller, client, pod, server, shop, sleeper};
use crate::runner::{Scenario, Skipped};
use crate::shop::marker;

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "kubernetes_cluster",
        "two real nodes: pods run, and reach each other and a Service",
        cluster,
    )
    .within(300),
    Scenario::new(
        "kubernetes_label",
        "installed by one command, a labelled namespace of running pods is encrypted",
        label,
    )
    .within(400),
    Scenario::new(
        "kubernetes_operations",
        "agents replaced and killed, controllers and API server restarted, pods that come and go",
        operations,
    )
    .within(600),
    Scenario::new(
        "kubernetes_birth",
        "new pods are protected before they start, and do not start while nobody can protect them",
        birth,
    )
    .within(400),
];

const NODES: [&str; 2] = ["east", "west"];
/// Where the Service `front` is reached beside its own addresses. The external ones are nobody's.
const NODE_PORT: u16 = 30080;
const EXTERNAL: [&str; 2] = ["203.0.113.9", "2001:db8:9::9"];
const POD_READY: Duration = Duration::from_secs(90);

/// A Service of the web server on `west` that is reached from outside the cluster.
fn front() -> String {
    format!(
        r#"
apiVersion: v1
kind: Service
metadata: {{name: front, namespace: shop}}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080, nodePort: {NODE_PORT}}}]
  externalIPs: {EXTERNAL:?}
"#
    )
}

fn cluster(cluster: Builder) -> Result<()> {
    let kube = start(&cluster)?;
    open_shop(&kube, "hello-from-web")?;
    for url in urls(&kube, "web")? {
        fetch(&kube, &url, "hello-from-web")?;
    }
    Ok(())
}

fn label(cluster: Builder) -> Result<()> {
    let kube = start(&cluster)?;
    let page = marker("kubernetes");
    open_shop(&kube, &page)?;
    // The other way round, too.
    let more = [server("web-east", "east", &page), client("client-west", "west"), front()];
    kube.apply(&more.join("\n---\n"))?;
    let names = ["web", "client", "web-east", "client-west"];
    kube.wait_ready("shop", &names, POD_READY)?;
    let mut pods = Vec::new();
    for name in names {
        pods.extend(addresses(&kube, name)?);
    }
    let mut calls = Vec::new();
    for (client, server) in [("client", "web"), ("client-west", "web-east")] {
        calls.extend(urls(&kube, server)?.into_iter().map(|url| (client, url)));
    }
    calls.extend(front_urls(&kube)?.into_iter().map(|url| ("client", url)));

    install(&kube)?;
    let capture = kube.capture()?;
    for (client, url) in &calls {
        fetch_from(&kube, client, url, &page).context("before the label")?;
    }
    let label = Moment::after_plain_traffic();
    kube.kubectl(["label", "namespace", "shop", "weft.dev/mesh=enabled"])?;
    wait_enrolled(&kube, &names)?;
    for (client, url) in &calls {
        fetch_from(&kube, client, url, &page).context("enrolled")?;
    }
    // All pages went through the tunnel, and nothing but it. The kubelet's probes do not cross this wire.
    let verified = (calls.len() * page.len()) as u64;
    capture.stop()?.encrypted_since(label, &pods, page.as_bytes(), verified)?;

    let identity = "spiffe://cluster.local/ns/shop/sa/default";
    for (node, as_source, as_destination) in [("east", 8.0, 4.0), ("west", 4.0, 8.0)] {
        for (reporter, calls) in [("source", as_source), ("destination", as_destination)] {
            let labels = [
                ("reporter", reporter),
                ("security", "mutual_tls"),
                ("source_principal", identity),
                ("destination_principal", identity),
            ];
            let opened = metrics(&kube, node)?.sum("weft_tcp_connections_opened_total", &labels);
            ensure!(
                opened == calls,
                "the agent of {node} counts {opened} of {calls} connections as {reporter}"
            );
        }
    }
    for (service, calls) in [("web", 2.0), ("front", 4.0)] {
        let labels = [("reporter", "source"), ("destination_service", service)];
        let named = metrics(&kube, "east")?.sum("weft_tcp_connections_opened_total", &labels);
        ensure!(named == calls, "of {calls} calls of the Service {service} {named} are named after it");
    }
    only_the_kubelet(&kube, &names, &page)
}

/// With everybody denied, the kubelets' probes of every kind (HTTP for readiness, gRPC for liveness, TCP for start) go on,
/// and nothing is restarted; root on the node with the same address is refused, and so is everybody else but by an Allow.
fn only_the_kubelet(kube: &KubeCluster, pods: &[&str], page: &str) -> Result<()> {
    let deny = "policy.weft.dev/default-inbound=deny";
    kube.kubectl(["annotate", "namespace", "shop", deny])?;
    let url = format!("http://{}/", kube.field("shop", "service/web", ".spec.clusterIP")?);
    until(POD_READY, "everybody is denied", || Ok(fetch(kube, &url, page).is_err()))?;
    let to = kube.field("shop", "pod/web", ".status.podIP")?;
    let direct = format!("http://{to}:8080/");
    let west = kube.node("west")?;
    let curl = ["--silent", "--show-error", "--max-time", "3", &direct];
    let root_on_the_node = west.place().try_run("curl", curl)?;
    ensure!(!root_on_the_node.status.success(), "root on the node was taken for its kubelet");

    let passed = || Ok::<_, anyhow::Error>(metrics(kube, "west")?.sum("weft_kernel_probes_total", &[]));
    let before = passed()?;
    // Longer than a liveness probe may fail.
    pause(Duration::from_secs(6));
    let probes = passed()? - before;
    ensure!(probes >= 8.0, "the kernel passed {probes} of the kubelet's connections in six seconds");
    for pod in pods {
        let restarts =
            kube.field("shop", &format!("pod/{pod}"), ".status.containerStatuses[0].restartCount")?;
        ensure!(restarts == "0", "{pod} was restarted {restarts} times");
    }
    kube.wait_ready("shop", pods, POD_READY)?;
    // A pod that is born into it passes its startup probe.
    kube.apply(&server("late", "west", page))?;
    kube.wait_ready("shop", &["late"], POD_READY).context("a pod that is born where everybody is denied")?;

    kube.apply(
        "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
         metadata: {name: clients, namespace: shop}\n\
         spec: {selector: {matchLabels: {app: web}}, rules: [{from: [{serviceAccounts: [default]}]}]}",
    )?;
    let policy = "authorizationpolicies.policy.weft.dev/clients";
    kube.kubectl(["wait", "-n", "shop", policy, "--for=condition=Programmed", "--timeout=30s"])?;
    fetch(kube, &url, page).context("an Allow is said to be in force, and the client is not let in")
}

fn operations(cluster: Builder) -> Result<()> {
    let kube = start(&cluster)?;
    let page = marker("operations");
    open_shop(&kube, &page)?;
    install(&kube)?;
    kube.kubectl(["label", "namespace", "shop", "weft.dev/mesh=enabled"])?;
    wait_enrolled(&kube, &["web", "client"])?;
    let mut pods = [addresses(&kube, "web")?, addresses(&kube, "client")?].concat();
    let url = format!("http://{}/", kube.field("shop", "service/web", ".spec.clusterIP")?);
    fetch(&kube, &url, &page)?;
    wait_condition(&kube, &["web", "client"], "True Enrolled")?;
    check_records(&kube)?;
    let capture = kube.capture()?;
    let start = Moment::now();

    // New agents take over from the old ones while connections keep coming.
    let traffic = Calls::start(&kube, &url)?;
    kube.kubectl(["rollout", "restart", "-n", "weft-system", "daemonset/weft-agent"])?;
    kube.kubectl(["rollout", "status", "-n", "weft-system", "daemonset/weft-agent", "--timeout=90s"])?;
    // The old ones still drain.
    pause(Duration::from_secs(4));
    let (calls, failed) = traffic.stop(&kube)?;
    ensure!(calls > 20, "only {calls} calls were made during the upgrade");
    ensure!(failed == 0, "{failed} of {calls} calls failed while the agents were replaced");

    // A killed agent: refused meanwhile, and working again with nobody's help.
    let agents = "app.kubernetes.io/name=weft-agent";
    kube.kubectl(["delete", "pods", "-n", "weft-system", "-l", agents, "--grace-period=0", "--force"])?;
    until(Duration::from_secs(60), "calls succeed with the agents back", || {
        fetch(&kube, &url, &page).map(|()| true)
    })?;

    // The controllers die one after the other, and nobody notices.
    let control = "app.kubernetes.io/name=weft-control";
    let control_pods =
        ["get", "pods", "-n", "weft-system", "-l", control, "-o", "jsonpath={.items[*].metadata.name}"];
    let traffic = Calls::start(&kube, &url)?;
    let replicas = kube.kubectl(control_pods)?;
    ensure!(replicas.split_whitespace().count() == 2, "there are these controllers: {replicas:?}");
    for replica in replicas.split_whitespace() {
        kube.kubectl(["delete", "pod", "-n", "weft-system", replica, "--grace-period=0", "--force"])?;
        rolled_out(&kube)?;
    }
    let (calls, failed) = traffic.stop(&kube)?;
    ensure!(failed == 0, "{failed} of {calls} calls failed while the controllers were killed");
    until(Duration::from_secs(40), "one of the new controllers leads", || {
        let holder = kube.field("weft-system", "lease/weft-control", ".spec.holderIdentity")?;
        ensure!(kube.kubectl(control_pods)?.split_whitespace().any(|pod| pod == holder), "{holder} leads");
        Ok(true)
    })?;
    check_records(&kube)?;

    crate::rotation::in_a_cluster(&kube, &url)?;

    // Without API server and controller traffic goes on; a controller that comes back takes nothing back.
    kube.control_plane().kill_api()?;
    let wget = ["wget", "-q", "-O", "-", &url];
    ensure!(in_pod(&kube, "client", &wget)?.trim() == page, "without the API server nothing goes on");
    kube.control_plane().start_api()?;
    kube.kubectl(["delete", "pods", "-n", "weft-system", "-l", control, "--grace-period=0", "--force"])?;
    for _ in 0..10 {
        fetch(&kube, &url, &page).context("while the controller is replaced")?;
    }
    rolled_out(&kube)?;
    wait_enrolled(&kube, &["web", "client"]).context("with a new controller")?;
    fetch(&kube, &url, &page)?;

    // A pod that is deleted and made anew under its name is another pod: with the same name, another namespace.
    kube.kubectl(["delete", "pod", "-n", "shop", "client", "--grace-period=1"])?;
    kube.apply(&shop(&page))?;
    kube.wait_ready("shop", &["client"], POD_READY)?;
    pods.extend(addresses(&kube, "client")?);
    until(Duration::from_secs(30), "the new client is enrolled", || {
        let local = dump(&kube, "east")?["pods"].as_array().cloned().unwrap_or_default();
        Ok(local.iter().any(|pod| pod["phase"].as_str().is_some_and(|p| p.eq_ignore_ascii_case("published"))))
    })?;
    fetch(&kube, &url, &page).context("the new client")?;
    wait_condition(&kube, &["web", "client"], "True Enrolled")?;
    check_records(&kube)?;
    let columns = kube.kubectl(["get", "nodeenrollments"])?;
    ensure!(
        columns.lines().next().is_some_and(|l| l.contains("ENROLLED") && l.contains("FAILED")),
        "{columns}"
    );
    let nonsense = r#"{"status":{"enrolled":[{"uid":"a","addresses":["10.1.0"]}]}}"#;
    let taken = kube.kubectl(["patch", "nodeenrollment", "east", "--type=merge", "-p", nonsense]);
    ensure!(
        taken.as_ref().is_err_and(|error| format!("{error:#}").contains("is not an IP address")),
        "the API server says of an address that is none: {taken:?}"
    );
    capture.stop()?.nothing_in_the_clear(start, &pods, page.as_bytes())?;

    // The label goes, and with it the mesh.
    kube.kubectl(["label", "namespace", "shop", "weft.dev/mesh-"])?;
    wait_unenrolled(&kube)?;
    let before = metrics(&kube, "east")?.sum("weft_tcp_connections_opened_total", &[]);
    fetch(&kube, &url, &page).context("without the label")?;
    let after = metrics(&kube, "east")?.sum("weft_tcp_connections_opened_total", &[]);
    ensure!(before == after, "an agent is still in the path");
    wait_condition(&kube, &["web", "client"], "False NotInMesh")?;
    until(Duration::from_secs(10), "nobody is written down as enrolled", || {
        let left =
            kube.kubectl(["get", "nodeenrollments", "-o", "jsonpath={.items[*].status.enrolledPods}"])?;
        ensure!(left.split_whitespace().all(|count| count == "0"), "{left:?} are");
        Ok(true)
    })
}

/// Waits until the controllers are as many as they should be.
pub fn rolled_out(kube: &KubeCluster) -> Result<()> {
    kube.kubectl(["rollout", "status", "-n", "weft-system", "deployment/weft-control", "--timeout=90s"])
        .map(drop)
}

/// Waits until the condition of these pods of `shop` has that status and reason.
fn wait_condition(kube: &KubeCluster, pods: &[&str], expected: &str) -> Result<()> {
    for pod in pods {
        // A holder of the Lease that was killed is waited for.
        until(Duration::from_secs(40), &format!("{pod} says that it is {expected:?}"), || {
            let ours = r#".status.conditions[?(@.type=="weft.dev/Enrolled")]"#;
            let said = kube.field("shop", &format!("pod/{pod}"), &format!("{ours}['status','reason']"))?;
            ensure!(said == expected, "it says {said:?}");
            Ok(true)
        })?;
    }
    Ok(())
}

/// What is written down: `client` on `east` and `web` on `west`, as the pods they are.
fn check_records(kube: &KubeCluster) -> Result<()> {
    for (node, pod) in [("east", "client"), ("west", "web")] {
        until(
            Duration::from_secs(10),
            &format!("{pod} is written down of {node}, and nothing else"),
            || {
                let object = format!("nodeenrollment/{node}");
                let text = kube.kubectl(["get", object.as_str(), "-o", "jsonpath={.status}"])?;
                let mut status: serde_json::Value = serde_json::from_str(&text)?;
                let trust = status.as_object_mut().and_then(|status| status.remove("trustSerial"));
                ensure!(
                    trust.is_some_and(|serial| serial.as_u64() > Some(0)),
                    "its roots are not written down"
                );
                let expected = serde_json::json!({
                    "enrolledPods": 1,
                    "failedPods": 0,
                    "enrolled": [{
                        "uid": format!("Kubernetes//Pod/shop/{pod}"),
                        "podUID": kube.field("shop", &format!("pod/{pod}"), ".metadata.uid")?,
                        "addresses": addresses(kube, pod)?,
                    }],
                    "failures": [],
                });
                ensure!(status == expected, "it is {status}");
                Ok(true)
            },
        )?;
    }
    Ok(())
}

fn birth(cluster: Builder) -> Result<()> {
    let kube = start(&cluster)?;
    // The network of one node is one plugin alone, that of the other a list.
    let east = kube.node("east")?;
    let ranges = kube.field("", "node/east", ".spec.podCIDRs[*]")?;
    let ranges: Vec<_> = ranges.split_whitespace().collect();
    east.write_cni("10-test.conf", &ranges)?;
    east.run("rm", &["/etc/cni/net.d/10-test.conflist"])?;
    let lone = east.run("cat", &["/etc/cni/net.d/10-test.conf"])?;
    let page = marker("birth");
    open_shop(&kube, &page)?;
    install(&kube)?;
    let installed = |node: &str| -> Result<bool> {
        let used =
            "cd /etc/cni/net.d && LC_ALL=C ls | grep -E '[.](conf|conflist|json)$' | head -n 1 | xargs cat";
        Ok(kube.node(node)?.run("sh", &["-c", used])?.contains("weft-cni"))
    };
    until(
        Duration::from_secs(30),
        "the plugin is in place",
        || Ok(installed("east")? && installed("west")?),
    )?;
    kube.kubectl(["label", "namespace", "shop", "weft.dev/mesh=enabled"])?;
    wait_enrolled(&kube, &["web", "client"])?;
    let url = format!("http://{}/", kube.field("shop", "service/web", ".spec.clusterIP")?);

    // A pod's first act is a call into the mesh: by the time it starts, it is captured. Its name says what it calls.
    let capture = kube.capture()?;
    let start = Moment::now();
    kube.apply(&caller("newborn", "shop", &url))?;
    until(Duration::from_secs(60), "the newborn's first call has ended", || {
        Ok(kube.field("shop", "pod/newborn", ".status.phase")? == "Succeeded")
    })?;
    let said = kube.kubectl(["logs", "-n", "shop", "newborn"])?;
    ensure!(said.trim() == page, "the newborn's first call got {said:?}");
    let mut pods =
        [addresses(&kube, "web")?, addresses(&kube, "client")?, addresses(&kube, "newborn")?].concat();
    pods.dedup();
    let recording = capture.stop()?;
    recording.nothing_in_the_clear(start, &pods, page.as_bytes())?;
    ensure!(recording.tunnel_bytes(start) > page.len() as u64, "the page came by no tunnel");

    reboot(&kube, &url, &page).context("a node is started again")?;

    // Another component writes the configuration anew: the plugin comes back.
    east.write_cni("10-test.conf", &ranges)?;
    until(Duration::from_secs(10), "the plugin is back in the configuration", || installed("east"))?;

    // No agent on the node: a pod of the mesh does not start, one outside starts at once.
    let nowhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"weft.dev/nowhere":"true"}}}}}"#;
    kube.kubectl(["patch", "-n", "weft-system", "daemonset/weft-agent", "-p", nowhere])?;
    until(Duration::from_secs(90), "no agent runs", || {
        Ok(kube
            .kubectl([
                "get",
                "pods",
                "-n",
                "weft-system",
                "-l",
                "app.kubernetes.io/name=weft-agent",
                "-o",
                "name",
            ])?
            .is_empty())
    })?;
    kube.kubectl(["create", "namespace", "plain"])?;
    kube.apply(&sleeper("orphan", "shop"))?;
    kube.apply(&sleeper("stranger", "plain"))?;
    kube.wait_ready("plain", &["stranger"], POD_READY).context("outside the mesh, without an agent")?;
    until(Duration::from_secs(30), "the orphan says why it does not start", || {
        let events =
            kube.kubectl(["get", "events", "-n", "shop", "--field-selector", "involvedObject.name=orphan"])?;
        Ok(events.contains("belongs to the mesh") && events.contains("weft-system"))
    })?;
    let phase = kube.field("shop", "pod/orphan", ".status.phase")?;
    ensure!(phase == "Pending", "without an agent the orphan is {phase}");

    // The agent comes back, and the pod starts by itself.
    let everywhere = r#"[{"op":"remove","path":"/spec/template/spec/nodeSelector/weft.dev~1nowhere"}]"#;
    kube.kubectl(["patch", "-n", "weft-system", "daemonset/weft-agent", "--type=json", "-p", everywhere])?;
    kube.wait_ready("shop", &["orphan"], Duration::from_secs(120)).context("with the agent back")?;
    wait_enrolled(&kube, &["web", "client", "orphan"])?;

    // And out again, with the label still there and calls all the time: none is refused, and nothing is left.
    let traffic = Calls::start(&kube, &url)?;
    let output = weft(&kube, &["uninstall", "--yes"])?;
    ensure!(output.status.success(), "weft uninstall: {}", String::from_utf8_lossy(&output.stderr));
    let (calls, failed) = traffic.stop(&kube)?;
    ensure!(calls > 20 && failed == 0, "{failed} of {calls} calls failed while the mesh was taken away");
    let left = kube.kubectl(["get", "namespaces,clusterroles,clusterrolebindings,crds", "-o", "name"])?;
    ensure!(!left.contains("weft"), "something is left in the cluster:\n{left}");
    for node in kube.nodes() {
        let places = "ls -A /etc/cni/net.d /opt/cni/bin /sys/fs/bpf; cat /etc/cni/net.d/10*";
        let left = node.run("sh", &["-c", places])?;
        ensure!(!left.contains("weft"), "something is left in {}:\n{left}", node.place().name());
    }
    let given_back = east.run("cat", &["/etc/cni/net.d/10-test.conf"])?;
    ensure!(given_back == lone, "the network of east was {lone:?}, and now is {given_back:?}");
    kube.apply(&sleeper("afterwards", "shop"))?;
    kube.wait_ready("shop", &["afterwards"], POD_READY)?;
    fetch(&kube, &url, &page).context("without a mesh")
}

/// A node loses its power. Its pods come back before anybody looks after them, and yet say nothing in the clear.
fn reboot(kube: &KubeCluster, url: &str, page: &str) -> Result<()> {
    kube.apply(&pod("early", "shop", &format!("wget -q -O - {url}; exec sleep 1000000")))?;
    kube.wait_ready("shop", &["early"], POD_READY)?;
    let mut pods = [addresses(kube, "web")?, addresses(kube, "client")?, addresses(kube, "early")?].concat();
    let capture = kube.capture()?;
    let start = Moment::now();
    kube.node("east")?.restart()?;
    until(Duration::from_secs(120), "the pods of the node run again", || {
        let path = ".status.containerStatuses[0].restartCount";
        Ok(kube.field("shop", "pod/early", path)? != "0" && kube.field("shop", "pod/client", path)? != "0")
    })?;
    kube.wait_ready("shop", &["early", "client"], POD_READY)?;
    pods.extend([addresses(kube, "client")?, addresses(kube, "early")?].concat());
    wait_enrolled(kube, &["web", "client", "early"])?;
    until(Duration::from_secs(30), "the early pod's first call since has ended well", || {
        Ok(kube.kubectl(["logs", "-n", "shop", "early"])?.contains(page))
    })?;
    fetch(kube, url, page)?;
    let recording = capture.stop()?;
    recording.nothing_in_the_clear(start, &pods, page.as_bytes())?;
    kube.kubectl(["delete", "pod", "-n", "shop", "early", "--grace-period=1"]).map(drop)
}

/// A loop of calls from the client's pod, each a new connection.
pub struct Calls(std::process::Child);

impl Calls {
    pub fn start(kube: &KubeCluster, url: &str) -> Result<Calls> {
        let script = format!(
            "rm -f /tmp/stop; n=0; failed=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
             wget -q -O /dev/null {url} || failed=$((failed+1)); sleep 0.05; done; echo $n $failed"
        );
        let mut command =
            kube.control_plane().kubectl_command(["exec", "-n", "shop", "client", "--", "sh", "-c", &script]);
        let child = command.stdout(std::process::Stdio::piped()).spawn().context("kubectl exec")?;
        Ok(Calls(child))
    }

    /// How many were made, and how many failed.
    pub fn stop(self, kube: &KubeCluster) -> Result<(u32, u32)> {
        kube.exec("shop", "client", &["touch", "/tmp/stop"])?;
        let output = self.0.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (calls, failed) = text.trim().split_once(' ').with_context(|| format!("it printed {text:?}"))?;
        Ok((calls.parse()?, failed.parse()?))
    }
}

/// Runs a command in a pod of `shop` on `east` past the API server, by the node's container runtime.
fn in_pod(kube: &KubeCluster, pod: &str, command: &[&str]) -> Result<String> {
    let node = kube.node("east")?;
    let label = format!("labels.\"io.kubernetes.pod.name\"=={pod}");
    let kind = "labels.\"io.cri-containerd.kind\"==container";
    let found = node.run("ctr", &["-n", "k8s.io", "containers", "list", "-q", &format!("{label},{kind}")])?;
    let id = found.split_whitespace().last().with_context(|| format!("no container of {pod}"))?;
    let task = ["-n", "k8s.io", "task", "exec", "--exec-id", "past-the-api", id];
    node.run("ctr", &[&task[..], command].concat())
}

/// A cluster of its own. A machine whose kernel or container does not let nodes run is no failure of Weft.
pub fn start(cluster: &Builder) -> Result<KubeCluster> {
    if let Some(why) = obstacle() {
        return Err(Skipped(why).into());
    }
    KubeCluster::start(cluster.name(), &NODES)
}

/// A pod's addresses, IPv4 and IPv6.
fn addresses(kube: &KubeCluster, pod: &str) -> Result<Vec<IpAddr>> {
    let text = kube.field("shop", &format!("pod/{pod}"), ".status.podIPs[*].ip")?;
    let found: Vec<IpAddr> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(found.len() == 2, "{pod} has the addresses {text:?}");
    Ok(found)
}

/// A web server by its pod's and its Service's addresses, of both families.
fn urls(kube: &KubeCluster, server: &str) -> Result<Vec<String>> {
    let services = kube.field("shop", &format!("service/{server}"), ".spec.clusterIPs[*]")?;
    let services: Vec<IpAddr> = services.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    ensure!(services.len() == 2, "the Service has the addresses {services:?}");
    let pods = addresses(kube, server)?;
    Ok(pods.iter().map(|ip| url(*ip, 8080)).chain(services.iter().map(|ip| url(*ip, 80))).collect())
}

/// The Service `front` by a node's addresses at its port there, and by its external ones, of both families.
fn front_urls(kube: &KubeCluster) -> Result<Vec<String>> {
    let external: Vec<IpAddr> = EXTERNAL.into_iter().map(str::parse).collect::<Result<_, _>>()?;
    let nodes = kube.node("west")?.place().addresses();
    Ok(nodes
        .into_iter()
        .map(|ip| url(ip, NODE_PORT))
        .chain(external.into_iter().map(|ip| url(ip, 80)))
        .collect())
}

fn url(ip: IpAddr, port: u16) -> String {
    format!("http://{}/", std::net::SocketAddr::new(ip, port))
}

/// As the documentation says it.
pub fn install(kube: &KubeCluster) -> Result<()> {
    let output =
        std::process::Command::new(binary("weft")?).arg("install").output().context("weft install")?;
    ensure!(output.status.success(), "weft install: {}", String::from_utf8_lossy(&output.stderr));
    kube.apply(&String::from_utf8(output.stdout)?)?;
    for object in ["deployment/weft-control", "daemonset/weft-agent"] {
        let rollout = kube.kubectl(["rollout", "status", "-n", "weft-system", object, "--timeout=60s"]);
        if let Err(error) = rollout {
            let pods = kube.kubectl(["describe", "-n", "weft-system", "pods"]).unwrap_or_default();
            return Err(error.context(format!("{object}\n{pods}")));
        }
    }
    Ok(())
}

/// Runs `weft` as the cluster's administrator.
pub fn weft(kube: &KubeCluster, arguments: &[&str]) -> Result<Output> {
    let mut command = kube.control_plane().command(&binary("weft")?);
    command.args(arguments);
    run_bounded(command, Duration::from_secs(240))
}

fn wait_unenrolled(kube: &KubeCluster) -> Result<()> {
    until(Duration::from_secs(30), "no pod is enrolled any more", || {
        for node in NODES {
            let enrolled = metrics(kube, node)?.sum("weft_enrolled_pods", &[]);
            ensure!(enrolled == 0.0, "{enrolled} are on {node}");
        }
        Ok(true)
    })
}

/// Waits until the agents of both nodes know these pods of `shop` as reachable by tunnel.
fn wait_enrolled(kube: &KubeCluster, pods: &[&str]) -> Result<()> {
    for node in kube.nodes() {
        let name = node.place().name();
        until(Duration::from_secs(30), &format!("{name} knows {pods:?} as enrolled"), || {
            let known = dump(kube, name)?;
            for pod in pods {
                let tunnel = tunnel_in(&known, &format!("Kubernetes//Pod/shop/{pod}"));
                ensure!(tunnel.as_deref() == Some("hbone"), "{pod} is {tunnel:?}");
            }
            Ok(true)
        })?;
    }
    Ok(())
}

/// What a node's agent knows.
fn dump(kube: &KubeCluster, node: &str) -> Result<serde_json::Value> {
    let socket = ["--silent", "--show-error", "--unix-socket", "/run/weft/agent.sock"];
    let dump = kube.node(node)?.run("curl", &[&socket[..], &["http://agent/config_dump"]].concat())?;
    serde_json::from_str(&dump).context("the config dump")
}

/// A scrape of a node's agent, over the network.
fn metrics(kube: &KubeCluster, node: &str) -> Result<Metrics> {
    let place = kube.node(node)?.place();
    Metrics::parse(&get(&place.connect(place.at(15020))?, "/metrics")?.body)
}

/// Creates the namespace and waits for its pods.
pub fn open_shop(kube: &KubeCluster, page: &str) -> Result<()> {
    until(Duration::from_secs(30), "the shop's objects are taken", || {
        kube.apply(&shop(page)).map(|()| true)
    })?;
    kube.wait_ready("shop", &["web", "client"], POD_READY)
}

/// The client fetches a page, which must be that one.
fn fetch(kube: &KubeCluster, url: &str, page: &str) -> Result<()> {
    fetch_from(kube, "client", url, page)
}

fn fetch_from(kube: &KubeCluster, client: &str, url: &str, page: &str) -> Result<()> {
    let curl = ["curl", "--silent", "--show-error", "--fail", "--max-time", "20", url];
    let got = kube.exec("shop", client, &curl).with_context(|| format!("{client} asks {url}"))?;
    ensure!(got.trim() == page, "{url} answered {got:?}");
    Ok(())
}
