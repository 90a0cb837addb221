//! Stories of a real API server: what Weft may ask of it, whom the controller believes, and what happens when the two lose
//! each other. The nodes and pods are the bed's; no kubelet runs, so that a cluster takes seconds.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use tonic::Code;
use weft_proto::type_url;
use weft_testbed::agent::tunnel_in;
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::{ApiCluster, SYSTEM, agent_pod_name, documents, running_pod};
use weft_testbed::netns::panic_text;
use weft_testbed::poll::{pause, until, until_some};
use weft_testbed::process::run_bounded;
use weft_testbed::{Metrics, Pod, Server, Traffic, servers, traffic};

use crate::apiserver_policies::policy;
use crate::caller::{Ask, Caller, Versions, code};
use crate::jwt;
use crate::runner::Scenario;
use crate::shop::{ECHO, marker};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "kubernetes_api_rbac",
        "controller, agents and plugin do their work with the shipped permissions, and can do nothing else",
        rbac,
    ),
    Scenario::new(
        "kubernetes_api_ordinary_pod",
        "what a pod's token, and one that is no good, gets from the controller: its own certificate or nothing",
        ordinary_pod,
    ),
    Scenario::new(
        "kubernetes_api_lost_delete",
        "what was deleted while the controller could not watch is gone, though no watch ever says so",
        lost_delete,
    ),
    Scenario::new(
        "kubernetes_api_replicas",
        "two controllers are one: one root, equal versions, and either can be killed",
        replicas,
    ),
    Scenario::new(
        "kubernetes_api_restart",
        "the API server is killed: agents serve on, and what changes right after its return arrives",
        restart,
    ),
];

pub const NODES: [&str; 2] = ["east", "west"];
const ENABLED: (&str, &str) = ("weft.dev/mesh", "enabled");
/// How long news may take from the API server to the agents, on a busy machine.
pub const NEWS: Duration = Duration::from_secs(15);

/// A client on `east` and an echo server on `west`, both enrolled, with everything that runs for them.
pub struct Shop {
    _echo: Server,
    pub client: Pod,
    pub web: Pod,
    pub cluster: ApiCluster,
}

impl Shop {
    pub fn start(cluster: ApiCluster) -> Result<Shop> {
        cluster.start_controllers()?;
        Self::open(cluster)
    }

    /// In a cluster whose controllers run.
    fn open(cluster: ApiCluster) -> Result<Shop> {
        cluster.start_agents()?;
        cluster.namespace("shop", &[ENABLED])?;
        let web = cluster.pod("shop/web", "west")?;
        let client = cluster.pod("shop/client", "east")?;
        let echo = Server::start(&web, ECHO, servers::echo)?;
        cluster.wait_enrolled(&[&web, &client])?;
        Ok(Shop { _echo: echo, client, web, cluster })
    }

