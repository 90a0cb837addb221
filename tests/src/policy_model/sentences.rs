//! What is said of policies, one sentence after the other, each with who is admitted and who is not: rows that a person
//! has decided.

mod misunderstood;

use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Caller, Mesh, Verdict};

/// A sentence, what it is tried on, and what has to come of it. The pod is always `bank/vault`.
#[derive(Debug)]
pub struct Sentence {
    pub says: &'static str,
    pub mesh: Mesh,
    pub objects: Vec<Value>,
    /// CALLER PORT, and what becomes of him; None where nobody guards the pod.
    pub rows: Vec<(&'static str, Option<Verdict>)>,
}

/// The pod of every sentence, as it is in its objects.
pub fn vault(objects: &[Value]) -> &Value {
    objects.iter().find(|object| object["kind"] == "Pod").unwrap_or(&Value::Null)
}

/// `WHO[@ADDRESS] PORT`: WHO is `nobody`, NAMESPACE/ACCOUNT or a SPIFFE ID.
pub fn attempt(text: &str) -> Option<(Caller, u16)> {
    let (caller, port) = text.split_once(' ')?;
    let (who, source) = caller.split_once('@').unwrap_or((caller, "10.42.1.10"));
    let identity = match who.split_once('/') {
        _ if who == "nobody" => None,
        _ if who.starts_with("spiffe://") => Some(who.to_owned()),
        Some((namespace, account)) => Some(format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")),
        None => return None,
    };
    Some((Caller { identity, source: source.parse::<IpAddr>().ok()? }, port.parse().ok()?))
}

fn say(says: &'static str) -> Sentence {
    let objects = vec![
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "bank", "labels": {"weft.dev/mesh": "enabled"}, "annotations": {}}}),
        json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "vault", "namespace": "bank", "labels": {"app": "vault", "tier": "data"}, "annotations": {}},
            "spec": {"nodeName": "n1"}, "status": {"podIP": "10.42.2.10"}}),
    ];
    Sentence {
        says,
        mesh: Mesh { default: "all-unauthenticated", floor: "all-unauthenticated" },
        objects,
        rows: Vec::new(),
    }
}

impl Sentence {
    /// A policy of the pod's namespace, its specification in YAML.
    fn policy(self, spec: &str) -> Sentence {
        self.policy_in("bank", spec)
    }

    fn policy_in(mut self, namespace: &str, spec: &str) -> Sentence {
        // What is no YAML is not understood, and so makes its sentence wrong.
        let spec: Value = serde_yaml_ng::from_str(spec).unwrap_or_default();
        let name = format!("p{}", self.objects.len());
        self.objects.push(json!({"apiVersion": "policy.weft.dev/v1alpha1", "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec}));
        self
    }

    fn object(mut self, object: Value) -> Sentence {
        self.objects.push(object);
        self
    }

    fn mesh(mut self, default: &'static str, floor: &'static str) -> Sentence {
        self.mesh = Mesh { default, floor };
        self
    }

    fn namespace_says(mut self, default: &str) -> Sentence {
        self.objects[0]["metadata"]["annotations"]["policy.weft.dev/default-inbound"] = json!(default);
        self
    }

    fn pod_says(mut self, default: &str) -> Sentence {
        self.objects[1]["metadata"]["annotations"]["policy.weft.dev/default-inbound"] = json!(default);
        self
    }

    fn pod_label(mut self, name: &str, value: &str) -> Sentence {
        self.objects[1]["metadata"]["labels"][name] = json!(value);
        self
    }

    fn allowed(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Allowed))
    }

    fn audited(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Audited))
    }

    fn denied(self, rows: &[&'static str]) -> Sentence {
        self.expect(rows, Some(Verdict::Denied))
    }

    fn expect(mut self, rows: &[&'static str], verdict: Option<Verdict>) -> Sentence {
        self.rows.extend(rows.iter().map(|row| (*row, verdict)));
        self
    }
}

fn service(name: &str, selector: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "bank"},
        "spec": {"selector": selector, "ports": [{"port": 80}]}})
}

