//! Whatever happened before, what is served is what a controller that starts anew would serve: random changes of objects
//! and random reports, each compared with a translation from scratch. Names and addresses are few, so that everything
//! gets in the way of everything.

use serde_json::{Value, json};
use weft_api::{Kind, Object, ObjectKey};

use super::*;
use crate::{
    source::manifest,
    state_dir::{StateDir, tests::temporary},
    translate::tests::{anew, settings},
};

/// Numbers that look random and are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    /// Once in so many times.
    fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
}

const NAMESPACES: [&str; 2] = ["blue", "red"];
const PODS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const SERVICES: [&str; 3] = ["api", "db", "web"];
const SLICES: [&str; 5] = ["s1", "s2", "s3", "s4", "s5"];
const NODES: [&str; 3] = ["n1", "n2", "n3"];
/// Of pods, nodes, Services and machines outside, in turns.
const ADDRESSES: [&str; 8] =
    ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.9.0.1", "192.0.2.1", "192.0.2.2", "10.2.0.1"];

fn object(kind: Kind, random: &mut Random) -> Value {
    match kind {
        Kind::Namespace => {
            let metadata = json!({
                "name": random.pick(&NAMESPACES), "labels": mesh_label(random), "annotations": inbound(random),
            });
            json!({"metadata": metadata})
        }
        Kind::Pod => pod(random),
        Kind::Service => service(random),
        Kind::EndpointSlice => slice(random),
        Kind::Node => {
            let networks = ["10.1.0.0/24", "10.9.0.0/24", "10.244.0.0/24"];
            let network = random.pick(&networks);
            let addresses = json!([{"type": "InternalIP", "address": random.pick(&ADDRESSES)}]);
            let zone = json!({"topology.kubernetes.io/zone": random.pick(&["z1", "z2"])});
            let labels = if random.one_in(3) { json!({}) } else { zone };
            json!({"metadata": {"name": random.pick(&NODES), "labels": labels}, "spec": {"podCIDRs": [network]}, "status": {"addresses": addresses}})
        }
        Kind::ServiceCidr => {
            let networks = [random.pick(&["10.3.0.0/24", "10.4.0.0/24"])];
            json!({"metadata": {"name": random.pick(&["one", "two"])}, "spec": {"cidrs": networks}})
        }
        Kind::AuthorizationPolicy => policy(random),
    }
}

fn inbound(random: &mut Random) -> Value {
    match random.below(5) {
        0 => {
            json!({"policy.weft.dev/default-inbound": random.pick(&["deny", "audit", "all-authenticated", "?"])})
        }
        1 => json!({"weft.dev/cut-existing-connections": random.pick(&["true", "false", "?"])}),
        _ => json!({}),
    }
}

fn policy(random: &mut Random) -> Value {
    let targets = json!([{"kind": "Service", "name": random.pick(&SERVICES)}]);
    let mut spec = match random.below(4) {
        0 => json!({"selector": {"matchLabels": {"app": random.pick(&["a", "b"])}}}),
        1 => json!({"targetRefs": targets}),
        2 => json!({"targetRefs": [{"kind": "Planet", "name": "mars"}]}),
        _ => json!({}),
    };
    spec["action"] = random.pick(&["Allow", "Deny", "Audit"]).into();
    spec["rules"] = json!([{"from": [{"namespaces": [random.pick(&NAMESPACES)]}]}]);
    json!({
        "metadata": {"name": random.pick(&["p", "q", "r"]), "namespace": random.pick(&NAMESPACES)}, "spec": spec,
    })
}

fn mesh_label(random: &mut Random) -> Value {
    match random.below(6) {
        0 => json!({}),
        1 => json!({"weft.dev/mesh": "disabled"}),
        2 => json!({"weft.dev/mesh": "enable"}),
        _ => json!({"weft.dev/mesh": "enabled"}),
    }
}

fn pod(random: &mut Random) -> Value {
    let mut metadata = json!({"name": random.pick(&PODS), "namespace": random.pick(&NAMESPACES), "uid": random.pick(&["1", "2"])});
    if random.one_in(4) {
        metadata["labels"] = mesh_label(random);
    }
    if random.one_in(2) {
        metadata["labels"]["app"] = random.pick(&["a", "b"]).into();
    }
    metadata["annotations"] = inbound(random);
    if !random.one_in(4) {
        metadata["annotations"]["weft.dev/netns"] = "/n".into();
    }
    let mut spec =
        json!({"serviceAccountName": random.pick(&["default", "robot"]), "hostNetwork": random.one_in(6)});
    if !random.one_in(8) {
        spec["nodeName"] = json!(random.pick(&NODES));
    }
    let mut status = json!({"phase": random.pick(&["Running", "Running", "Running", "Pending", "Failed"])});
    if !random.one_in(6) {
        let address = random.pick(&ADDRESSES);
        status["podIP"] = json!(address);
        status["podIPs"] = json!([{"ip": address}, {"ip": random.pick(&[address, "fd00::1", "fd00::2"])}]);
    }
    json!({"metadata": metadata, "spec": spec, "status": status})
}