    /// While `work` goes on, connections of the client succeed, and every agent knows both pods as enrolled.
    fn undisturbed(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let targets = [self.web.at(ECHO), self.web.at_v6(ECHO)];
        let traffic = Traffic::start(&self.client, &targets, &marker("api"), Duration::from_millis(20));
        let stop = AtomicBool::new(false);
        let (worked, watched) = std::thread::scope(|scope| {
            let watching = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::SeqCst) {
                    for (agent, pod) in
                        self.cluster.agents().flat_map(|a| [(a, &self.web), (a, &self.client)])
                    {
                        let known = tunnel_in(&agent.config_dump()?, &pod.uid());
                        let node = agent.node();
                        ensure!(
                            known.as_deref() == Some("hbone"),
                            "{node} knows {} as {known:?}",
                            pod.name()
                        );
                    }
                    pause(Duration::from_millis(20));
                }
                Ok(())
            });
            let worked = work().and_then(|()| traffic.wait_for_success(&targets, 3, NEWS));
            stop.store(true, Ordering::SeqCst);
            (worked, watching.join().map_err(|panic| anyhow!("the watching thread: {}", panic_text(&panic))))
        });
        worked?;
        watched??;
        let calls = traffic.stop();
        let failed: Vec<_> = calls.iter().filter_map(|call| call.error.as_ref()).collect();
        ensure!(failed.is_empty(), "{} of {} connections failed: {failed:?}", failed.len(), calls.len());
        Ok(())
    }

    /// The client's connections are answered now.
    fn serves(&self) -> Result<()> {
        for to in [self.web.at(ECHO), self.web.at_v6(ECHO)] {
            traffic::call(&self.client, to, "served").with_context(|| format!("calling {to}"))?;
        }
        Ok(())
    }

    /// Waits until no agent has heard of that workload.
    fn wait_gone(&self, pod: &Pod) -> Result<()> {
        until(NEWS, &format!("{} is gone everywhere", pod.name()), || {
            for agent in self.cluster.agents() {
                if tunnel_in(&agent.config_dump()?, &pod.uid()).is_some() {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }
}

fn rbac(cluster: Builder) -> Result<()> {
    let shop = Shop::start(ApiCluster::start(cluster.name(), &NODES, 1)?)?;
    let (cluster, api) = (&shop.cluster, shop.cluster.api());
    // A second pod on a node: what is written down of it is written again.
    let late = cluster.pod("shop/late", "east")?;
    cluster.wait_enrolled(&[&late])?;
    let unheeded =
        api.apply(&policy("unheeded", json!({"action": "Deny", "rules": [{"to": [{"ports": [9]}]}]})))?;
    let path = "/apis/policy.weft.dev/v1alpha1/namespaces/shop/authorizationpolicies/unheeded";
    until(NEWS, "a policy has its condition", || Ok(api.get(path)?["status"] != unheeded["status"]))?;

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

const CONTROL: &str = "weft-system/weft-control";
const AGENT: &str = "weft-system/weft-agent";
const PLUGIN: &str = "weft-system/weft-cni";
const ANYBODY: &str = "shop/default";

const PERMISSIONS: &[Permission] = &[
    // So that a "no" below means what it says.
    (CONTROL, "get", "secrets", SYSTEM, "weft-ca", true),
    (CONTROL, "watch", "pods", "", "", true),
    (CONTROL, "update", "configmaps", SYSTEM, "weft-root", true),
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

fn ordinary_pod(cluster: Builder) -> Result<()> {
    let cluster = ApiCluster::start(cluster.name(), &NODES, 1)?;
    cluster.start_controllers()?;
    let api = cluster.api();
    for (namespace, labels) in [("shop", [ENABLED].as_slice()), ("bank", &[ENABLED]), ("plain", &[])] {
        cluster.namespace(namespace, labels)?;
    }
    // Nobody connects to these pods, so their objects are enough.
    let mut host = 100;
    let mut place = |name: &str, node: &str, account: &str| -> Result<()> {
        let (namespace, _) = name.split_once('/').context("NAMESPACE/NAME")?;
        cluster.account(namespace, account)?;
        host += 1;
        let address = IpAddr::from([10, 42, if node == "east" { 1 } else { 2 }, host]);
        api.apply(&running_pod(name, node, account, &[address])).map(drop)
    };
    for (name, node, account) in [
        ("shop/web", "east", "web"),
        ("shop/doomed", "east", "web"),
        ("shop/gone", "east", "web"),
        ("shop/fake", "east", "weft-agent"),
        ("shop/other", "west", "other"),
        ("bank/web", "west", "web"),
        ("plain/stranger", "east", "stranger"),
    ] {
        place(name, node, account)?;
    }
    let pod = |name| Some(("Pod", name));
    let web = api.token("shop", "web", "weft", pod("web"))?;
    let east = cluster.agent_token("east")?;
    let (spiffe, uid) = (
        |account: &str| format!("spiffe://cluster.local/ns/{}", account.replace('/', "/sa/")),
        |pod: &str| format!("Kubernetes//Pod/{pod}"),
    );
    let (own, root) = (spiffe("shop/web"), cluster.root()?);
    let controller = &cluster.controllers()[0];
    let anybody = Caller {
        place: cluster.node("east")?,
        controller: controller.address(),
        root: &root,
        authorization: None,
    };
    until(NEWS, "the controller knows the pods", || {
        let caller = anybody.with_token(&east);
        Ok(caller.certificate(&own)?.is_ok() && caller.resources()?.is_ok_and(|r| r.len() >= 7))
    })?;

    // A pod that is deleted while its token is in use, for the end: an answer about a token is kept for a while.
    let doomed = anybody.with_token(&api.token("shop", "web", "weft", pod("doomed"))?);
    ensure!(doomed.certificate(&own)?.is_ok(), "the doomed pod gets no certificate");
    let delete = |name: &str| api.delete(&running_pod(name, "east", "web", &[]));
    delete("shop/doomed")?;
    // One whose token nobody has seen before.
    let gone = api.token("shop", "web", "weft", pod("gone"))?;
    delete("shop/gone")?;
    // An agent's pod that came back on another node, under the name that it had.
    let moved = cluster.agent_token("west")?;
    let west = agent_pod_name("west");
    api.delete(&json!({"kind": "Pod", "metadata": {"name": west, "namespace": SYSTEM}}))?;
    cluster.agent_pod(&west, "east")?;

    let claims = jwt::claims(&web)?;
    let key = std::fs::read_to_string(cluster.control_plane().pki_file("sa.key"))?;
    let other_key = rcgen::KeyPair::generate()?.serialize_pem();
    let changed = |field: &str, value: Value| {
        let mut claims = claims.clone();
        claims[field] = value;
        claims
    };
    let now = claims["iat"].as_u64().context("iat")?;
    let mut expired = changed("exp", json!(now - 60));
    for field in ["iat", "nbf"] {
        expired[field] = json!(now - 3600);
    }
    let signed = |claims: &Value| jwt::signed(&web, claims, &key);
    let of = |account: &str, audience: &str, bound| {
        let (namespace, name) = account.split_once('/').context("NAMESPACE/NAME")?;
        api.token(namespace, name, audience, bound)
    };
    let agent_pod = agent_pod_name("east");

    // Whose token proves nothing: the same whatever is asked.
    let rejected = "token_rejected";
    let worthless = [
        ("no token", None, "token_missing"),
        ("a password", Some("Basic d2VmdDp3ZWZ0".to_owned()), "token_missing"),
        ("garbage", bearer("garbage"), "token_malformed"),
        ("garbage in three parts", bearer("a.b.c"), rejected),
        ("for the API server", bearer(&of("shop/web", "", pod("web"))?), rejected),
        ("for somebody else", bearer(&of("shop/web", "vault", pod("web"))?), rejected),
        ("expired", bearer(&signed(&expired)?), rejected),
        ("not valid yet", bearer(&signed(&changed("nbf", json!(now + 3600)))?), rejected),
        (
            "of another issuer",
            bearer(&signed(&changed("iss", json!("https://elsewhere.example")))?),
            rejected,
        ),
        ("signed by another key", bearer(&jwt::signed(&web, &claims, &other_key)?), rejected),
        (
            "changed after it was signed",
            bearer(&jwt::unsigned(
                &web,
                &changed("sub", json!("system:serviceaccount:weft-system:weft-agent")),
            )?),
            rejected,
        ),
        ("of a deleted pod", bearer(&gone), rejected),
        ("of an agent's pod that moved", bearer(&moved), rejected),
        ("the agent's, for the API server", bearer(&of(AGENT, "", pod(&agent_pod))?), rejected),
        ("the agent's, of no pod", bearer(&of(AGENT, "weft", None)?), "token_without_node"),
        ("the agent's, of a node", bearer(&of(AGENT, "weft", Some(("Node", "east")))?), "token_without_node"),
    ];
    let mut rows = Vec::new();
    for (who, authorization, reason) in &worthless {
        for ask in [Ask::Stream, Ask::Report(vec![uid("shop/web")]), Ask::Certificate(own.clone())] {
            let mut counted = vec![(CALLERS, *reason)];
            counted.extend(matches!(ask, Ask::Certificate(_)).then_some((CERTIFICATES, *reason)));
            rows.push(Row {
                who,
                authorization: authorization.clone(),
                ask,
                code: Code::Unauthenticated,
                counted,
            });
        }
    }
    // Who is somebody, and no agent.
    let accounts = [
        ("a pod", of("shop/web", "weft", pod("web"))?, "shop/web"),
        ("a pod's token signed anew", signed(&claims)?, "shop/web"),
        ("an account without a pod", of("bank/web", "weft", None)?, "bank/web"),
        (
            "an account called like the agent's",
            of("shop/weft-agent", "weft", pod("fake"))?,
            "shop/weft-agent",
        ),
        ("the controller", of(CONTROL, "weft", pod("weft-control-1"))?, CONTROL),
        ("the plugin", of(PLUGIN, "weft", None)?, PLUGIN),
    ];
    for (who, token, account) in &accounts {
        let mut row = |ask: Ask, code, counted| {
            rows.push(Row { who, authorization: bearer(token), ask, code, counted });
        };
        let no_agent = || vec![(CALLERS, "not_an_agent")];
        row(Ask::Stream, Code::PermissionDenied, no_agent());
        row(Ask::Report(vec![uid("shop/web")]), Code::PermissionDenied, no_agent());
        row(Ask::Certificate(spiffe(account)), Code::Ok, vec![(ISSUED, "")]);
        for (identity, reason) in [
            (spiffe("shop/other"), "not_own"),
            (spiffe("elsewhere/web"), "not_own"),
            (spiffe("weft-system/other"), "not_own"),
            (spiffe(AGENT), "not_own"),
            (spiffe(account).replace("cluster.local", "elsewhere.example"), "trust_domain"),
        ] {
            row(Ask::Certificate(identity), Code::PermissionDenied, vec![(CERTIFICATES, reason)]);
        }
    }
    // The agent of `east`: for its own node.
    for (identity, code, counted) in [
        (own.clone(), Code::Ok, (ISSUED, "")),
        (spiffe("shop/other"), Code::PermissionDenied, (CERTIFICATES, "not_on_node")),
        (spiffe("bank/web"), Code::PermissionDenied, (CERTIFICATES, "not_on_node")),
        (spiffe("shop/nobody"), Code::PermissionDenied, (CERTIFICATES, "not_on_node")),
        (spiffe(CONTROL), Code::PermissionDenied, (CERTIFICATES, "unlabelled")),
        (spiffe(AGENT), Code::PermissionDenied, (CERTIFICATES, "unlabelled")),
        (spiffe("plain/stranger"), Code::PermissionDenied, (CERTIFICATES, "unlabelled")),
        (
            "spiffe://elsewhere.example/ns/shop/sa/web".to_owned(),
            Code::PermissionDenied,
            (CERTIFICATES, "trust_domain"),
        ),
    ] {
        let (authorization, counted) = (bearer(&east), vec![counted]);
        rows.push(Row { who: "an agent", authorization, ask: Ask::Certificate(identity), code, counted });
    }
    for row in &rows {
        let asked = format!("{}, {:?}", row.who, row.ask);
        let before = controller.metrics()?;
        let caller = Caller { authorization: row.authorization.clone(), ..anybody.clone() };
        let answer = caller.ask(&row.ask).with_context(|| asked.clone())?;
        ensure!(code(&answer) == row.code, "{asked}: {answer:?}, and not {:?}", row.code);
        let after = controller.metrics()?;
        let (counted, expected) = (rises(&before, &after), row.counted.iter().copied());
        let expected: Vec<_> = expected.map(|(name, reason)| (name, reason.to_owned(), 1.0)).collect();
        ensure!(counted == expected, "{asked}: counted {counted:?}, and not {expected:?}");
    }

    // What an agent sees and says is its node's.
    let agent = anybody.with_token(&east);
    let expected = ["plain/stranger", "shop/fake", "shop/web", "weft-system/weft-control-1"].map(uid);
    until(NEWS, "the agent of east is told of the pods there", || {
        let seen = agent.resources()?.map_err(|status| anyhow!("an agent's stream: {status}"))?;
        let local = seen.keys().filter(|(kind, _)| kind == type_url::LOCAL_WORKLOAD);
        let local: Vec<_> = local.map(|(_, name)| name).collect();
        ensure!(local.iter().copied().eq(&expected), "it is told of {local:?}");
        Ok(true)
    })?;
    for (reported, enrolled) in [("shop/other", 0.0), ("shop/web", 1.0)] {
        let answer = agent.ask(&Ask::Report(vec![uid(reported)]))?;
        ensure!(answer.is_ok(), "a report of {reported}: {answer:?}");
        let counted = controller.metrics()?.sum("weft_control_pods_enrolled", &[]);
        ensure!(counted == enrolled, "the agent of east reported {reported}: {counted} pods are enrolled");
    }

    until(Duration::from_secs(20), "the doomed pod's token is refused", || {
        let answer = doomed.certificate(&own)?;
        pause(Duration::from_millis(200));
        ensure!(
            answer.as_ref().err().is_none_or(|status| status.code() == Code::Unauthenticated),
            "{answer:?}"
        );
        Ok(answer.is_err())
    })
}

const CALLERS: &str = "weft_control_authentication_refused_total";
const CERTIFICATES: &str = "weft_control_certificates_refused_total";
const ISSUED: &str = "weft_control_certificates_issued_total";

/// One call, and what must come of it.
struct Row<'a> {
    who: &'a str,
    authorization: Option<String>,
    ask: Ask,
    code: Code,
    /// Exactly these counters, by name and reason, rise by one.
    counted: Vec<(&'static str, &'static str)>,
}

fn bearer(token: &str) -> Option<String> {
    Some(format!("Bearer {token}"))
}

/// By how much each counter of calls rose.
fn rises(before: &Metrics, after: &Metrics) -> Vec<(&'static str, String, f64)> {
    let mut rises = Vec::new();
    for name in [CALLERS, CERTIFICATES, ISSUED] {
        for (labels, value) in after.samples(name) {
            let labels: Vec<_> = labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            let rise = value - before.sum(name, &labels);
            if rise != 0.0 {
                let reason =
                    labels.iter().find(|(key, _)| *key == "reason").map_or("", |(_, reason)| *reason);
                rises.push((name, reason.to_owned(), rise));
            }
        }
    }
    rises
}

fn lost_delete(cluster: Builder) -> Result<()> {
    // Watches from etcd itself: what that has forgotten, no cache before it remembers.
    let flags = ["--watch-cache=false"];
    let shop = Shop::start(ApiCluster::start_with(cluster.name(), &NODES, 1, &flags)?)?;
    let (cluster, api) = (&shop.cluster, shop.cluster.api());
    let doomed = cluster.pod("shop/doomed", "west")?;
    let service = |name: &str| {
        let metadata = json!({"name": name, "namespace": "shop"});
        json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80}]}})
    };
    for name in ["closing", "staying"] {
        api.apply(&service(name))?;
    }
    cluster.wait_enrolled(&[&doomed])?;
    let services = || -> Result<Vec<Vec<String>>> {
        let known = |dump: Value| {
            let keys = dump["services"].as_array().cloned().unwrap_or_default();
            let names = ["closing", "staying"].map(|name| format!("shop/{name}."));
            let is_known =
                |name: &String| keys.iter().any(|s| s["key"].as_str().is_some_and(|k| k.contains(name)));
            names.into_iter().filter(is_known).collect()
        };
        cluster.agents().map(|agent| Ok(known(agent.config_dump()?))).collect()
    };
    until(NEWS, "the Services are known", || Ok(services()?.iter().all(|known| known.len() == 2)))?;

    shop.undisturbed(|| {
        let lists = || -> Result<usize> {
            let asked = api.audited()?;
            Ok(asked.iter().filter(|r| r.verb == "list" && r.resource == "pods" && r.status == 200).count())
        };
        let before = lists()?;
        let log = cluster.controllers()[0].log()?.len();
        cluster.door(0)?.refuse();
        until(NEWS, "the controller has lost its watches", || {
            let log = cluster.controllers()[0].log()?.split_off(log);
            Ok(["pods", "services"].iter().all(|kind| log.contains(&format!("cannot watch {kind}:"))))
        })?;
        cluster.delete_pod(&doomed)?;
        api.delete(&service("closing"))?;
        // The last thing that happened is not forgotten.
        cluster.namespace("later", &[])?;
        cluster.control_plane().compact_storage()?;
        for agent in cluster.agents() {
            ensure!(agent.knows_as_enrolled(&doomed.uid())?, "{} heard of it past the cut", agent.node());
        }
        shop.serves()?;
        cluster.door(0)?.release();
        shop.wait_gone(&doomed)?;
        until(NEWS, "the deleted Service is gone, and the other is not", || {
            Ok(services()?.iter().all(|known| known == &["shop/staying."]))
        })?;
        ensure!(
            lists()? > before,
            "the watch of pods was taken up again: nothing was lost, and nothing is shown"
        );
        let late = cluster.pod("shop/late", "west")?;
        cluster.wait_enrolled(&[&late])
    })
}

