//! Policies at random, the same ones from the same seed: of every field and of every combination, most of them such that
//! somebody matches and somebody does not.

use serde_json::{Map, Value, json};

use super::DEFAULTS;

/// SplitMix64: a sequence that is the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    /// True in so many of a hundred.
    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    fn pick<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }

    /// One to `most` of them, each at most once.
    fn some(&mut self, all: &[&str], most: usize) -> Vec<String> {
        let mut all = all.to_vec();
        let count = 1 + self.below(most.min(all.len()));
        (0..count).map(|_| all.remove(self.below(all.len())).to_owned()).collect()
    }
}

/// The words that policies are made of.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    pub namespaces: &'static [&'static str],
    pub accounts: &'static [&'static str],
    pub cidrs: &'static [&'static str],
    pub ports: &'static [u16],
}

/// What speaks of the pods of one namespace: their labels are `app: NAME`.
pub struct Ruling {
    /// What its Namespace says.
    pub annotations: Map<String, Value>,
    /// Services, EndpointSlices and AuthorizationPolicies.
    pub objects: Vec<Value>,
}

/// What a Namespace or a Pod may say of its default: most say nothing.
pub fn annotations(random: &mut Random) -> Map<String, Value> {
    let said = match random.below(12) {
        0..4 => Some(random.pick(&DEFAULTS)),
        4 => Some("Deny"),
        _ => None,
    };
    said.map(|said| ("policy.weft.dev/default-inbound".to_owned(), json!(said))).into_iter().collect()
}

/// For a namespace with the pods `first` and `second`.
pub fn ruling(random: &mut Random, words: &Words, namespace: &str, [first, second]: [&str; 2]) -> Ruling {
    let mut objects = vec![
        service(namespace, "selecting", json!({"app": first})),
        service(namespace, "listing", json!({})),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "listing-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": "listing"}},
            "endpoints": [], "ports": [{"port": 80}]}),
    ];
    for number in 0..random.below(5) {
        let mut spec = spec(random, words);
        if let Some((field, target)) = target(random, first, second) {
            spec.insert(field.to_owned(), target);
        }
        if random.chance(4) {
            spoil(random, &mut spec);
        }
        objects.push(json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": format!("p{number}"), "namespace": namespace}, "spec": spec}));
    }
    Ruling { annotations: annotations(random), objects }
}

/// Puts a pod behind the Service that has no selector.
pub fn list_behind(objects: &mut [Value], pod: &Value) {
    let namespace = &pod["metadata"]["namespace"];
    let mut slices = objects
        .iter_mut()
        .filter(|o| o["kind"] == "EndpointSlice" && o["metadata"]["namespace"] == *namespace);
    if let Some(endpoints) = slices.next().and_then(|slice| slice["endpoints"].as_array_mut()) {
        let target = json!({"kind": "Pod", "name": pod["metadata"]["name"], "namespace": namespace});
        endpoints.push(json!({"addresses": [pod["status"]["podIP"]], "targetRef": target}));
    }
}

fn service(namespace: &str, name: &str, selector: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": selector, "ports": [{"port": 80}]}})
}

fn target(random: &mut Random, first: &str, second: &str) -> Option<(&'static str, Value)> {
    let refs = |names: Vec<String>| -> Value {
        names.into_iter().map(|name| json!({"kind": "Service", "name": name})).collect()
    };
    match random.below(8) {
        0 => Some(("selector", json!({"matchLabels": {"app": first}}))),
        1 => Some(("selector", json!({"matchLabels": {"app": second}}))),
        2 => Some(("targetRefs", refs(random.some(&["selecting", "listing", "missing"], 2)))),
        _ => None,
    }
}

