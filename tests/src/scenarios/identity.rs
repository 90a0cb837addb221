//! Stories of who may tunnel to whom: certificates that are wrong in one way each, authorities that are not the pod, and
//! the agents' own ports.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use time::OffsetDateTime;
use weft_testbed::cluster::Builder;
use weft_testbed::evidence::TUNNEL_PORT;
use weft_testbed::poll::{pause, until};
use weft_testbed::{Moment, Netns, Pod, Server, servers};

use crate::rogue::{Forged, Rogue, SignedBy};
use crate::runner::Scenario;
use crate::shop::{ECHO, Shop, marker, must_be_refused, must_be_refused_at_once};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "certificates",
        "each wrong in one way: refused, counted, and logged with the reason",
        certificates,
    ),
    Scenario::new(
        "certificate_of_another_workload",
        "an address that changed hands serves nobody by mistake",
        reused,
    ),
    Scenario::new(
        "connect_authority_not_the_pod",
        "a tunnel leads to the pod it reached and nowhere else",
        authority,
    ),
    Scenario::new("own_ports_do_not_loop", "the agents' own ports lead into no circle", own_ports),
];

fn certificates(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let (tunnel, app) = (shop.web.at(TUNNEL_PORT), shop.web.at(ECHO).to_string());
    let identity = shop.client.identity();
    let connect = |rogue: &Rogue| rogue.connect(&shop.cluster, &legacy, tunnel, &app);
    // So that a refusal below means what it says: the same client with nothing wrong gets in.
    let status = connect(&Rogue::with(Forged::good(&identity))).context("a good certificate")?;
    ensure!(status == 200, "a good certificate was answered with {status}");

    let now = OffsetDateTime::now_utc();
    let hour = time::Duration::hours(1);
    let good = || Forged::good(&identity);
    let wrong: Vec<(&str, Rogue)> = vec![
        ("no certificate", Rogue { certificate: None, ..Rogue::with(good()) }),
        ("expired", Rogue::with(Forged { valid_from: now - 2 * hour, valid_until: now - hour, ..good() })),
        (
            "not yet valid",
            Rogue::with(Forged { valid_from: now + hour, valid_until: now + 2 * hour, ..good() }),
        ),
        ("another root", Rogue::with(Forged { signed_by: SignedBy::Nobody, ..good() })),
        ("another trust domain", Rogue::with(Forged::good("spiffe://elsewhere.example/ns/shop/sa/default"))),
        (
            "two identities",
            Rogue::with(Forged {
                uris: vec![identity.clone(), "spiffe://cluster.local/ns/shop/sa/admin".to_owned()],
                ..good()
            }),
        ),
        ("no identity", Rogue::with(Forged { uris: Vec::new(), ..good() })),
        ("not SPIFFE", Rogue::with(Forged::good("https://cluster.local/ns/shop/sa/default"))),
        ("TLS 1.2", Rogue { version: &rustls::version::TLS12, ..Rogue::with(good()) }),
        ("another ALPN", Rogue { alpn: Some("http/1.1"), ..Rogue::with(good()) }),
        ("no ALPN", Rogue { alpn: None, ..Rogue::with(good()) }),
    ];
    for (what, rogue) in &wrong {
        let metrics = shop.west()?.metrics()?;
        let before = metrics.sum("weft_tls_refused_total", &[]);
        let log = shop.west()?.log()?.len();
        match connect(rogue) {
            Ok(status) => bail!("{what}: the tunnel was opened and answered with {status}"),
            Err(error) => ensure!(!format!("{error:#}").contains("connecting to"), "{what}: {error:#}"),
        }
        until(Duration::from_secs(5), &format!("the refusal of {what} is counted and logged"), || {
            let metrics = shop.west()?.metrics()?;
            let after = metrics.sum("weft_tls_refused_total", &[]);
            let reasons = metrics.values_of("weft_tls_refused_total", "reason");
            ensure!(
                after == before + 1.0,
                "{before} refusals were counted before, {after} after; reasons {reasons:?}"
            );
            let text = shop.west()?.log()?;
            let news = text.get(log..).unwrap_or_default();
            // Every reason that is counted is also what the log line says.
            ensure!(
                news.lines().any(|line| reasons.iter().any(|reason| line.contains(reason.as_str()))),
                "no log line names one of {reasons:?}: {news}"
            );
            Ok(true)
        })?;
    }
    let reasons = shop.west()?.metrics()?.values_of("weft_tls_refused_total", "reason");
    ensure!(reasons.len() >= 6, "eleven ways to be wrong were given only the reasons {reasons:?}");
    shop.check_echo("and good ones are served as before")
}

