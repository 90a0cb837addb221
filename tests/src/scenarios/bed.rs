//! The bed itself, without any mesh: that its network carries traffic, and that its witness sees what is there.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;

use anyhow::{Result, bail, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::programs::{Page, curl_page, nginx};
use weft_testbed::{Dial, Moment, Server, addresses, helper, servers, sockets};

use crate::runner::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "bed_carries_plain_traffic",
        "pods reach pods over both address families, in the clear",
        plain,
    ),
    Scenario::new(
        "bed_capture_can_fail",
        "the witness calls plain traffic what it is, and SYN data too",
        witness,
    ),
];

fn plain(cluster: Builder) -> Result<()> {
    let cluster = cluster.node("east").node("west").start_plain()?;
    let web = cluster.pod("shop/web", "west")?;
    let client = cluster.pod("shop/client", "east")?;
    let neighbour = cluster.pod("shop/neighbour", "west")?;
    let legacy = cluster.outside("legacy")?;

    let page = Page::new("apples and pears", 100_000);
    let _nginx = nginx(&web, 80, &page)?;
    for place in [&*client, &*neighbour, &legacy] {
        for server in [web.at(80), web.at_v6(80)] {
            curl_page(place, server, &page)?;
        }
    }

    let greeter = Server::start(&web, 7000, servers::greet)?;
    for server in [web.at(7000), web.at_v6(7000)] {
        let mut stream = client.connect(server)?;
        let own = stream.local_addr()?;
        ensure!(
            sockets::read_line(&mut stream)? == format!("{own} {server}"),
            "the greeting names other addresses"
        );
        stream.write_all(b"ping")?;
        stream.shutdown(Shutdown::Write)?;
        let mut rest = String::new();
        stream.read_to_string(&mut rest)?;
        ensure!(rest == "ping", "half-closed, the echo said {rest:?}");
    }
    ensure!(greeter.callers().len() == 2, "two calls make two callers");
    Ok(())
}

fn witness(cluster: Builder) -> Result<()> {
    let cluster = cluster.node("east").node("west").start_plain()?;
    let web = cluster.pod("shop/web", "west")?;
    let client = cluster.pod("shop/client", "east")?;
    let enrolled = addresses(&[&web, &client]);
    let page = Page::new("a secret between pods", 2_000_000);
    let _nginx = nginx(&web, 80, &page)?;
    let _echo = Server::start(&web, 7000, servers::echo)?;

    let capture = cluster.capture()?;
    let bytes = curl_page(&client, web.at(80), &page)?;
    let label = Moment::now();
    curl_page(&client, web.at_v6(80), &page)?;
    let recording = capture.stop()?;
    let marker = page.marker.as_bytes();
    ensure!(recording.find(marker).iter().any(|seen| seen.at < label), "the payload was not seen before");
    ensure!(recording.find(marker).iter().any(|seen| seen.at > label), "the payload was not seen after");
    let Err(judgement) = recording.encrypted_since(label, &enrolled, marker, bytes) else {
        bail!("plain traffic was judged to be encrypted");
    };
    ensure!(judgement.to_string().contains("in the clear"), "judged for another reason: {judgement}");
    // Each frame once: what the server sent is not counted twice for crossing two ports.
    let carried: u64 = recording.bytes_by_port(label).get(&80).copied().unwrap_or(0);
    ensure!(carried >= bytes && carried < bytes + 2000, "{bytes} bytes were seen as {carried}");

    // Fast Open: the second connect carries its payload in the SYN, once the server's cookie is known.
    // 0x400 lets any listener take part, 2 the server, 1 the client.
    web.netns().sysctl("ipv4/tcp_fastopen", "1027")?;
    client.netns().sysctl("ipv4/tcp_fastopen", "1")?;
    let _fast = Server::start(&web, 7001, servers::echo)?;
    let start = Moment::now();
    let capture = cluster.capture()?;
    for _ in 0..3 {
        let mut stream = client.dial(&Dial::to(web.at(7001)).fast_open(b"early\n"))?;
        ensure!(sockets::read_line(&mut stream)? == "early", "the echo lost the data of the SYN");
    }
    let early = capture.stop()?.syns_with_data(start).len();
    ensure!(
        early > 0,
        "three Fast Open connects put no data into a SYN: then a scenario about it proves nothing"
    );

    // A helper without privilege reaches the server as anybody does.
    let attempt = helper::Attempt::new(helper::Privilege::None, web.at(7000), "hello").device("eth0");
    let outcome = attempt.run(&client)?;
    ensure!(outcome == helper::Outcome::Answered("hello".to_owned()), "bound to a device: {outcome:?}");
    let attempt = helper::Attempt::new(helper::Privilege::NetRaw, web.at(7000), "hello").mark(0x539);
    let outcome = attempt.run(&client)?;
    ensure!(outcome == helper::Outcome::Answered("hello".to_owned()), "with a mark: {outcome:?}");
    Ok(())
}
