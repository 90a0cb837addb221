//! What the checks look at, fetched once. Each part may fail by itself; what follows from it is worked out without the
//! cluster, in the modules beside this one.

use std::{
    collections::BTreeMap,
    time::{Instant, SystemTime},
};

use anyhow::Result;
use futures_util::{StreamExt, stream};
use serde_json::Value;
use weft_api::{AuthorizationPolicy, Namespace, Pod, ServiceCidr};

use crate::{
    agents::{self, Agents},
    chart::{self, Values},
    cluster::{Cluster, Part, Server, part, path, seconds},
};

/// Objects looked for at a time.
const CONCURRENCY: usize = 16;

/// What both kinds of check look at.
pub struct View {
    pub server: Server,
    /// How far this machine's clock is ahead of the API server's, in seconds.
    pub own_skew: f64,
    /// The namespace that Weft is or will be in.
    pub namespace: String,
    pub nodes: Part<Vec<Value>>,
    pub namespaces: Part<BTreeMap<String, Namespace>>,
    pub pods: Part<Vec<Pod>>,
    pub service_cidrs: Part<Vec<ServiceCidr>>,
}

/// What is there of an installation.
pub struct Installed {
    /// What the chart has and the cluster has not, as `kind/name`.
    pub missing: Part<Vec<String>>,
    pub control: Part<Option<Value>>,
    pub agent: Part<Option<Value>>,
    /// The pods of both.
    pub pods: Part<Vec<Value>>,
    /// Why pods of the DaemonSet or the Deployment could not be made.
    pub events: Part<Vec<Value>>,
    pub root: Part<Option<Value>>,
    pub policies: Part<Vec<Value>>,
    pub authorization: Part<Vec<AuthorizationPolicy>>,
    /// What each node's agent says, by node.
    pub agents: Agents,
}

impl View {
    /// Fails where there is nothing to look at: the API server does not answer.
    pub async fn fetch(cluster: &Cluster, namespace: &str) -> Result<Self> {
        let asked = Instant::now();
        let server = cluster.server().await?;
        // The date has whole seconds; what it was halfway through asking is the best guess.
        let middle = SystemTime::now() - asked.elapsed() / 2;
        let own_skew = seconds(middle) - seconds(server.clock) - 0.5;
        let (nodes, namespaces, pods, service_cidrs) = tokio::join!(
            cluster.list("/api/v1/nodes"),
            cluster.list::<Namespace>("/api/v1/namespaces"),
            cluster.list("/api/v1/pods"),
            cluster.list("/apis/networking.k8s.io/v1/servicecidrs"),
        );
        let named = |all: Vec<Namespace>| all.into_iter().map(|ns| (ns.metadata.name.clone(), ns)).collect();
        Ok(Self {
            server,
            own_skew,
            namespace: namespace.to_owned(),
            nodes: part(nodes),
            namespaces: part(namespaces).map(named),
            pods: part(pods),
            service_cidrs: part(service_cidrs),
        })
    }

    /// Pods that are to be in the mesh, as the controller reads the labels.
    pub fn mesh_pods(&self) -> Part<Vec<&Pod>> {
        let (pods, namespaces) = (self.pods.as_ref()?, self.namespaces.as_ref()?);
        let wanted = |pod: &&Pod| {
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            !pod.is_gone() && weft_api::mesh_choice(namespaces.get(namespace), pod).wanted
        };
        Ok(pods.iter().filter(wanted).collect())
    }
}

impl Installed {
    pub async fn fetch(cluster: &Cluster, namespace: &str) -> Self {
        let apps = format!("/apis/apps/v1/namespaces/{namespace}");
        let core = format!("/api/v1/namespaces/{namespace}");
        let (control, agent, root) = (
            format!("{apps}/deployments/weft-control"),
            format!("{apps}/daemonsets/weft-agent"),
            format!("{core}/configmaps/weft-root"),
        );
        let (pods, events) = (agents::path(namespace), format!("{core}/events?fieldSelector=type%3DWarning"));
        let (missing, control, agent, pods, events, root, policies, authorization) = tokio::join!(
            missing(cluster, namespace),
            cluster.find(&control),
            cluster.find(&agent),
            cluster.list::<Value>(&pods),
            cluster.list(&events),
            cluster.find(&root),
            cluster.list("/apis/networking.k8s.io/v1/networkpolicies"),
            cluster.list("/apis/policy.weft.dev/v1alpha1/authorizationpolicies"),
        );
        let pods = part(pods);
        let agents = agents::ask_all(cluster, namespace, pods.as_deref().unwrap_or_default()).await;
        Self {
            missing: part(missing),
            control: part(control),
            agent: part(agent),
            pods,
            events: part(events),
            root: part(root),
            policies: part(policies),
            authorization: part(authorization),
            agents,
        }
    }

    /// The pods of the Deployment or DaemonSet of that name.
    pub fn pods_of<'a>(&'a self, name: &'a str) -> Part<impl Iterator<Item = &'a Value>> {
        let own = move |pod: &&Value| pod["metadata"]["labels"]["app.kubernetes.io/name"] == name;
        Ok(self.pods.as_ref()?.iter().filter(own))
    }

    /// An environment variable of the controller: what it was installed with.
    pub fn setting(&self, name: &str) -> Option<&str> {
        let control = self.control.as_ref().ok()?.as_ref()?;
        let env = control["spec"]["template"]["spec"]["containers"][0]["env"].as_array()?;
        env.iter().find(|variable| variable["name"] == name)?["value"].as_str()
    }
}

/// What `weft install` would make and is not there.
async fn missing(cluster: &Cluster, namespace: &str) -> Result<Vec<String>> {
    let objects = chart::objects(&Values::default(), namespace)?;
    let look = |object: Value| async move {
        let name = format!(
            "{}/{}",
            object["kind"].as_str().unwrap_or_default(),
            object["metadata"]["name"].as_str().unwrap_or_default()
        );
        Ok::<_, anyhow::Error>((name, cluster.find(&path(&object)).await?.is_some()))
    };
    let mut missing = Vec::new();
    let mut looks = stream::iter(objects.into_iter().map(look)).buffered(CONCURRENCY);
    while let Some(found) = looks.next().await {
        let (name, there) = found?;
        if !there {
            missing.push(name);
        }
    }
    Ok(missing)
}
