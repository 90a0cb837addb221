//! Tables: objects in, what agents are sent out.

use weft_api::Object;
use weft_proto::{
    extension,
    node::{LocalWorkload, Node},
    security::Authorization,
    service::NodePort,
    workload::{
        self as wire, Address, NetworkMode, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address,
        load_balancing::{HealthPolicy, Mode, Scope},
    },
};

use super::{
    incremental::{Changes, Translator},
    *,
};
use crate::{
    enrollment::Enrolled,
    source::{
        Delta,
        manifest::{Format, parse},
    },
};

/// All that agents are sent, by resource name, and what a person should know.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Translation {
    pub addresses: BTreeMap<String, Address>,
    /// By node.
    pub local: BTreeMap<String, BTreeMap<String, LocalWorkload>>,
    pub mesh: MeshConfig,
    pub nodes: BTreeMap<String, Node>,
    pub policies: BTreeMap<String, Authorization>,
    pub problems: BTreeMap<String, String>,
}

impl Translation {
    /// What comes of earlier changes and these.
    pub(crate) fn apply(&mut self, changes: Changes) {
        let Changes { addresses, local, mesh, nodes, policies, problems } = changes;
        apply(&mut self.addresses, addresses);
        for (node, changes) in local {
            apply(self.local.entry(node).or_default(), changes);
        }
        self.local.retain(|_, local| !local.is_empty());
        self.mesh = mesh.unwrap_or_else(|| std::mem::take(&mut self.mesh));
        apply(&mut self.nodes, nodes);
        apply(&mut self.policies, policies);
        apply(&mut self.problems, problems);
    }
}

fn apply<T>(all: &mut BTreeMap<String, T>, changes: BTreeMap<String, Option<T>>) {
    for (name, change) in changes {
        match change {
            Some(new) => drop(all.insert(name, new)),
            None => drop(all.remove(&name)),
        }
    }
}

/// All of it, by a translator that has seen nothing before.
pub(crate) fn anew(mut store: Store, enrolled: &Enrolled, settings: &MeshSettings) -> (Changes, Translator) {
    let touched = store.take_touched();
    let mut translator = Translator::new(settings.clone());
    translator.place(&store, &touched);
    let changes = translator.translate(&store, &touched, enrolled, &BTreeSet::new());
    (changes, translator)
}

fn translate(store: Store, enrolled: &Enrolled, settings: &MeshSettings) -> (Translation, Translator) {
    let (changes, translator) = anew(store, enrolled, settings);
    let mut translation = Translation::default();
    translation.apply(changes);
    (translation, translator)
}

pub(crate) fn settings() -> MeshSettings {
    MeshSettings {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        cluster_id: "Kubernetes".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        pod_networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/16".parse().unwrap()],
        service_networks: vec!["10.2.0.0/16".parse().unwrap()],
        external_networks: Vec::new(),
        netns_annotations: true,
        inbound: Inbound::default(),
        enabled: true,
    }
}

pub(crate) fn objects(text: &str) -> Vec<Object> {
    parse(text, Format::Yaml).unwrap().objects
}

fn store(text: &str) -> Store {
    let mut store = Store::default();
    store.apply(Delta { upserts: objects(text), deletes: Vec::new() });
    store
}

pub(crate) fn translated(text: &str) -> Translation {
    translate(store(text), &Enrolled::default(), &settings()).0
}

impl Translation {
    fn workload(&self, name: &str) -> &Workload {
        match &self.addresses[&format!("Kubernetes/{name}")].r#type {
            Some(address::Type::Workload(workload)) => workload,
            other => panic!("{other:?}"),
        }
    }

    fn service(&self, key: &str) -> &weft_proto::workload::Service {
        match &self.addresses[key].r#type {
            Some(address::Type::Service(service)) => service,
            other => panic!("{other:?}"),
        }
    }

    /// `service:port>target` of a workload.
    fn services(&self, name: &str) -> Vec<String> {
        let services: BTreeMap<_, _> = self.workload(name).services.iter().collect();
        let ports = services.into_iter().flat_map(|(key, list)| {
            list.ports.iter().map(move |p| format!("{key}:{}>{}", p.service_port, p.target_port))
        });
        ports.collect()
    }
}

const SHOP: &str =
    "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {weft.dev/mesh: enabled}}\n---\n";