fn reused(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("reused");
    shop.check_echo(&secret)?;
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let wrong_identity =
        || Ok(shop.east()?.metrics()?.sum("weft_tls_refused_total", &[("reason", "wrong_identity")]));
    let wrong_workload = || -> Result<f64> {
        let labels = [("reporter", "destination"), ("reason", "other_workload")];
        Ok(shop.west()?.metrics()?.sum("weft_tcp_connections_failed_total", &labels))
    };
    // Another account shows in the certificate; the same account in another pod only in whom the client names.
    let first = inherit(&shop, &shop.web, "shop/successor", "other", &secret, &wrong_identity)?;
    inherit(&shop, &first, "shop/heir", "other", &secret, &wrong_workload)?;
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())
}

/// The address and namespace of `pod` go to another workload, of which the client's node hears later: until then nobody
/// is served, for the reason that `refused` counts.
fn inherit(
    shop: &Shop,
    pod: &Pod,
    name: &str,
    account: &str,
    secret: &str,
    refused: &dyn Fn() -> Result<f64>,
) -> Result<Pod> {
    let cluster = &shop.cluster;
    cluster.hold("east")?;
    cluster.forget(pod)?;
    let heir = cluster.adopt(name, pod, account)?;
    until(Duration::from_secs(20), &format!("{name} is enrolled"), || {
        Ok(shop.west()?.phase_of(&heir.uid())?.as_deref() == Some("published"))
    })?;
    let before = refused()?;
    // New tunnels are needed: those to the predecessor ended with it.
    for to in shop.echoes() {
        must_be_refused(&shop.client, to, secret, Duration::from_secs(10))
            .with_context(|| format!("an address that belongs to {name} now"))?;
    }
    let counted = refused()? - before;
    ensure!(counted >= 2.0, "{counted} of two refusals were counted with their reason, for {name}");

    cluster.release("east")?;
    cluster.wait_enrolled(&[&heir])?;
    until(Duration::from_secs(10), "the client's node has forgotten the predecessor", || {
        Ok(!shop.east()?.knows_as_enrolled(&pod.uid())?)
    })?;
    shop.check_echo(secret).with_context(|| format!("{name}, once it is known"))?;
    Ok(heir)
}

fn authority(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let neighbour = shop.cluster.pod("shop/neighbour", "west")?;
    let _neighbour_echo = Server::start(&neighbour, ECHO, servers::echo)?;
    shop.cluster.enroll("shop", &[&shop.web, &shop.client, &neighbour])?;
    let legacy = shop.cluster.outside("legacy")?;
    let _legacy_echo = Server::start(&legacy, ECHO, servers::echo)?;
    let rogue = Rogue::with(Forged::good(&shop.client.identity()));
    let (tunnel, tunnel_v6) = (shop.web.at(TUNNEL_PORT), shop.web.at_v6(TUNNEL_PORT));
    let ask = |authority: &str| rogue.connect(&shop.cluster, &legacy, tunnel, authority);

    for (tunnel, own) in [(tunnel, shop.web.at(ECHO)), (tunnel_v6, shop.web.at_v6(ECHO))] {
        let status = rogue.connect(&shop.cluster, &legacy, tunnel, &own.to_string())?;
        ensure!(status == 200, "the pod's own address {own} was answered with {status}");
    }
    let before = admitted(&shop)?;
    let elsewhere = [
        neighbour.at(ECHO).to_string(),
        neighbour.at_v6(ECHO).to_string(),
        shop.client.at(ECHO).to_string(),
        legacy.at(ECHO).to_string(),
        format!("127.0.0.1:{ECHO}"),
        format!("[::1]:{ECHO}"),
        format!("0.0.0.0:{ECHO}"),
        format!("[::ffff:127.0.0.1]:{ECHO}"),
        "169.254.169.254:80".to_owned(),
    ];
    for authority in &elsewhere {
        match ask(authority) {
            Ok(status) => ensure!((400..500).contains(&status), "{authority} was answered with {status}"),
            Err(error) => bail!("{authority} ended the whole tunnel: {error:#}"),
        }
    }
    for nonsense in ["web.shop.svc.cluster.local:80", "10.42.2.10:0"] {
        let outcome = ask(nonsense);
        ensure!(!matches!(outcome, Ok(200..=299)), "{nonsense} was let in: {outcome:?}");
    }
    ensure!(admitted(&shop)? == before, "a connection was opened for a refused authority");
    Ok(())
}

