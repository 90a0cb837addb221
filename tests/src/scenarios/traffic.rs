//! Stories of ordinary traffic between two enrolled pods: it is encrypted, and both ends see the truth.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::until;
use weft_testbed::programs::{self, Page, curl, curl_page};
use weft_testbed::sockets::{any_like, canonical, read_line};
use weft_testbed::{Dial, Moment, Place};

use crate::runner::{Scenario, Skipped};
use crate::shop::{GREET, Shop, marker, opened, still_alive};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "encrypted_on_the_wire",
        "nginx and curl: in the clear before the label, never after",
        encrypted,
    ),
    Scenario::new(
        "addresses",
        "pod and cluster addresses, IPv4 and IPv6; the server sees the client pod",
        addresses,
    ),
    Scenario::new("jvm_v4_mapped", "a JVM dials IPv4 through IPv6 sockets", jvm),
    Scenario::new(
        "mptcp_and_prebound",
        "Multipath TCP, bound and v4-mapped sockets are captured too",
        odd_sockets,
    ),
    Scenario::new(
        "server_speaks_first",
        "redis, PostgreSQL, and a server that greets before it is asked",
        first,
    ),
    Scenario::new("same_node", "two enrolled pods on one node", same_node),
];

fn encrypted(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    let page = Page::new(&marker("page"), 2_000_000);
    let _nginx = programs::nginx(web, 80, &page)?;

    let capture = shop.cluster.capture()?;
    curl_page(client, web.at(80), &page).context("before the label")?;
    curl_page(client, web.at_v6(80), &page).context("before the label")?;

    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    let mut verified = 0;
    for server in [web.at(80), web.at_v6(80)] {
        verified += curl_page(client, server, &page).with_context(|| format!("enrolled, to {server}"))?;
    }
    capture.stop()?.encrypted_since(label, &shop.enrolled(), page.marker.as_bytes(), verified)?;

    // Both agents know who talked to whom, and say so.
    for (agent, reporter) in [(shop.east()?, "source"), (shop.west()?, "destination")] {
        let labels = [
            ("reporter", reporter),
            ("security", "mutual_tls"),
            ("source_workload", "client"),
            ("destination_workload", "web"),
        ];
        let (source, destination) = (client.identity(), web.identity());
        until(Duration::from_secs(5), &format!("the {reporter} has counted both connections"), || {
            let metrics = agent.metrics()?;
            let proven =
                [("source_principal", source.as_str()), ("destination_principal", destination.as_str())];
            let labels = [labels.as_slice(), proven.as_slice()].concat();
            let connections = metrics.sum("weft_tcp_connections_opened_total", &labels);
            let closed = metrics.sum("weft_tcp_connections_closed_total", &labels);
            let received = metrics.sum("weft_tcp_received_bytes_total", &labels);
            ensure!(
                connections == 2.0 && closed == 2.0 && received >= verified as f64,
                "{connections} opened, {closed} closed, {received} of {verified} bytes"
            );
            Ok(true)
        })?;
        let log = agent.log()?;
        ensure!(
            log.lines()
                .any(|line| line.contains("access") && line.contains(&source) && line.contains(&destination)),
            "the access log of {} does not name both identities",
            agent.node()
        );
    }
    Ok(())
}

/// What the greeting server sees of a connection: the caller and its own address.
fn greeting(place: &Place, dial: &Dial) -> Result<(SocketAddr, SocketAddr)> {
    let mut stream = place.dial(dial)?;
    let line = read_line(&mut stream)?;
    still_alive(&mut stream, "and it goes on")?;
    let (peer, local) = line.split_once(' ').with_context(|| format!("greeting {line:?}"))?;
    Ok((peer.parse()?, local.parse()?))
}

