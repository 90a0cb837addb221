//! The agents, asked one by one what they say of themselves: by running `weft-agent status` in their pods.

use std::{
    collections::BTreeMap,
    time::{Instant, SystemTime},
};

use anyhow::Result;
use futures_util::{StreamExt, stream};
use serde_json::Value;
use weft_api::agent::AgentStatus;

use crate::cluster::{Cluster, Part, part, seconds};

/// Agents asked at a time.
const CONCURRENCY: usize = 16;

/// What each node's agent says, by node.
pub type Agents = BTreeMap<String, Part<Answer>>;

/// An agent's answer.
pub struct Answer {
    pub status: AgentStatus,
    /// How far its clock is ahead of this machine's, in seconds; true to within the time that asking took.
    pub skew: f64,
    pub took: f64,
}

/// Where the API server has the pods of the agents and the controller.
pub fn path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/pods?labelSelector=app.kubernetes.io%2Fpart-of%3Dweft")
}

/// Of those pods the agents that run, by node.
pub fn pods(pods: &[Value]) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    // While one is replaced there are two on a node; the one that goes does not count.
    let runs = |pod: &&Value| {
        pod["metadata"]["labels"]["app.kubernetes.io/name"] == "weft-agent"
            && pod["metadata"]["deletionTimestamp"].is_null()
            && pod["status"]["phase"] == "Running"
    };
    pods.iter()
        .filter(runs)
        .map(|pod| (text(&pod["spec"]["nodeName"]), text(&pod["metadata"]["name"])))
        .collect()
}

/// Asks every agent that runs.
pub async fn ask(cluster: &Cluster, namespace: &str) -> Result<Agents> {
    Ok(ask_all(cluster, namespace, &cluster.list::<Value>(&path(namespace)).await?).await)
}

/// Asks every agent among these pods.
pub async fn ask_all(cluster: &Cluster, namespace: &str, among: &[Value]) -> Agents {
    let ask = |(node, pod): (String, String)| async move {
        let asked = Instant::now();
        let printed = cluster.exec(namespace, &pod, "weft-agent", &["/weft-agent", "status"]).await;
        let took = asked.elapsed();
        let answer = printed.and_then(|text| {
            let status: AgentStatus = serde_json::from_str(&text)?;
            let skew = status.time - seconds(SystemTime::now() - took / 2);
            Ok(Answer { status, skew, took: took.as_secs_f64() })
        });
        (node, part(answer))
    };
    stream::iter(pods(among).into_iter().map(ask)).buffer_unordered(CONCURRENCY).collect().await
}