fn pod(name: &str, ip: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, annotations: {{weft.dev/netns: /n}}}}\n\
         spec: {{nodeName: n1{more}}}\nstatus: {{podIP: {ip:?}}}\n---\n"
    )
}

const WEB: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
    spec: {clusterIP: 10.2.0.1, clusterIPs: [10.2.0.1, 'fd01::1'], externalIPs: [192.0.2.1], \
    ports: [{name: http, port: 80, targetPort: web}, {name: admin, port: 81}, {name: dns, port: 53, protocol: UDP}]}\n---\n";

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\n\
         ports: [{{name: http, port: 8080}}, {{name: dns, port: 5353, protocol: UDP}}, {{name: other, port: 9}}]\n\
         endpoints: {endpoints}\n---\n"
    )
}

#[test]
fn a_pod_becomes_a_workload() {
    let text = "apiVersion: v1\nkind: Pod\n\
        metadata: {name: web-5d4f8c7b9-x2x4z, namespace: shop, labels: {app: front, version: v2, pod-template-hash: 5d4f8c7b9}, \
        ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-5d4f8c7b9, controller: true}]}\n\
        spec: {nodeName: n1, serviceAccountName: web}\nstatus: {podIP: 10.1.0.2, podIPs: [{ip: 10.1.0.2}, {ip: 'fd00::2'}]}\n";
    let translation = translated(text);
    let workload = translation.workload("/Pod/shop/web-5d4f8c7b9-x2x4z");
    let expected = Workload {
        uid: "Kubernetes//Pod/shop/web-5d4f8c7b9-x2x4z".to_owned(),
        name: "web-5d4f8c7b9-x2x4z".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 1, 0, 2].into(), [&[0xfd, 0][..], &[0; 13], &[2]].concat().into()],
        tunnel_protocol: TunnelProtocol::None.into(),
        service_account: "web".to_owned(),
        node: "n1".to_owned(),
        canonical_name: "front".to_owned(),
        canonical_revision: "v2".to_owned(),
        workload_type: WorkloadType::Deployment.into(),
        workload_name: "web".to_owned(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: "Kubernetes".to_owned(),
        ..Workload::default()
    };
    assert_eq!(*workload, expected);
}

#[test]
fn workloads_are_named_after_what_manages_them() {
    for (kind, owner, labels, name, kind_of) in [
        ("ReplicaSet", "web-5d4f8c7b9", "pod-template-hash: 5d4f8c7b9", "web", WorkloadType::Deployment),
        ("ReplicaSet", "web-5d4f8c7b9", "x: y", "web", WorkloadType::Deployment),
        ("ReplicaSet", "web-front", "x: y", "web-front", WorkloadType::Deployment),
        ("ReplicaSet", "web-front", "pod-template-hash: 5d4f8c7b9", "web-front", WorkloadType::Deployment),
        ("ReplicaSet", "web", "x: y", "web", WorkloadType::Deployment),
        ("StatefulSet", "db", "x: y", "db", WorkloadType::Deployment),
        ("Job", "backup-28912345", "x: y", "backup", WorkloadType::Cronjob),
        ("Job", "migrate-7", "x: y", "migrate-7", WorkloadType::Job),
    ] {
        let translation = translated(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: shop, labels: {{{labels}}}, \
             ownerReferences: [{{kind: {kind}, name: {owner}, controller: true}}]}}\nstatus: {{podIP: 10.1.0.2}}\n"
        ));
        let workload = translation.workload("/Pod/shop/p");
        assert_eq!(
            (workload.workload_name.as_str(), workload.canonical_name.as_str(), workload.workload_type()),
            (name, name, kind_of),
            "{kind} {owner} {labels}"
        );
    }
    let alone = translated(&pod("p", "10.1.0.2", ""));
    assert_eq!(alone.workload("/Pod/shop/p").workload_type(), WorkloadType::Pod);
    assert_eq!(alone.workload("/Pod/shop/p").service_account, "default");
}

