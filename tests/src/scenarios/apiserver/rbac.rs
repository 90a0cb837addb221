//! What Weft may ask of a real API server: what it needs, and nothing else.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::{ApiCluster, SYSTEM, agent_pod_name, documents};
use weft_testbed::poll::until;
use weft_testbed::process::run_bounded;

use super::{AGENT, CONTROL, NEWS, NODES, PLUGIN, Shop};
use crate::apiserver_policies::policy;

pub fn rbac(cluster: Builder) -> Result<()> {
    let shop = Shop::start(ApiCluster::start(cluster.name(), &NODES, 1)?)?;
    let (cluster, api) = (&shop.cluster, shop.cluster.api());
    // A second pod on a node: what is written down of it is written again.
    let late = cluster.pod("shop/late", "east")?;
    cluster.wait_enrolled(&[&late])?;
    let unheeded =
        api.apply(&policy("unheeded", json!({"action": "Deny", "rules": [{"to": [{"ports": [9]}]}]})))?;
    let path = "/apis/policy.weft.dev/v1alpha1/namespaces/shop/authorizationpolicies/unheeded";
    until(NEWS, "a policy has its conditions", || Ok(api.get(path)?["status"] != unheeded["status"]))?;
    let reached = format!("/api/v1/namespaces/{SYSTEM}/configmaps/weft-policies");
    until(NEWS, "it is written down how far nodes have followed", || {
        let data = &api.get(&reached)?["data"];
        Ok(NODES.iter().all(|node| data[node].is_string()))
    })?;

    // What an agent does with its other token, the one for the API server, and the plugin with the token that it gets.
    let kubectl = |token: &str, args: &[&str]| -> Result<(bool, String)> {
        let output = run_bounded(cluster.kubectl_as(token, args)?, NEWS)?;
        let text = if output.status.success() { output.stdout } else { output.stderr };
        Ok((output.status.success(), String::from_utf8(text)?.trim().to_owned()))
    };
    let agent = api.token(SYSTEM, "weft-agent", "", Some(("Pod", &agent_pod_name("east"))))?;
    let (made, plugin) = kubectl(&agent, &["create", "token", "weft-cni", "-n", SYSTEM])?;
    ensure!(made, "an agent cannot get the plugin's token: {plugin}");
    for (args, allowed) in [
        (["get", "namespace/shop"].as_slice(), true),
        (&["get", "pod/client", "-n", "shop"], true),
        (&["get", "pods", "-n", "shop"], false),
    ] {
        let (succeeded, said) = kubectl(&plugin, args)?;
        ensure!(succeeded == allowed, "the plugin's kubectl {args:?}: {said}");
        ensure!(allowed || said.contains("Forbidden"), "the plugin's kubectl {args:?}: {said}");
    }

    // Everything that the controller asked was allowed, and nothing is allowed that nobody asked.
    let audited = api.audited()?;
    let control = format!("system:serviceaccount:{SYSTEM}:weft-control");
    let forbidden: Vec<_> =
        audited.iter().filter(|request| request.user == control && request.status == 403).collect();
    ensure!(forbidden.is_empty(), "the controller is forbidden what it needs: {forbidden:?}");
    let log = cluster.controllers()[0].log()?;
    ensure!(!log.contains("(403") && !log.contains("ERROR"), "the controller complains:\n{log}");
    let used: BTreeSet<_> = audited
        .into_iter()
        // kubectl also asks which kinds there are.
        .filter(|request| request.status != 403 && !request.resource.is_empty())
        .map(|request| (request.user, request.verb, request.resource))
        .collect();
    let granted = granted(&documents(cluster.manifests())?)?;
    // Nothing here interferes with the controller, or lasts as long as a Lease.
    let mending = [
        ("get", "nodeenrollments.mesh.weft.dev"),
        ("delete", "nodeenrollments.mesh.weft.dev"),
        ("update", "configmaps"),
        // When the root rotates.
        ("update", "secrets"),
        ("update", "leases.coordination.k8s.io"),
    ];
    let mends = |(user, verb, resource): &&(String, String, String)| {
        *user == control && mending.contains(&(verb.as_str(), resource.as_str()))
    };
    let unused: Vec<_> = granted.difference(&used).filter(|right| !mends(right)).collect();
    ensure!(unused.is_empty(), "granted, and not used by anything above: {unused:?}");
    let unexplained: Vec<_> = used.difference(&granted).collect();
    ensure!(unexplained.is_empty(), "used, and granted by nothing that was installed: {unexplained:?}");

    for (account, verb, resource, namespace, name, expected) in PERMISSIONS {
        let may = api.may(account, verb, resource, namespace, name)?;
        let what = format!("{account}: {verb} {resource} {name:?} in {namespace:?}");
        ensure!(may == *expected, "{what}: {}", if may { "is allowed" } else { "is forbidden" });
    }
    Ok(())
}

