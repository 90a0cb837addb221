//! `scenarios`: runs the stories of this directory against the real programs, each in a cluster of its own.
#![allow(clippy::disallowed_methods, reason = "no async runtime runs on the threads of the scenarios")]

mod apiserver;
mod apiserver_policies;
mod bed;
mod caller;
mod chart;
mod check;
mod cni;
mod escape;
mod existing;
mod failure;
mod frontends;
mod identity;
mod jwt;
mod kubernetes;
mod operations;
mod outside;
mod pods;
mod policies;
mod policies_held;
mod policies_table;
mod probes;
mod races;
mod replicas;
mod rogue;
mod rotation;
mod runner;
mod services;
mod shop;
mod socket_lb;
mod streams;
mod traffic;

use std::process::ExitCode;

use clap::Parser;

use runner::{Options, Scenario};

/// Runs the scenarios whose name contains NAME, all without one. Needs root; leaves nothing behind.
#[derive(Debug, Parser)]
#[command(name = "scenarios")]
struct Arguments {
    /// Part of the name of the scenarios to run.
    #[arg(default_value = "")]
    name: String,
    /// List the scenarios and what each is about.
    #[arg(long)]
    list: bool,
    /// How many scenarios run at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Leave everything running in the end, and print how to look at it.
    #[arg(long)]
    keep: bool,
}

fn all() -> Vec<Scenario> {
    [
        bed::SCENARIOS,
        cni::SCENARIOS,
        traffic::SCENARIOS,
        services::SCENARIOS,
        streams::SCENARIOS,
        escape::SCENARIOS,
        failure::SCENARIOS,
        races::SCENARIOS,
        identity::SCENARIOS,
        rotation::SCENARIOS,
        policies::SCENARIOS,
        policies_held::SCENARIOS,
        policies_table::SCENARIOS,
        outside::SCENARIOS,
        existing::SCENARIOS,
        frontends::SCENARIOS,
        socket_lb::SCENARIOS,
        probes::SCENARIOS,
        operations::SCENARIOS,
        chart::SCENARIOS,
        apiserver::SCENARIOS,
        replicas::SCENARIOS,
        apiserver_policies::SCENARIOS,
        kubernetes::SCENARIOS,
        check::SCENARIOS,
    ]
    .concat()
}

fn main() -> ExitCode {
    weft_testbed::helper::run_if_asked();
    let arguments = Arguments::parse();
    let mut chosen = all();
    chosen.retain(|scenario| scenario.name.contains(&arguments.name));
    if arguments.name == operations::VICTIM.name {
        chosen.push(operations::VICTIM);
    }
    if arguments.list {
        for scenario in &chosen {
            println!("{:40} {}", scenario.name, scenario.story);
        }
        return ExitCode::SUCCESS;
    }
    if chosen.is_empty() {
        eprintln!("error: no scenario's name contains {:?}; --list shows them", arguments.name);
        return ExitCode::FAILURE;
    }
    let options = Options { jobs: arguments.jobs.max(1), keep: arguments.keep };
    weft_testbed::isolated(|| runner::run(&chosen, &options))
}
