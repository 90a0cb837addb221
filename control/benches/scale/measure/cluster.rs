//! The synthetic cluster: nodes, namespaces that are in the mesh, Services with their pods behind them, and pods that are
//! replaced. The same sizes make the same cluster. Objects have the fields of real ones, also those that the controller
//! throws away, since reading them is part of its work.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::{Sizes, api::Api};

const SERVICES_PER_NAMESPACE: usize = 50;
/// The characters that Kubernetes makes random names of.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

#[derive(Debug)]
struct Pod {
    /// How many pods had this place before.
    generation: u32,
    /// Last octet of its address, in its node's /24.
    host: u8,
}

/// What is in the API server, and how to change it.
#[derive(Debug)]
pub struct Cluster {
    api: Api,
    sizes: Sizes,
    pods: Vec<Pod>,
    /// By node, what is left of its /24: an address is not used again before all others were.
    free: Vec<VecDeque<u8>>,
    /// How many pods were replaced.
    replaced: usize,
}

pub fn node_name(node: usize) -> String {
    format!("node-{node:04}")
}

impl Cluster {
    /// Fills the API server, as a cluster that has been in the mesh for a while: every pod is enrolled already, and says
    /// so.
    pub fn fill(api: Api, sizes: Sizes) -> Self {
        let free = (0..sizes.nodes).map(|_| (2..=254).collect());
        let mut cluster = Self { api, sizes, pods: Vec::new(), free: free.collect(), replaced: 0 };
        let cidr = json!({"spec": {"cidrs": ["10.32.0.0/12"]}});
        cluster.put("servicecidrs", "", "kubernetes", cidr);
        for node in 0..sizes.nodes {
            let (a, b) = subnet(node);
            let cidr = format!("10.{a}.{b}.0/24");
            let address = json!([{"type": "InternalIP", "address": format!("192.168.{}.{}", node / 250, node % 250 + 1)}]);
            let object =
                json!({"spec": {"podCIDR": cidr, "podCIDRs": [cidr]}, "status": {"addresses": address}});
            cluster.put("nodes", "", &node_name(node), object);
        }
        for number in 0..sizes.services.div_ceil(SERVICES_PER_NAMESPACE) {
            let object = json!({"metadata": {"labels": {"weft.dev/mesh": "enabled"}}});
            cluster.put("namespaces", "", &format!("team-{number:03}"), object);
        }
        for number in 0..sizes.pods {
            let host = cluster.take_address(number % sizes.nodes);
            cluster.pods.push(Pod { generation: 0, host });
            cluster.put_pod(number);
        }
        for service in 0..sizes.services {
            cluster.put_service(service);
            cluster.put_slice(service);
        }
        for node in 0..sizes.nodes {
            cluster.put_enrollment(node);
        }
        cluster
    }

    /// Replaces a pod of some Service by a new one, as a rollout does: the new pod, its Service's slice, and the end of
    /// the old pod. Returns the uid of the new workload; `before` is told it before anything happens.
    pub fn replace_a_pod(&mut self, before: impl FnOnce(&str)) {
        // Neighbours in time are to be strangers to each other: far apart, and each once before any is twice.
        const STRIDE: usize = 7919;
        let number = (self.replaced * STRIDE) % self.pods.len();
        self.replaced += 1;
        let old = format!("{}/{}", self.namespace(number), self.pod_name(number));
        let node = number % self.sizes.nodes;
        self.free[node].push_back(self.pods[number].host);
        self.pods[number].host = self.take_address(node);
        self.pods[number].generation += 1;
        before(&self.uid(number));
        self.put_pod(number);
        self.put_slice(number % self.sizes.services);
        self.api.delete("pods", &old);
    }

    fn take_address(&mut self, node: usize) -> u8 {
        self.free[node].pop_front().unwrap_or(1)
    }

    fn namespace(&self, pod: usize) -> String {
        namespace(pod % self.sizes.services)
    }

    fn pod_name(&self, number: usize) -> String {
        let mut rest = number * 1009 + self.pods[number].generation as usize * 15_485_863;
        let suffix = (0..5).map(|_| {
            let letter = ALPHABET[rest % ALPHABET.len()];
            rest /= ALPHABET.len();
            letter as char
        });
        let suffix: String = suffix.collect();
        format!("{}-5d4f8c7b9-{number}{suffix}", service_name(number % self.sizes.services))
    }

