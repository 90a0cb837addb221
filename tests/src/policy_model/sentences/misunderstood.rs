//! Policies that cannot be understood. Each would admit everybody if what is not understood were left out, and denies.

use serde_json::json;

use super::{EVERYBODY, Sentence, say, service};

pub fn all() -> Vec<Sentence> {
    let rules = "rules: [{}]";
    let everywhere = [
        "{rules: [{}], priority: 1}".to_owned(),
        "{rules: [{}, {when: [{key: x}]}]}".to_owned(),
        "{rules: [{}, {from: [{namespaces: [shop], requestPrincipals: [x]}]}]}".to_owned(),
        "{rules: [{}, {from: [{source: {namespaces: [shop]}}]}]}".to_owned(),
        "{rules: [{}, {to: [{ports: [80], protocols: [TCP]}]}]}".to_owned(),
        "{action: ALLOW, rules: [{}]}".to_owned(),
        "{action: Log, rules: [{}]}".to_owned(),
        "{rules: {}}".to_owned(),
        "{action: Deny}".to_owned(),
        "{action: Deny, rules: []}".to_owned(),
        "{rules: [{}, {from: null}]}".to_owned(),
        "{rules: [{}, {to: [{ports: [80], notPorts: null}]}]}".to_owned(),
        "{rules: [{}, {from: []}]}".to_owned(),
        "{rules: [{}, {to: []}]}".to_owned(),
        "{rules: [{}, {from: [{}]}]}".to_owned(),
        "{rules: [{}, {to: [{}]}]}".to_owned(),
        "{rules: [{}, {from: {namespaces: [shop]}}]}".to_owned(),
        "nothing".to_owned(),
        "null".to_owned(),
        format!(
            "{{selector: {{matchLabels: {{app: web}}}}, targetRefs: [{{kind: Service, name: x}}], {rules}}}"
        ),
        format!("{{selector: {{matchLabels: {{app: web}}, matchExpressions: []}}, {rules}}}"),
        format!("{{selector: {{matchLabels: {{app: 1}}}}, {rules}}}"),
        format!("{{selector: {{app: web}}, {rules}}}"),
        format!("{{targetRefs: [], {rules}}}"),
        format!("{{targetRefs: [{{kind: Gateway, name: x}}], {rules}}}"),
        format!("{{targetRefs: [{{kind: Service, name: x}}, {{kind: Pod, name: y}}], {rules}}}"),
        format!("{{targetRefs: [{{group: gateway.networking.k8s.io, kind: Service, name: x}}], {rules}}}"),
        format!("{{targetRefs: [{{kind: Service, name: x, sectionName: http}}], {rules}}}"),
        format!("{{targetRefs: [{{kind: Service}}], {rules}}}"),
        format!("{{targetRefs: [{{kind: Namespace, name: shop}}], {rules}}}"),
    ];
    let source = [
        "principals: []",
        "notPrincipals: ['']",
        "principals: ['cluster.local/ns/shop/sa/web']",
        "principals: ['spiff*']",
        "principals: ['spiffe://cluster.local/ns/shop']",
        "principals: ['spiffe://cluster.local/ns/shop/sa/']",
        "notPrincipals: ['*://cluster.local/ns/shop/sa/web']",
        "principals: ['spiffe://cluster.local/*/sa/web']",
        "principals: ['**']",
        "principals: ['*shop*']",
        "principals: [['*']]",
        "namespaces: []",
        "namespaces: [Shop]",
        "namespaces: ['sh*']",
        "notNamespaces: [shop/web]",
        "namespaces: shop",
        "serviceAccounts: [a/b/c]",
        "serviceAccounts: [shop/]",
        "notServiceAccounts: ['']",
        "serviceAccounts: ['shop/*']",
        "cidrs: []",
        "cidrs: [10.0.0.0]",
        "cidrs: [10.0.0.0/33]",
        "cidrs: [10.0.0.1/8]",
        "notCidrs: [web.example]",
        "cidrs: ['::ffff:10.0.0.0/104']",
    ];
    let to = [
        "ports: []",
        "ports: [0]",
        "ports: [65536]",
        "notPorts: ['80']",
        "ports: [-1]",
        "ports: [8.5]",
        "methods: []",
        "paths: [1]",
        "notHosts: {}",
    ];
    let source = source.iter().map(|list| format!("{{rules: [{{}}, {{from: [{{{list}}}]}}]}}"));
    let to = to.iter().map(|list| format!("{{rules: [{{}}, {{to: [{{{list}}}]}}]}}"));
    let denies = |spec: String| {
        say("what is not understood denies").policy(&spec).policy("{rules: [{}]}").denied(&EVERYBODY)
    };
    let mut sentences: Vec<Sentence> = everywhere.into_iter().chain(source).chain(to).map(denies).collect();
    sentences.extend([
        say("in what it is about, if that can be read")
            .policy("{selector: {matchLabels: {app: web}}, action: Deny, rules: [{when: []}]}")
            .allowed(&EVERYBODY),
        say("and nowhere else")
            .policy("{selector: {matchLabels: {app: vault}}, rules: [{when: []}]}")
            .denied(&EVERYBODY),
        say("be it behind a Service")
            .object(service("safe", json!({"tier": "web"})))
            .policy("{targetRefs: [{kind: Service, name: safe}], action: Nothing}")
            .allowed(&EVERYBODY),
        say("an Allow that is not understood is no Allow: the default holds beside it")
            .policy("{selector: {matchLabels: {app: web}}, rules: [{when: []}]}")
            .allowed(&EVERYBODY),
        say("null is as good as absent")
            .policy("{selector: {matchLabels: null}, targetRefs: null, rules: [{to: [{notPorts: [81]}]}]}")
            .allowed(&["nobody 80"])
            .denied(&["nobody 81"]),
        say("what another namespace's policy says is not read")
            .policy_in("shop", "{nonsense: true}")
            .allowed(&EVERYBODY),
    ]);
    sentences
}