#[test]
fn only_pods_that_live_somewhere_are_workloads() {
    for (status, there) in [
        ("{podIP: 10.1.0.2}", true),
        ("{podIP: 10.1.0.2, phase: Running}", true),
        ("{podIP: 10.1.0.2, phase: Pending}", true),
        ("{podIP: 10.1.0.2, phase: Succeeded}", false),
        ("{podIP: 10.1.0.2, phase: Failed}", false),
        ("{phase: Running}", false),
    ] {
        let text = format!(
            "{SHOP}apiVersion: v1\nkind: Pod\nmetadata: {{name: p, namespace: shop}}\nspec: {{nodeName: n1}}\nstatus: {status}\n"
        );
        let translation = translated(&text);
        assert_eq!(translation.addresses.len(), usize::from(there), "{status}");
        assert_eq!(translation.local.len(), usize::from(there), "{status}");
        assert_eq!(
            translate(store(&text), &Enrolled::default(), &settings()).1.desired().len(),
            usize::from(there),
            "{status}"
        );
    }
}

#[test]
fn a_pod_on_the_hosts_network_claims_no_address_and_is_nobodys_local_workload() {
    let translation = translated(&(SHOP.to_owned() + &pod("p", "192.0.2.7", ", hostNetwork: true")));
    let workload = translation.workload("/Pod/shop/p");
    assert_eq!(workload.network_mode(), NetworkMode::HostNetwork);
    assert!(workload.addresses.is_empty() && translation.local.is_empty());
}

#[test]
fn published_is_enrolled_as_the_same_pod_and_still_wanted() {
    let uid = "Kubernetes//Pod/shop/web";
    let place = Place { node: "n1".to_owned(), addresses: vec!["10.1.0.2".parse().unwrap()], pod_uid: None };
    let web = pod("web", "10.1.0.2", "");
    let tunnel = |text: &str, enrolled: Option<Place>| {
        let enrolled = enrolled.into_iter().map(|place| (uid.to_owned(), place)).collect();
        translate(store(text), &enrolled, &settings()).0.workload("/Pod/shop/web").tunnel_protocol()
    };
    let meshed = SHOP.to_owned() + &web;
    assert_eq!(tunnel(&meshed, Some(place.clone())), TunnelProtocol::Hbone);
    assert_eq!(tunnel(&meshed, None), TunnelProtocol::None);
    assert_eq!(tunnel(&web, Some(place.clone())), TunnelProtocol::None, "not wanted");
    assert_eq!(tunnel(&meshed, Some(Place { node: "n2".to_owned(), ..place.clone() })), TunnelProtocol::None);
    assert_eq!(tunnel(&meshed, Some(Place { pod_uid: Some("1".to_owned()), ..place })), TunnelProtocol::None);
}

#[test]
fn local_workloads_say_what_labels_want() {
    let text = SHOP.to_owned()
        + &pod("a", "10.1.0.2", "")
        + "apiVersion: v1\nkind: Pod\n\
        metadata: {name: b, namespace: shop, labels: {weft.dev/mesh: disabled}}\nspec: {nodeName: n2}\nstatus: {podIP: 10.1.0.3}\n";
    let translation = translated(&text);
    let a = &translation.local["n1"]["Kubernetes//Pod/shop/a"];
    assert_eq!((a.enroll, a.netns_path.as_str()), (true, "/n"));
    let b = &translation.local["n2"]["Kubernetes//Pod/shop/b"];
    assert_eq!((b.enroll, b.netns_path.as_str()), (false, ""));
    // In a cluster whoever may write pods must not name other pods' namespaces.
    let cluster = MeshSettings { netns_annotations: false, ..settings() };
    let translation = translate(store(&text), &Enrolled::default(), &cluster).0;
    assert_eq!(translation.local["n1"]["Kubernetes//Pod/shop/a"].netns_path, "");
}

#[test]
fn a_service_and_what_is_behind_it() {
    let text = pod("a", "10.1.0.2", "")
        + &pod("b", "10.1.0.3", "")
        + WEB
        + &slice(
            "web-1",
            "[{addresses: [10.1.0.2], targetRef: {kind: Pod, name: a}}, {addresses: [10.1.0.3]}]",
        );
    let translation = translated(&text);
    let service = translation.service("shop/web.shop.svc.cluster.local");
    assert_eq!(service.hostname, "web.shop.svc.cluster.local");
    let addresses: Vec<_> = service.addresses.iter().map(|a| a.address.len()).collect();
    assert_eq!(addresses, [4, 16], "who captures these captures all their ports");
    let traits = extension::traits(&service.extensions).unwrap();
    assert_eq!((traits.external_addresses, traits.node_ports), (vec![vec![192, 0, 2, 1]], vec![]));
    let ports: Vec<_> = service.ports.iter().map(|p| (p.service_port, p.target_port)).collect();
    assert_eq!(ports, [(80, 0), (81, 81)], "a named target port differs by endpoint; UDP is not there");
    // By reference, and by address. The slice serves only one of the two TCP ports.
    for name in ["/Pod/shop/a", "/Pod/shop/b"] {
        assert_eq!(translation.services(name), ["shop/web.shop.svc.cluster.local:80>8080"]);
    }
    assert_eq!(translation.addresses.len(), 3);
}