fn replicas(cluster: Builder) -> Result<()> {
    let cluster = ApiCluster::start(cluster.name(), &NODES, 2)?;
    // Both find no root before either can make one.
    cluster.control_plane().pause_storage()?;
    for controller in cluster.controllers() {
        controller.start_unready()?;
    }
    until(NEWS, "both controllers have asked for the root", || {
        Ok(cluster.api().received("get", "secrets")? == 2)
    })?;
    cluster.control_plane().resume_storage()?;
    cluster.wait_controllers()?;
    let asked = cluster.api().audited()?.into_iter().filter(|request| request.resource == "secrets");
    let mut made: Vec<_> = asked.filter(|request| request.verb == "create").map(|r| r.status).collect();
    made.sort();
    ensure!(made == [201, 409], "two controllers that made a root were answered {made:?}");
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let mut made = 0;
    for controller in cluster.controllers() {
        made += controller.log()?.matches("made the mesh's root of trust").count();
    }
    ensure!(made == 1, "{made} roots were made");
    equal(&shop)?;

    let refusals = [Code::PermissionDenied, Code::Unauthenticated, Code::InvalidArgument, Code::Internal];
    let (stop, root) = (AtomicBool::new(false), cluster.root()?);
    let east = cluster.agent("east")?;
    let caller = Caller {
        place: cluster.node("east")?,
        controller: east.controller_address(),
        root: &root,
        authorization: bearer(&cluster.agent_token("east")?),
    };
    let (worked, asked) = std::thread::scope(|scope| {
        // What an agent asks all day, of whoever answers.
        let asking = scope.spawn(|| -> Result<u32> {
            let mut issued = 0;
            while !stop.load(Ordering::SeqCst) {
                match caller.certificate(&shop.client.identity()) {
                    Ok(Ok(_)) => issued += 1,
                    Ok(Err(status)) => ensure!(!refusals.contains(&status.code()), "{status}"),
                    // Cut in the middle by the kill.
                    Err(_) => {}
                }
                pause(Duration::from_millis(20));
            }
            Ok(issued)
        });
        let worked = shop.undisturbed(|| {
            for (round, controller) in cluster.controllers().iter().enumerate() {
                refused_nothing(&controller.metrics()?)?;
                controller.kill()?;
                let fresh = cluster.pod(&format!("shop/fresh-{round}"), NODES[round])?;
                cluster.wait_enrolled(&[&fresh])?;
                controller.start()?;
                equal(&shop)?;
            }
            Ok(())
        });
        stop.store(true, Ordering::SeqCst);
        (worked, asking.join().map_err(|panic| anyhow!("the asking thread: {}", panic_text(&panic))))
    });
    worked?;
    let issued = asked??;
    ensure!(issued >= 10, "only {issued} certificates were asked for");
    cluster.controllers().iter().try_for_each(|controller| refused_nothing(&controller.metrics()?))
}

