//! Stories of who may call whom: what policies say holds for the next connection and for those that are open.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::traffic::call;
use weft_testbed::{Agent, Cluster, Place, Server, servers};

use crate::runner::Scenario;
use crate::shop::{ECHO, GREET, Shop, still_alive};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "policy_flip",
        "a Deny ends what is open within a second, lets nothing new in, and touches nobody else",
        flip,
    ),
    Scenario::new("policy_audit", "lets everybody in, and tells of those it would not", audit),
    Scenario::new(
        "policy_defaults",
        "who may call where no policy speaks, and who has no identity",
        defaults,
    ),
    Scenario::new("policy_unknown", "one that cannot be understood denies, and says so", unknown),
];

/// News that come to an agent by way of a file.
const NEWS: Duration = Duration::from_secs(5);
/// What a change may take, from the file to the end of a connection.
const FLIP: Duration = Duration::from_secs(1);

/// Writes a policy of the namespace `shop`. `spec` is YAML in one line.
fn policy(cluster: &Cluster, name: &str, spec: &str) -> Result<()> {
    let head = "apiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n";
    let text = format!("{head}metadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n");
    cluster.directory().write(&policy_file(name), &text)
}

fn no_policy(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.directory().remove(&policy_file(name))
}

fn policy_file(name: &str) -> String {
    format!("policy-shop-{name}.yaml")
}

/// Says by annotation who may call the pods of `shop`, which stays in the mesh.
fn default_inbound(cluster: &Cluster, who: &str) -> Result<()> {
    let metadata = format!(
        "{{name: shop, labels: {{weft.dev/mesh: enabled}}, annotations: {{policy.weft.dev/default-inbound: {who}}}}}"
    );
    let text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {metadata}\n");
    cluster.directory().write("namespace-shop.yaml", &text)
}

/// Waits until a call from `place` succeeds, or no longer does.
fn until_let_in(place: &Place, to: SocketAddr, expected: bool) -> Result<()> {
    let what = format!("{} is {} at {to}", place.name(), if expected { "let in" } else { "refused" });
    until(NEWS, &what, || match call(place, to, "may I") {
        Ok(()) => Ok(expected),
        Err(error) if expected => Err(error.into()),
        Err(_) => Ok(true),
    })
}

/// Every one of these calls must succeed, or every one be refused.
fn all(what: &str, calls: &[(&Place, SocketAddr)], expected: bool) -> Result<()> {
    for (place, to) in calls {
        match (call(place, *to, what), expected) {
            (Err(error), true) => bail!("{what}: {} is refused at {to}: {error}", place.name()),
            (Ok(()), false) => bail!("{what}: {} is let in at {to}", place.name()),
            _ => {}
        }
    }
    Ok(())
}

