//! Stories of running the mesh: bad files, an empty directory, a drain, an upgrade, and the end of all.

use std::io::{BufRead as _, BufReader, ErrorKind};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::{Dial, Moment, Traffic};

use crate::runner::Scenario;
use crate::shop::{Shop, marker, must_be_refused_at_once, still_alive};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "malformed_manifest",
        "is reported by file and field, and its last good version holds",
        malformed,
    ),
    Scenario::new("directory_emptied", "a full directory that is suddenly empty is refused", emptied),
    Scenario::new(
        "sigterm_drains",
        "open connections end in peace, new ones are refused, a deadline holds",
        drains,
    ),
    Scenario::new(
        "agent_rollback",
        "a new agent takes over and dies: the old one ends, to be started again",
        rollback,
    ),
    Scenario::new(
        "break_glass",
        "agents are gone for good: break-glass frees their nodes' pods",
        break_glass,
    ),
    Scenario::new("agent_upgrade", "a new agent takes over: no connection refused, none cut", upgrade),
    Scenario::new(
        "leaves_nothing_behind",
        "after SIGKILL, SIGINT and SIGTERM nothing of a bed is left",
        nothing_left,
    ),
];

/// Run only by `leaves_nothing_behind`, in a bed within the bed.
pub const VICTIM: Scenario = Scenario::new("victim_of_a_signal", "waits to be killed", victim);

fn malformed(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let controller = shop.cluster.controller();
    let directory = shop.cluster.directory();
    let file = "pod-shop-web.yaml";
    let good = std::fs::read_to_string(directory.path().join(file))?;
    let broken = [
        (
            "an address that is none",
            good.replace(&format!("podIP: {}", shop.web.v4), "podIP: 10.42.2.999"),
            "podIP",
        ),
        ("a field of the wrong type", good.replace("spec:", "spec: [1]\nspek:"), "spec"),
        ("no YAML", "a: [b".to_owned(), "YAML"),
    ];
    for (number, (what, text, field)) in broken.iter().enumerate() {
        ensure!(text != &good, "{what}: the manifest was not broken");
        let said = controller.log()?.len();
        directory.write(file, text)?;
        until(Duration::from_secs(10), &format!("{what} is reported"), || {
            let log = controller.log()?;
            let news = log.get(said..).unwrap_or_default();
            Ok(news
                .lines()
                .any(|line| line.contains(file) && line.to_lowercase().contains(&field.to_lowercase())))
        })?;
        // Nothing else is disturbed, and what was good stays in force.
        shop.check_echo("the last good version").with_context(|| what.to_string())?;
        let other = shop.cluster.pod(&format!("shop/other{number}"), "west")?;
        shop.cluster.wait_enrolled(&[&shop.web, &shop.client, &other]).with_context(|| what.to_string())?;
    }
    ensure!(controller.running()?, "the controller ended");
    // Repaired, the file counts again.
    directory.write(file, &good)?;
    shop.cluster.unlabel_namespace("shop")?;
    shop.cluster.wait_outside(&[&shop.web, &shop.client])
}

fn emptied(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let directory = shop.cluster.directory();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory.path())? {
        let path = entry?.path();
        files.push((
            path.file_name().context("name")?.to_string_lossy().into_owned(),
            std::fs::read_to_string(&path)?,
        ));
    }
    let secret = marker("emptied");
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    directory.empty()?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        shop.check_echo(&secret).context("with an empty directory")?;
        pause(Duration::from_millis(100));
    }
    for agent in shop.cluster.agents() {
        ensure!(
            agent.knows_as_enrolled(&shop.web.uid())?,
            "{} was told that the mesh is empty",
            agent.node()
        );
    }
    let log = shop.cluster.controller().log()?;
    ensure!(
        log.lines().any(|line| line.contains("not obeyed")),
        "the controller does not say that it refused"
    );
    for (name, text) in files {
        directory.write(&name, &text)?;
    }
    let late = shop.cluster.pod("shop/late", "east")?;
    shop.cluster.wait_enrolled(&[&shop.web, &shop.client, &late]).context("after the files are back")?;
    shop.check_echo(&secret)?;
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())
}

