//! `weft check`: whether the mesh works, or with `--pre` whether it could, and what to do where it does not. The cluster is
//! looked at once ([`view`]); what follows from it is worked out in a module a subject, without the cluster.

mod addresses;
mod agents;
mod authorization;
mod control;
mod existing;
mod identity;
mod nodes;
mod permissions;
mod pods;
mod policies;
mod report;
mod server;
mod view;

use std::{
    io::IsTerminal,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;

use self::{
    report::{Category, Check, Format, Report},
    view::{Installed, View},
};
use crate::{
    chart::Settings,
    cluster::{Cluster, Target},
    output,
};

const EXAMPLES: &str = "\
Examples:
  Before an installation:
    weft check --pre

  Afterwards, waiting until everything is up:
    weft check --wait 2m

  In a script:
    weft check -o json | jq -r '.categories[].checks[] | select(.result == \"error\") | .description'

Exit status: 0 where nothing is broken (warnings do not count), 1 otherwise.";

/// Check whether the mesh works, and say what to do where it does not.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Check instead whether Weft can be installed in this cluster, with the settings of --values and --set.
    #[arg(long)]
    pre: bool,
    /// How to print: every check, only what is not fine, or JSON.
    #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
    output: Format,
    /// Check again until nothing is broken, for at most so long, as in 90s or 5m.
    #[arg(long, default_value = "0s", value_parser = duration, value_name = "TIME")]
    wait: Duration,
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    settings: Settings,
}

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(2);

pub async fn run(arguments: &Arguments) -> Result<ExitCode> {
    let end = Instant::now() + arguments.wait;
    let mut progress = Progress::new(arguments.output);
    let report = loop {
        let report = look(arguments).await?;
        if report.success || Instant::now() + PAUSE > end {
            break report;
        }
        progress.waiting(&report);
        tokio::time::sleep(PAUSE).await;
    };
    progress.clear();
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    output::print(&report.print(arguments.output, colour))?;
    Ok(if report.success { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn look(arguments: &Arguments) -> Result<Report> {
    let cluster = Cluster::connect(arguments.target.context.as_deref()).await?;
    let namespace = arguments.target.namespace.as_str();
    let view = match View::fetch(&cluster, namespace).await {
        Ok(view) => view,
        // Nothing else can be found out.
        Err(error) => {
            let check = Check::error(
                "the API server answers",
                format!("{error:#}"),
                "does `kubectl version` work? KUBECONFIG and --context say which cluster is meant",
            );
            return Ok(Report::new(vec![Category { name: "kubernetes-api", checks: vec![check] }]));
        }
    };
    let category = |name, checks| Category { name, checks };
    if arguments.pre {
        let values = arguments.settings.values()?;
        let ranges = addresses::Ranges::of_values(&values);
        return Ok(Report::new(vec![
            category("kubernetes-api", server::checks(&view)),
            category("nodes", nodes::checks(&view, &nodes::leases(&cluster).await)),
            category("addresses", addresses::checks(&view, &ranges)),
            category("permissions", permissions::checks(&cluster, &values, namespace).await),
        ]));
    }
    let installed = Installed::fetch(&cluster, namespace).await;
    let ranges = addresses::Ranges::of_installation(&installed);
    Ok(Report::new(vec![
        category("kubernetes-api", server::checks(&view)),
        category("weft-control", control::checks(&view, &installed)),
        category("weft-identity", identity::checks(&view, &installed)),
        category("weft-agents", agents::checks(&view, &installed)),
        category(
            "weft-pods",
            [
                pods::checks(&view, &installed),
                existing::checks(&installed),
                addresses::checks(&view, &ranges),
            ]
            .concat(),
        ),
        category("authorization", authorization::checks(&view, &installed)),
        category("network-policies", policies::checks(&view, &installed)),
    ]))
}

/// One line on a terminal while there is something to wait for.
struct Progress {
    terminal: bool,
}

impl Progress {
    fn new(output: Format) -> Self {
        let progress = Self { terminal: output != Format::Json && std::io::stderr().is_terminal() };
        progress.line("looking at the cluster ...");
        progress
    }

    fn waiting(&mut self, report: &Report) {
        let broken = report.categories.iter().flat_map(|category| &category.checks);
        let broken = broken.filter(|check| check.result == report::Outcome::Error);
        let what = broken.map(|check| check.description.as_str()).next().unwrap_or_default();
        self.line(&format!("waiting until {what} ..."));
    }

    fn clear(&self) {
        self.line("");
    }

    fn line(&self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{text}");
        }
    }
}

/// A time as in 90s, 5m or 1h.
fn duration(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().context("expected a time such as 90s or 5m")?;
    let unit = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => bail!("expected a time such as 90s or 5m"),
    };
    Ok(Duration::from_secs(number.saturating_mul(unit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(duration("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(duration("5m").unwrap(), Duration::from_secs(300));
        for wrong in ["", "5", "m", "5 m", "-5s", "5d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
