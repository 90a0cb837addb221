//! What policies cost a new connection: the same two pods, without a single policy and with ten thousand in the mesh, of
//! which a hundred are about the pod that is called. The one that admits the caller is the last.
//!
//! The cost is the CPU time that the two agents take for a connection. That hardly depends on what else the machine does,
//! which the rate beside it does.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use nix::{
    time::{clock_getcpuclockid, clock_gettime},
    unistd::Pid,
};
use weft_testbed::poll::{pause, until};
use weft_testbed::programs::{self, Page};
use weft_testbed::{Cluster, Pod};

use crate::report::{Floor, Series};
use crate::tools;

pub const NAMES: [&str; 2] = ["policies-32-cpu", "policies-32"];
const CONNECTIONS: u32 = 32;
/// Of one measurement, and how many pairs of them are one run.
const SECONDS: u32 = 3;
const ROUNDS: u32 = 8;
const PORT: u16 = 80;
const NAMESPACES: usize = 100;
const OF_EACH: usize = 100;
const NEWS: Duration = Duration::from_secs(60);
/// An agent that takes less in that time has taken in its news.
const QUIET: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// What one measurement found.
struct Found {
    /// Of both agents, in microseconds for each connection.
    cpu: f64,
    /// Connections a second.
    rate: f64,
}

pub fn measure(runs: u32) -> Result<Vec<Series>> {
    let cluster = Cluster::new("policies").node("north").node("south").start()?;
    let client = cluster.pod_as("mesh/client", "north", "client")?;
    let server = cluster.pod("mesh/server", "south")?;
    let _nginx = programs::nginx(&server, PORT, &Page::new("page", 1000))?;
    cluster.enroll("mesh", &[&client, &server])?;
    let policies = policies();
    let [cpu, rate] = NAMES;
    let mut all =
        [Series::new(cpu, "us CPU", Some(Floor::RatioAtMost(1.05))), Series::new(rate, "per second", None)];
    let wrk = |seconds| tools::wrk(&client, server.at(PORT), CONNECTIONS, true, seconds);
    let measure = || -> Result<Found> {
        let before = cpu_time(&cluster)?;
        let requests = wrk(SECONDS)?;
        let spent = cpu_time(&cluster)?.saturating_sub(before);
        let cpu = spent.as_secs_f64() * 1e6 / requests.count as f64;
        Ok(Found { cpu, rate: requests.per_second })
    };
    let change = |guarded: bool| -> Result<()> {
        set(&cluster, &policies, guarded)?;
        in_force(&cluster, &client, &server, guarded)?;
        quiet(&cluster)?;
        // What a change leaves to be done again, such as pages given back, is no cost of a connection.
        wrk(1).map(drop)
    };
    change(true)?;
    change(false)?;
    for run in 1..=runs {
        for round in 0..ROUNDS {
            // Each begins as the one before ended: without, with; with, without; without, with.
            let first = measure()?;
            let guarded = round % 2 == 0;
            change(guarded)?;
            let second = measure()?;
            let (without, with) = if guarded { (first, second) } else { (second, first) };
            all[0].add(without.cpu, with.cpu);
            all[1].add(without.rate, with.rate);
            all.iter().for_each(|series| eprintln!("{}", series.progress(run, runs)));
        }
    }
    Ok(all.into())
}

/// What both agents have taken so far, threads that have ended included.
fn cpu_time(cluster: &Cluster) -> Result<Duration> {
    cluster.agents().try_fold(Duration::ZERO, |sum, agent| {
        let clock = clock_getcpuclockid(Pid::from_raw(agent.pid()?.try_into()?))?;
        Ok(sum + Duration::from(clock_gettime(clock)?))
    })
}

/// Waits until the agents have nothing more to do.
fn quiet(cluster: &Cluster) -> Result<()> {
    let (little, time) = QUIET;
    until(NEWS, "the agents are idle", || {
        let before = cpu_time(cluster)?;
        pause(time);
        Ok(cpu_time(cluster)?.saturating_sub(before) < little)
    })
}

/// One file a namespace; that of the pods is the last, so that whoever knows it knows them all.
fn set(cluster: &Cluster, policies: &[String], guarded: bool) -> Result<()> {
    policies.iter().enumerate().rev().try_for_each(|(number, text)| {
        let text = if guarded { text.as_str() } else { "# none\n" };
        cluster.directory().write(&format!("policies-{number}.yaml"), text)
    })
}

/// Waits until calls are judged so. The policy that admits the client is named where it does.
fn in_force(cluster: &Cluster, client: &Pod, server: &Pod, guarded: bool) -> Result<()> {
    let policy = if guarded { "mesh/z-client" } else { "none" };
    let labels = [("verdict", "allowed"), ("policy", policy)];
    let judged = || {
        Ok::<_, anyhow::Error>(cluster.agent("south")?.metrics()?.sum("weft_authorization_total", &labels))
    };
    until(NEWS, "policies are as they should be", || {
        let before = judged()?;
        programs::curl(client, server.at(PORT), "/who")?;
        Ok(judged()? > before)
    })
}

/// By namespace, that of the pods first.
fn policies() -> Vec<String> {
    let of_namespace = |namespace: usize| {
        let mut text = String::new();
        let (namespace, last) = match namespace {
            0 => ("mesh".to_owned(), OF_EACH - 1),
            other => (format!("other-{other}"), OF_EACH),
        };
        for number in 0..last {
            let spec = match number % 4 {
                0 => format!("{{rules: [{{from: [{{serviceAccounts: [a{number}, b{number}]}}]}}]}}"),
                1 => format!("{{rules: [{{from: [{{namespaces: [n{number}]}}], to: [{{ports: [80]}}]}}]}}"),
                2 => format!("{{action: Deny, rules: [{{from: [{{serviceAccounts: [evil-{number}]}}]}}]}}"),
                _ => format!("{{action: Deny, rules: [{{from: [{{cidrs: [192.0.2.{number}/32]}}]}}]}}"),
            };
            write_policy(&mut text, &namespace, &format!("p{number}"), &spec);
        }
        if last < OF_EACH {
            write_policy(
                &mut text,
                &namespace,
                "z-client",
                "{rules: [{from: [{serviceAccounts: [client]}]}]}",
            );
        }
        text
    };
    (0..NAMESPACES).map(of_namespace).collect()
}

fn write_policy(text: &mut String, namespace: &str, name: &str, spec: &str) {
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "---\napiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    );
}
