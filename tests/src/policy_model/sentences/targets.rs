//! Which pods a policy is about.

use serde_json::json;

use super::{EVERYBODY, Sentence, say, service, slice};

pub fn all() -> Vec<Sentence> {
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
