//! `weft check` on a real cluster that is whole, and on the same cluster broken in different ways: it has to name the
//! cause and the remedy.

use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use serde_json::Value;
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::KubeCluster;
use weft_testbed::poll::until;

use crate::kubernetes::{install, open_shop, start, weft};
use crate::runner::Scenario;

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "kubernetes_check",
    "`weft check` finds a whole cluster whole, and names cause and remedy in broken ones",
    check,
)
.within(600)];

fn check(cluster: Builder) -> Result<()> {
    let kube = start(&cluster)?;
    open_shop(&kube, "checked")?;
    let pre = weft(&kube, &["check", "--pre"])?;
    ensure!(pre.status.success(), "--pre on a cluster that is fine:\n{}", text(&pre));
    let fail = weft(&kube, &["check"])?;
    ensure!(!fail.status.success(), "Weft is not installed, and check says:\n{}", text(&fail));
    finds(
        &kube,
        "not installed",
        "everything that belongs",
        "Deployment/weft-control is missing",
        "weft install",
    )?;

    install(&kube)?;
    kube.kubectl(["label", "namespace", "shop", "weft.dev/mesh=enabled"])?;
    whole(&kube).context("a whole cluster")?;

    no_agent(&kube).context("no agent on a node")?;
    no_network_configuration(&kube).context("no CNI configuration on a node")?;
    policies(&kube).context("NetworkPolicies")?;
    clocks(&kube).context("clock skew")?;
    no_definition(&kube).context("a missing definition")?;
    // Last: its remedy is a new root.
    expired_root(&kube).context("an expired root")
}

fn no_agent(kube: &KubeCluster) -> Result<()> {
    let east = r#"{"spec":{"template":{"spec":{"nodeSelector":{"kubernetes.io/hostname":"east"}}}}}"#;
    kube.kubectl(["patch", "-n", "weft-system", "daemonset/weft-agent", "-p", east])?;
    finds(
        kube,
        "no agent",
        "an agent is ready on every node",
        "west: the DaemonSet's nodeSelector leaves it out",
        "describe daemonset",
    )?;
    finds(
        kube,
        "no agent",
        "every pod that is to be in the mesh",
        "shop/web: no agent runs on west",
        "weft-agent",
    )?;
    let everywhere = r#"[{"op":"remove","path":"/spec/template/spec/nodeSelector/kubernetes.io~1hostname"}]"#;
    kube.kubectl(["patch", "-n", "weft-system", "daemonset/weft-agent", "--type=json", "-p", everywhere])?;
    whole(kube).map(drop)
}

fn no_network_configuration(kube: &KubeCluster) -> Result<()> {
    let west = kube.node("west")?;
    west.run("rm", &["/etc/cni/net.d/10-test.conflist"])?;
    let cause = "west: /etc/cni/net.d holds no network configuration yet";
    finds(
        kube,
        "no configuration",
        "the CNI plugin is in every node's network configuration",
        cause,
        "cni.confDir",
    )?;
    let ranges = kube.field("", "node/west", ".spec.podCIDRs[*]")?;
    west.write_cni("10-test.conflist", &ranges.split_whitespace().collect::<Vec<_>>())?;
    whole(kube).map(drop)
}

fn policies(kube: &KubeCluster) -> Result<()> {
    let policy = |ports: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: web, namespace: shop}}\n\
             spec: {{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{ports: [{ports}]}}]}}\n"
        )
    };
    kube.apply(&policy("{port: 8080}"))?;
    finds(
        kube,
        "a closed tunnel",
        "no NetworkPolicy blocks",
        "shop/web (ingress), which applies to web",
        "15008",
    )?;
    kube.apply(&policy("{port: 8080}, {port: 15008}"))?;
    let report = whole(kube).context("a warning is no failure")?;
    let row = find(&report, "limit ports that the tunnel carries").context("no such check")?;
    ensure!(row["result"] == "warning", "{row}");
    kube.kubectl(["delete", "-n", "shop", "networkpolicy/web"])?;
    whole(kube).map(drop)
}