fn refused_nothing(metrics: &Metrics) -> Result<()> {
    for name in [CALLERS, CERTIFICATES] {
        let reasons = metrics.values_of(name, "reason");
        // A controller that has just started says so, and is asked again.
        let good = ["not_ready"];
        ensure!(reasons.iter().all(|reason| good.contains(&reason.as_str())), "{name}: {reasons:?}");
    }
    Ok(())
}

/// Waits until both controllers serve the same to every node: names and versions of resources, and the root.
fn equal(shop: &Shop) -> Result<()> {
    let (cluster, root) = (&shop.cluster, shop.cluster.root()?);
    for (node, pod) in [("east", &shop.client), ("west", &shop.web)] {
        let authorization = bearer(&cluster.agent_token(node)?);
        until(NEWS, &format!("both controllers serve the same to {node}"), || {
            let served = |number: usize| -> Result<(Versions, String)> {
                let controller = cluster.controllers()[number].address();
                let authorization = authorization.clone();
                let caller = Caller { place: cluster.node(node)?, controller, root: &root, authorization };
                let refused = |status| anyhow!("controller {number}: {status}");
                let chain = caller.certificate(&pod.identity())?.map_err(refused)?;
                let versions = caller.resources()?.map_err(refused)?;
                Ok((versions, chain.get(1).context("no root in the chain")?.clone()))
            };
            let (one, other) = (served(0)?, served(1)?);
            ensure!(one.1.as_bytes() == root && other.1.as_bytes() == root, "not the root that agents have");
            ensure!(one.0.keys().any(|(_, name)| *name == pod.uid()), "{} is not served", pod.name());
            let differing: Vec<_> =
                one.0.iter().filter(|(name, version)| other.0.get(*name) != Some(*version)).collect();
            ensure!(differing.is_empty() && one.0.len() == other.0.len(), "they differ in {differing:?}");
            Ok(true)
        })?;
    }
    Ok(())
}

