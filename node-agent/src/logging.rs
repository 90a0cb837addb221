//! Log output: one line an event on standard error, written by a thread of its own so that a slow reader never holds
//! up traffic (lines are dropped and counted instead); the filter can be changed while running.

use std::sync::OnceLock;

use anyhow::Context;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{Registry, filter::Targets, layer::SubscriberExt, reload, util::SubscriberInitExt};

/// Lines that wait for a slow reader; beyond that they are dropped. The queue's memory is taken at the start.
const QUEUED_LINES: usize = 8192;

static FILTER: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Starts logging. Lines still queued are written when the guard is dropped.
pub fn start(filter: &str, json: bool) -> anyhow::Result<WorkerGuard> {
    let (writer, guard): (NonBlocking, _) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(QUEUED_LINES)
        .finish(std::io::stderr());
    let _ = DROPPED.set(writer.error_counter());
    let parsed = parse(filter)?;
    let (layer, handle) = reload::Layer::new(parsed);
    let registry = tracing_subscriber::registry().with(layer);
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    if json {
        registry.with(tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(writer)).init();
    } else {
        registry.with(tracing_subscriber::fmt::layer().with_ansi(ansi).with_writer(writer)).init();
    }
    let _ = FILTER.set(handle);
    Ok(guard)
}

fn parse(filter: &str) -> anyhow::Result<Targets> {
    filter.parse().with_context(|| format!("log filter {filter:?}"))
}

/// The filter in force.
pub fn level() -> String {
    let current = FILTER.get().and_then(|f| f.with_current(|f| f.to_string()).ok());
    current.unwrap_or_default()
}

/// Replaces the filter.
pub fn set_level(filter: &str) -> anyhow::Result<()> {
    let parsed = parse(filter)?;
    FILTER.get().context("logging has not started")?.reload(parsed).context("changing the log filter")
}

/// Lines that were not written because the reader was too slow.
pub fn dropped() -> u64 {
    DROPPED.get().map_or(0, |counter| counter.dropped_lines() as u64)
}
