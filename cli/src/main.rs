//! `weft`: installs the mesh in a cluster and looks after it. Reads arguments; each command is a module.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod agents;
mod chart;
mod check;
mod cluster;
mod install;
mod output;
mod root;
mod uninstall;
mod upgrade;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "weft",
    version,
    about = "Install the Weft service mesh, and see whether it works",
    max_term_width = 110
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Install(install::Arguments),
    Check(check::Arguments),
    Root(root::Arguments),
    Upgrade(upgrade::Arguments),
    Uninstall(uninstall::Arguments),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Install(arguments) => install::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Check(arguments) => check::run(&arguments).await,
        Command::Root(arguments) => root::run(&arguments).await,
        Command::Upgrade(arguments) => upgrade::run(&arguments).await.map(|()| ExitCode::SUCCESS),
        Command::Uninstall(arguments) => uninstall::run(&arguments).await,
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("weft: {error:#}");
            ExitCode::FAILURE
        }
    }
}
