//! `weft root`: whom the mesh believes, and a new root in the place of the old one. The controller does the work; here it is
//! asked for, by an annotation, and watched.

use std::{
    fmt::Write as _,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::sleep;
use weft_api::trust::{Phase, Progress, ROTATE_ROOT, TrustStatus, Waiting};
use x509_parser::prelude::{FromDer, Pem, X509Certificate};

use crate::{
    cluster::{Cluster, Target, seconds},
    output,
};

const EXAMPLES: &str = "\
Examples:
  Who signs, who is believed, and whom a rotation waits for:
    weft root status

  A new root, while everything runs; waits until the old one is believed no more:
    weft root rotate

A rotation waits for every node with pods in the mesh, twice, and twice for --root-overlap of the controller (control.rootOverlap
in the chart, one hour), in which callers that are no agents renew their certificates. It goes on if this command is interrupted.";

/// See whom the mesh believes, and replace the root of trust.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the roots, and how a rotation goes on.
    Status {
        #[command(flatten)]
        target: Target,
        /// How to print.
        #[arg(short, long, value_enum, default_value = "table", value_name = "FORMAT")]
        output: Format,
    },
    /// Replace the root of trust by a new one. No connection is lost.
    Rotate {
        #[command(flatten)]
        target: Target,
        /// Do not wait until it is done.
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

const LOOK: Duration = Duration::from_secs(1);
/// A controller that runs has taken a request up by then.
const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Command::Status { target, output } => {
            let shown = Shown::read(&Cluster::connect(target.context.as_deref()).await?, target).await?;
            output::print(&match output {
                Format::Json => format!("{}\n", serde_json::to_string_pretty(&shown)?),
                Format::Table => shown.table(),
            })?;
        }
        Command::Rotate { target, no_wait } => rotate(target, *no_wait).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn rotate(target: &Target, no_wait: bool) -> Result<()> {
    let cluster = Cluster::connect(target.context.as_deref()).await?;
    let before = Shown::read(&cluster, target).await?.status;
    if before.given {
        bail!("the root is given to the controller (the Secret weft-issuer): put another one there");
    }
    if before.phase != Phase::Steady {
        bail!("a rotation is under way: {before}. `weft root status` shows how it goes on");
    }
    let request = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos().to_string();
    cluster.patch(&path(target), &json!({"metadata": {"annotations": {ROTATE_ROOT: request}}})).await?;
    if no_wait {
        return Ok(());
    }
    let started = Instant::now();
    let mut waiting = Waiting::new(&request);
    loop {
        match waiting.look(Shown::read(&cluster, target).await?.status) {
            Progress::Done => {
                eprintln!("done: there is one root, the new one");
                return Ok(());
            }
            Progress::Idle if started.elapsed() > PATIENCE => bail!(
                "the controller has not begun within {PATIENCE:?}; kubectl -n {} logs deployment/weft-control",
                target.namespace
            ),
            Progress::News(status) => eprintln!("{status} ..."),
            Progress::Idle | Progress::Nothing => {}
        }
        sleep(LOOK).await;
    }
}

fn path(target: &Target) -> String {
    format!("/api/v1/namespaces/{}/configmaps/weft-root", target.namespace)
}

/// What there is to see.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    status: TrustStatus,
    roots: Vec<Root>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Root {
    /// The first of several signs.
    signs: bool,
    serial_number: String,
    /// Unix time, in seconds.
    not_before: i64,
    not_after: i64,
}

impl Shown {
    async fn read(cluster: &Cluster, target: &Target) -> Result<Self> {
        let map: Value = cluster.find(&path(target)).await?.with_context(|| {
            format!("there is no ConfigMap {}/weft-root: is Weft installed there?", target.namespace)
        })?;
        let text = |name: &str| {
            map["data"][name].as_str().with_context(|| format!("the ConfigMap weft-root has no {name}"))
        };
        let status = serde_json::from_str(text("status.json")?).context("status.json")?;
        Ok(Self { status, roots: roots(text("root.pem")?)? })
    }

    fn table(&self) -> String {
        let mut text = format!("{}\n\n{:8} {:34} EXPIRES IN\n", self.status, "SIGNS", "SERIAL");
        let now = seconds(SystemTime::now());
        for root in &self.roots {
            let days = (root.not_after as f64 - now) / 86400.0;
            let signs = if root.signs { "yes" } else { "no" };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{signs:8} {:34} {days:.0} days", root.serial_number);
        }
        text
    }
}

fn roots(pem: &str) -> Result<Vec<Root>> {
    let certificates = Pem::iter_from_buffer(pem.as_bytes()).enumerate().map(|(index, block)| {
        let block = block.context("root.pem")?;
        let (_, certificate) = X509Certificate::from_der(&block.contents).context("root.pem")?;
        let validity = certificate.validity();
        Ok(Root {
            signs: index == 0,
            serial_number: format!("{:x}", certificate.serial),
            not_before: validity.not_before.timestamp(),
            not_after: validity.not_after.timestamp(),
        })
    });
    certificates.collect()
}
