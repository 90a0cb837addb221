//! Stories of streams as streams: ends, resets, bulk, a reader that stalls, many at once.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use socket2::SockRef;
use weft_testbed::cluster::Builder;
use weft_testbed::poll::pause;
use weft_testbed::sockets::{Checksum, ask, read_line, receive_bulk, send_bulk};
use weft_testbed::{Dial, Moment, Server, servers};

use crate::runner::Scenario;
use crate::shop::{Shop, marker, opened};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("half_close", "either end may finish first, and the other goes on", half_close),
    Scenario::new("resets", "a reset of either end arrives as a reset, not as an end", resets),
    Scenario::new("bulk_1gib", "1 GiB each way at the same time, with checksums", bulk).within(600),
    Scenario::new(
        "stalled_reader",
        "memory stays bounded and siblings are served while one reader stalls",
        stalled,
    ),
    Scenario::new("thousand_connections", "1 000 connections open at once", thousand).within(180),
];

const PORT: u16 = 7100;
const MIB: u64 = 1 << 20;

fn half_close(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let (web, client) = (&shop.web, &shop.client);

    // The client finishes first: the server answers when it has seen the end.
    let _checksum = Server::start(web, PORT, servers::checksum)?;
    for to in [web.at(PORT), web.at_v6(PORT)] {
        let mut stream = client.connect(to)?;
        let sent = send_bulk(&stream, b"upload", 3 * MIB + 17)?;
        stream.shutdown(Shutdown::Write)?;
        let answer = read_line(&mut stream).context("the answer after the client's end")?;
        ensure!(answer == format!("{sent:?}"), "the server received something else: {answer}");
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest)?;
        ensure!(rest.is_empty(), "{} bytes after the answer", rest.len());
    }

    // The server finishes first: the client sees the end, and what it sends afterwards still arrives.
    let (received, arrivals) = channel();
    let received = std::sync::Mutex::new(received);
    let _finisher = Server::start(web, PORT + 1, move |mut stream: TcpStream| {
        stream.write_all(b"that was all\n")?;
        stream.shutdown(Shutdown::Write)?;
        let sum = receive_bulk(&stream)?;
        let _ = received.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send(sum);
        Ok(())
    })?;
    for to in [web.at(PORT + 1), web.at_v6(PORT + 1)] {
        let mut stream = client.connect(to)?;
        let mut all = String::new();
        stream.read_to_string(&mut all).context("the server's end")?;
        ensure!(all == "that was all\n", "the server said {all:?}");
        let sent = send_bulk(&stream, b"late", 2 * MIB + 1)?;
        stream.shutdown(Shutdown::Write)?;
        let arrived =
            arrivals.recv_timeout(Duration::from_secs(20)).context("what was sent after the server's end")?;
        ensure!(arrived == sent, "the server received {arrived:?}, sent were {sent:?}");
    }
    Ok(())
}

fn resets(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let (web, client) = (&shop.web, &shop.client);

    // The server resets in the middle of its answer.
    let _resetter = Server::start(web, PORT, |mut stream: TcpStream| {
        stream.write_all(b"half an ans")?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))
    })?;
    let mut stream = client.connect(web.at(PORT))?;
    let mut start = [0; 11];
    stream.read_exact(&mut start)?;
    stream.write_all(b"x")?;
    match stream.read(&mut [0; 16]) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => bail!("the server's reset reached the client as {other:?}"),
    }

    // The client resets: the server must not take it for an end.
    let (ended, ends) = channel();
    let ended = std::sync::Mutex::new(ended);
    let _listener = Server::start(web, PORT + 1, move |mut stream: TcpStream| {
        let mut all = Vec::new();
        stream.write_all(b"ready\n")?;
        let end = stream.read_to_end(&mut all);
        let _ = ended.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send(end);
        Ok(())
    })?;
    let mut stream = client.connect(web.at(PORT + 1))?;
    read_line(&mut stream).context("the server's first word")?;
    stream.write_all(b"half a quest")?;
    pause(Duration::from_millis(200));
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    match ends.recv_timeout(Duration::from_secs(10)).context("the client's reset never reached the server")? {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => bail!("the client's reset reached the server as {other:?}"),
    }

    // Nobody listens: the client cannot be told by a refusal any more, so by a reset or an end at once.
    let start = Instant::now();
    match client.connect(web.at(PORT + 2)).and_then(|mut stream| stream.read(&mut [0; 16])) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => bail!("nobody listens, and the client was told by {other:?}"),
    }
    ensure!(start.elapsed() < Duration::from_secs(3), "a closed port took {:?} to tell", start.elapsed());
    Ok(())
}