fn drains(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster.agent_flag("--drain-deadline=6"))?;
    let secret = marker("drain");
    let capture = shop.cluster.capture()?;
    let start = Moment::now();

    // The client's agent drains while a connection is open.
    let mut open = shop.client.connect(shop.echoes()[0])?;
    still_alive(&mut open, &secret)?;
    let mut agent = shop.east()?.terminate()?;
    // Not asked at length: a connect that is under way in the moment in which the listener goes is answered by nobody.
    until(Duration::from_secs(3), "new connections are refused", || {
        for to in shop.echoes() {
            match shop.client.dial(&Dial::to(to).timeout(Duration::from_millis(200))) {
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                other => bail!("connecting to {to} ended with {other:?}"),
            }
        }
        Ok(true)
    })?;
    for to in shop.echoes() {
        must_be_refused_at_once(&shop.client, to)?;
    }
    still_alive(&mut open, &secret).context("while its agent drains")?;
    ensure!(agent.running()?, "the agent ended with a connection open");
    drop(open);
    let status = agent.wait(Duration::from_secs(3)).context("after the last connection ended")?;
    ensure!(status.success(), "the agent ended with {status}");

    // The server's agent drains while a connection stays open: only the deadline ends it.
    shop.east()?.start()?;
    let mut open = shop.client.connect(shop.echoes()[1])?;
    still_alive(&mut open, &secret)?;
    let mut agent = shop.west()?.terminate()?;
    pause(Duration::from_secs(2));
    still_alive(&mut open, &secret).context("while the server's agent drains")?;
    let status = agent.wait(Duration::from_secs(12)).context("past the deadline")?;
    ensure!(status.success(), "at its deadline the agent ended with {status}");
    ensure!(still_alive(&mut open, &secret).is_err(), "the connection outlived both ends of its tunnel");
    shop.west()?.start()?;
    shop.check_echo(&secret).context("with both agents back")?;
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())
}

fn upgrade(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("upgrade");
    let echoes = shop.echoes();
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let mut open = Vec::new();
    for to in echoes {
        open.push(shop.client.connect(to)?);
    }
    let traffic = Traffic::start(&shop.client, &echoes, &secret, Duration::from_millis(2));
    traffic.wait_for_success(&echoes, 20, Duration::from_secs(20))?;
    for agent in shop.cluster.agents() {
        let node = agent.node().to_owned();
        let mut old = agent.start_successor()?;
        // Asked over the admin socket, where a predecessor's answer does not count: ports are shared by both.
        shop.cluster.wait_enrolled(&[&shop.web, &shop.client])?;
        traffic
            .wait_for_success(&echoes, 20, Duration::from_secs(20))
            .with_context(|| format!("two agents on {node}"))?;
        old.signal(Signal::SIGTERM)?;
        traffic
            .wait_for_success(&echoes, 50, Duration::from_secs(20))
            .with_context(|| format!("{node} upgraded"))?;
        for stream in &mut open {
            still_alive(stream, &secret).with_context(|| format!("opened before {node} was upgraded"))?;
        }
        ensure!(old.running()?, "the old agent of {node} ended with connections open");
        // Its last connections end; those opened now belong to the successor.
        let fresh = echoes.iter().map(|to| shop.client.connect(*to)).collect::<std::io::Result<Vec<_>>>()?;
        drop(std::mem::replace(&mut open, fresh));
        let status = old.wait(Duration::from_secs(20)).with_context(|| format!("the old agent of {node}"))?;
        ensure!(status.success(), "the old agent of {node} ended with {status}");
    }
    let failed: Vec<_> = traffic.stop().into_iter().filter(|call| call.error.is_some()).collect();
    ensure!(
        failed.is_empty(),
        "{} calls failed during the upgrades, the first: {:?}",
        failed.len(),
        failed[0]
    );
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())
}

/// What a supervisor does with an agent that ends is start it again: then it takes the listeners back.
fn rollback(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("rollback");
    let agent = shop.west()?;
    let mut old = agent.start_successor()?;
    shop.cluster.wait_enrolled(&[&shop.web, &shop.client])?;
    pause(Duration::from_secs(5));
    ensure!(old.running()?, "the old agent ended although its successor works");
    shop.check_echo(&secret).context("with both agents")?;
    agent.kill()?;
    let status =
        old.wait(Duration::from_secs(15)).context("nobody takes new connections, and the old agent")?;
    ensure!(!status.success(), "it ended with {status}, with which no supervisor starts it again");
    agent.start()?;
    shop.check_echo(&secret).context("started again")
}

