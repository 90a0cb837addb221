//! What is read from an object, and where an error is said to be.
#![allow(clippy::unwrap_used, reason = "tests")]

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use weft_api::{
    EndpointSlice, Kind, Namespace, Node, Object, Pod, Service, ServiceCidr, field::is_dns_subdomain,
};

/// The path and the words of the error.
fn refused<T: DeserializeOwned>(value: Value) -> (String, String) {
    let text = value.to_string();
    let mut deserializer = serde_json::Deserializer::from_str(&text);
    match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Ok(_) => panic!("accepted: {text}"),
        Err(error) => (error.path().to_string(), error.inner().to_string()),
    }
}

fn read<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_pod_as_the_api_server_writes_it() {
    let pod: Pod = read(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "web-5d4f8c7b9-abcde", "namespace": "shop", "uid": "1234", "labels": {"app": "web"},
            "annotations": null, "managedFields": [{"manager": "kubelet"}],
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5d4f8c7b9", "controller": true}]
        },
        "spec": {"nodeName": "n1", "containers": [{"name": "web"}], "serviceAccountName": "web"},
        "status": {
            "phase": "Running", "podIP": "10.1.0.2", "podIPs": [{"ip": "10.1.0.2"}, {"ip": "fd00::2"}],
            "conditions": [{"type": "Ready", "status": "True"}]
        }
    }));
    assert_eq!(
        pod.addresses(),
        ["10.1.0.2".parse::<std::net::IpAddr>().unwrap(), "fd00::2".parse().unwrap()]
    );
    assert_eq!(pod.service_account(), "web");
    assert_eq!(pod.ready(), Some(true));
    assert!(!pod.is_gone());
    assert_eq!(pod.metadata.controller().unwrap().name, "web-5d4f8c7b9");
}

#[test]
fn what_weft_writes_on_a_pod_is_no_change_of_the_mesh() {
    let pod = |ready: &str, enrolled: &str, extra: &str| -> Pod {
        read(json!({"metadata": {"name": "web"}, "status": {"conditions": [
            {"type": "PodScheduled", "status": extra, "lastProbeTime": null},
            {"type": "Ready", "status": ready},
            {"type": "weft.dev/Enrolled", "status": enrolled, "reason": "R", "message": null,
                "lastTransitionTime": "2026-01-02T03:04:05Z"}
        ]}}))
    };
    let one = pod("True", "True", "True");
    let enrolled = one.status.conditions.enrolled.clone().unwrap();
    assert_eq!((enrolled.is_true(), enrolled.reason.as_str(), enrolled.message.as_str()), (true, "R", ""));
    assert_eq!(one, pod("True", "True", "False"), "conditions that nobody reads are kept");
    let echo = pod("True", "False", "True");
    assert!(one != echo && one.is_same_to_mesh(&echo));
    assert!(!one.is_same_to_mesh(&pod("False", "True", "True")));
}

#[test]
fn a_pod_in_its_first_moment_has_neither_node_nor_address() {
    let pod: Pod = read(json!({"metadata": {"name": "web", "labels": null}, "spec": null,
        "status": {"podIP": "", "podIPs": null, "conditions": null}}));
    assert!(pod.addresses().is_empty());
    assert_eq!(pod.spec.node_name, None);
    assert_eq!(pod.service_account(), "default");
}