    fn uid(&self, pod: usize) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace(pod), self.pod_name(pod))
    }

    fn pod_uid(&self, pod: usize) -> String {
        format!("5f0c2b1e-0000-4000-8000-{pod:06x}{:06x}", self.pods[pod].generation)
    }

    fn address(&self, pod: usize) -> String {
        let (a, b) = subnet(pod % self.sizes.nodes);
        format!("10.{a}.{b}.{}", self.pods[pod].host)
    }

    fn put_pod(&self, number: usize) {
        let (namespace, name) = (self.namespace(number), self.pod_name(number));
        let service = service_name(number % self.sizes.services);
        let address = self.address(number);
        let owner = format!("{service}-5d4f8c7b9");
        let condition = |kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let mut conditions = vec![
            condition("PodScheduled"),
            condition("Initialized"),
            condition("ContainersReady"),
            condition("Ready"),
        ];
        if self.pods[number].generation == 0 {
            conditions.push(
                json!({"type": "weft.dev/Enrolled", "status": "True", "reason": "Enrolled", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}),
            );
        }
        let object = json!({
            "metadata": {
                "uid": self.pod_uid(number), "generateName": format!("{owner}-"), "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"app.kubernetes.io/name": service, "app.kubernetes.io/version": "1.4.2", "pod-template-hash": "5d4f8c7b9"},
                "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9090"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": "00000000-0000-4000-8000-000000000001",
                    "controller": true, "blockOwnerDeletion": true}],
                "managedFields": managed_fields(),
            },
            "spec": {
                "nodeName": node_name(number % self.sizes.nodes), "serviceAccountName": service, "serviceAccount": service,
                "restartPolicy": "Always", "dnsPolicy": "ClusterFirst", "schedulerName": "default-scheduler", "priority": 0,
                "containers": [{
                    "name": "server", "image": format!("registry.example.com/{service}:1.4.2"), "imagePullPolicy": "IfNotPresent",
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "env": [{"name": "LOG_LEVEL", "value": "info"}, {"name": "POD_IP", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}}],
                    "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "100m", "memory": "256Mi"}},
                    "readinessProbe": {"httpGet": {"path": "/ready", "port": "http", "scheme": "HTTP"}, "periodSeconds": 10},
                    "volumeMounts": [{"name": "token", "readOnly": true, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}],
                }],
                "volumes": [{"name": "token", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}}]}}],
                "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
            },
            "status": {
                "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": "192.168.0.1", "qosClass": "Burstable",
                "conditions": conditions,
                "containerStatuses": [{"name": "server", "ready": true, "started": true, "restartCount": 0,
                    "image": format!("registry.example.com/{service}:1.4.2"), "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}],
            },
        });
        self.put("pods", &namespace, &name, object);
    }

    fn put_service(&self, service: usize) {
        let name = service_name(service);
        let address = format!("10.{}.{}.{}", 32 + service / 62_500, service / 250 % 250, service % 250 + 1);
        let object = json!({"spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "selector": {"app.kubernetes.io/name": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        }});
        self.put("services", &namespace(service), &name, object);
    }

    /// All endpoints of a Service in one slice.
    fn put_slice(&self, service: usize) {
        let pods = (service..self.pods.len()).step_by(self.sizes.services);
        let endpoints: Vec<Value> = pods
            .map(|pod| {
                json!({
                    "addresses": [self.address(pod)], "conditions": {"ready": true, "serving": true, "terminating": false},
                    "nodeName": node_name(pod % self.sizes.nodes), "zone": "a",
                    "targetRef": {"kind": "Pod", "namespace": namespace(service), "name": self.pod_name(pod), "uid": self.pod_uid(pod)},
                })
            })
            .collect();
        let name = service_name(service);
        let object = json!({
            "metadata": {"labels": {"kubernetes.io/service-name": name}, "managedFields": managed_fields()},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        });
        self.put("endpointslices", &namespace(service), &format!("{name}-x7k2p"), object);
    }

    /// What an earlier controller wrote down of a node: all of its pods are enrolled.
    fn put_enrollment(&self, node: usize) {
        let pods = (node..self.pods.len()).step_by(self.sizes.nodes);
        let entries: Vec<Value> = pods
            .map(|pod| json!({"uid": self.uid(pod), "podUID": self.pod_uid(pod), "addresses": [self.address(pod)]}))
            .collect();
        let status =
            json!({"enrolledPods": entries.len(), "failedPods": 0, "enrolled": entries, "failures": []});
        let object = json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "weft"}}, "status": status});
        self.put("nodeenrollments", "", &node_name(node), object);
    }

    fn put(&self, plural: &str, namespace: &str, name: &str, mut object: Value) {
        let full = if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") };
        self.api.put(plural, &full, |version| {
            let metadata = &mut object["metadata"];
            metadata["name"] = json!(name);
            metadata["resourceVersion"] = json!(version.to_string());
            if !namespace.is_empty() {
                metadata["namespace"] = json!(namespace);
            }
            object.to_string()
        });
    }
}

/// The second and third octet of a node's pods' addresses.
fn subnet(node: usize) -> (usize, usize) {
    (64 + node / 256, node % 256)
}

fn namespace(service: usize) -> String {
    format!("team-{:03}", service / SERVICES_PER_NAMESPACE)
}

fn service_name(service: usize) -> String {
    format!("svc-{service:04}")
}

/// As long as it is on a pod, where it is often the largest part.
fn managed_fields() -> Value {
    json!([{"apiVersion": "v1", "fieldsType": "FieldsV1", "manager": "kube-controller-manager", "operation": "Update",
        "time": "2026-01-01T00:00:00Z", "fieldsV1": {"f:metadata": {"f:generateName": {}, "f:labels": {".": {},
        "f:app.kubernetes.io/name": {}, "f:pod-template-hash": {}}, "f:ownerReferences": {".": {},
        "k:{\"uid\":\"00000000-0000-4000-8000-000000000001\"}": {}}}, "f:spec": {"f:containers": {"k:{\"name\":\"server\"}": {".": {},
        "f:env": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {}, "f:ports": {}, "f:readinessProbe": {},
        "f:resources": {}}}, "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:serviceAccountName": {}}}}])
}
