//! `weft install`: the chart's objects on standard output, for `kubectl apply`.

use anyhow::Result;
use clap::Args;

use crate::{
    chart::{self, Settings},
    output,
};

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
    #[command(flatten)]
    settings: Settings,
    /// Print the settings and their defaults instead.
    #[arg(long)]
    show_values: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.show_values {
        return output::print(chart::VALUES);
    }
    output::print(&chart::manifest(&arguments.settings.values()?, &arguments.namespace)?)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use crate::chart::{Values, objects};

    fn made(set: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut values = Values::default();
        set.iter().try_for_each(|setting| values.set(setting))?;
        objects(&values, "mesh")
    }

    #[test]
    fn every_object_is_whole_and_in_its_namespace() {
        let objects = made(&[]).unwrap();
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
        let objects = made(&[
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
        let error = format!("{:#}", made(&["mesh.trustdomain=x"]).unwrap_err());
        assert!(error.contains("trustdomain") && error.contains("mesh"), "{error}");
    }
}