#[test]
fn mapped_addresses_are_the_ipv4_address_they_mean() {
    let pod: Pod = read(json!({"metadata": {"name": "web"}, "status": {"podIP": "::ffff:10.1.0.2"}}));
    assert_eq!(pod.addresses(), ["10.1.0.2".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn a_service_with_and_without_addresses() {
    let service: Service = read(json!({"metadata": {"name": "web"}, "spec": {
        "clusterIP": "10.2.0.1", "clusterIPs": ["10.2.0.1", "fd01::1"], "externalIPs": ["192.0.2.1"],
        "ports": [{"port": 80, "targetPort": "http"}, {"port": 53, "protocol": "UDP", "name": "dns"}]
    }}));
    assert_eq!(service.cluster_addresses().len(), 2);
    assert_eq!(service.external_addresses(), ["192.0.2.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(service.tcp_ports().count(), 1);
    let headless: Service =
        read(json!({"metadata": {"name": "web"}, "spec": {"clusterIP": "None", "clusterIPs": ["None"]}}));
    assert!(headless.cluster_addresses().is_empty());
}

#[test]
fn a_service_that_is_reached_from_outside() {
    let service = |kind: &str, cluster_ip: &str| -> Service {
        read(json!({"metadata": {"name": "web"}, "spec": {
            "type": kind, "clusterIP": cluster_ip, "externalIPs": ["192.0.2.1", "192.0.2.2"], "healthCheckNodePort": 32000,
            "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP", "nodePort": 30053}, {"port": 81}]
        }, "status": {"loadBalancer": {"ingress": [
            {"ip": "192.0.2.2"}, {"ip": "192.0.2.3", "ipMode": "VIP", "ports": []}, {"ip": "192.0.2.4", "ipMode": "Proxy"},
            {"ip": "192.0.2.5", "ipMode": "Other"}, {"hostname": "lb.example.org"}, {"hostname": "", "ip": ""}
        ]}}}))
    };
    for (kind, cluster_ip, addresses, ports) in [
        ("LoadBalancer", "10.2.0.1", vec![1, 2, 3], vec![(80, 30080)]),
        ("NodePort", "10.2.0.1", vec![1, 2], vec![(80, 30080)]),
        ("ClusterIP", "10.2.0.1", vec![1, 2], vec![]),
        ("ClusterIP", "None", vec![], vec![]),
    ] {
        let service = service(kind, cluster_ip);
        let expected: Vec<std::net::IpAddr> =
            addresses.iter().map(|host| [192, 0, 2, *host].into()).collect();
        assert_eq!(service.external_addresses(), expected, "{kind} {cluster_ip}");
        let found: Vec<_> = service.node_ports().map(|(port, node)| (port.port.get(), node)).collect();
        assert_eq!(found, ports, "{kind} {cluster_ip}");
    }
}

#[test]
fn errors_name_their_field() {
    let cases = [
        (
            refused::<Namespace>(json!({"metadata": {"name": "a", "labels": {"weft.dev/mesh": true}}})),
            "metadata.labels.weft.dev/mesh",
            "invalid type: boolean `true`",
        ),
        (refused::<Namespace>(json!({"metadata": {"name": "A/b"}})), "metadata.name", "is not a name"),
        (refused::<Namespace>(json!({"metadata": {}})), "metadata", "missing field `name`"),
        (
            refused::<Pod>(json!({"metadata": {"name": "a"}, "status": {"podIP": "10.0.0.300"}})),
            "status.podIP",
            "is not an IP address",
        ),
        (
            refused::<Pod>(
                json!({"metadata": {"name": "a"}, "status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": 7}]}}),
            ),
            "status.podIPs[1].ip",
            "invalid type: integer `7`",
        ),
        (
            refused::<Pod>(json!({"metadata": {"name": "a"}, "spec": {"serviceAccountName": "a/sa/b"}})),
            "spec.serviceAccountName",
            "is not a name",
        ),
        (
            refused::<Pod>(json!({"metadata": {"name": "a"}, "spec": {"hostNetwork": "yes"}})),
            "spec.hostNetwork",
            "invalid type: string",
        ),
        (
            refused::<Pod>(json!({"metadata": {"name": "a"}, "status": {"phase": "Runing"}})),
            "status.phase",
            "unknown variant `Runing`",
        ),
        (
            refused::<Service>(json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 0}]}})),
            "spec.ports[0].port",
            "nonzero",
        ),
        (
            refused::<Service>(json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 70000}]}})),
            "spec.ports[0].port",
            "70000",
        ),
        (
            refused::<Service>(
                json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80, "targetPort": 70000}]}}),
            ),
            "spec.ports[0].targetPort",
            "not a port number",
        ),
        (
            refused::<Service>(json!({"metadata": {"name": "a"}, "spec": {"clusterIP": "none"}})),
            "spec.clusterIP",
            "neither an IP address nor",
        ),
        (
            refused::<EndpointSlice>(json!({"metadata": {"name": "a"}, "addressType": "ipv4"})),
            "addressType",
            "unknown variant",
        ),
    ];
    for ((path, message), expected_path, expected_words) in cases {
        assert_eq!(path, expected_path, "{message}");
        assert!(message.contains(expected_words), "{path}: {message}");
    }
}

