//! The directory of Kubernetes manifests that stands for a cluster: written file by file, each replaced in one step, as
//! a person or a tool would do it. Labels are kept here, because a manifest is always written whole.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// The label that enrols.
pub const MESH_LABEL: &str = "weft.dev/mesh";

/// Labels of one object.
pub type Labels = BTreeMap<String, String>;

/// What a pod's manifest says.
#[derive(Clone, Debug)]
pub struct PodManifest {
    pub namespace: String,
    pub name: String,
    pub node: String,
    pub service_account: String,
    pub netns: PathBuf,
    pub addresses: [IpAddr; 2],
    pub labels: Labels,
}

/// What a Service's manifest and its EndpointSlices say.
#[derive(Clone, Debug)]
pub struct ServiceManifest {
    pub namespace: String,
    pub name: String,
    /// Cluster addresses, one of each family.
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub port: u16,
    pub target_port: u16,
    /// What else its spec says, as fields of an object.
    pub spec: Value,
    pub endpoints: Vec<Endpoint>,
    pub frontends: Frontends,
}

/// A pod behind a Service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub pod: String,
    pub addresses: [IpAddr; 2],
    /// Conditions, as an EndpointSlice has them.
    pub conditions: Value,
}

/// Where a Service is reached beside its cluster addresses.
#[derive(Clone, Debug, Default)]
pub struct Frontends {
    pub node_port: Option<u16>,
    pub external_ips: Vec<IpAddr>,
    /// Of its load balancer.
    pub ingress: Vec<IpAddr>,
}

/// A directory of manifests.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
    scratch: PathBuf,
}

impl Directory {
    /// Makes `path`; `scratch` is a directory on the same file system where files are prepared.
    pub fn create(path: PathBuf, scratch: PathBuf) -> Result<Directory> {
        for dir in [&path, &scratch] {
            std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        Ok(Directory { path, scratch })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces one file in one step. The text need not be a valid manifest.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let prepared = self.scratch.join(file);
        std::fs::write(&prepared, text)?;
        std::fs::rename(&prepared, self.path.join(file))
            .with_context(|| format!("writing the manifest {file}"))
    }

    /// Removes one file.
    pub fn remove(&self, file: &str) -> Result<()> {
        std::fs::remove_file(self.path.join(file)).with_context(|| format!("removing the manifest {file}"))
    }

    /// Removes every file.
    pub fn empty(&self) -> Result<()> {
        for entry in std::fs::read_dir(&self.path)? {
            std::fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// Writes a Namespace.
    pub fn namespace(&self, name: &str, labels: &Labels) -> Result<()> {
        self.write_documents(
            &format!("namespace-{name}.yaml"),
            &[json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})],
        )
    }

    /// Name of a pod's file.
    pub fn pod_file(namespace: &str, name: &str) -> String {
        format!("pod-{namespace}-{name}.yaml")
    }

    /// Writes a Pod that runs and is ready.
    pub fn pod(&self, pod: &PodManifest) -> Result<()> {
        let ips: Vec<_> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        let document = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod.name,
                "namespace": pod.namespace,
                "labels": pod.labels,
                "annotations": {"weft.dev/netns": pod.netns},
            },
            "spec": {
                "nodeName": pod.node,
                "serviceAccountName": pod.service_account,
                "containers": [{"name": "main", "image": "none"}],
            },
            "status": {
                "phase": "Running",
                "podIP": pod.addresses[0],
                "podIPs": ips,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        self.write_documents(&Self::pod_file(&pod.namespace, &pod.name), &[document])
    }

    /// Writes a Node with these addresses of its own.
    pub fn node(&self, name: &str, addresses: &[IpAddr]) -> Result<()> {
        let addresses: Vec<_> =
            addresses.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
        self.write_node(name, json!({"metadata": {"name": name}, "status": {"addresses": addresses}}))
    }

    /// Writes a Node that is in `zone`.
    pub fn node_in(&self, name: &str, zone: &str) -> Result<()> {
        let labels = json!({"topology.kubernetes.io/zone": zone});
        self.write_node(name, json!({"metadata": {"name": name, "labels": labels}}))
    }

    fn write_node(&self, name: &str, mut document: Value) -> Result<()> {
        document["apiVersion"] = json!("v1");
        document["kind"] = json!("Node");
        self.write_documents(&format!("node-{name}.yaml"), &[document])
    }

    /// Writes a Service and one EndpointSlice for each address family.
    pub fn service(&self, service: &ServiceManifest) -> Result<()> {
        let Frontends { node_port, external_ips, ingress } = &service.frontends;
        let ingress: Vec<_> = ingress.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect();
        let kind = match (ingress.is_empty(), node_port) {
            (false, _) => "LoadBalancer",
            (true, Some(_)) => "NodePort",
            (true, None) => "ClusterIP",
        };
        let mut document = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": service.name, "namespace": service.namespace},
            "spec": {
                "type": kind,
                "clusterIP": service.v4,
                "clusterIPs": [service.v4.to_string(), service.v6.to_string()],
                "ipFamilies": ["IPv4", "IPv6"],
                "externalIPs": external_ips,
                "ports": [{
                    "name": "main", "port": service.port, "targetPort": service.target_port, "protocol": "TCP",
                    "nodePort": node_port,
                }],
            },
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        for (field, value) in service.spec.as_object().into_iter().flatten() {
            document["spec"][field] = value.clone();
        }
        let mut documents = vec![document];
        for (family, at) in [("IPv4", 0), ("IPv6", 1)] {
            let endpoints: Vec<_> = service
                .endpoints
                .iter()
                .map(|endpoint| {
                    json!({
                        "addresses": [endpoint.addresses[at]],
                        "conditions": endpoint.conditions,
                        "targetRef": {"kind": "Pod", "name": endpoint.pod, "namespace": service.namespace},
                    })
                })
                .collect();
            documents.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{}-{}", service.name, family.to_lowercase()),
                    "namespace": service.namespace,
                    "labels": {"kubernetes.io/service-name": service.name},
                },
                "addressType": family,
                "endpoints": endpoints,
                "ports": [{"name": "main", "port": service.target_port, "protocol": "TCP"}],
            }));
        }
        self.write_documents(&format!("service-{}-{}.yaml", service.namespace, service.name), &documents)
    }

    fn write_documents(&self, file: &str, documents: &[Value]) -> Result<()> {
        let mut text = String::new();
        for document in documents {
            text.push_str("---\n");
            text.push_str(&serde_yaml_ng::to_string(document)?);
        }
        self.write(file, &text)
    }
}
