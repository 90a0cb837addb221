//! Hundreds of connections to pods that all sorts of policies guard: each is admitted or refused as the model of policies
//! says, and the agents' counters and logs say the same.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use weft_testbed::cluster::Builder;
use weft_testbed::policy_model::generator::{self, Random, Words};
use weft_testbed::policy_model::{Caller, Mesh, Verdict, policies_about, verdict};
use weft_testbed::poll::until;
use weft_testbed::traffic::call;
use weft_testbed::{Cluster, Place, Pod, Server, servers};

use crate::runner::Scenario;

pub const SCENARIOS: &[Scenario] = &[
    Scenario::new("policy_table", "hundreds of connections go as the model of policies says", |cluster| {
        table(cluster, Mesh { default: "all-unauthenticated", floor: "all-unauthenticated" })
    }),
    Scenario::new(
        "policy_table_floor",
        "the same in a mesh that asks everybody for an identity",
        |cluster| table(cluster, Mesh { default: "audit", floor: "cluster-authenticated" }),
    ),
];

const PORTS: [u16; 3] = [7000, 7001, 7002];
/// Connections at the same time.
const AT_ONCE: usize = 12;
const NEWS: Duration = Duration::from_secs(5);

/// Every namespace of guarded pods has these two; the Service `selecting` selects the first, `listing` lists the other.
const GUARDED: [(&str, &str); 2] = [("vault", "east"), ("desk", "west")];

/// Namespaces by their annotation, with policies by what they are about: both pods, the first or the other.
const WRITTEN: [(&str, &[(&str, &str)]); 5] = [
    (
        "",
        &[
            ("vault", "rules: [{from: [{notNamespaces: [shop]}], to: [{notPorts: [7001]}]}]"),
            ("desk", "action: Deny, rules: [{from: [{namespaces: [shop]}]}]"),
        ],
    ),
    (
        "audit",
        &[("vault", "action: Audit, rules: [{from: [{namespaces: [shop]}]}, {to: [{ports: [7002]}]}]")],
    ),
    (
        "all-authenticated",
        &[
            (
                "selecting",
                "rules: [{from: [{serviceAccounts: [job, shop/web]}, {principals: ['*/sa/job']}]}]",
            ),
            (
                "both",
                "action: Deny, rules: [{from: [{cidrs: [10.42.1.0/24]}], to: [{ports: [7000], methods: [GET]}]}]",
            ),
            (
                "listing",
                "action: Audit, rules: [{from: [{notPrincipals: ['spiffe://cluster.local/ns/shop/*']}]}]",
            ),
        ],
    ),
    (
        "cluster-authenticated",
        &[
            ("vault", "rules: [{from: [{moods: [good]}]}]"),
            ("listing", "rules: [{to: [{ports: [7000]}, {ports: [7001], paths: [/]}]}]"),
            (
                "listing",
                "action: Deny, rules: [{from: [{notServiceAccounts: [shop/web, bank/web]}], to: [{notPorts: [7000]}]}]",
            ),
        ],
    ),
    (
        "deny",
        &[(
            "desk",
            "rules: [{from: [{cidrs: [172.31.0.0/24, 'fd00:10:42:1::/64'], notNamespaces: [shopping]}]}, {from: [{cidrs: [172.31.0.0/24]}]}]",
        )],
    ),
];
/// Namespaces more, whose policies are made at random.
const RANDOM: usize = 2;
const SEED: u64 = 3;
const WORDS: Words = Words {
    namespaces: &["shop", "shopping", "bank", "n0"],
    accounts: &["web", "job"],
    cidrs: &[
        "10.42.1.0/24",
        "10.42.0.0/16",
        "172.31.0.0/24",
        "fd00:10:42::/48",
        "fd00:10:42:1::/64",
        "0.0.0.0/0",
    ],
    ports: &PORTS,
};

/// Who calls: pod, node and service account.
const MEMBERS: [(&str, &str, &str); 5] = [
    ("shop/web", "east", "web"),
    ("shop/job", "west", "job"),
    ("shopping/web", "east", "web"),
    ("bank/web", "west", "web"),
    ("n0/job", "east", "job"),
];

/// One connection, and what has to become of it.
struct Row<'a> {
    place: &'a Place,
    caller: Caller,
    /// The pod, and its place among the objects.
    pod: &'a Pod,
    guarded: usize,
    to: SocketAddr,
    expected: Verdict,
}

