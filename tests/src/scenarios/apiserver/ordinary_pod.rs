//! Whom the controller believes: what a token gets from it, whoever shows it.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::{Value, json};
use tonic::Code;
use weft_proto::type_url;
use weft_testbed::Metrics;
use weft_testbed::cluster::Builder;
use weft_testbed::kubernetes::{ApiCluster, SYSTEM, agent_pod_name, running_pod};
use weft_testbed::poll::{pause, until};

use super::{AGENT, CALLERS, CERTIFICATES, CONTROL, ENABLED, NEWS, NODES, PLUGIN, bearer};
use crate::caller::{Ask, Caller, code};
use crate::jwt;

pub fn ordinary_pod(cluster: Builder) -> Result<()> {
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
