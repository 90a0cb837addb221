//! The story, step by step. Each step does something, shows what came of it, and checks it.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use weft_testbed::programs::{self, Page};
use weft_testbed::{Cluster, Moment, Pod, Process, Recording, addresses, evidence, poll};

use crate::screen::Screen;
use crate::{keep, policy, tables};

/// Name of the cluster, and so of its run directory and network namespaces.
pub const CLUSTER: &str = "demo";
const CARD: &str = "card 4111 1111 1111 1111";
const SESSION: &str = "session-of-alice-7f3a";
/// Much slower than a person would notice.
const AT_ONCE: Duration = Duration::from_millis(500);

pub struct Shop {
    pub cluster: Cluster,
    pub client: Pod,
    pub web: Pod,
    cache: Pod,
    pub page: Page,
    nginx: Process,
    redis: Process,
}

/// Tells all of it. With `keep` it ends only by a signal.
pub fn tell(screen: &Screen, keep: bool) -> Result<()> {
    let mut shop = begin(screen)?;
    in_the_clear(screen, &shop)?;
    let mut old = OldConnection::open(&shop).context("before the label")?;
    label(screen, &mut shop, &mut old)?;
    encrypted(screen, &shop)?;
    metrics(screen, &shop)?;
    policy::who_may_call(screen, &shop)?;
    agent_killed(screen, &shop)?;
    agent_back(screen, &shop)?;
    if keep {
        match keep::until_interrupted(screen, &shop.cluster, &shop.client, &shop.web)? {}
    }
    clean_up(screen, shop)
}

fn begin(screen: &Screen) -> Result<Shop> {
    screen.step("Two nodes");
    screen.say(
        "Two nodes on this machine's kernel, each a set of network namespaces, with a wire between them that we can\n\
         listen to. On the node north a client; on the node south nginx and redis, as Debian ships them.",
    );
    let begin = Instant::now();
    let cluster = Cluster::new(CLUSTER).node("north").node("south").start()?;
    let client = cluster.pod_as("shop/client", "north", "client")?;
    let web = cluster.pod_as("shop/web", "south", "web")?;
    let cache = cluster.pod_as("shop/cache", "south", "cache")?;
    let page = Page::new(CARD, 3_000_000);
    let nginx = programs::nginx(&web, 80, &page)?;
    let redis = programs::redis(&cache, 6379)?;
    cluster.wait_outside(&[&client, &web, &cache])?;
    screen.quote(
        &format!(
            "north   {} ({})\nsouth   {} ({}, nginx)   {} ({}, redis)\nand an agent on each node, and a controller that reads\n{}",
            client.name(),
            client.v4,
            web.name(),
            web.v4,
            cache.name(),
            cache.v4,
            cluster.directory().path().display()
        ),
        "",
    );
    screen.check(
        &format!("all of it runs ({:.1} s); nobody is in the mesh yet", begin.elapsed().as_secs_f32()),
        Ok(()),
    )?;
    Ok(Shop { cluster, client, web, cache, page, nginx, redis })
}

fn in_the_clear(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("Without the mesh: in the clear");
    let capture = shop.cluster.capture()?;
    shop.traffic(screen)?;
    let recording = capture.stop()?;
    screen.say("What somebody at the wire saw of it:");
    for secret in [CARD, SESSION] {
        let found = recording.find(secret.as_bytes());
        let seen = found
            .first()
            .with_context(|| format!("{secret:?} was not seen on the wire, so it proves nothing"))?;
        let start =
            seen.payload.windows(secret.len()).position(|window| window == secret.as_bytes()).unwrap_or(0);
        screen.quote(
            &format!(
                "{}:{} -> {}:{}",
                seen.segment.source,
                seen.segment.source_port,
                seen.segment.destination,
                seen.segment.destination_port
            ),
            "",
        );
        screen.quote(&tables::hexdump(&seen.payload[start / 16 * 16..], 3), "");
    }
    screen.check("anybody on the path reads the card number and the session", Ok(()))
}

fn label(screen: &Screen, shop: &mut Shop, old: &mut OldConnection) -> Result<()> {
    screen.step("One label");
    screen.command("", "kubectl label namespace shop weft.dev/mesh=enabled");
    screen.say("Here the controller reads a directory, so the label goes into namespace-shop.yaml:");
    let file = shop.cluster.directory().path().join("namespace-shop.yaml");
    let before = std::fs::read_to_string(&file)?;
    let begin = Instant::now();
    shop.cluster.label_namespace("shop")?;
    screen.diff(&before, &std::fs::read_to_string(&file)?);
    shop.cluster.wait_enrolled(&shop.pods())?;
    let took = begin.elapsed();
    screen.check(
        &format!("three running pods are in the mesh, {} ms after the label", took.as_millis()),
        Ok(()),
    )?;
    let same = shop.nginx.running()? && shop.redis.running()?;
    screen.check(
        "nothing was restarted or injected: the same nginx and redis processes",
        if same { Ok(()) } else { Err(anyhow::anyhow!("nginx or redis ended")) },
    )?;
    screen.check("a connection to redis from before the label lives on", old.ping())
}

