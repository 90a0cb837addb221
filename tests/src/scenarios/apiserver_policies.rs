//! Policies as they are in life: objects of a real API server, which refuses what could not be understood, and says of
//! each what the controller makes of it.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::ApiCluster;
use weft_testbed::poll::{pause, until};
use weft_testbed::traffic::call;
use weft_testbed::{Server, servers};

use crate::apiserver::{NEWS, NODES, Shop};
use crate::runner::Scenario;
use crate::shop::{ECHO, still_alive};

/// A controller that takes a node's word too early would have by then.
const STEADY: Duration = Duration::from_secs(4);

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "kubernetes_api_policies",
    "the API server refuses policies that make no sense; those it takes are in force at once, and their status says so",
    policies,
)];

pub fn policy(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
        "metadata": {"name": name, "namespace": "shop"}, "spec": spec,
    })
}

fn policies(cluster: Builder) -> Result<()> {
    let shop = Shop::start(ApiCluster::start(cluster.name(), &NODES, 1)?)?;
    let api = shop.cluster.api();
    refuses(&|spec| api.apply(&policy("any", spec)).map(drop))?;
    api.delete(&policy("any", json!({})))?;

    let to = shop.web.at(ECHO);
    until(NEWS, "the client is let in again", || Ok(call(&shop.client, to, "may I").is_ok()))?;
    let mut open = shop.client.connect(to)?;
    still_alive(&mut open, "before")?;
    let accepted = |name: &str, expected: &str, words: &str| {
        until(NEWS, &format!("the status of {name} is {expected}"), || {
            let path = format!("/apis/policy.weft.dev/v1alpha1/namespaces/shop/authorizationpolicies/{name}");
            let object = api.get(&path)?;
            ensure!(says(&object, "Accepted", expected, words), "{object}");
            Ok(true)
        })
    };
    let web = json!({"matchLabels": {"app": "web"}});
    let nobody = policy("nobody", json!({"action": "Allow", "selector": web}));
    programmed(&shop, &nobody)?;
    accepted("nobody", "Accepted", "")?;
    until(NEWS, "nobody is let in", || Ok(call(&shop.client, to, "may I").is_err()))?;
    ensure!(still_alive(&mut open, "after").is_err(), "an open connection outlived an Allow of nobody");
    api.apply(&policy("client", json!({"rules": [{"from": [{"serviceAccounts": ["default"]}]}]})))?;
    until(NEWS, "another Allow lets the client in", || Ok(call(&shop.client, to, "may I").is_ok()))?;
    api.delete(&nobody)?;

    // What names something that is not there denies, until it is mended; so does a word that nobody knows here.
    let many = vec!["default"; 64];
    for (spec, reason, words) in [
        (json!({"targetRefs": [{"kind": "Service", "name": "nowhere"}]}), "TargetNotFound", "nowhere"),
        (
            json!({"rules": [{"from": [{"namespaces": ["shop"], "princpals": ["*"]}]}]}),
            "Invalid",
            "princpals",
        ),
        (json!({"selector": {"matchExpressions": []}}), "Invalid", "matchExpressions"),
        // More than agents are told of one policy.
        (json!({"rules": [{"from": vec![json!({"serviceAccounts": many}); 16]}]}), "TooLarge", "bytes"),
    ] {
        api.apply(&policy("lost", spec))?;
        accepted("lost", reason, words)?;
        until(NEWS, "it denies", || Ok(call(&shop.client, to, "may I").is_err()))?;
        api.delete(&policy("lost", json!({})))?;
        until(NEWS, "it is gone", || Ok(call(&shop.client, to, "may I").is_ok()))?;
    }
    let changed = json!({"action": "Deny", "rules": [{"to": [{"ports": [9]}]}]});
    api.apply(&policy("lost", changed))?;
    accepted("lost", "Accepted", "").context("after it was mended")?;
    call(&shop.client, to, "another port")?;
    // A pod that is born after its policies, and one that has none.
    let late = shop.cluster.pod("shop/late", "west")?;
    let other = shop.cluster.pod("elsewhere/other", "west")?;
    let _servers = [Server::start(&late, ECHO, servers::echo)?, Server::start(&other, ECHO, servers::echo)?];
    shop.cluster.namespace("elsewhere", &[("weft.dev/mesh", "enabled")])?;
    shop.cluster.wait_enrolled(&[&late, &other])?;
    call(&shop.client, late.at(ECHO), "a new pod")?;
    call(&shop.client, other.at(ECHO), "a pod without policies")?;
    ensure!(call(&other, late.at(ECHO), "denied").is_err(), "a caller of another namespace is let in");
    Ok(())
}

