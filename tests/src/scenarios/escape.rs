//! Stories of programs in an enrolled pod that try to get round capture.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::helper::{Attempt, Outcome, Privilege};
use weft_testbed::poll::until;
use weft_testbed::sockets::read_line;
use weft_testbed::{Dial, Moment, Server, servers};

use crate::runner::Scenario;
use crate::shop::{Shop, marker, opened};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "no_escape_bind_to_device",
        "without privilege: a socket bound to the pod's device",
        device,
    ),
    Scenario::new("no_escape_mark", "with CAP_NET_RAW: every mark the mesh itself uses, and others", mark),
    Scenario::new(
        "no_fast_open",
        "no payload rides in a SYN, also with a cookie from before the label",
        fast_open,
    ),
];

fn device(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let _legacy_echo = Server::start(&legacy, 7000, servers::echo)?;
    let secret = marker("device");
    // The attempt is a real one: before the label it reaches the server.
    let attempts: Vec<_> = shop
        .echoes()
        .into_iter()
        .map(|to| Attempt::new(Privilege::None, to, &secret).device("eth0"))
        .collect();
    let capture = shop.cluster.capture()?;
    for attempt in &attempts {
        ensure!(
            attempt.run(&shop.client)? == Outcome::Answered(secret.clone()),
            "it fails even before the label"
        );
    }
    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    for attempt in &attempts {
        let outcome = attempt.run(&shop.client)?;
        ensure!(matches!(outcome, Outcome::Refused(_)), "bound to eth0 it got round the mesh: {outcome:?}");
    }
    // Bound when it is already captured, it may still be carried, but its data must not leave by the device: nobody
    // would take it, but anybody on the wire could read it.
    for to in shop.echoes() {
        Attempt::new(Privilege::None, to, &secret).late_device("eth0").run(&shop.client)?;
    }
    let recording = capture.stop()?;
    ensure!(!recording.find(secret.as_bytes()).is_empty(), "the attempts before the label were not seen");
    recording.nothing_in_the_clear(label, &shop.enrolled(), secret.as_bytes())?;
    let refused = shop.east()?.metrics()?.sum("weft_kernel_refused_total", &[("reason", "bound_device")]);
    ensure!(refused >= 2.0, "the kernel counted {refused} of two refusals");
    // What lies outside the mesh is none of its business.
    let outcome = Attempt::new(Privilege::None, legacy.at(7000), "hello").device("eth0").run(&shop.client)?;
    ensure!(outcome == Outcome::Answered("hello".to_owned()), "to an address outside the mesh: {outcome:?}");
    Ok(())
}

fn mark(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let legacy = shop.cluster.outside("legacy")?;
    let _legacy_echo = Server::start(&legacy, 7000, servers::echo)?;
    shop.enroll()?;
    let secret = marker("mark");
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    for mark in [0x539, 0x111, 0x1, 0xfff, 0x1539, 0x7000_0111, 0xffff_f539] {
        for to in shop.echoes() {
            let outcome = Attempt::new(Privilege::NetRaw, to, &secret).mark(mark).run(&shop.client)?;
            ensure!(outcome == Outcome::Answered(secret.clone()), "mark {mark:#x} to {to}: {outcome:?}");
        }
        let outcome =
            Attempt::new(Privilege::NetRaw, legacy.at(7000), "hello").mark(mark).run(&shop.client)?;
        ensure!(
            outcome == Outcome::Answered("hello".to_owned()),
            "mark {mark:#x} to an address outside the mesh: {outcome:?}"
        );
    }
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;
    let tunnelled = opened(shop.east()?, &[("reporter", "source"), ("security", "mutual_tls")])?;
    ensure!(tunnelled >= 14.0, "only {tunnelled} of 14 connections went by tunnel");
    Ok(())
}

fn fast_open(cluster: Builder) -> Result<()> {
    let shop = Shop::open(cluster)?;
    let (web, client) = (&shop.web, &shop.client);
    // 0x400 lets any listener take part, 2 the server, 1 the client.
    web.netns().sysctl("ipv4/tcp_fastopen", "1027")?;
    client.netns().sysctl("ipv4/tcp_fastopen", "1027")?;
    let _echo = Server::start(web, 7200, servers::echo)?;
    let secret = marker("early");
    let line = format!("{secret}\n");
    let targets = [web.at(7200), web.at_v6(7200)];
    let attempt = |to| -> std::io::Result<()> {
        let mut stream = client.dial(&Dial::to(to).fast_open(line.as_bytes()))?;
        read_line(&mut stream).map(drop)
    };
    // Twice in the open: the first fetches the cookie, the second puts the payload into the SYN.
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    for _ in 0..2 {
        for to in targets {
            attempt(to).with_context(|| format!("Fast Open to {to} before the label"))?;
        }
    }
    let label = Moment::after_plain_traffic();
    shop.enroll()?;
    for _ in 0..3 {
        for to in targets {
            // Either the connect works without the SYN carrying anything, or the kernel says that it cannot do it, and
            // programs connect as usual then.
            if let Err(error) = attempt(to) {
                let unsupported = error.raw_os_error() == Some(libc::EOPNOTSUPP);
                ensure!(unsupported, "Fast Open to {to}, enrolled, ended with {error}");
            }
            let outcome = Attempt::new(Privilege::None, to, &secret).fast_open().run(client)?;
            ensure!(
                outcome == Outcome::Answered(secret.clone())
                    || matches!(&outcome, Outcome::Refused(why) if why.contains("os error 95")),
                "without privilege: {outcome:?}"
            );
            weft_testbed::traffic::call(client, to, &secret)
                .with_context(|| format!("an ordinary call to {to}"))?;
        }
    }
    let recording = capture.stop()?;
    let early = recording.syns_with_data(start).iter().filter(|seen| seen.at < label).count();
    ensure!(early >= 2, "{early} SYNs carried data before the label: then this proves nothing");
    recording.encrypted_since(label, &shop.enrolled(), secret.as_bytes(), 6 * secret.len() as u64)?;
    until(Duration::from_secs(1), "the client bit of tcp_fastopen is off", || {
        let value: u32 = client.netns().read_sysctl("ipv4/tcp_fastopen")?.parse()?;
        Ok(value & 1 == 0)
    })
}
