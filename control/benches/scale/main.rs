//! `cargo xtask bench control`: what a cluster of a given size and restlessness costs `weft-control`. Arguments, signals
//! and output; what is measured is in `measure`.
#![allow(clippy::unwrap_used, reason = "what is shared with the tests")]

mod measure;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};

use measure::Sizes;

/// Measures weft-control beside a synthetic cluster. Needs no root; leaves nothing behind.
#[derive(Debug, Parser)]
#[command(name = "scale")]
struct Arguments {
    #[arg(long, default_value_t = 1000)]
    nodes: usize,
    #[arg(long, default_value_t = 50_000)]
    pods: usize,
    #[arg(long, default_value_t = 5000)]
    services: usize,
    /// Simulated agents, each on a node of its own.
    #[arg(long, default_value_t = 50)]
    agents: usize,
    /// Pods replaced a second.
    #[arg(long, default_value_t = 100)]
    churn: usize,
    /// How long pods are replaced.
    #[arg(long, default_value_t = 30)]
    seconds: usize,
    /// What to print on standard output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Another weft-control than the one built with this, to compare the two.
    #[arg(long, default_value = support::BINARY)]
    program: PathBuf,
    /// What cargo bench adds.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // One thread for the stand-in and all agents, so that they never take more than one core from the controller.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).unwrap();
        let mut interrupt = signal(SignalKind::interrupt()).unwrap();
        let mut hangup = signal(SignalKind::hangup()).unwrap();
        // Whatever ends it, the controller and the files end with the future.
        let signalled = tokio::select! {
            code = measure(&arguments) => return code,
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
            _ = hangup.recv() => SignalKind::hangup(),
        };
        eprintln!("stopped");
        ExitCode::from(128 + signalled.as_raw_value() as u8)
    })
}

async fn measure(arguments: &Arguments) -> ExitCode {
    let &Arguments { nodes, pods, services, agents, churn, seconds, .. } = arguments;
    let sizes = Sizes { nodes, pods, services, agents, churn, seconds };
    match measure::run(&arguments.program, sizes, true).await {
        Ok(figures) => {
            match arguments.output {
                Output::Table => print!("{}", figures.table()),
                Output::Json => println!("{:#}", figures.json()),
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
