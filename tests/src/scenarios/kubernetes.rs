//! Stories of a real Kubernetes cluster: two nodes with containerd and kubelets, on this machine.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::KubeCluster;
use weft_testbed::poll::until;

use crate::runner::Scenario;

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "kubernetes_cluster",
    "two real nodes: pods run, and reach each other and a Service",
    cluster,
)
.within(300)];

const NODES: [&str; 2] = ["east", "west"];
const POD_READY: Duration = Duration::from_secs(90);

/// A web server on `west` with a Service, and a client on `east`, in the namespace `shop`.
fn shop(page: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Namespace
metadata: {{name: shop}}
---
apiVersion: v1
kind: Pod
metadata: {{name: web, namespace: shop, labels: {{app: web}}}}
spec:
  nodeName: west
  terminationGracePeriodSeconds: 1
  containers:
  - name: web
    image: localhost/busybox:test
    command: [sh, -c, "mkdir /tmp/www && echo {page} > /tmp/www/index.html && exec httpd -f -p 8080 -h /tmp/www"]
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: shop}}
spec:
  selector: {{app: web}}
  ports: [{{port: 80, targetPort: 8080}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: shop, labels: {{app: client}}}}
spec:
  nodeName: east
  terminationGracePeriodSeconds: 1
  containers:
  - name: client
    image: localhost/busybox:test
    command: [sleep, "1000000"]
"#
    )
}

fn cluster(cluster: Builder) -> Result<()> {
    let kube = KubeCluster::start(cluster.name(), &NODES)?;
    open_shop(&kube, "hello-from-web")?;
    let web = kube.field("shop", "pod/web", ".status.podIP")?;
    let service = kube.field("shop", "service/web", ".spec.clusterIP")?;
    for to in [format!("http://{web}:8080/"), format!("http://{service}/")] {
        fetch(&kube, &to, "hello-from-web")?;
    }
    Ok(())
}

/// Creates the namespace and waits for its pods.
fn open_shop(kube: &KubeCluster, page: &str) -> Result<()> {
    until(Duration::from_secs(30), "the shop's objects are taken", || {
        kube.apply(&shop(page)).map(|()| true)
    })?;
    kube.wait_ready("shop", &["web", "client"], POD_READY)
}

/// The client fetches a page, which must be that one.
fn fetch(kube: &KubeCluster, url: &str, page: &str) -> Result<()> {
    let got = kube.exec("shop", "client", &["wget", "-q", "-O", "-", url]).context(url.to_owned())?;
    ensure!(got.trim() == page, "{url} answered {got:?}");
    Ok(())
}
