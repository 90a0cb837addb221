//! `weft-control`: reads Kubernetes objects, translates them for agents, and issues certificates.
//!
//! A table of contents. Objects come from a [`source`], the [`controller`] keeps them in the [`store`] with who is
//! enrolled ([`enrollment`]), [`translate`] makes of them what agents are sent, [`snapshot`] encodes it, and [`grpc`]
//! serves it on one TLS port ([`tls`]) to callers that [`auth`] knows, beside the certificate authority ([`ca`]). What
//! must survive is in the [`state_dir`], or in the [`cluster`].
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod auth;
mod ca;
mod cluster;
mod config;
mod controller;
mod enrollment;
mod grpc;
mod http;
mod metrics;
mod server;
mod snapshot;
mod source;
mod state_dir;
mod store;
mod tls;
mod translate;
mod trust;

use std::{process::ExitCode, time::SystemTime};

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{
    auth::join::TokenKey,
    config::{Cli, Command, Config, RotateArgs, TokenArgs},
    server::Server,
    state_dir::StateDir,
    trust::keeper,
};

/// Gives memory back after a burst, which the C library's allocator does not: all agents ask for everything at once when
/// the controller has been away. How soon is set in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let mut cli = Cli::parse();
    let result = match cli.command.take() {
        Some(Command::Token(args)) => print_token(&args),
        Some(Command::Rotate(args)) => rotate(&args),
        None => cli.config().map_err(Into::into).and_then(serve),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weft-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_token(args: &TokenArgs) -> anyhow::Result<()> {
    let key = TokenKey::load_or_create(&StateDir::open(&args.state_dir)?)?;
    println!("{}", key.issue(&args.node, args.ttl, SystemTime::now())?);
    Ok(())
}

fn rotate(args: &RotateArgs) -> anyhow::Result<()> {
    let state = StateDir::open(&args.state_dir)?;
    let request = keeper::request(&state)?;
    if args.no_wait { Ok(()) } else { keeper::until_rotated(&state, &request) }
}

fn serve(config: Config) -> anyhow::Result<()> {
    // The client's own complaints are repeated here in our words; --log kube_client=warn brings them back.
    let filter: Targets = format!("kube_client=off,{}", config.log)
        .parse()
        .with_context(|| format!("--log {:?}", config.log))?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(lines).init();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        // Before anything takes time, so that a signal during the start is not lost.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let server = Server::start(config).await?;
        server
            .run(async move {
                tokio::select! {
                    _ = terminate.recv() => tracing::info!("SIGTERM: shutting down"),
                    _ = interrupt.recv() => tracing::info!("interrupted: shutting down"),
                }
            })
            .await
    })
}