#[test]
fn a_service_at_ports_of_nodes_and_of_a_load_balancer() {
    let traits = |text: &str| {
        extension::traits(&translated(text).service("shop/web.shop.svc.cluster.local").extensions).unwrap()
    };
    let text = WEB.replace("spec: {", "spec: {type: LoadBalancer, ").replace("port: 81}", "port: 81, nodePort: 30081}")
        .replace("---", "status: {loadBalancer: {ingress: [{ip: 192.0.2.2, ipMode: VIP}, {ip: 192.0.2.3, ipMode: Proxy}]}}\n---");
    let found = traits(&text);
    assert_eq!(found.external_addresses, [vec![192, 0, 2, 1], vec![192, 0, 2, 2]]);
    assert_eq!(found.node_ports, [NodePort { service_port: 81, node_port: 30081 }]);
    let bare = WEB.replace("externalIPs: [192.0.2.1], ", "");
    assert!(translated(&bare).service("shop/web.shop.svc.cluster.local").extensions.is_empty());
}

#[test]
fn nodes_are_heard_of_by_themselves() {
    let node = |address: &str| {
        format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\nstatus: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n---\n"
        )
    };
    let translation = translated(&node("192.0.2.1"));
    assert_eq!(translation.nodes["n1"].addresses, [[192, 0, 2, 1]]);
    assert_eq!(
        translation.mesh,
        translated(&node("192.0.2.2")).mesh,
        "a change of one is no change of the mesh"
    );
}

#[test]
fn endpoints_without_a_pod() {
    let text = pod("a", "10.1.0.2", "")
        + &pod("host", "192.0.2.7", ", hostNetwork: true")
        + WEB
        + &slice(
            "web-1",
            "[{addresses: [192.0.2.9], nodeName: n9}, {addresses: [192.0.2.7], targetRef: {kind: Pod, name: host}}, \
            {addresses: [10.1.0.99], targetRef: {kind: Pod, name: gone}}, {addresses: [10.1.0.98], targetRef: {kind: Pod, name: a}}]",
        )
        + &slice("web-2", "[{addresses: [192.0.2.9]}]");
    let translation = translated(&text);
    let uid = |slice: &str, address: &str| format!("discovery.k8s.io/EndpointSlice/shop/{slice}/{address}");
    let outside = translation.workload(&uid("web-1", "192.0.2.9"));
    assert_eq!(
        (outside.tunnel_protocol(), outside.network_mode()),
        (TunnelProtocol::None, NetworkMode::Standard)
    );
    assert_eq!((outside.node.as_str(), outside.addresses.len()), ("n9", 1));
    assert_eq!(translation.services(&uid("web-1", "192.0.2.9")).len(), 1);
    // Shared addresses serve as endpoints, and are not to be looked up.
    for name in [uid("web-1", "192.0.2.7"), uid("web-2", "192.0.2.9")] {
        assert_eq!(translation.workload(&name).network_mode(), NetworkMode::HostNetwork, "{name}");
    }
    // A pod that is gone or has moved leaves nothing that could be taken for an address outside the mesh.
    assert!(
        !translation.addresses.keys().any(|name| name.contains("10.1.0.9")),
        "{:?}",
        translation.addresses.keys()
    );
}

#[test]
fn readiness() {
    let lenient = WEB.replace("ports:", "publishNotReadyAddresses: true, ports:");
    for (service, conditions, status) in [
        (WEB, "{}", WorkloadStatus::Healthy),
        (WEB, "{ready: true}", WorkloadStatus::Healthy),
        (WEB, "{ready: null}", WorkloadStatus::Healthy),
        (WEB, "{ready: false}", WorkloadStatus::Unhealthy),
        (WEB, "{ready: false, serving: true, terminating: true}", WorkloadStatus::Unhealthy),
        (&lenient, "{ready: false}", WorkloadStatus::Healthy),
    ] {
        let endpoints = format!("[{{addresses: [10.1.0.2], conditions: {conditions}}}]");
        let translation = translated(&(pod("a", "10.1.0.2", "") + service + &slice("web-1", &endpoints)));
        let workload = translation.workload("/Pod/shop/a");
        assert_eq!(workload.status(), status, "{conditions}");
        assert_eq!(extension::is_draining(&workload.extensions), conditions.contains("serving: true"));
    }
}

