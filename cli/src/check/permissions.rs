//! Whether you may make what an installation consists of.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::report::{Check, Outcome};
use crate::{
    chart::{self, Values},
    cluster::Cluster,
};

pub async fn checks(cluster: &Cluster, values: &Values, namespace: &str) -> Vec<Check> {
    let objects = match chart::objects(values, namespace) {
        Ok(objects) => objects,
        Err(error) => {
            return vec![Check::error(
                "the settings can be used",
                format!("{error:#}"),
                "see `weft install --show-values`",
            )];
        }
    };
    let mut wrong = Vec::new();
    let what = "you may create everything that is installed";
    // One question a kind.
    let kinds: BTreeSet<(String, String, bool)> = objects.iter().map(kind).collect();
    for (group, plural, namespaced) in kinds {
        let mut attributes = json!({"verb": "create", "group": group, "resource": plural});
        if namespaced {
            attributes["namespace"] = namespace.into();
        }
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        });
        match cluster.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await {
            Ok(answer) if answer["status"]["allowed"] == true => {}
            Ok(_) => wrong.push(format!(
                "not {plural}{}",
                if namespaced { format!(" in {namespace}") } else { String::new() }
            )),
            Err(error) => return vec![Check::unknown(what, &format!("{error:#}"))],
        }
    }
    vec![Check::of(
        Outcome::Error,
        what,
        wrong,
        "install with an account that may; a cluster's administrator can",
    )]
}

/// API group, plural, and whether it lives in a namespace.
fn kind(object: &Value) -> (String, String, bool) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = text(&object["apiVersion"]);
    let group = version.split_once('/').map_or(String::new(), |(group, _)| group.to_owned());
    (group, format!("{}s", text(&object["kind"]).to_lowercase()), object["metadata"]["namespace"].is_string())
}
