//! Stories of agents and controllers that are gone: nothing leaks, and all heals by itself.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use weft_testbed::cluster::Builder;
use weft_testbed::poll::{pause, until};
use weft_testbed::{Agent, Moment, Traffic};

use crate::runner::Scenario;
use crate::shop::{Shop, marker, must_be_refused, must_be_refused_at_once, opened, still_alive};

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new(
        "agent_killed",
        "SIGKILL under traffic, either side: refused at once, nothing in the clear",
        killed,
    ),
    Scenario::new(
        "agent_not_started",
        "labelled pods whose agent does not run yet, or not any more",
        not_started,
    ),
    Scenario::new(
        "controller_stopped",
        "without the controller traffic goes on, and its return changes nothing",
        away,
    ),
    Scenario::new(
        "agent_restarted_without_controller",
        "such an agent has no certificate, so it refuses",
        restarted_without_controller,
    ),
];

fn killed(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("killed");
    let echoes = shop.echoes();
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let traffic = Traffic::start(&shop.client, &echoes, &secret, Duration::from_millis(5));
    traffic.wait_for_success(&echoes, 20, Duration::from_secs(20))?;

    // The client's agent.
    shop.east()?.kill()?;
    for to in echoes {
        must_be_refused_at_once(&shop.client, to).context("with the client's agent killed")?;
    }
    pause(Duration::from_millis(500));
    for to in echoes {
        must_be_refused_at_once(&shop.client, to)
            .context("half a second after the client's agent was killed")?;
    }
    shop.east()?.start().context("the client's agent again")?;
    traffic
        .wait_for_success(&echoes, 20, Duration::from_secs(20))
        .context("after the client's agent is back")?;
    let refused = shop.east()?.metrics()?.sum("weft_kernel_refused_total", &[("reason", "no_agent")]);
    ensure!(refused >= 4.0, "the kernel counted {refused} refusals without an agent");

    // The server's agent.
    shop.west()?.kill()?;
    for to in echoes {
        must_be_refused(&shop.client, to, &secret, Duration::from_secs(1))
            .context("with the server's agent killed")?;
    }
    shop.west()?.start().context("the server's agent again")?;
    traffic
        .wait_for_success(&echoes, 20, Duration::from_secs(20))
        .context("after the server's agent is back")?;

    // Both.
    shop.east()?.kill()?;
    shop.west()?.kill()?;
    for to in echoes {
        must_be_refused_at_once(&shop.client, to).context("with both agents killed")?;
    }
    shop.east()?.start()?;
    shop.west()?.start()?;
    traffic.wait_for_success(&echoes, 20, Duration::from_secs(20)).context("after both agents are back")?;

    let good = traffic.stop().iter().filter(|call| call.error.is_none()).count();
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;
    ensure!(good >= 120, "only {good} calls went well");
    Ok(())
}

fn not_started(cluster: Builder) -> Result<()> {
    let shop = Shop::open_without_agents(cluster)?;
    let secret = marker("not-started");
    let capture = shop.cluster.capture()?;
    // Labelled, but nobody enrols the client: it is announced as it is, and there is no outage.
    shop.cluster.label_namespace("shop")?;
    shop.west()?.start()?;
    until(Duration::from_secs(20), "the server is enrolled", || {
        shop.west()?.knows_as_enrolled(&shop.web.uid())
    })?;
    ensure!(
        !shop.west()?.knows_as_enrolled(&shop.client.uid())?,
        "the client is announced though nobody enrolled it"
    );
    shop.check_echo(&secret).context("labelled, but not enrolled")?;
    shop.east()?.start()?;
    shop.cluster.wait_enrolled(&[&shop.web, &shop.client])?;
    let enrolled = Moment::now();
    shop.check_echo(&secret).context("enrolled")?;

    // Ended in peace, the client's agent leaves its pods as closed as a killed one.
    let mut agent = shop.east()?.terminate()?;
    let status = agent.wait(Duration::from_secs(40))?;
    ensure!(status.success(), "the agent ended with {status}");
    for to in shop.echoes() {
        must_be_refused_at_once(&shop.client, to).context("with the agent stopped")?;
    }
    shop.east()?.start()?;
    shop.check_echo(&secret).context("with the agent started")?;
    let recording = capture.stop()?;
    recording.encrypted_since(enrolled, &shop.enrolled(), secret.as_bytes(), 4 * secret.len() as u64)
}

fn away(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("away");
    let echoes = shop.echoes();
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    let mut open = shop.client.connect(echoes[0])?;
    still_alive(&mut open, &secret)?;
    let traffic = Traffic::start(&shop.client, &echoes, &secret, Duration::from_millis(10));
    traffic.wait_for_success(&echoes, 5, Duration::from_secs(10))?;

    shop.cluster.controller().kill()?;
    traffic.wait_for_success(&echoes, 50, Duration::from_secs(20)).context("with the controller away")?;
    still_alive(&mut open, &secret).context("with the controller away")?;

    shop.cluster.controller().start()?;
    for agent in shop.cluster.agents() {
        connected(agent).context("after the controller is back")?;
    }
    traffic.wait_for_success(&echoes, 50, Duration::from_secs(20)).context("after the controller is back")?;
    still_alive(&mut open, &secret).context("after the controller is back")?;
    let failed: Vec<_> = traffic.stop().into_iter().filter(|call| call.error.is_some()).collect();
    ensure!(failed.is_empty(), "{} calls failed, the first: {:?}", failed.len(), failed[0]);
    for agent in shop.cluster.agents() {
        for pod in [&shop.web, &shop.client] {
            ensure!(agent.knows_as_enrolled(&pod.uid())?, "{} forgot {}", agent.node(), pod.name());
        }
    }
    // And news flow again.
    let late = shop.cluster.pod("shop/late", "east")?;
    shop.cluster.wait_enrolled(&[&late])?;
    weft_testbed::traffic::call(&late, echoes[0], &secret)?;
    let mut enrolled = shop.enrolled();
    enrolled.extend(late.addresses());
    capture.stop()?.nothing_in_the_clear(start, &enrolled, secret.as_bytes())
}

fn connected(agent: &Agent) -> Result<()> {
    until(Duration::from_secs(20), &format!("the agent of {} is connected", agent.node()), || {
        Ok(agent.metrics()?.sum("weft_xds_connected", &[]) == 1.0)
    })
}

fn restarted_without_controller(cluster: Builder) -> Result<()> {
    let shop = Shop::open_enrolled(cluster)?;
    let secret = marker("restarted");
    shop.check_echo(&secret)?;
    let capture = shop.cluster.capture()?;
    let start = Moment::now();
    shop.cluster.controller().kill()?;
    shop.east()?.kill()?;
    shop.east()?.start_unready()?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(3) {
        for to in shop.echoes() {
            must_be_refused(&shop.client, to, &secret, Duration::from_secs(8))
                .context("with an agent that has heard nothing")?;
        }
        pause(Duration::from_millis(100));
    }
    ensure!(shop.east()?.running()?, "without the controller the agent ended");

    shop.cluster.controller().start()?;
    shop.east()?.wait_ready().context("after the controller is back")?;
    shop.check_echo(&secret).context("after the controller is back")?;
    capture.stop()?.nothing_in_the_clear(start, &shop.enrolled(), secret.as_bytes())?;
    ensure!(
        opened(shop.east()?, &[("security", "mutual_tls")])? >= 2.0,
        "the last calls did not go by tunnel"
    );
    Ok(())
}