fn break_glass(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("glass");
    shop.check_echo(&secret).context("in the mesh")?;
    for agent in shop.cluster.agents() {
        agent.kill()?;
    }
    ensure!(shop.check_echo(&secret).is_err(), "without agents the pods still talk");
    for agent in shop.cluster.agents() {
        agent.break_glass()?;
        let names = std::fs::read_dir(agent.bpffs())?.flatten().map(|entry| entry.file_name());
        // A BPF file system has files of its own.
        let left: Vec<_> = names.filter(|name| !name.to_string_lossy().ends_with(".debug")).collect();
        ensure!(left.is_empty(), "pins of {} are left: {left:?}", agent.node());
    }
    shop.check_echo(&secret).context("freed")
}

/// A bed that works, says which kernel objects it holds, and waits.
fn victim(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    shop.check_echo("it works")?;
    let mut links = Vec::new();
    for agent in shop.cluster.agents() {
        collect_links(&agent.bpffs(), &mut links)?;
    }
    println!("links {}", links.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
    loop {
        pause(Duration::from_secs(1));
    }
}

/// Ids of the BPF links pinned below `dir`.
fn collect_links(dir: &std::path::Path, links: &mut Vec<u32>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_links(&path, links)?;
            continue;
        }
        let output = Command::new("bpftool").args(["-j", "link", "show", "pinned"]).arg(&path).output()?;
        let reply: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if let Some(id) = reply["id"].as_u64() {
            links.push(u32::try_from(id)?);
        }
    }
    Ok(())
}

fn existing_links() -> Result<Vec<u64>> {
    let output = Command::new("bpftool").args(["-j", "link", "show"]).output().context("bpftool")?;
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout).context("bpftool's reply")?;
    Ok(reply.as_array().into_iter().flatten().filter_map(|link| link["id"].as_u64()).collect())
}

fn nothing_left(_: Builder) -> Result<()> {
    for signal in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM] {
        let own = std::env::current_exe()?;
        let mut bed =
            Command::new(&own).arg(VICTIM.name).stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(bed.stdout.take().context("its output")?).lines();
        let line = lines.next().context("the inner bed ended without a word")??;
        let Some(ids) = line.strip_prefix("links ") else { bail!("the inner bed said {line:?}") };
        let ids: Vec<u64> = ids.split(',').map(str::parse).collect::<Result<_, _>>().context("link ids")?;
        // Two connect hooks for each of two agents, a lookup for each of two pods.
        ensure!(ids.len() >= 6, "the inner bed pinned only the links {ids:?}");
        let before = existing_links()?;
        ensure!(
            ids.iter().all(|id| before.contains(id)),
            "bpftool does not see the inner bed's links {ids:?}"
        );
        let pid = bed.id();
        let descendants = descendants_of(pid)?;
        ensure!(descendants.len() >= 5, "the inner bed has only the processes {descendants:?}");

        kill(Pid::from_raw(pid as i32), signal)?;
        let status = bed.wait()?;
        ensure!(!status.success(), "killed by {signal} the bed reported success");
        until(Duration::from_secs(10), &format!("nothing is left after {signal}"), || {
            let links = existing_links()?;
            let left: Vec<_> = ids.iter().filter(|id| links.contains(id)).collect();
            ensure!(left.is_empty(), "BPF links {left:?} are left");
            let alive: Vec<_> = descendants
                .iter()
                .filter(|pid| std::path::Path::new(&format!("/proc/{pid}")).exists())
                .collect();
            ensure!(alive.is_empty(), "processes {alive:?} are left");
            Ok(true)
        })?;
    }
    Ok(())
}

/// Every process below `pid`.
fn descendants_of(pid: u32) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for task in std::fs::read_dir(format!("/proc/{parent}/task"))? {
            let children = std::fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                all.push(child.parse()?);
                parents.push(child.parse()?);
            }
        }
    }
    Ok(all)
}
