//! `cargo xtask`: one front door for building, testing, showing and measuring Weft.
//!
//! This file reads arguments and calls the command; each command is a file. Nothing of the product lives here, and
//! nothing here is needed to run it.
#![forbid(unsafe_code)]

mod build;
mod cluster;
mod ebpf;
mod elf;
mod images;
mod kubernetes;
mod oci;
mod packages;
mod run;
mod say;
mod setup;
mod test;
mod toolchain;
mod tree;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Build, test, show and measure Weft",
    max_term_width = 100
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Setup(setup::Arguments),
    BuildEbpf(ebpf::Arguments),
    Test(test::Arguments),
    Images(images::Arguments),
    Cluster(cluster::Arguments),
    Demo(build::DemoArguments),
    Bench(build::BenchArguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Err(error) = run::forward_signals() {
        say::failure(&format!("{error:#}"));
        return ExitCode::FAILURE;
    }
    let result = match arguments.command {
        Command::Setup(arguments) => setup::main(&arguments),
        Command::BuildEbpf(arguments) => ebpf::main(&arguments),
        Command::Test(arguments) => return test::main(&arguments),
        Command::Images(arguments) => images::main(&arguments),
        Command::Cluster(arguments) => cluster::main(&arguments),
        Command::Demo(arguments) => build::demo(&arguments),
        Command::Bench(arguments) => build::bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say::failure(&format!("{error:#}"));
            run::exit_code_of(&error)
        }
    }
}
