//! `bench`: plain TCP and Weft side by side, over the same wire, in one run. Arguments and the order of things; what is
//! measured is in `works`, `policies` and `memory`, how a tool's output is read in `tools`, the result in `report`.

mod descriptors;
mod memory;
mod policies;
mod report;
mod tools;
mod works;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};

use report::Series;

/// Measures Weft beside plain TCP over the same wire. Needs root; leaves nothing behind.
///
/// Rounds are interleaved: each work is measured in the clear and through Weft right after another, in pods of the same
/// two nodes, and the ratio is taken round by round. policies-32 compares Weft without and with policies, several times in
/// each run. Where there are several rounds the median of each column counts.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Only works whose name contains this: stream-1, stream-4, requests-1, requests-64, connections-32,
    /// policies-32-cpu, policies-32, memory.
    #[arg(default_value = "")]
    work: String,
    /// How often each work is measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// What to print on standard output.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> ExitCode {
    weft_testbed::helper::run_if_asked();
    let arguments = Arguments::parse();
    weft_testbed::isolated(|| match measure(&arguments) {
        Ok(series) => {
            match arguments.output {
                Output::Table => print!("{}", report::table(&series, arguments.runs)),
                Output::Json => println!("{:#}", report::json(&series)),
            }
            0
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            1
        }
    })
}

fn measure(arguments: &Arguments) -> Result<Vec<Series>> {
    let works: Vec<_> = works::ALL.iter().filter(|work| work.name.contains(&arguments.work)).collect();
    let with_policies = policies::NAMES.iter().any(|name| name.contains(&arguments.work));
    let with_memory = memory::NAMES.iter().any(|name| name.contains(&arguments.work));
    ensure!(
        !works.is_empty() || with_policies || with_memory,
        "no work's name contains {:?}; --help lists them",
        arguments.work
    );
    descriptors::allow_many()?;
    let mut series = Vec::new();
    if !works.is_empty() {
        series.extend(works::measure(&works, arguments.runs)?);
    }
    if with_policies {
        series.extend(policies::measure(arguments.runs)?);
    }
    if with_memory {
        series.extend(memory::measure(arguments.runs)?);
        series.retain(|series| series.name.contains(&arguments.work));
    }
    Ok(series)
}