#[test]
fn a_slice_holds_addresses_of_its_type() {
    let slice = |family: &str, address: &str| {
        let slice: EndpointSlice = read(
            json!({"metadata": {"name": "a"}, "addressType": family, "endpoints": [{"addresses": [address]}]}),
        );
        Object::EndpointSlice(slice.into()).validate()
    };
    assert_eq!(slice("IPv4", "10.0.0.1"), Ok(()));
    assert_eq!(slice("IPv6", "fd00::1"), Ok(()));
    assert_eq!(slice("FQDN", "example.org"), Ok(()));
    for (family, address) in [("IPv4", "fd00::1"), ("IPv6", "10.0.0.1"), ("IPv4", "example.org")] {
        assert_eq!(
            slice(family, address).unwrap_err().path,
            "endpoints[0].addresses[0]",
            "{family} {address}"
        );
    }
}

#[test]
fn names_cannot_smuggle_separators() {
    for good in ["a", "a-b", "a.b", "0", "10.0.0.1"] {
        assert!(is_dns_subdomain(good), "{good}");
    }
    for bad in ["", ".", "..", "a.", ".a", "-a", "a-", "a/b", "A", "a b", "a_b", "ä", &"a".repeat(254)] {
        assert!(!is_dns_subdomain(bad), "{bad}");
    }
}

#[test]
fn a_node_as_the_api_server_writes_it() {
    let node: Node = read(json!({
        "metadata": {"name": "n1", "uid": "1"},
        "spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24", "fd00:1::5/64"], "taints": []},
        "status": {"addresses": [
            {"type": "InternalIP", "address": "192.0.2.1"}, {"type": "ExternalIP", "address": "::ffff:203.0.113.1"},
            {"type": "Hostname", "address": "10.9.9.9"}, {"type": "InternalIP", "address": "n1.example.org"}
        ]}
    }));
    let networks: Vec<String> = node.pod_networks().map(|n| n.to_string()).collect();
    assert_eq!(networks, ["10.1.0.0/24", "10.1.0.0/24", "fd00:1::/64"]);
    let addresses: Vec<String> = node.addresses().map(|a| a.to_string()).collect();
    assert_eq!(addresses, ["192.0.2.1", "203.0.113.1"]);
    assert_eq!(Object::Node(node.into()).key().to_string(), "Node n1");
    let bare: Node = read(json!({"metadata": {"name": "n1"}, "spec": {"podCIDR": "", "podCIDRs": null}}));
    assert_eq!(bare.pod_networks().count(), 0);
    assert_eq!(
        refused::<Node>(json!({"metadata": {"name": "n1"}, "spec": {"podCIDRs": ["10.1.0.0"]}})).0,
        "spec.podCIDRs"
    );
}

#[test]
fn a_service_cidr_is_in_no_namespace() {
    let cidr: ServiceCidr =
        read(json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd01::/112"]}}));
    assert_eq!(cidr.spec.cidrs.len(), 2);
    assert_eq!(Object::ServiceCidr(cidr.into()).key().to_string(), "ServiceCIDR kubernetes");
    for kind in Kind::ALL {
        assert_eq!(Kind::find(kind.api_version(), kind.as_str()), Some(kind));
    }
}

#[test]
fn kinds_are_told_apart_by_version_too() {
    assert_eq!(Kind::find("v1", "Pod"), Some(Kind::Pod));
    assert_eq!(Kind::find("discovery.k8s.io/v1", "EndpointSlice"), Some(Kind::EndpointSlice));
    assert_eq!(Kind::find("discovery.k8s.io/v1beta1", "EndpointSlice"), None);
    assert_eq!(Kind::find("metrics.k8s.io/v1", "Pod"), None);
}
