//! Stories of news that is late: the stream of one agent is held by its node's name, and whatever the other one knows by
//! then, no byte of a payload crosses the wire in the clear.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::sockets::read_line;
use weft_testbed::{Moment, Server, addresses, servers};

use crate::runner::Scenario;
use crate::shop::{ECHO, Shop, marker, must_be_refused, must_be_refused_at_once, opened};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "race_client_has_not_heard",
        "of the server: held, then refused, or let through by news",
        unheard,
    ),
    Scenario::new(
        "race_client_believes_outside",
        "what has joined the mesh: refused by the server's node",
        believes,
    ),
    Scenario::new(
        "race_server_has_not_heard",
        "of the client: it comes by tunnel all the same",
        server_unheard,
    ),
    Scenario::new(
        "race_server_believes_enrolled",
        "a client that has left the mesh: its connections wait for the news",
        left,
    ),
    Scenario::new("race_new_pod_holds", "an enrolled pod that is not published yet sends nothing", new_pod),
];

const NEWS: Duration = Duration::from_secs(20);

fn unheard(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let cluster = &shop.cluster;
    shop.check_echo("the namespace is enrolled")?;
    let capture = cluster.capture()?;
    let start = Moment::now();
    let secret = marker("unheard");

    cluster.hold("east")?;
    let late = cluster.pod("shop/late", "west")?;
    let _echo = Server::start(&late, ECHO, servers::echo)?;
    until(NEWS, "the new server is enrolled on its own node", || {
        let west = shop.west()?;
        Ok(west.knows_as_enrolled(&late.uid())?
            && west.phase_of(&late.uid())?.as_deref() == Some("published"))
    })?;
    ensure!(!shop.east()?.knows_as_enrolled(&late.uid())?, "the held agent has heard the news");
    for to in [late.at(ECHO), late.at_v6(ECHO)] {
        must_be_refused(&shop.client, to, &secret, Duration::from_secs(15))
            .context("while the news is held")?;
    }

    // A pod that nobody has announced would take it: only the client's own agent stands between.
    let unknown = cluster.pod_unannounced("shop/unknown", "west", "default")?;
    let _unknown_echo = Server::start(&unknown, ECHO, servers::echo)?;
    must_be_refused(&shop.client, unknown.at(ECHO), &secret, Duration::from_secs(15))
        .context("an address in range that nobody has heard of")?;

    // One that waits when the news comes is let through, or refused where the first news it hears is that the pod is
    // there but not in the mesh yet: the server's node does not take plaintext any more.
    let mut waiting = shop.client.connect(late.at(ECHO)).context("a connection that is to be held")?;
    waiting.write_all(format!("{secret}\n").as_bytes())?;
    pause(Duration::from_millis(300));
    cluster.release("east")?;
    match read_line(&mut waiting) {
        Ok(answer) => ensure!(answer == secret, "the held connection answered {answer:?}"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => bail!("a held connection ended after the news with {error}"),
    }
    cluster.wait_enrolled(&[&late])?;
    weft_testbed::traffic::call(&shop.client, late.at_v6(ECHO), &secret)?;

    let enrolled = addresses(&[&shop.web, &shop.client, &late, &unknown]);
    let recording = capture.stop()?;
    recording.nothing_in_the_clear(start, &enrolled, secret.as_bytes())?;
    ensure!(recording.tunnel_bytes(start) > 2 * secret.len() as u64, "the last calls did not go by tunnel");
    Ok(())
}

fn believes(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let secret = marker("believes");
    cluster.label_pod(&shop.client)?;
    cluster.wait_enrolled(&[&shop.client])?;
    cluster.wait_outside(&[&shop.web])?;
    let capture = cluster.capture()?;
    shop.check_echo(&secret).context("to a server outside the mesh")?;

    cluster.hold("east")?;
    cluster.label_pod(&shop.web)?;
    until(NEWS, "the server is enrolled on its own node", || {
        let west = shop.west()?;
        Ok(west.knows_as_enrolled(&shop.web.uid())?
            && west.phase_of(&shop.web.uid())?.as_deref() == Some("published"))
    })?;
    let enrolled = Moment::now();
    ensure!(shop.east()?.knows_as_outside(&shop.web.uid())?, "the held agent has heard the news");
    for to in shop.echoes() {
        must_be_refused_at_once(&shop.client, to)
            .context("while the client's agent believes the server outside")?;
    }
    let refused = shop.west()?.metrics()?.sum("weft_kernel_refused_total", &[("reason", "plaintext")]);
    ensure!(refused >= 2.0, "the server's kernel counted {refused} refusals of plaintext");

    cluster.release("east")?;
    cluster.wait_enrolled(&[&shop.web, &shop.client])?;
    shop.check_echo(&secret).context("after the news")?;
    let verified = 2 * secret.len() as u64;
    capture.stop()?.encrypted_since(enrolled, &shop.enrolled(), secret.as_bytes(), verified)
}

fn server_unheard(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let cluster = &shop.cluster;
    let secret = marker("server-unheard");
    cluster.label_pod(&shop.web)?;
    cluster.wait_enrolled(&[&shop.web])?;
    cluster.wait_outside(&[&shop.client])?;
    let capture = cluster.capture()?;
    shop.check_echo(&secret).context("by a client outside the mesh")?;

    cluster.hold("west")?;
    cluster.label_pod(&shop.client)?;
    until(NEWS, "the client is enrolled on its own node", || {
        let east = shop.east()?;
        Ok(east.knows_as_enrolled(&shop.client.uid())?
            && east.phase_of(&shop.client.uid())?.as_deref() == Some("published"))
    })?;
    let enrolled = Moment::now();
    ensure!(shop.west()?.knows_as_outside(&shop.client.uid())?, "the held agent has heard the news");
    shop.check_echo(&secret).context("while the server's agent believes the client outside")?;
    cluster.release("west")?;
    cluster.wait_enrolled(&[&shop.web, &shop.client])?;
    shop.check_echo(&secret).context("after the news")?;
    let verified = 4 * secret.len() as u64;
    capture.stop()?.encrypted_since(enrolled, &shop.enrolled(), secret.as_bytes(), verified)
}

/// Both leave. The server's agent hears of it later, and refuses what comes in plain from a pod of the mesh until then.
fn left(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    shop.cluster.hold("west")?;
    shop.cluster.unlabel_namespace("shop")?;
    until(NEWS, "the client's agent has heard", || shop.east()?.knows_as_outside(&shop.web.uid()))?;
    std::thread::scope(|scope| {
        let released = scope.spawn(|| {
            pause(Duration::from_millis(700));
            shop.cluster.release("west")
        });
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            shop.check_echo("the server's agent has not heard")?;
        }
        released.join().map_err(|_| anyhow::anyhow!("the release panicked"))?
    })?;
    shop.cluster.wait_outside(&[&shop.web, &shop.client])
}