fn addresses(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    let service = shop.cluster.service("shop/web", 80, GREET, &[web])?;
    shop.enroll()?;
    let secure = [("security", "mutual_tls"), ("reporter", "source")];
    let dialled = [
        ("pod, IPv4", web.at(GREET)),
        ("pod, IPv6", web.at_v6(GREET)),
        ("service, IPv4", service.at()),
        ("service, IPv6", service.at_v6()),
    ];
    for (what, to) in dialled {
        let before = opened(shop.east()?, &secure)?;
        let mut stream = client.connect(to).with_context(|| what.to_owned())?;
        ensure!(canonical(stream.peer_addr()?) == to, "{what}: the client sees another peer than it dialled");
        let own = stream.local_addr()?.ip();
        ensure!(client.addresses().contains(&own), "{what}: the client's own address is {own}");
        let line = read_line(&mut stream).with_context(|| what.to_owned())?;
        let (peer, local) = line.split_once(' ').context("greeting")?;
        let (peer, local): (SocketAddr, SocketAddr) = (peer.parse()?, local.parse()?);
        ensure!(peer.ip() == own, "{what}: the server sees {peer}, the client is {own}");
        ensure!(
            web.addresses().contains(&local.ip()) && local.port() == GREET,
            "{what}: the server was reached at {local}"
        );
        still_alive(&mut stream, "goes on")?;
        let after = opened(shop.east()?, &secure)?;
        ensure!(after == before + 1.0, "{what}: {} connections by tunnel", after - before);
    }
    until(Duration::from_secs(5), "the service is named in the metrics", || {
        let services =
            shop.east()?.metrics()?.values_of("weft_tcp_connections_opened_total", "destination_service");
        ensure!(services.iter().any(|name| name == "web" || name.starts_with("web.")), "{services:?}");
        Ok(true)
    })
}

const FETCH: &str = r#"
import java.io.InputStream;
import java.net.Socket;
import java.net.URL;
import java.security.MessageDigest;

public class Fetch {
    public static void main(String[] arguments) throws Exception {
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        long length = 0;
        byte[] buffer = new byte[65536];
        try (InputStream in = new URL(arguments[0]).openStream()) {
            for (int read; (read = in.read(buffer)) > 0; length += read) digest.update(buffer, 0, read);
        }
        StringBuilder hex = new StringBuilder();
        for (byte b : digest.digest()) hex.append(String.format("%02x", b));
        try (Socket socket = new Socket(arguments[1], Integer.parseInt(arguments[2]))) {
            StringBuilder line = new StringBuilder();
            for (int c; (c = socket.getInputStream().read()) > 0 && c != '\n'; ) line.append((char) c);
            System.out.println(length + " " + hex + " " + socket.getInetAddress().getHostAddress() + " " + line);
        }
    }
}
"#;

fn jvm(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    let page = Page::new(&marker("jvm"), 300_000);
    let _nginx = programs::nginx(web, 80, &page)?;
    let hex: String = page.sha256.iter().map(|byte| format!("{byte:02x}")).collect();
    let url = format!("http://{}/page", web.at(80));
    let run = || -> Result<String> {
        programs::java(client, "Fetch", FETCH, &[&url, &web.v4.to_string(), &GREET.to_string()])
    };
    let check = |output: &str| -> Result<()> {
        let words: Vec<_> = output.split(' ').collect();
        ensure!(words.len() == 5, "the JVM printed {output:?}");
        ensure!(words[0] == page.bytes.len().to_string() && words[1] == hex, "the JVM received another page");
        ensure!(words[2] == web.v4.to_string(), "the JVM sees the peer {}", words[2]);
        let peer: SocketAddr = words[3].parse()?;
        ensure!(peer.ip() == IpAddr::V4(client.v4), "the server sees {peer}");
        Ok(())
    };

    let capture = shop.cluster.capture()?;
    check(&run()?).context("before the label")?;
    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    check(&run()?).context("enrolled")?;
    let verified = page.bytes.len() as u64;
    capture.stop()?.encrypted_since(label, &shop.enrolled(), page.marker.as_bytes(), verified)
}

