//! What policies cost a new connection: the same two pods, without a single policy and with ten thousand in the mesh, of
//! which a hundred are about the pod that is called. The one that admits the caller is the last.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Result;
use weft_testbed::poll::until;
use weft_testbed::programs::{self, Page};
use weft_testbed::{Cluster, Pod};

use crate::report::{Floor, Series};
use crate::tools;

pub const NAME: &str = "policies-32";
const CONNECTIONS: u32 = 32;
const SECONDS: u32 = 4;
const PORT: u16 = 80;
const FILE: &str = "policies.yaml";
const NAMESPACES: usize = 100;
const OF_EACH: usize = 100;
const NEWS: Duration = Duration::from_secs(60);

pub fn measure(runs: u32) -> Result<Vec<Series>> {
    let cluster = Cluster::new("policies").node("north").node("south").start()?;
    let client = cluster.pod_as("mesh/client", "north", "client")?;
    let server = cluster.pod("mesh/server", "south")?;
    let _nginx = programs::nginx(&server, PORT, &Page::new("page", 1000))?;
    cluster.enroll("mesh", &[&client, &server])?;
    let policies = policies();
    let mut series = Series::new(NAME, "per second", Some(Floor::Ratio(0.95)));
    let measure = |guarded: bool, seconds| -> Result<f64> {
        set(&cluster, guarded.then_some(policies.as_str()))?;
        in_force(&cluster, &client, &server, guarded)?;
        Ok(tools::wrk(&client, server.at(PORT), CONNECTIONS, true, seconds)?.per_second)
    };
    measure(true, 1)?;
    for run in 1..=runs {
        let (without, with) = if run % 2 == 1 {
            let without = measure(false, SECONDS)?;
            (without, measure(true, SECONDS)?)
        } else {
            let with = measure(true, SECONDS)?;
            (measure(false, SECONDS)?, with)
        };
        series.add(without, with);
        eprintln!("{}", series.progress(run, runs));
    }
    Ok(vec![series])
}

fn set(cluster: &Cluster, policies: Option<&str>) -> Result<()> {
    cluster.directory().write(FILE, policies.unwrap_or("# none\n"))
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

fn policies() -> String {
    let mut text = String::new();
    for namespace in 0..NAMESPACES {
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
    }
    write_policy(&mut text, "mesh", "z-client", "{rules: [{from: [{serviceAccounts: [client]}]}]}");
    text
}

fn write_policy(text: &mut String, namespace: &str, name: &str, spec: &str) {
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "---\napiVersion: policy.weft.dev/v1alpha1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    );
}