/// Account, verb, resource, namespace, name, and whether that is allowed.
type Permission = (&'static str, &'static str, &'static str, &'static str, &'static str, bool);

const ANYBODY: &str = "shop/default";

const PERMISSIONS: &[Permission] = &[
    // So that a "no" below means what it says.
    (CONTROL, "get", "secrets", SYSTEM, "weft-ca", true),
    (CONTROL, "watch", "pods", "", "", true),
    (CONTROL, "update", "configmaps", SYSTEM, "weft-root", true),
    (CONTROL, "patch", "configmaps", SYSTEM, "weft-policies", true),
    (CONTROL, "patch", "configmaps", SYSTEM, "another", false),
    (CONTROL, "create", "tokenreviews.authentication.k8s.io", "", "", true),
    (CONTROL, "get", "secrets", SYSTEM, "another", false),
    (CONTROL, "list", "secrets", SYSTEM, "", false),
    (CONTROL, "update", "secrets", SYSTEM, "weft-ca", true),
    (CONTROL, "update", "secrets", SYSTEM, "another", false),
    (CONTROL, "delete", "secrets", SYSTEM, "weft-ca", false),
    (CONTROL, "get", "secrets", "shop", "weft-ca", false),
    (CONTROL, "list", "secrets", "", "", false),
    (CONTROL, "create", "secrets", "shop", "", false),
    (CONTROL, "get", "configmaps", "kube-system", "", false),
    (CONTROL, "create", "configmaps", "shop", "", false),
    (CONTROL, "create", "pods", SYSTEM, "", false),
    (CONTROL, "create", "pods", "shop", "", false),
    (CONTROL, "delete", "pods", "shop", "", false),
    (CONTROL, "create", "pods/exec", "shop", "", false),
    (CONTROL, "patch", "namespaces", "", "shop", false),
    (CONTROL, "patch", "nodes", "", "east", false),
    (CONTROL, "get", "nodes/proxy", "", "east", false),
    (CONTROL, "create", "serviceaccounts/token", SYSTEM, "weft-agent", false),
    (CONTROL, "impersonate", "users", "", "", false),
    (CONTROL, "create", "clusterrolebindings.rbac.authorization.k8s.io", "", "", false),
    (CONTROL, "update", "roles.rbac.authorization.k8s.io", SYSTEM, "weft-control", false),
    (CONTROL, "patch", "daemonsets.apps", SYSTEM, "weft-agent", false),
    (AGENT, "create", "serviceaccounts/token", SYSTEM, "weft-cni", true),
    (AGENT, "create", "serviceaccounts/token", SYSTEM, "weft-control", false),
    (AGENT, "create", "serviceaccounts/token", SYSTEM, "weft-agent", false),
    (AGENT, "create", "serviceaccounts/token", SYSTEM, "", false),
    (AGENT, "create", "serviceaccounts/token", "shop", "weft-cni", false),
    (AGENT, "get", "secrets", SYSTEM, "weft-ca", false),
    (AGENT, "get", "configmaps", SYSTEM, "weft-root", false),
    (AGENT, "update", "nodeenrollments.mesh.weft.dev", "", "east", false),
    (AGENT, "get", "pods", "shop", "client", false),
    (AGENT, "list", "pods", "", "", false),
    (AGENT, "get", "nodes", "", "east", false),
    (AGENT, "create", "tokenreviews.authentication.k8s.io", "", "", false),
    (PLUGIN, "get", "pods", "shop", "client", true),
    (PLUGIN, "get", "namespaces", "", "shop", true),
    (PLUGIN, "list", "pods", "", "", false),
    (PLUGIN, "watch", "namespaces", "", "", false),
    (PLUGIN, "patch", "pods", "shop", "client", false),
    (PLUGIN, "patch", "pods/status", "shop", "client", false),
    (PLUGIN, "get", "pods/log", "shop", "client", false),
    (PLUGIN, "get", "secrets", "shop", "", false),
    (PLUGIN, "get", "configmaps", SYSTEM, "weft-root", false),
    (PLUGIN, "create", "serviceaccounts/token", SYSTEM, "weft-cni", false),
    (ANYBODY, "get", "secrets", SYSTEM, "weft-ca", false),
    (ANYBODY, "update", "configmaps", SYSTEM, "weft-enrollment-east", false),
    (ANYBODY, "update", "configmaps", SYSTEM, "weft-root", false),
    (ANYBODY, "create", "serviceaccounts/token", SYSTEM, "weft-agent", false),
    (ANYBODY, "create", "tokenreviews.authentication.k8s.io", "", "", false),
];

/// What the manifests' bindings grant: user, verb, and resource with its group.
fn granted(manifests: &[Value]) -> Result<BTreeSet<(String, String, String)>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut granted = BTreeSet::new();
    for binding in manifests.iter().filter(|object| text(&object["kind"]).ends_with("RoleBinding")) {
        let role = &binding["roleRef"];
        let role = manifests
            .iter()
            .find(|object| object["kind"] == role["kind"] && object["metadata"]["name"] == role["name"]);
        let rules = list(&role.with_context(|| format!("{} names no role", binding["metadata"]))?["rules"]);
        for (subject, rule) in
            list(&binding["subjects"]).iter().flat_map(|s| rules.iter().map(move |rule| (s, rule)))
        {
            let user =
                format!("system:serviceaccount:{}:{}", text(&subject["namespace"]), text(&subject["name"]));
            for (group, resource) in list(&rule["apiGroups"])
                .iter()
                .flat_map(|g| list(&rule["resources"]).into_iter().map(move |r| (g, r)))
            {
                let group = if text(group).is_empty() { String::new() } else { format!(".{}", text(group)) };
                let resource = text(&resource);
                // As the audit log names it.
                let resource = match resource.split_once('/') {
                    Some((resource, part)) => format!("{resource}{group}/{part}"),
                    None => format!("{resource}{group}"),
                };
                for verb in list(&rule["verbs"]) {
                    granted.insert((user.clone(), text(&verb), resource.clone()));
                }
            }
        }
    }
    Ok(granted)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn grants_are_read_from_roles_and_their_bindings() {
        let manifests = documents(
            "kind: ClusterRole\nmetadata: {name: r}\nrules:\n\
             - {apiGroups: [\"\"], resources: [pods, secrets], verbs: [get]}\n\
             - {apiGroups: [apps], resources: [deployments], verbs: [get, list]}\n---\n\
             kind: ClusterRoleBinding\nmetadata: {name: b}\nroleRef: {kind: ClusterRole, name: r}\n\
             subjects: [{kind: ServiceAccount, namespace: n, name: a}]\n",
        );
        let granted = manifests.and_then(|manifests| granted(&manifests)).unwrap_or_default();
        let said: BTreeMap<_, Vec<_>> =
            granted.iter().fold(BTreeMap::new(), |mut all, (user, verb, resource)| {
                all.entry(user.as_str()).or_insert_with(Vec::new).push(format!("{verb} {resource}"));
                all
            });
        let expected = ["get deployments.apps", "get pods", "get secrets", "list deployments.apps"];
        assert_eq!(
            said.get("system:serviceaccount:n:a").map(Vec::as_slice),
            Some(expected.map(str::to_owned).as_slice())
        );
    }
}