/// A policy is said to be in force when every node has it, and not while one of them cannot have heard of it.
fn programmed(shop: &Shop, policy: &Value) -> Result<()> {
    let (cluster, api) = (&shop.cluster, shop.cluster.api());
    let name = policy["metadata"]["name"].as_str().context("a name")?;
    let path = format!("/apis/policy.weft.dev/v1alpha1/namespaces/shop/authorizationpolicies/{name}");
    let said = |reason: &str, words: &str| {
        until(NEWS, &format!("it is said: {reason}, {words}"), || {
            let object = api.get(&path)?;
            ensure!(says(&object, "Programmed", reason, words), "{object}");
            Ok(true)
        })
    };
    cluster.hold("west")?;
    api.apply(policy)?;
    said("Pending", "1 of 2 nodes with pods in the mesh enforce it; waiting for west")?;
    call(&shop.client, shop.web.at(ECHO), "it is not enforced there")?;
    pause(STEADY);
    said("Pending", "waiting for west")?;
    cluster.release("west")?;
    said("Programmed", "2 of 2 nodes that had pods in the mesh then enforce it")
}

/// Whether a condition says that of the generation that is there.
fn says(object: &Value, kind: &str, reason: &str, words: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    let condition = conditions.and_then(|all| all.iter().find(|condition| condition["type"] == kind));
    condition.is_some_and(|condition| {
        condition["observedGeneration"] == object["metadata"]["generation"]
            && condition["reason"] == reason
            && condition["message"].as_str().unwrap_or_default().contains(words)
    })
}

/// What nobody could understand does not get in, and what is understood does.
fn refuses(apply: &dyn Fn(Value) -> Result<()>) -> Result<()> {
    let from = |source: Value| json!({"rules": [{"from": [source]}]});
    for good in [
        json!({}),
        json!({"rules": [{}]}),
        json!({"targetRefs": [{"group": "", "kind": "Namespace", "name": "shop"}]}),
        from(
            json!({"principals": ["*", "spiffe://cluster.local/ns/a/sa/*", "*/sa/web", "spiffe://a/ns/b/sa/c"]}),
        ),
        from(json!({"cidrs": ["10.0.0.0/8", "fd00::/8"], "notServiceAccounts": ["web", "shop/web"]})),
        json!({"rules": [{"to": [{"ports": [80], "notPorts": [81], "methods": ["GET"], "paths": ["/a*"]}]}]}),
    ] {
        apply(good.clone()).with_context(|| format!("{good}"))?;
    }
    for bad in [
        json!({"selector": {}, "targetRefs": [{"kind": "Namespace", "name": "shop"}]}),
        json!({"targetRefs": []}),
        json!({"targetRefs": [{"kind": "Gateway", "name": "a"}]}),
        json!({"targetRefs": [{"kind": "Namespace", "name": "shop"}, {"kind": "Service", "name": "a"}]}),
        json!({"action": "allow"}),
        json!({"rules": [{"from": []}]}),
        json!({"rules": [{"to": [{}]}]}),
        from(json!({})),
        from(json!({"principals": []})),
        from(json!({"principals": ["cluster.local/ns/a/sa/b"]})),
        from(json!({"principals": ["spiffe://a*b/ns/c/sa/d"]})),
        from(json!({"namespaces": ["Shop"]})),
        from(json!({"serviceAccounts": ["a/b/c"]})),
        from(json!({"cidrs": ["10.0.0.1"]})),
        json!({"rules": [{"to": [{"ports": [0]}]}]}),
        json!({"rules": [{"to": [{"ports": [65536]}]}]}),
        json!({"rules": [{"to": [{"ports": ["http"]}]}]}),
    ] {
        ensure!(apply(bad.clone()).is_err(), "the API server takes {bad}");
    }
    Ok(())
}
