//! `weft install`: the chart's objects on standard output, for `kubectl apply`.

use std::{io::Write, path::PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::chart::{self, Values};

const EXAMPLES: &str = "\
Examples:
  Install with the defaults:
    weft install | kubectl apply -f -

  With a trust domain of one's own and images from elsewhere:
    weft install --set mesh.trustDomain=example.org --set image.repository=example.org/weft | kubectl apply -f -

  See every setting with its default:
    weft install --show-values";

/// Print what is to be installed in a cluster, as YAML for `kubectl apply -f -`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Namespace to install into.
    #[arg(short, long, default_value = "weft-system", value_name = "NAME")]
    namespace: String,
    /// YAML file with settings that differ from the defaults; may be given several times, the last one wins.
    #[arg(short = 'f', long, value_name = "FILE")]
    values: Vec<PathBuf>,
    /// One setting, as in mesh.trustDomain=example.org; wins over files.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the settings and their defaults instead.
    #[arg(long)]
    show_values: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let text = if arguments.show_values { chart::VALUES.to_owned() } else { manifests(arguments)? };
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader such as `head` that has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("standard output"),
    }
}

fn manifests(arguments: &Arguments) -> Result<String> {
    let mut values = Values::default();
    for path in &arguments.values {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        values.merge(&text).with_context(|| path.display().to_string())?;
    }
    for setting in &arguments.set {
        values.set(setting).with_context(|| format!("--set {setting}"))?;
    }
    let mut text = namespace(&arguments.namespace);
    for (name, template) in chart::TEMPLATES {
        let rendered =
            chart::render(template, &values, &arguments.namespace).with_context(|| name.to_string())?;
        text.push_str(&format!("---\n# {name}\n{}\n", rendered.trim()));
    }
    Ok(text)
}

/// Helm makes the namespace itself, so the chart has none. The agent needs more than any restricted profile allows.
fn namespace(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    weft.dev/mesh: disabled\n    \
         pod-security.kubernetes.io/enforce: privileged\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(set: &[&str]) -> Result<Vec<serde_json::Value>> {
        let arguments = Arguments {
            namespace: "mesh".to_owned(),
            values: Vec::new(),
            set: set.iter().map(|s| (*s).to_owned()).collect(),
            show_values: false,
        };
        let text = manifests(&arguments)?;
        let documents = serde_yaml_ng::Deserializer::from_str(&text);
        Ok(documents.map(|d| serde::Deserialize::deserialize(d).unwrap()).collect())
    }

    #[test]
    fn every_object_is_whole_and_in_its_namespace() {
        let objects = objects(&[]).unwrap();
        assert!(objects.len() >= 10, "{}", objects.len());
        for object in &objects {
            let (kind, name) =
                (object["kind"].as_str().unwrap(), object["metadata"]["name"].as_str().unwrap());
            let cluster_wide = ["Namespace", "CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding"]
                .contains(&kind);
            let namespace = object["metadata"]["namespace"].as_str();
            assert_eq!(namespace, (!cluster_wide).then_some("mesh"), "{kind} {name}");
        }
    }

    #[test]
    fn settings_reach_the_objects() {
        let objects = objects(&[
            "mesh.trustDomain=example.org",
            "image.tag=1.2",
            "agent.drainDeadline=7",
            "control.replicas=3",
        ])
        .unwrap();
        let text = serde_json::to_string(&objects).unwrap();
        for expected in ["example.org", "weft-agent:1.2", "weft-control:1.2", "\"7\"", "\"replicas\":3"] {
            assert!(text.contains(expected), "{expected} is in no object");
        }
        let error = format!("{:#}", super::tests::objects(&["mesh.trustdomain=x"]).unwrap_err());
        assert!(error.contains("trustdomain") && error.contains("mesh"), "{error}");
    }
}