/// The Service of [`WEB`] with something more in its spec.
fn web_with(more: &str) -> wire::Service {
    let service = WEB.replace("ports:", &format!("{more}, ports:"));
    translated(&service).service("shop/web.shop.svc.cluster.local").clone()
}

#[test]
fn which_endpoints_are_preferred() {
    let (zone, node) = (Scope::Zone.into(), Scope::Node.into());
    for (spec, expected) in [
        ("internalTrafficPolicy: Cluster", None),
        ("internalTrafficPolicy: Local", Some((Mode::Strict, vec![node]))),
        ("trafficDistribution: PreferClose", Some((Mode::Failover, vec![zone]))),
        ("trafficDistribution: PreferSameZone", Some((Mode::Failover, vec![zone]))),
        ("trafficDistribution: PreferSameNode", Some((Mode::Failover, vec![zone, node]))),
        ("trafficDistribution: PreferSomethingNew", None),
        ("trafficDistribution: PreferClose, internalTrafficPolicy: Local", Some((Mode::Strict, vec![node]))),
    ] {
        let choice = web_with(spec).load_balancing;
        assert_eq!(choice.map(|c| (c.mode(), c.routing_preference)), expected, "{spec}");
    }
    let lenient = web_with("publishNotReadyAddresses: true").load_balancing.unwrap();
    assert_eq!(lenient.health_policy(), HealthPolicy::AllowAll);
}

#[test]
fn session_affinity() {
    for (spec, seconds) in [
        ("sessionAffinity: None", 0),
        ("sessionAffinity: ClientIP", 10_800),
        ("sessionAffinity: ClientIP, sessionAffinityConfig: {clientIP: {timeoutSeconds: 30}}", 30),
    ] {
        let traits = extension::traits(&web_with(spec).extensions).unwrap();
        assert_eq!(traits.client_affinity_seconds, seconds, "{spec}");
    }
}

#[test]
fn a_pod_is_where_its_node_is() {
    let node = |labels: &str| {
        format!("---\napiVersion: v1\nkind: Node\nmetadata: {{name: n1, labels: {{{labels}}}}}\n---\n")
    };
    let locality = |labels: &str| {
        let translation = translated(&(node(labels) + &pod("a", "10.1.0.2", "")));
        translation.workload("/Pod/shop/a").locality.clone().map(|at| (at.region, at.zone))
    };
    assert_eq!(locality(""), None);
    let both = locality("topology.kubernetes.io/region: r, topology.kubernetes.io/zone: z");
    assert_eq!(both, Some(("r".to_owned(), "z".to_owned())));
}

#[test]
fn services_without_addresses_of_their_own() {
    let service = |spec: &str| {
        translated(&format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\n"
        ))
    };
    let headless = service("{clusterIP: None, clusterIPs: [None], ports: [{port: 80}]}");
    assert!(headless.service("shop/web.shop.svc.cluster.local").addresses.is_empty());
    assert!(service("{type: ExternalName, externalName: example.org}").addresses.is_empty());
}

#[test]
fn problems_name_the_object() {
    for (text, subject, words) in [
        (SHOP.to_owned() + &pod("a", "10.9.0.2", ""), "Pod shop/a", "outside the pod networks"),
        (
            pod("a", "10.1.0.2", "") + &pod("b", "10.1.0.2", ""),
            "address 10.1.0.2",
            "shop/a, shop/b all claim it",
        ),
        (SHOP.replace("enabled", "enable") + &pod("a", "10.1.0.2", ""), "Pod shop/a", "\"enable\""),
        (
            SHOP.to_owned() + &pod("a", "10.1.0.2", "").replace("weft.dev/netns", "x"),
            "Pod shop/a",
            "weft.dev/netns",
        ),
        (WEB.replace("10.2.0.1", "10.9.0.1"), "Service shop/web", "outside the service networks"),
    ] {
        let problems = translated(&text).problems;
        assert!(problems.get(subject).is_some_and(|p| p.contains(words)), "{text}\n{problems:?}");
    }
    assert!(translated(&(SHOP.to_owned() + &pod("a", "10.1.0.2", ""))).problems.is_empty());
}

