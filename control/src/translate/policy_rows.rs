//! Policies from the manifests to the verdict, as the controller says them and agents decide by them, held to the test
//! bed's model of what they mean: row by row, those that a person has written and thousands at random.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};
use weft_core::{
    SpiffeId,
    policy::{self, Attempt, Guard, Policy},
};
use weft_proto::workload::address;
use weft_testbed::policy_model::{
    Caller, DEFAULTS, Mesh, Verdict, generator,
    generator::{Random, Words},
    policies_about,
    sentences::{self, vault},
    verdict,
};

use super::{
    Inbound, MeshSettings,
    tests::{Translation, anew, settings},
};
use crate::{
    enrollment::Enrolled,
    source::{
        Delta,
        manifest::{Format, parse},
    },
    store::Store,
};

/// What agents are told of all objects.
fn translation(mesh: Mesh, objects: &[Value]) -> Translation {
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    let mut store = Store::default();
    let upserts = parse(&text.join("\n"), Format::Json).unwrap().objects;
    assert_eq!(upserts.len(), objects.len(), "every object is one that is read");
    store.apply(Delta { upserts, deletes: Vec::new() });
    let inbound = Inbound { default: mesh.default.parse().unwrap(), floor: mesh.floor.parse().unwrap() };
    let settings = MeshSettings { inbound, ..settings() };
    let mut translation = Translation::default();
    translation.apply(anew(store, &Enrolled::default(), &settings).0);
    translation
}

/// What an agent guards a pod with; None where it is not told to.
fn guard(translation: &Translation, pod: &Value) -> Option<Guard> {
    let metadata = &pod["metadata"];
    let (namespace, name) = (metadata["namespace"].as_str().unwrap(), metadata["name"].as_str().unwrap());
    let uid = settings().pod_uid(namespace, name);
    let Some(address::Type::Workload(workload)) = &translation.addresses[&uid].r#type else {
        panic!("{uid}")
    };
    let read = |name: &String| {
        let policy = prost::Message::encode_to_vec(&translation.policies[name]);
        Arc::new(weft_proto::authorization::read(name, &policy).unwrap())
    };
    let policies: Vec<Arc<Policy>> = workload.authorization_policies.iter().map(read).collect();
    let enrolled = translation.local["n1"][&uid].enroll;
    assert!(enrolled || policies.is_empty(), "{uid} is not in the mesh");
    enrolled.then(|| Guard::new(policies))
}

fn decide(guard: &Guard, caller: &Caller, port: u16) -> Verdict {
    let identity: Option<SpiffeId> = caller.identity.as_ref().map(|id| id.parse().unwrap());
    let attempt = Attempt { identity: identity.as_ref(), source: caller.source, port };
    match guard.decide(&attempt).verdict {
        policy::Verdict::Allowed => Verdict::Allowed,
        policy::Verdict::Audited => Verdict::Audited,
        policy::Verdict::Denied => Verdict::Denied,
    }
}

#[test]
fn what_is_said_of_policies() {
    let mut wrong = Vec::new();
    for sentence in sentences::all() {
        let pod = vault(&sentence.objects);
        let guard = guard(&translation(sentence.mesh, &sentence.objects), pod);
        for (row, expected) in &sentence.rows {
            let (caller, port) = sentences::attempt(row).unwrap();
            let found = guard.as_ref().map(|guard| decide(guard, &caller, port));
            if found != *expected {
                let policies: Vec<_> = policies_about(&sentence.objects, pod).map(|(_, text)| text).collect();
                wrong.push(format!("{}: {row}: {found:?}, not {expected:?}; {policies:?}", sentence.says));
            }
        }
    }
    assert!(wrong.is_empty(), "{} rows are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

const WORDS: Words = Words {
    namespaces: &["shop", "shopping", "bank", "n0"],
    accounts: &["web", "web-admin", "job"],
    cidrs: &["10.42.0.0/16", "10.42.1.0/24", "0.0.0.0/0", "fd00:10:42::/48", "::/0", "192.0.2.7/32"],
    ports: &[80, 81, 443],
};
const PODS: [&str; 2] = ["vault", "desk"];

fn callers() -> Vec<Caller> {
    let known = [
        "nobody",
        "nobody@192.0.2.7",
        "nobody@fd00:10:42:1::7",
        "shop/web",
        "shop/web@fd00:10:42:2::7",
        "shop/web-admin",
        "shopping/web",
        "bank/job@10.42.2.3",
        "n0/web",
        "n1/job@192.0.2.7",
        "spiffe://elsewhere.example/ns/shop/sa/web",
        "spiffe://cluster.local.example/ns/shop/sa/web",
    ];
    known.iter().map(|caller| sentences::attempt(&format!("{caller} 1")).unwrap().0).collect()
}

/// Namespaces with two pods each, and everything that speaks of these.
fn objects(random: &mut Random, namespaces: usize) -> Vec<Value> {
    let mut objects = Vec::new();
    for number in 0..namespaces {
        let namespace = format!("n{number}");
        let mut ruling = generator::ruling(random, &WORDS, &namespace, PODS);
        objects.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata":
            {"name": namespace, "labels": {"weft.dev/mesh": "enabled"}, "annotations": ruling.annotations}}));
        for (at, name) in PODS.into_iter().enumerate() {
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata":
                {"name": name, "namespace": namespace, "labels": {"app": name}, "annotations": generator::annotations(random)},
                "spec": {"nodeName": "n1"}, "status": {"podIP": format!("10.1.{number}.{}", at + 1)}});
            if at == 1 {
                generator::list_behind(&mut ruling.objects, &pod);
            }
            objects.push(pod);
        }
        objects.append(&mut ruling.objects);
    }
    objects
}

#[test]
fn policies_at_random() {
    let mut random = Random(20);
    let mut seen: BTreeMap<Verdict, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    let settings = DEFAULTS.into_iter().flat_map(|floor| DEFAULTS.map(|default| Mesh { default, floor }));
    // Most meshes have no floor.
    let lax = Mesh { default: "all-unauthenticated", floor: "all-unauthenticated" };
    for mesh in settings.chain([lax; 15]) {
        let objects = objects(&mut random, 10);
        let translation = translation(mesh, &objects);
        for pod in objects.iter().filter(|object| object["kind"] == "Pod") {
            let guard = guard(&translation, pod).unwrap();
            let attempts = callers()
                .into_iter()
                .flat_map(|caller| WORDS.ports.iter().map(move |port| (caller.clone(), *port)));
            for (caller, port) in attempts {
                let expected = verdict(mesh, &objects, pod, &caller, port).unwrap();
                let found = decide(&guard, &caller, port);
                *seen.entry(expected).or_default() += 1;
                if found != expected {
                    let policies: Vec<_> = policies_about(&objects, pod).map(|(_, text)| text).collect();
                    wrong.push(format!(
                        "{caller:?} at {port} of {}: {found:?}, not {expected:?}; {mesh:?} {}",
                        pod["metadata"],
                        policies.join("\n    ")
                    ));
                }
            }
        }
    }
    wrong.truncate(20);
    assert!(wrong.is_empty(), "rows are wrong, such as\n{}", wrong.join("\n"));
    let total: usize = seen.values().sum();
    let rare = seen.len() < 3 || seen.values().any(|count| count * 20 < total);
    assert!(total > 20_000 && !rare, "hardly anything was tried: {seen:?}");
}