/// Waits for the end of a connection that is open. Returns when it came.
fn cut(stream: &mut TcpStream, limit: Duration) -> Result<Instant> {
    stream.set_read_timeout(Some(limit))?;
    match stream.read(&mut [0; 16]) {
        Ok(0) => bail!("the connection ended as if the server had closed it"),
        Ok(_) => bail!("the server said something"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(Instant::now()),
        Err(error) => Err(error).context("an open connection that is to be denied"),
    }
}

fn judged(agent: &Agent, verdict: &str, policy: &str) -> Result<f64> {
    Ok(agent.metrics()?.sum("weft_authorization_total", &[("verdict", verdict), ("policy", policy)]))
}

fn flip(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let robot = cluster.pod_as("shop/robot", "east", "robot")?;
    let neighbour = cluster.pod_as("shop/neighbour", "west", "robot")?;
    let legacy = cluster.outside("legacy")?;
    cluster.enroll("shop", &[&shop.web, &shop.client, &robot, &neighbour])?;
    let [v4, v6] = shop.echoes();
    let mut open = Vec::new();
    for from in [&*robot, &*neighbour] {
        for to in [v4, v6] {
            open.push(from.connect(to)?);
        }
    }
    // Callers without identity cannot be told from those that are named.
    open.push(legacy.connect(v4)?);
    let mut others = [shop.client.connect(v4)?, robot.connect(shop.web.at(GREET))?];
    let greeting = weft_testbed::sockets::read_line(&mut others[1])?;
    ensure!(!greeting.is_empty(), "no greeting");
    for stream in &mut open {
        still_alive(stream, "before")?;
    }

    let start = Instant::now();
    policy(
        cluster,
        "no-robots",
        "{action: Deny, selector: {matchLabels: {app: web}}, \
         rules: [{from: [{serviceAccounts: [robot]}], to: [{ports: [7000]}]}]}",
    )?;
    for stream in &mut open {
        let took = cut(stream, NEWS)?.duration_since(start);
        ensure!(took <= FLIP, "an open connection was denied only after {took:?}");
    }
    let refused = [(&*robot, v4), (&*robot, v6), (&*neighbour, v4), (&*neighbour, v6)];
    all("denied", &refused, false)?;
    all("not denied", &[(&shop.client, v4), (&shop.client, v6)], true)?;
    for stream in &mut others {
        still_alive(stream, "the others stay")?;
    }

    until(NEWS, "both sides say why", || {
        let denied = judged(shop.west()?, "denied", "shop/no-robots")?;
        ensure!(denied == 8.0, "{denied} verdicts are counted where 4 were cut and 4 refused");
        let told = [("reporter", "source"), ("reason", "denied_by_peer")];
        let told = shop.east()?.metrics()?.sum("weft_tcp_connections_failed_total", &told);
        ensure!(told == 2.0, "the callers' agent counts {told} refusals by its peer, where it met 2");
        let log = shop.east()?.log()?;
        ensure!(log.contains("denied by policy shop/no-robots"), "the callers' agent does not say why");
        Ok(true)
    })?;

    no_policy(cluster, "no-robots")?;
    until_let_in(&robot, v4, true)?;
    all("allowed again", &refused, true)?;

    // With an Allow the rest is denied, at every port; open connections that it allows live on.
    policy(cluster, "clients", "{action: Allow, rules: [{from: [{principals: ['*/sa/default']}]}]}")?;
    until_let_in(&robot, v4, false)?;
    all("no Allow admits it", &[(&robot, v6), (&neighbour, v4), (&legacy, v4), (&legacy, v6)], false)?;
    all("an Allow admits it", &[(&shop.client, v4), (&shop.client, v6)], true)?;
    still_alive(&mut others[0], "and through an Allow")?;
    cut(&mut others[1], FLIP)?;
    Ok(())
}

fn audit(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let robot = shop.cluster.pod_as("shop/robot", "east", "robot")?;
    shop.cluster.enroll("shop", &[&shop.web, &shop.client, &robot])?;
    let to = shop.web.at(ECHO);
    policy(&shop.cluster, "trial", "{action: Audit, rules: [{from: [{serviceAccounts: [default]}]}]}")?;
    until(NEWS, "the trial begins", || {
        call(&robot, to, "let in")?;
        Ok(judged(shop.west()?, "audited", "shop/trial")? > 0.0)
    })?;
    let before = judged(shop.west()?, "audited", "shop/trial")?;
    call(&shop.client, to, "would be allowed")?;
    let mut open = robot.connect(to)?;
    still_alive(&mut open, "would be denied")?;
    until(NEWS, "the one is told of, and the other is not", || {
        let audited = judged(shop.west()?, "audited", "shop/trial")? - before;
        ensure!(audited == 1.0, "{audited} were counted");
        let log = shop.west()?.log()?;
        let line = log.lines().rev().find(|line| line.contains("connection would be denied"));
        let line = line.context("no line in the log")?;
        ensure!(line.contains("shop/trial") && line.contains("/sa/robot"), "{line}");
        Ok(true)
    })?;
    still_alive(&mut open, "it stays")
}

fn defaults(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let legacy = cluster.outside("legacy")?;
    let plain = cluster.pod("plain/east", "east")?;
    shop.enroll()?;
    cluster.wait_outside(&[&plain])?;
    let [v4, v6] = shop.echoes();
    let strangers = [(&legacy, v4), (&legacy, v6), (&*plain, v4), (&*plain, v6)];
    let members = [(&*shop.client, v4), (&*shop.client, v6)];
    all("by default", &strangers, true)?;
    all("by default", &members, true)?;
    let mut stranger = legacy.connect(v4)?;
    let mut member = shop.client.connect(v6)?;
    still_alive(&mut stranger, "in")?;

    for who in ["all-authenticated", "cluster-authenticated"] {
        default_inbound(cluster, who)?;
        until_let_in(&legacy, v4, false)?;
        all(who, &strangers, false)?;
        all(who, &members, true)?;
        // An Allow says more exactly who may, also without identity.
        let cidrs =
            format!("{{rules: [{{from: [{{cidrs: ['{}/32']}}, {{namespaces: [shop]}}]}}]}}", legacy.v4);
        policy(cluster, "legacy", &cidrs)?;
        until_let_in(&legacy, v4, true)?;
        all("an Allow of some addresses", &[(&legacy, v6), (&plain, v4)], false)?;
        all("an Allow of the namespace", &members, true)?;
        no_policy(cluster, "legacy")?;
        until_let_in(&legacy, v4, false)?;
    }
    cut(&mut stranger, FLIP)?;
    still_alive(&mut member, "members stay")?;

    default_inbound(cluster, "deny")?;
    cut(&mut member, NEWS)?;
    all("deny", &strangers, false)?;
    all("deny", &members, false)?;
    default_inbound(cluster, "no such default")?;
    pause(Duration::from_millis(300));
    all("a value that nobody knows", &members, false)?;
    default_inbound(cluster, "audit")?;
    until_let_in(&shop.client, v4, true)?;
    all("audit", &strangers, true)?;
    until(NEWS, "it is told of", || Ok(judged(shop.west()?, "audited", "policy.weft.dev/audit")? >= 5.0))
}

fn unknown(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let other = shop.cluster.pod("shop/other", "west")?;
    let _echo = Server::start(&other, ECHO, servers::echo)?;
    shop.cluster.wait_enrolled(&[&other])?;
    let to = shop.web.at(ECHO);
    shop.check_echo("before")?;
    let future = "{selector: {matchLabels: {app: web}}, rules: [{from: [{moods: [good]}]}]}";
    policy(&shop.cluster, "future", future)?;
    until_let_in(&shop.client, to, false)?;
    call(&shop.client, other.at(ECHO), "what it is not about").context("a pod that was not selected")?;
    until(NEWS, "the controller says so", || {
        let log = shop.cluster.controller().log()?;
        Ok(log.lines().any(|line| line.contains("shop/future") && line.contains("moods")))
    })?;
    no_policy(&shop.cluster, "future")?;
    until_let_in(&shop.client, to, true)?;
    // Where not even what it is about can be understood, that is all of its namespace.
    policy(&shop.cluster, "future", "{targetRefs: [{kind: Planet, name: mars}]}")?;
    until_let_in(&shop.client, to, false)?;
    until_let_in(&shop.client, other.at(ECHO), false)
}