fn bulk(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    const BYTES: u64 = 1024 * MIB;
    let (sums, server_sums) = channel();
    let sums = std::sync::Mutex::new(sums);
    let _server = Server::start(web, PORT, move |stream: TcpStream| {
        let both = both_ways(&stream, b"from the server", BYTES);
        let _ = sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).send(both);
        Ok(())
    })?;
    let stream = client.connect(web.at(PORT))?;
    let start = Instant::now();
    let (sent, received) = both_ways(&stream, b"from the client", BYTES).context("the client")?;
    let (server_sent, server_received) =
        server_sums.recv_timeout(Duration::from_secs(30))?.context("the server")?;
    ensure!(received == server_sent, "the client received {received:?}, the server sent {server_sent:?}");
    ensure!(server_received == sent, "the server received {server_received:?}, the client sent {sent:?}");
    ensure!(sent.bytes == BYTES && received.bytes == BYTES, "not the whole of it");
    for agent in shop.cluster.agents() {
        let resident = agent.resident_bytes()?;
        ensure!(resident < 256 * MIB, "the agent of {} holds {} MiB", agent.node(), resident / MIB);
    }
    println!("      bulk_1gib: 2 GiB in {:.1} s", start.elapsed().as_secs_f32());
    Ok(())
}

/// Sends and receives at the same time; returns the sums of both.
fn both_ways(stream: &TcpStream, marker: &[u8], bytes: u64) -> std::io::Result<(Checksum, Checksum)> {
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let sum = send_bulk(stream, marker, bytes)?;
            stream.shutdown(Shutdown::Write)?;
            Ok::<_, std::io::Error>(sum)
        });
        let received = receive_bulk(stream);
        let sent = sender.join().map_err(|_| std::io::Error::other("the sender panicked"))?;
        Ok((sent?, received?))
    })
}

fn stalled(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    // A server that never reads, and one that never stops sending.
    let _deaf = Server::start(web, PORT, |stream: TcpStream| {
        pause(Duration::from_secs(100));
        drop(stream);
        Ok(())
    })?;
    let _endless = Server::start(web, PORT + 1, servers::source(b"endless", 100 * 1024 * MIB))?;
    shop.check_echo("before")?;
    let memory =
        || -> Result<Vec<u64>> { shop.cluster.agents().map(|agent| agent.resident_bytes()).collect() };
    let before = memory()?;

    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(client.connect(web.at(PORT + 1))?);
    }
    let mut upload = client.connect(web.at(PORT))?;
    upload.set_write_timeout(Some(Duration::from_secs(3)))?;
    let block = [7u8; 64 << 10];
    let mut accepted = 0u64;
    while let Ok(length) = upload.write(&block) {
        accepted += length as u64;
        ensure!(accepted < 256 * MIB, "{} MiB were taken for a server that reads nothing", accepted / MIB);
    }

    // Meanwhile siblings, in the same tunnel, are served as ever.
    let start = Instant::now();
    for _ in 0..20 {
        shop.check_echo("a sibling")?;
    }
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(5), "40 small calls beside the stalled reader took {took:?}");
    pause(Duration::from_secs(1));
    for (agent, (before, now)) in shop.cluster.agents().zip(before.into_iter().zip(memory()?)) {
        let grown = now.saturating_sub(before);
        ensure!(
            grown < 96 * MIB,
            "the agent of {} grew by {} MiB for nine streams that nobody reads",
            agent.node(),
            grown / MIB
        );
    }

    // Who reads again gets all that was held back.
    let mut reader = unread.pop().context("a stream")?;
    let mut taken = 0u64;
    let mut buffer = vec![0u8; 64 << 10];
    while taken < 64 * MIB {
        let length = reader.read(&mut buffer).context("a stalled stream that is read again")?;
        ensure!(length > 0, "the stalled stream ended");
        taken += length as u64;
    }
    Ok(())
}

fn thousand(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    const CONNECTIONS: usize = 1000;
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let secret = marker("one-of-a-thousand");
    let targets = shop.echoes();
    let mut streams = client.netns().run(|| {
        (0..CONNECTIONS)
            .map(|number| {
                Dial::to(targets[number % 2]).connect().with_context(|| format!("connection {number}"))
            })
            .collect::<Result<Vec<_>>>()
    })??;
    // All are asked before any is heard, twice, so that all are open at the same time.
    for round in 0..2 {
        for (number, stream) in streams.iter_mut().enumerate() {
            stream.write_all(format!("{secret} {round} {number}\n").as_bytes())?;
        }
        for (number, stream) in streams.iter_mut().enumerate() {
            let answer =
                read_line(stream).with_context(|| format!("connection {number} in round {round}"))?;
            ensure!(
                answer == format!("{secret} {round} {number}"),
                "connection {number} answered {answer:?}"
            );
        }
    }
    let tunnelled = opened(shop.east()?, &[("reporter", "source"), ("security", "mutual_tls")])?;
    ensure!(tunnelled >= CONNECTIONS as f64, "only {tunnelled} connections went by tunnel");
    ensure!(ask(&mut streams[0], "the first again")? == "the first again", "the first is gone");
    drop(streams);
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;
    let _ = web;
    shop.check_echo("after the crowd")
}