#[test]
fn identities_follow_live_labelled_pods() {
    let id = |account: &str| SpiffeId::new(settings().trust_domain, "shop", account).unwrap();
    let text = pod("a", "10.1.0.2", ", serviceAccountName: web")
        + &pod("b", "10.1.0.3", ", serviceAccountName: db")
            .replace("annotations", "labels: {weft.dev/mesh: disabled}, annotations")
        + &pod("new", "", ", serviceAccountName: new")
        + &pod("old", "10.1.0.4", ", serviceAccountName: old").replace("podIP", "phase: Succeeded, podIP")
        + &pod("host", "192.0.2.7", ", serviceAccountName: host, hostNetwork: true");
    let (_, translator) = translate(store(&(SHOP.to_owned() + &text)), &Enrolled::default(), &settings());
    let identities = translator.identities();
    for (node, account, claim) in [
        ("n1", "web", Claim::Granted),
        ("n1", "new", Claim::Granted),
        ("n2", "web", Claim::NotOnNode),
        ("n1", "db", Claim::Unlabelled),
        ("n1", "old", Claim::NotOnNode),
        ("n1", "host", Claim::Unlabelled),
        ("n1", "nobody", Claim::NotOnNode),
    ] {
        assert_eq!(identities.claim(node, &id(account)), claim, "{node} {account}");
    }
}

#[test]
fn the_order_of_objects_does_not_matter() {
    let text = SHOP.to_owned()
        + &pod("a", "10.1.0.2", "")
        + &pod("b", "10.1.0.3", "")
        + WEB
        + &slice("web-1", "[{addresses: [10.1.0.2]}]")
        + &slice("web-2", "[{addresses: [10.1.0.3]}]");
    let mut reversed = Store::default();
    let upserts = objects(&text).into_iter().rev().collect();
    reversed.apply(Delta { upserts, deletes: Vec::new() });
    assert_eq!(translate(reversed, &Enrolled::default(), &settings()).0, translated(&text));
}

#[test]
fn in_a_cluster_a_node_hears_of_pods_before_their_address() {
    let text = format!(
        "{SHOP}{}{}{}",
        pod("early", "", ""),
        pod("host", "192.0.2.1", ", hostNetwork: true"),
        "apiVersion: v1\nkind: Pod\nmetadata: {name: outside, namespace: legacy, uid: u1}\nspec: {nodeName: n1}\n"
    );
    let local = |netns_annotations: bool| {
        let settings = MeshSettings { netns_annotations, ..settings() };
        let local = translate(store(&text), &Enrolled::default(), &settings).0.local;
        let of_node = local.get("n1").into_iter().flatten();
        of_node.map(|(uid, pod)| (uid.clone(), pod.enroll, pod.pod_uid.clone())).collect::<Vec<_>>()
    };
    let uid = |name: &str| format!("Kubernetes//Pod/{name}");
    assert_eq!(
        local(false),
        [(uid("legacy/outside"), false, "u1".to_owned()), (uid("shop/early"), true, String::new())]
    );
    assert_eq!(local(true), []);
    let settings = MeshSettings { netns_annotations: false, ..settings() };
    assert_eq!(waiting(&store(&text), &settings, "n1").into_iter().collect::<Vec<_>>(), [uid("shop/early")]);
    assert_eq!(waiting(&store(&text), &settings, "n2").len(), 0);
}

#[test]
fn a_mesh_that_would_capture_nothing_is_noticed() {
    let bare = MeshSettings { pod_networks: Vec::new(), service_networks: Vec::new(), ..settings() };
    let uncaptured = |text: &str| uncaptured(&translate(store(text), &Enrolled::default(), &bare).0.mesh);
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.244.0.0/24}\n---\n";
    let cidr = "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: a}\nspec: {cidrs: [10.96.0.0/16]}\n";
    assert!(uncaptured(cidr).unwrap().starts_with("pod networks"));
    assert!(uncaptured(node).unwrap().starts_with("service networks"));
    assert_eq!(uncaptured(&format!("{node}{cidr}")), None);
}