fn encrypted(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("The same traffic, in the mesh");
    let since = Moment::now();
    let capture = shop.cluster.capture()?;
    let verified = shop.traffic(screen)?;
    let who = programs::curl(&shop.client, shop.web.at(80), "/who")?;
    let recording = capture.stop()?;
    screen.say("What somebody at the wire saw of it now: TLS 1.3 records (17 03 03) between the pods, on port 15008:");
    let record = tunnel_record(&recording).context("no TLS record was seen on the tunnel's port")?;
    screen.quote(&tables::hexdump(&record, 4), "");
    let enrolled = addresses(&[&shop.client, &shop.web, &shop.cache]);
    let hidden = [CARD, SESSION]
        .iter()
        .try_for_each(|secret| recording.nothing_in_the_clear(since, &enrolled, secret.as_bytes()));
    screen.check(
        &format!("not one of {} frames carries a byte between them in the clear", recording.len()),
        hidden,
    )?;
    let tunnelled = recording.tunnel_bytes(since);
    let enough =
        ensure_that(tunnelled >= verified, || format!("the tunnel carried {tunnelled} bytes of {verified}"));
    screen.check(&format!("curl verified {verified} bytes; {tunnelled} went through the tunnel"), enough)?;
    let who = String::from_utf8_lossy(&who).trim().to_owned();
    let address = ensure_that(who == shop.client.v4.to_string(), || format!("nginx saw {who}"));
    screen.check(&format!("nginx still sees its caller's own address, {who}"), address)?;

    screen.say("Who called is proven by certificates. The access log of south's agent:");
    let line = poll::until_some(Duration::from_secs(5), "the access log names the caller", || {
        let log = shop.cluster.agent("south")?.log()?;
        let wanted = [shop.client.identity(), shop.web.identity(), "mutual_tls".to_owned()];
        Ok(log.lines().rev().find(|line| wanted.iter().all(|word| line.contains(word))).map(str::to_owned))
    });
    let shown = line
        .as_deref()
        .unwrap_or_default()
        .replace(" dst.", "\n  dst.")
        .replace(" src.", "\n  src.")
        .replace(" security", "\n  security");
    screen.quote(&shown, &shop.client.identity());
    screen.check(
        "the caller is proven to be the service account `client`, the called to be `web`",
        line.map(drop),
    )
}

fn metrics(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("Measured, without touching the applications");
    screen.command("north", "curl -s http://127.0.0.1:15020/metrics | grep weft_tcp");
    let (client, mutual) = (shop.client.identity(), ("security", "mutual_tls"));
    let mut nodes = Vec::new();
    for node in ["north", "south"] {
        nodes.push((node, shop.cluster.agent(node)?.metrics()?));
    }
    screen.quote(&tables::connections(&nodes), "mutual_tls");
    let counted = nodes.iter().zip(["source", "destination"]).try_for_each(|((node, metrics), reporter)| {
        for pod in [&shop.web, &shop.cache] {
            let to = pod.identity();
            let labels = [
                ("reporter", reporter),
                ("source_principal", &client),
                ("destination_principal", &to),
                mutual,
            ];
            let opened = metrics.sum("weft_tcp_connections_opened_total", &labels);
            ensure!(opened >= 1.0, "the agent of {node} counted no connection from {client} to {to}");
        }
        Ok(())
    });
    screen.check("both agents count every connection, by identities and not by addresses", counted)
}

fn agent_killed(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("An agent dies");
    let since = Moment::now();
    let capture = shop.cluster.capture()?;
    // Too large for what sockets buffer: it is still on its way when the agent dies.
    std::fs::write(shop.web.dir().join("nginx/html/film"), Page::new(CARD, 64_000_000).bytes)?;
    let url = format!("http://{}/film", shop.web.at(80));
    screen.command("client", &format!("curl --limit-rate 1M -o film {url} &"));
    let part = shop.client.dir().join("download");
    let output = part.to_string_lossy().into_owned();
    let mut download = shop.client.start(
        "download",
        "curl",
        ["-sS", "--limit-rate", "1M", "--no-buffer", "-o", &output, &url],
    )?;
    poll::until(Duration::from_secs(10), "the download has begun", || {
        Ok(std::fs::metadata(&part).is_ok_and(|file| file.len() > 100_000))
    })?;
    screen.command("north", "kill -9 $(pidof weft-agent)        # in the middle of the download");
    shop.cluster.agent("north")?.kill()?;
    let status = download.wait(Duration::from_secs(30))?;
    let broke = ensure_that(!status.success(), || "the download went on".to_owned());
    screen.check("the open connection breaks, and the application is told so", broke)?;
    screen.say("The eBPF programs are pinned: they outlive the agent, and refuse what nobody can encrypt:");
    for (family, to) in [("IPv4", shop.web.at(80)), ("IPv6", shop.web.at_v6(80))] {
        let took = refused(shop, to);
        let text = match &took {
            Ok(took) => format!(
                "a new connection over {family} is refused after {:.1} ms",
                took.as_secs_f64() * 1000.0
            ),
            Err(_) => format!("a new connection over {family} is refused at once"),
        };
        screen.check(&text, took.map(drop))?;
    }
    let reply = shop.client.try_run("curl", ["--no-progress-meter", "--max-time", "5", &url])?;
    screen.command("client", &format!("curl {url}"));
    screen.quote(String::from_utf8_lossy(&reply.stderr).trim(), "");
    let recording = capture.stop()?;
    let enrolled = addresses(&[&shop.client, &shop.web, &shop.cache]);
    let hidden = recording.nothing_in_the_clear(since, &enrolled, CARD.as_bytes());
    screen.check("and all the while not a byte was on the wire in the clear", hidden)
}

