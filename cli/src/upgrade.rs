//! `weft upgrade`: what `weft install` of this version prints, with the settings that the cluster's installation has.

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    chart::{self, SETTINGS, Settings, Values},
    cluster::{Cluster, Target},
    output,
};

const EXAMPLES: &str = "\
Examples:
  To the version of this command:
    weft upgrade | kubectl apply -f -

  Change one setting and keep the others:
    weft upgrade --set agent.drainDeadline=60 | kubectl apply -f -

  See what would change:
    weft upgrade | kubectl diff -f -";

/// Print what is to be installed over an installation, with the settings it has, as YAML for `kubectl apply -f -`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    settings: Settings,
}

pub async fn run(arguments: &Arguments) -> Result<()> {
    let namespace = arguments.target.namespace.as_str();
    let cluster = Cluster::connect(arguments.target.context.as_deref()).await?;
    let stored = cluster.find(&format!("/api/v1/namespaces/{namespace}/configmaps/{SETTINGS}")).await?;
    let Some(stored) = stored else { return Err(not_ours(&cluster, namespace).await?) };
    let text = stored["data"]["settings"].as_str().context("has no data.settings")?;
    let mut values = Values::default();
    // A setting that this version does not have any more is named, not dropped.
    values
        .merge(text)
        .with_context(|| format!("ConfigMap {namespace}/{SETTINGS}, the installation's settings"))?;
    arguments.settings.apply(&mut values)?;
    output::print(&chart::manifest(&values, namespace)?)
}

async fn not_ours(cluster: &Cluster, namespace: &str) -> Result<anyhow::Error> {
    let control =
        cluster.find(&format!("/apis/apps/v1/namespaces/{namespace}/deployments/weft-control")).await?;
    let Some(control) = control else {
        bail!("nothing is installed in {namespace}; see `weft install`, or say --namespace");
    };
    let annotations = &control["metadata"]["annotations"];
    Ok(match annotations["meta.helm.sh/release-name"].as_str() {
        Some(release) => {
            anyhow::anyhow!("{namespace} was installed with Helm: helm upgrade {release} -n {namespace} ...")
        }
        None => anyhow::anyhow!(
            "there is no ConfigMap {namespace}/{SETTINGS}, which holds the installation's settings"
        ),
    })
}