/// The agents' clocks are set wrong with libfaketime: what they run on shares the machine's real one.
fn clocks(kube: &KubeCluster) -> Result<()> {
    let patch = r#"{"spec":{"template":{"spec":{
        "volumes":[{"name":"faketime","hostPath":{"path":"/usr/lib/x86_64-linux-gnu/faketime"}}],
        "containers":[{"name":"weft-agent",
            "volumeMounts":[{"name":"faketime","mountPath":"/faketime"}],
            "env":[{"name":"LD_PRELOAD","value":"/faketime/libfaketimeMT.so.1"},{"name":"FAKETIME","value":"+10m"},
                {"name":"FAKETIME_DONT_FAKE_MONOTONIC","value":"1"},{"name":"FAKETIME_DISABLE_SHM","value":"1"}]}]}}}}"#;
    kube.kubectl(["patch", "-n", "weft-system", "daemonset/weft-agent", "-p", patch])?;
    finds(kube, "clocks", "the nodes' clocks agree with the API server's", "west: 10 min ahead", "NTP")?;
    kube.kubectl(["rollout", "undo", "-n", "weft-system", "daemonset/weft-agent"])?;
    whole(kube).map(drop)
}

fn no_definition(kube: &KubeCluster) -> Result<()> {
    let name = "nodeenrollments.mesh.weft.dev";
    kube.kubectl(["delete", "crd", name])?;
    let cause = format!("the definition (CRD) {name} is missing");
    finds(
        kube,
        "a missing definition",
        "everything that belongs to an installation",
        &cause,
        "weft upgrade | kubectl apply",
    )?;
    let upgrade = weft(kube, &["upgrade"])?;
    ensure!(upgrade.status.success(), "weft upgrade: {}", text(&upgrade));
    kube.apply(&String::from_utf8(upgrade.stdout)?)?;
    whole(kube).map(drop)
}

fn expired_root(kube: &KubeCluster) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let (certificate, key) = (params.self_signed(&key)?.pem(), key.serialize_pem());
    let object = |kind: &str, name: &str, field: &str, data: Value| {
        serde_json::json!({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": "weft-system"}, field: data}).to_string()
    };
    let signer = serde_json::json!({"certificate": certificate, "key": key});
    let record = serde_json::json!({"version": 1, "serial": 1, "changedAt": 1, "signer": signer});
    kube.apply(&object(
        "Secret",
        "weft-ca",
        "stringData",
        serde_json::json!({"trust.json": record.to_string()}),
    ))?;
    kube.kubectl(["delete", "pod", "-n", "weft-system", "-l", "app.kubernetes.io/name=weft-control"])?;
    kube.apply(&object("ConfigMap", "weft-root", "data", serde_json::json!({"root.pem": certificate})))?;
    finds(kube, "expired", "the root's certificate is valid", "it expired", "delete secret/weft-ca")?;
    finds(kube, "expired", "the controller is running", "has expired", "logs deployment/weft-control")?;
    // What the hint says helps.
    kube.kubectl(["delete", "-n", "weft-system", "secret/weft-ca", "configmap/weft-root"])?;
    kube.kubectl([
        "rollout",
        "restart",
        "-n",
        "weft-system",
        "deployment/weft-control",
        "daemonset/weft-agent",
    ])?;
    whole(kube).map(drop)
}

/// Waits until `weft check` finds nothing wrong, and returns its report.
fn whole(kube: &KubeCluster) -> Result<Value> {
    let output = weft(kube, &["check", "--wait", "90s", "-o", "json"])?;
    ensure!(output.status.success(), "weft check ended with {}:\n{}", output.status, text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).context("its JSON")?;
    ensure!(report["success"] == true, "{report}");
    Ok(report)
}

/// Waits until `weft check` fails with that check, cause and remedy among what it prints.
fn finds(kube: &KubeCluster, what: &str, check: &str, cause: &str, remedy: &str) -> Result<()> {
    until(Duration::from_secs(60), &format!("weft check finds: {what}"), || {
        let output = weft(kube, &["check", "-o", "json"])?;
        ensure!(output.status.code() == Some(1), "exit status {}", output.status);
        let report: Value = serde_json::from_slice(&output.stdout).with_context(|| text(&output))?;
        ensure!(report["success"] == false, "{report}");
        let row =
            find(&report, check).with_context(|| format!("there is no check {check:?}:\n{report:#}"))?;
        let lines = row["error"].as_array().map(Vec::as_slice).unwrap_or_default();
        let named = lines.iter().any(|line| line.as_str().is_some_and(|line| line.contains(cause)));
        ensure!(row["result"] == "error" && named, "{check} is {row:#}, without {cause:?}");
        ensure!(
            row["hint"].as_str().is_some_and(|hint| hint.contains(remedy)),
            "without {remedy:?}: {row:#}"
        );
        Ok(true)
    })
}

/// The check whose description holds `what`.
fn find<'a>(report: &'a Value, what: &str) -> Option<&'a Value> {
    let categories = report["categories"].as_array()?.iter();
    let mut checks = categories.filter_map(|category| category["checks"].as_array()).flatten();
    checks.find(|check| check["description"].as_str().is_some_and(|text| text.contains(what)))
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).join("")
}
