//! `--keep`: everything stays until Ctrl-C, with commands to paste into another terminal. Agents that end are started
//! again after a while, as a DaemonSet would do it.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::Result;
use weft_testbed::{Cluster, Pod, isolate, poll};

use crate::screen::Screen;

/// How long a killed agent stays away: long enough to try that connections are refused meanwhile.
const RESTART_AFTER: Duration = Duration::from_secs(15);

/// Never returns but with an error; Ctrl-C ends the process, and with it the bed.
pub fn until_interrupted(screen: &Screen, cluster: &Cluster, client: &Pod, web: &Pod) -> Result<Infallible> {
    screen.step("Yours now");
    screen.say("Everything is left running. From another terminal, as root (or after sudo):");
    let bed = format!("nsenter -t {} -m -p", isolate::host_pid());
    let within = |netns: &str| format!("{bed} nsenter --net=/run/netns/{netns}");
    let agent = cluster.agent(client.node())?;
    let node = within(cluster.node(client.node())?.netns().name());
    let namespace = cluster.directory().path().join("namespace-shop.yaml");
    let dir = cluster.bed().dir().display().to_string();
    for (about, command) in [
        ("A request", format!("{} curl -s http://{}/who", within(client.netns().name()), web.at(80))),
        ("A shell in the client's pod", format!("{} bash", within(client.netns().name()))),
        ("Who talks to whom", format!("{node} curl -s http://127.0.0.1:15020/metrics | grep weft_tcp")),
        (
            "What the agent knows",
            format!(
                "{bed} curl -s --unix-socket {dir}/{}/agent.sock http://agent/config_dump",
                client.node()
            ),
        ),
        ("Its access log", format!("{bed} sh -c 'tail -f {dir}/{}/agent-*.log'", client.node())),
        (
            "The wire (tcpdump)",
            format!("{} tcpdump -nA -i wire0 tcp", within(&cluster.bed().netns_name("wire"))),
        ),
        ("Out of the mesh", format!("{bed} sed -i s/enabled/disabled/ {}", namespace.display())),
        ("And in again", format!("{bed} sed -i s/disabled/enabled/ {}", namespace.display())),
        (
            &*format!("Kill an agent (it is back after {} s)", RESTART_AFTER.as_secs()),
            format!("{bed} pkill -9 -f 'weft-agent --node {}'", agent.node()),
        ),
    ] {
        screen.say(&format!("\n  # {about}\n  {command}"));
    }
    screen.say("\nCtrl-C here ends it and cleans up.");
    loop {
        poll::pause(Duration::from_millis(200));
        for agent in cluster.agents() {
            if !agent.running()? {
                screen.say(&format!(
                    "The agent of {} ended; it starts again in {} s.",
                    agent.node(),
                    RESTART_AFTER.as_secs()
                ));
                poll::pause(RESTART_AFTER);
                agent.start()?;
                screen.say(&format!("The agent of {} is back.", agent.node()));
            }
        }
    }
}