fn table(builder: Builder, mesh: Mesh) -> Result<()> {
    let flags = ["--default-inbound", mesh.default, "--inbound-floor", mesh.floor];
    let builder =
        flags.into_iter().fold(builder.agent_flag("--log-json"), |builder, flag| builder.control_flag(flag));
    let cluster = builder.node("east").node("west").start()?;
    let legacy = cluster.outside("legacy")?;
    let stranger = cluster.pod_unannounced("plain/stranger", "west", "web")?;
    let members: Vec<(Pod, String)> = MEMBERS
        .into_iter()
        .map(|(name, node, account)| {
            let pod = cluster.pod_unannounced(name, node, account)?;
            let identity = pod.identity();
            Ok((pod, identity))
        })
        .collect::<Result<_>>()?;

    let mut objects = Vec::new();
    let mut pods: Vec<(Pod, usize)> = Vec::new();
    let mut random = Random(SEED);
    for number in 0..WRITTEN.len() + RANDOM {
        let namespace = format!("n{number}");
        let first = objects.len();
        objects.extend(ruling(&mut random, number, &namespace));
        for (name, node) in GUARDED {
            let pod = cluster.pod_unannounced(&format!("{namespace}/{name}"), node, "default")?;
            let mut object = manifest(&pod, "default");
            if let Some(annotations) =
                object["metadata"]["annotations"].as_object_mut().filter(|_| number >= WRITTEN.len())
            {
                annotations.extend(generator::annotations(&mut random));
            }
            if name == GUARDED[1].0 {
                generator::list_behind(&mut objects[first..], &object);
            }
            pods.push((pod, objects.len()));
            objects.push(object);
        }
    }
    objects.extend(["shop", "shopping", "bank"].map(|name| namespace(name, "enabled", json!({}))));
    objects.push(namespace("plain", "disabled", json!({})));
    objects.extend(
        members.iter().map(|(pod, _)| manifest(pod, pod.identity().rsplit('/').next().unwrap_or_default())),
    );
    objects.push(manifest(&stranger, "web"));
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    cluster.directory().write("table.json", &text.join("\n"))?;
    let enrolled: Vec<&Pod> =
        pods.iter().map(|(pod, _)| pod).chain(members.iter().map(|(pod, _)| pod)).collect();
    cluster.wait_enrolled(&enrolled)?;
    cluster.wait_outside(&[&stranger])?;

    let servers: Vec<Server> = pods
        .iter()
        .flat_map(|(pod, _)| PORTS.map(|port| Server::start(pod, port, servers::echo)))
        .collect::<Result<_>>()?;
    let callers = members.iter().map(|(pod, identity)| (&**pod, Some(identity.clone())));
    let callers: Vec<(&Place, Option<String>)> =
        callers.chain([(&legacy, None), (&*stranger, None)]).collect();
    let mut rows = Vec::new();
    for (pod, guarded) in &pods {
        for port in PORTS {
            for (place, identity) in &callers {
                for (source, to) in [(place.v4.into(), pod.at(port)), (place.v6.into(), pod.at_v6(port))] {
                    let caller = Caller { identity: identity.clone(), source };
                    let expected = verdict(mesh, &objects, &objects[*guarded], &caller, port);
                    let expected = expected.with_context(|| format!("{} is not guarded", pod.name()))?;
                    rows.push(Row { place, caller, pod, guarded: *guarded, to, expected });
                }
            }
        }
    }
    for verdict in [Verdict::Allowed, Verdict::Audited, Verdict::Denied] {
        let count = rows.iter().filter(|row| row.expected == verdict).count();
        ensure!(
            count * 20 > rows.len(),
            "{count} of {} rows are to be {verdict:?}: this proves little",
            rows.len()
        );
    }

    let outcomes = knock(&rows);
    let mut wrong: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let mut note = |row: &Row, found: String| {
        let Caller { identity, source } = &row.caller;
        let who = identity.as_deref().unwrap_or("nobody");
        wrong
            .entry(row.guarded)
            .or_default()
            .push(format!("{who} from {source} at {}: {found}, not {:?}", row.to, row.expected));
    };
    for (row, outcome) in rows.iter().zip(&outcomes) {
        let admitted = row.expected != Verdict::Denied;
        match outcome {
            Ok(()) if admitted => {}
            Err(error) if !admitted && is_refusal(error) => {}
            found => note(row, format!("{found:?}")),
        }
        // The application must not have seen whom the agent refuses.
        let server = servers.get(server_of(&pods, row)).context("its server")?;
        let seen = server.callers().iter().filter(|from| from.ip() == row.caller.source).count();
        if seen != usize::from(admitted) {
            note(row, format!("seen by the application {seen} times"));
        }
    }
    let logged = logged(&cluster, &rows)?;
    for row in &rows {
        match logged.get(&(row.caller.source, row.to)) {
            Some(verdicts) if *verdicts == BTreeSet::from([label(row.expected).to_owned()]) => {}
            found => note(row, format!("logged as {found:?}")),
        }
    }
    let about = |guarded: &usize| {
        policies_about(&objects, &objects[*guarded]).map(|(_, text)| text).collect::<Vec<_>>()
    };
    let report: Vec<String> = wrong
        .iter()
        .map(|(guarded, rows)| {
            let metadata = &objects[*guarded]["metadata"];
            format!(
                "{}/{} {:#?}:\n  {}",
                metadata["namespace"],
                metadata["name"],
                about(guarded),
                rows.join("\n  ")
            )
        })
        .collect();
    ensure!(
        report.is_empty(),
        "of {} rows are wrong, in a mesh of {mesh:?}:\n{}",
        rows.len(),
        report.join("\n")
    );
    counted(&cluster, &rows)
}