fn slice(service: &str, target: Value) -> Value {
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": format!("{service}-1"), "namespace": "bank", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [{"addresses": ["10.42.2.10"], "targetRef": target}], "ports": [{"port": 80}]})
}

const ELSEWHERE: &str = "spiffe://elsewhere.example/ns/shop/sa/web 80";
/// Another trust domain, whose name begins as the mesh's own does.
const NEARLY: &str = "spiffe://cluster.local.example/ns/shop/sa/web 80";
const EVERYBODY: [&str; 4] = ["shop/web 80", "bank/teller 81", ELSEWHERE, "nobody 80"];
const IDENTIFIED: [&str; 3] = ["shop/web 80", "bank/teller 81", ELSEWHERE];
const SHOP: &str = "{rules: [{from: [{namespaces: [shop]}]}]}";

pub fn all() -> Vec<Sentence> {
    [
        about(),
        matching(),
        identities(),
        addresses_and_ports(),
        verdicts(),
        defaults(),
        audits(),
        misunderstood::all(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn about() -> Vec<Sentence> {
    let deny_for = |service: &str| {
        format!("{{action: Deny, targetRefs: [{{kind: Service, name: {service}}}], rules: [{{}}]}}")
    };
    vec![
        say("without any policy, the mesh's default decides").allowed(&EVERYBODY),
        say("a policy is about the pods of its namespace").policy("{action: Deny, rules: [{}]}").denied(&EVERYBODY),
        say("and of no other").policy_in("shop", "{action: Deny, rules: [{}]}").allowed(&EVERYBODY),
        say("those with the labels")
            .policy("{action: Deny, selector: {matchLabels: {app: vault, tier: data}}, rules: [{}]}")
            .denied(&EVERYBODY),
        say("all of them")
            .policy("{action: Deny, selector: {matchLabels: {app: vault, tier: web}}, rules: [{}]}")
            .policy("{action: Deny, selector: {matchLabels: {app: vault, track: canary}}, rules: [{}]}")
            .allowed(&EVERYBODY),
        say("an Allow about other pods admits nobody here, and shuts nobody out")
            .policy("{selector: {matchLabels: {app: web}}, rules: [{from: [{namespaces: [shop]}]}]}")
            .allowed(&EVERYBODY),
        say("a selector without labels selects all").policy("{action: Deny, selector: {matchLabels: {}}, rules: [{}]}").denied(&EVERYBODY),
        say("those that a Service selects").object(service("safe", json!({"tier": "data"}))).policy(&deny_for("safe")).denied(&EVERYBODY),
        say("and not those that it does not").object(service("safe", json!({"tier": "web"}))).policy(&deny_for("safe")).allowed(&EVERYBODY),
        say("a Service without a selector selects nobody").object(service("safe", json!({}))).policy(&deny_for("safe")).allowed(&EVERYBODY),
        say("those that its slices list")
            .object(service("safe", json!({})))
            .object(slice("safe", json!({"kind": "Pod", "name": "vault"})))
            .policy(&deny_for("safe"))
            .denied(&EVERYBODY),
        say("and not those that another Service's slices list")
            .object(service("safe", json!({})))
            .object(service("other", json!({})))
            .object(slice("other", json!({"kind": "Pod", "name": "vault"})))
            .policy(&deny_for("safe"))
            .allowed(&EVERYBODY),
        say("one of several Services is enough")
            .object(service("safe", json!({"tier": "data"})))
            .object(service("other", json!({"tier": "web"})))
            .policy("{action: Deny, targetRefs: [{kind: Service, name: other}, {group: '', kind: Service, name: safe}], rules: [{}]}")
            .denied(&EVERYBODY),
        say("while a Service is not there, nobody knows whom it is about: its namespace is denied to everybody")
            .policy("{targetRefs: [{kind: Service, name: missing}], rules: [{}]}")
            .denied(&EVERYBODY),
        say("be there another one")
            .object(service("other", json!({"tier": "web"})))
            .policy("{targetRefs: [{kind: Service, name: other}, {kind: Service, name: missing}], rules: [{}]}")
            .denied(&EVERYBODY),
        say("also where nothing else is understood")
            .policy("{targetRefs: [{kind: Service, name: missing}], rules: [{when: []}]}")
            .denied(&EVERYBODY),
        say("its own Namespace is all of it")
            .policy("{action: Deny, targetRefs: [{kind: Namespace, name: bank}], rules: [{}]}")
            .denied(&EVERYBODY),
        say("only pods in the mesh are guarded")
            .pod_label("weft.dev/mesh", "disabled")
            .policy("{action: Deny, rules: [{}]}")
            .expect(&EVERYBODY, None),
    ]
}

fn matching() -> Vec<Sentence> {
    vec![
        say("a rule without from and to matches everybody").policy("{rules: [{}]}").allowed(&EVERYBODY),
        say("an Allow without rules matches nobody").policy("{}").denied(&EVERYBODY),
        say("one of the rules has to match")
            .policy("{rules: [{from: [{namespaces: [shop]}]}, {to: [{ports: [81]}]}]}")
            .allowed(&["shop/web 80", "shop/web 81", "nobody 81"])
            .denied(&["bank/teller 80", "nobody 80"]),
        say("one of from and one of to")
            .policy("{rules: [{from: [{namespaces: [shop]}, {serviceAccounts: [teller]}], to: [{ports: [80]}, {ports: [81]}]}]}")
            .allowed(&["shop/web 80", "shop/web 81", "bank/teller 80", "bank/teller 81"])
            .denied(&["shop/web 82", "bank/other 80", "nobody 81"]),
        say("every list of an item has to hold")
            .policy("{rules: [{from: [{namespaces: [shop], serviceAccounts: [shop/web, shop/job], cidrs: [10.42.1.0/24]}]}]}")
            .allowed(&["shop/web 80", "shop/job@10.42.1.200 80"])
            .denied(&["shop/other 80", "shop/web@10.42.2.1 80", "bank/web 80", "nobody 80"]),
        say("two identity lists of one item are both asked")
            .policy("{rules: [{from: [{namespaces: [shop], principals: ['*/sa/web']}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["shop/job 80", "bank/web 80"]),
    ]
}

fn identities() -> Vec<Sentence> {
    let principals = |list: &str| format!("{{rules: [{{from: [{{principals: [{list}]}}]}}]}}");
    vec![
        say("a principal is a whole SPIFFE ID")
            .policy(&principals("'spiffe://cluster.local/ns/shop/sa/web'"))
            .allowed(&["shop/web 80"])
            .denied(&["shop/web-admin 80", "shop/we 80", ELSEWHERE, "nobody 80"]),
        say("what begins so, with * at the end")
            .policy(&principals("'spiffe://cluster.local/ns/shop*'"))
            .allowed(&["shop/web 80", "shopping/web 80"])
            .denied(&["bank/web 80", ELSEWHERE, "nobody 80"]),
        say("what ends so, with * at the beginning")
            .policy(&principals("'*/sa/web'"))
            .allowed(&["shop/web 80", "bank/web 80", ELSEWHERE])
            .denied(&["shop/other-web 80", "nobody 80"]),
        say("the end may begin with the scheme's last letter").policy(&principals("'*/cluster.local/ns/shop/sa/web'")).allowed(&["shop/web 80"]).denied(&["shop/job 80"]),
        say("* alone is whoever has an identity").policy(&principals("'*'")).allowed(&IDENTIFIED).denied(&["nobody 80"]),
        say("so is the scheme alone").policy(&principals("'spiffe://*'")).allowed(&IDENTIFIED).denied(&["nobody 80"]),
        say("namespaces are whole names, of the mesh's own trust domain")
            .policy(SHOP)
            .allowed(&["shop/web 80", "shop/job 81"])
            .denied(&["shopping/web 80", "sho/web 80", ELSEWHERE, NEARLY, "nobody 80"]),
        say("so are service accounts, those without a namespace being of the policy's")
            .policy("{rules: [{from: [{serviceAccounts: [teller, shop/web]}]}]}")
            .allowed(&["bank/teller 80", "shop/web 80"])
            .denied(&["shop/teller 80", "bank/web 80", "bank/teller-2 80", ELSEWHERE, NEARLY, "nobody 80"]),
        say("not*: the caller is none of them")
            .policy("{rules: [{from: [{notNamespaces: [shop, test]}]}]}")
            .allowed(&["bank/teller 80", "shopping/web 80", ELSEWHERE])
            .denied(&["shop/web 80", "test/x 80"]),
        say("none of any of the lists")
            .policy("{rules: [{from: [{namespaces: [shop], notServiceAccounts: [shop/job], notPrincipals: ['*/sa/web']}]}]}")
            .allowed(&["shop/other 80"])
            .denied(&["shop/job 80", "shop/web 80", "bank/other 80"]),
        say("who shows no identity is in no positive list of a Deny")
            .policy("{action: Deny, rules: [{from: [{namespaces: [shop], notServiceAccounts: [shop/job]}]}]}")
            .policy("{rules: [{}]}")
            .allowed(&["nobody 80", "shop/job 80", "bank/teller 80"])
            .denied(&["shop/web 80"]),
        say("a Deny of all but some denies who shows no identity")
            .policy("{action: Deny, rules: [{from: [{notNamespaces: [shop]}]}]}")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", "bank/teller 80", ELSEWHERE]),
        say("an Allow of all but some does not admit him")
            .policy("{rules: [{from: [{notPrincipals: ['*/sa/web']}]}]}")
            .allowed(&["shop/job 80"])
            .denied(&["nobody 80", "shop/web 80"]),
        say("nor does one with other lists besides")
            .policy("{rules: [{from: [{notServiceAccounts: [x], cidrs: [10.0.0.0/8]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", "bank/x 80"]),
        say("an Audit of all but some does not match him")
            .policy("{action: Audit, rules: [{from: [{notNamespaces: [shop]}]}]}")
            .allowed(&["bank/teller 80"])
            .audited(&["nobody 80", "shop/web 80"]),
        say("without any identity list he is as good as others")
            .policy("{rules: [{from: [{cidrs: [10.42.0.0/16], notCidrs: [10.42.9.0/24]}], to: [{notPorts: [81]}]}]}")
            .allowed(&["nobody 80", "shop/web 80"])
            .denied(&["nobody@10.42.9.1 80", "nobody@192.0.2.1 80", "nobody 81"]),
    ]
}

fn addresses_and_ports() -> Vec<Sentence> {
    vec![
        say("addresses are of one family or the other")
            .policy("{rules: [{from: [{cidrs: [10.42.1.10/32, 'fd00:10:42::/48']}]}]}")
            .allowed(&["nobody 80", "shop/web@fd00:10:42:1::7 80"])
            .denied(&["nobody@10.42.1.11 80", "nobody@fd00:10:43::7 80"]),
        say("0.0.0.0/0 is all of IPv4 and nothing of IPv6")
            .policy("{rules: [{from: [{cidrs: [0.0.0.0/0]}]}]}")
            .allowed(&["nobody@203.0.113.9 80"])
            .denied(&["nobody@fd00::1 80"]),
        say("::/0 the other way round").policy("{rules: [{from: [{cidrs: ['::/0']}]}]}").allowed(&["nobody@fd00::1 80"]).denied(&["nobody 80"]),
        say("notCidrs alone match everybody else")
            .policy("{action: Deny, rules: [{from: [{notCidrs: [10.42.0.0/16]}]}]}")
            .allowed(&["nobody 80", "shop/web 80"])
            .denied(&["shop/web@10.43.0.1 80", "nobody@fd00::1 80"]),
        say("ports and notPorts both count")
            .policy("{rules: [{to: [{ports: [80, 81], notPorts: [81]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["shop/web 81", "shop/web 82"]),
        say("notPorts alone are all the others").policy("{rules: [{to: [{notPorts: [81]}]}]}").allowed(&["nobody 80", "nobody 65535"]).denied(&["nobody 81"]),
        say("an item with an L7 field never allows")
            .policy("{rules: [{to: [{methods: [GET]}, {ports: [81], paths: [/a]}, {ports: [82]}]}]}")
            .allowed(&["shop/web 82"])
            .denied(&["shop/web 80", "shop/web 81"]),
        say("nor does a rule with nothing else").policy("{rules: [{to: [{notHosts: [a.example]}]}]}").denied(&EVERYBODY),
        say("in a Deny it is taken as fulfilled")
            .policy("{action: Deny, rules: [{from: [{namespaces: [shop]}], to: [{notMethods: [GET]}]}]}")
            .allowed(&["bank/teller 80"])
            .denied(&["shop/web 80", "shop/web 81"]),
        say("its ports still count")
            .policy("{action: Deny, rules: [{to: [{ports: [80], hosts: [a.example]}, {notPorts: [80, 81], notPaths: [/a]}]}]}")
            .allowed(&["shop/web 81"])
            .denied(&["shop/web 80", "nobody 82"]),
        say("on trial it would not allow either")
            .policy("{action: Audit, rules: [{to: [{methods: [GET]}, {ports: [81]}]}]}")
            .allowed(&["shop/web 81"])
            .audited(&["shop/web 80"]),
    ]
}

fn verdicts() -> Vec<Sentence> {
    vec![
        say("a matching Deny denies, whatever Allows say")
            .policy("{action: Deny, rules: [{from: [{serviceAccounts: [shop/job]}]}]}")
            .policy(SHOP)
            .allowed(&["shop/web 80"])
            .denied(&["shop/job 80", "bank/teller 80", "nobody 80"]),
        say("one of several Allows is enough")
            .policy(SHOP)
            .policy("{rules: [{to: [{ports: [81]}]}]}")
            .policy("{}")
            .allowed(&["shop/web 80", "nobody 81"])
            .denied(&["nobody 80"]),
        say("where an Allow is, no default is asked").mesh("deny", "all-unauthenticated").policy(SHOP).allowed(&["shop/web 80"]).denied(&["nobody 80"]),
        say("also not as a pod's annotation has it").pod_says("deny").policy("{rules: [{}]}").allowed(&EVERYBODY),
        say("a Deny that names identities asks for one")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80", "test/x 80"]),
        say("in any of its rules, negated or not")
            .policy("{action: Deny, rules: [{to: [{ports: [99]}]}, {from: [{cidrs: [192.0.2.0/24]}, {notServiceAccounts: [shop/web], cidrs: [192.0.2.0/24]}]}]}")
            .allowed(&["shop/web 80", "bank/teller 80"])
            .denied(&["nobody 80", "shop/web 99", "shop/web@192.0.2.1 80"]),
        say("one that names none does not").policy("{action: Deny, rules: [{from: [{cidrs: [192.0.2.0/24]}]}]}").allowed(&["nobody 80"]),
        say("one about other pods does not")
            .policy("{action: Deny, selector: {matchLabels: {app: web}}, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["nobody 80"]),
        say("an Allow may still admit who shows none")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .policy("{rules: [{to: [{ports: [80]}]}]}")
            .allowed(&["nobody 80"])
            .denied(&["test/x 80", "nobody 81"]),
        say("a default that is stricter stays")
            .namespace_says("cluster-authenticated")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE]),
        say("that of audit does not")
            .namespace_says("audit")
            .policy("{action: Deny, rules: [{from: [{namespaces: [test]}]}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80"]),
    ]
}

fn defaults() -> Vec<Sentence> {
    vec![
        say("all-unauthenticated admits all")
            .namespace_says("all-unauthenticated")
            .mesh("deny", "all-unauthenticated")
            .allowed(&EVERYBODY),
        say("audit admits all, on trial").mesh("audit", "all-unauthenticated").audited(&EVERYBODY),
        say("all-authenticated asks for an identity")
            .namespace_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("cluster-authenticated for one of the own trust domain")
            .namespace_says("cluster-authenticated")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("deny admits nobody").namespace_says("deny").denied(&EVERYBODY),
        say("a namespace may be laxer than the mesh's default")
            .mesh("deny", "all-authenticated")
            .namespace_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("and not laxer than its floor")
            .mesh("deny", "all-authenticated")
            .namespace_says("audit")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("nor may the mesh's default be").mesh("all-unauthenticated", "deny").denied(&EVERYBODY),
        say("a pod may be stricter")
            .namespace_says("audit")
            .pod_says("all-authenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("and not laxer")
            .namespace_says("all-authenticated")
            .pod_says("all-unauthenticated")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("audit is stricter than nothing").pod_says("audit").audited(&EVERYBODY),
        say("a value that nobody knows is deny, of a namespace").namespace_says("allow").denied(&EVERYBODY),
        say("and of a pod").pod_says("").denied(&EVERYBODY),
        say("a floor of all-authenticated refuses whom policies allow")
            .mesh("all-unauthenticated", "all-authenticated")
            .policy("{rules: [{}]}")
            .allowed(&IDENTIFIED)
            .denied(&["nobody 80"]),
        say("one of cluster-authenticated also other trust domains")
            .mesh("audit", "cluster-authenticated")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("one of deny as much as that")
            .mesh("audit", "deny")
            .policy("{rules: [{}]}")
            .allowed(&["shop/web 80"])
            .denied(&["nobody 80", ELSEWHERE, NEARLY]),
        say("and where no Allow is, everybody").mesh("audit", "deny").denied(&EVERYBODY),
    ]
}

fn audits() -> Vec<Sentence> {
    let audit = "{action: Audit, rules: [{from: [{namespaces: [shop]}]}]}";
    vec![
        say("an Audit denies nobody, and whom it would is audited")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80", "nobody 80"]),
        say("matching one of several is enough")
            .policy(audit)
            .policy("{action: Audit, rules: [{to: [{ports: [81]}]}]}")
            .policy("{action: Audit}")
            .allowed(&["shop/web 80", "nobody 81"])
            .audited(&["nobody 80"]),
        say("whom an Allow admits is on trial all the same")
            .policy("{rules: [{to: [{ports: [80]}]}]}")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["nobody 80"])
            .denied(&["shop/web 81"]),
        say("who is denied is not").policy("{action: Deny, rules: [{}]}").policy(audit).denied(&EVERYBODY),
        say("an Audit is no Allow: the default decides")
            .namespace_says("all-authenticated")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80"])
            .denied(&["nobody 80"]),
        say("nor does it admit where the default denies")
            .namespace_says("deny")
            .policy(audit)
            .denied(&EVERYBODY),
        say("the default audit is joined by Audits")
            .namespace_says("audit")
            .policy(audit)
            .allowed(&["shop/web 80"])
            .audited(&["bank/teller 80", "nobody 80"]),
        say("it is not in effect where an Allow is")
            .namespace_says("audit")
            .policy("{rules: [{}]}")
            .allowed(&EVERYBODY),
        say("an Audit that names identities leaves the default as it is")
            .policy("{action: Audit, rules: [{from: [{notNamespaces: [shop]}]}, {}]}")
            .allowed(&EVERYBODY),
        say("one about other pods is none")
            .policy("{action: Audit, selector: {matchLabels: {app: web}}}")
            .allowed(&EVERYBODY),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_model::verdict;

    #[test]
    fn the_model_says_what_the_sentences_say() {
        let mut wrong = Vec::new();
        for sentence in all() {
            assert!(!sentence.rows.is_empty(), "{}", sentence.says);
            for (row, expected) in &sentence.rows {
                let (caller, port) = attempt(row).expect("a row");
                let found =
                    verdict(sentence.mesh, &sentence.objects, vault(&sentence.objects), &caller, port);
                if found != *expected {
                    wrong.push(format!(
                        "{}: {row}: {found:?}, not {expected:?}\n  {:?}",
                        sentence.says, sentence.objects
                    ));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
