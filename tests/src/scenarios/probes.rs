//! The story of a kubelet's probes: they reach the applications of pods that let nobody in, and nobody else does, be it
//! from the same node and address.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::helper::{Attempt, Outcome, Privilege};
use weft_testbed::poll::until;
use weft_testbed::programs::{Page, nginx};
use weft_testbed::sockets::any_like;
use weft_testbed::traffic::call;
use weft_testbed::{Kubelet, Place};

use crate::policies::{default_inbound, until_let_in};
use crate::runner::Scenario;
use crate::shop::{ECHO, GREET, Shop, marker};

pub const SCENARIOS: &[Scenario] = &[Scenario::new(
    "probes",
    "the kubelet's go straight to the application, whatever policy says, and nobody else's do",
    probes,
)];

const HTTP: u16 = 80;

/// Connections that any agent of the web server's node had a part in, or refused.
fn seen_by_agent(shop: &Shop) -> Result<f64> {
    let metrics = shop.west()?.metrics()?;
    let count = |name| metrics.sum(name, &[("reporter", "destination")]);
    Ok(count("weft_tcp_connections_opened_total") + count("weft_tcp_connections_failed_total"))
}

fn passed(shop: &Shop) -> Result<f64> {
    Ok(shop.west()?.metrics()?.sum("weft_kernel_probes_total", &[]))
}

/// HTTP and TCP probes (one of gRPC begins as the latter) over both address families: the application answers, sees the node's address at its other end, and
/// the agent sees nothing.
fn are_answered(shop: &Shop, kubelet: &Kubelet) -> Result<()> {
    let node: &Place = shop.cluster.node("west")?;
    for (http, tcp) in
        [(shop.web.at(HTTP), shop.web.at(GREET)), (shop.web.at_v6(HTTP), shop.web.at_v6(GREET))]
    {
        let own = node.netns().run(|| source_to(tcp))??;
        let who = kubelet.http(node, http, "/who").with_context(|| format!("HTTP to {http}"))?;
        ensure!(who == own.to_string(), "nginx sees {who} where the node is {own}");
        let line = kubelet.tcp(node, tcp).with_context(|| format!("TCP to {tcp}"))?;
        let (peer, local) = line.split_once(' ').context("greeting")?;
        let peer: SocketAddr = peer.parse()?;
        ensure!(peer.ip() == own && local == tcp.to_string(), "{line}, where the node is {own}");
    }
    Ok(())
}

/// The address that connections from here to there have.
fn source_to(there: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind((any_like(there), 0))?;
    socket.connect(there)?;
    Ok(socket.local_addr()?.ip())
}

/// As above, and the agent's own numbers say so.
fn go_straight(shop: &Shop, kubelet: &Kubelet) -> Result<()> {
    let (seen, before) = (seen_by_agent(shop)?, passed(shop)?);
    are_answered(shop, kubelet)?;
    let (now, passed) = (seen_by_agent(shop)?, passed(shop)? - before);
    ensure!(now == seen, "the agent had a part in {} of the kubelet's connections", now - seen);
    ensure!(passed == 4.0, "{passed} connections were passed instead of 4");
    Ok(())
}

fn recognised(shop: &Shop, state: &str) -> Result<()> {
    until(Duration::from_secs(5), &format!("the kubelet is {state}"), || {
        Ok(shop.west()?.config_dump()?["kubelet"]["state"] == state)
    })
}

fn probes(cluster: Builder) -> Result<()> {
    let mut kubelet = Kubelet::new(cluster.name())?;
    let flags = ["--kubelet-cgroup".to_owned(), kubelet.cgroup()?];
    let shop = Shop::open(flags.iter().fold(cluster, |cluster, flag| cluster.agent_flag(flag)))?;
    let node: &Place = shop.cluster.node("west")?;
    let page = Page::new(&marker("probes"), 1000);
    let _nginx = nginx(&shop.web, HTTP, &page)?;
    are_answered(&shop, &kubelet).context("before the label")?;
    shop.enroll()?;
    recognised(&shop, "recognised")?;
    go_straight(&shop, &kubelet).context("enrolled")?;

    // From here on nobody is let in by the agent.
    default_inbound(&shop.cluster, "deny")?;
    until_let_in(node, shop.web.at(ECHO), false)?;
    go_straight(&shop, &kubelet).context("with everybody denied")?;
    for to in shop.echoes() {
        let error = call(node, to, "root on the node").err();
        ensure!(error.is_some(), "a process of the node's root was taken for the kubelet at {to}");
        let attempt = Attempt::new(Privilege::None, to, "in its cgroup");
        let outcome = kubelet.unprivileged(node, &attempt)?;
        ensure!(
            matches!(outcome, Outcome::Refused(_)),
            "one without privilege was let in at {to}: {outcome:?}"
        );
    }
    let log = shop.west()?.log()?;
    let logged =
        |port: u16| log.lines().any(|l| l.contains("access") && l.contains(&shop.web.at(port).to_string()));
    ensure!(logged(ECHO), "the access log has nothing of those that were refused");
    ensure!(!logged(GREET) && !logged(HTTP), "the access log has the kubelet's connections");

    // Another cgroup of the same name: until the agent has seen it, its connections are anybody's.
    kubelet.restart()?;
    until(Duration::from_secs(5), "the kubelet is recognised again", || {
        kubelet.tcp(node, shop.web.at(GREET)).map(|_| true)
    })?;
    go_straight(&shop, &kubelet).context("restarted")?;

    // Probes need no agent. A kubelet that comes back meanwhile does.
    shop.west()?.kill()?;
    are_answered(&shop, &kubelet).context("without an agent")?;
    kubelet.restart()?;
    let refused = kubelet.tcp(node, shop.web.at(GREET));
    ensure!(refused.is_err(), "a cgroup that nobody was told of was taken for the kubelet's: {refused:?}");
    shop.west()?.start()?;
    shop.cluster.wait_enrolled(&[&shop.web])?;
    recognised(&shop, "recognised")?;
    go_straight(&shop, &kubelet).context("both restarted")?;

    // Without a cgroup there is no kubelet.
    drop(kubelet);
    recognised(&shop, "unrecognised")
}