fn agent_back(screen: &Screen, shop: &Shop) -> Result<()> {
    screen.step("It comes back");
    let begin = Instant::now();
    shop.cluster.agent("north")?.start_unready()?;
    let works = poll::until(Duration::from_secs(30), "the client reaches nginx again", || {
        Ok(programs::curl(&shop.client, shop.web.at(80), "/who")? == shop.client.v4.to_string().as_bytes())
    });
    let took = begin.elapsed();
    screen.check(
        &format!(
            "{} ms after its start the client's requests work again, by nobody's action",
            took.as_millis()
        ),
        works,
    )
}

fn clean_up(screen: &Screen, shop: Shop) -> Result<()> {
    screen.step("Cleaning up");
    let Shop { cluster, client, web, cache, nginx, redis, .. } = shop;
    drop((nginx, redis, cluster, client, web, cache));
    let left: Vec<String> = std::fs::read_dir("/run/netns")?
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let gone = ensure_that(left.is_empty(), || format!("these are left: {}", left.join(", ")));
    screen.check(
        "every network namespace of the demo is gone; what is pinned ends with its private mounts",
        gone,
    )
}

impl Shop {
    fn pods(&self) -> [&Pod; 3] {
        [&self.client, &self.web, &self.cache]
    }

    /// What the client does in its day. Returns how many bytes it received and verified.
    fn traffic(&self, screen: &Screen) -> Result<u64> {
        screen.command("client", &format!("curl http://{}/page | sha256sum", self.web.at(80)));
        let bytes = programs::curl_page(&self.client, self.web.at(80), &self.page)?;
        screen.command("client", &format!("redis-cli -h {} set alice {SESSION}", self.cache.v4));
        let reply = programs::redis_cli(&self.client, self.cache.at(6379), &["set", "alice", SESSION])?;
        ensure!(reply == "OK", "redis said {reply:?}");
        screen.check("nginx's page arrived, its checksum is right; redis said OK", Ok(()))?;
        Ok(bytes)
    }
}

/// A connection to redis, with a word now and then.
pub struct OldConnection(TcpStream);

impl OldConnection {
    pub fn open(shop: &Shop) -> Result<OldConnection> {
        let mut connection = OldConnection(shop.client.connect(shop.cache.at(6379))?);
        connection.ping()?;
        Ok(connection)
    }

    pub fn ping(&mut self) -> Result<()> {
        self.0.set_read_timeout(Some(Duration::from_secs(5)))?;
        self.0.write_all(b"PING\r\n")?;
        let mut reply = String::new();
        BufReader::new(&self.0).read_line(&mut reply)?;
        ensure_that(reply == "+PONG\r\n", || format!("redis said {reply:?}"))
    }
}

/// The beginning of a TLS application data record of the tunnel.
fn tunnel_record(recording: &Recording) -> Option<Vec<u8>> {
    let mut tunnel = recording.segments().filter(|seen| seen.segment.uses_port(evidence::TUNNEL_PORT));
    let record = tunnel.find(|seen| seen.payload.len() >= 64 && seen.payload.starts_with(&[0x17, 3, 3]))?;
    Some(record.payload.to_vec())
}

/// How long the refusal took.
fn refused(shop: &Shop, to: SocketAddr) -> Result<Duration> {
    let begin = Instant::now();
    let outcome = shop.client.connect(to);
    let took = begin.elapsed();
    match outcome {
        Ok(_) => bail!("a connection to {to} was accepted without an agent"),
        Err(error) if error.kind() != ErrorKind::ConnectionRefused => bail!("connecting to {to}: {error}"),
        Err(_) => ensure_that(took < AT_ONCE, || format!("the refusal took {took:?}")).map(|()| took),
    }
}

fn ensure_that(held: bool, otherwise: impl FnOnce() -> String) -> Result<()> {
    if held { Ok(()) } else { bail!(otherwise()) }
}