/// The Namespace and all that speaks of its pods.
fn ruling(random: &mut Random, number: usize, name: &str) -> Vec<Value> {
    let [first, other] = GUARDED.map(|(name, _)| name);
    let generated = generator::ruling(random, &WORDS, name, [first, other]);
    let Some((default, policies)) = WRITTEN.get(number) else {
        let own = namespace(name, "enabled", generated.annotations.into());
        return std::iter::once(own).chain(generated.objects).collect();
    };
    let annotations = match *default {
        "" => json!({}),
        default => json!({"policy.weft.dev/default-inbound": default}),
    };
    let mut objects = vec![namespace(name, "enabled", annotations)];
    objects.extend(generated.objects.into_iter().filter(|object| object["kind"] != "AuthorizationPolicy"));
    for (at, (about, spec)) in policies.iter().enumerate() {
        let target = match *about {
            "both" => String::new(),
            "selecting" | "listing" => format!("targetRefs: [{{kind: Service, name: {about}}}], "),
            app => format!("selector: {{matchLabels: {{app: {app}}}}}, "),
        };
        // What is no YAML is not understood.
        let spec: Value = serde_yaml_ng::from_str(&format!("{{{target}{spec}}}")).unwrap_or_default();
        objects.push(json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("p{at}"), "namespace": name}, "spec": spec}));
    }
    objects
}

fn namespace(name: &str, mesh: &str, annotations: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": name, "labels": {"weft.dev/mesh": mesh}, "annotations": annotations}})
}

fn manifest(pod: &Pod, account: &str) -> Value {
    let name = pod.name().rsplit('/').next().unwrap_or_default();
    let ips: Vec<Value> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": pod.namespace(), "labels": {"app": name},
            "annotations": {"weft.dev/netns": pod.netns().path()}},
        "spec": {"nodeName": pod.node(), "serviceAccountName": account},
        "status": {"phase": "Running", "podIP": pod.v4, "podIPs": ips}})
}

/// Makes the connections, several at a time.
fn knock(rows: &[Row]) -> Vec<std::io::Result<()>> {
    let next = AtomicUsize::new(0);
    let mut outcomes: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            let mut outcomes = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::SeqCst);
                let Some(row) = rows.get(at) else { return outcomes };
                outcomes.push((at, call(row.place, row.to, "may I")));
            }
        };
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default()).collect()
    });
    outcomes.sort_by_key(|(at, _)| *at);
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Not that nobody answered, or that something was in the way.
fn is_refusal(error: &std::io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | UnexpectedEof | BrokenPipe)
}

fn server_of(pods: &[(Pod, usize)], row: &Row) -> usize {
    let pod =
        pods.iter().position(|(_, guarded)| *guarded == row.guarded).unwrap_or(usize::MAX / PORTS.len());
    let port = PORTS.iter().position(|port| *port == row.to.port()).unwrap_or_default();
    pod * PORTS.len() + port
}

fn label(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Allowed => "allowed",
        Verdict::Audited => "audited",
        Verdict::Denied => "denied",
    }
}

/// What the called agents' logs say, by the caller's address and the one that was called: a row has both to itself.
fn logged(cluster: &Cluster, rows: &[Row]) -> Result<BTreeMap<(IpAddr, SocketAddr), BTreeSet<String>>> {
    let mut logged: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    let complete = until(NEWS, "every connection is logged", || {
        logged.clear();
        for agent in cluster.agents() {
            for line in agent.log()?.lines() {
                let Ok(line) = serde_json::from_str::<Value>(line) else { continue };
                let address =
                    |field: &str| line[field].as_str().and_then(|text| text.parse::<SocketAddr>().ok());
                let (Some(from), Some(to), Some(verdict)) =
                    (address("src.addr"), address("dst.addr"), line["verdict"].as_str())
                else {
                    continue;
                };
                logged.entry((from.ip(), to)).or_default().insert(verdict.to_owned());
            }
        }
        Ok(logged.len() >= rows.len())
    });
    // Which is missing is said with its row.
    drop(complete);
    Ok(logged)
}

/// The agents' counters, of whole workloads, are the sums of the rows.
fn counted(cluster: &Cluster, rows: &[Row]) -> Result<()> {
    let mut expected: BTreeMap<[String; 4], f64> = BTreeMap::new();
    for row in rows {
        let who = row.caller.identity.clone().unwrap_or_else(|| "unknown".to_owned());
        let (namespace, workload) = row.pod.name().split_once('/').context("NAMESPACE/NAME")?;
        let labels = [label(row.expected).to_owned(), who, namespace.to_owned(), workload.to_owned()];
        *expected.entry(labels).or_default() += 1.0;
    }
    let mut found: BTreeMap<[String; 4], f64> = BTreeMap::new();
    for agent in cluster.agents() {
        for (labels, value) in agent.metrics()?.samples("weft_authorization_total") {
            let labels = ["verdict", "source_principal", "destination_namespace", "destination_workload"]
                .map(|name| labels.get(name).cloned().unwrap_or_default());
            *found.entry(labels).or_default() += value;
        }
    }
    ensure!(found == expected, "counted are\n{found:#?}\nwhere there were\n{expected:#?}");
    Ok(())
}