fn new_pod(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let cluster = &shop.cluster;
    let plain = cluster.pod("plain/server", "west")?;
    let _plain_echo = Server::start(&plain, ECHO, servers::echo)?;
    cluster.wait_outside(&[&plain])?;
    shop.check_echo("the namespace is enrolled")?;
    let secret = marker("new-pod");
    let capture = cluster.capture()?;
    let start = Moment::now();

    // Its agent hears of it and enrols it, but cannot say so: it stays unpublished.
    cluster.hold_reports("east")?;
    let fresh = cluster.pod("shop/fresh", "east")?;
    until(NEWS, "the new pod is on hold", || {
        Ok(shop.east()?.phase_of(&fresh.uid())?.as_deref() == Some("hold"))
    })?;
    let mut waiting = Vec::new();
    for to in [shop.web.at(ECHO), shop.web.at_v6(ECHO), plain.at(ECHO)] {
        let mut stream = fresh.connect(to).with_context(|| format!("{to}, which is to be held"))?;
        stream.write_all(format!("{secret}\n").as_bytes())?;
        waiting.push(stream);
    }
    pause(Duration::from_secs(1));
    for stream in &waiting {
        stream.set_nonblocking(true)?;
        match stream.peek(&mut [0]) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            other => bail!("a connection of an unpublished pod was not held: {other:?}"),
        }
        stream.set_nonblocking(false)?;
    }
    let published = Moment::now();
    cluster.release("east")?;
    for stream in &mut waiting {
        let answer = read_line(stream).context("a held connection after the pod was published")?;
        ensure!(answer == secret, "the held connection answered {answer:?}");
    }
    cluster.wait_enrolled(&[&fresh])?;
    weft_testbed::traffic::call(&fresh, shop.web.at(ECHO), &secret)?;

    let recording = capture.stop()?;
    let enrolled = addresses(&[&shop.web, &shop.client, &fresh]);
    let early = recording.find(secret.as_bytes()).into_iter().find(|seen| seen.at < published);
    ensure!(
        early.is_none(),
        "an unpublished pod's payload was on the wire: {}",
        early.map_or(String::new(), |s| s.to_string())
    );
    let plain_segments = recording.between(&enrolled).filter(|seen| {
        seen.at >= start
            && !seen.payload.is_empty()
            && !seen.segment.uses_port(weft_testbed::evidence::TUNNEL_PORT)
    });
    ensure!(plain_segments.count() == 0, "data in the clear between enrolled pods");
    // The server outside the mesh got it in the clear, as it should: so the capture would have seen a leak.
    ensure!(
        !recording.find(secret.as_bytes()).is_empty(),
        "the call to the pod outside the mesh was not seen"
    );
    ensure!(
        opened(shop.east()?, &[("security", "mutual_tls"), ("source_workload", "fresh")])? >= 3.0,
        "too few tunnels"
    );
    Ok(())
}