fn spec(random: &mut Random, words: &Words) -> Map<String, Value> {
    let mut spec = Map::new();
    let action = random.pick(&["Allow", "Allow", "Deny", "Deny", "Audit"]);
    if action != "Allow" || random.chance(50) {
        spec.insert("action".to_owned(), json!(action));
    }
    let count = random.pick(&[0, 1, 1, 1, 2, 3]).max(usize::from(action == "Deny"));
    let rules: Vec<Value> = (0..count).map(|_| rule(random, words)).collect();
    if !rules.is_empty() {
        spec.insert("rules".to_owned(), json!(rules));
    }
    spec
}

fn rule(random: &mut Random, words: &Words) -> Value {
    let mut rule = Map::new();
    if random.chance(80) {
        let from: Vec<Value> = (0..random.pick(&[1, 1, 2])).map(|_| source(random, words)).collect();
        rule.insert("from".to_owned(), json!(from));
    }
    if random.chance(45) {
        let to: Vec<Value> = (0..random.pick(&[1, 1, 2])).map(|_| operation(random, words)).collect();
        rule.insert("to".to_owned(), json!(to));
    }
    rule.into()
}

fn source(random: &mut Random, words: &Words) -> Value {
    let mut source = Map::new();
    for _ in 0..random.pick(&[1, 1, 2, 3]) {
        let (yes, no, entries) = match random.below(4) {
            0 => ("principals", "notPrincipals", principals(random, words)),
            1 => ("namespaces", "notNamespaces", random.some(words.namespaces, 3)),
            2 => ("serviceAccounts", "notServiceAccounts", accounts(random, words)),
            _ => ("cidrs", "notCidrs", random.some(words.cidrs, 2)),
        };
        source.insert(if random.chance(60) { yes } else { no }.to_owned(), json!(entries));
    }
    source.into()
}

fn principals(random: &mut Random, words: &Words) -> Vec<String> {
    (0..random.pick(&[1, 1, 2]))
        .map(|_| {
            let (namespace, account) = (random.pick(words.namespaces), random.pick(words.accounts));
            let domain =
                random.pick(&["cluster.local", "cluster.local", "cluster.local", "elsewhere.example"]);
            match random.below(6) {
                0 => "*".to_owned(),
                1 => format!("spiffe://{domain}/ns/{namespace}/*"),
                2 => format!("spiffe://{domain}/ns/{namespace}*"),
                3 => format!("*/sa/{account}"),
                _ => format!("spiffe://{domain}/ns/{namespace}/sa/{account}"),
            }
        })
        .collect()
}

fn accounts(random: &mut Random, words: &Words) -> Vec<String> {
    let names = random.some(words.accounts, 2);
    names
        .into_iter()
        .map(
            |name| if random.chance(40) { name } else { format!("{}/{name}", random.pick(words.namespaces)) },
        )
        .collect()
}

fn operation(random: &mut Random, words: &Words) -> Value {
    let mut operation = Map::new();
    let l7 = random.chance(20);
    if l7 {
        let (field, value) =
            random.pick(&[("methods", "GET"), ("notPaths", "/admin/*"), ("hosts", "a.example")]);
        operation.insert(field.to_owned(), json!([value]));
    }
    if !l7 || random.chance(50) {
        let field = if random.chance(65) { "ports" } else { "notPorts" };
        let ports: Vec<u16> = (0..random.pick(&[1, 2])).map(|_| random.pick(words.ports)).collect();
        operation.insert(field.to_owned(), json!(ports));
    }
    operation.into()
}

/// Makes of a specification one that cannot be understood.
fn spoil(random: &mut Random, spec: &mut Map<String, Value>) {
    let (field, value) = random.pick(&[
        ("priority", json!(1)),
        ("action", json!("Refuse")),
        ("rules", json!([{"from": []}])),
        ("rules", json!([{"when": []}])),
        ("rules", json!([{"to": [{"ports": [0]}]}])),
        ("selector", json!({"matchExpressions": []})),
        ("targetRefs", json!([{"kind": "Gateway", "name": "selecting"}])),
    ]);
    spec.insert(field.to_owned(), value);
}