fn restart(cluster: Builder) -> Result<()> {
    let shop = Shop::start(ApiCluster::start(cluster.name(), &NODES, 1)?)?;
    let cluster = &shop.cluster;
    let doomed = cluster.pod("shop/doomed", "east")?;
    cluster.wait_enrolled(&[&doomed])?;
    let root = cluster.root()?;
    let caller = Caller {
        place: cluster.node("east")?,
        controller: cluster.controllers()[0].address(),
        root: &root,
        authorization: bearer(&cluster.agent_token("east")?),
    };
    shop.undisturbed(|| {
        cluster.control_plane().kill_api()?;
        // Nobody can say now whether the token is good: that is no refusal, and is worth another try.
        let answer = caller.certificate(&shop.client.identity())?;
        ensure!(
            code(&answer) == Code::Unavailable,
            "without the API server a token is answered with {answer:?}"
        );
        let counted = cluster.controllers()[0].metrics()?.sum(CALLERS, &[("reason", "token_unchecked")]);
        ensure!(counted >= 1.0, "counted {counted} tokens that could not be checked");
        // An agent that loses its stream meanwhile goes on with what it knows.
        cluster.cut("east")?;
        shop.serves()?;
        cluster.control_plane().start_api()?;
        // At once, while the controller's watches are still broken.
        let fresh = cluster.pod("shop/fresh", "east")?;
        cluster.delete_pod(&doomed)?;
        cluster.wait_enrolled(&[&fresh])?;
        shop.wait_gone(&doomed)?;
        let answer = until_some(NEWS, "tokens are believed again", || {
            let answer = caller.certificate(&shop.client.identity())?;
            Ok(answer.ok())
        })?;
        ensure!(answer.len() == 2, "a chain of {}", answer.len());
        Ok(())
    })
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