/// Connections that the server's agent let into applications so far.
fn admitted(shop: &Shop) -> Result<f64> {
    crate::shop::opened(shop.west()?, &[("reporter", "destination"), ("security", "mutual_tls")])
}

fn own_ports(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let secret = marker("loop");
    shop.check_echo(&secret)?;
    let sockets_before = sockets_in(shop.web.netns())? + sockets_in(shop.client.netns())?;

    let mut ports = listening_ports(shop.web.netns())?;
    ports.retain(|port| ![ECHO, crate::shop::GREET].contains(port));
    ensure!(!ports.is_empty(), "the agent's listener is not among the pod's listening sockets");
    ports.push(TUNNEL_PORT);
    // An application cannot reach them: by the mesh, from outside it, from the pod itself.
    for port in &ports {
        for to in [shop.web.at(*port), shop.web.at_v6(*port)] {
            must_be_refused(&shop.client, to, &secret, Duration::from_secs(10))
                .with_context(|| format!("port {port} from an enrolled pod"))?;
            must_be_refused(&legacy, to, &secret, Duration::from_secs(10))
                .with_context(|| format!("port {port} from outside the mesh"))?;
            if *port != TUNNEL_PORT {
                must_be_refused_at_once(&legacy, to)
                    .with_context(|| format!("port {port}: by the kernel"))?;
            }
        }
    }
    for port in listening_ports(shop.client.netns())? {
        for to in [shop.client.at(port), shop.client.at_v6(port), ([127, 0, 0, 1], port).into()] {
            must_be_refused_at_once(&shop.client, to)
                .with_context(|| format!("port {port} of the pod itself"))?;
        }
    }
    // Nor can a peer by CONNECT.
    let rogue = Rogue::with(Forged::good(&shop.client.identity()));
    for port in &ports {
        let authority = shop.web.at(*port).to_string();
        let status = rogue.connect(&shop.cluster, &legacy, shop.web.at(TUNNEL_PORT), &authority)?;
        ensure!(status == 403, "CONNECT to {authority} was answered with {status}");
    }
    // The agents' ports on the node are ordinary ones: metrics may be read by an enrolled pod.
    let node = shop.cluster.node("west")?;
    let metrics = weft_testbed::http::get(&shop.client.connect(node.at(15020))?, "/metrics")?;
    ensure!(metrics.status == 200, "an enrolled pod reads the node's metrics: {}", metrics.status);

    pause(Duration::from_millis(500));
    let sockets = sockets_in(shop.web.netns())? + sockets_in(shop.client.netns())?;
    ensure!(
        sockets < sockets_before + 100,
        "{sockets_before} sockets before, {sockets} after: connections circle"
    );
    shop.check_echo(&secret)
}

/// Lines of the kernel's tables of TCP sockets.
fn tcp_tables(netns: &Netns) -> Result<Vec<String>> {
    netns.run(|| {
        let mut lines = Vec::new();
        for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
            lines.extend(std::fs::read_to_string(table)?.lines().skip(1).map(str::to_owned));
        }
        Ok(lines)
    })?
}

fn sockets_in(netns: &Netns) -> Result<usize> {
    Ok(tcp_tables(netns)?.len())
}

fn listening_ports(netns: &Netns) -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for line in tcp_tables(netns)? {
        let fields: Vec<_> = line.split_whitespace().collect();
        let (local, state) = (fields.get(1).context("local address")?, fields.get(3).context("state")?);
        if *state == "0A" {
            let port = local.rsplit(':').next().context("port")?;
            ports.push(u16::from_str_radix(port, 16)?);
        }
    }
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}