fn service(random: &mut Random) -> Value {
    let mut ports =
        vec![json!({"name": "http", "port": 80, "targetPort": "http", "nodePort": random.below(2) + 30080})];
    if random.one_in(2) {
        ports.push(json!({"name": "admin", "port": random.below(2) + 81}));
    }
    json!({
        "metadata": {"name": random.pick(&SERVICES), "namespace": random.pick(&NAMESPACES)},
        "spec": {
            "type": random.pick(&["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]),
            "externalIPs": [random.pick(&ADDRESSES)],
            "clusterIP": random.pick(&["10.2.0.1", "10.2.0.2", "10.3.0.1", "192.0.2.1", "None"]), "ports": ports,
            "publishNotReadyAddresses": random.one_in(3),
            "sessionAffinity": random.pick(&["None", "ClientIP"]),
            "selector": if random.one_in(2) { json!({"app": random.pick(&["a", "b"])}) } else { json!({}) },
        },
        "status": {"loadBalancer": {"ingress": [
            {"ip": random.pick(&ADDRESSES), "ipMode": random.pick(&["VIP", "Proxy"])},
        ]}},
    })
}

fn slice(random: &mut Random) -> Value {
    let endpoints: Vec<Value> = (0..random.below(5))
        .map(|_| {
            let conditions = json!({"ready": !random.one_in(3), "terminating": random.one_in(2)});
            let mut endpoint = json!({"addresses": [random.pick(&ADDRESSES)], "conditions": conditions});
            if random.one_in(3) {
                endpoint["nodeName"] = json!(random.pick(&NODES));
            }
            if !random.one_in(3) {
                endpoint["targetRef"] = json!({"kind": "Pod", "name": random.pick(&PODS)});
                if random.one_in(4) {
                    endpoint["targetRef"]["namespace"] = json!(random.pick(&NAMESPACES));
                }
            }
            endpoint
        })
        .collect();
    let mut ports = vec![json!({"name": "http", "port": random.below(2) + 8080})];
    if random.one_in(2) {
        ports.push(json!({"name": "admin", "port": 9090}));
    }
    json!({
        "metadata": {
            "name": random.pick(&SLICES), "namespace": random.pick(&NAMESPACES),
            "labels": {"kubernetes.io/service-name": random.pick(&["api", "db", "web", "none"])},
        },
        "addressType": if random.one_in(10) { "FQDN" } else { "IPv4" }, "endpoints": endpoints, "ports": ports,
    })
}

/// One to three objects that are there from now on, or are gone.
fn delta(random: &mut Random, objects: &BTreeMap<ObjectKey, Object>) -> Delta {
    const KINDS: [Kind; 14] = [
        Kind::Pod,
        Kind::Pod,
        Kind::Pod,
        Kind::Pod,
        Kind::EndpointSlice,
        Kind::EndpointSlice,
        Kind::EndpointSlice,
        Kind::Service,
        Kind::Service,
        Kind::Namespace,
        Kind::Node,
        Kind::ServiceCidr,
        Kind::AuthorizationPolicy,
        Kind::AuthorizationPolicy,
    ];
    let mut delta = Delta::default();
    for _ in 0..=random.below(3) {
        if random.one_in(4) && !objects.is_empty() {
            delta.deletes.extend(objects.keys().nth(random.below(objects.len())).cloned());
        } else {
            let kind = KINDS[random.below(KINDS.len())];
            delta.upserts.push(manifest::read(kind, &object(kind, random)).unwrap());
        }
    }
    delta
}

fn note(objects: &mut BTreeMap<ObjectKey, Object>, delta: &Delta) {
    delta.deletes.iter().for_each(|key| drop(objects.remove(key)));
    objects.extend(delta.upserts.iter().map(|object| (object.key(), object.clone())));
}

fn all(objects: &BTreeMap<ObjectKey, Object>) -> Delta {
    Delta { upserts: objects.values().cloned().collect(), deletes: Vec::new() }
}

/// By node and uid.
type Failing = BTreeMap<(String, String), String>;

fn uid(random: &mut Random) -> String {
    format!("Kubernetes//Pod/{}/{}", random.pick(&NAMESPACES), random.pick(&PODS))
}

/// What comes of it for `failing`, with all that the agent says.
fn report(controller: &mut Controller, random: &mut Random, failing: &mut Failing) {
    let enrolled = (0..random.below(6)).map(|_| uid(random)).collect();
    let failures: Failures =
        (0..random.below(4)).map(|_| (uid(random), random.pick(&["why", "because"]).to_owned())).collect();
    let (done, _) = oneshot::channel();
    let node = random.pick(&NODES).to_owned();
    if controller.snapshots.borrow().is_some() {
        failing.retain(|(of, _), _| *of != node);
        failing.extend(failures.iter().map(|(uid, why)| ((node.clone(), uid.clone()), why.clone())));
    }
    controller.report(Report { node, enrolled, failures, trust: 0, done });
}

fn start(state: &StateDir, settings: &MeshSettings) -> (Controller, Published) {
    Controller::new(settings.clone(), Enrollment::load(state.clone()).unwrap(), Metrics::default())
}

/// Everything that others work on.
fn same(controller: &Controller, objects: &BTreeMap<ObjectKey, Object>, settings: &MeshSettings, when: &str) {
    let mut store = Store::default();
    store.apply(all(objects));
    for node in NODES {
        let waiting = |store: &Store| translate::waiting(store, settings, node);
        assert_eq!(waiting(&controller.store), waiting(&store), "{when}");
    }
    let (mut changes, translator) = anew(store, controller.enrollment.enrolled(), settings);
    let problems: BTreeMap<String, String> = std::mem::take(&mut changes.problems)
        .into_iter()
        .filter_map(|(what, why)| Some((what, why?)))
        .collect();
    assert_eq!(controller.problems, problems, "{when}");
    assert_eq!(controller.translator.desired(), translator.desired(), "{when}");
    assert_eq!(**controller.identities.borrow().as_ref().unwrap(), *translator.identities(), "{when}");
    let mut builder = Builder::default();
    builder.apply(changes);
    let snapshot = builder.build().unwrap();
    let served = controller.snapshots.borrow().clone().unwrap();
    assert_eq!(served.shared, snapshot.shared, "{when}");
    assert_eq!(served.per_node, snapshot.per_node, "{when}");
}

/// Of all that agents said, what is about pods that are to be in the mesh still counts, and is counted.
fn same_failures(controller: &Controller, failing: &mut Failing, when: &str) {
    let (store, settings) = (&controller.store, controller.translator.settings());
    failing.retain(|(node, uid), _| translate::is_wanted(store, settings, node, uid));
    let known = controller.enrollment.failures().all();
    let known: Failing = known.map(|(node, uid, why)| ((node.clone(), uid.clone()), why.clone())).collect();
    assert_eq!(known, *failing, "{when}");
    for node in NODES {
        let count = failing.keys().filter(|(of, _)| of == node).count();
        let label = NodeLabel { node: node.to_owned() };
        let counted = controller.metrics.enrollment_failures.get(&label).map_or(0, |count| count.get());
        assert_eq!(counted, count as i64, "{when}");
    }
}

#[test]
fn every_history_ends_in_the_state_of_a_controller_that_starts_anew() {
    let (mut tunnels, mut failures) = (0, 0);
    for seed in 0..12 {
        let random = &mut Random(seed);
        let (_guard, state) = temporary();
        // In a cluster, and in a directory.
        let settings = MeshSettings { netns_annotations: random.one_in(2), ..settings() };
        let (mut controller, _published) = start(&state, &settings);
        let mut objects = BTreeMap::new();
        let mut failing = Failing::new();
        for step in 0..150 {
            if random.one_in(4) {
                report(&mut controller, random, &mut failing);
            } else {
                let delta = delta(random, &objects);
                note(&mut objects, &delta);
                controller.objects(delta);
            }
            if objects.is_empty() {
                continue;
            }
            let when = format!("seed {seed}, step {step}");
            same(&controller, &objects, &settings, &when);
            same_failures(&controller, &mut failing, &when);
            failures += failing.len();
            tunnels += controller.enrollment.enrolled().len();
        }
        // Nothing is enrolled that is written down otherwise, or that labels do not want any more.
        let (mut restarted, _published) = start(&state, &settings);
        restarted.objects(all(&objects));
        assert_eq!(restarted.enrollment.enrolled(), controller.enrollment.enrolled(), "seed {seed}");
        same(&restarted, &objects, &settings, "restarted");
    }
    assert!(tunnels > 100 && failures > 100, "the histories were dull: {tunnels}, {failures}");
}