fn odd_sockets(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    if client.netns().read_sysctl("mptcp/enabled").map(|value| value != "1").unwrap_or(true) {
        return Err(Skipped("this kernel has no Multipath TCP".to_owned()).into());
    }
    shop.enroll()?;
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let secure = [("security", "mutual_tls"), ("reporter", "source")];
    for (port, to) in [(45_678, web.at(GREET)), (45_679, web.at_v6(GREET))] {
        let own = if to.is_ipv4() { IpAddr::V4(client.v4) } else { IpAddr::V6(client.v6) };
        let dials = [
            ("MPTCP", Dial::to(to).mptcp()),
            ("bound to the pod's address", Dial::to(to).bind((own, 0).into())),
            ("bound to any address and a port", Dial::to(to).bind((any_like(to), port).into())),
            ("v4-mapped", Dial::to(to).v4_mapped()),
            ("v4-mapped MPTCP", Dial::to(to).v4_mapped().mptcp()),
        ];
        for (what, dial) in dials {
            let before = opened(shop.east()?, &secure)?;
            let (peer, _) = greeting(client, &dial).with_context(|| format!("{what} to {to}"))?;
            ensure!(peer.ip() == own, "{what} to {to}: the server sees {peer}");
            let after = opened(shop.east()?, &secure)?;
            ensure!(after == before + 1.0, "{what} to {to}: {} connections by tunnel", after - before);
        }
    }
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), b"and it goes on")
}

fn first(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    let secret = marker("row");
    let _redis = programs::redis(web, 6379)?;
    let _postgres = programs::postgres(web)?;
    let use_both = |over: &str, to: fn(&Place, u16) -> SocketAddr| -> Result<()> {
        let redis = to(web, 6379);
        ensure!(
            programs::redis_cli(client, redis, &["SET", "key", &secret])? == "OK",
            "redis SET over {over}"
        );
        ensure!(programs::redis_cli(client, redis, &["GET", "key"])? == secret, "redis GET over {over}");
        let sql = format!("select '{secret}' || count(*) from generate_series(1, 1000)");
        let answer = programs::psql(client, to(web, 5432), &sql)?;
        ensure!(answer == format!("{secret}1000"), "PostgreSQL over {over} says {answer:?}");
        Ok(())
    };

    let capture = shop.cluster.capture()?;
    use_both("plain IPv4", Place::at)?;
    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    use_both("IPv4", Place::at)?;
    use_both("IPv6", Place::at_v6)?;
    // The server's greeting arrives though the client has not said a word.
    greeting(client, &Dial::to(web.at(GREET)))?;
    let verified = 4 * secret.len() as u64;
    capture.stop()?.encrypted_since(label, &shop.enrolled(), secret.as_bytes(), verified)
}

fn same_node(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let neighbour = shop.cluster.pod("shop/neighbour", "west")?;
    let page = Page::new(&marker("neighbour"), 100_000);
    let _nginx = programs::nginx(&shop.web, 80, &page)?;
    shop.cluster.enroll("shop", &[&shop.web, &shop.client, &neighbour])?;
    for server in [shop.web.at(80), shop.web.at_v6(80)] {
        curl_page(&neighbour, server, &page)?;
    }
    let seen = curl(&neighbour, shop.web.at(80), "/who")?;
    ensure!(seen == neighbour.v4.to_string().as_bytes(), "nginx sees {:?}", String::from_utf8_lossy(&seen));
    // A pod that calls itself stays out of it.
    let before = opened(shop.west()?, &[])?;
    curl_page(&shop.web, shop.web.at(80), &page).context("a pod calls its own address")?;
    curl_page(&shop.web, "127.0.0.1:80".parse()?, &page).context("a pod calls loopback")?;
    ensure!(opened(shop.west()?, &[])? == before, "a pod's calls to itself went through the agent");
    Ok(())
}
